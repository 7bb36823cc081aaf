"""Batches of a split through PyTorch's DataLoader and torchvision's transforms: the loader that works everywhere.

Work is divided so that bytes travel: workers decode and augment to uint8, and the batch is normalized on the loader's device.
"""

from collections.abc import Iterator

import torch
from torch.utils.data import Dataset, Sampler

from kdfast.data.loaders.options import LoaderOptions
from kdfast.data.loaders.ordered import OrderedLoader, Request, draw, interleave
from kdfast.data.protocol import Batch, DataError
from kdfast.data.splits import Split
from kdfast.data.transforms import Transform
from kdfast.data.workers import iterate, make_loader


class TorchvisionLoader(OrderedLoader):
    """Worker processes that decode and augment, pinned memory and prefetch.

    Where processes import the main module again (Windows, macOS, and Linux from Python 3.14), a script has to iterate below
    `if __name__ == "__main__":`.

    Args:
        split, transform, options: as for every loader; options.workers 0: this process does the work.

    Raises:
        DataError: as OrderedLoader; while iterating: an image cannot be read, images differ in size, a worker process died.

    Example:
        >>> split = kdfast.data.Split(torch.tensor([0, 1, 0]), pixels=torch.zeros(3, 3, 8, 8, dtype=torch.uint8))
        >>> transform = kdfast.data.training_transform("cifar", 8, *kdfast.data.NORMALIZATIONS["half"])
        >>> loader = kdfast.data.TorchvisionLoader(split, transform, kdfast.data.LoaderOptions(batch_size=2, shuffle=True))
        >>> [batch.images.shape for batch in loader]
        [torch.Size([2, 3, 8, 8]), torch.Size([1, 3, 8, 8])]
    """

    def __init__(self, split: Split, transform: Transform, options: LoaderOptions) -> None:
        super().__init__(split, transform, options)
        workers = self._count_workers()
        self._plan = _Plan()
        self._loader = make_loader(
            _Samples(split, transform, options),
            workers,
            sampler=self._plan,  # its requests are batches already
            persistent_workers=workers > 0,
            pin_memory=self._device.type == "cuda",
        )

    def _batches(self, requests: list[Request]) -> Iterator[Batch]:
        for batch in self._make_host_batches(requests):
            images, labels, index = (part.to(self._device, non_blocking=True) for part in batch)
            yield Batch(self._finish(images), labels, index)

    def _make_host_batches(self, requests: list[Request]) -> Iterator[Batch]:
        """uint8 batches in host memory; an error of a worker is raised here, without the worker's traceback."""
        self._plan.requests = requests
        for batch in iterate(self._loader):
            if isinstance(batch, str):
                raise DataError(batch)
            yield batch
            if self._plan.requests is not requests and self._loader.num_workers:
                raise DataError("a loader with workers was iterated again before an earlier iteration was over: it cannot go on")


class _Plan(Sampler[Request]):
    """The requests of an iteration, set before it starts."""

    def __init__(self) -> None:
        self.requests: list[Request] = []

    def __iter__(self) -> Iterator[Request]:
        return iter(self.requests)


class _Samples(Dataset[Batch | str]):
    """Answers a request with its uint8 batch, or with the sentence of a DataError: an exception would arrive as a traceback."""

    def __init__(self, split: Split, transform: Transform, options: LoaderOptions) -> None:
        self._split, self._transform, self._options = split, transform, options

    def __getitem__(self, request: Request) -> Batch | str:
        epoch, positions = request
        index = torch.tensor(positions)
        try:
            images = [self._split.read(i) for i in positions]
            views = [self._transform.augment_all(images, draws) for draws in draw(self._options, epoch, index)]
        except DataError as error:
            return str(error)
        return Batch(interleave(views), self._split.labels[index], index)
