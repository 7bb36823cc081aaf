"""A network of a few numbers, images made of noise, and the stages that tests of the engine and of recipes train."""

import json
from collections.abc import Generator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kdfast.data import ImageData, Loaders, Split, make_loaders
from kdfast.engine import Options, Run, Stage, Training, World
from kdfast.recipes.recipe import cross_entropy

CPU = World(0, 1, torch.device("cpu"))
TRAINING = Training(epochs=3, batch_size=16, lr=0.1, schedule="cosine")


def split(n: int, seed: int) -> Split:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 3
    pixels = torch.randint(0, 256, (n, 3, 8, 8), generator=generator, dtype=torch.uint8)
    pixels[torch.arange(n), labels] = 255  # the class is the bright channel
    return Split(labels, pixels)


def noise() -> ImageData:
    parts = [split(80, 0), split(18, 1), split(18, 2)]
    return ImageData("noise", ("a", "b", "c"), *parts, (0.5,) * 3, (0.5,) * 3, 8, False, "digits", "none")


def hide_labels(hidden: Tensor) -> ImageData:
    """Noise whose training images have no label where `hidden` [80] is set."""
    data = noise()
    return replace(data, train=replace(data.train, labels=torch.where(hidden, -100, data.train.labels)))


def network() -> nn.Module:
    layers = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Dropout(0.2), nn.Linear(144, 3)]
    return nn.Sequential(*layers)


def linear() -> nn.Sequential:
    """The same weights at every call."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 3))


def loaders(training: Training = TRAINING, seed: int = 0) -> Loaders:
    return make_loaders(noise(), batch_size=training.batch_size, seed=seed)


def stage(name: str, model: nn.Module, training: Training = TRAINING, **changes: Any) -> Stage:
    made = Stage(
        name,
        train=(model,),
        forward=lambda batch: {"logits": model(batch.images)},
        loss=lambda outputs, batch: {"ce": cross_entropy(outputs["logits"], batch.labels)},
        data=loaders(training),
        training=training,
    )
    return replace(made, **changes)


def only(stage: Stage) -> Generator:
    """A recipe of one stage, which ends with its result."""
    return (yield stage)


def fit(folder: Path, stages: Stage | Generator, options: Options = Options(), **keywords: Any) -> Any:  # noqa: B008
    """Runs, or resumes, a stage or the stages of a recipe in a folder."""
    folder.mkdir(exist_ok=True, parents=True)
    return Run(folder, CPU, options, **keywords).complete(only(stages) if isinstance(stages, Stage) else stages)


def lines(folder: Path) -> list[dict]:
    """metrics.jsonl without the times."""
    timed = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in ("seconds", "images_per_s")} for line in timed]


def copy(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def equal(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def close(a: dict, b: dict, rtol: float, atol: float) -> bool:
    return a.keys() == b.keys() and all(torch.allclose(a[name], b[name], rtol=rtol, atol=atol) for name in a)
