"""Images a second of kdfast's loaders, against torchvision's data sets in PyTorch's DataLoader: kdfast bench loaders

All loaders do the same work up to normalized float32 tensors on the device, with the same batch size. Files are decoded, cropped at
random, resized and flipped; CIFAR-10 is cropped and flipped. Whole epochs of all loaders are timed in turn, after one that is not counted.

Our torchvision loader is compared with PyTorch's with as many workers. Ours without workers are compared with PyTorch's at its fastest.
On a GPU each loader also feeds a ResNet-18, and the share of the training time that waits for images is measured.
"""

import statistics
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markdown import Markdown
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from kdfast import files, machine
from kdfast.benchmarks import timing
from kdfast.data import (
    NORMALIZATIONS,
    Batch,
    ImageData,
    Loader,
    LoaderOptions,
    ResidentLoader,
    Split,
    TorchvisionLoader,
    Transform,
    load,
    training_transform,
)
from kdfast.data.loaders import dali_installed
from kdfast.engine import join
from kdfast.engine.ranges import AtLeastOne, Checked, Pixels, Processes
from kdfast.text import markdown_table

NAMED = {"imagenette": "imagenette2-160", "cifar10": "cifar-10-batches-py"}  # data sets, and their folders
GENERATED = 400  # photographs
IN_MEMORY = 10  # times as many images an epoch: they pass that much faster


@dataclass(frozen=True)
class Loaders(Checked):
    """Loading throughput, images/s, of kdfast's loaders and of torchvision's data sets in PyTorch's DataLoader."""

    data_dir: Path | None = None
    """An image folder, or a folder that holds imagenette2-160/ or cifar-10-batches-py/; none: generated images."""
    workers: Processes | None = None
    """Processes on either side, beside the case of none, and threads of DALI; none: one a core, up to 8."""
    images: AtLeastOne = 1000
    """Training images an epoch, at most; ten times as many where they are small and in memory."""
    image_size: Pixels = 224
    """Pixels of the crops of image files."""
    batch_size: AtLeastOne = 64
    """Images a batch."""
    epochs: AtLeastOne = 5
    """Timed epochs of each loader."""
    device: str = "auto"
    """Device of the batches: auto, cpu, cuda or cuda:N."""
    out: Path | None = None
    """Also write the numbers, with machine and versions, to this JSON file."""


# ---- images ----------------------------------------------------------------------------------------------------------


def _sources(options: Loaders, temporary: Path) -> Iterator[tuple[str, ImageData]]:
    """By name: the data sets found under data_dir, else data_dir as an image folder; without data_dir generated images."""
    if options.data_dir is None:
        make_photographs(temporary, GENERATED)
        yield "generated photographs", load(str(temporary), val_fraction=0, max_images=options.images)
        yield "generated 32x32", small_images(IN_MEMORY * options.images, classes=10)
        return
    folder = options.data_dir.resolve()  # no name of a data set
    names = [name for name, own in NAMED.items() if (folder / own).is_dir()]
    for name in names:
        most = options.images * (IN_MEMORY if name == "cifar10" else 1)
        yield name, load(name, data_dir=folder, val_fraction=0, download=False, max_images=most)
    if not names:
        yield folder.name, load(str(folder), val_fraction=0, max_images=options.images)


def small_images(count: int, classes: int) -> ImageData:
    """Images of CIFAR-10's size in memory; what they show makes no difference to any loader."""
    pixels = torch.randint(256, (count, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    split = Split(torch.arange(count) % classes, pixels=pixels)
    mean, std = NORMALIZATIONS["cifar10"]
    return ImageData("generated", tuple(map(str, range(classes))), split, split, split, mean, std, 32, True, "cifar", "squash")


def make_photographs(folder: Path, count: int) -> None:
    """Writes `count` JPEG files, in two class folders, that cost a decoder what ImageNet's do: 500 x 375, about 4.4 bits a pixel."""
    from PIL import Image

    random = torch.Generator().manual_seed(0)
    for i in range(count):
        target = folder / f"class{i % 2}"
        target.mkdir(parents=True, exist_ok=True)
        image = F.interpolate(torch.randn(1, 3, 75, 100, generator=random), (375, 500), mode="bilinear")[0]
        pixels = (127 + 60 * image).clamp(0, 255).to(torch.uint8)
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(target / f"{i:04}.jpg", quality=95)


# ---- measurement -----------------------------------------------------------------------------------------------------


def _theirs(data: ImageData, size: int) -> Dataset:
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

    class Images(Dataset[tuple[Tensor, int]]):
        def __len__(self) -> int:
            return len(labels)

        def __getitem__(self, i: int) -> tuple[Tensor, int]:
            image = Image.fromarray(arrays[i]) if arrays is not None else default_loader((split.paths or ())[i])
            return transform(image), labels[i]

    return Images()


def _pass(batches: Iterable[Any], device: torch.device) -> None:
    """One epoch, all batches on the device; ours are there already."""
    for images, *_ in batches:
        images.to(device, non_blocking=True)


LoadersByName = dict[tuple[str, int], Loader]


def _ours(data: ImageData, transform: Transform, options: Loaders, workers: list[int], device: torch.device) -> LoadersByName:
    """Our loaders that can serve these images, by name and number of workers."""

    def make(loader: type[Any], count: int) -> Loader:
        return loader(data.train, transform, LoaderOptions(options.batch_size, shuffle=True, device=device, workers=count))

    found: LoadersByName = {("torchvision", count): make(TorchvisionLoader, count) for count in workers}
    if data.train.pixels is not None or device.type == "cuda":  # files on the CPU: it would resize what it need not decode, no faster
        found["resident", 0] = make(ResidentLoader, 0)
    if data.train.paths is not None and dali_installed():
        from kdfast.data.loaders.dali import DaliLoader

        threads = max(1, workers[-1])
        found["dali", threads] = make(DaliLoader, threads)
    return found


def _cases(name: str, data: ImageData, options: Loaders, workers: list[int], device: torch.device) -> list[dict[str, Any]]:
    """One data set: our loaders and PyTorch's in turn, medians over epochs."""
    gpu, images = device.type == "cuda", len(data.train)
    size, augmentation = (options.image_size, "imagenet") if data.train.pixels is None else (data.image_size, "cifar")
    ours = _ours(data, training_transform(augmentation, size, data.mean, data.std), options, workers, device)
    peer = partial(DataLoader, _theirs(data, size), options.batch_size, shuffle=True, pin_memory=gpu)
    theirs = {count: peer(num_workers=count, persistent_workers=count > 0) for count in workers}
    epochs = {key: partial(_pass, batches, device) for key, batches in (ours | theirs).items()}
    seconds = timing.in_turn(epochs, rounds=options.epochs, at_least=0.0, device=device)
    rates = {key: round(images / statistics.median(measured), 1) for key, measured in seconds.items()}
    fastest = max(theirs, key=lambda count: rates[count])
    cases = []
    for (loader, count), batches in ours.items():
        against = count if loader == "torchvision" else fastest
        case = {
            "name": name,
            "images": images,
            "image_size": size,
            "batch_size": options.batch_size,
            "loader": loader,
            "workers": count,
            "peer_workers": against,
            "device": device.type,
            "images_per_s": rates[loader, count],
            "peer_images_per_s": rates[against],
            "speedup": round(timing.speedup(seconds[loader, count], seconds[against]), 3),
        }
        if gpu:
            case["waiting_share"] = round(waiting_share(batches, resnet18_step(device, len(data.classes)), device), 4)
        cases.append(case)
    return cases


def resnet18_step(device: torch.device, classes: int) -> Callable[[Batch], None]:
    """A training step of torchvision's ResNet-18: bf16 autocast, channels last, SGD."""
    from torchvision.models import resnet18

    model = resnet18(num_classes=classes).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)

    def step(batch: Batch) -> None:
        with torch.autocast(device.type, torch.bfloat16):
            loss = F.cross_entropy(model(batch.images.contiguous(memory_format=torch.channels_last)), batch.labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def waiting_share(loader: Loader, step: Callable[[Batch], None], device: torch.device) -> float:
    """The share of an epoch's training time that waits for batches, 0 to 1.

    An epoch of steps with batches of the loader, against as many with a batch that is there already; the best of three rounds each.
    """

    def train(batches: Iterable[Batch]) -> None:
        for batch in batches:
            step(batch)

    there = [next(iter(loader))] * len(loader)
    loader.set_epoch(1)
    seconds = timing.in_turn({"loader": partial(train, loader), "there": partial(train, there)}, rounds=3, at_least=0.0, device=device)
    return max(0.0, 1 - min(seconds["there"]) / min(seconds["loader"]))


def run(options: Loaders) -> list[dict[str, Any]]:
    """Measures, prints the table, and writes options.out where asked to.

    Returns:
        One entry a data set, loader and number of workers.

    Raises:
        ValueError: data_dir holds no images, or there is no such device.
    """
    if options.out is not None:
        files.check_writable(options.out, "--out")
    device = join(options.device).device
    workers = sorted({0, min(8, machine.cores()) if options.workers is None else options.workers})
    with tempfile.TemporaryDirectory() as temporary:
        sources = _sources(options, Path(temporary))
        cases = [case for name, data in sources for case in _cases(name, data, options, workers, device)]
    Console(soft_wrap=True).print(Markdown(make_table(cases)))
    if options.out is not None:
        files.write_json(options.out, machine.document(cases))
    return cases


def make_table(cases: Sequence[dict[str, Any]]) -> str:
    """A Markdown table: a row a data set, loader and number of workers (DALI: threads)."""
    waiting = ["waiting"] if any("waiting_share" in case for case in cases) else []
    rows = []
    for case in cases:
        peer = f"{case['peer_images_per_s']:,.0f} ({case['peer_workers']} workers)"
        cells = [case["name"], str(case["image_size"]), case["loader"], str(case["workers"]), f"{case['images_per_s']:,.0f}", peer]
        rows.append([*cells, f"{case['speedup']:.2f}", *(f"{case['waiting_share']:.1%}" for _ in waiting)])
    columns = ["images", "pixels", "loader", "workers", "images/s", "PyTorch's, images/s", "speed-up", *waiting]
    return markdown_table(columns, rows, left=(0, 2))
