"""The accuracy that 8-bit and 16-bit momenta of Lion cost: python -m kdfast.benchmarks.maintain.lion_momentum [--dataset digits|cifar10]

A ResNet-8 is trained from the same seeds with float32, bfloat16 and 8-bit momenta; nothing else differs. `accuracy` is on the test
images after the last epoch, in percent, one for each seed; `difference` is its mean over seeds from float32's, with the standard error
of that mean; `momentum_bytes` are what the momenta of the network take, scales included.
"""

import math
import statistics
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
import tyro

from kdfast import models
from kdfast.benchmarks.maintain import write_results
from kdfast.data import ImageData, load, make_loaders
from kdfast.optim import Lion

MOMENTA = {"float32": None, "bfloat16": torch.bfloat16, "int8": torch.int8}


def train(data: ImageData, seed: int, epochs: int, momentum: torch.dtype | None) -> tuple[float, int]:
    """Test accuracy in percent, bytes of momenta."""
    torch.manual_seed(seed)
    model = models.create("resnet8", len(data.classes))
    loaders = make_loaders(data, batch_size=64, loader="torchvision", seed=seed)  # as the committed figures were made
    optimizer = Lion(model.parameters(), lr=1e-3, weight_decay=0.1, momentum_dtype=momentum)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for epoch in range(epochs):
        loaders.train.set_epoch(epoch)
        for batch in loaders.train:
            optimizer.zero_grad()
            F.cross_entropy(model(batch.images), batch.labels).backward()
            optimizer.step()
        schedule.step()
    model.eval()
    with torch.no_grad():
        right = [model(batch.images).argmax(1) == batch.labels for batch in loaders.test]
    state = [t for s in optimizer.state.values() for name, t in s.items() if name.startswith("exp_avg")]
    return 100 * torch.cat(right).double().mean().item(), sum(t.nbytes for t in state)


def main(dataset: Literal["digits", "cifar10"] = "digits", data_dir: Path | None = None, epochs: int = 15, seeds: int = 5) -> None:
    """Trains all of them, prints and writes the result.

    Args:
        dataset: the images.
        data_dir: where the images of cifar10 are.
        epochs: of each training.
        seeds: how often each is trained.
    """
    data = load(dataset, data_dir=data_dir)
    accuracies: dict[str, list[float]] = {name: [] for name in MOMENTA}
    cases: dict[str, dict[str, Any]] = {}
    for seed in range(seeds):
        for name, momentum in MOMENTA.items():
            accuracy, size = train(data, seed, epochs, momentum)
            accuracies[name].append(accuracy)
            cases[name] = {"momentum": name, "momentum_bytes": size}
            print(f"seed {seed}  {name:9}{accuracy:7.2f} %", flush=True)
    for name, case in cases.items():
        differences = [a - b for a, b in zip(accuracies[name], accuracies["float32"])]
        error = statistics.stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else math.nan
        case |= {"dataset": dataset, "epochs": epochs, "accuracy": accuracies[name]}
        case |= {"difference": statistics.mean(differences), "standard_error": error}
    print(write_results(f"cpu-lion_momentum_{dataset}", list(cases.values())))


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
