"""Batches of a split through PyTorch's DataLoader and torchvision's transforms: the loader that works everywhere.

The augmentation of image i in epoch e draws from torch's default generator, seeded by (seed, e, i), so the number of workers changes
nothing. Work is divided so that bytes travel: workers decode and augment to uint8, and the batch is normalized on the loader's
device. On CUDA the next batch is copied and normalized on a stream of its own while the current one trains.
"""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from kdfast.data.loaders.ordered import AUGMENTATION, OrderedLoader, Request, refuse_different
from kdfast.data.protocol import Batch, DataError
from kdfast.data.seeding import mix
from kdfast.data.splits import Split
from kdfast.data.transforms import Transform


class TorchvisionLoader(OrderedLoader):
    """Workers, pinned memory and prefetch; takes what every loader takes (OrderedLoader), and:

    Args:
        split, transform, batch_size, options: as OrderedLoader.
        workers: processes that decode and augment; 0: this process.

    Raises:
        DataError: as OrderedLoader, or workers is negative; while iterating: an image cannot be read, images differ in size, a
            worker process died.
    """

    def __init__(self, split: Split, transform: Transform, batch_size: int, *, workers: int = 0, **options: Any) -> None:
        super().__init__(split, transform, batch_size, **options)
        if workers < 0:
            raise DataError(f"workers must be at least 0, got {workers}")
        if workers:
            _import_what_workers_need()
        self._plan, self._turn = _Plan(), object()
        self._loader = DataLoader(
            _Samples(split, transform, self._seed, self._views),
            batch_size=None,  # the plan's requests are batches already
            sampler=self._plan,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=self._device.type == "cuda",
            worker_init_fn=_leave_signals_to_the_main_process if workers else None,
            generator=torch.Generator(),  # DataLoader draws a number an epoch: not from the default generator
        )

    def _batches(self, requests: list[Request]) -> Iterator[Batch]:
        batches = self._host_batches(requests)
        return self._ahead(batches) if self._device.type == "cuda" else map(self._finish, batches)

    def _host_batches(self, requests: list[Request]) -> Iterator[Batch]:
        """uint8 batches in host memory; what a worker could not do is raised here, without the worker's traceback."""
        self._plan.requests = requests
        try:
            with _signals_held():
                batches = iter(self._loader)
            turn = self._turn = object()
            while (batch := next(batches, None)) is not None:
                if isinstance(batch, str):
                    raise DataError(batch)
                yield batch
                if turn is not self._turn and self._loader.num_workers:
                    raise DataError("a loader with workers was iterated anew before an earlier iteration was over: it cannot go on")
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            cause = "a process that reads images died, often for want of memory or shared memory; try fewer workers"
            raise DataError(f"{cause} ({str(error).splitlines()[0]})") from None

    def _finish(self, batch: Batch) -> Batch:
        """On the device, normalized."""
        images, labels, index = (part.to(self._device, non_blocking=True) for part in batch)
        return Batch(self._finished(images), labels, index)

    def _ahead(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """CUDA: while the caller works with one batch, the next is copied and normalized on another stream."""
        side = torch.cuda.Stream(self._device)
        waiting: tuple[Batch, torch.cuda.Event] | None = None
        for batch in batches:
            with torch.cuda.stream(side):
                following = self._finish(batch), side.record_event()
            if waiting is not None:
                yield self._handed_over(*waiting)
            waiting = following
        if waiting is not None:
            yield self._handed_over(*waiting)

    def _handed_over(self, batch: Batch, ready: torch.cuda.Event) -> Batch:
        stream = torch.cuda.current_stream(self._device)
        stream.wait_event(ready)
        for part in batch:
            part.record_stream(stream)  # its memory belongs to the other stream: not to be reused before this one is done
        return batch


class _Plan(Sampler[Request]):
    """The requests of an iteration, set before it starts."""

    def __init__(self) -> None:
        self.requests: list[Request] = []

    def __iter__(self) -> Iterator[Request]:
        return iter(self.requests)

    def __len__(self) -> int:
        return len(self.requests)


class _Samples(Dataset[Batch | str]):
    """Answers a request by its uint8 batch, or by the sentence that says why not: an exception would arrive as a traceback."""

    def __init__(self, split: Split, transform: Transform, seed: int, views: int) -> None:
        self._split, self._transform = split, transform
        self._seed, self._views = seed, views

    def __getitem__(self, request: Request) -> Batch | str:
        epoch, positions = request
        index = torch.tensor(positions)
        try:
            images = self._images(epoch, index)
        except DataError as error:
            return str(error)
        return Batch(images, self._split.labels[index], index)

    def _images(self, epoch: int, index: Tensor) -> Tensor:
        """uint8 [B * views, 3, h, w]."""
        if not self._transform.random:
            if self._split.pixels is not None:
                return self._transform.augment(self._split.pixels[index])
            return _stacked([self._transform.augment(self._split.read(i)) for i in index.tolist()])
        before = torch.default_generator.get_state()  # without workers this is the generator of the training itself
        try:
            return _stacked([view for i in index.tolist() for view in self._augmented(epoch, i)])
        finally:
            torch.default_generator.set_state(before)

    def _augmented(self, epoch: int, i: int) -> Iterator[Tensor]:
        image = self._split.read(i)
        torch.default_generator.manual_seed(mix(self._seed, AUGMENTATION, epoch, i))
        return (self._transform.augment(image) for _ in range(self._views))


def _stacked(images: list[Tensor]) -> Tensor:
    refuse_different(torch.tensor([image.shape[-2:] for image in images]))
    return torch.stack(images)


def _import_what_workers_need() -> None:
    """Once, before they are forked: each of them would take seconds to import these by itself."""
    import torchvision.io
    import torchvision.transforms.v2  # noqa: F401


@contextmanager
def _signals_held() -> Iterator[None]:
    """Ctrl-C and SIGTERM wait until the block has ended; workers that it starts inherit that until they have settled their own."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT, signal.SIGTERM])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _leave_signals_to_the_main_process(_: int) -> None:
    """In a worker: Ctrl-C, and a SIGTERM to the whole process group, are for the main process, which saves and stops the workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # on Linux
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        threading.Thread(target=_end_when_the_main_process_says_so, daemon=True).start()


def _end_when_the_main_process_says_so() -> None:
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != os.getppid():
        pass  # from anyone else: it has reached the main process as well
    os._exit(0)
