"""What a training is, as data: a recipe yields stages, and the engine fits them one after another.

A stage says which modules are trained and which are frozen, how a batch becomes named outputs (`forward`), how outputs become
named loss terms (`loss`; their sum is minimized), with which optimizer and schedule, and which metric picks the best epoch.
The two functions are apart so that the engine can cut a batch into micro-batches and still give `loss` the whole batch.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from kdfast.data import Batch, Loaders

Outputs = Mapping[str, Tensor]


@dataclass(frozen=True)
class Mean:
    """A loss term that is a mean over some rows of the batch only, as cross-entropy over those whose label is known.

    Averages over batches weigh it by these rows. It can be multiplied by a number.

    Attributes:
        value: 0-dim; what is added to the loss.
        rows: how many, 0-dim where the device alone knows. Where `value` is divided by a mean over processes, that mean.
    """

    value: Tensor
    rows: Tensor | int

    def __mul__(self, weight: float) -> "Mean":
        return Mean(weight * self.value, self.rows)

    __rmul__ = __mul__


Terms = Mapping[str, Tensor | Mean]


def means(terms: Terms, rows: int) -> dict[str, Mean]:
    """The terms of a batch of so many rows: those that say nothing else are means over all of them."""
    return {name: term if isinstance(term, Mean) else Mean(term, rows) for name, term in terms.items()}


@dataclass(frozen=True)
class Training:
    """How a stage is optimized: every field is an option of the command line and a key of config.toml."""

    epochs: int = 240
    """Passes over the training images."""
    batch_size: int = 64
    """Images an optimizer step, over all processes."""
    micro_batch: int | None = None
    """Largest number of images in one forward pass, over all processes; larger batches are accumulated."""
    optimizer: Literal["sgd", "adamw", "lion"] = "sgd"
    """Optimizer by name."""
    lr: float = 0.05
    """Learning rate after warm-up."""
    weight_decay: float = 5e-4
    """Weight decay: L2 for sgd, decoupled for adamw and lion."""
    momentum: float = 0.9
    """Momentum of sgd."""
    nesterov: bool = False
    """Nesterov momentum for sgd."""
    schedule: Literal["cosine", "steps", "plateau", "constant"] = "steps"
    """Learning rate over epochs."""
    warmup: int = 0
    """Epochs of linear warm-up before the schedule."""
    final_lr: float = 0.0
    """Where cosine ends, as a fraction of lr."""
    milestones: tuple[int, ...] = (150, 180, 210)
    """Epochs after which `steps` multiplies the learning rate by gamma."""
    gamma: float = 0.1
    """Factor of `steps` and `plateau`."""
    plateau_patience: int = 3
    """Epochs without improvement of the validation metric before `plateau` multiplies by gamma."""
    early_stop: int | None = None
    """Stop after this many epochs without improvement of the validation metric."""
    clip_norm: float | None = None
    """Largest global norm of the gradients."""
    ema: float | None = None
    """Decay of an exponential moving average of the weights, which is then evaluated and kept."""

    def __post_init__(self) -> None:
        for name, least in (("epochs", 1), ("batch_size", 1), ("micro_batch", 1), ("early_stop", 1), ("plateau_patience", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        for name in ("lr", "clip_norm"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be positive, got {value}")
        if not self.weight_decay >= 0:
            raise ValueError(f"weight_decay must not be negative, got {self.weight_decay}")
        for name, inside in (
            ("momentum", 0 <= self.momentum < 1),
            ("final_lr", 0 <= self.final_lr <= 1),
            ("gamma", 0 < self.gamma <= 1),
            ("ema", self.ema is None or 0 < self.ema < 1),
        ):
            if not inside:
                raise ValueError(f"{name} must be between 0 and 1, got {getattr(self, name)}")
        if not 0 <= self.warmup < self.epochs:
            raise ValueError(f"warmup must be from 0 to below epochs ({self.epochs}), got {self.warmup}")

    def micro_batch_of_one(self, processes: int) -> int | None:
        """Largest number of images in a forward pass of one of so many processes; None: a whole batch."""
        return None if self.micro_batch is None else max(1, self.micro_batch // processes)


@dataclass(frozen=True)
class Stage:
    """One training.

    Attributes:
        name: a file name, unique within the run ("distil", "classify").
        train: modules whose parameters the optimizer gets; in train mode during epochs.
        forward: batch -> named tensors whose first dimension is the batch. "logits" [B, C], where given, is what accuracy is
            measured on; so are "logits/<head>", each by itself (val/top1/<head>).
        loss: (outputs, batch) -> named scalar terms, means over the batch, or a `Mean` over some of its rows; their sum is minimized.
        data: loaders; `train` and `val` are used.
        training: optimizer, schedule, epochs.
        frozen: modules in eval mode whose parameters need no gradient: teachers, finished encoders. Applied before `train`, so a
            trained head may sit inside a frozen network.
        memory: modules with a state that the loss writes (memory banks) and the optimizer does not: in train mode during epochs, in
            checkpoints, but not among the weights that are kept, nor in their moving average. Some of `train` may sit inside.
        best: the metric that picks the epoch kept: "val/top1" (highest) or "val/loss" or any "val/<term>" (lowest).
        keep: "best", or "last" to keep the last epoch's weights whatever the metric says.
        couples_rows: the loss of one image depends on others of its batch (contrastive terms). Micro-batches then take two
            passes, so that the loss still sees the whole batch.
        partial: some trained parameters have no part in the loss (those above a hint), which several processes have to know.
        prepare: called once, without gradients, before the first step that this process makes, with all modules on its device.
        optimizer: (trained parameters, training) -> an optimizer in place of the one that `training` names. Its learning rate is
            scheduled as `training` says, its state goes into checkpoints.
        metadata: text by name, kept in the files of the stage's weights.
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
    keep: Literal["best", "last"] = "best"
    couples_rows: bool = False
    partial: bool = False
    prepare: Callable[[], None] = lambda: None
    optimizer: Callable[[Sequence[nn.Parameter], Training], torch.optim.Optimizer] | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)
    cosine_from_one: bool = field(default=False, kw_only=True)  # the ConKD notebooks' quirk: their cosine counts epochs from 1

    @property
    def higher_is_better(self) -> bool:
        """Whether the metric that picks the best epoch grows as the model improves."""
        return self.best.split("/")[1:2] in (["top1"], ["top5"])

    def modes(self, training: bool) -> None:
        """Puts the modules into the modes of a training epoch or of an evaluation."""
        for module in self.frozen:
            module.eval().requires_grad_(False)
        for module in (*self.memory, *self.train):
            module.train(training)
        for module in self.train:
            module.requires_grad_(True)

    def parameters(self) -> Iterator[nn.Parameter]:
        """The parameters that the optimizer gets, each once."""
        seen: set[int] = set()
        for module in self.train:
            for parameter in module.parameters():
                if id(parameter) not in seen:
                    seen.add(id(parameter))
                    yield parameter
