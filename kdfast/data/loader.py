"""Batches of a split through PyTorch's DataLoader and torchvision's transforms: the loader that works everywhere.

Order and augmentation are pure functions. The order of epoch e is the permutation seeded by (seed, e); the augmentation of image i
in epoch e draws from torch's default generator, seeded by (seed, e, i). So the number of workers changes nothing, ranks need not
talk to one another, and going on from batch b of epoch e gives exactly what would have come.

Work is divided so that bytes travel: workers decode and augment to uint8, and the batch is normalized on the loader's device. On
CUDA the next batch is copied and normalized on a stream of its own while the current one trains.
"""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from kdfast.data.protocol import Batch, DataError
from kdfast.data.seeding import generator, mix
from kdfast.data.splits import ImageData, Split, hide_labels
from kdfast.data.transforms import NORMALIZATIONS, Normalize, Transform, evaluation_transform, training_transform

_Request = tuple[int, list[int]]
"""An epoch, and positions in the split: what a worker is asked for."""

_ORDER, _AUGMENTATION = range(2)


class TorchvisionLoader:
    """A `Loader` over one split; see kdfast.data.protocol for the methods' contract.

    Several ranks share a split as follows: each global batch, world_size * batch_size images in the epoch's order, is cut into one
    piece a rank, in rank order. Nothing is ever repeated to fill up: without drop_last the last pieces may be shorter or absent.

    Args:
        split: images and labels.
        transform: of kdfast.data.transforms.
        batch_size: images a batch on this rank.
        shuffle: a new order every epoch.
        seed: of order and augmentation.
        workers: processes that decode and augment; 0: this process.
        device: where batches are handed out.
        rank, world_size: this process among those that share the split.
        drop_last: leave out the epoch's last images where they do not fill every rank's batch. A split smaller than one global
            batch gives one smaller batch, of the same size on every rank.
        channels_last: memory format of the images.

    Raises:
        DataError: the split is empty or too small to share, or a size is not positive; while iterating: an image cannot be read,
            images differ in size, a worker process died.
    """

    def __init__(
        self,
        split: Split,
        transform: Transform,
        batch_size: int,
        *,
        shuffle: bool,
        seed: int,
        workers: int = 0,
        device: torch.device = torch.device("cpu"),
        rank: int = 0,
        world_size: int = 1,
        drop_last: bool = False,
        channels_last: bool = False,
    ) -> None:
        if len(split) == 0:
            raise DataError("a loader needs at least one image, got an empty split")
        if batch_size < 1 or workers < 0:
            raise DataError(f"batch_size must be at least 1 and workers at least 0, got {batch_size} and {workers}")
        if not 0 <= rank < world_size:
            raise DataError(f"rank must be 0 to world_size - 1, got rank {rank} of {world_size}")
        if drop_last and len(split) < world_size:
            raise DataError(f"{len(split)} images cannot be shared by {world_size} ranks")
        if workers:
            _import_what_workers_need()
        self._size = len(split)
        self._batch_size = batch_size
        self._shuffle = shuffle
        self._seed = seed
        self._rank, self._world_size = rank, world_size
        self._drop_last = drop_last
        self._device = torch.device(device)
        self._format = torch.channels_last if channels_last else torch.contiguous_format
        self._normalize = Normalize(transform.mean, transform.std).to(self._device)
        self._epoch = 0
        self._batch = 0
        self._ended = False  # the epoch's last batch was handed out by an iteration, rather than restored by load_state_dict
        self._plan = _Plan()
        self._batches = DataLoader(
            _Samples(split, transform, seed),
            batch_size=None,  # the plan's requests are batches already
            sampler=self._plan,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=self._device.type == "cuda",
            worker_init_fn=_leave_signals_to_the_main_process if workers else None,
            generator=torch.Generator(),  # DataLoader draws a number an epoch: not from the default generator
        )
        pieces = self._pieces(torch.arange(self._size))
        self._length = len(pieces)
        self.samples = sum(len(piece) for piece in pieces)

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
        self._plan.requests = self._requests()
        batches = self._host_batches()
        for batch in self._ahead(batches) if self._device.type == "cuda" else map(self._finish, batches):
            self._batch += 1
            self._ended = self._batch == len(self)
            yield batch
        self._ended = True

    def _requests(self) -> list[_Request]:
        """The rest of the epoch."""
        order = torch.arange(self._size)
        if self._shuffle:
            order = torch.randperm(self._size, generator=generator(self._seed, _ORDER, self._epoch))
        return [(self._epoch, piece.tolist()) for piece in self._pieces(order)[self._batch :]]

    def _pieces(self, order: Tensor) -> list[Tensor]:
        """This rank's batches, as positions in the split."""
        whole = self._batch_size * self._world_size
        if self._drop_last:
            kept = len(order) // whole * whole or len(order) // self._world_size * self._world_size
            order = order[:kept]
        pieces = [chunk.tensor_split(self._world_size)[self._rank] for chunk in order.split(whole)]
        return [piece for piece in pieces if len(piece)]

    def _host_batches(self) -> Iterator[Batch]:
        """uint8 batches in host memory; what a worker could not do is raised here, without the worker's traceback."""
        try:
            with _signals_held():
                batches = iter(self._batches)
            for batch in batches:
                if isinstance(batch, str):
                    raise DataError(batch)
                yield batch
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            cause = "a process that reads images died, often for want of memory or shared memory; try fewer workers"
            raise DataError(f"{cause} ({str(error).splitlines()[0]})") from None

    def _finish(self, batch: Batch) -> Batch:
        """On the device, normalized."""
        images, labels, index = (part.to(self._device, non_blocking=True) for part in batch)
        return Batch(self._normalize(images.contiguous(memory_format=self._format)), labels, index)

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


class _Plan(Sampler[_Request]):
    """The requests of an iteration, set before it starts."""

    def __init__(self) -> None:
        self.requests: list[_Request] = []

    def __iter__(self) -> Iterator[_Request]:
        return iter(self.requests)

    def __len__(self) -> int:
        return len(self.requests)


class _Samples(Dataset[Batch | str]):
    """Answers a request by its uint8 batch, or by the sentence that says why not: an exception would arrive as a traceback."""

    def __init__(self, split: Split, transform: Transform, seed: int) -> None:
        self._split = split
        self._transform = transform
        self._seed = seed

    def __getitem__(self, request: _Request) -> Batch | str:
        epoch, positions = request
        index = torch.tensor(positions)
        try:
            images = self._images(epoch, index)
        except DataError as error:
            return str(error)
        return Batch(images, self._split.labels[index], index)

    def _images(self, epoch: int, index: Tensor) -> Tensor:
        """uint8 [B, 3, h, w]."""
        if not self._transform.random:
            if self._split.pixels is not None:
                return self._transform.augment(self._split.pixels[index])
            return _stacked([self._transform.augment(self._split.read(i)) for i in index.tolist()])
        before = torch.default_generator.get_state()  # without workers this is the generator of the training itself
        try:
            return _stacked([self._augmented(epoch, i) for i in index.tolist()])
        finally:
            torch.default_generator.set_state(before)

    def _augmented(self, epoch: int, i: int) -> Tensor:
        image = self._split.read(i)
        torch.default_generator.manual_seed(mix(self._seed, _AUGMENTATION, epoch, i))
        return self._transform.augment(image)


def _stacked(images: list[Tensor]) -> Tensor:
    sizes = {tuple(image.shape[-2:]) for image in images}
    if len(sizes) > 1:
        (h1, w1), (h2, w2) = sorted(sizes)[:2]
        raise DataError(f"images differ in size ({w1}x{h1} and {w2}x{h2}): choose a transform that resizes, such as squash")
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


class Loaders(NamedTuple):
    """One loader a split."""

    train: TorchvisionLoader
    val: TorchvisionLoader
    test: TorchvisionLoader


def make_loaders(
    data: ImageData,
    *,
    batch_size: int,
    train_transform: str | None = None,
    eval_transform: str | None = None,
    image_size: int | None = None,
    normalization: str | None = None,
    label_fraction: float = 1.0,
    seed: int = 0,
    workers: int | None = None,
    device: torch.device = torch.device("cpu"),
    rank: int = 0,
    world_size: int = 1,
    channels_last: bool = False,
) -> Loaders:
    """Loaders for training, validation and test; what is None follows the data set.

    Args:
        data: of kdfast.data.load().
        batch_size: images a batch on this rank, in all three.
        train_transform: a name of kdfast.data.training_names().
        eval_transform: a name of kdfast.data.evaluation_names().
        image_size: side of the images handed out, pixels.
        normalization: a name in kdfast.data.transforms.NORMALIZATIONS.
        label_fraction: part of the training labels that is visible; see hide_labels.
        seed: of order, augmentation and hidden labels.
        workers: processes a loader; None: none for images in memory, one a core and up to 8 for files.
        device: where batches are handed out.
        rank: this process among those that share the splits.
        world_size: how many they are.
        channels_last: memory format of the images.

    Raises:
        DataError: no such transform or normalization, or as TorchvisionLoader.
    """
    if normalization is not None and normalization not in NORMALIZATIONS:
        raise DataError(f"normalization must be one of {', '.join(NORMALIZATIONS)}, got {normalization!r}")
    mean, std = (data.mean, data.std) if normalization is None else NORMALIZATIONS[normalization]
    size = data.image_size if image_size is None else image_size
    augment = training_transform(train_transform or data.train_transform, size, mean, std)
    plain = evaluation_transform(eval_transform or data.eval_transform, size, mean, std)
    train = data.train if label_fraction == 1 else hide_labels(data.train, label_fraction, seed=seed)

    def loader(split: Split, transform: Transform, *, training: bool) -> TorchvisionLoader:
        return TorchvisionLoader(
            split,
            transform,
            batch_size,
            shuffle=training,
            seed=seed,
            workers=_default_workers(split, world_size) if workers is None else workers,
            device=device,
            rank=rank,
            world_size=world_size,
            drop_last=training,
            channels_last=channels_last,
        )

    return Loaders(
        train=loader(train, augment, training=True),
        val=loader(data.val, plain, training=False),
        test=loader(data.test, plain, training=False),
    )


def _default_workers(split: Split, world_size: int) -> int:
    if split.pixels is not None:
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(8, max(1, cores // world_size))
