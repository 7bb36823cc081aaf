"""The options of a loader: one frozen class that checks itself."""

from dataclasses import dataclass
from numbers import Integral

import torch

from kdfast.data.protocol import DataError


@dataclass(frozen=True)
class LoaderOptions:
    """How a loader makes batches of one split.

    Attributes:
        batch_size: images a batch on this rank.
        micro_batch: images a batch of in_order() at most, for a network that takes no more at once.
        shuffle: a new order every epoch.
        drop_last: leave out the epoch's last images, other ones in every epoch, if they do not fill every rank's batch. A split smaller
            than one global batch gives one smaller batch, of the same size on every rank.
        seed: of order and augmentation.
        workers: processes (torchvision; 0: this one) or threads (dali; at least 1); None: none for images in memory, one a core and up to
            8 for files. Processes may need a script's `if __name__ == "__main__":`, see kdfast.data.make_loaders.
        device: where batches are handed out.
        rank, world_size: this process among those that share the split.
        channels_last: memory format of the images.
        dtype: of the images: float32, bfloat16 or float16.
        views: augmentations of each image; above 1, images are [B, views, 3, H, W], for contrastive losses.

    Raises:
        DataError: an option is out of range.

    Example:
        >>> kdfast.data.LoaderOptions(batch_size=64, shuffle=True).world_size
        1
        >>> kdfast.data.LoaderOptions(batch_size=0)
        Traceback (most recent call last):
        kdfast.data.protocol.DataError: batch_size and views must be at least 1, got 0 and 1
    """

    batch_size: int
    micro_batch: int | None = None
    shuffle: bool = False
    drop_last: bool = False
    seed: int = 0
    workers: int | None = None
    device: torch.device = torch.device("cpu")
    rank: int = 0
    world_size: int = 1
    channels_last: bool = False
    dtype: torch.dtype = torch.float32
    views: int = 1

    def __post_init__(self) -> None:
        for name in ("batch_size", "micro_batch", "seed", "workers", "rank", "world_size", "views"):
            value = getattr(self, name)
            if not (value is None and name in ("micro_batch", "workers")) and not isinstance(value, Integral):
                raise DataError(f"{name} must be an integer, got {value!r}")
        if not isinstance(self.device, torch.device):
            raise DataError(f"device must be a torch.device, got {self.device!r}")
        if self.batch_size < 1 or self.views < 1:
            raise DataError(f"batch_size and views must be at least 1, got {self.batch_size} and {self.views}")
        if self.micro_batch is not None and self.micro_batch < 1:
            raise DataError(f"micro_batch must be at least 1, got {self.micro_batch}")
        if self.workers is not None and self.workers < 0:
            raise DataError(f"workers must be at least 0, got {self.workers}")
        if self.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise DataError(f"dtype must be torch.float32, torch.bfloat16 or torch.float16, got {self.dtype}")
        if not 0 <= self.rank < self.world_size:
            raise DataError(f"rank must be 0 to world_size - 1, got rank {self.rank} of {self.world_size}")
