"""Metrics of an epoch, summed on the device and read rarely, and the evaluation of a classifier.

top-1, top-5: fraction of images whose label has the highest, or one of the five highest, logits. torch.topk decides ties, by index.
Images with a hidden label (-100) are not counted.
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
from kdfast.engine.stage import Mean, Terms, as_means
from kdfast.models.heads import FindLogits


class NonFiniteLoss(RuntimeError):
    """A loss term became NaN or infinite; the message names the stage, the epoch, the step and the term.

    Example:
        >>> from kdfast.engine import NonFiniteLoss
        >>> raise NonFiniteLoss("stage distil: the loss term 'kd' is not finite at epoch 2, step 3")
        Traceback (most recent call last):
        kdfast.engine.metrics.NonFiniteLoss: stage distil: the loss term 'kd' is not finite at epoch 2, step 3
    """


class TermMeter:
    """Averages named loss terms over an epoch, weighted by their rows, and records each term's first non-finite step.

    Only `check` and `averages` read from the device.
    """

    def __init__(self, device: torch.device, names: tuple[str, ...] = ()):
        self._device, self.rows = device, 0
        self._start(names)

    def _start(self, names: tuple[str, ...]) -> None:
        self.names = names
        self._sums, self._counts = torch.zeros(2, len(names), dtype=torch.float64, device=self._device)
        self._first_bad = torch.full((len(names),), -1, dtype=torch.int64, device=self._device)

    def add(self, terms: Terms, rows: int, step: int) -> None:
        """Adds the terms of one step (counted from 1) over `rows` images. Validation may leave out terms that training has."""
        if not self.names:
            self._start(tuple(terms))
        for name in terms:
            if name not in self.names:
                raise ValueError(f"loss: the term {name!r} is new; the first step had {', '.join(self.names)}")
        zero, found = self._sums.new_zeros(()), as_means(terms, rows)
        ordered = [found.get(name, Mean(zero, 0)) for name in self.names]
        values = torch.stack([term.value.detach().double() for term in ordered])
        counts = torch.stack([zero + term.rows for term in ordered])
        self._counts += counts
        self._sums += values * counts
        self._first_bad = torch.where((self._first_bad < 0) & ~values.isfinite(), step, self._first_bad)
        self.rows += rows

    def check(self, stage: str, epoch: int) -> None:
        """Raises NonFiniteLoss if any term was not finite at any step so far. Reads from the device."""
        for name, step in zip(self.names, self._first_bad.tolist()):
            if step >= 0:
                raise NonFiniteLoss(f"stage {stage}: the loss term {name!r} is not finite at epoch {epoch + 1}, step {step}")

    def averages(self, prefix: str, world: World) -> dict[str, float]:
        """Returns {prefix/loss: sum of the terms, prefix/<term>: ...} over all processes, for the terms that have rows."""
        totals, counts = world.sum(torch.stack([self._sums, self._counts])).tolist()
        means = {f"{prefix}/{name}": total / count for name, total, count in zip(self.names, totals, counts) if count}
        return {f"{prefix}/loss": sum(means.values())} | means

    def state_dict(self) -> dict[str, Any]:
        """State to resume from in the middle of an epoch."""
        tensors = {"sums": self._sums, "counts": self._counts, "first_bad": self._first_bad}
        return tensors | {"rows": self.rows, "names": list(self.names)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from `state`."""
        self.rows, self.names = state["rows"], tuple(state["names"])
        self._sums, self._counts, self._first_bad = (state[name].to(self._device) for name in ("sums", "counts", "first_bad"))


class AccuracyMeter:
    """Counts correct predictions of the outputs called "logits" and "logits/<head>", all [B, C]; labels of -100 do not count."""

    def __init__(self, device: torch.device, names: Iterable[str] = ()):
        self.counts = {name: torch.zeros(3, dtype=torch.int64, device=device) for name in names}  # top-1, top-5, images

    def add(self, outputs: Mapping[str, Tensor], labels: Tensor) -> None:
        """Adds one batch."""
        labelled = (labels != HIDDEN).sum()
        for name, logits in outputs.items():
            if name == "logits" or name.startswith("logits/"):
                best = logits.detach().topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
                counts = torch.stack([best[:, 0].sum(), best.any(dim=1).sum(), labelled])
                self.counts[name] = self.counts[name] + counts if name in self.counts else counts

    def accuracy(self, prefix: str, world: World) -> dict[str, float]:
        """Returns {prefix/top1, prefix/top5, prefix/top1/<head>, ...}, fractions over all processes; no entry without labels."""
        fractions: dict[str, float] = {}
        for name, counts in self.counts.items():
            top1, top5, labelled = world.sum(counts.clone()).tolist()
            if labelled:
                head = name.removeprefix("logits")
                fractions |= {f"{prefix}/top1{head}": top1 / labelled, f"{prefix}/top5{head}": top5 / labelled}
        return fractions


@dataclass(frozen=True)
class Evaluation:
    """Accuracy, loss and speed of a classifier on a split; made by `evaluate`.

    Attributes:
        top1: fraction of images whose label has the highest logit.
        top5: fraction of images whose label has one of the five highest logits.
        loss: mean cross-entropy, nats.
        confusion: images by true class (rows) and predicted class (columns).
        images: number of images.
        images_per_s: speed of the forward passes on this device, without loading; the first pass of a shape is not counted.

    Example:
        >>> from kdfast.engine import Evaluation
        >>> Evaluation(top1=0.5, top5=1.0, loss=0.7, confusion=[[1, 0], [1, 0]], images=2, images_per_s=100.0).top1
        0.5
    """

    top1: float
    top5: float
    loss: float
    confusion: list[list[int]]
    images: int
    images_per_s: float


@torch.no_grad()
def evaluate(model: Callable[[Tensor], Tensor], batches: Iterable[Batch], classes: Sequence[str], world: World) -> Evaluation:
    """Evaluates `model` (images -> logits [B, C], already in eval mode) over one pass of `batches`.

    Args:
        model: the classifier.
        batches: batches of labelled images [B, 3, H, W]; each process has its share.
        classes: names of the C classes.
        world: the processes, from `join`.

    Raises:
        ValueError: the logits' C is not the number of classes, or there are no images.

    Example:
        >>> import torch
        >>> from kdfast.data import Batch
        >>> from kdfast.engine import evaluate, join
        >>> images, labels = torch.zeros(2, 3, 8, 8), torch.tensor([0, 1])
        >>> result = evaluate(lambda x: x.new_tensor([[1.0, 0.0]] * len(x)), [Batch(images, labels, labels)], ("cat", "dog"), join("cpu"))
        >>> result.top1, result.confusion
        (0.5, [[1, 0], [1, 0]])
    """
    if not callable(model) or not isinstance(world, World):
        raise TypeError(f"evaluate takes a function and a World of join(), got {type(model).__name__} and {type(world).__name__}")
    C = len(classes)
    confusion = torch.zeros(C * C, dtype=torch.int64, device=world.device)
    sums = torch.zeros(2, dtype=torch.float64, device=world.device)  # top-5, loss
    find_logits = FindLogits(C)
    seconds, seen = 0.0, 0  # of this process
    shape: torch.Size | None = None
    for batch in batches:
        if batch.images.shape != shape:  # the first pass of a shape chooses algorithms and allocates
            model(batch.images)
            shape = batch.images.shape
        start = _now(world.device)
        logits = find_logits(model, (), model(batch.images))  # a network that `create` did not make may return more
        seconds += _now(world.device) - start
        seen += len(logits)
        if logits.shape[1:] != (C,):
            raise ValueError(f"the model gives outputs of shape {tuple(logits.shape)}, but the data has {C} classes")
        best = logits.topk(min(5, C), dim=1).indices
        loss = F.cross_entropy(logits.float(), batch.labels, reduction="sum")
        sums += torch.stack([(best == batch.labels[:, None]).sum(), loss])
        confusion += torch.bincount(batch.labels * C + best[:, 0], minlength=C * C)
    top5, total_loss = world.sum(sums).tolist()
    table = world.sum(confusion).view(C, C)
    images, top1 = int(table.sum()), int(table.trace())
    if not images:
        raise ValueError("there are no images to evaluate on")
    return Evaluation(top1 / images, top5 / images, total_loss / images, table.tolist(), images, seen / max(seconds, 1e-9))


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
