"""What every training command needs around its run: the folder, its configuration, the device, signals, loaders, the closing results."""

import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console as RichConsole
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from kdfast import files, machine
from kdfast.commands import config as configuration
from kdfast.commands.config import DataOptions, RunOptions
from kdfast.data import DataError, ImageData, Loaders, hide_labels, load, make_loaders, usable
from kdfast.engine import Console, Interrupted, Options, Run, Training, World, catching, join, locked
from kdfast.engine.interrupt import StopRequest
from kdfast.engine.logs import Log, logs
from kdfast.runs import artifact
from kdfast.runs.artifact import Preparation

PLAIN_EVERY = 10.0  # seconds between lines of progress where there is no terminal
SECONDS_EVERY = 10.0  # seconds between writings of how long a run has taken: what kill -9 forgets at most, after an epoch's end
BEAT_EVERY = 30.0  # seconds that processes wait for one another at most: NCCL gives up after ten minutes


class Clock:
    """How long a run takes in all, the sessions that it was resumed from included: RUN/seconds.txt."""

    def __init__(self) -> None:
        self._start = self._written = time.monotonic()
        self._before = 0.0  # in earlier sessions
        self._path: Path | None = None

    @property
    def seconds(self) -> float:
        """So far."""
        return self._before + time.monotonic() - self._start

    def keep_in(self, folder: Path) -> None:
        """From here on the seconds are kept in this folder, and count on from those that it holds."""
        self._path = folder / "seconds.txt"
        if self._path.exists():
            self._before = float(self._path.read_text())

    def tick(self, line: dict[str, Any]) -> None:
        """An epoch has ended."""
        if time.monotonic() - self._written > SECONDS_EVERY:
            self.write()

    def write(self) -> None:
        """Keeps the seconds so far; a full disk is for others to tell of."""
        self._written = time.monotonic()
        if self._path is not None:
            with suppress(OSError):
                files.write_text(self._path, f"{self.seconds:.3f}\n")


@dataclass(frozen=True)
class Session:
    """An open run: its configuration, folder and engine."""

    config: Any
    run: Run
    world: World
    console: Console
    stop: StopRequest
    clock: Clock
    logs: Sequence[Log]
    closing: ExitStack
    """Is closed with the session."""

    @property
    def folder(self) -> Path:
        """The run folder."""
        return self.run.folder

    def begin(self) -> None:
        """Takes the folder for this configuration, and opens the logs in it; to be called once all else has been found right.

        Raises:
            ValueError: the folder holds another configuration's run, or one that --resume was not asked for.
        """
        if self.world.main:
            _claim(self.folder, self.config)
            self.clock.keep_in(self.folder)
            self.closing.callback(self.clock.write)
            self.run.observers.append(self.clock.tick)
            self.run.observers.extend(self.closing.enter_context(log(self.folder)) for log in self.logs)
        self.world.barrier()


@contextmanager
def session(config: Any, name: str) -> Iterator[Session]:
    """Opens the run folder (a new one, or on --resume the one of this configuration), joins the other processes, catches signals.

    Args:
        config: a dataclass with `run: RunOptions`.
        name: of a new folder under runs/.

    Raises:
        ValueError: no such device, a log whose package is not installed, a folder that cannot be made or that another process is running
            in, or no run to resume.
    """
    options: RunOptions = config.run
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    clock, asked = Clock(), logs(options.log)
    world = join(options.device)
    console = Console(quiet=not world.main)
    try:
        folder = _agreed(_folder(config, name), world)
        with _held(folder, world), catching() as stop, ExitStack() as closing:
            run = Run(folder, world, _speed(options, world), seed=options.seed, stop=stop, console=console)
            yield Session(config, run, world, console, stop, clock, asked, closing)
    finally:
        world.close()


@contextmanager
def _held(folder: Path, world: World) -> Iterator[None]:
    if not world.main:
        yield
        return
    files.check_writable(folder, "--out", folder=True)
    with locked(folder):
        yield


def _agreed(folder: Path, world: World) -> Path:
    """The main process's choice of folder: others may see it after it was made."""
    if world.size == 1:
        return folder
    chosen = [str(folder)]
    torch.distributed.broadcast_object_list(chosen, src=0)
    return Path(chosen[0])


def _folder(config: Any, name: str) -> Path:
    if config.run.out is not None:
        if config.run.resume:
            configuration.of_run(config.run.out)
        return config.run.out
    if config.run.resume:
        return _newest_of(config)
    number = 1
    while (folder := Path("runs") / (name if number == 1 else f"{name}-{number}")).exists():
        number += 1
    return folder


def _newest_of(config: Any) -> Path:
    """The newest run under runs/ that has this configuration."""
    runs = sorted((p for p in Path("runs").glob("*") if (p / "config.toml").is_file()), key=lambda p: p.stat().st_mtime, reverse=True)
    others = []
    for folder in runs:
        found = _differences(folder, config)
        if not found:
            return folder
        others.append(f"{folder} ({'; '.join(found[:3])})")
    if not others:
        raise ValueError("--resume: there are no runs under runs/: name the run's folder with --out, or begin one without --resume")
    raise ValueError(
        f"--resume: no run under runs/ has these options, the newest are {', '.join(others[:3])}: "
        "name one with --out, or give the very options it was begun with"
    )


def _differences(folder: Path, config: Any) -> list[str]:
    path = folder / "config.toml"
    try:
        table = configuration.read_toml(path)
        ours, theirs = getattr(config, "recipe", None), table.get("recipe")
        if ours != theirs:
            return [f"recipe is {theirs or 'none (kdfast teacher)'} there and {ours or 'none (kdfast teacher)'} here"]
        before = configuration.filled(config, table, str(path))
    except ValueError as error:
        return [str(error)]
    return configuration.differences(config, before)


def _claim(folder: Path, config: Any) -> None:
    """Writes config.toml into a new folder, or checks that the one there is ours to continue."""
    path = folder / "config.toml"
    if path.exists():
        found = _differences(folder, config)
        if found:
            raise ValueError(configuration.foreign(folder, found))
        if not config.run.resume:
            raise ValueError(f"run folder {folder} already holds this run: pass --resume to continue it, or --out for another folder")
        return
    foreign = [p.name for p in folder.iterdir() if p.name != ".lock"]
    if foreign:
        raise ValueError(f"run folder {folder} is neither empty nor a run: it holds {', '.join(sorted(foreign)[:3])}")
    files.write_text(path, configuration.to_toml(replace(config, run=replace(config.run, out=None, resume=False))))


def _speed(options: RunOptions, world: World) -> Options:
    cuda = world.device.type == "cuda"
    precision = ("bf16" if cuda else "fp32") if options.precision == "auto" else options.precision
    compiled = cuda if options.compile == "auto" else options.compile == "on"
    return Options(precision, compiled, options.checkpoint_minutes)


# ---- data ------------------------------------------------------------------------------------------------------------


def load_data(
    options: DataOptions, seed: int, world: World, rich: RichConsole, stop: StopRequest | None = None
) -> tuple[ImageData, list[str]]:
    """The images that the options name, without the bad files among them; and what is to be noted of those.

    Raises:
        DataError: no such data, or more bad files than options.max_bad_files.
        Interrupted: `stop` was set while the files were checked; what was found is kept.
    """
    data = load(options.dataset, data_dir=options.data_dir, val_fraction=options.val_fraction, seed=seed, max_images=options.max_images)
    notes: list[str] = []
    shown = rich if world.main else RichConsole(quiet=True)

    def checked(beat: Callable[[], None]) -> ImageData:
        with checking(shown, stop, beat) as progress:
            return usable(data, max_bad_files=options.max_bad_files, say=notes.append, progress=progress)

    data = _one_after_the_others(world, checked)
    for note in notes:
        shown.print(f"  {note}", highlight=False)
    return data, notes


def _one_after_the_others(world: World, checked: Callable[[Callable[[], None]], ImageData]) -> ImageData:
    """`checked` on the first process of each machine, then on the others, which find all in that machine's cache and open nothing.

    Whoever has nothing to do asks all processes, again and again, whether one is still checking; one that is answers twice a minute, so
    that no process waits longer than NCCL allows. An error ends a process only after the last such question: the others then meet it
    in turn, rather than waiting for one that has left. Where the cache cannot be written each process checks by itself.
    """
    asked = time.monotonic()

    def beat() -> None:
        nonlocal asked
        if time.monotonic() - asked > BEAT_EVERY:
            world.any(True)
            asked = time.monotonic()

    def wait() -> None:
        while world.any(False):
            pass

    if world.size == 1:
        return checked(lambda: None)
    if os.environ.get("LOCAL_RANK", str(world.rank)) == "0":
        try:
            data = checked(beat)
        finally:
            wait()
    else:
        wait()
        data = checked(lambda: None)
    if len(set(world.gather((len(data.train), len(data.val), len(data.test))))) > 1:
        raise DataError(f"{data.name}: not all processes can read the same image files: see kdfast data check on each machine")
    return data


@contextmanager
def checking(
    rich: RichConsole, stop: StopRequest | None = None, beat: Callable[[], None] = lambda: None
) -> Iterator[Callable[[int, int], None]]:
    """A function for the progress of a check of image files, shown where it takes more than a moment.

    Raises:
        Interrupted: by that function, where `stop` was set.
    """
    terminal = rich.is_terminal and not rich.quiet
    start = shown = time.monotonic()
    columns = TextColumn("{task.description}"), BarColumn(30), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=rich, transient=True, disable=not terminal) as bar:
        task = bar.add_task("  checking image files", total=None, visible=False)

        def progress(done: int, total: int) -> None:
            nonlocal shown
            if stop is not None and stop.signal_number is not None:
                raise Interrupted(stop.signal_number)
            beat()
            now = time.monotonic()
            bar.update(task, completed=done, total=total, visible=now - start > 1)
            if not terminal and now - shown > PLAIN_EVERY:
                shown = now
                rich.print(f"  checking image files: {done:,} of {total:,}", highlight=False)

        yield progress


def preparation(data: ImageData, options: DataOptions) -> Preparation:
    """How images become input: as asked for, else as suits the data set.

    Raises:
        ValueError: there is no such normalization.
    """
    mean, std = data.mean, data.std
    if options.normalization is not None:
        mean, std = artifact.statistics(options.normalization)
    return Preparation(mean, std, options.image_size or data.image_size, options.evaluation or data.eval_transform)


def loader_maker(
    data: ImageData, options: DataOptions, prepared: Preparation, seed: int, world: World, say: Callable[[str], None]
) -> Callable[[Training, str | None, bool, int], Loaders]:
    """A function (training, augmentation or None, all labels shown, seed of the order) -> loaders.

    Which labels are hidden depends on `seed` alone: every arm and every repetition sees the same ones. Which loader it is and why is
    said once, not for every stage.
    """
    hidden, said = data, set[str]()
    if options.label_fraction < 1:
        hidden = replace(data, train=hide_labels(data.train, options.label_fraction, seed=seed))

    def say_once(sentence: str) -> None:
        if sentence not in said:
            said.add(sentence)
            say(f"  {sentence}")

    def make(training: Training, augment: str | None, all_labels: bool, order_seed: int) -> Loaders:
        if training.batch_size % world.size:
            raise ValueError(f"batch_size must be a multiple of the {world.size} processes, got {training.batch_size}")
        return make_loaders(
            replace(data if all_labels else hidden, mean=prepared.mean, std=prepared.std),
            batch_size=training.batch_size // world.size,
            micro_batch=training.micro_batch_per_process(world.size),
            loader=options.loader,
            train_transform=augment or options.augment,
            eval_transform=prepared.evaluation,
            image_size=prepared.image_size,
            seed=order_seed,
            workers=options.workers,
            device=world.device,
            rank=world.rank,
            world_size=world.size,
            channels_last=True,  # what convolutions are fastest in, on CPUs and GPUs alike
            say=say_once,
        )

    return make


# ---- the environment -------------------------------------------------------------------------------------------------


def environment(world: World) -> Mapping[str, Any]:
    """What the results were made with."""
    command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
    return machine.facts() | {"processes": world.size, "device": str(world.device), "command": command}
