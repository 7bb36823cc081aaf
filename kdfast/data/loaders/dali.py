"""Image files decoded, cropped, resized and normalized by NVIDIA DALI: on a GPU, or in C++ threads on the CPU.

DALI's own readers shuffle a buffer, and its own crops draw from generators inside the pipeline, so an epoch could not be resumed and
other loaders would see other images. This loader therefore feeds DALI everything: the names of a batch's files, the window of each to
decode, and the flips. Order, ranks, resuming and augmentation are functions of (seed, epoch, index) as in the other loaders.

DALI reads sound JPEG and PNG files of 8 bits grey or colour: there it gives Pillow's pixels. All other files are decoded once, by
kdfast.data.images, and kept as PNG in a temporary folder for the life of the loader.
"""

import os
import shutil
import tempfile
import weakref
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from kdfast.data.augment import Flip
from kdfast.data.extras import need
from kdfast.data.images import decode, has_standard_pixels, import_decoders
from kdfast.data.loaders.options import LoaderOptions
from kdfast.data.loaders.ordered import OrderedLoader, Request, draw, interleave
from kdfast.data.protocol import Batch, DataError
from kdfast.data.seeding import Draws
from kdfast.data.splits import Split
from kdfast.data.transforms import Transform, check_same_size
from kdfast.imports import require

AHEAD = 2
"""Batches that DALI works on while the caller has another."""


class DaliLoader(OrderedLoader):
    """Image files through a DALI pipeline.

    Args:
        split, transform, options: as for every loader; the split is one of files, options.workers are threads of the pipeline on the CPU.

    Raises:
        DataError: as OrderedLoader; the images are in memory; a file that DALI does not read is broken; images
            differ in size and the transform does not resize them; while iterating: an image cannot be read.
        ImportError: DALI is not installed.

    Example:
        >>> split = kdfast.data.Split(torch.tensor([0, 1]), pixels=torch.zeros(2, 3, 8, 8, dtype=torch.uint8))
        >>> transform = kdfast.data.training_transform("imagenet", 8, *kdfast.data.NORMALIZATIONS["imagenet"])
        >>> kdfast.data.DaliLoader(split, transform, kdfast.data.LoaderOptions(batch_size=2))
        Traceback (most recent call last):
        kdfast.data.protocol.DataError: the dali loader reads image files, and these images are in memory: choose --loader resident
    """

    def __init__(self, split: Split, transform: Transform, options: LoaderOptions) -> None:
        super().__init__(split, transform, options)
        if split.paths is None or split.pixels is not None:
            raise DataError("the dali loader reads image files, and these images are in memory: choose --loader resident")
        self._flip = transform.steps[0] if transform.steps and isinstance(transform.steps[0], Flip) else None
        self._in_dali = not transform.steps or transform.steps == (self._flip,)  # then DALI flips and normalizes
        self._pipeline = self._build_pipeline()  # first: it is cheap, and shows whether DALI is there
        self._sizes = split.measure()
        if transform.framing is None:
            check_same_size(self._sizes)
        self._paths = self._make_readable(split.paths)
        self._labels = split.labels.to(self._device)
        self._pending: deque[_Pending] = deque()

    def _batches(self, requests: list[Request]) -> Iterator[Batch]:
        pending: deque[_Pending] = deque()
        for place in range(len(requests)):
            if self._pending is not pending:  # DALI works for another iteration, which was left or continues beside this one
                if self._pending:
                    self._pipeline = self._build_pipeline()
                self._pending = pending
                pending.clear()
            try:
                self._schedule(requests[place + len(pending) : place + AHEAD])
                batch = self._receive()
                self._schedule(requests[place + AHEAD : place + AHEAD + 1])
            except BaseException:  # also Ctrl-C after an input was fed but before it ran: the pipeline would mix up all later images
                self._pipeline, self._pending = self._build_pipeline(), deque()
                raise
            yield batch

    def _schedule(self, requests: list[Request]) -> None:
        """Gives DALI work."""
        for epoch, positions in requests:
            index = torch.tensor(positions)
            draws = draw(self._options, epoch, index)
            for name, values in self._make_inputs(index, draws).items():
                self._pipeline.feed_input(name, values)
            self._pipeline.schedule_run()
            self._pending.append(_Pending(index, draws))

    def _make_inputs(self, index: Tensor, draws: list[Draws]) -> dict[str, Any]:
        """The inputs of the pipeline by name; the views of an image are in a row."""
        sizes = self._sizes[index]
        names = [np.frombuffer(os.fsencode(self._paths[i]), np.uint8) for i in index.tolist() for _ in draws]
        inputs: dict[str, Any] = {"name": names}
        if self._transform.framing is not None:
            frames = [self._transform.framing.frames(sizes, d) for d in draws]
            cut = [torch.stack([f.top, f.left, f.height, f.width], dim=1) for f in frames]
            # the window of size x size in the part resized to rows x columns, in pixels of the part that is cut out
            scale = [torch.stack([f.height / f.rows, f.width / f.columns], dim=1) for f in frames]
            start = [torch.stack([f.down, f.right], dim=1) * s for f, s in zip(frames, scale)]
            shown = [torch.cat([a, a + f.size * s], dim=1) for f, a, s in zip(frames, start, scale)]
            inputs["anchor"], inputs["shape"] = interleave(cut).int().numpy().reshape(-1, 2, 2).swapaxes(0, 1).copy()
            inputs["start"], inputs["end"] = interleave(shown).float().numpy().reshape(-1, 2, 2).swapaxes(0, 1).copy()
        if self._in_dali:
            flips = [torch.zeros(len(index)) if self._flip is None else self._flip.choose(d) for d in draws]
            inputs["mirror"] = interleave(flips).int().numpy()
        return inputs

    def _receive(self) -> Batch:
        """The batch that was scheduled first."""
        index, draws = self._pending.popleft()
        cuda = self._device.type == "cuda"
        try:
            # bound to our stream, so a batch's memory is reused only after our work with it
            (output,) = self._pipeline.outputs(cuda_stream=torch.cuda.current_stream(self._device) if cuda else None)
        except Exception as error:  # DALI's errors have many types
            raise self._explain(index, error) from None
        if not output.is_dense_tensor():
            raise self._explain(index, "images differ in size")
        with torch.cuda.device(self._device if cuda else -1):
            images = torch.from_dlpack(output.as_tensor())  # this memory is ours: the dynamic executor does not use it again
        there = index.to(self._device, non_blocking=True)
        return Batch(self._complete(images, draws), self._labels[there], there)

    def _complete(self, images: Tensor, draws: list[Draws]) -> Tensor:
        """Does the steps that DALI has not done: images are normalized, in their memory format, or uint8 [B * views, H, W, 3]."""
        if self._in_dali:
            last = self._format == torch.channels_last
            return self._separate_views((images.permute(0, 3, 1, 2) if last else images).to(self._options.dtype))
        views = self._separate_views(images.permute(0, 3, 1, 2))
        parts = views.unbind(1) if len(draws) > 1 else (views,)
        return self._finish(interleave([self._transform.change(view, numbers) for view, numbers in zip(parts, draws)]))

    def _explain(self, index: Tensor, error: Exception | str) -> DataError:
        """The fault of a batch, as a sentence that names the file if another decoder refuses it too."""
        paths = self._split.paths
        assert paths is not None  # refused when the loader was made
        for i in index.tolist():
            try:
                size = list(self._split.read(i).shape[-2:])
            except DataError as broken:
                return broken
            if size != self._sizes[i].tolist():
                return DataError(f"{paths[i]}: the image has changed since the loader was made: it has another size")
        for i in index.tolist():
            self._pipeline, self._pending = self._build_pipeline(), deque()
            try:
                self._schedule([Request(0, [i])])
                self._pipeline.outputs()
            except Exception as alone:  # DALI's errors have many types
                return DataError(f"{paths[i]}: DALI cannot read the image: choose --loader torchvision ({_shorten(alone)})")
        return DataError(
            f"DALI cannot read {paths[index[0]]} or one of {len(index) - 1} others: choose --loader torchvision ({_shorten(error)})"
        )

    def _make_readable(self, paths: tuple[str, ...]) -> tuple[str, ...]:
        """The files for DALI: the same, or copies as PNG of those that DALI would decode to other pixels."""
        plain = self._split.plain  # known after a full check, which saves opening every file
        unsure = range(len(paths)) if plain is None else (~plain).nonzero()[:, 0].tolist()
        import_decoders()
        with ThreadPoolExecutor() as threads:
            standard = threads.map(has_standard_pixels, [paths[i] for i in unsure])
            others = [i for i, same in zip(unsure, standard) if not same]
            if not others:
                return paths
            folder = tempfile.mkdtemp(prefix="kdfast-dali-")
            weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
            copies = {i: os.path.join(folder, f"{i}.png") for i in others}
            list(threads.map(_copy, [paths[i] for i in others], copies.values()))
        return tuple(copies.get(i, path) for i, path in enumerate(paths))

    def _build_pipeline(self) -> Any:
        """A pipeline without work."""
        dali: Any = require("nvidia.dali", extra="dali", what="the dali loader")
        fn, types = dali.fn, dali.types
        cuda, framing = self._device.type == "cuda", self._transform.framing

        def feed(name: str, dtype: Any, ndim: int = 1) -> Any:
            return fn.external_source(name=name, dtype=dtype, ndim=ndim)

        def define() -> Any:
            data = fn.io.file.read(feed("name", types.UINT8), dont_use_mmap=True)  # with mmap a file that shrinks would end the process
            decoding = {
                "device": "mixed" if cuda else "cpu",
                "output_type": types.RGB,
                "jpeg_fancy_upsampling": True,  # as libjpeg does
                "adjust_orientation": False,  # as Pillow does
                "affine": False,  # several ranks would tie their threads to the same cores
            }
            if framing is None:
                images = fn.decoders.image(data, **decoding)
            else:
                window = {"start": feed("anchor", types.INT32), "shape": feed("shape", types.INT32), "axis_names": "HW"}
                images = fn.decoders.image_slice(data, **window, **decoding)
                part = {"roi_start": feed("start", types.FLOAT), "roi_end": feed("end", types.FLOAT)}
                images = fn.resize(images, size=(framing.size,) * 2, **part, interp_type=types.INTERP_LINEAR, antialias=True)
            if not self._in_dali:
                return images
            return fn.crop_mirror_normalize(
                images,
                mirror=feed("mirror", types.INT32, ndim=0),
                mean=[255 * x for x in self._transform.mean],
                std=[255 * x for x in self._transform.std],
                dtype=types.FLOAT16 if self._options.dtype == torch.float16 else types.FLOAT,
                output_layout="HWC" if self._format == torch.channels_last else "CHW",
            )

        pipeline = dali.pipeline_def(
            batch_size=self._options.batch_size * self._options.views,
            num_threads=max(1, self._count_workers()),
            prefetch_queue_depth=1,  # one run each time it is scheduled: with a deeper queue, the first call would run it several times
            exec_dynamic=True,
            device_id=torch.empty(0, device=self._device).device.index if cuda else None,
        )(define)()
        pipeline.build()
        return pipeline


class _Pending(NamedTuple):
    """A batch that DALI works on."""

    index: Tensor  # type: ignore[assignment]  # int64 [B], positions in the split
    draws: list[Draws]  # of each view; the steps after the framing continue to draw from these


def _shorten(error: Exception | str) -> str:
    """DALI's reason, without its traceback."""
    return " ".join(str(error).rpartition("encountered:")[2].partition("C++ context")[0].split())


def _copy(path: str, to: str) -> None:
    need("PIL.Image").fromarray(decode(path).permute(1, 2, 0).numpy()).save(to, compress_level=1)
