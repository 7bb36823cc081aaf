"""The PyTorch form of supcon_loss: one matrix for few rows on a CPU, tiles for more. op.py has the formulas.

A tile is computed once and multiplied twice, for its rows and for its columns: 4 N^2 D operations forward and backward, where
the N x N form takes 6. Memory is O(N D), and a tile fits a core's second-level cache. For rows that fit one tile on a CPU, the
bookkeeping would cost more than the work: the positives are a matrix there, and the gradient of the similarities is saved.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kdfast.ops.precision import arithmetic

TILE = 512  # rows and columns
SAFE_EXPONENT = 40.0  # sums of up to 2^31 terms e^{+-SAFE_EXPONENT}, and weights divided by them, are normal float32 numbers
LEAST_WEIGHT = 1e-6  # SupContrast's: anchors whose positives weigh less are not divided by that weight
LEAST_NORM = 1e-12  # torch.nn.functional.normalize's


def forward(anchors: Tensor, others: Tensor, names: Tensor, mask: Tensor | None, setting: Any) -> tuple[Tensor, list[Tensor]]:
    """Computes the losses of the anchors.

    Args:
        anchors: [N, D].
        others: [M, D], rows that are no anchors.
        names: [N + M'], of the anchors and the first M' other rows: rows of one name are positives; with a mask, indices into it.
        mask: [B, B] or None.
        setting: an op.Setting.

    Returns:
        The losses [N], and what backward needs, see saved_like.
    """
    run = _matrix_forward if _is_small(anchors, others) else _tiled_forward
    return run(anchors, others, names, mask, setting)


def backward(
    upstream: Tensor,
    anchors: Tensor,
    others: Tensor,
    names: Tensor,
    mask: Tensor | None,
    saved: list[Tensor],
    setting: Any,
    for_others: bool,
) -> tuple[Tensor, Tensor]:
    """Computes the gradients of sum(upstream * losses) for the anchors [N, D] and the others, [M, D] or [0, D] unless for_others."""
    dtype = arithmetic(anchors)
    f, f_length = _rows(anchors, dtype, setting.normalize)
    g, g_length = _rows(others, dtype, setting.normalize)
    if len(saved) == 1:
        df, dg = _matrix_gradients(upstream, f, g, saved[0], setting, for_others)
    else:
        df, dg = _tiled_gradients(upstream, f, g, names, mask, saved, setting, for_others)
    d_others = _through_rows(dg, g, g_length, others.dtype) if for_others else dg.to(others.dtype)
    return _through_rows(df, f, f_length, anchors.dtype), d_others


def saved_like(losses: Tensor, anchors: Tensor, others: Tensor, names: Tensor, mask: Tensor | None) -> list[Tensor]:
    """Makes empty tensors like those that forward returns beside the losses [N].

    [the gradient of loss i for row i of S, [N, N + M]], or [m [N], Z [N], t [N, D], w [N]] with lse = m + log Z.
    """
    N, M = anchors.shape[0], others.shape[0]
    shapes = [(N, N + M)] if _is_small(anchors, others) else [(N,), (N,), anchors.shape, (N,)]
    return [losses.new_empty(shape) for shape in shapes]


def _is_small(anchors: Tensor, others: Tensor) -> bool:
    return anchors.device.type == "cpu" and len(anchors) + len(others) <= TILE


# ---- rows ------------------------------------------------------------------------------------------------------------


def _rows(x: Tensor, dtype: torch.dtype, normalize: bool) -> tuple[Tensor, Tensor | None]:
    """Returns the rows in the arithmetic's dtype; with normalize of unit length, and the lengths they were divided by."""
    x = x.to(dtype).contiguous()
    if not normalize:
        return x, None
    length = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    most = torch.finfo(dtype).max
    long = length > most**0.4
    if x.device.type != "cpu" or long.any():  # the host would wait for another device's answer
        # squares overflow long before rows do: these rows are made shorter first
        scale = torch.ones_like(length).masked_fill_(long, most**-0.6)
        x = x * scale
        length = torch.maximum(torch.linalg.vector_norm(x, dim=1, keepdim=True), LEAST_NORM * scale)
        return x.div_(length), length.div_(scale)
    return x / length.clamp_min_(LEAST_NORM), length


def _through_rows(d: Tensor, unit: Tensor, length: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Turns the gradient for the rows that _rows returned into that for the rows it was given."""
    if length is not None:
        along = (d * unit).sum(1, keepdim=True).masked_fill_(length <= LEAST_NORM, 0)  # a clamped length is constant
        d = (d - unit * along) / length
    return d.to(dtype)


def _divisors(weights: Tensor) -> Tensor:
    return weights.masked_fill(weights < LEAST_WEIGHT, 1)


def _similarities(out: Tensor, a: Tensor, b: Tensor, temperature: float) -> Tensor:
    """Computes a b' / temperature in the memory of `out`."""
    tile = out[: len(a) * len(b)].view(len(a), len(b))
    return torch.addmm(tile, a, b.t(), beta=0, alpha=1 / temperature, out=tile)  # out=: autocast leaves it alone


# ---- one matrix ------------------------------------------------------------------------------------------------------


def _positive_matrix(N: int, M: int, names: Tensor, mask: Tensor | None, setting: Any, dtype: torch.dtype) -> Tensor:
    """Returns P [N, N + M]."""
    k = setting.duplicates
    P = (names[:N, None] == names).to(dtype) if mask is None else mask[names[:N]][:, names].to(dtype)
    if len(names) < N + M:
        P = F.pad(P, (0, N + M - len(names)))
    if k > 1:
        P[:, : N + setting.copied] *= k
    if not setting.self_positive:
        P.fill_diagonal_(0) if k == 1 else P.diagonal().mul_((k - 1) / k)
    return P


def _matrix_forward(anchors: Tensor, others: Tensor, names: Tensor, mask: Tensor | None, setting: Any) -> tuple[Tensor, list[Tensor]]:
    N, M, dtype, k = len(anchors), len(others), arithmetic(anchors), setting.duplicates
    f = _rows(anchors, dtype, setting.normalize)[0]
    columns = torch.cat([f, _rows(others, dtype, setting.normalize)[0]]) if M else f
    P = _positive_matrix(N, M, names, mask, setting, dtype)
    weights = P.sum(1, keepdim=True)

    S = _similarities(f.new_empty(N * (N + M)), f, columns, setting.temperature)
    own = S.diagonal().clone() if k == 1 and setting.self_positive else None
    if k == 1:
        S.fill_diagonal_(torch.finfo(dtype).min)  # no part of the maximum, exponential 0, and finite: it is multiplied by 0
    largest = S.amax(1, keepdim=True).clamp_(max=torch.finfo(dtype).max)  # infinities must not cancel
    if own is not None:
        S.diagonal().copy_(own)
    S.sub_(largest)
    attraction = (P * S).sum(1, keepdim=True)
    S.exp_()
    if k > 1:
        S[:, : N + setting.copied] *= k
        S.diagonal().mul_((k - 1) / k)
    elif own is not None:
        S.fill_diagonal_(0)
    total = S.sum(1, keepdim=True)
    per_weight = setting.scale / _divisors(weights)
    losses = (total.log() * weights).sub_(attraction).mul_(per_weight)
    return losses.squeeze(1), [S.mul_(weights / total).sub_(P).mul_(per_weight)]


def _matrix_gradients(upstream: Tensor, f: Tensor, g: Tensor, dS: Tensor, setting: Any, for_others: bool) -> tuple[Tensor, Tensor]:
    N, per_tau = len(f), 1 / setting.temperature
    dS = upstream[:, None] * dS
    square = dS[:, :N]
    df, dg = torch.empty_like(f), torch.empty_like(g) if for_others else g.new_empty(0, g.shape[1])
    torch.addmm(df, square + square.t(), f, beta=0, alpha=per_tau, out=df)
    df.addmm_(dS[:, N:], g, alpha=per_tau)
    if for_others:
        torch.addmm(dg, dS[:, N:].t(), f, beta=0, alpha=per_tau, out=dg)
    return df, dg


# ---- tiles: positives by sums over their groups ----------------------------------------------------------------------


def _blocks(rows: int) -> list[slice]:
    return [slice(start, min(start + TILE, rows)) for start in range(0, rows, TILE)]


def _dense_rank(names: Tensor) -> Tensor:
    """Numbers the distinct names 0, 1, 2 ... in ascending order; torch.unique would wait for the device."""
    ordered, order = names.sort()
    steps = (ordered[1:] != ordered[:-1]).cumsum(0)
    return torch.zeros_like(order).scatter_(0, order[1:], steps)


def _group_sums(rows: Tensor, groups: Tensor, count: int) -> Tensor:
    """Sums the rows of each of the groups 0 .. count - 1: float64 [count, D].

    In float64, because an anchor is subtracted from its own group's sum again, and the rest may be far smaller.
    """
    return rows.new_zeros(count, rows.shape[1], dtype=torch.float64).index_add_(0, groups, rows.double())


def _spread(sums: Tensor, itself: Tensor | None, groups: Tensor, mask: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Sums the positives of the rows in these groups; `itself`, if given, is not one of them."""
    own = sums.index_select(0, groups)
    if itself is not None:
        own -= itself
    if mask is None:
        return own.to(dtype)
    B = len(mask)
    of_samples = sums[:B].to(dtype)
    mixed = torch.empty_like(of_samples)
    for rows in _blocks(B):
        between = mask[rows].to(dtype, copy=True)
        between[:, rows].fill_diagonal_(0)
        torch.mm(between, of_samples, out=mixed[rows])  # out=: autocast leaves it alone
    own *= mask.diagonal()[groups, None]
    return own.add_(mixed.index_select(0, groups)).to(dtype)


# ---- tiles: denominators ---------------------------------------------------------------------------------------------


def _needs_no_maximum(f: Tensor, g: Tensor, setting: Any) -> bool:
    """Tells if every |S_ij| is certainly below SAFE_EXPONENT, so that e^S can be summed as it is."""
    if setting.normalize:
        return 1 / setting.temperature <= SAFE_EXPONENT
    if f.device.type != "cpu":  # the host would wait for the number
        return False
    longest = torch.linalg.vector_norm(f, dim=1).max()
    across = torch.maximum(longest, torch.linalg.vector_norm(g, dim=1).max()) if len(g) else longest
    return bool(longest * across <= SAFE_EXPONENT * setting.temperature)


def _square_tiles(f: Tensor, setting: Any, direct: bool) -> Iterator[tuple[slice, slice, Tensor]]:
    """Yields the tiles of S (direct: of e^S) among anchors on and above the diagonal, whose own entries weigh (k - 1) / k.

    All are in the same memory, and the caller may overwrite them.
    """
    memory = f.new_empty(min(len(f), TILE) ** 2)
    itself = (setting.duplicates - 1) / setting.duplicates
    blocks = _blocks(len(f))
    for number, rows in enumerate(blocks):
        for columns in blocks[number:]:
            tile = _similarities(memory, f[rows], f[columns], setting.temperature)
            if direct:
                tile.exp_()
            if columns is rows and itself == 0:
                tile.fill_diagonal_(0 if direct else -math.inf)
            elif columns is rows:
                tile.diagonal().mul_(itself) if direct else tile.diagonal().add_(math.log(itself))
            yield rows, columns, tile


def _oblong_tiles(f: Tensor, g: Tensor, setting: Any, direct: bool) -> Iterator[tuple[slice, slice, Tensor]]:
    """Yields the tiles of S (direct: of e^S) between anchors and other rows."""
    memory = f.new_empty(min(len(f), TILE) * min(len(g), TILE))
    for rows in _blocks(len(f)):
        for columns in _blocks(len(g)):
            tile = _similarities(memory, f[rows], g[columns], setting.temperature)
            yield rows, columns, tile.exp_() if direct else tile


def _denominators(f: Tensor, g: Tensor, setting: Any) -> tuple[Tensor, Tensor]:
    """Returns m and Z, [N] each, with lse = m + log Z: their sum may round off what Z says of differences in a large S."""
    direct = _needs_no_maximum(f, g, setting)
    finite = torch.finfo(f.dtype)
    m, Z = f.new_full((len(f),), 0.0 if direct else finite.min), f.new_zeros(len(f))

    def add(rows: slice, tile: Tensor, dim: int) -> None:
        if direct:
            Z[rows] += tile.sum(dim)
            return
        larger = torch.maximum(m[rows], tile.amax(dim)).clamp_(finite.min, finite.max)  # infinities must not cancel
        Z[rows] *= (m[rows] - larger).exp_()
        Z[rows] += (tile - larger.unsqueeze(dim)).exp_().sum(dim)
        m[rows] = larger

    for rows, columns, tile in _square_tiles(f, setting, direct):
        add(rows, tile, 1)
        if columns is not rows:
            add(columns, tile, 0)
    for rows, _, tile in _oblong_tiles(f, g[: setting.copied], setting, direct):
        add(rows, tile, 1)
    Z *= setting.duplicates
    for rows, _, tile in _oblong_tiles(f, g[setting.copied :], setting, direct):
        add(rows, tile, 1)
    return m, Z


def _denominator_gradients(f: Tensor, g: Tensor, m: Tensor, share: Tensor, setting: Any, for_others: bool) -> tuple[Tensor, Tensor]:
    """Returns (G + G') f + G g for f and, if asked for, G' f for g, with G_ij = share_i e^{S_ij - m_i}."""
    direct = _needs_no_maximum(f, g, setting)  # then m is 0
    df, dg = torch.zeros_like(f), torch.zeros_like(g) if for_others else g.new_empty(0, g.shape[1])
    memory = f.new_empty(min(len(f), TILE) ** 2)

    def add_others(which: slice, share: Tensor) -> None:
        these, d_these = g[which], dg[which]
        for rows, columns, tile in _oblong_tiles(f, these, setting, direct):
            if not direct:
                tile.sub_(m[rows, None]).exp_()
            tile.mul_(share[rows, None])
            df[rows].addmm_(tile, these[columns])
            if for_others:
                d_these[columns].addmm_(tile.t(), f[rows])

    add_others(slice(setting.copied, None), share)
    share = share * setting.duplicates
    add_others(slice(setting.copied), share)
    for rows, columns, tile in _square_tiles(f, setting, direct):
        spare = memory[: tile.numel()].view(tile.shape)
        if direct:  # G_ij and G_ji share their exponential
            tile.mul_(torch.add(share[rows, None], share[columns], out=spare))
        else:
            torch.sub(tile, m[columns], out=spare).exp_().mul_(share[columns])
            tile.sub_(m[rows, None]).exp_().mul_(share[rows, None])
            if columns is rows:
                spare.copy_(tile.t())  # a product may round S_ij and S_ji differently, and m_i is of row i
            tile.add_(spare)
        df[rows].addmm_(tile, f[columns])
        if columns is not rows:
            df[columns].addmm_(tile.t(), f[rows])
    return df, dg


# ---- tiles: both passes ----------------------------------------------------------------------------------------------


def _tiled_forward(anchors: Tensor, others: Tensor, names: Tensor, mask: Tensor | None, setting: Any) -> tuple[Tensor, list[Tensor]]:
    N, dtype = len(anchors), arithmetic(anchors)
    f, g = _rows(anchors, dtype, setting.normalize)[0], _rows(others, dtype, setting.normalize)[0]
    groups = _dense_rank(names) if mask is None else names
    named, copied = len(groups) - N, setting.copied
    counted, counted_others = (F.pad(rows, (0, 1), value=1.0) for rows in (f, g[:named]))  # one more column counts the positives
    sums = _group_sums(counted, groups[:N], len(groups))
    if copied:
        sums += _group_sums(counted_others[:copied], groups[N : N + copied], len(groups))
    sums *= setting.duplicates
    if named > copied:
        sums += _group_sums(counted_others[copied:], groups[N + copied :], len(groups))
    spread = _spread(sums, None if setting.self_positive else counted, groups[:N], mask, dtype)
    positives, weights = spread[:, :-1].contiguous(), spread[:, -1].contiguous()
    m, Z = _denominators(f, g, setting)
    attraction = (f * positives).sum(1).div_(setting.temperature)
    losses = (m + Z.log()).mul_(weights).sub_(attraction).mul_(setting.scale).div_(_divisors(weights))
    return losses, [m, Z, positives, weights]


def _tiled_gradients(
    upstream: Tensor, f: Tensor, g: Tensor, names: Tensor, mask: Tensor | None, saved: list[Tensor], setting: Any, for_others: bool
) -> tuple[Tensor, Tensor]:
    m, Z, positives, weights = saved
    N, dtype = len(f), m.dtype
    h = (upstream * setting.scale / _divisors(weights))[:, None]
    df, dg = _denominator_gradients(f, g, m, weights * h[:, 0] / Z, setting, for_others)

    groups = _dense_rank(names) if mask is None else names
    transposed = None if mask is None else mask.t()
    pulled = h * f
    sums = _group_sums(pulled, groups[:N], len(groups))
    named, copied = len(groups) - N, setting.copied
    if for_others and named > copied:
        dg[copied:named] -= _spread(sums, None, groups[N + copied :], transposed, dtype)
    sums *= setting.duplicates
    if for_others and copied:
        dg[:copied] -= _spread(sums, None, groups[N : N + copied], transposed, dtype)
    df -= _spread(sums, None if setting.self_positive else pulled, groups[:N], transposed, dtype)
    df -= positives.mul(h)
    return df.div_(setting.temperature), dg.div_(setting.temperature)
