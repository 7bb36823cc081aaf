"""A training command's run: its folder and configuration, the device, signals, logs and the clock."""

import shutil
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
from kdfast.machine import cores


class Clock:
    """Seconds that a run takes in all, with the sessions that it was resumed from. They are kept in a file."""

    def __init__(self, path: Path):
        self._path = path
        try:
            earlier = float(path.read_text()) if path.exists() else 0.0
        except ValueError:
            raise ValueError(f"{path} is damaged: delete it to count the seconds from 0") from None
        self._start = time.monotonic() - earlier

    @property
    def seconds(self) -> float:
        """The seconds so far."""
        return time.monotonic() - self._start

    def write(self, *_: object) -> None:
        """Updates the file; a full disk is reported by others."""
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

    def begin(self, **identity: str) -> None:
        """Claims the folder for this configuration and opens the logs in it; called after all other checks.

        Args:
            identity: what else the run's numbers depend on (see Saved.identity).

        Raises:
            ValueError: another process is running in the folder, it holds another configuration's run, or one that --resume was not asked
                for, its files are damaged, or other data or weights have made them; or a log cannot be opened. A folder that would be
                new is not left behind.
        """
        self.run.saved.identity = {"options (config.toml)": toml.fingerprint(self.config)} | identity
        if self.world.main:
            self.closing.enter_context(locked(self.folder))
            files.remove_partial([*self.folder.glob(".*"), *self.folder.glob("stages/**/.*")])  # of a killed process
            new = _claim(self.folder, self.config)
            self.run.saved.check()
            try:
                self.run.observers.extend(self.closing.enter_context(log(self.folder)) for log in self.logs)
            except Exception as error:  # whatever a service raises without a key or a network
                if new:
                    shutil.rmtree(self.folder, ignore_errors=True)
                raise ValueError(f"--log {', '.join(self.config.run.log)}: {error}") from error
            self.closing.callback(self.clock.write)
            self.run.observers.append(self.clock.write)
        self.world.barrier()


@contextmanager
def session(config: Any, name: str) -> Iterator[Session]:
    """Opens a run: finds its folder (a new one, or with --resume that of this configuration), joins the processes, catches signals.

    Args:
        config: a dataclass with `run: RunOptions`.
        name: name of a new folder under runs/.

    Raises:
        ValueError: no such device, a log whose package is not installed, a folder that cannot be made, or no run to resume.
    """
    options: RunOptions = config.run
    torch.set_num_threads(options.threads or min(torch.get_num_threads(), cores()))  # a container may allow fewer than PyTorch sees
    asked = logs(options.log)
    world = join(options.device)
    console = Console(quiet=not world.main)
    try:
        folder = Path(world.gather(str(_folder(config, name)))[0])  # all processes take the main process's choice
        with catching() as stop, ExitStack() as closing:
            if world.main:
                files.check_writable(folder, "--out", folder=True)
            run = Run(folder, world, _speed(options, world), seed=options.seed, stop=stop, console=console)
            yield Session(config, run, world, console, stop, Clock(folder / "seconds.txt"), asked, closing)
    finally:
        world.close()


def _folder(config: Any, name: str) -> Path:
    if config.run.out is not None:
        if config.run.resume:
            toml.of_run(config.run.out)
        return config.run.out
    if config.run.resume:
        return _newest_of(config, name)
    number = 1
    while (folder := Path("runs") / (name if number == 1 else f"{name}-{number}")).exists():
        number += 1
    return folder


def _newest_of(config: Any, name: str) -> Path:
    """The newest run under runs/ with this configuration, or else one that was killed before it wrote any."""
    runs = sorted((p for p in Path("runs").glob("*") if (p / "config.toml").is_file()), key=lambda p: p.stat().st_mtime, reverse=True)
    others = []
    for folder in runs:
        found = _differences(folder, config)
        if not found:
            return folder
        others.append(f"{folder} ({'; '.join(found[:3])})")
    for folder in sorted(Path("runs").glob("*")):
        if folder.name.startswith(name) and toml.unfinished(folder):
            return folder
    if not others:
        raise ValueError("--resume: there are no runs under runs/: name the run's folder with --out, or begin one without --resume")
    raise ValueError(
        f"--resume: no run under runs/ has these options, the newest are {', '.join(others[:3])}: "
        "name one with --out, or give the options that it began with"
    )


def _differences(folder: Path, config: Any) -> list[str]:
    path = folder / "config.toml"
    try:
        table = toml.read(path, sealed=True)
        ours, theirs = getattr(config, "recipe", None), table.get("recipe")
        if ours != theirs:
            return [f"recipe is {theirs or 'none (kdfast teacher)'} there and {ours or 'none (kdfast teacher)'} here"]
        before = toml.fill(config, table, str(path))
    except ValueError as error:
        return [str(error)]
    return toml.differences(config, before)


def _claim(folder: Path, config: Any) -> bool:
    """Writes config.toml into a new folder, or checks that the run in the folder is the same and may be continued; True if it is new."""
    path = folder / "config.toml"
    if path.exists():
        found = _differences(folder, config)
        if found:
            raise ValueError(toml.foreign(folder, found))
        if not config.run.resume:
            raise ValueError(f"run folder {folder} already holds this run: pass --resume to continue it, or --out for another folder")
        return False
    foreign = [p.name for p in folder.iterdir() if p.name != ".lock"]
    if foreign:
        raise ValueError(f"run folder {folder} is neither empty nor a run: it holds {', '.join(sorted(foreign)[:3])}")
    files.write_text(path, toml.seal(toml.dump(replace(config, run=replace(config.run, out=None, resume=False)))))
    return True


def _speed(options: RunOptions, world: World) -> Options:
    cuda = world.device.type == "cuda"
    precision = ("bf16" if cuda else "fp32") if options.precision == "auto" else options.precision
    compiled = cuda if options.compile == "auto" else options.compile == "on"
    return Options(precision, compiled, options.checkpoint_minutes)
