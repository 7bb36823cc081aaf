"""CIFAR's batches as published: pickles, read by an unpickler that can build nothing but lists, strings and arrays."""

import pickle
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kdfast.data.protocol import DataError
from kdfast.data.splits import Split


@dataclass(frozen=True)
class Files:
    """The names of the files, and the keys in them."""

    train: tuple[str, ...]
    test: str
    meta: str
    labels: str  # the key of the labels in a batch
    names: str  # the key of the class names in the meta file


CIFAR10 = Files(tuple(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta", "labels", "label_names")
CIFAR100 = Files(("train",), "test", "meta", "fine_labels", "fine_label_names")

_ALLOWED: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    # the function that NumPy's pickles call to make an empty array; its module was renamed in NumPy 2
    ("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
    ("numpy._core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
}


class _Unpickler(pickle.Unpickler):
    """Refuses every name that the official files do not hold: a pickle can call any function it names."""

    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ALLOWED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no CIFAR batch needs") from None


def _unpickle(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            return dict(_Unpickler(file, encoding="latin1").load())
    except Exception as error:  # a damaged pickle can raise nearly any exception
        raise DataError(f"{path}: not an official CIFAR batch: {error or type(error).__name__}") from None


def _read_batch(path: Path, labels_key: str) -> tuple[Tensor, Tensor]:
    """Pixels uint8 [n, 3, 32, 32] and labels int64 [n]."""
    content = _unpickle(path)
    pixels, labels = content.get("data"), content.get(labels_key)
    if not (
        isinstance(pixels, np.ndarray)
        and pixels.dtype == np.uint8
        and pixels.shape[1:] == (3072,)
        and isinstance(labels, list)
        and len(labels) == len(pixels)
        and all(isinstance(label, int) for label in labels)
    ):
        expected = f"expected 'data' of uint8 [n, 3072] and a list '{labels_key}' of n integers"
        raise DataError(f"{path}: not an official CIFAR batch: {expected}")
    return torch.from_numpy(pixels.reshape(-1, 3, 32, 32).copy()), torch.tensor(labels, dtype=torch.int64)


def read(folder: Path, files: Files) -> tuple[Split, Split, tuple[str, ...]]:
    """The training images, the test images and the class names; training files may be missing, but not all of them.

    Raises:
        DataError: a needed file is missing or not an official one.
    """
    present = [name for name in files.train if (folder / name).is_file()]
    missing = [name for name in (files.test, files.meta) if not (folder / name).is_file()] + ([] if present else [files.train[0]])
    if missing:
        raise DataError(f"{folder}: the file {missing[0]} is missing")
    if len(present) < len(files.train):
        note = f"{folder}: {len(present)} of {len(files.train)} training batches are present; training uses those"
        warnings.warn(note, stacklevel=2)
    pixels, labels = map(torch.cat, zip(*(_read_batch(folder / name, files.labels) for name in present)))
    test_pixels, test_labels = _read_batch(folder / files.test, files.labels)
    names = _unpickle(folder / files.meta).get(files.names)
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise DataError(f"{folder / files.meta}: not an official CIFAR file: expected a list '{files.names}' of class names")
    return Split(labels, pixels=pixels), Split(test_labels, pixels=test_pixels), tuple(names)
