"""Random changes of images that keep their size, of a batch in which every image has its own random numbers.

torchvision's functions do the work wherever several images share their parameters; the code here handles the rest. Numbers are drawn on
the CPU and sent after the images, so nothing waits for a GPU.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from kdfast.data.extras import need
from kdfast.data.seeding import Draws


class Step:
    """A random change of images that keeps their size."""

    def change(self, images: Tensor, draws: Draws) -> Tensor:
        """uint8 [B, 3, H, W], on any device -> the same."""
        raise NotImplementedError


class Shift(Step):
    """A random crop, as large as the image, of the image padded by `padding` pixels: zeros, or the mirrored image."""

    def __init__(self, padding: int, *, reflect: bool = False) -> None:
        self.padding, self.reflect = padding, reflect

    def change(self, images: Tensor, draws: Draws) -> Tensor:
        p, (H, W) = self.padding, images.shape[-2:]
        top, left = (draws.below(2 * p + 1).to(images.device, non_blocking=True) for _ in range(2))
        if self.reflect:
            rows, columns = (_mirror(p, side).to(images.device, non_blocking=True) for side in (H, W))
            padded = images.index_select(2, rows).index_select(3, columns)
        else:
            padded = F.pad(images, (p, p, p, p))
        windows = padded.unfold(2, H, 1).unfold(3, W, 1)  # a view [B, 3, 2p + 1, 2p + 1, H, W]
        return windows[torch.arange(len(images), device=images.device), :, top, left]


def _mirror(padding: int, size: int) -> Tensor:
    """The pixels of a padded side, as positions in 0 .. size - 1: mirrored at both ends without repeating the edge."""
    position = torch.arange(-padding, size + padding).abs()
    return torch.where(position < size, position, 2 * (size - 1) - position)


class Flip(Step):
    """Mirrors left and right, half of the time."""

    def change(self, images: Tensor, draws: Draws) -> Tensor:
        return torch.where(_expand(self.choose(draws), images), images.flip(-1), images)

    def choose(self, draws: Draws) -> Tensor:
        """The images to flip: bool [B], CPU."""
        return draws.uniform(1)[:, 0] < 0.5


class Cutout(Step):
    """Paints over a square of `side` pixels, whose middle may be any pixel (DeVries and Taylor, arXiv:1708.04552).

    Args:
        side: of the square; its part beyond the image's edge is lost.
        color: bytes; the original's zeros, which come after normalization, are the mean color.
    """

    def __init__(self, side: int, color: tuple[int, int, int]) -> None:
        self.side, self.color = side, torch.tensor(color, dtype=torch.uint8).view(3, 1, 1)

    def change(self, images: Tensor, draws: Draws) -> Tensor:
        y, x = (_expand(draws.below(side), images) for side in images.shape[-2:])
        (H, W), half = images.shape[-2:], self.side // 2
        rows, columns = torch.arange(H, device=images.device)[:, None], torch.arange(W, device=images.device)
        inside = (rows >= y - half) & (rows < y - half + self.side) & (columns >= x - half) & (columns < x - half + self.side)
        return torch.where(inside, self.color.to(images.device, non_blocking=True), images)


class Rotation(Step):
    """Rotates by up to `degrees` to either side: nearest pixels, zeros around."""

    def __init__(self, degrees: float) -> None:
        self.degrees = degrees

    def change(self, images: Tensor, draws: Draws) -> Tensor:
        return _warp(images, _rotate(self.degrees * (2 * draws.uniform(1)[:, 0] - 1)))


class ColorJitter(Step):
    """Brightness, contrast, saturation and hue by random factors, in random order: torchvision's, with one strength for all four."""

    def __init__(self, strength: float) -> None:
        self.strength = strength

    def change(self, images: Tensor, draws: Draws) -> Tensor:
        amount = self.strength * (2 * draws.uniform(4) - 1)
        order = draws.uniform(4).argsort(dim=1)
        images = images.clone()
        for place in range(4):
            for k, change in enumerate((adjust_brightness, adjust_contrast, adjust_saturation, adjust_hue)):
                _apply_where(order[:, place] == k, images, change, amount[:, k])
        return images


class RandAugment(Step):
    """`count` operations in a row, each drawn from fourteen, at one magnitude (Cubuk et al., arXiv:1909.13719): torchvision's.

    Args:
        count: operations an image.
        magnitude: 0 to 30.
    """

    OPERATIONS = 14

    def __init__(self, count: int, magnitude: int) -> None:
        self.count, self.magnitude = count, magnitude

    def change(self, images: Tensor, draws: Draws) -> Tensor:
        images = images.clone()
        for _ in range(self.count):
            operation, sign = draws.below(self.OPERATIONS), 1 - 2.0 * draws.below(2)
            self.apply(images, operation, sign)
        return images

    def apply(self, images: Tensor, operation: Tensor, sign: Tensor) -> None:
        """Applies one operation to each image, in place.

        Args:
            images: uint8 [B, 3, H, W].
            operation: int64 [B], CPU: 0 identity; 1, 2 shear; 3, 4 translation; 5 rotation; 6 brightness; 7 saturation; 8 contrast;
                9 sharpness; 10 posterize; 11 solarize; 12 autocontrast; 13 equalize.
            sign: float64 [B], CPU, 1 or -1, for the operations whose magnitude has a sign.
        """
        functional = need("torchvision.transforms.v2.functional")
        share = self.magnitude / 30
        factor = 0.9 * share
        _apply_where((operation >= 1) & (operation <= 5), images, _warp, self._make_matrices(images, operation, sign))
        for k, change in ((6, adjust_brightness), (7, adjust_saturation), (8, adjust_contrast)):
            _apply_where(operation == k, images, change, factor * sign)
        for s in (-1, 1):
            _apply_where((operation == 9) & (sign == s), images, partial(functional.adjust_sharpness, sharpness_factor=1 + s * factor))
        _apply_where(operation == 10, images, partial(functional.posterize, bits=8 - round(4 * share)))
        _apply_where(operation == 11, images, partial(functional.solarize, threshold=255 * (1 - share)))
        _apply_where(operation == 12, images, functional.autocontrast)
        _apply_where(operation == 13, images, functional.equalize)

    def _make_matrices(self, images: Tensor, operation: Tensor, sign: Tensor) -> Tensor:
        """float64 [B, 2, 3] for _warp(): operations 1 to 5, the identity for all others."""
        (H, W), share = images.shape[-2:], self.magnitude / 30
        matrix = _rotate(torch.where(operation == 5, 30 * share * sign, 0.0))
        shear = 0.3 * share * sign
        for k, row, column, middle in ((1, 0, 1, H / 2), (2, 1, 0, W / 2)):  # about the upper left corner, not the middle
            matrix[:, row, column] = torch.where(operation == k, shear, matrix[:, row, column])
            matrix[:, row, 2] += torch.where(operation == k, shear * middle, 0.0)
        for k, row, side in ((3, 0, W), (4, 1, H)):
            matrix[:, row, 2] -= torch.where(operation == k, (150 / 331 * side * share * sign).trunc(), 0.0)
        return matrix


# ---- operations on a batch -------------------------------------------------------------------------------------------


def _expand(values: Tensor, images: Tensor) -> Tensor:
    """[B] -> [B, 1, 1, 1] on the images' device, float32 if floating."""
    values = values.float() if values.is_floating_point() else values
    return values.to(images.device, non_blocking=True)[:, None, None, None]


def _apply_where(chosen: Tensor, images: Tensor, change: Callable[..., Tensor], *parameters: Tensor) -> None:
    """Replaces the chosen images (bool [B], CPU, so that nothing waits for a GPU) by change(images, *parameters) of them."""
    positions = chosen.nonzero()[:, 0]
    if len(positions) == 0:
        return
    there = positions.to(images.device, non_blocking=True)
    images[there] = change(images[there], *(values[positions] for values in parameters))


def _rotate(degrees: Tensor) -> Tensor:
    """Rotations about the middle, for _warp(): float64 [B] -> [B, 2, 3]."""
    angle = degrees * (math.pi / 180)
    zero = torch.zeros_like(angle)
    return torch.stack([angle.cos(), -angle.sin(), zero, angle.sin(), angle.cos(), zero], dim=1).view(-1, 2, 3)


def _warp(images: Tensor, matrices: Tensor) -> Tensor:
    """Moves pixels: the pixel at (x, y) comes from matrix @ (x, y, 1), in pixels from the middle; nearest, zeros around."""
    H, W = images.shape[-2:]
    device = images.device
    half = torch.tensor([[W / 2], [H / 2]])
    theta = (matrices.float() / half).to(device, non_blocking=True)
    x = (torch.arange(W, device=device) + 0.5 - W / 2).expand(H, W)
    y = (torch.arange(H, device=device) + 0.5 - H / 2)[:, None].expand(H, W)
    base = torch.stack([x, y, torch.ones_like(x)], dim=-1).view(1, H * W, 3)
    grid = (base.expand(len(images), -1, -1) @ theta.mT).view(-1, H, W, 2)
    return F.grid_sample(images.float(), grid, mode="nearest", padding_mode="zeros", align_corners=False).to(torch.uint8)


def adjust_brightness(images: Tensor, amount: Tensor) -> Tensor:
    """uint8 [B, 3, H, W] times 1 + amount (float [B], as in the three functions below)."""
    return images.mul(1 + _expand(amount, images)).clamp_(0, 255).to(torch.uint8)


def adjust_saturation(images: Tensor, amount: Tensor) -> Tensor:
    """Away from grey by 1 + amount."""
    return _blend(images, _to_grey(images), 1 + _expand(amount, images))


def adjust_contrast(images: Tensor, amount: Tensor) -> Tensor:
    """Away from the mean brightness by 1 + amount."""
    return _blend(images, _to_grey(images).mean(dim=(1, 2, 3), keepdim=True), 1 + _expand(amount, images))


def _to_grey(images: Tensor) -> Tensor:
    """The brightness of every pixel, whole numbers: float32 [B, 1, H, W]."""
    red, green, blue = images.unbind(1)
    return red.mul(0.2989).add_(green, alpha=0.587).add_(blue, alpha=0.114).floor_()[:, None]


def _blend(images: Tensor, others: Tensor, share: Tensor) -> Tensor:
    return images.mul(share).add_(others * (1 - share)).clamp_(0, 255).to(torch.uint8)


def adjust_hue(images: Tensor, amount: Tensor) -> Tensor:
    """Turns the hue by amount * 360 degrees in the hexagonal HSV model; value and saturation stay."""
    rgb = images.float() / 255
    low, value = rgb.amin(1, keepdim=True), rgb.amax(1, keepdim=True)
    chroma = value - low
    red, green, blue = rgb.split(1, dim=1)
    divisor = chroma.clamp(min=1e-12)
    hue = torch.where(
        value == red,
        (green - blue) / divisor,
        torch.where(value == green, 2 + (blue - red) / divisor, 4 + (red - green) / divisor),
    )
    sextant = hue + 6 * _expand(amount, images)
    # over the six sextants each channel falls from full to none and rises again; their starts differ
    place = torch.cat([(sextant + start).remainder_(6) for start in (5, 3, 1)], dim=1)
    rgb = value - chroma * torch.minimum(place, 4 - place).clamp(0, 1)
    return (rgb * (256 - 1e-3)).to(torch.uint8)  # torchvision's conversion from 0..1 to bytes
