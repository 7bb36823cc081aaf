"""Terminal output of a run: a progress bar for the current stage, then one line for each finished stage. Plain lines without a terminal."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

from kdfast import imports
from kdfast.text import count

if TYPE_CHECKING:
    from rich.console import Console as RichConsole

PLAIN_EVERY = 10.0  # seconds between lines without a terminal


@dataclass
class StageProgress:
    """Progress of one stage.

    Attributes:
        name: of the stage.
        epochs: of the stage.
        images: of an epoch, over all processes.
        say: prints a line.
        update: moves the progress bar (completed=images, metrics=text); None: there is no bar.
        last: metrics of the last finished epoch.
    """

    name: str
    epochs: int
    images: int
    say: Callable[[str], None]
    update: Callable[..., object] | None = None
    last: dict[str, Any] = field(default_factory=dict)
    _done: int = 0  # images, in all epochs
    _printed_at: float = field(default_factory=time.monotonic)

    def step(self, images: int) -> None:
        """Counts one optimizer step over `images` images."""
        self._done += images
        if self.update is not None:
            self.update(completed=self._done)

    def epoch(self, line: dict[str, Any]) -> None:
        """Ends an epoch with its line of metrics.jsonl."""
        self.last, self._done = line, line["epoch"] * self.images
        if self.update is not None:
            self.update(completed=self._done, metrics=describe(line))
        elif time.monotonic() - self._printed_at > PLAIN_EVERY:
            self._printed_at = time.monotonic()
            self.say(f"  {self.name}: epoch {line['epoch']} of {self.epochs}, {describe(line)}")


def describe(line: dict[str, Any]) -> str:
    """Formats a line of metrics.jsonl in a few words."""
    parts = [f"loss {line['train/loss']:.3f}"] if "train/loss" in line else []
    if "val/top1" in line:
        parts.append(f"val top-1 {100 * line['val/top1']:.2f} %")
    elif "val/loss" in line:
        parts.append(f"val loss {line['val/loss']:.3f}")
    return ", ".join([*parts, f"{line['images_per_s']:,.0f} images/s"])


class Console:
    """Prints a run's progress. Needs the package rich unless it is quiet.

    Args:
        quiet: print nothing (other ranks, tests).

    Example:
        >>> from kdfast.engine import Console
        >>> Console(quiet=True).say("not printed")
    """

    def __init__(self, *, quiet: bool = False):
        self._quiet = quiet

    @cached_property
    def rich(self) -> "RichConsole":
        """The console of the package rich that everything is printed to."""
        imports.require("rich.console", extra="cli", what="the progress display")
        from kdfast.engine.terminal import Terminal

        return Terminal(quiet=self._quiet)

    def say(self, text: str) -> None:
        """Prints a line."""
        if not self._quiet:
            self.rich.print(text)

    @contextmanager
    def stage(self, name: str, epochs: int, images: int) -> Iterator[StageProgress]:
        """Shows the progress of a stage of `epochs` epochs over `images` images within the block."""
        start, progress = time.monotonic(), StageProgress(name, epochs, images, self.say)
        if self._quiet or not self.rich.is_terminal:
            yield progress
        else:
            from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

            stage, metrics = TextColumn("{task.description}", markup=False), TextColumn("{task.fields[metrics]}")
            with Progress(stage, BarColumn(30), metrics, TimeRemainingColumn(), console=self.rich, transient=True) as bar:
                progress.update = partial(bar.update, bar.add_task(f"  {name}", total=epochs * images, metrics=""))
                yield progress
        if progress.last:
            done = f"{count(progress.last['epoch'], 'epoch')} in {time.monotonic() - start:.1f} s"
            self.say(f"  {name}: {done}, {describe(progress.last)}")
