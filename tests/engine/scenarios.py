"""Trainings that two processes must do like one: `torchrun -m tests.engine.scenarios FOLDER` runs all of them (test_distributed.py)."""

import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kdfast.data import Loaders, make_loaders
from kdfast.engine import Options, Run, Training, World, evaluate, join
from kdfast.models import ModelSpec, create, projection_head
from kdfast.recipes import conkd
from kdfast.recipes.recipe import Setup
from tests.engine.small import noise, only, split, stage


def shared_loaders(world: World, batch_size: int, **options: Any) -> Loaders:
    data = options.pop("data", noise())
    return make_loaders(data, batch_size=batch_size // world.size, rank=world.rank, world_size=world.size, **options)


class InDouble(nn.Sequential):
    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images.double())


def train(folder: Path, world: World, micro: int | None) -> Any:
    """A whole training and an evaluation. The processes start with different weights: DDP must make them alike."""
    training = Training(epochs=3, batch_size=16, micro_batch=micro, lr=0.1, schedule="cosine")
    data, model = shared_loaders(world, 16), InDouble(nn.Flatten(), nn.Linear(192, 3)).double()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.linspace(-0.1, 0.1, p.numel()).view_as(p) + world.rank)
    made = stage("s", model, training, data=data)
    Run(folder, world, Options()).complete(only(made))
    result = evaluate(model, data.test, ("a", "b", "c"), world)
    return model.state_dict(), result.images, result.loss, result.confusion


def network(num_classes: int) -> nn.Module:
    return InDouble(nn.Flatten(), nn.Linear(192, 12), nn.Tanh(), nn.Linear(12, num_classes)).double()


def contrast(folder: Path, world: World, micro: int | None, *, procedure: str) -> Any:
    """The first stage of conkd, dominated by its contrast; in validation the second process has one batch less."""
    training = Training(epochs=2, batch_size=16, micro_batch=micro, lr=0.01, schedule="constant")
    data = replace(noise(), val=split(17, 1))
    spec = ModelSpec("tests.engine.scenarios:network", 3)

    def loaders(training: Training, transform: str | None, all_labels: bool, seed: int) -> Loaders:
        return shared_loaders(world, 16, data=data, label_fraction=0.6)

    setup = Setup(data, training, training, spec, spec, False, False, True, 0, loaders, print)
    settings = conkd.Settings(procedure=procedure, alpha=3.0, kd_weight=0.1)

    def first_stage():
        teacher = conkd.EmbeddingTeacher(create(spec.name, 3), projection_head(12))
        yield next(conkd.distil(setup, settings, teacher))

    torch.set_default_dtype(torch.float64)
    try:
        Run(folder, world, Options()).complete(first_stage())
    finally:
        torch.set_default_dtype(torch.float32)
    return torch.load(folder / "checkpoint.pt", weights_only=True)["weights"]


def draws(folder: Path, world: World, micro: int | None) -> Any:
    """Numbers that each process draws during a stage, and between stages, by rank."""
    training = Training(epochs=1, batch_size=16, schedule="constant")
    drawn, between = [], []

    def stages():
        for name in ("first", "second"):
            model = nn.Sequential(nn.Flatten(), nn.Linear(192, 3))
            between.append(torch.rand(4))

            def forward(batch, model=model):
                drawn.append(torch.rand(4))
                return {"logits": model(batch.images)}

            yield stage(name, model, training, forward=forward, data=shared_loaders(world, 16))

    Run(folder, world, Options()).complete(stages())
    return world.gather([torch.stack(drawn[:5]), torch.stack(between)])


PROCEDURES = ("joint", "readme", "notebook")
SCENARIOS: dict[str, Callable[..., Any]] = {"train": train, "draws": draws} | {p: partial(contrast, procedure=p) for p in PROCEDURES}


def run_all(folder: Path, micros: tuple[int | None, ...]) -> dict[str, Any]:
    """Runs every scenario in a folder of its own. Each joins and leaves, as runs of `kdfast compare` do in one process."""
    results = {}
    for name, scenario in SCENARIOS.items():
        for micro in micros:
            world = join("cpu")
            torch.manual_seed(world.rank)
            (own := folder / f"{name}-{micro}").mkdir(parents=True, exist_ok=True)
            results[own.name] = scenario(own, world, micro)
            world.barrier()
            world.close()
            if world.main and world.size > 1:
                time.sleep(0.2)  # the main process joins again later than the other
    return results


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    results = run_all(folder, (None, 6))
    if int(os.environ["RANK"]) == 0:
        torch.save(results, folder / "results.pt")
    tasks = Path("/proc/self/task")  # Linux
    names = [(task / "comm").read_text().strip() for task in tasks.iterdir()] if tasks.exists() else []
    assert not any("gloo" in name for name in names), names  # a thread that runs at the interpreter's end can abort the process
