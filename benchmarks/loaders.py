"""Images a second that kdfast's loader hands out, against torchvision's data sets in PyTorch's DataLoader.

    python -m kdfast.benchmarks.loaders --data-dir D [--workers 2]

Cases: imagenette's training images, decoded and random-resized-cropped to 224 with a flip; CIFAR-10's training images with the usual
crop and flip. Both sides do the same work up to normalized float32 tensors, with the same batch size and as many workers; each epoch
is timed whole, ours and theirs in turn, after one that is not counted. The result is in results/cpu-loaders.json.
"""

import argparse
import statistics
import time
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from kdfast.benchmarks.timing import write_json

from kdfast.data import DataError, ImageData, Split, TorchvisionLoader, load, training_transform

SIZES = {"imagenette": 224, "cifar10": 32}
NAMES = {"imagenette": "imagenet", "cifar10": "cifar"}


def _theirs(name: str, split: Split, data: ImageData) -> Any:
    """The same images as a torchvision data set: files through ImageFolder's reader, CIFAR as Pillow images."""
    from PIL import Image
    from torchvision import transforms
    from torchvision.datasets.folder import default_loader

    size = SIZES[name]
    crop = {"imagenette": transforms.RandomResizedCrop(size), "cifar10": transforms.RandomCrop(size, padding=4)}[name]
    flip, normalize = transforms.RandomHorizontalFlip(), transforms.Normalize(data.mean, data.std)
    transform = transforms.Compose([crop, flip, transforms.ToTensor(), normalize])
    labels = split.labels.tolist()
    arrays = None if split.pixels is None else split.pixels.permute(0, 2, 3, 1).numpy()

    class Images(torch.utils.data.Dataset[tuple[torch.Tensor, int]]):
        def __len__(self) -> int:
            return len(labels)

        def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
            image = Image.fromarray(arrays[i]) if arrays is not None else default_loader((split.paths or ())[i])
            return transform(image), labels[i]

    return Images()


def _seconds(batches: Iterable[Any]) -> float:
    start = time.perf_counter()
    for _ in batches:
        pass
    return time.perf_counter() - start


def _case(name: str, data_dir: Path, *, images: int, batch_size: int, workers: int, epochs: int) -> dict[str, Any]:
    """One data set, ours and theirs in turn: medians over epochs."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # CIFAR with some of its batches will do here
        data = load(name, data_dir=data_dir, val_fraction=0, download=False, max_images=images)
    transform = training_transform(NAMES[name], SIZES[name], data.mean, data.std)
    ours = TorchvisionLoader(data.train, transform, batch_size, shuffle=True, seed=0, workers=workers)
    theirs: Iterable[Any] = torch.utils.data.DataLoader(
        _theirs(name, data.train, data), batch_size, shuffle=True, num_workers=workers, persistent_workers=workers > 0
    )
    runs: list[Callable[[], float]] = [lambda: _seconds(ours), lambda: _seconds(theirs)]
    for run in runs:
        run()
    measured = [tuple(len(data.train) / run() for run in runs) for _ in range(epochs)]
    return {
        "name": name,
        "images": len(data.train),
        "image_size": SIZES[name],
        "batch_size": batch_size,
        "workers": workers,
        "ours_images_per_s": round(statistics.median(ours for ours, _ in measured), 1),
        "torchvision_images_per_s": round(statistics.median(theirs for _, theirs in measured), 1),
        "speedup": round(statistics.median(ours / theirs for ours, theirs in measured), 3),
    }


def main() -> None:
    """Measures and writes results/cpu-loaders.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True, help="holds imagenette2-160/ and cifar-10-batches-py/")
    parser.add_argument("--workers", type=int, default=2, help="processes on either side")
    parser.add_argument("--images", type=int, default=2000, help="training images an epoch")
    parser.add_argument("--epochs", type=int, default=5, help="timed epochs of each side")
    parser.add_argument("--batch-size", type=int, default=64)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    cases = []
    for name in SIZES:
        for workers in sorted({0, arguments.workers}):
            try:
                case = _case(
                    name,
                    arguments.data_dir,
                    images=arguments.images,
                    batch_size=arguments.batch_size,
                    workers=workers,
                    epochs=arguments.epochs,
                )
            except DataError as error:
                print(f"{name}: left out: {error}")
                break
            print(case)
            cases.append(case)
    print(f"written: {write_json('cpu-loaders', cases)}")


if __name__ == "__main__":
    main()
