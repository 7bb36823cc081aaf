"""Momenta of 8 bits: a sign and the root of the share of the largest of GROUP elements, k = sqrt(|m| / scale) LEVELS.

Small momenta keep their sign and a few bits. k is rounded up or down at random so that the decoded momentum's expectation is exact: with
beta2 = 0.99 a step changes a momentum by less than a step of the code, and rounding to the nearest would leave it where it is.
"""

import torch
from torch import Tensor

from kdfast.kernels.lion_constants import GROUP, LEVELS


def count_scales(numel: int) -> int:
    """The number of scales for a momentum of `numel` elements."""
    return -(-numel // GROUP)


def decode(code: Tensor, scale: Tensor) -> Tensor:
    """Float32 momenta of an int8 code and its scales, with the code's strides; NaN where the scale is not finite."""
    values = _split_into_groups(flatten(code).float())
    values = values * values.abs() * (scale * LEVELS**-2)[:, None]
    return unflatten(values.view(-1)[: code.numel()], code)


def encode(momentum: Tensor, noise: Tensor | None) -> tuple[Tensor, Tensor]:
    """The int8 code of a dense float32 momentum, with its strides, and its scales.

    Args:
        momentum: of any shape.
        noise: int32 [numel], random bits in the order of the momentum's memory; None rounds to the nearest.
    """
    values = _split_into_groups(flatten(momentum))
    sizes = torch.where(values.isfinite(), values.abs(), float("inf"))
    scale = sizes.amax(dim=1, keepdim=True)
    # too small to divide by, or infinite: all levels 0, which an infinite scale makes NaN
    squared = torch.where((scale > 1e-30) & scale.isfinite(), sizes * (LEVELS**2 / scale), 0.0)
    level = squared.sqrt().floor()
    share = 0.5 if noise is None else _split_into_groups(((noise >> 16) & 0xFFFF) * 2.0**-16)
    level = (level + (squared - level * level > (2.0 * level + 1.0) * share)).clamp(max=LEVELS)
    code = torch.where(values < 0, -level, level).to(torch.int8)
    return unflatten(code.view(-1)[: momentum.numel()], momentum), scale.view(-1)


def flatten(tensor: Tensor) -> Tensor:
    """A dense tensor's elements in the order of its memory."""
    return tensor.view(-1) if tensor.is_contiguous() else tensor.as_strided((tensor.numel(),), (1,))


def unflatten(flat: Tensor, like: Tensor) -> Tensor:
    """The inverse of flatten: the elements in the shape and strides of `like`."""
    return flat.view(like.shape) if like.is_contiguous() else flat.as_strided(like.shape, like.stride())


def _split_into_groups(flat: Tensor) -> Tensor:
    """[groups, GROUP], zeros at the end.

    All is computed in this shape, element beside scale: the C++ that Inductor makes of a scale looked up by index // GROUP reads beyond
    its end in the last vector (seen with PyTorch 2.11 to 2.15).
    """
    return torch.cat([flat, flat.new_zeros(-flat.numel() % GROUP)]).view(-1, GROUP)
