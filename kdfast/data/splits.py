"""Images with labels, and how they are divided: stratified, seeded, the same on every machine.

Stratified choice. Image j = 0, 1, ... of a class of n images, in that class' seeded random order, has the key (j + 1/2) / n, and
the first of every class the key 0. The images with the least keys are chosen. That is Sainte-Laguë's apportionment: exactly as
many images as asked for, at least one a class, and every class within one image or so of its share.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kdfast.data.images import decode, size
from kdfast.data.protocol import DataError
from kdfast.data.seeding import generator

HIDDEN = -100
"""The label of an image whose class the student must not see; what PyTorch's losses ignore by default."""

VALIDATION, TEST, FEWER, LABELS, ORDER = range(5)
"""What a random choice is for: choices with one seed but different purposes are independent."""


@dataclass(frozen=True, eq=False)
class Split:
    """n labelled images, in memory or in files.

    Attributes:
        labels: int64 [n]; -100 where hidden.
        pixels: uint8 [n, 3, H, W], where the images are in memory.
        paths: n file names, where they are not.
        sizes: int32 [n, 2], height and width of each file, where kdfast.data.usable() has looked.
        plain: bool [n], whether every JPEG decoder sees the file's image alike, where it has looked.
    """

    labels: Tensor
    pixels: Tensor | None = None
    paths: tuple[str, ...] | None = None
    sizes: Tensor | None = None
    plain: Tensor | None = None

    def __post_init__(self) -> None:
        images = self.paths if self.pixels is None else self.pixels
        if images is None or len(images) != len(self.labels):
            count = "no" if images is None else len(images)
            raise DataError(f"a split needs one image for each label, got {count} images and {len(self.labels)} labels")

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, i: int) -> Tensor:
        """Image i: uint8 [3, H, W].

        Raises:
            DataError: its file cannot be read.
        """
        if self.pixels is not None:
            return self.pixels[i]
        assert self.paths is not None  # one of the two is there
        return decode(self.paths[i])

    def measured(self) -> Tensor:
        """Heights and widths, pixels: int64 [n, 2]; those of files that were not checked are read from their heads.

        Raises:
            DataError: a file has no head that says so.
        """
        if self.pixels is not None:
            return torch.tensor(self.pixels.shape[-2:]).expand(len(self), 2)
        if self.sizes is not None:
            return self.sizes.long()
        assert self.paths is not None  # one of the two is there
        with ThreadPoolExecutor() as threads:
            return torch.tensor(list(threads.map(size, self.paths)))

    def subset(self, indices: Tensor) -> "Split":
        """The images at these positions (int64 [m]), in this order."""
        return Split(
            self.labels[indices],
            pixels=None if self.pixels is None else self.pixels[indices],
            paths=None if self.paths is None else tuple(self.paths[i] for i in indices.tolist()),
            sizes=None if self.sizes is None else self.sizes[indices],
            plain=None if self.plain is None else self.plain[indices],
        )


@dataclass(frozen=True, eq=False)
class ImageData:
    """A data set ready for training and evaluation.

    Attributes:
        name: as it was asked for.
        classes: names, unique; labels are positions in them.
        train, val, test: the three splits; `test` is touched for final numbers only.
        mean, std: of the pixels scaled to 0..1, three channels each.
        image_size: side of the square images that the default transforms make, pixels.
        val_is_test: the validation split is the test split, so that the best epoch is chosen on it.
        train_transform, eval_transform: names in kdfast.data.transforms that suit these images.
    """

    name: str
    classes: tuple[str, ...]
    train: Split
    val: Split
    test: Split
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    image_size: int
    val_is_test: bool
    train_transform: str
    eval_transform: str

    def __post_init__(self) -> None:
        if len(self.classes) < 2:
            raise DataError(f"{self.name}: at least 2 classes are needed, found {len(self.classes)}: {', '.join(self.classes) or 'none'}")
        for part in ("train", "val", "test"):
            self._check(part, getattr(self, part).labels)

    def _check(self, part: str, labels: Tensor) -> None:
        """Labels are in range, and every class is there."""
        C = len(self.classes)
        wrong = labels[((labels < 0) | (labels >= C)) & (labels != HIDDEN)]
        if len(wrong):
            raise DataError(f"{self.name}: labels of {part} must be 0 to {C - 1} for {C} classes, got {wrong[0].item()}")
        missing = absent(labels, self.classes)
        if missing:
            raise DataError(f"{self.name}: no image of {missing} in {part}")


def absent(labels: Tensor, classes: tuple[str, ...]) -> str:
    """The classes that no label is of, in words; empty where there are none."""
    counts = torch.bincount(labels[labels >= 0], minlength=len(classes))
    missing = [classes[c] for c in (counts == 0).nonzero().flatten().tolist()]
    return _listing("class", "classes", missing) if missing else ""


def _listing(one: str, many: str, names: list[str], shown: int = 5) -> str:
    """'class 'a'', 'classes 'a', 'b' and 7 more'."""
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return f"{one if len(names) == 1 else many} {', '.join(map(repr, names[:shown]))}{more}"


def stratified(labels: Tensor, count: int, *, seed: int, purpose: int) -> tuple[Tensor, Tensor]:
    """Chooses `count` images, of every class in proportion and at least one.

    Args:
        labels: int64 [n].
        count: how many, from the number of classes present to n.
        seed: same seed, same choice.
        purpose: VALIDATION, TEST, FEWER or LABELS.

    Returns:
        Positions of the chosen and of the others, both int64 and ascending.

    Raises:
        DataError: `count` is out of range.
    """
    present = labels.unique().tolist()
    if not len(present) <= count <= len(labels):
        raise DataError(f"cannot choose {count} of {len(labels)} images with at least one of each of {len(present)} classes")
    random = generator(seed, purpose)
    positions, keys = [], []
    for label in present:
        members = (labels == label).nonzero().flatten()
        positions.append(members[torch.randperm(len(members), generator=random)])
        key = (torch.arange(len(members), dtype=torch.float64) + 0.5) / len(members)
        key[0] = 0
        keys.append(key)
    order = torch.cat(positions)[torch.cat(keys).argsort(stable=True)]
    return order[:count].sort().values, order[count:].sort().values


def carve(split: Split, count: int, *, seed: int, purpose: int, classes: tuple[str, ...]) -> tuple[Split, Split]:
    """Divides a split into `count` images chosen by stratified() and the others; every class keeps an image in both.

    Raises:
        DataError: a class has one image only, or `count` is too small or too large.
    """
    sizes = torch.bincount(split.labels, minlength=len(classes))
    single = [classes[c] for c in (sizes == 1).nonzero().flatten().tolist()]
    if single:
        raise DataError(f"{_listing('class', 'classes', single)} with 1 image: at least 2 are needed to divide the images into splits")
    chosen, others = stratified(split.labels, max(count, int((sizes > 0).sum())), seed=seed, purpose=purpose)
    return split.subset(chosen), split.subset(others)


def mixed(split: Split, *, seed: int) -> Split:
    """The same images in a random order: batches in the order of folders would hold one class, which contrastive losses cannot judge."""
    return split.subset(torch.randperm(len(split), generator=generator(seed, ORDER)))


def fewer(split: Split, count: int, *, seed: int) -> Split:
    """`count` images chosen by stratified(), or all where there are no more."""
    if count >= len(split):
        return split
    return split.subset(stratified(split.labels, count, seed=seed, purpose=FEWER)[0])


def hide_labels(split: Split, fraction: float, *, seed: int) -> Split:
    """What a semi-labelled student sees: a fixed, stratified part of the images with their label, all others with -100.

    Args:
        split: fully labelled.
        fraction: part of the labels that stays visible, in (0, 1]; at least one a class stays.
        seed: same seed, same labels.

    Raises:
        DataError: `fraction` is out of range.
    """
    if not 0 < fraction <= 1:
        raise DataError(f"hide_labels: fraction must be above 0 and at most 1, got {fraction}")
    count = max(round(fraction * len(split)), len(split.labels.unique()))
    visible, _ = stratified(split.labels, count, seed=seed, purpose=LABELS)
    labels = torch.full_like(split.labels, HIDDEN)
    labels[visible] = split.labels[visible]
    return replace(split, labels=labels)
