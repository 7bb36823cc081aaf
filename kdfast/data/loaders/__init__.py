"""Loaders behind one protocol, and the choice between them.

resident        the data set stays on the device: digits, CIFAR, everything that fits
dali            JPEG files, decoded by NVIDIA DALI, on a GPU or the CPU
torchvision     worker processes: works everywhere, the reference for the others

To add a loader, derive it from OrderedLoader and add it to CLASSES and LoaderName.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal, NamedTuple, get_args

import torch

from kdfast.data.loaders.dali import DaliLoader
from kdfast.data.loaders.options import LoaderOptions
from kdfast.data.loaders.ordered import OrderedLoader
from kdfast.data.loaders.processes import TorchvisionLoader
from kdfast.data.loaders.resident import ResidentLoader, free_bytes, resident_bytes
from kdfast.data.protocol import DataError, Loader
from kdfast.data.splits import ImageData, Split, hide_labels
from kdfast.data.transforms import NORMALIZATIONS, Transform, evaluation_transform, training_transform
from kdfast.ops import checks

LoaderName = Literal["auto", "dali", "resident", "torchvision"]
LOADERS: tuple[str, ...] = get_args(LoaderName)
CLASSES: dict[str, type[OrderedLoader]] = {"dali": DaliLoader, "resident": ResidentLoader, "torchvision": TorchvisionLoader}
SHARE = 0.25
"""Part of a GPU's free memory that auto gives to the decoded images of all splits."""


class Loaders(NamedTuple):
    """One loader for each split: train, val, test.

    Example:
        >>> split = kdfast.data.Split(torch.tensor([0, 1, 0, 1]), pixels=torch.zeros(4, 3, 8, 8, dtype=torch.uint8))
        >>> data = kdfast.data.ImageData("mine", ("cat", "dog"), split, split, split, (0.5,) * 3, (0.5,) * 3, 8, True, "none", "none")
        >>> loaders = kdfast.data.make_loaders(data, batch_size=2)
        >>> len(loaders.train), loaders.test.samples
        (2, 4)
    """

    train: Loader
    val: Loader
    test: Loader


def make_loaders(
    data: ImageData,
    options: LoaderOptions | None = None,
    *,
    loader: LoaderName = "auto",
    train_transform: str | None = None,
    eval_transform: str | None = None,
    image_size: int | None = None,
    normalization: str | None = None,
    label_fraction: float = 1.0,
    say: Callable[[str], None] = lambda sentence: None,
    **fields: Any,
) -> Loaders:
    """Makes the loaders for training, validation and test.

    Training is shuffled, with `views`, and leaves out the last images of an epoch that fill no batch, other ones in every epoch; the others
    are in order and complete.

    The torchvision loader starts processes for files. Where these import the main module again (Windows, macOS, and Linux from Python
    3.14), a script has to iterate below `if __name__ == "__main__":`, or pass workers=0.

    Args:
        data: of kdfast.data.load(). It decides everything below that is None.
        options: batch size, seed, device, ranks and more; None: made of `fields`.
        loader: one of LOADERS; "auto" chooses by the data and the device.
        train_transform: a name of kdfast.data.training_names().
        eval_transform: a name of kdfast.data.evaluation_names().
        image_size: side of the images handed out, pixels.
        normalization: a name in kdfast.data.NORMALIZATIONS.
        label_fraction: part of the training labels that is visible; see hide_labels.
        say: gets a sentence about the choice of "auto".
        fields: fields of LoaderOptions by keyword; they replace those of `options`. batch_size counts in all three loaders; micro_batch
            also limits the batches of the test images.

    Raises:
        DataError: no such transform, normalization or loader, an option is out of range, or the loader refuses the images.

    Example:
        >>> split = kdfast.data.Split(torch.arange(10) % 2, pixels=torch.zeros(10, 3, 8, 8, dtype=torch.uint8))
        >>> data = kdfast.data.ImageData("mine", ("cat", "dog"), split, split, split, (0.5,) * 3, (0.5,) * 3, 8, True, "cifar", "none")
        >>> train, val, test = kdfast.data.make_loaders(data, batch_size=4, seed=1)
        >>> [len(batch.labels) for batch in train], [len(batch.labels) for batch in test]
        ([4, 4], [4, 4, 2])
    """
    checks.is_a("data", data, ImageData)
    if options is not None:
        checks.is_a("options", options, LoaderOptions)
    checks.number("label_fraction", label_fraction)
    options = LoaderOptions(**fields) if options is None else replace(options, **fields)
    if normalization is not None and normalization not in NORMALIZATIONS:
        raise DataError(f"normalization must be one of {', '.join(NORMALIZATIONS)}, got {normalization!r}")
    if loader not in LOADERS:
        raise DataError(f"loader must be one of {', '.join(LOADERS)}, got {loader!r}")
    mean, std = (data.mean, data.std) if normalization is None else NORMALIZATIONS[normalization]
    size = data.image_size if image_size is None else image_size
    augment = training_transform(data.train_transform if train_transform is None else train_transform, size, mean, std)
    plain = evaluation_transform(data.eval_transform if eval_transform is None else eval_transform, size, mean, std)
    train = data.train if label_fraction == 1 else hide_labels(data.train, label_fraction, seed=options.seed)
    name: str = loader
    if loader == "auto":
        name, why = choose_loader([(train, augment), (data.val, plain), (data.test, plain)], options.device)
        say(f"{name} loader: {why}")
    make = CLASSES[name]
    evaluation = replace(options, shuffle=False, drop_last=False, views=1)  # losses see whole batches of the validation images
    smaller = replace(evaluation, batch_size=min(options.batch_size, options.micro_batch or options.batch_size))
    return Loaders(
        train=make(train, augment, replace(options, shuffle=True, drop_last=True)),
        val=make(data.val, plain, evaluation),
        test=make(data.test, plain, smaller),
    )


def choose_loader(parts: list[tuple[Split, Transform]], device: torch.device) -> tuple[str, str]:
    """The loader that suits these splits on this device, and the reason in words."""
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
    """True if NVIDIA DALI can be imported."""
    return bool(importlib.util.find_spec("nvidia") and importlib.util.find_spec("nvidia.dali"))
