"""Data sets by name, each as three splits.

    digits          scikit-learn's 1,797 handwritten digits, 8x8: always there
    cifar10/100     the official batches, whichever are present
    tiny-imagenet   the official folder, 64x64, 200 classes
    imagenette      imagenette2-160, -320 or the full-size folder
    folder          any folder of class folders, or of train/ and val/ and test/ that hold them

One rule makes three splits of two: the source's second split (its test or validation images) is `test`, and a stratified part of
its training images becomes `val`, so that choosing the best epoch never touches the images that the final numbers come from.
With val_fraction=0 all training images train, and `val` is `test`. Sources with three splits are used as they are.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from kdfast.data import cifar, images
from kdfast.data.protocol import DataError
from kdfast.data.splits import TEST, VALIDATION, ImageData, Split, absent, carve, fewer, mixed
from kdfast.data.transforms import NORMALIZATIONS

IMAGENETTE = {
    "n01440764": "tench",
    "n02102040": "English springer",
    "n02979186": "cassette player",
    "n03000684": "chain saw",
    "n03028079": "church",
    "n03394916": "French horn",
    "n03417042": "garbage truck",
    "n03425413": "gas pump",
    "n03445777": "golf ball",
    "n03888257": "parachute",
}
_VALIDATION_FOLDERS = ("val", "valid", "validation")


@dataclass(frozen=True)
class _Raw:
    """What a source holds, before the rule above: two splits, or three, or one."""

    classes: tuple[str, ...]
    train: Split
    held_out: Split | None = None
    val: Split | None = None
    image_size: int | None = None


@dataclass(frozen=True)
class _Archive:
    """Where a data set is downloaded from, and the folder that it unpacks to."""

    url: str
    md5: str
    folder: str


@dataclass(frozen=True)
class _Source:
    """A named data set: how it is read from its folder, and the defaults that suit it."""

    read: Callable[[Path], _Raw]
    normalization: str
    image_size: int
    train_transform: str
    eval_transform: str
    folders: tuple[str, ...] = ()
    marker: str = ""
    archive: _Archive | None = None
    test_fraction: float = 0.1
    val_fraction: float | None = None


def names() -> tuple[str, ...]:
    """The names that load() takes."""
    return tuple(_SOURCES)


def load(
    name: str,
    *,
    data_dir: str | Path | None = None,
    val_fraction: float = 0.1,
    seed: int = 0,
    download: bool = True,
    max_images: int | None = None,
) -> ImageData:
    """Loads a data set by name.

    Args:
        name: one of names(), or the path of an image folder.
        data_dir: the data set's folder or the folder that contains it, and where a download goes; None: ~/.cache/kdfast.
        val_fraction: part of the images that becomes `val` where the source has no split of its own for it; 0: `val` is `test`.
            digits is always divided 60/20/20, or 80/20 with val_fraction=0.
        seed: of every random division; the same seed divides alike on every machine.
        download: fetch what is not there, where there is a network and the licence allows it.
        max_images: at most so many training images, stratified; val and test stay whole.

    Raises:
        DataError: there is no such data set, or its folder does not hold what it should.
    """
    if name not in _SOURCES:
        if not Path(name).is_dir():
            if Path(name).exists():
                raise DataError(f"dataset {name} is a file: expected a folder of images, or one of {', '.join(names())}")
            if len(Path(name).parts) > 1 or name.startswith(("/", ".", "~")):
                raise DataError(f"dataset {name}: there is no such path")
            raise DataError(f"no data set or folder is called {name!r}; known names: {', '.join(names())}")
        name, data_dir = "folder", name
    if not 0 <= val_fraction < 1:
        raise DataError(f"val_fraction must be at least 0 and below 1, got {val_fraction}")
    if max_images is not None and max_images < 1:
        raise DataError(f"max_images must be at least 1, got {max_images}")
    source = _SOURCES[name]
    raw = source.read(_locate(name, source, data_dir, download))
    train, held_out, test = _three_splits(raw, source, val_fraction, seed)
    val = mixed(test if held_out is None else held_out, seed=seed)
    mean, std = NORMALIZATIONS[source.normalization]
    data = ImageData(
        name=name,
        classes=_unique(raw.classes),
        train=train,
        val=val,
        test=val if held_out is None else test,
        mean=mean,
        std=std,
        image_size=raw.image_size or source.image_size,
        val_is_test=held_out is None,
        train_transform=source.train_transform,
        eval_transform=source.eval_transform,
    )
    return data if max_images is None else replace(data, train=fewer(data.train, max_images, seed=seed))


def _three_splits(raw: _Raw, source: _Source, val_fraction: float, seed: int) -> tuple[Split, Split | None, Split]:
    """train, val (None: use test) and test, by the rule that stands above."""
    train, test = raw.train, raw.held_out
    total = len(train)
    if test is None:
        test, train = carve(train, round(source.test_fraction * total), seed=seed, purpose=TEST, classes=raw.classes)
    if raw.val is not None or val_fraction == 0:
        return train, raw.val, test
    count = round((source.val_fraction or val_fraction) * total)
    val, train = carve(train, count, seed=seed, purpose=VALIDATION, classes=raw.classes)
    return train, val, test


def _unique(classes: tuple[str, ...]) -> tuple[str, ...]:
    """Class names, numbered where two are the same: Tiny-ImageNet has two cranes."""
    repeated = {name for name in classes if classes.count(name) > 1}
    return tuple(f"{name} {classes[: c + 1].count(name)}" if name in repeated else name for c, name in enumerate(classes))


# ---- where the files are --------------------------------------------------------------------------------------------------------


def _locate(name: str, source: _Source, data_dir: str | Path | None, download: bool) -> Path:
    """The data set's own folder, downloaded if need be. Sources without folders of known names get data_dir itself."""
    if name == "digits":
        return Path()
    if not source.folders:
        return _given_folder(name, data_dir)
    root = Path(data_dir).expanduser() if data_dir is not None else cache_folder()
    found = _find(root, source)
    if found is None and download and source.archive is not None:
        _download(name, source, root)
        found = _find(root, source)
    if found is None:
        looked_for = " or ".join(source.folders)
        where = f"{root} (--data-dir)" if data_dir is not None else f"{root}; name the folder that holds it with --data-dir"
        raise DataError(f"{name} was not found: looked for {looked_for} with {source.marker} inside, in {where}")
    return found


def _given_folder(name: str, data_dir: str | Path | None) -> Path:
    if data_dir is None:
        raise DataError(f"{name}: name the folder of images with --data-dir")
    folder = Path(data_dir).expanduser()
    if not folder.is_dir():
        raise DataError(f"{name}: --data-dir {folder} is not a folder")
    return folder


def _find(root: Path, source: _Source) -> Path | None:
    """The first of the source's folders in `root`, or `root` where it is that folder itself under whatever name."""
    candidates = [root / folder for folder in source.folders] + [root]
    return next((folder for folder in candidates if (folder / source.marker).exists()), None)


def cache_folder() -> Path:
    """Where downloads and what is known of files are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kdfast"


def _download(name: str, source: _Source, root: Path) -> None:
    from torchvision.datasets.utils import download_and_extract_archive

    assert source.archive is not None  # the caller has looked
    try:
        root.mkdir(parents=True, exist_ok=True)
        download_and_extract_archive(source.archive.url, str(root), md5=source.archive.md5)
    except (OSError, RuntimeError) as error:  # no network, no space, a wrong checksum
        raise DataError(
            f"{name} is not in {root} and could not be downloaded from {source.archive.url} ({error}); "
            f"where there is no network, put the unpacked folder {source.archive.folder} there or name its place with --data-dir"
        ) from None


# ---- one reader a source --------------------------------------------------------------------------------------------------------


def _read_digits(_: Path) -> _Raw:
    from sklearn.datasets import load_digits

    digits = load_digits()
    grey = torch.from_numpy(digits.images * (255 / 16)).round().to(torch.uint8)  # 0..16 -> 0..255
    pixels = grey[:, None].repeat(1, 3, 1, 1)
    return _Raw(tuple(map(str, digits.target_names)), Split(torch.from_numpy(digits.target).long(), pixels=pixels))


def _read_cifar10(folder: Path) -> _Raw:
    train, test, classes = cifar.read(folder, cifar.CIFAR10)
    return _Raw(classes, train, test)


def _read_cifar100(folder: Path) -> _Raw:
    train, test, classes = cifar.read(folder, cifar.CIFAR100)
    return _Raw(classes, train, test)


def _read_tiny_imagenet(folder: Path) -> _Raw:
    """train/<wnid>/images/*.JPEG, and val/images with val_annotations.txt: a file, its wnid and a box a line.

    The official test images have no labels and are not used.
    """
    wnids, train = _read_classes(folder / "train")
    label_of = {wnid: c for c, wnid in enumerate(wnids)}
    annotations = folder / "val" / "val_annotations.txt"
    paths, labels = [], []
    for number, line in enumerate(annotations.read_text().splitlines(), start=1):
        file, wnid = (line.split("\t") + [""])[:2]
        if wnid not in label_of:
            expected = "expected a file and a class of train/, separated by tabs"
            raise DataError(f"{annotations}, line {number}: {expected}, got {line[:60]!r}")
        paths.append(str(folder / "val" / "images" / file))
        labels.append(label_of[wnid])
    if not paths:
        raise DataError(f"{annotations}: the file is empty")
    words = folder / "words.txt"
    readable = dict(line.split("\t", 1) for line in words.read_text().splitlines() if "\t" in line) if words.is_file() else {}
    classes = tuple(readable.get(wnid, wnid).split(",")[0] for wnid in wnids)
    return _Raw(classes, train, Split(torch.tensor(labels, dtype=torch.int64), paths=tuple(paths)))


def _read_imagenette(folder: Path) -> _Raw:
    raw = _read_folder(folder)
    size = 160 if folder.name.endswith("160") else None
    return replace(raw, classes=tuple(IMAGENETTE.get(wnid, wnid) for wnid in raw.classes), image_size=size)


def _read_folder(folder: Path) -> _Raw:
    train = folder / "train"
    val = next((folder / name for name in _VALIDATION_FOLDERS if (folder / name).is_dir()), None)
    test = folder / "test" if (folder / "test").is_dir() else None
    if train.is_dir() and (val or test):
        classes, split = _read_classes(train)
        others = [_read_classes(part, classes)[1] for part in (val, test) if part is not None]
        return _Raw(classes, split, held_out=others[-1], val=others[0] if len(others) == 2 else None)
    if [entry.name for entry in images.subfolders(folder)] == ["train"]:
        raise DataError(f"{folder}: has train/ but neither val/ nor test/; without splits, put the class folders directly into it")
    classes, split = _read_classes(folder)
    return _Raw(classes, split)


def _read_classes(folder: Path, known: tuple[str, ...] | None = None) -> tuple[tuple[str, ...], Split]:
    """A folder of class folders. `known`: the classes that training has, whose numbers the labels then are.

    Raises:
        DataError: no class folders, no images, a class that training does not have or that has no images.
    """
    subfolders = images.subfolders(folder)
    if not subfolders:
        loose = "it holds images directly" if images.find(folder) else "it is empty of images"
        raise DataError(f"{folder}: expected one folder a class with images inside, found none: {loose}")
    classes = known or tuple(entry.name for entry in subfolders)
    paths: list[str] = []
    labels: list[int] = []
    for entry in subfolders:
        if entry.name not in classes:
            raise DataError(f"{folder}: class {entry.name!r} is not among the {len(classes)} classes of train/")
        found = images.find(entry)
        paths += found
        labels += [classes.index(entry.name)] * len(found)
    if not paths:
        endings = ", ".join(images.EXTENSIONS)
        raise DataError(f"{folder}: no images in its {len(subfolders)} class folders; known endings: {endings}")
    split = Split(torch.tensor(labels, dtype=torch.int64), paths=tuple(paths))
    missing = absent(split.labels, classes)
    if missing:
        raise DataError(f"{folder}: no image of {missing}")
    return classes, split


_SOURCES = {
    "digits": _Source(
        _read_digits,
        normalization="digits",
        image_size=8,
        train_transform="digits",
        eval_transform="squash",
        test_fraction=0.2,
        val_fraction=0.2,
    ),
    "cifar10": _Source(
        _read_cifar10,
        normalization="cifar10",
        image_size=32,
        train_transform="cifar",
        eval_transform="squash",
        folders=("cifar-10-batches-py",),
        marker="batches.meta",
        archive=_Archive(
            "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz", "c58f30108f718f92721af3b95e74349a", "cifar-10-batches-py"
        ),
    ),
    "cifar100": _Source(
        _read_cifar100,
        normalization="cifar100",
        image_size=32,
        train_transform="cifar",
        eval_transform="squash",
        folders=("cifar-100-python",),
        marker="meta",
        archive=_Archive(
            "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz", "eb9058c3a382ffc7106e4002c42a8d85", "cifar-100-python"
        ),
    ),
    "tiny-imagenet": _Source(
        _read_tiny_imagenet,
        normalization="imagenet",
        image_size=64,
        train_transform="tiny",
        eval_transform="squash",
        folders=("tiny-imagenet-200",),
        marker="val/val_annotations.txt",
        archive=_Archive("http://cs231n.stanford.edu/tiny-imagenet-200.zip", "90528d7ca1a48142e341f4ef8d21d0de", "tiny-imagenet-200"),
    ),
    "imagenette": _Source(
        _read_imagenette,
        normalization="imagenet",
        image_size=224,
        train_transform="imagenet",
        eval_transform="center-crop",
        folders=("imagenette2-160", "imagenette2-320", "imagenette2"),
        marker="train",
        archive=_Archive(
            "https://s3.amazonaws.com/fast-ai-imageclas/imagenette2-160.tgz", "e793b78cc4c9e9a4ccc0c1155377a412", "imagenette2-160"
        ),
    ),
    "folder": _Source(_read_folder, normalization="imagenet", image_size=224, train_transform="imagenet", eval_transform="center-crop"),
}
