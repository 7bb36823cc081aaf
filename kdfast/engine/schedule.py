"""Optimizers and learning-rate schedules by name. A schedule is stepped once an epoch.

`lr_factor` in stage.py has the formulas of cosine, steps, constant and warm-up. Plateau (torch's ReduceLROnPlateau) multiplies by gamma
after `plateau_patience` epochs without improvement.
"""

from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau

from kdfast.engine.stage import Stage, Training
from kdfast.optim import Lion


def make_optimizer(parameters: Iterable[nn.Parameter], training: Training) -> torch.optim.Optimizer:
    """Makes the optimizer that `training` names, over `parameters`."""
    parameters = list(parameters)
    if not parameters:
        raise ValueError("a stage has no parameters to train")
    options: dict[str, Any] = {"lr": training.lr, "weight_decay": training.weight_decay}
    match training.optimizer:
        case "sgd":
            return torch.optim.SGD(parameters, momentum=training.momentum, nesterov=training.nesterov, **options)
        case "adamw":
            return torch.optim.AdamW(parameters, **options)
        case "lion":
            return Lion(parameters, **options)
    raise ValueError(f"optimizer must be sgd, adamw or lion, got {training.optimizer!r}")


class Schedule:
    """Sets the learning rate of every epoch of a stage; the checkpoint holds its state."""

    def __init__(self, optimizer: torch.optim.Optimizer, stage: Stage):
        training = stage.training
        self._by_epoch = LambdaLR(optimizer, lambda epoch: stage.lr_factor(training, epoch))
        self._warmup = training.warmup_epochs
        self._by_metric: ReduceLROnPlateau | None = None
        if training.schedule == "plateau":
            mode: Literal["max", "min"] = "max" if stage.higher_is_better else "min"
            self._by_metric = ReduceLROnPlateau(optimizer, mode=mode, factor=training.gamma, patience=training.plateau_patience)

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
        """Continues from `state`; the optimizer's own state holds the learning rates."""
        self._by_epoch.last_epoch = state["epoch"]
        if self._by_metric is not None:
            self._by_metric.load_state_dict(state["by_metric"])
