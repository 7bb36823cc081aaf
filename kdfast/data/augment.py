"""Random changes of images that keep their size: of one image by torchvision, and of a batch with numbers of each image's own.

Both forms of a step do the same to an image given the same numbers; torchvision's batched functions do the work wherever one set of
parameters holds for several images, and code of our own only where every image has its own. Numbers are drawn on the CPU and sent
after the images: nothing here waits for a GPU.
"""

import math
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from kdfast.data.seeding import Draws


class Step:
    """A random change of images that keeps their size."""

    random: ClassVar[bool] = True

    def alone(self, image: Tensor) -> Tensor:
        """uint8 [3, H, W] -> the same, drawing from torch's default generator."""
        raise NotImplementedError

    def batch(self, images: Tensor, draws: Draws) -> Tensor:
        """uint8 [B, 3, H, W], on any device -> the same."""
        raise NotImplementedError


class Shift(Step):
    """A random crop, as large as the image, of the image padded by `padding` pixels, with zeros or mirrored."""

    def __init__(self, padding: int, *, reflect: bool = False) -> None:
        self.padding, self.reflect = padding, reflect

    def alone(self, image: Tensor) -> Tensor:
        # torchvision's RandomCrop does the same in ten times the time, which on an 8x8 or 32x32 image is most of the epoch
        p, (H, W) = self.padding, image.shape[-2:]
        top, left = torch.randint(2 * p + 1, (2,)).tolist()
        if self.reflect:
            return image.index_select(-2, _mirrored(top - p, H)).index_select(-1, _mirrored(left - p, W))
        return F.pad(image, (p, p, p, p))[..., top : top + H, left : left + W]

    def batch(self, images: Tensor, draws: Draws) -> Tensor:
        p, (H, W) = self.padding, images.shape[-2:]
        top, left = (draws.below(2 * p + 1).to(images.device, non_blocking=True) for _ in range(2))
        if self.reflect:
            rows, columns = (_mirrored(-p, side + 2 * p, side).to(images.device, non_blocking=True) for side in (H, W))
            padded = images.index_select(2, rows).index_select(3, columns)
        else:
            padded = F.pad(images, (p, p, p, p))
        windows = padded.unfold(2, H, 1).unfold(3, W, 1)  # a view [B, 3, 2p + 1, 2p + 1, H, W]
        return windows[torch.arange(len(images), device=images.device), :, top, left]


def _mirrored(start: int, count: int, size: int | None = None) -> Tensor:
    """Start .. start + count - 1 as positions in 0 .. size - 1, mirrored at both ends without repeating the edge; size: count."""
    size = count if size is None else size
    position = torch.arange(start, start + count).abs()
    return torch.where(position < size, position, 2 * (size - 1) - position)


class Flip(Step):
    """Left to right, half of the time."""

    def alone(self, image: Tensor) -> Tensor:
        return image.flip(-1) if torch.rand(()).item() < 0.5 else image

    def batch(self, images: Tensor, draws: Draws) -> Tensor:
        return torch.where(_beside(self.chosen(draws), images), images.flip(-1), images)

    def chosen(self, draws: Draws) -> Tensor:
        """Which images are flipped: bool [B], CPU."""
        return draws.uniform(1)[:, 0] < 0.5


class Cutout(Step):
    """A square of `side` pixels, whose middle may be any pixel, is painted over (DeVries and Taylor, arXiv:1708.04552).

    Args:
        side: of the square; what lies beyond the image's edge is lost.
        color: bytes; the original's zeros, which come after normalization, are the mean color.
    """

    def __init__(self, side: int, color: tuple[int, int, int]) -> None:
        self.side, self.color = side, torch.tensor(color, dtype=torch.uint8).view(3, 1, 1)

    def alone(self, image: Tensor) -> Tensor:
        middle = [torch.randint(side, ()) for side in image.shape[-2:]]
        return torch.where(self._covered(image, *middle), self.color, image)

    def batch(self, images: Tensor, draws: Draws) -> Tensor:
        middle = [_beside(draws.below(side), images) for side in images.shape[-2:]]
        return torch.where(self._covered(images, *middle), self.color.to(images.device, non_blocking=True), images)

    def _covered(self, images: Tensor, y: Tensor, x: Tensor) -> Tensor:
        (H, W), half = images.shape[-2:], self.side // 2
        rows, columns = torch.arange(H, device=images.device)[:, None], torch.arange(W, device=images.device)
        return (rows >= y - half) & (rows < y - half + self.side) & (columns >= x - half) & (columns < x - half + self.side)


class Rotation(Step):
    """By up to `degrees` to either side, nearest pixels, zeros around."""

    def __init__(self, degrees: float) -> None:
        self.degrees = degrees

    def alone(self, image: Tensor) -> Tensor:
        from torchvision.transforms.v2 import RandomRotation

        return RandomRotation(self.degrees)(image)

    def batch(self, images: Tensor, draws: Draws) -> Tensor:
        return _warp(images, _turn(self.degrees * (2 * draws.uniform(1)[:, 0] - 1)))


class ColorJitter(Step):
    """Brightness, contrast, saturation and hue by random factors, in random order: torchvision's, with one strength for all four."""

    def __init__(self, strength: float) -> None:
        self.strength = strength

    def alone(self, image: Tensor) -> Tensor:
        from torchvision.transforms import v2

        return v2.ColorJitter(*(self.strength,) * 4)(image)

    def batch(self, images: Tensor, draws: Draws) -> Tensor:
        amount = self.strength * (2 * draws.uniform(4) - 1)
        order = draws.uniform(4).argsort(dim=1)
        images = images.clone()
        for place in range(4):
            for k, change in enumerate((_brightness, _contrast, _saturation, _hue)):
                _change(images, order[:, place] == k, lambda part, x, change=change: change(part, _beside(x, part)), amount[:, k])
        return images


class RandAugment(Step):
    """`count` operations after one another, each drawn from fourteen, at one magnitude (Cubuk et al., arXiv:1909.13719): torchvision's.

    Args:
        count: operations an image.
        magnitude: 0 to 30.
    """

    def __init__(self, count: int, magnitude: int) -> None:
        self.count, self.magnitude = count, magnitude

    def alone(self, image: Tensor) -> Tensor:
        from torchvision.transforms.v2 import RandAugment

        return RandAugment(self.count, self.magnitude)(image)

    def batch(self, images: Tensor, draws: Draws) -> Tensor:
        images = images.clone()
        for _ in range(self.count):
            operation, sign = draws.below(_OPERATIONS), 1 - 2.0 * draws.below(2)
            self.apply(images, operation, sign)
        return images

    def apply(self, images: Tensor, operation: Tensor, sign: Tensor) -> None:
        """One operation an image, in place.

        Args:
            images: uint8 [B, 3, H, W].
            operation: int64 [B], CPU: 0 identity; 1, 2 shear; 3, 4 translation; 5 rotation; 6 brightness; 7 saturation; 8 contrast;
                9 sharpness; 10 posterize; 11 solarize; 12 autocontrast; 13 equalize.
            sign: float64 [B], CPU, 1 or -1: of the magnitude, where that has one.
        """
        from torchvision.transforms.v2 import functional

        share = self.magnitude / 30
        factor = 0.9 * share
        matrices = _operations_matrices(images, operation, sign, share)
        _change(images, (operation >= 1) & (operation <= 5), _warp, matrices)
        for k, blend in ((6, _brightness), (7, _saturation), (8, _contrast)):
            _change(images, operation == k, lambda part, x, blend=blend: blend(part, _beside(x, part)), factor * sign)
        for s in (-1, 1):
            _change(images, (operation == 9) & (sign == s), lambda part, _, s=s: functional.adjust_sharpness(part, 1 + s * factor), sign)
        bits, threshold = 8 - round(4 * share), 255 * (1 - share)
        _change(images, operation == 10, lambda part, _: functional.posterize(part, bits), sign)
        _change(images, operation == 11, lambda part, _: functional.solarize(part, threshold), sign)
        _change(images, operation == 12, lambda part, _: functional.autocontrast(part), sign)
        _change(images, operation == 13, lambda part, _: functional.equalize(part), sign)


_OPERATIONS = 14


def _operations_matrices(images: Tensor, operation: Tensor, sign: Tensor, share: float) -> Tensor:
    """float64 [B, 2, 3] for _warp(): RandAugment's operations 1 to 5, the identity for all others."""
    H, W = images.shape[-2:]
    matrix = _turn(torch.where(operation == 5, 30 * share * sign, 0.0))
    shear = 0.3 * share * sign
    for k, row, column, middle in ((1, 0, 1, H / 2), (2, 1, 0, W / 2)):  # about the upper left corner, not the middle
        matrix[:, row, column] = torch.where(operation == k, shear, matrix[:, row, column])
        matrix[:, row, 2] += torch.where(operation == k, shear * middle, 0.0)
    for k, row, side in ((3, 0, W), (4, 1, H)):
        matrix[:, row, 2] -= torch.where(operation == k, (150 / 331 * side * share * sign).trunc(), 0.0)
    return matrix


# ---- what is done to a batch -----------------------------------------------------------------------------------------


def _beside(values: Tensor, images: Tensor) -> Tensor:
    """[B] -> [B, 1, 1, 1] on the images' device, float32 if floating."""
    values = values.float() if values.is_floating_point() else values
    return values.to(images.device, non_blocking=True)[:, None, None, None]


def _change(images: Tensor, chosen: Tensor, change: Callable[..., Tensor], parameters: Tensor) -> None:
    """Replaces the chosen images (bool [B], CPU, so that nothing waits for a GPU) by change(images, parameters) of them."""
    positions = chosen.nonzero()[:, 0]
    if len(positions) == 0:
        return
    there = positions.to(images.device, non_blocking=True)
    images[there] = change(images[there], parameters[positions])


def _turn(degrees: Tensor) -> Tensor:
    """Rotations about the middle, for _warp(): float64 [B] -> [B, 2, 3]."""
    angle = degrees * (math.pi / 180)
    zero = torch.zeros_like(angle)
    return torch.stack([angle.cos(), -angle.sin(), zero, angle.sin(), angle.cos(), zero], dim=1).view(-1, 2, 3)


def _warp(images: Tensor, matrices: Tensor) -> Tensor:
    """Moves pixels: what is at (x, y) afterwards was at matrix @ (x, y, 1) before, pixels from the middle; nearest, zeros around."""
    H, W = images.shape[-2:]
    device = images.device
    half = torch.tensor([[W / 2], [H / 2]])
    theta = (matrices.float() / half).to(device, non_blocking=True)
    x = (torch.arange(W, device=device) + 0.5 - W / 2).expand(H, W)
    y = (torch.arange(H, device=device) + 0.5 - H / 2)[:, None].expand(H, W)
    base = torch.stack([x, y, torch.ones_like(x)], dim=-1).view(1, H * W, 3)
    grid = (base.expand(len(images), -1, -1) @ theta.mT).view(-1, H, W, 2)
    return F.grid_sample(images.float(), grid, mode="nearest", padding_mode="zeros", align_corners=False).to(torch.uint8)


def _brightness(images: Tensor, amount: Tensor) -> Tensor:
    return images.mul(1 + amount).clamp_(0, 255).to(torch.uint8)


def _saturation(images: Tensor, amount: Tensor) -> Tensor:
    return _blend(images, _grey(images), 1 + amount)


def _contrast(images: Tensor, amount: Tensor) -> Tensor:
    return _blend(images, _grey(images).mean(dim=(1, 2, 3), keepdim=True), 1 + amount)


def _grey(images: Tensor) -> Tensor:
    """The brightness of every pixel, whole numbers: float32 [B, 1, H, W]."""
    red, green, blue = images.unbind(1)
    return red.mul(0.2989).add_(green, alpha=0.587).add_(blue, alpha=0.114).floor_()[:, None]


def _blend(images: Tensor, others: Tensor, share: Tensor) -> Tensor:
    return images.mul(share).add_(others * (1 - share)).clamp_(0, 255).to(torch.uint8)


def _hue(images: Tensor, amount: Tensor) -> Tensor:
    """Turns the hue by amount * 360 degrees (the hexagonal HSV model), value and saturation kept."""
    rgb = images.float() / 255
    low, value = rgb.amin(1, keepdim=True), rgb.amax(1, keepdim=True)
    chroma = value - low
    red, green, blue = rgb.split(1, dim=1)
    some = chroma.clamp(min=1e-12)
    hue = torch.where(
        value == red,
        (green - blue) / some,
        torch.where(value == green, 2 + (blue - red) / some, 4 + (red - green) / some),
    )
    sextant = hue + 6 * amount
    # a channel falls from full to none and rises again over the six sextants, each channel from a place of its own
    place = torch.cat([(sextant + start).remainder_(6) for start in (5, 3, 1)], dim=1)
    rgb = value - chroma * torch.minimum(place, 4 - place).clamp(0, 1)
    return (rgb * (256 - 1e-3)).to(torch.uint8)  # torchvision's way from 0..1 to bytes
