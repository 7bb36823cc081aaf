"""A run: the stages of a recipe in order, in one folder. A run that was killed at any point resumes from there.

A recipe is a generator that yields stages. On resume it runs again from its start: finished stages are restored, the current one
continues from the checkpoint. Each stage's name seeds the random numbers that follow it, so modules that a recipe builds between stages
come out the same.
"""

import os
import statistics
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, TypeVar

from torch import nn

from kdfast.engine import random_state
from kdfast.engine.console import Console, StageProgress
from kdfast.engine.distributed import World
from kdfast.engine.interrupt import Interrupted, StopRequest
from kdfast.engine.loop import Options, StageLoop
from kdfast.engine.metrics import NonFiniteLoss
from kdfast.engine.saved import Saved, explain_damage, train_again
from kdfast.engine.stage import Stage
from kdfast.models import load_weights
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
        with explain_damage(train_again(self.folder)):
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
        self.saved = Saved(folder)
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
                self._write_result(stage, loop)
            self.world.barrier()
        return self._restore(stage, folder)

    def _train(self, stage: Stage, folder: Path, progress: StageProgress) -> StageLoop:
        saved, name = self.saved, stage.name
        loop = StageLoop(stage, self.world, self.options, self._stop, progress.step)
        if not self.world.main:  # all modules were built alike; from here on each process draws its own dropout masks and negatives
            random_state.seed_all(random_state.derive(self.seed, name, "stage", self.world.rank))

        def save() -> None:
            state = loop.state_dict()
            if self.world.main:
                saved.write_checkpoint(state)
            self.world.barrier()

        state = saved.read_checkpoint()
        if state is not None and state["stage"] == name:
            loop.load_state_dict(state)
            self._journal_size = state["journal"][0]
        begins = state is None or state["stage"] != name
        self.world.barrier()  # all have read the checkpoint
        if self.world.main:
            if begins:
                saved.checkpoint.unlink(missing_ok=True)  # of another stage, which needs the lines that are cut off
            saved.journal.cut(self._journal_size)
        if begins:
            save()  # a full disk shows now, not after an epoch
        for line in loop.epochs(save):
            if self.world.main:
                if line["best"]:
                    with loop.averaged_weights():
                        saved.save_weights(name, "best", line["epoch"], loop.trained, stage.metadata)
                saved.journal.append(line)
                for observe in self.observers:
                    observe(line)
            progress.epoch(line)
            save()
            if self.world.any(bool(self._stop)):
                break
        if self.world.any(bool(self._stop)):
            raise Interrupted(self._stop.signal_number or 15)
        return loop

    def _write_result(self, stage: Stage, loop: StageLoop) -> None:
        lines = [line for line in self.saved.journal.lines() if line["stage"] == stage.name]
        if len(lines) != loop.epoch:
            raise ValueError(f"{self.folder / 'metrics.jsonl'} was changed while the run wrote it")
        with loop.averaged_weights():
            self.saved.save_weights(stage.name, "last", len(lines), loop.trained, stage.metadata)
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
        self.saved.write_stage(stage.name, {"result": facts, "best_epoch": loop.best_epoch + 1})

    def _restore(self, stage: Stage, folder: Path) -> StageResult:
        facts = self.saved.read_stage(stage.name)
        self._journal_size = facts["journal"][0]
        for module in stage.train:
            module.to(self.world.device)
        result = StageResult(stage.name, folder=folder, modules=stage.train, **facts["result"])
        result.restore(result.kept)
        for module in stage.train:
            module.eval()
        return result


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
        _locks.append(file)
        try:
            yield
        finally:
            _locks.remove(file)


_locks: list[IO[str]] = []
if hasattr(os, "register_at_fork"):  # a loader's worker outlives a killed process by seconds; its copy of the file must not hold the lock
    os.register_at_fork(after_in_child=lambda: [file.close() for file in _locks])
