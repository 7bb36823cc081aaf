"""The interface of every loader; the engine knows nothing else of the source of images.

A loader walks one split, one epoch after another. Its position is two numbers: the epoch and the batches handed out so far. The order of
the images and their augmentation follow from the position and the seed, so resuming is exact.
"""

from collections.abc import Iterator
from typing import NamedTuple, Protocol, runtime_checkable

from torch import Tensor


class DataError(ValueError):
    """Images or labels that cannot be used: one sentence that names the file, folder or class.

    Example:
        >>> kdfast.data.load("no-such-data-set")
        Traceback (most recent call last):
        kdfast.data.protocol.DataError: no data set or folder is called 'no-such-data-set'; known names: digits, ...
    """


class Batch(NamedTuple):
    """B images of one split, on the loader's device.

    Attributes:
        images: [B, 3, H, W], normalized; [B, views, 3, H, W] with several views.
        labels: int64 [B]; -100: the label is hidden.
        index: int64 [B], the images' positions in the split.

    Example:
        >>> batch = kdfast.data.Batch(torch.zeros(2, 3, 8, 8), torch.tensor([1, 0]), torch.tensor([7, 4]))
        >>> images, labels, index = batch
        >>> len(batch.labels)
        2
    """

    images: Tensor
    labels: Tensor
    index: Tensor  # type: ignore[assignment]  # it hides tuple.index


@runtime_checkable
class Loader(Protocol):
    """Batches of one split on this rank.

    Example:
        >>> split = kdfast.data.Split(torch.tensor([0, 1, 0]), pixels=torch.zeros(3, 3, 8, 8, dtype=torch.uint8))
        >>> transform = kdfast.data.evaluation_transform("none", 8, *kdfast.data.NORMALIZATIONS["half"])
        >>> loader = kdfast.data.ResidentLoader(split, transform, kdfast.data.LoaderOptions(batch_size=2))
        >>> isinstance(loader, kdfast.data.Loader)
        True
        >>> [batch.labels.tolist() for batch in loader], loader.state_dict()
        ([[0, 1], [0]], {'epoch': 0, 'batch': 2})
    """

    samples: int
    """Images an epoch, on this rank."""

    labels: Tensor
    """int64 [n] on the CPU, of all images of the split, on every rank; -100: the label is hidden."""

    deterministic: bool
    """True if an image is the same in every epoch."""

    def __len__(self) -> int:
        """Batches an epoch, on this rank."""
        ...

    def __iter__(self) -> Iterator[Batch]:
        """The rest of the current epoch. If an iteration has ended the epoch and set_epoch was not called: the whole epoch again."""
        ...

    def in_order(self) -> Iterator[Batch]:
        """All images of the split by their index, augmented as in the current epoch, on every rank; the position does not change."""
        ...

    def set_epoch(self, epoch: int) -> None:
        """Goes to the first batch of `epoch`."""
        ...

    def state_dict(self) -> dict[str, int]:
        """{"epoch", "batch"}: the position. It counts the batches handed out, not the prefetched ones."""
        ...

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Goes to a position: the next iteration starts with the very next batch, and is empty at an epoch's end."""
        ...
