"""From images of any size to size x size: the visible part of an image, and its resampling.

A framing computes for each image the part to cut out, the size to resize it to, and the window to keep. cut() resizes images one by one
with torchvision, resample() a batch on any device; DALI gets the numbers.
"""

import math
from collections.abc import Iterable
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from kdfast.data.extras import need
from kdfast.data.seeding import Draws

LONG = 64
"""An image that resizing would make this many times as large as the window, as 1 x 6000, is resized in the window alone."""


class Frames(NamedTuple):
    """The visible part of each of B images; int64 [B], pixels, on the CPU."""

    top: Tensor  # of the part to cut out
    left: Tensor
    height: Tensor
    width: Tensor
    rows: Tensor  # its size after resizing
    columns: Tensor
    down: Tensor  # the first row of the window of size x size in the resized part
    right: Tensor
    size: int

    def at(self, images: Tensor) -> "Frames":
        """The frames of some of the images: positions, int64 [b]."""
        return Frames(*[part[images] for part in self[:8]], self.size)  # type: ignore[arg-type, call-arg]


class Framing:
    """A step from any size to size x size.

    Attributes:
        random: whether it draws random numbers.
    """

    random: ClassVar[bool]

    def __init__(self, size: int) -> None:
        self.size = size

    def frames(self, sizes: Tensor, draws: Draws) -> Frames:
        """The visible parts of images of these sizes: int64 [B, 2], height and width."""
        raise NotImplementedError


class Squash(Framing):
    """Resizes with antialiasing, whatever the aspect ratio; an image of that size stays as it is."""

    random = False

    def frames(self, sizes: Tensor, draws: Draws) -> Frames:
        H, W = sizes.unbind(1)
        zero, size = torch.zeros_like(H), torch.full_like(H, self.size)
        return Frames(zero, zero, H, W, size, size, zero, zero, self.size)


class ResizedCrop(Framing):
    """A part of 8 to 100 % of the image's area, 3:4 to 4:3, resized: torchvision's RandomResizedCrop with its defaults."""

    random = True
    AREA = 0.08, 1.0
    RATIO = 3 / 4, 4 / 3
    TRIES = 10

    def frames(self, sizes: Tensor, draws: Draws) -> Frames:
        H, W = sizes[:, :1], sizes[:, 1:]
        low, high = map(math.log, self.RATIO)
        u, v = draws.uniform(2 * self.TRIES).split(self.TRIES, dim=1)
        area = H * W * (self.AREA[0] + (self.AREA[1] - self.AREA[0]) * u)
        ratio = (low + (high - low) * v).exp()
        width, height = (area * ratio).sqrt().round().long(), (area / ratio).sqrt().round().long()
        fits = (width > 0) & (width <= W) & (height > 0) & (height <= H)
        # if no try fits, which only happens in long images: the largest middle part of the extreme ratio
        width = torch.cat([width, torch.minimum(W, (H * self.RATIO[1]).round().long())], dim=1)
        height = torch.cat([height, torch.minimum(H, (W / self.RATIO[0]).round().long())], dim=1)
        chosen = torch.cat([fits, torch.ones_like(H, dtype=torch.bool)], dim=1).byte().argmax(dim=1, keepdim=True)
        width, height = width.gather(1, chosen)[:, 0], height.gather(1, chosen)[:, 0]
        middle = chosen[:, 0] == self.TRIES
        H, W = sizes.unbind(1)
        top = torch.where(middle, (H - height) // 2, draws.below(H - height + 1))
        left = torch.where(middle, (W - width) // 2, draws.below(W - width + 1))
        zero, size = torch.zeros_like(H), torch.full_like(H, self.size)
        return Frames(top, left, height, width, size, size, zero, zero, self.size)


class CenterCrop(Framing):
    """The shorter side resized to 256/224 of `size`, then the middle: how ImageNet is evaluated (torchvision's Resize and CenterCrop)."""

    random = False

    def frames(self, sizes: Tensor, draws: Draws) -> Frames:
        H, W = sizes.unbind(1)
        shorter, least = round(self.size * 256 / 224), sizes.amin(1)
        rows, columns = shorter * H // least, shorter * W // least
        down, right = (((side - self.size) / 2).round().long() for side in (rows, columns))
        zero = torch.zeros_like(H)
        return Frames(zero, zero, H, W, rows, columns, down, right, self.size)


def cut(images: Iterable[Tensor], frames: Frames) -> list[Tensor]:
    """Cuts out the visible part of each image, resizes it by torchvision, and cuts out the window.

    Args:
        images: uint8 [..., H, W].
        frames: of these images.

    Returns:
        uint8 [..., size, size] of each image.
    """
    windows = []
    for i, (image, (top, left, height, width, *resized, down, right)) in enumerate(zip(images, torch.stack(frames[:8], dim=1).tolist())):
        if math.prod(resized) > LONG * frames.size**2:
            windows.append(_cut_long(image, frames.at(torch.tensor([i]))))
            continue
        part = image[..., top : top + height, left : left + width]
        if list(part.shape[-2:]) != resized:
            part = need("torchvision.transforms.v2.functional").resize(part, resized, antialias=True)
        windows.append(part[..., down : down + frames.size, right : right + frames.size])
    return windows


def _cut_long(image: Tensor, frame: Frames) -> Tensor:
    """uint8 [..., H, W] -> [..., size, size]: as cut(), from those pixels alone that the window shows."""
    top, left, height, width, *resized, down, right = torch.cat(frame[:8]).tolist()
    used = []
    for start, length, side, skipped in ((top, height, resized[0], down), (left, width, resized[1], right)):
        scale = length / side
        reach = 1 + max(1, scale)
        used.append(slice(max(start, int(start + skipped * scale - reach)), math.ceil(start + (skipped + frame.size) * scale + reach)))
    part = image[..., used[0], used[1]]
    moved = frame._replace(top=frame.top - used[0].start, left=frame.left - used[1].start)
    return resample(part.reshape(1, -1, *part.shape[-2:]), moved).reshape(*image.shape[:-2], frame.size, frame.size)


def resample(images: Tensor, frames: Frames) -> Tensor:
    """Resizes the visible part of each image, antialiased as by torchvision: one matrix product for each direction.

    Args:
        images: uint8 [B, 3, H, W]; an image smaller than H x W stands in the upper left corner.
        frames: of the B images.

    Returns:
        uint8 [B, 3, size, size], on the images' device.
    """
    H, W = images.shape[-2:]
    vertical = _weights(frames.top, frames.height, frames.rows, frames.down, frames.size, H, images.device)
    horizontal = _weights(frames.left, frames.width, frames.columns, frames.right, frames.size, W, images.device)
    resampled = vertical[:, None] @ images.float() @ horizontal[:, None].mT
    return resampled.round_().clamp_(0, 255).to(torch.uint8)


def _weights(start: Tensor, length: Tensor, resized: Tensor, skipped: Tensor, out: int, source: int, device: torch.device) -> Tensor:
    """float32 [B, out, source]: the share of each source pixel in each pixel of the result, a triangle as wide as the scale, at least 1."""
    start, length, resized, skipped = (
        x.to(device, torch.float32, non_blocking=True)[:, None, None] for x in (start, length, resized, skipped)
    )
    scale = length / resized
    center = start + (skipped + torch.arange(out, device=device)[:, None] + 0.5) * scale  # [B, out, 1]
    position = torch.arange(source, device=device) + 0.5
    weight = (1 - (position - center).abs() / scale.clamp(min=1)).clamp_(min=0)
    weight *= (position > start) & (position < start + length)  # nothing from beyond the part to cut out
    return weight / weight.sum(dim=2, keepdim=True)
