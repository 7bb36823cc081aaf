"""kdfast data: the content of a data set, its bad image files, and a sheet of augmented images."""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain, zip_longest
from pathlib import Path
from typing import Annotated

import torch
import tyro
from PIL import Image
from rich.table import Table
from torch import Tensor
from torchvision.utils import make_grid

from kdfast import files
from kdfast.commands.command_line import Command, run_one_of
from kdfast.commands.config import OWN
from kdfast.commands.images import checking
from kdfast.commands.tables import make_table
from kdfast.data import Checked, DataError, ImageData, Split, check, evaluation_transform, load, training_transform
from kdfast.data.checking import describe_dark
from kdfast.data.images import EXTENSIONS, describe_others, find
from kdfast.data.seeding import Draws
from kdfast.engine import ranges
from kdfast.engine.ranges import AtLeastOne, BelowOne, Count, Pixels, Processes, Seed
from kdfast.engine.terminal import Terminal

COMMANDS = {
    "info": "classes, image sizes and formats, bad files",
    "check": "bad image files, with the reason of each",
    "preview": "a sheet of images as training sees them",
}
DRAWS = 6  # augmentations of one image on the sheet
LEGIBLE = 64  # pixels: smaller images are magnified on the sheet


@dataclass(frozen=True)
class Info(ranges.Checked):
    """Show the content of a data set: images of each class and split, sizes, formats, bad files."""

    dataset: Annotated[str, tyro.conf.Positional]
    """Data set by name (kdfast list datasets), or the path of an image folder."""
    data_dir: Path | None = None
    """Folder that holds the data set, or that it is downloaded to."""
    val_fraction: BelowOne = 0.1
    """Fraction of the training images set aside for validation; 0: the test images are shown for it."""
    seed: Seed = 0
    """Seed of the split into training, validation and test images, for data sets without a split of their own."""
    use_test: bool = True
    """Use test/ of an image folder."""


def info(options: Info) -> ImageData:
    """Prints the content of the data set, and returns the data set.

    Raises:
        DataError: there is no such data set.
    """
    data = load(options.dataset, data_dir=options.data_dir, val_fraction=options.val_fraction, seed=options.seed, use_test=options.use_test)
    console = Terminal()
    for note in data.notes:
        console.print(note)
    console.print(_classes(data))
    if data.val_is_test:
        console.print("val is test: the best epoch is chosen on the images of the final numbers")
    splits = _splits(data)
    paths = [path for split in splits for path in split.paths or ()]
    if not paths:
        height, width = data.train.pixels.shape[-2:]  # type: ignore[union-attr]
        console.print(f"sizes: all {width} x {height}")
        console.print("formats: in memory")
        return data
    checked = _check(paths, console)
    sizes = checked.sizes[checked.sizes[:, 0] > 0]
    if len(sizes):
        ordered = sizes[sizes.prod(dim=1).argsort(stable=True)].tolist()
        named = zip(("smallest", "median", "largest"), (ordered[0], ordered[len(ordered) // 2], ordered[-1]))
        console.print("sizes: " + ", ".join(f"{name} {width} x {height}" for name, (height, width) in named))
    formats = Counter(kind for kind in checked.kinds if kind)
    console.print("formats: " + ", ".join(f"{kind} {count:,}" for kind, count in formats.most_common()))
    more = " (kdfast data check names them)" if checked.bad else ""
    console.print(f"bad files: {len(checked.bad):,}{more}")
    _print_dark(checked, console)
    return data


def _classes(data: ImageData) -> Table:
    """A line a class: its images in each split, bad files among them."""
    parts = {"train": data.train, "val": data.val, "test": data.test}
    counts = {part: torch.bincount(split.labels, minlength=len(data.classes)).tolist() for part, split in parts.items()}
    rows = [(name, *(f"{of[k]:,}" for of in counts.values())) for k, name in enumerate(data.classes)]
    total = f"{len(data.classes):,} classes", *(f"{sum(of):,}" for of in counts.values())
    return make_table(("class", *counts), [*rows, total])


@dataclass(frozen=True)
class Check(ranges.Checked):
    """Decode every image file and name the bad ones; the exit status is 1 if there are too many."""

    dataset: Annotated[str, tyro.conf.Positional]
    """Data set by name (kdfast list datasets), or the path of any folder with images in it."""
    data_dir: Path | None = None
    """Folder that holds the data set, or that it is downloaded to."""
    max_bad_files: Count = 0
    """Number of files that may be bad."""
    workers: Processes | None = None
    """Number of processes; none: one a core."""


def check_files(options: Check) -> Checked:
    """Prints each bad file with its reason; returns the findings.

    Raises:
        DataError: more than options.max_bad_files are bad, or there are no image files.
    """
    console = Terminal()
    paths = _paths(options, console)
    if not paths:
        console.print(f"{options.dataset}: the images are in memory, there are no files to check")
    checked = _check(paths, console, options.workers)
    for path, reason in checked.bad.items():
        console.print(f"{path}: {reason}")
    _print_dark(checked, console)
    known = len(paths) - checked.decoded
    console.print(f"{len(paths):,} image files, {known:,} of them known from before, {len(checked.bad):,} bad")
    if len(checked.bad) > options.max_bad_files:
        raise DataError(f"{options.dataset}: {len(checked.bad):,} bad image files, where --max-bad-files allows {options.max_bad_files:,}")
    return checked


def _paths(options: Check, console: Terminal) -> list[str]:
    """All image files of the folder, in any layout, or of the data set; none if it is in memory."""
    if Path(options.dataset).is_dir():
        found = find(Path(options.dataset))
        if found.others:
            console.print(describe_others(Path(options.dataset), found.others))
        if not found.images:
            raise DataError(f"{options.dataset}: there are no image files in it; known endings: {', '.join(EXTENSIONS)}")
        return found.images
    data = load(options.dataset, data_dir=options.data_dir, val_fraction=0)
    return [path for split in _splits(data) for path in split.paths or ()]


def _print_dark(checked: Checked, console: Terminal) -> None:
    if dark := describe_dark(checked.dark):
        console.print(dark)


def _splits(data: ImageData) -> list[Split]:
    return [data.train, data.val] if data.val is data.test else [data.train, data.val, data.test]


def _check(paths: list[str], console: Terminal, workers: int | None = None) -> Checked:
    with checking(console) as progress:
        return check(paths, workers=workers, progress=progress)


@dataclass(frozen=True)
class Preview(ranges.Checked):
    """Draw a sheet of augmented training images: a row for each image, first as it is and then augmented several times."""

    dataset: Annotated[str, tyro.conf.Positional]
    """Data set by name (kdfast list datasets), or the path of an image folder."""
    data_dir: Path | None = None
    """Folder that holds the data set, or that it is downloaded to."""
    transform: Annotated[str | None, OWN] = None
    """Training augmentation by name; "none" only resizes images."""
    image_size: Annotated[Pixels | None, OWN] = None
    """Side of the square images in pixels."""
    count: AtLeastOne = 8
    """Number of images; the classes take turns."""
    seed: Seed = 0
    """Seed of the augmentation."""
    out: Path = Path("sheet.png")
    """PNG file to write."""
    use_test: bool = True
    """Use test/ of an image folder."""


def preview(options: Preview) -> Path:
    """Writes the sheet, prints the content of its rows, and returns its path.

    Raises:
        DataError: there is no such data set or transform, or a number is not positive.
        ValueError: options.out cannot be written.
    """
    files.check_writable(options.out, "--out")
    data = load(options.dataset, data_dir=options.data_dir, val_fraction=0, use_test=options.use_test)
    size = data.image_size if options.image_size is None else options.image_size
    name = options.transform or data.train_transform
    augment = training_transform(name, size, data.mean, data.std).augment_all
    squash = evaluation_transform("squash", size, data.mean, data.std).augment
    console = Terminal()
    sheet: list[Tensor] = []
    for row, (i, image) in enumerate(_good(data.train, options.count), start=1):
        index = torch.tensor([i])
        draws = [Draws(options.seed, draw, index=index) for draw in range(DRAWS)]
        sheet += [squash(image), *(augment([image], numbers)[0] for numbers in draws)]
        source = "" if data.train.paths is None else f"  {data.train.paths[i]}"
        console.print(f"row {row}: {data.classes[int(data.train.labels[i])]}{source}")
    if not sheet:
        raise DataError(f"{data.name}: no training image can be read: see kdfast data check")
    with files.replacing(options.out) as temporary:
        Image.fromarray(_sheet(torch.stack(sheet)).permute(1, 2, 0).contiguous().numpy()).save(temporary, format="PNG")
    console.print(f"{options.out}: {len(sheet) // (1 + DRAWS)} images as they are, and {DRAWS} draws of {name} each")
    return options.out


def _good(split: Split, count: int) -> Iterator[tuple[int, Tensor]]:
    """Up to `count` readable images with their positions: the first of each class, then the second of each, and so on."""
    classes = [(split.labels == label).nonzero().flatten().tolist() for label in split.labels.unique()]
    for i in chain.from_iterable(zip_longest(*classes)):
        if i is not None and count:
            with suppress(DataError):  # `kdfast data check` names these files
                yield i, split.read(i)
                count -= 1


def _sheet(images: Tensor) -> Tensor:
    """uint8 [n, 3, size, size] -> uint8 [3, H, W], white around the images."""
    factor = max(1, math.ceil(LEGIBLE / images.shape[-1]))
    images = images.repeat_interleave(factor, -2).repeat_interleave(factor, -1)
    return make_grid(images, nrow=1 + DRAWS, pad_value=255)


def run(arguments: Sequence[str]) -> None:
    """Runs one of COMMANDS."""
    commands: dict[str, Command] = {
        "info": (Info, info),
        "check": (Check, check_files),
        "preview": (Preview, preview),
    }
    run_one_of("data", COMMANDS, commands.__getitem__, arguments)
