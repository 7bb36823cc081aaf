"""Loaders behind one protocol, and which of them suits.

resident        the data set lives on the device: digits, CIFAR, whatever fits
dali            JPEG files, decoded by NVIDIA DALI, on a GPU or the CPU
torchvision     worker processes: works everywhere, the reference for the others
"""

import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from kdfast.data.loaders.dali import DaliLoader
from kdfast.data.loaders.ordered import OrderedLoader
from kdfast.data.loaders.processes import TorchvisionLoader
from kdfast.data.loaders.resident import ResidentLoader, free_bytes, resident_bytes
from kdfast.data.protocol import DataError, Loader
from kdfast.data.splits import ImageData, Split, hide_labels
from kdfast.data.transforms import NORMALIZATIONS, Transform, evaluation_transform, training_transform
from kdfast.machine import cores

LOADERS = ("auto", "dali", "resident", "torchvision")
SHARE = 0.25
"""Part of a GPU's free memory that auto gives to the decoded images of all splits."""


class Loaders(NamedTuple):
    """One loader a split."""

    train: Loader
    val: Loader
    test: Loader


def make_loaders(
    data: ImageData,
    *,
    batch_size: int,
    micro_batch: int | None = None,
    loader: str = "auto",
    train_transform: str | None = None,
    eval_transform: str | None = None,
    image_size: int | None = None,
    normalization: str | None = None,
    label_fraction: float = 1.0,
    seed: int = 0,
    workers: int | None = None,
    device: torch.device = torch.device("cpu"),
    rank: int = 0,
    world_size: int = 1,
    channels_last: bool = False,
    dtype: torch.dtype = torch.float32,
    views: int = 1,
    say: Callable[[str], None] = lambda sentence: None,
) -> Loaders:
    """Loaders for training, validation and test; what is None follows the data set.

    Args:
        data: of kdfast.data.load().
        batch_size: images a batch on this rank, in all three.
        micro_batch: images at most in a batch of the test images, and of in_order(), where a network takes no more at once.
        loader: one of LOADERS; "auto" is choice()'s.
        train_transform: a name of kdfast.data.training_names().
        eval_transform: a name of kdfast.data.evaluation_names().
        image_size: side of the images handed out, pixels.
        normalization: a name in kdfast.data.transforms.NORMALIZATIONS.
        label_fraction: part of the training labels that is visible; see hide_labels.
        seed: of order, augmentation and hidden labels.
        workers: processes (torchvision; 0: this one) or threads (dali; at least 1) a loader; None: none for images in memory, one a core
            and up to 8 for files.
        device: where batches are handed out.
        rank: this process among those that share the splits.
        world_size: how many they are.
        channels_last: memory format of the images.
        dtype: of the images.
        views: augmentations of each training image; above 1, training images are [B, views, 3, H, W].
        say: told which loader it is and why.

    Raises:
        DataError: no such transform, normalization or loader, or as the loader.
    """
    if normalization is not None and normalization not in NORMALIZATIONS:
        raise DataError(f"normalization must be one of {', '.join(NORMALIZATIONS)}, got {normalization!r}")
    if loader not in LOADERS:
        raise DataError(f"loader must be one of {', '.join(LOADERS)}, got {loader!r}")
    mean, std = (data.mean, data.std) if normalization is None else NORMALIZATIONS[normalization]
    size = data.image_size if image_size is None else image_size
    augment = training_transform(train_transform or data.train_transform, size, mean, std)
    plain = evaluation_transform(eval_transform or data.eval_transform, size, mean, std)
    train = data.train if label_fraction == 1 else hide_labels(data.train, label_fraction, seed=seed)
    if loader == "auto":
        loader, why = choice([(train, augment), (data.val, plain), (data.test, plain)], device)
        say(f"{loader} loader: {why}")

    def of(split: Split, transform: Transform, batch_size: int = batch_size, *, training: bool) -> OrderedLoader:
        options: dict[str, Any] = {
            "in_order_size": micro_batch,
            "shuffle": training,
            "seed": seed,
            "device": device,
            "rank": rank,
            "world_size": world_size,
            "drop_last": training,
            "channels_last": channels_last,
            "dtype": dtype,
            "views": views if training else 1,
        }
        if loader == "resident":
            return ResidentLoader(split, transform, batch_size, **options)
        options["workers"] = _default_workers(split, world_size) if workers is None else workers
        if loader == "dali":
            return DaliLoader(split, transform, batch_size, **(options | {"workers": max(1, options["workers"])}))
        return TorchvisionLoader(split, transform, batch_size, **options)

    return Loaders(
        train=of(train, augment, training=True),
        val=of(data.val, plain, training=False),  # losses see whole batches of these
        test=of(data.test, plain, min(batch_size, micro_batch or batch_size), training=False),
    )


def choice(parts: list[tuple[Split, Transform]], device: torch.device) -> tuple[str, str]:
    """The loader that suits these splits on this device, and why, in words."""
    if all(split.pixels is not None for split, _ in parts):
        return "resident", "the images are in memory"
    if device.type == "cuda" and (free := free_bytes(device)) is not None:
        needed = sum(resident_bytes(*part) for part in parts)  # opens files that were not checked
        if needed <= SHARE * free:
            return "resident", f"the images take {needed / 2**30:.1f} of {free / 2**30:.1f} GiB free on {device}"
    if dali_installed():
        return "dali", "image files, and DALI is installed"
    return "torchvision", "image files, and DALI is not installed (the extra kdfast[dali])"


def dali_installed() -> bool:
    """Whether NVIDIA DALI is there."""
    return bool(importlib.util.find_spec("nvidia") and importlib.util.find_spec("nvidia.dali"))


def _default_workers(split: Split, world_size: int) -> int:
    if split.pixels is not None:
        return 0
    return min(8, max(1, cores() // world_size))
