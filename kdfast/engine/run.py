"""A run: the stages of a recipe in order, in one folder. A run that was killed at any point resumes from there.

    RUN/config.toml                    all options
    RUN/metrics.jsonl                  one line an epoch and stage
    RUN/checkpoint.pt                  the current stage: weights, optimizer, loader, random states
    RUN/stages/<stage>/best.safetensors, last.safetensors, stage.json     a finished stage; stage.json is written last

A recipe is a generator that yields stages. On resume it runs again from its start: finished stages are restored, the current one
continues from the checkpoint. Each stage's name seeds the random numbers that follow it, so modules that a recipe builds between stages
come out the same.
"""

import json
import pickle
import statistics
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from kdfast import files
from kdfast.engine import random_state
from kdfast.engine.console import Console, StageProgress
from kdfast.engine.distributed import World
from kdfast.engine.interrupt import Interrupted, StopRequest
from kdfast.engine.journal import Journal
from kdfast.engine.loop import Options, StageLoop
from kdfast.engine.metrics import NonFiniteLoss
from kdfast.engine.stage import Stage
from kdfast.models import load_weights, save_weights
from kdfast.runs.results import Kept

try:
    import fcntl
except ImportError:  # Windows: there a second process in one run folder is not noticed
    fcntl = None  # type: ignore[assignment]

T = TypeVar("T")
Observer = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class StageResult:
    """A finished stage; its trained modules hold the kept weights.

    Attributes:
        name: of the stage.
        epoch: the epoch of the kept weights, from 1.
        epochs: number of epochs that were run.
        metrics: validation metrics of the kept epoch.
        seconds: time of the training epochs, without validation.
        images_per_s: median over epochs, without the first if there are more.
        kept: "best" or "last".
        folder: of the stage's files.
        modules: the trained modules.

    Example:
        >>> from pathlib import Path
        >>> from kdfast.engine import StageResult
        >>> result = StageResult("distil", 7, 10, {"val/top1": 0.9}, 12.5, 800.0, "best", Path("runs/kd/stages/distil"), modules=())
        >>> result.epoch, result.metrics["val/top1"]
        (7, 0.9)
    """

    name: str
    epoch: int
    epochs: int
    metrics: dict[str, float]
    seconds: float
    images_per_s: float
    kept: Kept
    folder: Path
    modules: Sequence[nn.Module]

    def restore(self, which: Kept) -> None:
        """Loads the "best" or "last" weights into the trained modules.

        Raises:
            ValueError: the file is damaged or missing.
        """
        with _explain_damage(self.folder):
            load_weights(nn.ModuleList(self.modules), self.folder / f"{which}.safetensors")


class Run:
    """Runs stages in a folder.

    Args:
        folder: the run's folder; must exist.
        world: this process among all.
        options: precision, compilation.
        stop: asked between steps; when set, the run saves and raises Interrupted.
        seed: seed of all random numbers of the run.
        console: shows progress.
        observers: called with every line of metrics.jsonl (TensorBoard, W&B); more may be added to `observers` later.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from kdfast.engine import Options, Run, join
        >>> def recipe():
        ...     return "student"
        ...     yield  # stages
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     Run(Path(folder), join("cpu"), Options(), seed=1).complete(recipe())
        'student'
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
        """Within the block stages are named `name`/<stage>, and `seed` seeds all random numbers."""
        before = self._prefix, self.seed
        self._prefix, self.seed = f"{self._prefix}{name}/", seed
        try:
            yield
        finally:
            self._prefix, self.seed = before

    def complete(self, stages: Generator[Stage, StageResult, T]) -> T:
        """Runs all stages that the generator yields, sends it each StageResult, and returns its result.

        Raises:
            Interrupted: a stop was requested; everything is saved.
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
        if not (folder / "stage.json").exists():
            folder.mkdir(parents=True, exist_ok=True)
            images = stage.data.train.samples * self.world.size
            with self._console.stage(stage.name, stage.training.epochs, images) as progress:
                loop = self._train(stage, folder, progress)
            if loop.best_epoch < 0:
                raise NonFiniteLoss(f"stage {stage.name}: {stage.best} was never a number, so there is no best epoch to keep")
            if self.world.main:
                self._write_result(stage, loop, folder)
            self.world.barrier()
        return self._restore(stage, folder)

    def _train(self, stage: Stage, folder: Path, progress: StageProgress) -> StageLoop:
        checkpoint = self.folder / "checkpoint.pt"
        loop = StageLoop(stage, self.world, self.options, self._stop, progress.step)
        if not self.world.main:  # all modules were built alike; from here on each process draws its own dropout masks and negatives
            random_state.seed_all(random_state.derive(self.seed, stage.name, "stage", self.world.rank))
        journal_size = self._journal_size
        if checkpoint.exists() and (state := _read_checkpoint(checkpoint))["stage"] == stage.name:
            loop.load_state_dict(state)
            journal_size = state["journal_size"]
        if self.world.main:
            self._journal.cut(journal_size)

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
        return loop

    def _write_result(self, stage: Stage, loop: StageLoop, folder: Path) -> None:
        with loop.averaged_weights():
            save_weights(loop.trained, folder / "last.safetensors", stage.metadata)
        lines = [line for line in self._journal.lines() if line["stage"] == stage.name]
        kept = lines[-1] if stage.keep == "last" else lines[loop.best_epoch]
        rates = [line["images_per_s"] for line in lines]
        facts = {
            "epoch": kept["epoch"],
            "epochs": len(lines),
            "metrics": {name: value for name, value in kept.items() if name.startswith("val/")},
            "seconds": round(sum(line["seconds"] for line in lines), 3),
            "images_per_s": statistics.median(rates[1:] or rates),
            "kept": stage.keep,
        }
        files.write_json(folder / "stage.json", facts | {"journal_size": self._journal.size})

    def _restore(self, stage: Stage, folder: Path) -> StageResult:
        with _explain_damage(folder):
            facts = json.loads((folder / "stage.json").read_text())
            self._journal_size = facts.pop("journal_size")
        for module in stage.train:
            module.to(self.world.device)
        result = StageResult(stage.name, folder=folder, modules=stage.train, **facts)
        result.restore(result.kept)
        for module in stage.train:
            module.eval()
        return result


def _read_checkpoint(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:  # a missing permission must not be reported as damage
        try:
            state = torch.load(file, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError, IndexError, AttributeError):
            state = None
    if not isinstance(state, dict) or not {"stage", "journal_size"} <= state.keys():
        raise ValueError(f"{path} is damaged: delete it to continue from the last finished stage")
    return state


@contextmanager
def _explain_damage(folder: Path) -> Iterator[None]:
    """Says what to do if a file of a finished stage is damaged or missing; later stages depend on its place in the journal."""
    try:
        yield
    except (ValueError, FileNotFoundError) as error:
        raise ValueError(f"{error}: delete {folder} and the folders of the stages after it to train these again") from error


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Locks the run folder for this process within the block. On Windows nothing is locked.

    Raises:
        ValueError: another process runs in it.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from kdfast.engine import locked
        >>> with tempfile.TemporaryDirectory() as folder, locked(Path(folder)):
        ...     pass  # train
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        if fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(f"run folder {folder}: another process is running in it") from None
        yield
