"""Noise-contrastive estimation against a memory bank, without a copy of the [B, K + 1, D] gathered rows.

Anchor v_i is compared with rows x_ik of a bank of n rows: k = 0 is its positive, k = 1 .. K are negatives. With b = K / n + eps and the
score P_ik = exp(x_ik . v_i / T) / Z, each term of the loss is that of a logistic regression with the logit t_ik:

    t_ik = x_ik . v_i / T - log(Z b) = log(P_ik / b)
    -log(P / (P + b))             = softplus(-t)                       for the positive
    -log((K / n) / (P + b))       = softplus(t) + log1p(eps n / K)     for a negative
    dL/dv_i = 1 / (B T) [sum_k sigmoid(t_ik) x_ik - sigmoid(-t_i0) x_i0]

so the exponential does not overflow, and 1 + P / b, with P / b near 1 / K, loses no digits.

A program walks one part of an anchor's columns, `ROWS` gathered rows at a time: dot product, both terms and the gradient's sum while the
rows are in registers. A second launch adds up the parts in a fixed order. No atomics: bits depend on the inputs alone.

Floor: every gathered row and its index once, B (K + 1) (D b + 8) bytes with b bytes an element; the kernel reads no more. The bank of
CIFAR (25 MB) stays in a GPU's second-level cache. Beyond the gradient the memory is `parts` float32 [B, D + 1].
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kdfast.kernels.memory import flat

WIDEST = 8192  # features; more do not fit in registers
PROGRAMS = 1056  # at work together: eight for each multiprocessor of an H100, so that many loads are in flight


def plan(D: int) -> tuple[int, int, int]:
    """Returns the rows gathered at a time, the width they are padded to, and warps.

    A thread has at least eight elements, 128 bits of a 16-bit bank, and few enough not to spill.
    """
    width = max(8, triton.next_power_of_2(D))
    rows = max(32, 1024 // width) if width <= 128 else max(1, 2048 // width)
    return rows, width, 8 if width > 2048 else 4


def parts(B: int, columns: int, rows: int) -> tuple[int, int]:
    """Returns the number of parts into which an anchor's columns are split, and the tiles of a part."""
    tiles = triton.cdiv(columns, rows)
    most = max(1, min(triton.cdiv(PROGRAMS, max(1, B)), triton.cdiv(tiles, 4)))
    each = max(1, triton.cdiv(tiles, most))
    return max(1, triton.cdiv(tiles, each)), each


# ---- walks -----------------------------------------------------------------------------------------------------------


@triton.jit
def _anchor(anchors, D, WIDTH: tl.constexpr):
    """Loads anchor program_id(0) in float32, 0 beyond its features."""
    feature = tl.arange(0, WIDTH)
    return tl.load(anchors + tl.program_id(0).to(tl.int64) * D + feature, mask=feature < D, other=0.0).to(tl.float32)


@triton.jit
def _scores(v, bank, indices, column, columns, n, D, stride, per_T, WIDTH: tl.constexpr):
    """Loads rows of the bank [ROWS, WIDTH] and computes x . v / T [ROWS]: NaN if infinite, or if the index is not in the bank."""
    inside = column < columns
    index = tl.load(indices + tl.program_id(0).to(tl.int64) * columns + column, mask=inside, other=0)
    real = inside & (index >= 0) & (index < n)
    feature = tl.arange(0, WIDTH)
    rows = tl.load(bank + index[:, None] * stride + feature[None, :], mask=real[:, None] & (feature < D)[None, :], other=0.0)
    rows = rows.to(tl.float32)
    score = tl.sum(rows * v[None, :], 1) * per_T
    # not score - score == 0: fused, that is the rounding error of a product
    return rows, tl.where(real & (tl.abs(score) < float("inf")), score, float("nan"))


@triton.jit
def _log1p(e):
    """Computes log(1 + e) for e in [0, 1] as 2 artanh(e / (2 + e)), which keeps all digits of a small e."""
    z = e / (2.0 + e)
    s = z * z
    series = 1.0 + s * (1 / 3 + s * (1 / 5 + s * (1 / 7 + s * (1 / 9 + s * (1 / 11 + s * (1 / 13))))))
    return 2.0 * z * series


@triton.jit(do_not_specialize=["columns", "n", "tiles"])
def _losses(
    anchors, bank, indices, Z, losses, gradients, columns, n, D, stride, tiles, per_T, log_b,
    V: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Adds up the terms of one part of an anchor's columns, and its weighted rows: B T times the gradient."""
    D, stride = D // V * V, stride // V * V
    v = _anchor(anchors, D, WIDTH)
    shift = tl.log(tl.load(Z).to(tl.float32)) + log_b
    loss = tl.zeros([ROWS], tl.float32)
    pull = tl.zeros([ROWS, WIDTH], tl.float32)
    for step in range(tiles):
        column = (tl.program_id(1) * tiles + step) * ROWS + tl.arange(0, ROWS)
        rows, score = _scores(v, bank, indices, column, columns, n, D, stride, per_T, WIDTH)
        t = score - shift
        t = tl.where(column == 0, -t, t)
        e = tl.exp(-tl.abs(t))
        loss += tl.where(column < columns, tl.maximum(t, 0.0) + _log1p(e), 0.0)
        if gradients is not None:
            share = tl.where(t < 0, e, 1.0) / (1.0 + e)
            share = tl.where(column == 0, -share, share)
            pull += tl.where(column < columns, share, 0.0)[:, None] * rows
    at = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    tl.store(losses + at, tl.sum(loss, 0))
    if gradients is not None:
        feature = tl.arange(0, WIDTH)
        tl.store(gradients + at * D + feature, tl.sum(pull, 0), mask=feature < D)


@triton.jit
def _is_settled(z):
    return (z > 0) & (z < float("inf"))


@triton.jit(do_not_specialize=["columns", "n", "tiles"])
def _exponentials(
    anchors, bank, indices, Z, sums, columns, n, D, stride, tiles, per_T, V: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    """Adds up exp(x . v / T) over one part of an anchor's columns; reads no rows if Z is settled."""
    D, stride = D // V * V, stride // V * V
    v = _anchor(anchors, D, WIDTH)
    total = tl.zeros([ROWS], tl.float32)
    tiles_to_walk = tl.where(_is_settled(tl.load(Z)), 0, tiles)
    for step in range(tiles_to_walk):
        column = (tl.program_id(1) * tiles + step) * ROWS + tl.arange(0, ROWS)
        _rows, score = _scores(v, bank, indices, column, columns, n, D, stride, per_T, WIDTH)
        total += tl.where(column < columns, tl.exp(score), 0.0)
    tl.store(sums + tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1), tl.sum(total, 0))


# ---- sums of parts ---------------------------------------------------------------------------------------------------


@triton.jit
def _total(values, count, BLOCK: tl.constexpr):
    """Adds up `count` numbers, always in the same order."""
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, count, BLOCK):
        at = start + tl.arange(0, BLOCK)
        total += tl.load(values + at, mask=at < count, other=0.0)
    return tl.sum(total, 0)


@triton.jit(do_not_specialize=["B", "parts"])
def _finish(
    losses, gradients, loss, gradient, B, D, parts, mean, constant, per_T,
    V: tl.constexpr, PARTS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program 0 adds up the loss, program i + 1 the gradient of anchor i."""
    D = D // V * V
    if tl.program_id(0) == 0:
        tl.store(loss, _total(losses, B * parts, BLOCK) * mean + constant)
    else:
        if gradients is not None:
            i = tl.program_id(0).to(tl.int64) - 1
            feature = tl.arange(0, WIDTH)
            pull = tl.zeros([PARTS, WIDTH], tl.float32)
            for start in range(0, parts, PARTS):
                part = start + tl.arange(0, PARTS)
                at = gradients + (i * parts + part)[:, None] * D + feature[None, :]
                pull += tl.load(at, mask=(part < parts)[:, None] & (feature < D)[None, :], other=0.0)
            tl.store(gradient + i * D + feature, tl.sum(pull, 0) * mean * per_T, mask=feature < D)


@triton.jit(do_not_specialize=["count"])
def _settle(sums, Z, out, count, scale, BLOCK: tl.constexpr):
    """Stores Z if it is settled, else scale times the sum of the parts."""
    z = tl.load(Z)
    made = _total(sums, count, BLOCK) * scale
    tl.store(out, tl.where(_is_settled(z), z, made.to(z.dtype)))


# ---- launches --------------------------------------------------------------------------------------------------------


def _bank_and_vector(bank: Tensor) -> tuple[Tensor, int]:
    """Returns the bank with a unit stride along features, and the divisor, at most 8, of its row length and row stride."""
    bank = bank.resolve_neg()
    bank = bank if bank.stride(1) == 1 or bank.shape[1] == 1 else bank.contiguous()
    return bank, math.gcd(8, bank.shape[1], bank.stride(0))


def loss_and_gradient(
    anchors: Tensor, bank: Tensor, indices: Tensor, Z: Tensor, temperature: float, log_b: float, constant: float, with_gradient: bool
) -> tuple[Tensor, Tensor]:
    """Returns the mean loss and its gradient for the anchors; the host does not wait.

    Args:
        anchors: [B, D], float32, bfloat16 or float16, D at most WIDEST.
        bank: [n, D], of one of these dtypes.
        indices: int64 [B, 1 + K], rows of the bank. An index out of range makes loss and gradient NaN, and reads nothing.
        Z: [], of one of these dtypes.
        temperature: T.
        log_b: log(K / n + eps).
        constant: of the negatives' terms, beside softplus(t).
        with_gradient: computes the gradient too.

    Returns:
        The loss [] and the gradient [B, D], or [0, D] without gradient; float32.
    """
    (B, D), columns = anchors.shape, indices.shape[1]
    bank, V = _bank_and_vector(bank)
    rows, width, warps = plan(D)
    split, tiles = parts(B, columns, rows)
    float32: dict[str, Any] = {"dtype": torch.float32, "device": anchors.device}
    loss, losses = torch.empty((), **float32), torch.empty(B * split, **float32)
    gradient = torch.empty(B if with_gradient else 0, D, **float32)
    gradients = torch.empty(B * split * D, **float32) if with_gradient else None
    with torch.cuda.device_of(anchors):  # a launch goes to the current device, which need not be the tensors'
        if B:
            _losses[(B, split)](
                flat(anchors), bank, indices.contiguous(), Z, losses, gradients, columns, len(bank), D, bank.stride(0), tiles,
                1 / temperature, log_b, V=V, ROWS=rows, WIDTH=width, num_warps=warps, enable_fp_fusion=True,
            )  # fmt: skip
        _finish[(1 + len(gradient),)](
            losses, gradients, loss, gradient.view(-1), B, D, split, 1 / max(B, 1), constant if B else 0.0, 1 / temperature,
            V=V, PARTS=max(1, 2048 // width), WIDTH=width, BLOCK=1024, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
    return loss, gradient


def normalizer(anchors: Tensor, bank: Tensor, indices: Tensor, Z: Tensor, temperature: float) -> Tensor:
    """Returns Z if it is positive and finite, else n times the mean of exp(x . v / T); the device decides and then computes.

    Args:
        anchors: [B, D], as in loss_and_gradient.
        bank: [n, D].
        indices: int64 [B, 1 + K].
        Z: [], of one of these dtypes.
        temperature: T.

    Returns:
        [], in Z's dtype.
    """
    (B, D), columns = anchors.shape, indices.shape[1]
    bank, V = _bank_and_vector(bank)
    rows, width, warps = plan(D)
    split, tiles = parts(B, columns, rows)
    out = torch.empty_like(Z)
    sums = torch.empty(B * split, dtype=torch.float32, device=anchors.device)
    with torch.cuda.device_of(anchors):
        if B:
            _exponentials[(B, split)](
                flat(anchors), bank, indices.contiguous(), Z, sums, columns, len(bank), D, bank.stride(0), tiles,
                1 / temperature, V=V, ROWS=rows, WIDTH=width, num_warps=warps, enable_fp_fusion=True,
            )  # fmt: skip
        scale = len(bank) / (B * columns) if B else math.nan
        _settle[(1,)](sums, Z, out, B * split, scale, BLOCK=1024, num_warps=4, enable_fp_fusion=True)
    return out
