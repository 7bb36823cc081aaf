"""What all loaders share: whose turn each image is, where we are, and the way from bytes to what a network takes.

The order of epoch e is the permutation seeded by (seed, e). So ranks need not talk to one another, all loaders walk a split alike,
and going on from batch b of epoch e gives exactly what would have come.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from kdfast.data.protocol import Batch, DataError
from kdfast.data.seeding import generator
from kdfast.data.splits import Split
from kdfast.data.transforms import Normalize, Transform

ORDER, AUGMENTATION = range(2)
"""What random numbers of one seed are for."""


class Request(NamedTuple):
    """A batch that is wanted: an epoch, and positions in the split."""

    epoch: int
    positions: list[int]


class OrderedLoader:
    """A `Loader` but for `_batches`; see kdfast.data.protocol for the methods' contract.

    Several ranks share a split as follows: each global batch, world_size * batch_size images in the epoch's order, is cut into one
    piece a rank, in rank order. Nothing is ever repeated to fill up: without drop_last the last pieces may be shorter or absent.

    Args:
        split: images and labels.
        transform: of kdfast.data.transforms.
        batch_size: images a batch on this rank.
        in_order_size: images a batch of in_order() at most.
        shuffle: a new order every epoch.
        seed: of order and augmentation.
        device: where batches are handed out.
        rank, world_size: this process among those that share the split.
        drop_last: leave out the epoch's last images where they do not fill every rank's batch. A split smaller than one global
            batch gives one smaller batch, of the same size on every rank.
        channels_last: memory format of the images.
        dtype: of the images: float32, bfloat16 or float16.
        views: augmentations of each image; above 1, images are [B, views, 3, H, W], for contrastive losses.

    Raises:
        DataError: the split is empty or too small to share, a size is not positive, or several views are asked of a transform that
            draws nothing.
    """

    def __init__(
        self,
        split: Split,
        transform: Transform,
        batch_size: int,
        *,
        in_order_size: int | None = None,
        shuffle: bool,
        seed: int,
        device: torch.device = torch.device("cpu"),
        rank: int = 0,
        world_size: int = 1,
        drop_last: bool = False,
        channels_last: bool = False,
        dtype: torch.dtype = torch.float32,
        views: int = 1,
    ) -> None:
        if len(split) == 0:
            raise DataError("a loader needs at least one image, got an empty split")
        if batch_size < 1 or views < 1:
            raise DataError(f"batch_size and views must be at least 1, got {batch_size} and {views}")
        if in_order_size is not None and in_order_size < 1:
            raise DataError(f"micro_batch must be at least 1, got {in_order_size}")
        if views > 1 and not transform.random:
            raise DataError(f"{views} views of an image need a transform that draws random numbers: they would all be the same")
        if dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise DataError(f"dtype must be torch.float32, torch.bfloat16 or torch.float16, got {dtype}")
        if not 0 <= rank < world_size:
            raise DataError(f"rank must be 0 to world_size - 1, got rank {rank} of {world_size}")
        if drop_last and len(split) < world_size:
            raise DataError(f"{len(split)} images cannot be shared by {world_size} ranks")
        self._split, self._transform = split, transform
        self._batch_size = batch_size
        self._in_order_size = min(batch_size, in_order_size or batch_size)
        self._shuffle, self._seed = shuffle, seed
        self._rank, self._world_size = rank, world_size
        self._drop_last = drop_last
        self._views = views
        self._device = torch.device(device)
        self._dtype = dtype
        self._format = torch.channels_last if channels_last else torch.contiguous_format
        self._normalize = Normalize(transform.mean, transform.std, dtype).to(self._device)
        self._epoch = 0
        self._batch = 0
        self._ended = False  # the epoch's last batch was handed out by an iteration, rather than restored by load_state_dict
        pieces = self._pieces(torch.arange(len(split)))
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
        """Goes on after the batches that `state` counts.

        Raises:
            DataError: the epoch has fewer batches, so the state is of another split, batch size or world size.
        """
        if not 0 <= state["batch"] <= len(self):
            raise DataError(f"the saved position is batch {state['batch']}, but an epoch has {len(self)} batches now")
        self._epoch, self._batch, self._ended = state["epoch"], state["batch"], False

    def __iter__(self) -> Iterator[Batch]:
        if self._ended:
            self.set_epoch(self._epoch)
        for batch in self._batches(self._requests()):
            self._batch += 1
            self._ended = self._batch == len(self)
            yield batch
        self._ended = True

    def in_order(self) -> Iterator[Batch]:
        """All images by their index, on every rank; the position stays where it is."""
        pieces = torch.arange(len(self._split)).split(self._in_order_size)
        yield from self._batches([Request(self._epoch, piece.tolist()) for piece in pieces])

    def _batches(self, requests: list[Request]) -> Iterator[Batch]:
        """One batch for each request, on the device."""
        raise NotImplementedError

    def _requests(self) -> list[Request]:
        """The rest of the epoch."""
        order = torch.arange(len(self._split))
        if self._shuffle:
            order = torch.randperm(len(order), generator=generator(self._seed, ORDER, self._epoch))
        return [Request(self._epoch, piece.tolist()) for piece in self._pieces(order)[self._batch :]]

    def _pieces(self, order: Tensor) -> list[Tensor]:
        """This rank's batches, as positions in the split."""
        whole = self._batch_size * self._world_size
        if self._drop_last:
            kept = len(order) // whole * whole or len(order) // self._world_size * self._world_size
            order = order[:kept]
        pieces = [chunk.tensor_split(self._world_size)[self._rank] for chunk in order.split(whole)]
        return [piece for piece in pieces if len(piece)]

    def _finished(self, images: Tensor) -> Tensor:
        """uint8 [B * views, 3, H, W] on the device -> normalized [B, 3, H, W], or [B, views, 3, H, W]."""
        return self._by_view(self._normalize(images.contiguous(memory_format=self._format)))

    def _by_view(self, images: Tensor) -> Tensor:
        """[B * views, ...] -> the same, or [B, views, ...]."""
        return images if self._views == 1 else images.unflatten(0, (-1, self._views))


def neighbours(views: list[Tensor]) -> Tensor:
    """[B, ...] of each view -> [B * views, ...], the views of an image beside one another."""
    return views[0] if len(views) == 1 else torch.stack(views, dim=1).flatten(0, 1)


def refuse_different(sizes: Tensor) -> None:
    """Images that no transform makes alike must be of one size.

    Args:
        sizes: int64 [n, 2], heights and widths.

    Raises:
        DataError: they are not.
    """
    different = sizes.unique(dim=0)
    if len(different) > 1:
        h, w = different[:2].unbind(1)
        raise DataError(f"images differ in size ({w[0]}x{h[0]} and {w[1]}x{h[1]}): choose a transform that resizes, such as squash")
