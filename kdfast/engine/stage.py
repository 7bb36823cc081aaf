"""A training as data: a recipe yields stages, and the engine fits one after another.

A stage says which modules are trained and which are frozen, how a batch becomes named outputs (`forward`), how the outputs become
named loss terms (`loss`; the engine minimizes their sum), which optimizer and schedule to use, and which metric picks the best epoch.
`forward` and `loss` are two functions so that the engine can cut a batch into micro-batches and still give `loss` the whole batch.
"""

import math
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Literal

import torch
from torch import Tensor, nn

from kdfast.data import Batch, Loaders
from kdfast.engine.ranges import AtLeastOne, BelowOne, Checked, Count, NotNegative, Positive, Range, UpToOne
from kdfast.runs.results import Kept

Outputs = Mapping[str, Tensor]


@dataclass(frozen=True)
class Mean:
    """A loss term that is a mean over some rows of the batch, for instance cross-entropy over the labelled images.

    Averages over batches weight the term by its rows. A number times a `Mean` is a `Mean`.

    Attributes:
        value: 0-dim tensor, added to the loss.
        rows: number of rows; a 0-dim tensor where only the device knows it. If `value` was divided by a mean over processes, that mean.

    Example:
        >>> import torch
        >>> from kdfast.engine import Mean
        >>> 0.5 * Mean(torch.tensor(3.0), rows=4)
        Mean(value=tensor(1.5000), rows=4)
    """

    value: Tensor
    rows: Tensor | int

    def __mul__(self, weight: float) -> "Mean":
        return Mean(weight * self.value, self.rows)

    __rmul__ = __mul__


Terms = Mapping[str, Tensor | Mean]


def as_means(terms: Terms, rows: int) -> dict[str, Mean]:
    """Returns every term as a `Mean`; a plain tensor counts as the mean over all `rows` of the batch."""
    return {name: term if isinstance(term, Mean) else Mean(term, rows) for name, term in terms.items()}


@dataclass(frozen=True)
class Training(Checked):
    """How a stage is optimized: every field is an option of the command line and a key of config.toml.

    Raises:
        ValueError: a value is out of its range.

    Example:
        >>> from kdfast.engine import Training
        >>> training = Training(epochs=30, optimizer="lion", lr=1e-3, weight_decay=0.1, schedule="cosine")
        >>> training.batch_size
        64
        >>> Training(epochs=0)
        Traceback (most recent call last):
        ValueError: epochs must be at least 1, got 0
    """

    epochs: AtLeastOne = 240
    """Passes over the training images."""
    batch_size: AtLeastOne = 64
    """Images an optimizer step, over all processes."""
    micro_batch: AtLeastOne | None = None
    """Largest number of images in one forward pass, over all processes; larger batches are accumulated, in even parts if one were left."""
    optimizer: Literal["sgd", "adamw", "lion"] = "sgd"
    """Optimizer by name."""
    lr: Positive = 0.05
    """Learning rate after warm-up."""
    weight_decay: NotNegative = 5e-4
    """Weight decay: L2 for sgd, decoupled for adamw and lion."""
    momentum: BelowOne = 0.9
    """Momentum of sgd."""
    nesterov: bool = False
    """Nesterov momentum for sgd."""
    schedule: Literal["cosine", "steps", "plateau", "constant"] = "steps"
    """Learning rate over epochs."""
    warmup: Count = 0
    """Epochs of linear warm-up before the schedule; never the last epoch."""
    final_lr: UpToOne = 0.0
    """Where cosine ends, as a fraction of lr."""
    milestones: tuple[AtLeastOne, ...] = (150, 180, 210)
    """Epochs after which `steps` multiplies the learning rate by gamma."""
    gamma: Annotated[float, Range("must be between 0 and 1", lambda value: 0 < value <= 1)] = 0.1
    """Factor of `steps` and `plateau`."""
    plateau_patience: Count = 3
    """Epochs without improvement of the validation metric before `plateau` multiplies by gamma."""
    early_stop: AtLeastOne | None = None
    """Stop after this many epochs without improvement of the validation metric."""
    clip_norm: Positive | None = None
    """Largest global norm of the gradients."""
    ema: Annotated[float, Range("must be between 0 and 1", lambda value: 0 < value < 1)] | None = None
    """Decay of an exponential moving average of the weights, which is then evaluated and kept."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.optimizer == "sgd" and self.nesterov and not self.momentum:
            raise ValueError("nesterov needs a momentum above 0, got momentum 0")

    def idle(self) -> dict[str, str]:
        """Returns the options that change nothing beside the others, each with the reason."""
        used: dict[str, tuple[str, ...]] = {"sgd": ("momentum", "nesterov"), "cosine": ("final_lr",)}
        used |= {"steps": ("milestones", "gamma"), "plateau": ("gamma", "plateau_patience")}
        active = {*used.get(self.optimizer, ()), *used.get(self.schedule, ())}
        reasons = {name: f"with optimizer {self.optimizer} and schedule {self.schedule}" for names in used.values() for name in names}
        idle = {name: reason for name, reason in reasons.items() if name not in active}
        return idle | ({"micro_batch": f"with batch_size {self.batch_size}"} if (self.micro_batch or 0) > self.batch_size else {})

    @property
    def warmup_epochs(self) -> int:
        """Epochs of warm-up: `warmup`, but at least the last epoch is at the full rate."""
        return min(self.warmup, self.epochs - 1)

    def micro_batch_per_process(self, processes: int) -> int | None:
        """Largest number of images in a forward pass of each of `processes` processes; None: the whole batch."""
        return None if self.micro_batch is None else max(1, self.micro_batch // processes)

    def split_batch(self, images: int, processes: int) -> list[int]:
        """Returns the images in each forward pass of one process' batch; where one image would be left over, passes are made even."""
        rows = self.micro_batch_per_process(processes) or images
        count = -(-images // rows)
        if images % rows == 1:  # BatchNorm cannot normalize a single image where its map is 1 x 1
            return [images // count + (k < images % count) for k in range(count)]
        return [min(rows, images - k * rows) for k in range(count)]


def lr_factor(training: Training, epoch: int) -> float:
    """The learning rate of `epoch` (from 0), divided by `training.lr`; the factor of `plateau` is not included.

    cosine     final + (1 - final) (1 + cos(pi e / E)) / 2         e epochs since warm-up, E all epochs after warm-up
    steps      gamma ** (number of milestones passed)
    others     1
    warm-up    (e + 1) / (warmup + 1) during the first `warmup` epochs of every schedule
    """
    warmup = training.warmup_epochs
    if epoch < warmup:
        return (epoch + 1) / (warmup + 1)
    if training.schedule == "cosine":
        done = (epoch - warmup) / (training.epochs - warmup)
        return training.final_lr + (1 - training.final_lr) * (1 + math.cos(math.pi * done)) / 2
    if training.schedule == "steps":
        return training.gamma ** bisect_right(sorted(training.milestones), epoch)
    return 1.0


@dataclass(frozen=True)
class Stage:
    """One training.

    Attributes:
        name: a file name, unique within the run ("distil", "classify").
        train: modules whose parameters the optimizer gets; in train mode during epochs.
        forward: batch -> named tensors whose first dimension is the batch. Accuracy is measured on "logits" [B, C], if there, and on
            each "logits/<head>" (val/top1/<head>).
        loss: (outputs, batch) -> named scalar terms, each a mean over the batch or a `Mean` over some of its rows. Their sum is
            minimized.
        data: loaders; `train` and `val` are used.
        training: optimizer, schedule, epochs.
        frozen: modules in eval mode whose parameters need no gradient: teachers, finished encoders. Set before `train`, so a trained
            head may sit inside a frozen network.
        memory: modules whose state the loss writes and the optimizer does not (memory banks): in train mode during epochs and in
            checkpoints, but not part of the saved weights or of their moving average. Modules of `train` may sit inside.
        best: the metric that picks the best epoch: "val/top1" (highest), or "val/loss" or any "val/<term>" (lowest).
        keep: "best", or "last" for the last epoch's weights whatever the metric says.
        couples_rows: the loss of one image depends on others of its batch (contrastive terms). Micro-batches then take two passes, so
            that the loss still sees the whole batch.
        partial: some trained parameters do not affect the loss (those above a hint); DDP has to know.
        prepare: called once, without gradients, before the first step of this process, with all modules on its device.
        optimizer: (trained parameters, training) -> optimizer, in place of `training`'s. Its learning rate follows the schedule, and
            checkpoints hold its state.
        lr_factor: (training, epoch from 0) -> learning rate divided by `training.lr`.
        metadata: text by name, written into the files of the stage's weights.

    Example:
        >>> from torch import nn
        >>> from kdfast.data import Loaders
        >>> from kdfast.engine import Stage, Training
        >>> student = nn.Linear(4, 3)
        >>> stage = Stage(
        ...     "distil",
        ...     train=(student,),
        ...     forward=lambda batch: {"logits": student(batch.images)},
        ...     loss=lambda outputs, batch: {"ce": nn.functional.cross_entropy(outputs["logits"], batch.labels)},
        ...     data=Loaders(train=None, val=None, test=None),  # see kdfast.data.make_loaders
        ...     training=Training(epochs=30),
        ... )
        >>> stage.best, stage.higher_is_better, sum(p.numel() for p in stage.parameters())
        ('val/top1', True, 15)
    """

    name: str
    train: Sequence[nn.Module]
    forward: Callable[[Batch], Outputs]
    loss: Callable[[Outputs, Batch], Terms]
    data: Loaders
    training: Training
    frozen: Sequence[nn.Module] = ()
    memory: Sequence[nn.Module] = ()
    best: str = "val/top1"
    keep: Kept = "best"
    couples_rows: bool = False
    partial: bool = False
    prepare: Callable[[], None] = lambda: None
    optimizer: Callable[[Sequence[nn.Parameter], Training], torch.optim.Optimizer] | None = None
    lr_factor: Callable[[Training, int], float] = lr_factor
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def higher_is_better(self) -> bool:
        """True if the metric that picks the best epoch grows as the model improves."""
        return self.best.split("/")[1:2] in (["top1"], ["top5"])

    def set_modes(self, *, training: bool) -> None:
        """Puts all modules into the modes of a training epoch or of an evaluation."""
        for module in self.frozen:
            module.eval().requires_grad_(False)
        for module in (*self.memory, *self.train):
            module.train(training)
        for module in self.train:
            module.requires_grad_(True)

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yields the parameters that the optimizer gets, each once."""
        return nn.ModuleList(self.train).parameters()
