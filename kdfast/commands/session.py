"""A training command's run: its folder and configuration, the device, signals, logs and the clock."""

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from kdfast import files
from kdfast.commands import toml
from kdfast.commands.config import RunOptions
from kdfast.engine import Console, Options, Run, World, catching, join, locked
from kdfast.engine.interrupt import StopRequest
from kdfast.engine.logs import Log, logs

SECONDS_EVERY = 10.0  # seconds between updates of seconds.txt: kill -9 loses no more than these and an epoch


class Clock:
    """Seconds that a run takes in all, with the sessions that it was resumed from: RUN/seconds.txt."""

    def __init__(self) -> None:
        self._start = self._written = time.monotonic()
        self._before = 0.0  # in earlier sessions
        self._path: Path | None = None

    @property
    def seconds(self) -> float:
        """The seconds so far."""
        return self._before + time.monotonic() - self._start

    def keep_in(self, folder: Path) -> None:
        """Keeps the seconds in this folder, and adds them to the seconds that are there."""
        self._path = folder / "seconds.txt"
        if self._path.exists():
            self._before = float(self._path.read_text())

    def tick(self, line: dict[str, Any]) -> None:
        """Updates the file after an epoch, if the last update is some seconds old."""
        if time.monotonic() - self._written > SECONDS_EVERY:
            self.write()

    def write(self) -> None:
        """Updates the file; a full disk is reported by others."""
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
    """Closed with the session."""

    @property
    def folder(self) -> Path:
        """The run folder."""
        return self.run.folder

    def begin(self) -> None:
        """Claims the folder for this configuration and opens the logs in it; called after all other checks.

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
    """Opens a run: finds its folder (a new one, or with --resume that of this configuration), joins the processes, catches signals.

    Args:
        config: a dataclass with `run: RunOptions`.
        name: name of a new folder under runs/.

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
        with catching() as stop, ExitStack() as closing:
            if world.main:
                files.check_writable(folder, "--out", folder=True)
                closing.enter_context(locked(folder))
            run = Run(folder, world, _speed(options, world), seed=options.seed, stop=stop, console=console)
            yield Session(config, run, world, console, stop, clock, asked, closing)
    finally:
        world.close()


def _agreed(folder: Path, world: World) -> Path:
    """The main process's choice of folder, for all processes."""
    if world.size == 1:
        return folder
    chosen = [str(folder)]
    torch.distributed.broadcast_object_list(chosen, src=0)
    return Path(chosen[0])


def _folder(config: Any, name: str) -> Path:
    if config.run.out is not None:
        if config.run.resume:
            toml.of_run(config.run.out)
        return config.run.out
    if config.run.resume:
        return _newest_of(config)
    number = 1
    while (folder := Path("runs") / (name if number == 1 else f"{name}-{number}")).exists():
        number += 1
    return folder


def _newest_of(config: Any) -> Path:
    """The newest run under runs/ with this configuration."""
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
        "name one with --out, or give the options that it began with"
    )


def _differences(folder: Path, config: Any) -> list[str]:
    path = folder / "config.toml"
    try:
        table = toml.read(path)
        ours, theirs = getattr(config, "recipe", None), table.get("recipe")
        if ours != theirs:
            return [f"recipe is {theirs or 'none (kdfast teacher)'} there and {ours or 'none (kdfast teacher)'} here"]
        before = toml.fill(config, table, str(path))
    except ValueError as error:
        return [str(error)]
    return toml.differences(config, before)


def _claim(folder: Path, config: Any) -> None:
    """Writes config.toml into a new folder, or checks that the run in the folder is the same and may be continued."""
    path = folder / "config.toml"
    if path.exists():
        found = _differences(folder, config)
        if found:
            raise ValueError(toml.foreign(folder, found))
        if not config.run.resume:
            raise ValueError(f"run folder {folder} already holds this run: pass --resume to continue it, or --out for another folder")
        return
    foreign = [p.name for p in folder.iterdir() if p.name != ".lock"]
    if foreign:
        raise ValueError(f"run folder {folder} is neither empty nor a run: it holds {', '.join(sorted(foreign)[:3])}")
    files.write_text(path, toml.dump(replace(config, run=replace(config.run, out=None, resume=False))))


def _speed(options: RunOptions, world: World) -> Options:
    cuda = world.device.type == "cuda"
    precision = ("bf16" if cuda else "fp32") if options.precision == "auto" else options.precision
    compiled = cuda if options.compile == "auto" else options.compile == "on"
    return Options(precision, compiled, options.checkpoint_minutes)
