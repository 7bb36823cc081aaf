"""Attention maps and the loss between them: feature maps [B, C, H, W] of a student and a teacher, of P = H W pixels.

    a        mean over channels of |F|^p, [B, P]: the energies
    A        a / n,   n = max(|a|, 1e-12), |a| the norm over the pixels of an image
    loss     sum over stages of the mean of (A_s - A_t)^2
    da_s     (D - A_s <A_s, D>) / n_s,   D = 2 (A_s - A_t) / (B P);   without <A_s, D> where n_s is 1e-12.   da_t with -D likewise
    dF       v (p / C) |F|^(p-1) sign(F) da,   v the gradient of the loss

A stage is three launches forward, `_energies` of the student and of the teacher and `_compare`, which stores da as well, and one launch
backward for each map that requires grad. Floor: each feature map is read once forward; each that requires grad is read once more and its
gradient written. The kernels reach it. The energies beside them are 1 / C as large; `_compare` reads them three times.

A tile is pixels by channels; its second dimension is contiguous in memory: channels for channels_last, else pixels. A program walks all
channels of its pixels, so that no sums cross programs: no atomics, and the same bits in every run. Arithmetic is float32.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

LEAST_NORM = tl.constexpr(1e-12)  # torch.nn.functional.normalize's
SMALLER = tl.constexpr(2.0**-64)  # energies times this have squares that do not overflow


class Plan(NamedTuple):
    """How programs cover an image: tiles of `pixels` by `channels`, `warps` warps."""

    pixels: int
    channels: int
    warps: int


def plan(C: int, P: int, channels_last: bool, itemsize: int, V: int) -> Plan:
    """Returns the launch plan for maps of C channels and P pixels, `itemsize` bytes an element, in runs of V elements; none spills.

    A thread has 16 elements, or 8 if each of them needs an address.
    """
    if channels_last:
        channels = min(triton.next_power_of_2(C), 256)
        pixels = min(triton.next_power_of_2(P), 2048 // channels)
    else:
        pixels = min(triton.next_power_of_2(P), 128 // itemsize)  # whole lines of the cache, and as many programs as these allow
        # maps of many channels often have few pixels: larger tiles make up for fewer programs
        tile = min(max(2048, triton.next_power_of_2(C) * pixels // 8), 8192)
        channels = min(triton.next_power_of_2(C), tile // pixels)
    return Plan(pixels, channels, max(1, min(pixels * channels // (256 if V == 1 else 512), 16)))


def compare_plan(P: int) -> tuple[int, int]:
    """Returns the pixels at a time, and warps, of the launch that compares energies."""
    block = min(triton.next_power_of_2(P), 4096)
    return block, max(1, block // 256)


def powers(exponent: float) -> tuple[int, float]:
    """Splits an exponent > -1 for `_power`: a whole number for products, and the rest for the logarithm, whose error grows with it."""
    whole = max(0, min(math.floor(exponent), 127))
    return whole, exponent - whole


# ---- an element's mathematics ----------------------------------------------------------------------------------------


@triton.jit
def _power(x, WHOLE: tl.constexpr, REST: tl.constexpr):
    """Computes x^(WHOLE + REST) for x >= 0, by squaring."""
    if REST == 0:
        y = tl.full(x.shape, 1.0, tl.float32)
    else:
        y = tl.exp2(REST * tl.log2(x))
    for bit in tl.static_range(7):
        if (WHOLE >> bit) % 2 == 1:
            y *= x
        if (WHOLE >> bit) > 1:
            x *= x
    return y


@triton.jit
def _slope(x, WHOLE: tl.constexpr, REST: tl.constexpr):
    """Computes |x|^(p-1) sign(x), with p - 1 = WHOLE + REST; 0 for x = 0."""
    if WHOLE == 1 and REST == 0:
        y = x
    else:
        # if x is 0 or NaN, x stands for its sign
        y = _power(tl.abs(x), WHOLE, REST) * tl.where(x > 0, 1.0, tl.where(x < 0, -1.0, x))
        if REST < 0:  # p < 1: infinity times the sign 0
            y = tl.where(x == 0, 0.0, y)
    return y


# ---- feature maps ----------------------------------------------------------------------------------------------------


@triton.jit
def _place(P, PIXELS: tl.constexpr, CHANNELS: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """Returns this program's image, its pixels and its first channels, along the dimensions of a tile."""
    blocks = tl.cdiv(P, PIXELS)
    image = (tl.program_id(0) // blocks).to(tl.int64)  # int64: image * stride may pass 2^31
    pixel = tl.program_id(0) % blocks * PIXELS + tl.arange(0, PIXELS)
    channel = tl.arange(0, CHANNELS)
    if CHANNELS_LAST:
        pixel, channel = pixel[:, None], channel[None, :]
    else:
        pixel, channel = pixel[None, :], channel[:, None]
    return image, pixel, channel


@triton.jit
def _offsets(pixel, channel, stride, CHANNELS_LAST: tl.constexpr):
    """Returns the offsets of a tile's elements from the image's first."""
    if CHANNELS_LAST:
        at = pixel.to(tl.int64) * stride + channel
    else:
        at = channel.to(tl.int64) * stride + pixel
    return at


@triton.jit
def _divisible(P, C, V: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """Returns P and C; x // V * V changes no value, but shows the compiler the divisibility that wide accesses need."""
    if CHANNELS_LAST:
        C = C // V * V
    else:
        P = P // V * V
    return P, C


@triton.jit(do_not_specialize=["P", "C", "image_stride", "stride"])  # V says how they divide
def _energies(
    features, energies, P, C, image_stride, stride,
    WHOLE: tl.constexpr, REST: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    V: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    P, C = _divisible(P, C, V, CHANNELS_LAST)
    image, pixel, channel = _place(P, PIXELS, CHANNELS, CHANNELS_LAST)
    features += image * (image_stride // V * V)
    total = tl.zeros([PIXELS, CHANNELS] if CHANNELS_LAST else [CHANNELS, PIXELS], tl.float32)
    for first in range(0, C, CHANNELS):
        at = _offsets(pixel, first + channel, stride // V * V, CHANNELS_LAST)
        x = tl.load(features + at, mask=(pixel < P) & (first + channel < C), other=0.0).to(tl.float32)
        total += _power(tl.abs(x), WHOLE, REST)
    tl.store(energies + image * P + pixel, tl.sum(total, 1 if CHANNELS_LAST else 0, keep_dims=True) / C, mask=pixel < P)


@triton.jit(do_not_specialize=["P", "C", "image_stride", "stride", "gradients_image_stride", "gradients_stride"])
def _gradients(
    features, slopes, upstream, gradients, P, C, image_stride, stride, gradients_image_stride, gradients_stride, p,
    WHOLE: tl.constexpr, REST: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    V: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    P, C = _divisible(P, C, V, CHANNELS_LAST)
    image, pixel, channel = _place(P, PIXELS, CHANNELS, CHANNELS_LAST)
    features += image * (image_stride // V * V)
    gradients += image * (gradients_image_stride // V * V)
    factor = tl.load(slopes + image * P + pixel, mask=pixel < P, other=0.0) * (tl.load(upstream) * (p / C))
    for first in range(0, C, CHANNELS):
        inside = (pixel < P) & (first + channel < C)
        at = _offsets(pixel, first + channel, stride // V * V, CHANNELS_LAST)
        x = tl.load(features + at, mask=inside, other=0.0).to(tl.float32)
        at = _offsets(pixel, first + channel, gradients_stride // V * V, CHANNELS_LAST)
        tl.store(gradients + at, factor * _slope(x, WHOLE, REST), mask=inside)


# ---- energies --------------------------------------------------------------------------------------------------------


@triton.jit
def _norm(energies, P, BLOCK: tl.constexpr):
    """Computes the norm of an image's P energies, at least LEAST_NORM; NaN if one is NaN."""
    squares = tl.zeros([BLOCK], tl.float32)
    smaller = tl.zeros([BLOCK], tl.float32)
    for first in range(0, P, BLOCK):
        at = first + tl.arange(0, BLOCK)
        a = tl.load(energies + at, mask=at < P, other=0.0)
        squares += a * a
        smaller += (a * SMALLER) * (a * SMALLER)
    total = tl.sum(squares, 0)
    norm = tl.where(total < float("inf"), tl.sqrt(total), tl.sqrt(tl.sum(smaller, 0)) * (1.0 / SMALLER))
    return tl.where(norm < LEAST_NORM, LEAST_NORM, norm)


@triton.jit
def _maps(student, teacher, first, P, norm_s, norm_t, BLOCK: tl.constexpr):
    """Loads a step of the two maps, 0 beyond P; returns its pixels too."""
    at = first + tl.arange(0, BLOCK)
    a = tl.load(student + at, mask=at < P, other=0.0) / norm_s
    b = tl.load(teacher + at, mask=at < P, other=0.0) / norm_t
    return at, a, b


@triton.jit(do_not_specialize=["P"])
def _compare(student, teacher, d_student, d_teacher, losses, P, scale, V: tl.constexpr, BLOCK: tl.constexpr):
    """Stores an image's share of the loss, and the gradients for its energies if asked for; `scale` is 1 / (B P)."""
    P = P // V * V
    image = tl.program_id(0).to(tl.int64)
    student += image * P
    teacher += image * P
    norm_s, norm_t = _norm(student, P, BLOCK), _norm(teacher, P, BLOCK)

    squares = tl.zeros([BLOCK], tl.float32)
    along_s = tl.zeros([BLOCK], tl.float32)
    along_t = tl.zeros([BLOCK], tl.float32)
    for first in range(0, P, BLOCK):
        _, a, b = _maps(student, teacher, first, P, norm_s, norm_t, BLOCK)
        squares += (a - b) * (a - b)
        along_s += a * (a - b)  # not 1 - <A_s, A_t>, whose digits cancel for similar maps
        along_t += b * (b - a)
    tl.store(losses + image, tl.sum(squares, 0) * scale)

    if d_student is not None or d_teacher is not None:
        dot_s = tl.where(norm_s > LEAST_NORM, tl.sum(along_s, 0), 0.0)
        dot_t = tl.where(norm_t > LEAST_NORM, tl.sum(along_t, 0), 0.0)
        for first in range(0, P, BLOCK):
            at, a, b = _maps(student, teacher, first, P, norm_s, norm_t, BLOCK)
            if d_student is not None:
                tl.store(d_student + image * P + at, 2.0 * scale * (a - b - a * dot_s) / norm_s, mask=at < P)
            if d_teacher is not None:
                tl.store(d_teacher + image * P + at, 2.0 * scale * (b - a - b * dot_t) / norm_t, mask=at < P)


# ---- launches --------------------------------------------------------------------------------------------------------


def loss_and_slopes(
    students: Sequence[Tensor], teachers: Sequence[Tensor], p: float, wanted: Sequence[bool]
) -> tuple[Tensor, list[Tensor]]:
    """Returns the loss over all stages, and its gradients for the energies; the host does not wait.

    Args:
        students: each [B, C, H, W], not empty, float32, bfloat16 or float16. Channels_last or contiguous tensors, and slices of their
            images and channels, are read in place; others are copied.
        teachers: of the same B, H and W, stage by stage; C, dtypes and layouts may differ.
        p: power, > 0.
        wanted: for each student and then each teacher: True if its gradient will be computed.

    Returns:
        The loss, [], float32; and for every map with a wanted gradient, in order, the slopes [B H W], float32, for `gradient`.
    """
    float32: dict[str, Any] = {"dtype": torch.float32, "device": students[0].device}
    losses = torch.empty(sum(len(x) for x in students), **float32)
    slopes = [torch.empty(x[:, 0].numel(), **float32) if need else None for x, need in zip((*students, *teachers), wanted)]
    first = 0
    for student, teacher, d_student, d_teacher in zip(students, teachers, slopes, slopes[len(students) :]):
        B, P = len(student), student.shape[2] * student.shape[3]
        of_student, of_teacher = _energies_of(student, p), _energies_of(teacher, p)
        block, warps = compare_plan(P)
        with torch.cuda.device_of(student):  # a launch goes to the current device, which need not be the tensors'
            _compare[(B,)](
                of_student, of_teacher, d_student, d_teacher, losses[first : first + B], P, 1 / (B * P),
                V=math.gcd(P, 8), BLOCK=block, num_warps=warps, enable_fp_fusion=True,
            )  # fmt: skip
        first += B
    return losses.sum(), [slope for slope in slopes if slope is not None]


def _energies_of(features: Tensor, p: float) -> Tensor:
    """Computes the energies [B H W], float32."""
    energies = torch.empty(features[:, 0].numel(), dtype=torch.float32, device=features.device)
    rows = _rows(features, _channels_last(features))
    grid, P, C, tiles = _tiles(features, rows)
    whole, rest = powers(p)
    with torch.cuda.device_of(features):
        _energies[grid](rows, energies, P, C, *rows.stride()[:2], WHOLE=whole, REST=rest, **tiles, enable_fp_fusion=True)
    return energies


def gradient(features: Tensor, slopes: Tensor, upstream: Tensor, p: float) -> Tensor:
    """Returns the gradient for `features`, in their dtype and in `gradient_like`'s layout.

    Args:
        features: [B, C, H, W], an argument of `loss_and_slopes`.
        slopes: its result for them.
        upstream: the gradient of the loss, [], float32 and on the device.
        p: power.
    """
    made = gradient_like(features)
    rows, gradients = (_rows(x, _channels_last(features)) for x in (features, made))
    grid, P, C, tiles = _tiles(features, rows)
    whole, rest = powers(p - 1)
    with torch.cuda.device_of(features):
        _gradients[grid](
            rows, slopes, upstream, gradients, P, C, *rows.stride()[:2], *gradients.stride()[:2], float(p),
            WHOLE=whole, REST=rest, **tiles, enable_fp_fusion=True,
        )  # fmt: skip
    return made


def gradient_like(features: Tensor) -> Tensor:
    """Allocates a gradient: channels_last if the features' channels are contiguous, else contiguous."""
    return torch.empty_like(features, memory_format=torch.channels_last if _channels_last(features) else torch.contiguous_format)


def _channels_last(features: Tensor) -> bool:
    return features.stride(1) == 1 and features.shape[1] > 1


def _rows(features: Tensor, channels_last: bool) -> Tensor:
    """Returns [B, C, P], or [B, P, C] for channels_last, with a unit inner stride: a view, or else a copy."""
    rows = (features.permute(0, 2, 3, 1).flatten(1, 2) if channels_last else features.flatten(2)).resolve_neg()
    return rows if rows.stride(2) == 1 else rows.contiguous()


def _tiles(features: Tensor, rows: Tensor) -> tuple[tuple[int], int, int, dict[str, int]]:
    """Returns the grid, P, C, and the compile-time arguments that say how programs cover the features."""
    (B, C), P, channels_last = features.shape[:2], features.shape[2] * features.shape[3], _channels_last(features)
    V = math.gcd(8, rows.shape[2], rows.stride(0), rows.stride(1))
    pixels, channels, warps = plan(C, P, channels_last, features.element_size(), V)
    tiles = {"CHANNELS_LAST": channels_last, "V": V, "PIXELS": pixels, "CHANNELS": channels, "num_warps": warps}
    return (B * triton.cdiv(P, pixels),), P, C, tiles
