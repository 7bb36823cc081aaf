"""The parts that all loaders share: the order of images, the position in an epoch, and the last steps from bytes to a network's input.

The order of epoch e is the permutation seeded by (seed, e). So ranks need no communication, all loaders walk a split alike, and resuming at
batch b of epoch e gives exactly the batches that would have followed.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from kdfast.data.loaders.options import LoaderOptions
from kdfast.data.protocol import Batch, DataError
from kdfast.data.seeding import Draws, make_generator
from kdfast.data.splits import Split
from kdfast.data.transforms import Normalize, Transform
from kdfast.machine import cores

ORDER, AUGMENTATION = range(2)
"""Purposes of the random numbers of one seed."""


class Request(NamedTuple):
    """A batch to make: an epoch, and positions in the split."""

    epoch: int
    positions: list[int]


class OrderedLoader:
    """A `Loader` without `_batches`; see kdfast.data.protocol for the methods' contract.

    Several ranks share a split as follows: each global batch, world_size * batch_size images in the epoch's order, is cut into one piece a
    rank, in rank order. No image is repeated to fill up: without drop_last the last pieces may be shorter or absent.

    Args:
        split: images and labels.
        transform: of kdfast.data.transforms.
        options: batch size, order, ranks, device and the like.

    Raises:
        DataError: the split is empty or too small to share, or several views are asked of a transform that draws nothing.
    """

    def __init__(self, split: Split, transform: Transform, options: LoaderOptions) -> None:
        if len(split) == 0:
            raise DataError("a loader needs at least one image, got an empty split")
        if options.views > 1 and not transform.random:
            raise DataError(f"{options.views} views of an image need a transform that draws random numbers: they would all be the same")
        if options.drop_last and len(split) < options.world_size:
            raise DataError(f"{len(split)} images cannot be shared by {options.world_size} ranks")
        self._split, self._transform, self._options = split, transform, options
        self._device = torch.device(options.device)
        self._format = torch.channels_last if options.channels_last else torch.contiguous_format
        self._normalize = Normalize(transform.mean, transform.std, options.dtype).to(self._device)
        self._epoch = 0
        self._batch = 0
        self._ended = False  # an iteration handed out the epoch's last batch; load_state_dict leaves it False
        pieces = self._cut(torch.arange(len(split)))
        self._length = len(pieces)
        self.samples = sum(len(piece) for piece in pieces)
        self.labels = split.labels
        self.deterministic = not transform.random

    def __len__(self) -> int:
        return self._length

    def set_epoch(self, epoch: int) -> None:
        """Goes to the first batch of `epoch`."""
        self._epoch, self._batch, self._ended = epoch, 0, False

    def state_dict(self) -> dict[str, int]:
        """{"epoch", "batch"}: batches handed out so far."""
        return {"epoch": self._epoch, "batch": self._batch}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continues after the batches that `state` counts.

        Raises:
            DataError: the epoch has fewer batches, so the state is of another split, batch size or world size.
        """
        if not 0 <= state["batch"] <= len(self):
            raise DataError(f"the saved position is batch {state['batch']}, but an epoch has {len(self)} batches now")
        self._epoch, self._batch, self._ended = state["epoch"], state["batch"], False

    def __iter__(self) -> Iterator[Batch]:
        if self._ended:
            self.set_epoch(self._epoch)
        order = torch.arange(len(self._split))
        if self._options.shuffle:
            order = torch.randperm(len(order), generator=make_generator(self._options.seed, ORDER, self._epoch))
        for batch in self._batches([Request(self._epoch, piece.tolist()) for piece in self._cut(order)[self._batch :]]):
            self._batch += 1
            self._ended = self._batch == len(self)
            yield batch
        self._ended = True

    def in_order(self) -> Iterator[Batch]:
        """All images by their index, on every rank; the position does not change."""
        pieces = torch.arange(len(self._split)).split(min(self._options.batch_size, self._options.micro_batch or self._options.batch_size))
        yield from self._batches([Request(self._epoch, piece.tolist()) for piece in pieces])

    def _batches(self, requests: list[Request]) -> Iterator[Batch]:
        """One batch for each request, on the device."""
        raise NotImplementedError

    def _cut(self, order: Tensor) -> list[Tensor]:
        """This rank's batches of an epoch, as positions in the split."""
        world_size = self._options.world_size
        whole = self._options.batch_size * world_size
        if self._options.drop_last:
            order = order[: len(order) // whole * whole or len(order) // world_size * world_size]
        pieces = [chunk.tensor_split(world_size)[self._options.rank] for chunk in order.split(whole)]
        return [piece for piece in pieces if len(piece)]

    def _count_workers(self) -> int:
        """The processes or threads that the options ask for."""
        if self._options.workers is not None:
            return self._options.workers
        return 0 if self._split.pixels is not None else min(8, max(1, cores() // self._options.world_size))

    def _finish(self, images: Tensor) -> Tensor:
        """uint8 [B * views, 3, H, W] on the device -> normalized [B, 3, H, W], or [B, views, 3, H, W]."""
        return self._separate_views(self._normalize(images.contiguous(memory_format=self._format)))

    def _separate_views(self, images: Tensor) -> Tensor:
        """[B * views, ...] -> [B, views, ...]; with one view the same."""
        return images if self._options.views == 1 else images.unflatten(0, (-1, self._options.views))


def draw(options: LoaderOptions, epoch: int, index: Tensor) -> list[Draws]:
    """The random numbers of these images (int64 [B], CPU) in an epoch, for each view."""
    return [Draws(options.seed, AUGMENTATION, epoch, view, index=index) for view in range(options.views)]


def interleave(views: list[Tensor]) -> Tensor:
    """[B, ...] of each view -> [B * views, ...], the views of an image in a row."""
    return views[0] if len(views) == 1 else torch.stack(views, dim=1).flatten(0, 1)
