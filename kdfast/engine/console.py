"""What a run prints: a bar a stage with images/s and the time left, then one line a finished stage. Plain lines without a terminal."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console as RichConsole
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

PLAIN_EVERY = 10.0  # seconds between lines where there is no terminal


class StageProgress:
    """Progress of one stage: images of the epoch under way, metrics of the last one."""

    def __init__(self, name: str, epochs: int, images: int, rich: RichConsole, bar: Progress | None, task: TaskID | None):
        self._name, self._epochs, self._images = name, epochs, images
        self._rich, self._bar, self._task = rich, bar, task
        self._epoch, self._done = 0, 0
        self._shown = time.monotonic()
        self.last: dict[str, Any] = {}

    def step(self, images: int) -> None:
        """Counts one optimizer step over `images` images."""
        self._done += images
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=self._epoch * self._images + self._done)

    def epoch(self, line: dict[str, Any]) -> None:
        """Ends an epoch with its metrics."""
        self._epoch, self._done, self.last = line["epoch"], 0, line
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=self._epoch * self._images, metrics=describe(line))
        elif time.monotonic() - self._shown > PLAIN_EVERY:
            self._shown = time.monotonic()
            self._rich.print(f"  {self._name}: epoch {self._epoch} of {self._epochs}, {describe(line)}", highlight=False)


def describe(line: dict[str, Any]) -> str:
    """A line of metrics.jsonl in a few words."""
    parts = [f"loss {line['train/loss']:.3f}"] if "train/loss" in line else []
    if "val/top1" in line:
        parts.append(f"val top-1 {100 * line['val/top1']:.2f} %")
    elif "val/loss" in line:
        parts.append(f"val loss {line['val/loss']:.3f}")
    return ", ".join([*parts, f"{line['images_per_s']:,.0f} images/s"])


def counted(number: int, what: str) -> str:
    """A number of things: 1 epoch, 2 epochs."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


class Console:
    """Prints for a person, or not at all.

    Args:
        quiet: print nothing (other ranks, tests).
    """

    def __init__(self, *, quiet: bool = False):
        self.rich = RichConsole(quiet=quiet, soft_wrap=True)

    def say(self, text: str) -> None:
        """Prints a line."""
        self.rich.print(text, highlight=False)

    @contextmanager
    def stage(self, name: str, epochs: int, images: int) -> Iterator[StageProgress]:
        """Shows a stage of `epochs` epochs over `images` images while the block runs."""
        start = time.monotonic()
        if self.rich.is_terminal and not self.rich.quiet:
            columns = TextColumn("{task.description}"), BarColumn(30), TextColumn("{task.fields[metrics]}"), TimeRemainingColumn()
            with Progress(*columns, console=self.rich, transient=True) as bar:
                progress = StageProgress(name, epochs, images, self.rich, bar, bar.add_task(f"  {name}", total=epochs * images, metrics=""))
                yield progress
        else:
            progress = StageProgress(name, epochs, images, self.rich, None, None)
            yield progress
        if progress.last:
            done = f"{counted(progress.last['epoch'], 'epoch')} in {time.monotonic() - start:.1f} s"
            self.say(f"  {name}: {done}, {describe(progress.last)}")
