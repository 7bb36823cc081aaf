"""Images a second that kdfast's loader hands out, against torchvision's data sets in PyTorch's DataLoader: kdfast bench loaders

Both sides do the same work up to normalized float32 tensors on the device, with the same batch size and as many workers. Files are
decoded, random-resized-cropped and flipped; CIFAR-10 is cropped and flipped. Each epoch is timed whole, ours and theirs in turn, after
one that is not counted.
"""

import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

from kdfast import files, machine
from kdfast.data import DataError, ImageData, Split, TorchvisionLoader, load, training_transform
from kdfast.engine import join

NAMED = ("imagenette", "cifar10")
GENERATED = 400  # photographs


@dataclass(frozen=True)
class Loaders:
    """Loading throughput, images/s, of kdfast's loader and of torchvision's data sets in PyTorch's DataLoader."""

    data_dir: Path | None = None
    """An image folder, or a folder that holds imagenette2-160/ or cifar-10-batches-py/; none: JPEG files made for the occasion."""
    workers: int | None = None
    """Processes on either side, beside the case of none; none: one a core, up to 8."""
    images: int = 1000
    """Training images an epoch, at most."""
    image_size: int = 224
    """Pixels of the crops of image files."""
    batch_size: int = 64
    """Images a batch."""
    epochs: int = 5
    """Timed epochs of each side."""
    device: str = "auto"
    """Where batches are handed out: auto, cpu, cuda or cuda:N."""
    out: Path | None = None
    """Also write the numbers, with machine and versions, to this JSON file."""

    def __post_init__(self) -> None:
        for name, least in (("workers", 0), ("images", 1), ("image_size", 1), ("batch_size", 1), ("epochs", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")


# ---- images ----------------------------------------------------------------------------------------------------------


def _sources(options: Loaders, temporary: Path) -> Iterator[tuple[str, ImageData]]:
    """By name: the data sets found under data_dir, else data_dir as an image folder; without data_dir generated photographs."""
    if options.data_dir is None:
        make_photographs(temporary, GENERATED)
        yield "generated", load(str(temporary), val_fraction=0, max_images=options.images)
        return
    found = 0
    for name in NAMED:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # CIFAR with some of its batches will do here
            try:
                data = load(name, data_dir=options.data_dir, val_fraction=0, download=False, max_images=options.images)
            except DataError:
                continue
        found += 1
        yield name, data
    if not found:
        yield options.data_dir.name, load(str(options.data_dir), val_fraction=0, max_images=options.images)


def make_photographs(folder: Path, count: int) -> None:
    """Writes `count` JPEG files, in two class folders, that cost a decoder what ImageNet's do: 500 x 375, about 4.4 bits a pixel."""
    from torchvision.io import write_jpeg

    random = torch.Generator().manual_seed(0)
    for i in range(count):
        target = folder / f"class{i % 2}"
        target.mkdir(parents=True, exist_ok=True)
        write_jpeg(_photograph(375, 500, random), str(target / f"{i:04}.jpg"), quality=95)


def _photograph(height: int, width: int, random: torch.Generator) -> Tensor:
    """uint8 [3, height, width]: noise whose amplitude falls with the fourth root of its frequency."""
    image, scale = torch.zeros(1, 3, height, width), 2
    while scale <= max(height, width):
        noise = torch.randn(1, 3, min(scale, height), min(scale, width), generator=random)
        image += scale**-0.25 * F.interpolate(noise, (height, width), mode="bilinear")
        scale *= 2
    return (127 + 60 * (image[0] - image.mean()) / image.std()).clamp(0, 255).to(torch.uint8)


# ---- measurement -----------------------------------------------------------------------------------------------------


def _theirs(data: ImageData, size: int) -> torch.utils.data.Dataset:
    """The same images as a torchvision data set: files through ImageFolder's reader, CIFAR as Pillow images."""
    from PIL import Image
    from torchvision import transforms
    from torchvision.datasets.folder import default_loader

    split = data.train
    crop = transforms.RandomResizedCrop(size) if split.pixels is None else transforms.RandomCrop(size, padding=4)
    flip, normalize = transforms.RandomHorizontalFlip(), transforms.Normalize(data.mean, data.std)
    transform = transforms.Compose([crop, flip, transforms.ToTensor(), normalize])
    labels = split.labels.tolist()
    arrays = None if split.pixels is None else split.pixels.permute(0, 2, 3, 1).numpy()

    class Images(torch.utils.data.Dataset[tuple[Tensor, int]]):
        def __len__(self) -> int:
            return len(labels)

        def __getitem__(self, i: int) -> tuple[Tensor, int]:
            image = Image.fromarray(arrays[i]) if arrays is not None else default_loader((split.paths or ())[i])
            return transform(image), labels[i]

    return Images()


def _seconds(batches: Iterable[Any], device: torch.device) -> float:
    """Of one epoch, all on the device: ours are there already."""
    start = time.perf_counter()
    for images, *_ in batches:
        images.to(device, non_blocking=True)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def _case(name: str, data: ImageData, options: Loaders, workers: int, device: torch.device) -> dict[str, Any]:
    """One data set, ours and theirs in turn: medians over epochs."""
    split: Split = data.train
    size, augmentation = (options.image_size, "imagenet") if split.pixels is None else (data.image_size, "cifar")
    transform = training_transform(augmentation, size, data.mean, data.std)
    ours = TorchvisionLoader(split, transform, options.batch_size, shuffle=True, seed=0, workers=workers, device=device)
    theirs: Iterable[Any] = torch.utils.data.DataLoader(
        _theirs(data, size),
        options.batch_size,
        shuffle=True,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=device.type == "cuda",
    )
    runs: list[Callable[[], float]] = [lambda: _seconds(ours, device), lambda: _seconds(theirs, device)]
    for run in runs:
        run()
    measured = [tuple(len(split) / run() for run in runs) for _ in range(options.epochs)]
    return {
        "name": name,
        "images": len(split),
        "image_size": size,
        "batch_size": options.batch_size,
        "workers": workers,
        "device": device.type,
        "ours_images_per_s": round(statistics.median(ours for ours, _ in measured), 1),
        "torchvision_images_per_s": round(statistics.median(theirs for _, theirs in measured), 1),
        "speedup": round(statistics.median(ours / theirs for ours, theirs in measured), 3),
    }


def run(options: Loaders) -> list[dict[str, Any]]:
    """Measures, prints the table, and writes options.out where asked to.

    Returns:
        One entry a data set and number of workers.

    Raises:
        ValueError: data_dir holds no images, or there is no such device.
    """
    device = join(options.device).device
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = sorted({0, min(8, cores) if options.workers is None else options.workers})
    with tempfile.TemporaryDirectory() as temporary:
        sources = _sources(options, Path(temporary))
        cases = [_case(name, data, options, count, device) for name, data in sources for count in workers]
    table = Table(box=box.SIMPLE_HEAD)
    for column in ("images", "pixels", "workers", "kdfast images/s", "torchvision images/s", "speed-up"):
        table.add_column(column, justify="left" if column == "images" else "right")
    for case in cases:
        rates = (f"{case[f'{side}_images_per_s']:,.0f}" for side in ("ours", "torchvision"))
        table.add_row(case["name"], str(case["image_size"]), str(case["workers"]), *rates, f"{case['speedup']:.2f}")
    Console(soft_wrap=True).print(table)
    if options.out is not None:
        files.write_json(options.out, {"machine": machine.facts(), "date": time.strftime("%Y-%m-%d"), "cases": cases})
    return cases
