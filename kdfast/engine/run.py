"""A run: the stages of a recipe in order, in one folder, from which it resumes wherever it was killed.

    RUN/config.toml                    everything that was asked for
    RUN/metrics.jsonl                  one line an epoch and stage
    RUN/checkpoint.pt                  the stage under way: weights, optimizer, loader, random states
    RUN/stages/<stage>/best.safetensors, last.safetensors, stage.json     a finished stage; stage.json is written last

A recipe is a generator that yields stages. On resume it runs again from its start: finished stages are restored, the one under way
continues from the checkpoint. What a recipe builds between stages is seeded by the place where it stands, so it comes out the same.
"""

import fcntl
import json
import pickle
import statistics
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TextIO, TypeVar

import torch
from torch import nn

from kdfast import files
from kdfast.engine import random_state
from kdfast.engine.console import Console
from kdfast.engine.distributed import World
from kdfast.engine.interrupt import Interrupted, StopRequest
from kdfast.engine.journal import Journal
from kdfast.engine.loop import Options, StageLoop
from kdfast.engine.metrics import NonFiniteLoss
from kdfast.engine.stage import Stage
from kdfast.models import load_weights, save_weights

T = TypeVar("T")
Observer = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class StageResult:
    """A finished stage; its trained modules hold the weights that were kept."""

    name: str
    epoch: int
    """The epoch whose weights were kept, from 1."""
    epochs: int
    """Epochs run."""
    metrics: dict[str, float]
    """Validation metrics of that epoch."""
    seconds: float
    """In training epochs, validation left out."""
    images_per_s: float
    """Median over epochs, the first left out where there are more."""
    kept: str
    """"best" or "last"."""
    folder: Path
    modules: Sequence[nn.Module]

    def restore(self, which: str) -> None:
        """Loads the "best" or "last" weights into the trained modules.

        Raises:
            ValueError: the file is damaged or gone.
        """
        with _reading(self.folder):
            load_weights(nn.ModuleList(self.modules), self.folder / f"{which}.safetensors")


class Run:
    """Runs stages in a folder.

    Args:
        folder: the run's folder; must exist.
        world: this process among all.
        options: precision, compilation.
        stop: asked between steps; when set, the run saves and raises Interrupted.
        seed: where all randomness of the run begins.
        console: shows progress.
        observers: called with every line of metrics.jsonl (TensorBoard, W&B); more may be added to `observers` later.
    """

    def __init__(
        self,
        folder: Path,
        world: World,
        options: Options,
        *,
        seed: int = 0,
        stop: StopRequest | None = None,
        console: Console | None = None,
        observers: Sequence[Observer] = (),
    ):
        self.folder, self.world, self.options, self.seed = folder, world, options, seed
        self._stop = stop if stop is not None else StopRequest()
        self._console = console if console is not None else Console(quiet=True)
        self.observers = list(observers)
        self._journal = Journal(folder / "metrics.jsonl")
        self._journal_size = 0  # bytes that finished stages account for
        self._prefix = ""

    @contextmanager
    def section(self, name: str, seed: int) -> Iterator[None]:
        """Within the block stages are named `name`/<stage> and all randomness begins at `seed`."""
        before = self._prefix, self.seed
        self._prefix, self.seed = f"{self._prefix}{name}/", seed
        try:
            yield
        finally:
            self._prefix, self.seed = before

    def complete(self, stages: Generator[Stage, StageResult, T]) -> T:
        """Runs all stages that the generator yields, sending each its StageResult, and returns what the generator returns.

        Raises:
            Interrupted: a stop was requested, and all is saved.
            NonFiniteLoss: a loss term became NaN or infinite; the last checkpoint is kept.
        """
        random_state.seed_all(random_state.derive(self.seed, self._prefix))
        send: StageResult | None = None
        while True:
            try:
                stage = stages.send(send) if send is not None else next(stages)
            except StopIteration as end:
                return end.value
            stage = replace(stage, name=self._prefix + stage.name)
            random_state.seed_all(random_state.derive(self.seed, stage.name, "stage"))
            send = self._fit(stage)
            random_state.seed_all(random_state.derive(self.seed, stage.name, "after"))

    def _fit(self, stage: Stage) -> StageResult:
        folder = self.folder / "stages" / stage.name
        if (folder / "stage.json").exists():
            return self._finished(stage, folder)
        folder.mkdir(parents=True, exist_ok=True)
        checkpoint = self.folder / "checkpoint.pt"
        with self._console.stage(stage.name, stage.training.epochs, stage.data.train.samples * self.world.size) as progress:
            loop = StageLoop(stage, self.world, self.options, self._stop, progress.step)
            if not self.world.main:  # all was made alike; from here on each process drops other units and draws other negatives
                random_state.seed_all(random_state.derive(self.seed, stage.name, "stage", self.world.rank))
            state = _read(checkpoint) if checkpoint.exists() else None
            if state is not None and state["stage"] == stage.name:
                loop.load_state_dict(state)
                self._cut_journal(state["journal_size"])
            else:
                self._cut_journal(self._journal_size)

            def save() -> None:
                state = loop.state_dict()
                if self.world.main:
                    files.write_torch(checkpoint, state | {"journal_size": self._journal.size})
                self.world.barrier()

            for line in loop.epochs(save):
                if self.world.main:
                    if line["best"]:
                        with loop.averaged_weights():
                            save_weights(loop.trained, folder / "best.safetensors", stage.metadata)
                    self._journal.append(line)
                    for observe in self.observers:
                        observe(line)
                progress.epoch(line)
                save()
                if self.world.any(bool(self._stop)):
                    break
            if self.world.any(bool(self._stop)):
                raise Interrupted(self._stop.signal_number or 15)
        if loop.best_epoch < 0:
            raise NonFiniteLoss(f"stage {stage.name}: {stage.best} was never a number, so there is no best epoch to keep")
        if self.world.main:
            self._finish(stage, loop, folder)
        self.world.barrier()
        return self._finished(stage, folder)

    def _cut_journal(self, size: int) -> None:
        if self.world.main:
            self._journal.cut(size)

    def _finish(self, stage: Stage, loop: StageLoop, folder: Path) -> None:
        with loop.averaged_weights():
            save_weights(loop.trained, folder / "last.safetensors", stage.metadata)
        lines = [line for line in self._journal.lines() if line["stage"] == stage.name]
        kept = lines[-1] if stage.keep == "last" else lines[loop.best_epoch]
        rates = [line["images_per_s"] for line in lines]
        files.write_json(
            folder / "stage.json",
            {
                "epoch": kept["epoch"],
                "epochs": len(lines),
                "metrics": {name: value for name, value in kept.items() if name.startswith("val/")},
                "seconds": round(loop.seconds, 3),
                "images_per_s": statistics.median(rates[1:] or rates),
                "kept": stage.keep,
                "journal_size": self._journal.size,
            },
        )

    def _finished(self, stage: Stage, folder: Path) -> StageResult:
        with _reading(folder):
            facts = json.loads((folder / "stage.json").read_text())
        self._journal_size = facts["journal_size"]
        for module in stage.train:
            module.to(self.world.device)
        result = StageResult(
            stage.name,
            facts["epoch"],
            facts["epochs"],
            facts["metrics"],
            facts["seconds"],
            facts["images_per_s"],
            facts["kept"],
            folder,
            stage.train,
        )
        result.restore(result.kept)
        for module in stage.train:
            module.eval()
        return result


def _read(checkpoint: Path) -> dict[str, Any]:
    with checkpoint.open("rb") as file:  # whoever may not open it should not be told to delete it
        try:
            state = torch.load(file, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError, IndexError, AttributeError):
            state = None
    if not isinstance(state, dict) or not {"stage", "journal_size"} <= state.keys():
        raise ValueError(f"{checkpoint} is damaged: delete it to continue from the last finished stage")
    return state


@contextmanager
def _reading(folder: Path) -> Iterator[None]:
    """Says what to do where a file of a finished stage is damaged or gone: the stages after it have their place in the journal, too."""
    try:
        yield
    except (ValueError, FileNotFoundError) as error:
        raise ValueError(f"{error}: delete {folder} and the folders of the stages after it to train these again") from error


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds the run folder for this process.

    Raises:
        ValueError: another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file: TextIO
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"run folder {folder}: another process is running in it") from None
        yield
