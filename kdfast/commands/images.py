"""The images of a command: loaded, checked by one process a machine, prepared, and served in batches."""

import functools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

from rich.console import Console as RichConsole
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from kdfast.commands.config import DataOptions
from kdfast.data import DataError, ImageData, Loaders, hide_labels, load, make_loaders, usable
from kdfast.engine import Interrupted, Training, World
from kdfast.engine.interrupt import StopRequest
from kdfast.runs import artifact
from kdfast.runs.artifact import Preparation


def load_data(
    options: DataOptions, seed: int, world: World, rich: RichConsole, stop: StopRequest | None = None
) -> tuple[ImageData, list[str]]:
    """Returns the images that the options name, without the bad files among them, and notes: how an unusual
    folder was read, and which files were left out.

    Raises:
        DataError: no such data, or more bad files than options.max_bad_files.
        Interrupted: `stop` was set during the check of the files; its findings so far are cached.
    """
    data = load(
        options.dataset,
        data_dir=options.data_dir,
        val_fraction=options.val_fraction,
        seed=seed,
        max_images=options.max_images,
        use_test=options.use_test,
    )
    notes = list(data.notes)
    shown = rich if world.main else RichConsole(quiet=True)

    def check(beat: Callable[[], bool]) -> ImageData:
        with checking(shown, stop, beat) as progress:
            return usable(data, max_bad_files=options.max_bad_files, say=notes.append, progress=progress)

    data = _check_in_turn(world, check)
    for note in notes:
        shown.print(f"  {note}")
    return data, notes


def _check_in_turn(world: World, check: Callable[[Callable[[], bool]], ImageData]) -> ImageData:
    """Calls `check` in the first process of each machine, then in the others, which find every answer in that machine's cache.

    A waiting process asks all processes, again and again, whether one is still checking; a checking process answers with every progress,
    so that no process waits longer than NCCL allows. An error ends a process only after the last such question: the others then meet the
    same error, rather than wait for a process that has left. If the cache cannot be written, each process checks by itself.
    """
    first = os.environ.get("LOCAL_RANK", str(world.rank)) == "0"
    try:
        if first:
            data = check(lambda: world.any(True))
    finally:
        while world.any(False):
            pass
    if not first:
        data = check(lambda: False)
    if len(set(world.gather((len(data.train), len(data.val), len(data.test))))) > 1:
        raise DataError(f"{data.name}: not all processes can read the same image files: see kdfast data check on each machine")
    return data


@contextmanager
def checking(
    rich: RichConsole, stop: StopRequest | None = None, beat: Callable[[], bool] = lambda: False
) -> Iterator[Callable[[int, int], None]]:
    """Yields a function that shows the progress (done, total) of a check of image files, where there is a terminal.

    Raises:
        Interrupted: raised by that function once `stop` is set.
    """
    columns = TextColumn("{task.description}"), BarColumn(30), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=rich, transient=True) as bar:
        task = bar.add_task("  checking image files", total=None)

        def progress(done: int, total: int) -> None:
            if stop is not None and stop.signal_number is not None:
                raise Interrupted(stop.signal_number)
            beat()
            bar.update(task, completed=done, total=total)

        yield progress


def preparation(data: ImageData, options: DataOptions) -> Preparation:
    """Returns how images become input: as the options say, else as suits the data set.

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
    """Returns a function (training, augmentation or None, all labels shown, seed of the order) -> loaders.

    The hidden labels depend on `seed` alone: every arm and every repetition sees the same labels. The choice of loader and its reason
    are printed once, not for every stage.
    """
    hidden = data
    if options.label_fraction < 1:
        hidden = replace(data, train=hide_labels(data.train, options.label_fraction, seed=seed))

    @functools.cache
    def say_once(sentence: str) -> None:
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
            channels_last=True,  # the fastest layout of convolutions, on CPUs and GPUs alike
            say=say_once,
        )

    return make
