"""Image files decoded, cropped, resized and normalized by NVIDIA DALI: on a GPU, or in C++ threads on the CPU.

DALI's own readers shuffle a buffer and its own crops draw from generators that live in the pipeline: where an epoch was left could not
be gone on from, and other loaders would see other images. So DALI is told everything here: the names of a batch's files, the window of
each to decode, which are flipped. Order, ranks, resuming and augmentation are thereby functions of (seed, epoch, index) as they are in
the other loaders, and the windows are the very ones that ResidentLoader shows.

JPEG and PNG are left to DALI where these have 8 bits of grey or color: it gives Pillow's pixels. All else is decoded once, by
kdfast.data.images, and kept as PNG in a temporary folder for as long as the loader lives.
"""

import importlib
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

from kdfast.data.augment import Flip, Step
from kdfast.data.framing import Framing
from kdfast.data.images import decode
from kdfast.data.loaders.ordered import AUGMENTATION, OrderedLoader, Request, neighbours, refuse_different
from kdfast.data.protocol import Batch, DataError
from kdfast.data.seeding import Draws
from kdfast.data.splits import Split
from kdfast.data.transforms import Transform

AHEAD = 2
"""Batches that DALI works on while the caller has another."""


class DaliLoader(OrderedLoader):
    """Image files through a DALI pipeline.

    Args:
        split, transform, batch_size, options: as OrderedLoader; the split is one of files.
        workers: threads of the pipeline on the CPU.

    Raises:
        DataError: as OrderedLoader; workers is not positive; the images are in memory; DALI is not installed; a file that DALI is not
            given cannot be read; images differ in size and the transform does not make them alike; while iterating: an image cannot
            be read.
    """

    def __init__(self, split: Split, transform: Transform, batch_size: int, *, workers: int = 1, **options: Any) -> None:
        super().__init__(split, transform, batch_size, **options)
        if split.paths is None or split.pixels is not None:
            raise DataError("the dali loader reads image files, and these images are in memory: choose --loader resident")
        if workers < 1:
            raise DataError(f"workers must be at least 1, got {workers}")
        self._framing, self._steps = _framing_and_others(transform)
        self._in_dali = not self._steps or (len(self._steps) == 1 and isinstance(self._steps[0], Flip))
        self._threads = workers
        self._pipeline = self._built()  # first: it costs nothing, and finds out whether DALI is there
        self._sizes = split.measured()
        if self._framing is None:
            refuse_different(self._sizes)
        self._paths = self._readable(split.paths)
        self._labels = split.labels.to(self._device)
        self._asked: deque[_Asked] = deque()

    def _batches(self, requests: list[Request]) -> Iterator[Batch]:
        asked: deque[_Asked] = deque()
        for place in range(len(requests)):
            if self._asked is not asked:  # what DALI works on is of another iteration, which was left or is going on beside this one
                self._forget()
                self._asked = asked
            try:
                self._ask(requests[place + len(asked) : place + AHEAD])
                batch = self._answer()
                self._ask(requests[place + AHEAD : place + AHEAD + 1])
            except DataError:
                raise
            except BaseException:  # Ctrl-C, say, after something was fed but before it ran: all later images would be other ones
                self._pipeline, self._asked = self._built(), deque()
                raise
            yield batch

    def _ask(self, requests: list[Request]) -> None:
        """Sets DALI to work."""
        for epoch, positions in requests:
            index = torch.tensor(positions)
            asked = _Asked(index, [Draws(self._seed, AUGMENTATION, epoch, view, index=index) for view in range(self._views)])
            for name, values in self._inputs(asked).items():
                self._pipeline.feed_input(name, values)
            self._pipeline.schedule_run()
            self._asked.append(asked)

    def _inputs(self, asked: "_Asked") -> dict[str, Any]:
        """What the pipeline is fed; several views of an image are neighbours."""
        index, draws = asked
        sizes = self._sizes[index]
        names = [np.frombuffer(os.fsencode(self._paths[i]), np.uint8) for i in index.tolist() for _ in draws]
        inputs: dict[str, Any] = {"name": names}
        if self._framing is not None:
            frames = [self._framing.frames(sizes, d) for d in draws]
            cut = [torch.stack([f.top, f.left, f.height, f.width], dim=1) for f in frames]
            # the window of size x size of what is resized to rows x columns, in pixels of what is cut out
            scale = [torch.stack([f.height / f.rows, f.width / f.columns], dim=1) for f in frames]
            start = [torch.stack([f.down, f.right], dim=1) * s for f, s in zip(frames, scale)]
            shown = [torch.cat([a, a + f.size * s], dim=1) for f, a, s in zip(frames, start, scale)]
            inputs["anchor"], inputs["shape"] = neighbours(cut).int().numpy().reshape(-1, 2, 2).swapaxes(0, 1).copy()
            inputs["start"], inputs["end"] = neighbours(shown).float().numpy().reshape(-1, 2, 2).swapaxes(0, 1).copy()
        if self._in_dali:
            flips = [[step.chosen(d) for step in self._steps if isinstance(step, Flip)] for d in draws]
            inputs["mirror"] = neighbours([f[0] if f else torch.zeros(len(index)) for f in flips]).int().numpy()
        return inputs

    def _answer(self) -> Batch:
        """The batch that was asked for first."""
        asked = self._asked.popleft()
        cuda = self._device.type == "cuda"
        try:
            # bound to our stream, a batch's memory is not used again before what we do with it is done
            (output,) = self._pipeline.outputs(cuda_stream=torch.cuda.current_stream(self._device) if cuda else None)
        except Exception as error:  # DALI's are of many types
            raise self._explained(asked, error) from None
        if not output.is_dense_tensor():
            raise self._explained(asked, "images differ in size")
        with torch.cuda.device(self._device if cuda else -1):
            images = torch.from_dlpack(output.as_tensor())  # memory that is ours: the dynamic executor does not use it again
        there = asked.positions.to(self._device, non_blocking=True)
        return Batch(self._completed(images, asked), self._labels[there], there)

    def _completed(self, images: Tensor, asked: "_Asked") -> Tensor:
        """What DALI has left to do.

        Args:
            images: normalized, in the order of the memory format; or uint8 [B * views, H, W, 3].
            asked: what they are the answer to.
        """
        if self._in_dali:
            last = self._format == torch.channels_last
            return self._by_view((images.permute(0, 3, 1, 2) if last else images).to(self._dtype))
        views = list(images.permute(0, 3, 1, 2).unflatten(0, (-1, self._views)).unbind(1))
        for view, draws in enumerate(asked.draws):
            for step in self._steps:
                views[view] = step.batch(views[view], draws)
        return self._finished(neighbours(views))

    def _forget(self) -> None:
        """Takes from DALI what nobody will ask for."""
        while self._asked:
            self._asked.popleft()
            try:
                self._pipeline.outputs()
            except Exception:  # of a broken image, most likely: whoever asks for it will be told
                continue

    def _explained(self, asked: "_Asked", error: Exception | str) -> DataError:
        """What is wrong with the batch."""
        paths = self._split.paths
        assert paths is not None  # refused when the loader was made
        for i in asked.positions.tolist():
            h, w = self._sizes[i].tolist()
            try:
                H, W = self._split.read(i).shape[-2:]
            except DataError as broken:
                return broken
            if (h, w) != (H, W):
                return DataError(f"{paths[i]}: the image has changed: it is {W}x{H} now, and was {w}x{h} when the loader was made")
        first, others = paths[asked.positions[0]], len(asked.positions) - 1
        reason = " ".join(str(error).rpartition("encountered:")[2].partition("C++ context")[0].split())
        return DataError(f"DALI cannot read {first} or one of {others} others: choose --loader torchvision ({reason})")

    def _readable(self, paths: tuple[str, ...]) -> tuple[str, ...]:
        """The files that DALI reads instead of these: the same, or copies that hold the pixels as they are meant."""
        known = self._split.plain  # by a full check, which spares opening every file
        unsure = range(len(paths)) if known is None else (~known).nonzero()[:, 0].tolist()
        with ThreadPoolExecutor() as threads:
            wrong = [i for i, right in zip(unsure, threads.map(lambda i: decoded_alike(paths[i]), unsure)) if not right]
            if not wrong:
                return paths
            folder = tempfile.mkdtemp(prefix="kdfast-dali-")
            weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
            copies = {i: os.path.join(folder, f"{i}.png") for i in wrong}
            list(threads.map(lambda i: _copy(paths[i], copies[i]), wrong))
        return tuple(copies.get(i, path) for i, path in enumerate(paths))

    def _built(self) -> Any:
        """The pipeline."""
        try:
            dali: Any = importlib.import_module("nvidia.dali")
        except ImportError:
            raise DataError("NVIDIA DALI is not installed: pip install 'kdfast[dali]', or choose --loader torchvision") from None

        fn, types = dali.fn, dali.types
        cuda = self._device.type == "cuda"
        mean, std = ([255 * x for x in channels] for channels in (self._transform.mean, self._transform.std))

        # one run each time it is scheduled: with a deeper queue, the first call would run it several times
        @dali.pipeline_def(batch_size=self._batch_size * self._views, num_threads=self._threads, prefetch_queue_depth=1, exec_dynamic=True)
        def pipeline() -> Any:
            def fed(name: str, dtype: Any, ndim: int = 1) -> Any:
                return fn.external_source(name=name, dtype=dtype, ndim=ndim)

            data = fn.io.file.read(fed("name", types.UINT8), dont_use_mmap=True)  # a file that shrinks would end the process otherwise
            how = {
                "device": "mixed" if cuda else "cpu",
                "output_type": types.RGB,
                "jpeg_fancy_upsampling": True,  # as libjpeg does
                "adjust_orientation": False,  # as Pillow does
                "affine": False,  # several ranks would tie their threads to the same cores
            }
            if self._framing is None:
                images = fn.decoders.image(data, **how)
            else:
                window = {"start": fed("anchor", types.INT32), "shape": fed("shape", types.INT32), "axis_names": "HW"}
                images = fn.decoders.image_slice(data, **window, **how)
                part = {"roi_start": fed("start", types.FLOAT), "roi_end": fed("end", types.FLOAT)}
                images = fn.resize(images, size=(self._framing.size,) * 2, **part, interp_type=types.INTERP_LINEAR, antialias=True)
            if not self._in_dali:
                return images
            return fn.crop_mirror_normalize(
                images,
                mirror=fed("mirror", types.INT32, ndim=0),
                mean=mean,
                std=std,
                dtype=types.FLOAT16 if self._dtype == torch.float16 else types.FLOAT,
                output_layout="HWC" if self._format == torch.channels_last else "CHW",
            )

        built = pipeline(device_id=torch.empty(0, device=self._device).device.index if cuda else None)
        built.build()
        return built


class _Asked(NamedTuple):
    """A batch that DALI works on."""

    positions: Tensor  # int64 [B], in the split
    draws: list[Draws]  # of each view; the steps that DALI does not do go on drawing


def _framing_and_others(transform: Transform) -> tuple[Framing | None, tuple[Step, ...]]:
    first, *_ = transform.steps or (None,)
    others = tuple(step for step in transform.steps if isinstance(step, Step))
    return (first if isinstance(first, Framing) else None), others


# ---- which files DALI decodes as Pillow does --------------------------------------------------------------------------


def decoded_alike(path: str) -> bool:
    """Whether the head of a file promises that DALI, on any device, gives its pixels as kdfast.data.images.decode does.

    Left out are CMYK, JPEG that holds RGB, palettes, transparency, 16 bits and formats of which there are many kinds.
    """
    from PIL import Image

    try:
        with Image.open(path) as image:
            if image.format == "JPEG":
                letters = [layer[0] for layer in image.layer] == [*b"RGB"]  # type: ignore[attr-defined]
                rgb = image.mode == "RGB" and (letters or image.info.get("adobe_transform") == 0)
                return image.mode in ("L", "RGB") and not rgb
            return image.format == "PNG" and image.tile[0].args in ("L", "RGB") and "transparency" not in image.info
    except Exception:  # Pillow's plugins raise whatever they like; decode() will say what is wrong
        return False


def _copy(path: str, to: str) -> None:
    from PIL import Image

    Image.fromarray(decode(path).permute(1, 2, 0).numpy()).save(to, compress_level=1)
