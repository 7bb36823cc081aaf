"""Images with labels, and their division: stratified, seeded, the same on every machine.

Stratified choice. Image j = 0, 1, ... of a class of n images, in that class' seeded random order, has the key (j + 1/2) / n; the first
image of every class has the key 0. The images with the least keys are chosen. This is Sainte-Laguë's apportionment: exactly the requested
number of images, at least one a class, and every class within one image or so of its share.
"""

import hashlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from kdfast.data.images import decode, import_decoders, read_size
from kdfast.data.protocol import DataError
from kdfast.data.seeding import make_generator
from kdfast.ops import checks

HIDDEN = -100
"""The label of an image whose class the student must not see; PyTorch's losses ignore it by default."""

VALIDATION, TEST, FEWER, LABELS, ORDER = range(5)
"""Purposes of random choices: choices with one seed but different purposes are independent."""


@dataclass(frozen=True, eq=False)
class Split:
    """n labelled images, in memory or in files.

    Attributes:
        labels: int64 [n]; -100 where hidden.
        pixels: uint8 [n, 3, H, W], if the images are in memory.
        paths: n file names, if they are not.
        sizes: int32 [n, 2], height and width of each file; known after kdfast.data.usable().
        plain: bool [n], whether every JPEG decoder sees the file's image alike; known after kdfast.data.usable().
        digests: a checksum of each file's bytes; known after kdfast.data.usable().
        stores: decoded images that ResidentLoader keeps, by device and framing; splits that differ in their labels only share them.

    Raises:
        DataError: the numbers of images and labels differ.

    Example:
        >>> split = kdfast.data.Split(torch.tensor([0, 1, 0]), pixels=torch.zeros(3, 3, 8, 8, dtype=torch.uint8))
        >>> len(split), split.read(1).shape
        (3, torch.Size([3, 8, 8]))
        >>> split.subset(torch.tensor([2, 1])).labels
        tensor([0, 1])
    """

    labels: Tensor
    pixels: Tensor | None = None
    paths: tuple[str, ...] | None = None
    sizes: Tensor | None = None
    plain: Tensor | None = None
    digests: tuple[str, ...] | None = None
    stores: dict[Any, Any] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        checks.is_a("labels of a split", self.labels, Tensor)
        images = self.paths if self.pixels is None else self.pixels
        if images is None or len(images) != len(self.labels):
            count = "no" if images is None else len(images)
            raise DataError(f"a split needs one image for each label, got {count} images and {len(self.labels)} labels")
        if self.pixels is not None and (self.pixels.dtype != torch.uint8 or self.pixels.shape[1:2] != (3,) or self.pixels.dim() != 4):
            raise DataError(f"pixels of a split must be uint8 [n, 3, H, W], got {self.pixels.dtype} {tuple(self.pixels.shape)}")

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

    def measure(self) -> Tensor:
        """Heights and widths, pixels: int64 [n, 2]; files that were not checked are opened to read their headers.

        Raises:
            DataError: a file's header cannot be read.
        """
        if self.pixels is not None:
            return torch.tensor(self.pixels.shape[-2:]).expand(len(self), 2)
        if self.sizes is not None:
            return self.sizes.long()
        assert self.paths is not None  # one of the two is there
        import_decoders()
        with ThreadPoolExecutor() as threads:
            return torch.tensor(list(threads.map(read_size, self.paths)))

    def subset(self, indices: Tensor) -> "Split":
        """The images at these positions (int64 [m]), in this order."""
        return Split(
            self.labels[indices],
            pixels=None if self.pixels is None else self.pixels[indices],
            paths=None if self.paths is None else tuple(self.paths[i] for i in indices.tolist()),
            sizes=None if self.sizes is None else self.sizes[indices],
            plain=None if self.plain is None else self.plain[indices],
            digests=None if self.digests is None else tuple(self.digests[i] for i in indices.tolist()),
        )


@dataclass(frozen=True, eq=False)
class ImageData:
    """A data set ready for training and evaluation.

    Attributes:
        name: in the registry of data sets; "folder" for a path.
        classes: names, unique; labels are positions in them.
        train, val, test: the three splits; `test` is used for final numbers only.
        mean, std: of the pixels scaled to 0..1, three channels each.
        image_size: side of the square images that the default transforms make, pixels.
        val_is_test: the validation split is the test split, so the best epoch is chosen on it.
        train_transform, eval_transform: names in kdfast.data.transforms that suit these images.
        notes: sentences about the source: how an unusual folder was read, and which files were left out.

    Raises:
        DataError: fewer than two classes, a label out of range, a class without training images, or a split without images.

    Example:
        >>> split = kdfast.data.Split(torch.tensor([0, 1]), pixels=torch.zeros(2, 3, 8, 8, dtype=torch.uint8))
        >>> half = (0.5,) * 3
        >>> data = kdfast.data.ImageData("mine", ("cat", "dog"), split, split, split, half, half, 8, True, "none", "none")
        >>> data.classes[data.test.labels[1]]
        'dog'
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
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        C = len(self.classes)
        if C < 2:
            raise DataError(f"{self.name}: at least 2 classes are needed, found {C}: {', '.join(self.classes) or 'none'}")
        for part in ("train", "val", "test"):
            labels = getattr(self, part).labels
            wrong = labels[((labels < 0) | (labels >= C)) & (labels != HIDDEN)]
            if len(wrong):
                raise DataError(f"{self.name}: labels of {part} must be 0 to {C - 1} for {C} classes, got {wrong[0].item()}")
            missing = list_missing(labels, self.classes) if part == "train" else "" if len(labels) else "any class"
            if missing:
                raise DataError(f"{self.name}: no image of {missing} in {part}")

    def fingerprint(self) -> str:
        """Describes the images in a line that changes with any of them, with their order and their labels, but not with their folder."""
        splits = (self.train, self.val, self.test)
        digest = hashlib.sha256(repr(self.classes).encode())
        for split in dict.fromkeys(splits):
            images = repr(split.digests or split.paths).encode() if split.pixels is None else split.pixels.contiguous().numpy()
            for part in (images, split.labels.numpy()):
                digest.update(part)
        return f"{' + '.join(f'{len(split):,}' for split in splits)} images ({digest.hexdigest()[:16]})"


def list_missing(labels: Tensor, classes: tuple[str, ...]) -> str:
    """The classes without a label, as "class 'a'" or "classes 'a', 'b'"; empty if there are none."""
    return _list_classes(torch.bincount(labels[labels >= 0], minlength=len(classes)) == 0, classes)


def _list_classes(chosen: Tensor, classes: tuple[str, ...], shown: int = 5) -> str:
    """For example "classes 'a', 'b' and 7 more"; empty if none is chosen (bool [C])."""
    names = [classes[c] for c in chosen.nonzero().flatten().tolist()]
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return f"{'class' if len(names) == 1 else 'classes'} {', '.join(map(repr, names[:shown]))}{more}" if names else ""


def choose_stratified(labels: Tensor, count: int, *, seed: int, purpose: int) -> tuple[Tensor, Tensor]:
    """Chooses `count` images: of every class in proportion, and at least one.

    Args:
        labels: int64 [n].
        count: from the number of classes present to n.
        seed: same seed, same choice.
        purpose: VALIDATION, TEST, FEWER or LABELS.

    Returns:
        Positions of the chosen images and of the others, both int64 and ascending.

    Raises:
        DataError: `count` is out of range.
    """
    present = labels.unique().tolist()
    if not len(present) <= count <= len(labels):
        raise DataError(f"cannot choose {count} of {len(labels)} images with at least one of each of {len(present)} classes")
    random = make_generator(seed, purpose)
    positions, keys = [], []
    for label in present:
        members = (labels == label).nonzero().flatten()
        positions.append(members[torch.randperm(len(members), generator=random)])
        key = (torch.arange(len(members), dtype=torch.float64) + 0.5) / len(members)
        key[0] = 0
        keys.append(key)
    order = torch.cat(positions)[torch.cat(keys).argsort(stable=True)]
    return order[:count].sort().values, order[count:].sort().values


def divide(split: Split, count: int, *, seed: int, purpose: int, classes: tuple[str, ...]) -> tuple[Split, Split]:
    """Divides a split into `count` images of choose_stratified() and the others; every class has an image in both.

    Raises:
        DataError: a class has one image only, or `count` is too small or too large.
    """
    sizes = torch.bincount(split.labels, minlength=len(classes))
    single = _list_classes(sizes == 1, classes)
    if single:
        raise DataError(f"{single} with 1 image: at least 2 are needed to divide the images into splits")
    chosen, others = choose_stratified(split.labels, max(count, int((sizes > 0).sum())), seed=seed, purpose=purpose)
    return split.subset(chosen), split.subset(others)


def shuffle(split: Split, *, seed: int) -> Split:
    """The same images in a random order: batches in the order of folders would hold one class, which contrastive losses cannot judge."""
    return split.subset(torch.randperm(len(split), generator=make_generator(seed, ORDER)))


def hide_labels(split: Split, fraction: float, *, seed: int) -> Split:
    """The split of a semi-labelled student: a fixed, stratified part of the images keeps its label, all others get -100.

    Args:
        split: fully labelled.
        fraction: part of the labels that stays visible, in (0, 1]; at least one a class stays.
        seed: same seed, same labels.

    Raises:
        DataError: `fraction` is out of range.

    Example:
        >>> split = kdfast.data.Split(torch.tensor([0, 1, 0, 1]), pixels=torch.zeros(4, 3, 8, 8, dtype=torch.uint8))
        >>> kdfast.data.hide_labels(split, 0.5, seed=0).labels
        tensor([   0,    1, -100, -100])
    """
    checks.is_a("hide_labels: split", split, Split)
    checks.are_counts(None, seed=seed)
    if not 0 < checks.number("hide_labels: fraction", fraction) <= 1:
        raise DataError(f"hide_labels: fraction must be above 0 and at most 1, got {fraction}")
    count = max(round(fraction * len(split)), len(split.labels.unique()))
    visible, _ = choose_stratified(split.labels, count, seed=seed, purpose=LABELS)
    labels = torch.full_like(split.labels, HIDDEN)
    labels[visible] = split.labels[visible]
    return replace(split, labels=labels)
