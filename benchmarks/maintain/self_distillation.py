"""Training throughput of self-distillation against the tutorial's own loop, on the same images and cores.

    python -m kdfast.benchmarks.maintain.self_distillation --data-dir D

The tutorial's loop is transcribed from its description: torchvision's ImageFolder and transforms on PIL images, a ResNet-18 with hooks
on layer2[1] and layer4[1], SGD, batch 32, 224 px, float32, `loss.item()` every step. Ours is `kdfast distill --recipe self_distillation
--preset tutorial` from random weights, in float32 and in bf16. Images/s of training alone, each variant in turn, several rounds.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
import tyro
from torch import nn
from torch.utils.data import DataLoader, RandomSampler
from torchvision import datasets, models, transforms

from kdfast.benchmarks.maintain import write_results

STATISTICS = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])


def tutorial(folder: Path, images: int, workers: int) -> float:
    """Images/s of one epoch of the tutorial's loop, on `images` random images."""
    pipeline = [transforms.RandomResizedCrop(224), transforms.RandomHorizontalFlip(), transforms.ToTensor()]
    everything = datasets.ImageFolder(str(folder / "train"), transforms.Compose([*pipeline, transforms.Normalize(*STATISTICS)]))
    chosen = RandomSampler(everything, num_samples=images)
    loader = DataLoader(everything, batch_size=32, sampler=chosen, num_workers=workers)
    model = models.resnet18(num_classes=10)
    projection = nn.Conv2d(512, 128, 1)
    features: dict[str, torch.Tensor] = {}
    model.layer2[1].register_forward_hook(lambda module, given, output: features.update(shallow=output))
    model.layer4[1].register_forward_hook(lambda module, given, output: features.update(deep=output))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    model.train()
    start, total_loss, right = time.perf_counter(), 0.0, 0
    for inputs, labels in loader:
        optimizer.zero_grad()
        logits = model(inputs)
        deep = projection(features["deep"])
        shallow = F.interpolate(features["shallow"], size=deep.shape[2:], mode="bilinear", align_corners=False)
        loss = 0.5 * F.mse_loss(shallow, deep) + 0.5 * F.cross_entropy(logits, labels)
        loss.backward()
        optimizer.step()
        total_loss += loss.item() * len(labels)
        right += int((logits.argmax(dim=1) == labels).sum())
    return images / (time.perf_counter() - start)


def ours(folder: Path, images: int, workers: int, precision: str) -> float:
    """Images/s of one epoch of the recipe, on as many images."""
    with tempfile.TemporaryDirectory() as out:
        arguments = ["--recipe", "self_distillation", "--preset", "tutorial", "--dataset", str(folder), "--no-pretrained", "--epochs", "1"]
        arguments += ["--precision", precision, "--workers", str(workers), "--max-images", str(images), "--no-baseline"]
        command = [sys.executable, "-m", "kdfast.cli", "distill", *arguments, "--out", f"{out}/run"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        return json.loads((Path(out) / "run" / "metrics.jsonl").read_text().splitlines()[0])["images_per_s"]


def main(data_dir: Path, images: int = 320, workers: int = 2, rounds: int = 3) -> None:
    """Runs the comparison and writes results/cpu-self_distillation.json.

    Args:
        data_dir: an image folder with train/ and val/.
        images: training images an epoch.
        workers: processes of the loaders.
        rounds: how often each variant runs.
    """
    variants = {
        "tutorial": partial(tutorial, data_dir, images, workers),
        "kdfast fp32": partial(ours, data_dir, images, workers, "fp32"),
        "kdfast bf16": partial(ours, data_dir, images, workers, "bf16"),
    }
    rates: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, measure in variants.items():
            rates[name].append(measure())
            print(f"{name}: {rates[name][-1]:.1f} images/s", flush=True)
    shared = {"image_size": 224, "batch_size": 32, "images": images, "workers": workers}
    cases = []
    for name, measured in rates.items():
        speedup = statistics.median(a / b for a, b in zip(measured, rates["tutorial"]))
        cases.append({"variant": name, **shared, "images_per_s": round(statistics.median(measured), 2), "speedup": round(speedup, 3)})
    write_results("cpu-self_distillation", cases)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
