"""Optimizers and learning-rate schedules by name. A schedule is stepped once an epoch.

cosine     final + (1 - final) (1 + cos(pi e / E)) / 2         e epochs since warm-up, E all epochs after warm-up
steps      gamma ** (number of milestones passed)
plateau    times gamma after `plateau_patience` epochs without improvement (torch's ReduceLROnPlateau)
constant   1
warm-up    (e + 1) / (warmup + 1) during the first `warmup` epochs, whatever follows
"""

import math
from bisect import bisect_right
from collections.abc import Iterable

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau

from kdfast.engine.stage import Training
from kdfast.optim import Lion


def make_optimizer(parameters: Iterable[nn.Parameter], training: Training) -> torch.optim.Optimizer:
    """The optimizer that `training` names, over `parameters`."""
    parameters = list(parameters)
    if not parameters:
        raise ValueError("a stage has no parameters to train")
    match training.optimizer:
        case "sgd":
            return torch.optim.SGD(
                parameters,
                lr=training.lr,
                momentum=training.momentum,
                nesterov=training.nesterov,
                weight_decay=training.weight_decay,
            )
        case "adamw":
            return torch.optim.AdamW(parameters, lr=training.lr, weight_decay=training.weight_decay)
        case "lion":
            return Lion(parameters, lr=training.lr, weight_decay=training.weight_decay)
    raise ValueError(f"optimizer must be sgd, adamw or lion, got {training.optimizer!r}")


def factor(training: Training, epoch: int, *, cosine_from_one: bool = False) -> float:
    """The learning rate of `epoch` (from 0) over `training.lr`; plateau's own factor is not in it."""
    if epoch < training.warmup:
        return (epoch + 1) / (training.warmup + 1)
    if training.schedule == "cosine":
        done = (epoch + cosine_from_one - training.warmup) / (training.epochs - training.warmup)
        return training.final_lr + (1 - training.final_lr) * (1 + math.cos(math.pi * done)) / 2
    if training.schedule == "steps":
        return training.gamma ** bisect_right(sorted(training.milestones), epoch)
    return 1.0


class Schedule:
    """Sets the learning rate of every epoch; its state travels in the checkpoint."""

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        training: Training,
        *,
        higher_is_better: bool,
        cosine_from_one: bool = False,
    ):
        self._by_epoch = LambdaLR(optimizer, lambda epoch: factor(training, epoch, cosine_from_one=cosine_from_one))
        self._warmup = training.warmup
        self._by_metric: ReduceLROnPlateau | None = None
        if training.schedule == "plateau":
            self._by_metric = ReduceLROnPlateau(
                optimizer,
                mode="max" if higher_is_better else "min",
                factor=training.gamma,
                patience=training.plateau_patience,
            )

    def step(self, metric: float) -> None:
        """Ends an epoch whose validation metric was `metric`."""
        if self._by_metric is None or self._by_epoch.last_epoch < self._warmup:
            self._by_epoch.step()
        if self._by_metric is not None and self._by_epoch.last_epoch >= self._warmup:
            self._by_metric.step(metric)

    def state_dict(self) -> dict:
        """State to resume from."""
        by_metric = self._by_metric.state_dict() if self._by_metric is not None else None
        return {"epoch": self._by_epoch.last_epoch, "by_metric": by_metric}

    def load_state_dict(self, state: dict) -> None:
        """Continues from `state`; the optimizer's own state carries the learning rates."""
        self._by_epoch.last_epoch = state["epoch"]
        if self._by_metric is not None:
            self._by_metric.load_state_dict(state["by_metric"])
