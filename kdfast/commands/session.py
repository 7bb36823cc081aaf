"""What every training command needs around its run: the folder, its configuration, the device, signals, loaders, the closing results."""

import shlex
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from kdfast import files, machine
from kdfast.commands import artifact
from kdfast.commands import config as configuration
from kdfast.commands.artifact import Preparation
from kdfast.commands.config import DataOptions, RunOptions
from kdfast.data import ImageData, Loaders, hide_labels, load, make_loaders
from kdfast.engine import Console, Options, Run, Training, World, catching, join, locked
from kdfast.engine.logs import observers


@dataclass(frozen=True)
class Session:
    """An open run: its configuration, folder and engine."""

    config: Any
    run: Run
    world: World
    console: Console

    @property
    def folder(self) -> Path:
        """The run folder."""
        return self.run.folder

    def begin(self) -> None:
        """Takes the folder for this configuration; to be called once all else has been found right.

        Raises:
            ValueError: the folder holds another configuration's run, or one that --resume was not asked for.
        """
        if self.world.main:
            _claim(self.folder, self.config, self.console)
        self.world.barrier()


@contextmanager
def session(config: Any, name: str) -> Iterator[Session]:
    """Opens the run folder (a new one, or on --resume the one of this configuration), joins the other processes, catches signals.

    Args:
        config: a dataclass with `run: RunOptions`.
        name: of a new folder under runs/.

    Raises:
        ValueError: no such device, or another process is running in the folder.
    """
    options: RunOptions = config.run
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    world = join(options.device)
    console = Console(quiet=not world.main)
    try:
        folder = _agreed(_folder(config, name), world)
        with _held(folder, world), catching() as stop:
            logs = observers(options.log, folder) if world.main else ()
            run = Run(folder, world, _speed(options, world), seed=options.seed, stop=stop, console=console, observers=logs)
            yield Session(config, run, world, console)
    finally:
        world.close()


@contextmanager
def _held(folder: Path, world: World) -> Iterator[None]:
    if not world.main:
        yield
        return
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
        return config.run.out
    taken = sorted((p for p in Path("runs").glob(f"{name}*") if (p / "config.toml").exists()), key=lambda p: p.stat().st_mtime)
    if config.run.resume:
        for folder in reversed(taken):
            if not _differences(folder, config):
                return folder
    number = 1
    while (folder := Path("runs") / (name if number == 1 else f"{name}-{number}")).exists():
        number += 1
    return folder


def _differences(folder: Path, config: Any) -> list[str]:
    path = folder / "config.toml"
    try:
        table = configuration.read_toml(path)
        if table.get("recipe") != getattr(config, "recipe", None):
            return [f"recipe is {table.get('recipe')} there and {getattr(config, 'recipe', None)} here"]
        theirs = configuration.filled(config, table, str(path))
    except ValueError as error:
        return [str(error)]
    return configuration.differences(config, theirs)


def _claim(folder: Path, config: Any, console: Console) -> None:
    """Writes config.toml into a new folder, or checks that the one there is ours to continue."""
    path = folder / "config.toml"
    if path.exists():
        found = _differences(folder, config)
        if found:
            raise ValueError(f"run folder {folder} belongs to another configuration: {'; '.join(found[:5])}")
        if not config.run.resume:
            raise ValueError(f"run folder {folder} already holds this run: pass --resume to continue it, or --out for another folder")
        return
    foreign = [p.name for p in folder.iterdir() if p.name != ".lock"]
    if foreign:
        raise ValueError(f"run folder {folder} is neither empty nor a run: it holds {', '.join(sorted(foreign)[:3])}")
    if config.run.resume:
        console.say(f"  no run of this configuration to resume: starting one in {folder}")
    files.write_text(path, configuration.to_toml(replace(config, run=replace(config.run, out=None, resume=False))))


def _speed(options: RunOptions, world: World) -> Options:
    cuda = world.device.type == "cuda"
    precision = ("bf16" if cuda else "fp32") if options.precision == "auto" else options.precision
    compiled = cuda if options.compile == "auto" else options.compile == "on"
    return Options(precision, compiled, options.checkpoint_minutes)


# ---- data ------------------------------------------------------------------------------------------------------------


def load_data(options: DataOptions, seed: int) -> ImageData:
    """The images that the options name."""
    return load(options.dataset, data_dir=options.data_dir, val_fraction=options.val_fraction, seed=seed, max_images=options.max_images)


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
    data: ImageData, options: DataOptions, prepared: Preparation, seed: int, world: World
) -> Callable[[Training, str | None, bool, int], Loaders]:
    """A function (training, augmentation or None, all labels shown, seed of the order) -> loaders.

    Which labels are hidden depends on `seed` alone: every arm and every repetition sees the same ones.
    """
    hidden = data
    if options.label_fraction < 1:
        hidden = replace(data, train=hide_labels(data.train, options.label_fraction, seed=seed))

    def make(training: Training, augment: str | None, all_labels: bool, order_seed: int) -> Loaders:
        if training.batch_size % world.size:
            raise ValueError(f"batch_size must be a multiple of the {world.size} processes, got {training.batch_size}")
        return make_loaders(
            replace(data if all_labels else hidden, mean=prepared.mean, std=prepared.std),
            batch_size=training.batch_size // world.size,
            train_transform=augment or options.augment,
            eval_transform=prepared.evaluation,
            image_size=prepared.image_size,
            seed=order_seed,
            workers=options.workers,
            device=world.device,
            rank=world.rank,
            world_size=world.size,
            channels_last=True,  # what convolutions are fastest in, on CPUs and GPUs alike
        )

    return make


# ---- the environment -------------------------------------------------------------------------------------------------


def environment(world: World) -> Mapping[str, Any]:
    """What the results were made with."""
    command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
    return machine.facts() | {"processes": world.size, "device": str(world.device), "command": command}
