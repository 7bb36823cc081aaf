"""A data set that stays on the device as uint8: no files, no workers; a batch is one indexing and a few batched operations.

A framing that is the same for an image in all epochs (resizing, for example) is done once, by torchvision, when the images are put there.
"""

import functools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import torch
from torch import Tensor

from kdfast.data.framing import Squash, resample
from kdfast.data.images import import_decoders
from kdfast.data.loaders.options import LoaderOptions
from kdfast.data.loaders.ordered import OrderedLoader, Request, draw, interleave
from kdfast.data.protocol import Batch, DataError
from kdfast.data.splits import Split
from kdfast.data.transforms import Transform, check_same_size
from kdfast.machine import cores

HEADROOM = 0.8
"""Part of the free memory that images may take: a network and its activations come after them."""


LARGEST_BATCH = 2**26
"""Pixels of a batch whose images are padded to one size. Where a few long images would make it larger, images are resized one by one."""


class ResidentLoader(OrderedLoader):
    """Images in device memory.

    Args:
        split, transform, options: as for every loader; options.workers has no effect.

    Raises:
        DataError: as OrderedLoader; the images do not fit into the device's free memory; a file cannot be read; images differ in size and
            the transform does not resize them.

    Example:
        >>> split = kdfast.data.Split(torch.tensor([0, 1, 0]), pixels=torch.zeros(3, 3, 8, 8, dtype=torch.uint8))
        >>> transform = kdfast.data.training_transform("cifar", 8, *kdfast.data.NORMALIZATIONS["half"])
        >>> loader = kdfast.data.ResidentLoader(split, transform, kdfast.data.LoaderOptions(batch_size=2, views=2))
        >>> next(iter(loader)).images.shape
        torch.Size([2, 2, 3, 8, 8])
    """

    def __init__(self, split: Split, transform: Transform, options: LoaderOptions) -> None:
        super().__init__(split, transform, options)
        self._labels = split.labels.to(self._device)
        self._constant = _take_constant_part(split, transform)
        if split.pixels is None or self._constant.framing is not None or split.pixels.device != self._device:  # else they are there
            _check_memory(split, transform, self._device)
        if transform.framing is None:
            check_same_size(split.measure())

    @functools.cached_property
    def _images(self) -> "_Store":
        """Decoded when the first batch is asked for: not every loader that is made is used."""
        return _find_store(self._split, self._constant, self._device)

    def _batches(self, requests: list[Request]) -> Iterator[Batch]:
        for epoch, positions in requests:
            index = torch.tensor(positions)
            there = index.to(self._device, non_blocking=True)
            yield Batch(self._finish(self._augment(epoch, index, there)), self._labels[there], there)

    def _augment(self, epoch: int, index: Tensor, there: Tensor) -> Tensor:
        """uint8 [B * views, 3, h, w]."""
        if self.deterministic:
            return self._images.take(index, there)
        framing = self._transform.framing
        drawn = draw(self._options, epoch, index)
        if framing is None or not framing.random:
            images = self._images.take(index, there)
            return interleave([self._transform.change(images, draws) for draws in drawn])
        sizes = self._images.sizes[index]
        padded = len(index) * int(sizes.amax(0).prod())
        alone = padded > LARGEST_BATCH and padded > 4 * int(sizes.prod(1).sum())
        frames = [framing.frames(sizes, draws) for draws in drawn]
        framed = []
        for part in torch.arange(len(index)).split(1 if alone else len(index)):
            images = self._images.take(index[part], there[part.to(there.device)] if alone else there)
            framed.append([resample(images, frame.at(part)) for frame in frames])
        return interleave([self._transform.change(torch.cat(view), draws) for view, draws in zip(zip(*framed), drawn)])


def _take_constant_part(split: Split, transform: Transform) -> Transform:
    """The framing that is the same in all epochs, if there is one and it changes anything."""
    framing = transform.framing
    idle = isinstance(framing, Squash) and split.pixels is not None and split.pixels.shape[-2:] == (framing.size, framing.size)
    return replace(transform, framing=None if framing is None or framing.random or idle else framing, steps=())


# ---- images on the device ----------------------------------------------------------------------------------------------


class _Store:
    """n uint8 images on a device, as one tensor if they have one size.

    Attributes:
        sizes: int64 [n, 2], height and width, on the CPU.
        origin: their pixels or paths, referenced so that no other object gets their id.
    """

    def __init__(self, images: Tensor | list[Tensor], origin: object) -> None:
        self._images, self.origin = images, origin
        self.sizes = torch.tensor([image.shape[-2:] for image in images])

    def take(self, index: Tensor, there: Tensor) -> Tensor:
        """uint8 [B, 3, H, W]; images smaller than the largest of the batch stand in the upper left corner, with zeros beside them.

        Args:
            index: int64 [B], CPU.
            there: the same on the device.
        """
        if isinstance(self._images, Tensor):
            return self._images[there]
        H, W = self.sizes[index].amax(0).tolist()
        batch = torch.zeros(len(index), 3, H, W, dtype=torch.uint8, device=there.device)
        for place, i in zip(batch, index.tolist()):
            image = self._images[i]
            place[:, : image.shape[1], : image.shape[2]] = image
        return batch


def _find_store(split: Split, constant: Transform, device: torch.device) -> _Store:
    """The split's images on the device after the constant framing. The stages of a run have their own loaders, which share them."""
    images = split.paths if split.pixels is None else split.pixels
    framing = constant.framing
    key = id(images), type(framing), framing and framing.size, device
    if key not in split.stores:
        split.stores[key] = _Store(_load_images(split, constant, device), images)
    return split.stores[key]


def _load_images(split: Split, constant: Transform, device: torch.device) -> Tensor | list[Tensor]:
    """Decodes and frames the images: one tensor if they have one size."""
    framing = constant.framing
    if split.pixels is not None:
        whole = split.pixels if framing is None else torch.cat([constant.augment(part) for part in split.pixels.split(1024)])
        return whole.to(device)
    sizes = split.measure() if framing is None else torch.tensor([[framing.size, framing.size]])
    (height, width), *others = sizes.unique(dim=0).tolist()
    import_decoders()
    with ThreadPoolExecutor(cores()) as threads:  # decoding and resizing release Python's lock
        images = threads.map(lambda i: constant.augment(split.read(i)), range(len(split)))
        if others:
            return [image.to(device) for image in images]
        dense = torch.empty(len(split), 3, height, width, dtype=torch.uint8, device=device)  # filled; stacking would take twice as much
        for place, image in zip(dense, images):
            place.copy_(image)
        return dense


def _check_memory(split: Split, transform: Transform, device: torch.device) -> None:
    needed, free = resident_bytes(split, transform), free_bytes(device)
    if free is not None and needed > HEADROOM * free:
        raise DataError(
            f"{len(split)} images take {needed / 2**30:.2f} GiB, and {device} has {free / 2**30:.2f} GiB free, of which "
            f"{HEADROOM:.0%} may be used: choose --loader torchvision or dali"
        )


def resident_bytes(split: Split, transform: Transform) -> int:
    """Bytes that the images of a split take on a device."""
    framing = _take_constant_part(split, transform).framing
    if framing is not None:
        return 3 * framing.size**2 * len(split)
    return split.pixels.numel() if split.pixels is not None else 3 * int(split.measure().prod(dim=1).sum())


def free_bytes(device: torch.device) -> int | None:
    """Free memory of a device; None if the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo") as lines:  # Linux
            return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return None
