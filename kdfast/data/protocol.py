"""What every loader hands out, and what every loader can do; the engine knows nothing else of where images come from.

A loader walks one split, one epoch after another. Its position is two numbers, the epoch and the batches handed out so far,
and both the order of the images and their augmentation follow from them and the seed: that is what makes exact resuming possible.
"""

from collections.abc import Iterator
from typing import NamedTuple, Protocol, runtime_checkable

from torch import Tensor


class DataError(ValueError):
    """Images or labels that cannot be used: one sentence that names the file, folder or class."""


class Batch(NamedTuple):
    """B images of one split, on the loader's device."""

    images: Tensor  # [B, 3, H, W] float32, normalized
    labels: Tensor  # [B] int64; -100: the label is hidden
    index: Tensor  # type: ignore[assignment]  # [B] int64, the images' positions in the split


@runtime_checkable
class Loader(Protocol):
    """Batches of one split on this rank."""

    samples: int
    """Images an epoch, on this rank."""

    labels: Tensor
    """[n] int64 on the CPU, of all images of the split, on every rank; -100: the label is hidden."""

    deterministic: bool
    """Whether an image is the same in every epoch."""

    def __len__(self) -> int:
        """Batches an epoch, on this rank."""
        ...

    def __iter__(self) -> Iterator[Batch]:
        """The rest of the current epoch; the whole epoch once more where an iteration has ended it and set_epoch was not called."""
        ...

    def in_order(self) -> Iterator[Batch]:
        """All images of the split by their index, as the current epoch has them, on every rank; the position stays where it is."""
        ...

    def set_epoch(self, epoch: int) -> None:
        """Goes to the first batch of `epoch`."""
        ...

    def state_dict(self) -> dict[str, int]:
        """{"epoch", "batch"}: where we are, counting the batches handed out, not those prefetched."""
        ...

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Goes there: the next iteration starts with the very next batch, and is empty at an epoch's end."""
        ...
