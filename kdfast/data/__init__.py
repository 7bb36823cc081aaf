"""Data sets and transforms by name, and loaders behind one protocol.

    data = kdfast.data.load("imagenette", data_dir="data")
    train, val, test = kdfast.data.make_loaders(data, batch_size=64, device=torch.device("cuda"))
    for batch in train: ...                                     # batch.images, batch.labels, batch.index

torchvision, Pillow, scikit-learn (the extra kdfast[cli]) and DALI (kdfast[dali]) are imported when they are first needed.
"""

from kdfast.data.checking import Checked, check, usable
from kdfast.data.datasets import load, names
from kdfast.data.loaders import LOADERS, DaliLoader, LoaderOptions, Loaders, ResidentLoader, TorchvisionLoader, make_loaders
from kdfast.data.protocol import Batch, DataError, Loader
from kdfast.data.splits import HIDDEN, ImageData, Split, hide_labels
from kdfast.data.transforms import (
    NORMALIZATIONS,
    Normalize,
    Transform,
    evaluation_names,
    evaluation_transform,
    training_names,
    training_transform,
)

__all__ = [
    "HIDDEN",
    "LOADERS",
    "NORMALIZATIONS",
    "Batch",
    "Checked",
    "DaliLoader",
    "DataError",
    "ImageData",
    "Loader",
    "LoaderOptions",
    "Loaders",
    "Normalize",
    "ResidentLoader",
    "Split",
    "TorchvisionLoader",
    "Transform",
    "check",
    "evaluation_names",
    "evaluation_transform",
    "hide_labels",
    "load",
    "make_loaders",
    "names",
    "training_names",
    "training_transform",
    "usable",
]
