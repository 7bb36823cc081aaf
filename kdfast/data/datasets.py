"""Data sets by name, each as three splits.

    digits          scikit-learn's 1,797 handwritten digits, 8x8: always there
    cifar10/100     the official batches, whichever are present
    tiny-imagenet   the official folder, 64x64, 200 classes
    imagenette      imagenette2-160, -320 or the full-size folder
    folder          any folder of class folders, or of train/ and val/ and test/ that hold them

One rule makes three splits of two: the source's second split (its test or validation images) is `test`, and a stratified part of its
training images becomes `val`, so choosing the best epoch never touches the images of the final numbers. With val_fraction=0 all training
images train, and `val` is `test`. Sources with three splits are used as they are.

To add a data set, write its reader and add one entry to DATASETS.
"""

import os
import re
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from numbers import Integral, Real
from pathlib import Path

import torch

from kdfast.data import cifar, images
from kdfast.data.extras import need
from kdfast.data.protocol import DataError
from kdfast.data.splits import FEWER, TEST, VALIDATION, ImageData, Split, choose_stratified, divide, list_missing, shuffle
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
_SPLITS = {  # usual names of the folders of splits, in lower case, without seg_ before and _set, _images, 2017 or the like behind them
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing"),
}
SMALL = 64  # pixels: images of a folder that are all of one size, square and no larger than this are trained as they are


@dataclass(frozen=True)
class _Content:
    """The images of a source before the rule above: two splits, or three, or one."""

    classes: tuple[str, ...]
    train: Split
    held_out: Split | None = None
    val: Split | None = None
    image_size: int | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _DataSet:
    """A data set in the registry.

    Attributes:
        read: reads its folder.
        normalization, image_size, train_transform, eval_transform: the defaults that suit it.
        folders: usual names of its folder, the archive's first; empty: data_dir is the folder.
        marker: a file or folder inside, by which the folder is recognized.
        url, md5: of the archive to download, if any.
        test_fraction: part of the images that becomes `test` if the source has one split.
        val_fraction: replaces the caller's, unless that is 0.
        bundled: a package brings the images, so there is no folder.
    """

    read: Callable[[Path], _Content]
    normalization: str = "imagenet"
    image_size: int = 224
    train_transform: str = "imagenet"
    eval_transform: str = "squash"
    folders: tuple[str, ...] = ()
    marker: str = ""
    url: str = ""
    md5: str = ""
    test_fraction: float = 0.1
    val_fraction: float | None = None
    bundled: bool = False


def names() -> tuple[str, ...]:
    """The names that load() takes.

    Example:
        >>> kdfast.data.names()
        ('digits', 'cifar10', 'cifar100', 'tiny-imagenet', 'imagenette', 'folder')
    """
    return tuple(DATASETS)


def load(
    name: str,
    *,
    data_dir: str | Path | None = None,
    val_fraction: float = 0.1,
    seed: int = 0,
    download: bool = True,
    max_images: int | None = None,
    use_test: bool = True,
) -> ImageData:
    """Loads a data set by name.

    Args:
        name: one of names(), or the path of an image folder.
        data_dir: the data set's folder or the folder that contains it, and the place for a download; None: ~/.cache/kdfast.
        val_fraction: part of the images that becomes `val` if the source has no split for it; 0: `val` is `test`. digits is always divided
            60/20/20, or 80/20 with val_fraction=0.
        seed: of every random division; the same seed divides alike on every machine.
        download: fetch an absent data set, if there is a network and the licence allows it.
        max_images: at most this many training images, stratified; val and test stay whole.
        use_test: read test/ of an image folder; False: leave it out, as if it were not there.

    Raises:
        DataError: there is no such data set, or its folder has another content.
        ImportError: a package that the data set needs is not installed.

    Example:
        >>> data = kdfast.data.load("digits")
        >>> len(data.train), len(data.val), len(data.test), data.image_size
        (1079, 359, 359, 8)
    """
    if not isinstance(name, str | os.PathLike):
        raise TypeError(f"name must be a data set's name or a folder, got {name!r}")
    for what, value in (("seed", seed), ("max_images", max_images)):
        if not isinstance(value, Integral) and (what, value) != ("max_images", None):
            raise DataError(f"{what} must be an integer, got {value!r}")
    if not isinstance(val_fraction, Real):
        raise DataError(f"val_fraction must be a number, got {val_fraction!r}")
    if name not in DATASETS:
        if not name or not Path(name).is_dir():
            raise DataError(f"no data set or folder is called {name!r}; known names: {', '.join(names())}")
        name, data_dir = "folder", name
    if not 0 <= val_fraction < 1:
        raise DataError(f"val_fraction must be at least 0 and below 1, got {val_fraction}")
    if max_images is not None and max_images < 1:
        raise DataError(f"max_images must be at least 1, got {max_images}")
    source = DATASETS[name]
    if not use_test and name != "folder":
        raise DataError(f"use_test: only test/ of an image folder can be left out, not the test images of {name}")
    root = _locate(name, source, data_dir, download)
    content = source.read(root) if use_test else _read_folder(root, use_test=False)
    small = name == "folder" and content.image_size is not None
    train, held_out, test = _make_splits(content, source, val_fraction, seed)
    val = shuffle(test if held_out is None else held_out, seed=seed)
    mean, std = NORMALIZATIONS[source.normalization]
    data = ImageData(
        name=name,
        classes=_make_unique(content.classes),
        train=train,
        val=val,
        test=val if held_out is None else test,
        mean=mean,
        std=std,
        image_size=content.image_size or source.image_size,
        val_is_test=held_out is None,
        train_transform="cifar" if small else source.train_transform,
        eval_transform="squash" if small else source.eval_transform,
        notes=content.notes,
    )
    if max_images is None or max_images >= len(train):
        return data
    return replace(data, train=train.subset(choose_stratified(train.labels, max_images, seed=seed, purpose=FEWER)[0]))


def _make_splits(content: _Content, source: _DataSet, val_fraction: float, seed: int) -> tuple[Split, Split | None, Split]:
    """train, val (None: use test) and test, by the rule at the top of this file."""
    train, test = content.train, content.held_out
    total = len(train)
    if test is None:
        test, train = divide(train, round(source.test_fraction * total), seed=seed, purpose=TEST, classes=content.classes)
    if content.val is not None or val_fraction == 0:
        return train, content.val, test
    count = round((source.val_fraction or val_fraction) * total)
    val, train = divide(train, count, seed=seed, purpose=VALIDATION, classes=content.classes)
    return train, val, test


def _make_unique(classes: tuple[str, ...]) -> tuple[str, ...]:
    """Class names, numbered where two are the same: Tiny-ImageNet has two cranes."""
    repeated = {name for name in classes if classes.count(name) > 1}
    return tuple(f"{name} {classes[: c + 1].count(name)}" if name in repeated else name for c, name in enumerate(classes))


# ---- folders on disk ------------------------------------------------------------------------------------------------------------


def _locate(name: str, source: _DataSet, data_dir: str | Path | None, download: bool) -> Path:
    """The data set's own folder, downloaded if need be."""
    if source.bundled:
        return Path()
    root = cache_folder() if data_dir is None else Path(data_dir).expanduser()
    if not source.folders:
        if data_dir is None:
            raise DataError(f"{name}: name the folder of images with --data-dir")
        if not root.is_dir():
            raise DataError(f"{name}: --data-dir {root} is not a folder")
        return root
    if download and source.url and _find(root, source) is None:
        _download(name, source, root)
    found = _find(root, source)
    if found is None:
        expected = " or ".join(source.folders)
        raise DataError(f"{name} was not found: looked for {expected} with {source.marker} inside, in {root} (--data-dir)")
    return found


def _find(root: Path, source: _DataSet) -> Path | None:
    """The first of the source's folders in `root`, or `root` if it is that folder itself under any name."""
    candidates = [root / folder for folder in source.folders] + [root]
    return next((folder for folder in candidates if (folder / source.marker).exists()), None)


def cache_folder() -> Path:
    """The folder for downloads and for the outcomes of checks."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kdfast"


def _download(name: str, source: _DataSet, root: Path) -> None:
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".unpacking-", dir=root) as place:  # a part of a data set must not look like one
            need("torchvision.datasets.utils").download_and_extract_archive(source.url, str(root), extract_root=place, md5=source.md5)
            (Path(place) / source.folders[0]).rename(root / source.folders[0])
    except (OSError, RuntimeError) as error:  # no network, no space, a wrong checksum
        raise DataError(
            f"{name} is not in {root} and could not be downloaded from {source.url} ({error}); "
            f"where there is no network, put the unpacked folder {source.folders[0]} there or name its place with --data-dir"
        ) from None


# ---- one reader a source --------------------------------------------------------------------------------------------------------


def _read_digits(_: Path) -> _Content:
    digits = need("sklearn.datasets").load_digits()
    grey = torch.from_numpy(digits.images * (255 / 16)).round().to(torch.uint8)  # 0..16 -> 0..255
    pixels = grey[:, None].repeat(1, 3, 1, 1)
    return _Content(tuple(map(str, digits.target_names)), Split(torch.from_numpy(digits.target).long(), pixels=pixels))


def _read_cifar(files: cifar.Files, folder: Path) -> _Content:
    train, test, classes = cifar.read(folder, files)
    return _Content(classes, train, test)


def _read_tiny_imagenet(folder: Path) -> _Content:
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
    words = folder / "words.txt"
    readable = dict(line.split("\t", 1) for line in words.read_text().splitlines() if "\t" in line) if words.is_file() else {}
    classes = tuple(readable.get(wnid, wnid).split(",")[0] for wnid in wnids)
    return _Content(classes, train, Split(torch.tensor(labels, dtype=torch.int64), paths=tuple(paths)))


def _read_imagenette(folder: Path) -> _Content:
    content = _read_folder(folder)
    size = 160 if folder.name.endswith("160") else None
    return replace(content, classes=tuple(IMAGENETTE.get(wnid, wnid) for wnid in content.classes), image_size=size)


def _read_folder(folder: Path, use_test: bool = True) -> _Content:
    """Reads class folders, or a folder for each split that holds them."""
    notes: list[str] = []
    root = _unwrap(folder, notes)
    parts = _find_splits(root, notes)
    found = ", ".join(f"{path.name}/" for path in parts.values())
    if parts and "train" not in parts:
        raise DataError(f"{root}: has {found} but no train/; without splits, put the class folders directly into it")
    if len(parts) == 1:
        raise DataError(f"{root}: has {found} but neither val/ nor test/; without splits, put the class folders directly into it")
    if not use_test and (test := parts.pop("test", None)):
        notes.append(f"{test} is left out (--no-use-test)")
    classes, split = _read_classes(_unwrap(parts.pop("train", root), notes), notes)
    others = [_read_classes(_unwrap(path, notes, classes), notes, classes)[1] for path in parts.values()]
    held_out, val = [*others[::-1], None, None][:2]
    return _Content(classes, split, held_out, val, _common_size(split, notes), tuple(notes))


def _find_splits(folder: Path, notes: list[str]) -> dict[str, Path]:
    """The folders of the splits, in the order train, val, test; none if the folders are classes, which may be called train or test too."""
    subfolders = images.list_subfolders(folder)
    found: dict[str, Path] = {}
    for entry in subfolders:
        part = _split_of(entry)
        if part in found:
            raise DataError(
                f"{folder}: both {found[part].name}/ and {entry.name}/ hold {part} images by their names: keep one of them there"
            )
        if part:
            found[part] = entry
    beside = ", ".join(f"{entry.name}/" for entry in subfolders if entry not in found.values())
    names = ", ".join(f"{found[part].name}/" for part in _SPLITS if part in found)
    if beside and ("train" not in found or not any(map(images.list_subfolders, found.values()))):
        if found:
            notes.append(f"{folder}: {names} and {beside} are read as classes")
        return {}
    if beside or any(path.name != part for part, path in found.items()):
        notes.append(f"{folder}: {names} are read as the splits" + (f", and {beside} not at all" if beside else ""))
    return {part: found[part] for part in _SPLITS if part in found}


def _split_of(folder: Path) -> str | None:
    name = re.sub(r"^seg[-_ ]|[-_ ]?(set|images|data|20\d\d|1)$", "", folder.name.lower())
    return next((part for part, names in _SPLITS.items() if name in names), None)


def _unwrap(folder: Path, notes: list[str], classes: tuple[str, ...] = ()) -> Path:
    """The only folder in `folder` where that holds the class folders, as in dataset/dataset/ or seg_train/seg_train/; else `folder`."""
    subfolders = images.list_subfolders(folder)
    if len(subfolders) != 1 or subfolders[0].name in classes or not images.list_subfolders(subfolders[0]):
        return folder
    if _split_of(subfolders[0]) not in (None, _split_of(folder)):
        return folder
    notes.append(f"{folder}: holds {subfolders[0].name}/ alone, whose folders are read")
    return _unwrap(subfolders[0], notes, classes)


def _common_size(split: Split, notes: list[str]) -> int | None:
    """The side of small square images that have one size, by a few of them; None for all others."""
    assert split.paths is not None  # a folder's
    sizes = set()
    for path in split.paths[:: max(1, len(split) // 16)]:
        with suppress(DataError):  # the check of all files names them
            sizes.add(images.read_size(path))
    height, width = sizes.pop() if len(sizes) == 1 else (0, 1)
    if height != width or height > SMALL:
        return None
    notes.append(f"images are {width} x {height} pixels and trained so, with the augmentation cifar (--image-size, --augment)")
    return height


def _read_classes(folder: Path, notes: list[str] | None = None, known: tuple[str, ...] | None = None) -> tuple[tuple[str, ...], Split]:
    """Reads a folder of class folders.

    Args:
        folder: the folder.
        notes: gets a sentence about files that are left out.
        known: the classes of the training images; labels are positions in them.

    Raises:
        DataError: no class folders, no images, a class of training without images, or one that training does not have.
    """
    subfolders = images.list_subfolders(folder)
    if not subfolders:
        raise DataError(f"{folder}: expected one folder a class with images inside, found no folder{_USE_TEST if known else ''}")
    classes = known or tuple(entry.name for entry in subfolders)
    paths: list[str] = []
    labels: list[int] = []
    others: list[str] = []
    for entry in subfolders:
        if entry.name not in classes:
            raise DataError(f"{folder}: class {entry.name!r} is not among the {len(classes)} classes of train/{_USE_TEST}")
        found = images.find(entry)
        paths += found.images
        others += found.others
        labels += [classes.index(entry.name)] * len(found.images)
    split = Split(torch.tensor(labels, dtype=torch.int64), paths=tuple(paths))
    left_out = [images.describe_others(folder, others)] if others else []
    if loose := images.list_images(folder):
        left_out.append(f"{folder}: left out {len(loose):,} of its images, which lie in no class folder: {', '.join(loose[:3])}")
    if missing := list_missing(split.labels, classes):
        if known is None or not paths:
            raise DataError("; ".join([f"{folder}: no image of {missing}", *left_out, f"known endings: {', '.join(images.EXTENSIONS)}"]))
        left_out.append(f"{folder}: no image of {missing}")
    if notes is not None:
        notes += left_out
    return classes, split


_USE_TEST = " (--no-use-test leaves out a test/ without labels)"


DATASETS = {
    "digits": _DataSet(_read_digits, "digits", image_size=8, train_transform="digits", test_fraction=0.2, val_fraction=0.2, bundled=True),
    "cifar10": _DataSet(
        partial(_read_cifar, cifar.CIFAR10),
        "cifar10",
        image_size=32,
        train_transform="cifar",
        folders=("cifar-10-batches-py",),
        marker="batches.meta",
        url="https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
        md5="c58f30108f718f92721af3b95e74349a",
    ),
    "cifar100": _DataSet(
        partial(_read_cifar, cifar.CIFAR100),
        "cifar100",
        image_size=32,
        train_transform="cifar",
        folders=("cifar-100-python",),
        marker="meta",
        url="https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz",
        md5="eb9058c3a382ffc7106e4002c42a8d85",
    ),
    "tiny-imagenet": _DataSet(
        _read_tiny_imagenet,
        image_size=64,
        train_transform="tiny",
        folders=("tiny-imagenet-200",),
        marker="val/val_annotations.txt",
        url="http://cs231n.stanford.edu/tiny-imagenet-200.zip",
        md5="90528d7ca1a48142e341f4ef8d21d0de",
    ),
    "imagenette": _DataSet(
        _read_imagenette,
        eval_transform="center-crop",
        folders=("imagenette2-160", "imagenette2-320", "imagenette2"),
        marker="train",
        url="https://s3.amazonaws.com/fast-ai-imageclas/imagenette2-160.tgz",
        md5="e793b78cc4c9e9a4ccc0c1155377a412",
    ),
    "folder": _DataSet(_read_folder, eval_transform="center-crop"),
}
