"""Stages as data: options and their ranges, learning rates, optimizers by name."""

from dataclasses import fields

import pytest
import torch
from torch import nn

from kdfast.engine import Training
from kdfast.engine.schedule import make_optimizer
from kdfast.engine.stage import lr_factor
from kdfast.recipes import conkd
from tests.engine.small import network, stage


def rates(training: Training, lr_factor=lr_factor) -> list[float]:
    return [round(lr_factor(training, epoch), 6) for epoch in range(training.epochs)]


def test_schedules():
    assert rates(Training(epochs=4, schedule="constant")) == [1, 1, 1, 1]
    assert rates(Training(epochs=5, schedule="steps", milestones=(2, 4), gamma=0.1)) == [1, 1, 0.1, 0.1, 0.01]
    cosine = rates(Training(epochs=4, schedule="cosine"))
    assert cosine == [1.0, 0.853553, 0.5, 0.146447]
    assert rates(Training(epochs=4, schedule="cosine"), conkd._lr_factor_from_one) == [*cosine[1:], 0.0]
    assert rates(Training(epochs=4, schedule="cosine", final_lr=0.5))[2] == 0.75
    assert rates(Training(epochs=5, schedule="cosine", warmup=3)) == [0.25, 0.5, 0.75, 1.0, 0.5]
    assert rates(Training(epochs=2, schedule="cosine", warmup=2)) == [0.5, 1.0], "the last epoch has the full rate"


NUMBERS = {field.name for field in fields(Training)} - {"optimizer", "nesterov", "schedule", "milestones"}
TOO_MUCH = {"momentum": 1.0, "gamma": 1.5, "ema": 1.0, "final_lr": 1.5, "clip_norm": float("nan")}


@pytest.mark.parametrize(("name", "value"), [*((name, -1) for name in sorted(NUMBERS)), *TOO_MUCH.items()])
def test_an_option_out_of_range_is_named(name: str, value: float):
    with pytest.raises(ValueError, match=f"^{name} must .*, got {value}"):
        Training(**{name: value})


def test_optimizers_by_name():
    parameters = [nn.Parameter(torch.ones(3))]
    names = {kind: type(make_optimizer(parameters, Training(optimizer=kind))).__name__ for kind in ("sgd", "adamw", "lion")}
    assert names == {"sgd": "SGD", "adamw": "AdamW", "lion": "Lion"}


@pytest.mark.parametrize(
    ("best", "higher"), [("val/top1", True), ("val/top1/layer1", True), ("val/top5/x", True), ("val/loss", False), ("val/topology", False)]
)
def test_accuracies_are_better_when_higher(best: str, higher: bool):
    assert stage("s", network(), best=best).higher_is_better == higher
