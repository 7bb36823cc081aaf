"""Numbers of an epoch, summed on the device and read seldom; and the evaluation of a classifier.

top-1, top-5: fraction of images whose label is the highest, or among the five highest, logits. Ties count against the model by
index order, as torch.topk does. Images whose label is hidden (-100) are not counted.
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kdfast.data import HIDDEN, Batch
from kdfast.engine.distributed import World
from kdfast.engine.stage import Terms, means


class NonFiniteLoss(RuntimeError):
    """A loss term became NaN or infinite; the message names the stage, the epoch, the step and the term."""


class TermMeter:
    """Averages named loss terms over an epoch, weighted by the rows that each is a mean over, and remembers each term's first non-finite
    step. No host sync.
    """

    def __init__(self, device: torch.device, names: tuple[str, ...] = ()):
        self._device, self.rows = device, 0
        self._begin(names)

    def _begin(self, names: tuple[str, ...]) -> None:
        self._rows_of = dict.fromkeys(names, 0)  # of means over whole batches, and
        self._counted = torch.zeros(len(names), dtype=torch.float64, device=self._device)  # of those over rows that the device counted
        self._sums = torch.zeros(len(names), dtype=torch.float64, device=self._device)
        self._first_bad = torch.full((len(names),), -1, dtype=torch.int64, device=self._device)

    @property
    def names(self) -> tuple[str, ...]:
        """The terms, in their order."""
        return tuple(self._rows_of)

    def add(self, terms: Terms, rows: int, step: int) -> None:
        """Adds the terms of one step (counted from 1) over `rows` images; all that have a name, or some of them (in validation)."""
        if not self.names:
            self._begin(tuple(terms))
        for name in terms:
            if name not in self._rows_of:
                raise ValueError(f"loss: the term {name!r} was not there at first, when there were {', '.join(self.names)}")
        found, absent = means(terms, rows), self._sums.new_zeros(())
        values = torch.stack([found[name].value.detach().double() if name in found else absent for name in self.names])
        if all(isinstance(term.rows, int) and term.rows == rows for term in found.values()):
            for name in found:
                self._rows_of[name] += rows
            self._sums += values * rows
        else:
            counts = torch.stack([absent + found[name].rows if name in found else absent for name in self.names])
            self._counted += counts
            self._sums += values * counts
        self._first_bad = torch.where((self._first_bad < 0) & ~values.isfinite(), step, self._first_bad)
        self.rows += rows

    def check(self, stage: str, epoch: int) -> None:
        """Raises NonFiniteLoss if any term was not finite at any step so far. Reads from the device."""
        for name, step in zip(self.names, self._first_bad.tolist()):
            if step >= 0:
                raise NonFiniteLoss(f"stage {stage}: the loss term {name!r} is not finite at epoch {epoch + 1}, step {step}")

    def averages(self, prefix: str, world: World) -> dict[str, float]:
        """{prefix/loss: sum of the terms, prefix/<term>: ...} over all processes, of the terms that there were."""
        rows = self._counted + self._sums.new_tensor([float(count) for count in self._rows_of.values()])
        totals, counts = world.sum(torch.stack([self._sums, rows])).tolist()
        means = {f"{prefix}/{name}": total / count for name, total, count in zip(self.names, totals, counts) if count}
        return {f"{prefix}/loss": sum(means.values())} | means

    def state_dict(self) -> dict[str, Any]:
        """State to resume from in the middle of an epoch."""
        return {
            "sums": self._sums,
            "counted": self._counted,
            "first_bad": self._first_bad,
            "rows": self.rows,
            "rows_of": self._rows_of,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from `state`."""
        self.rows, self._rows_of = state["rows"], dict(state["rows_of"])
        self._sums, self._counted, self._first_bad = (state[name].to(self._device) for name in ("sums", "counted", "first_bad"))


class AccuracyMeter:
    """Counts right answers of the outputs called "logits" and "logits/<head>", all [B, C]; labels of -100 do not count."""

    def __init__(self, device: torch.device, names: Iterable[str] = ()):
        self._device = device
        self.counts = {name: self._zero() for name in names}  # top-1, top-5, all

    def _zero(self) -> Tensor:
        return torch.zeros(3, dtype=torch.int64, device=self._device)

    def add(self, outputs: Mapping[str, Tensor], labels: Tensor) -> None:
        """Adds one batch."""
        counted = labels != HIDDEN
        for name, logits in outputs.items():
            if name == "logits" or name.startswith("logits/"):
                best = logits.detach().topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
                counts = torch.stack([best[:, 0].sum(), best.any(dim=1).sum(), counted.sum()])
                if name not in self.counts:
                    self.counts[name] = self._zero()
                self.counts[name] += counts

    def accuracy(self, prefix: str, world: World) -> dict[str, float]:
        """{prefix/top1, prefix/top5, prefix/top1/<head>, ...}, fractions over all processes; nothing where nothing was counted."""
        found: dict[str, float] = {}
        for name, counts in self.counts.items():
            top1, top5, counted = world.sum(counts.clone()).tolist()
            if counted:
                head = name.removeprefix("logits")
                found |= {f"{prefix}/top1{head}": top1 / counted, f"{prefix}/top5{head}": top5 / counted}
        return found


@dataclass(frozen=True)
class Evaluation:
    """How a classifier does on a split."""

    top1: float
    """Fraction of images."""
    top5: float
    """Fraction of images."""
    loss: float
    """Mean cross-entropy, nats."""
    confusion: list[list[int]]
    """Images by true class (rows) and predicted class (columns)."""
    images: int
    images_per_s: float
    """Forward passes alone, on this device: loading is not in it."""


@torch.no_grad()
def evaluate(model: Callable[[Tensor], Tensor], batches: Iterable[Batch], classes: Sequence[str], world: World) -> Evaluation:
    """Evaluates `model` (images -> logits [B, C], already in eval mode) over one pass of `batches`.

    Raises:
        ValueError: the logits' C is not the number of classes, or there are no images.
    """
    C = len(classes)
    confusion = torch.zeros(C * C, dtype=torch.int64, device=world.device)
    sums = torch.zeros(4, dtype=torch.float64, device=world.device)  # top-1, top-5, loss, images
    seconds, seen = 0.0, 0  # of this process
    for batch in batches:
        start = _now(world.device)
        logits = model(batch.images)
        seconds += _now(world.device) - start
        seen += len(logits)
        if logits.shape[1:] != (C,):
            raise ValueError(f"the model gives outputs of shape {tuple(logits.shape)}, but the data has {C} classes")
        best = logits.topk(min(5, C), dim=1).indices
        right = best == batch.labels[:, None]
        loss = F.cross_entropy(logits.float(), batch.labels, reduction="sum")
        sums += torch.stack([right[:, 0].sum(), right.any(dim=1).sum(), loss, torch.tensor(len(logits), device=loss.device)])
        confusion += torch.bincount(batch.labels * C + best[:, 0], minlength=C * C)
    top1, top5, loss_sum, images = world.sum(sums).tolist()
    if not images:
        raise ValueError("there are no images to evaluate on")
    table = world.sum(confusion).view(C, C).tolist()
    return Evaluation(top1 / images, top5 / images, loss_sum / images, table, int(images), seen / max(seconds, 1e-9))


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
