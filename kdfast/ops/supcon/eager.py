"""The PyTorch form of supcon_loss: blocks of rows of S with their positives, or, for many rows with labels, tiles. op.py has the formulas.

A block holds the similarities of some anchors, [R, N + M]. If there is one only, its gradient is saved, else it is computed again.

A tile is of e^S and multiplied twice, for its rows and for its columns: 4 N^2 D operations forward and backward, where the N x N form
takes 6. It fits a core's second-level cache. Positives are sums over groups of one label, O(N D). Tiles need a bound of |S|.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kdfast.ops.precision import arithmetic

TILE = 512  # rows and columns; a block has as many similarities
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
    N, (x, _) = len(anchors), _join(anchors, others, setting)
    if _uses_tiles(x, N, mask, setting):
        return _tiled_forward(x, N, names, setting)
    blocks = _slices(0, N, max(1, TILE**2 // len(x)))
    if len(blocks) == 1:
        losses, dS = _block(x, N, blocks[0], names, mask, setting)
        return losses, [dS]
    return torch.cat([_block(x, N, rows, names, mask, setting)[0] for rows in blocks]), [x.new_empty(N)]


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
    N, (x, length) = len(anchors), _join(anchors, others, setting)
    d = torch.zeros(len(x) if for_others else N, x.shape[1], dtype=x.dtype, device=x.device)
    per_tau = 1 / setting.temperature
    if saved[0].dim() == 2:
        dS, f = upstream[:, None] * saved[0], x[:N]
        d[:N].addmm_(dS[:, :N] + dS[:, :N].t(), f, alpha=per_tau)  # in place: autocast leaves it alone
        if len(x) > N:
            d[:N].addmm_(dS[:, N:], x[N:], alpha=per_tau)
            d[N:].addmm_(dS[:, N : len(d)].t(), f, alpha=per_tau)
    elif _uses_tiles(x, N, mask, setting):
        _add_tiled_gradients(d, upstream, x, N, names, saved[0], setting)
    else:
        for rows in _slices(0, N, max(1, TILE**2 // len(x))):
            dS = upstream[rows, None] * _block(x, N, rows, names, mask, setting)[1]
            d[rows].addmm_(dS, x, alpha=per_tau)
            d.addmm_(dS[:, : len(d)].t(), x[rows], alpha=per_tau)
    if length is not None:
        unit, length = x[: len(d)], length[: len(d)]
        along = (d * unit).sum(1, keepdim=True).masked_fill_(length <= LEAST_NORM, 0)  # a clamped length is constant
        d = (d - unit * along) / length
    # an operator's results must not share memory
    d_others = d[N:].to(others.dtype, copy=True) if for_others else others.new_empty(0, others.shape[1])
    return d[:N].to(anchors.dtype, copy=for_others), d_others


def saved_like(losses: Tensor, anchors: Tensor, others: Tensor, names: Tensor, mask: Tensor | None) -> list[Tensor]:
    """Makes an empty tensor like the one that forward returns beside the losses [N].

    It is the gradient of loss i for row i of S, [N, N + M], or, for many rows, Z [N], which only tiles use.
    """
    N, columns = anchors.shape[0], anchors.shape[0] + others.shape[0]
    return [losses.new_empty((N, columns) if N * columns <= TILE**2 else (N,))]


def _slices(start: int, stop: int, step: int) -> list[slice]:
    return [slice(first, min(first + step, stop)) for first in range(start, stop, step)]


def _join(anchors: Tensor, others: Tensor, setting: Any) -> tuple[Tensor, Tensor | None]:
    """Returns all rows in the arithmetic's dtype; with normalize of unit length, and the lengths they were divided by, [N + M, 1]."""
    dtype = arithmetic(anchors)
    x = torch.cat([anchors.to(dtype), others.to(dtype)]) if len(others) else anchors.to(dtype).contiguous()
    if not setting.normalize:
        return x, None
    # squares overflow long before rows do: long rows are made shorter first
    most = torch.finfo(dtype).max
    length = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    scale = torch.ones_like(length).masked_fill_(length > most**0.4, most**-0.6)
    x = x * scale
    length = torch.maximum(torch.linalg.vector_norm(x, dim=1, keepdim=True), LEAST_NORM * scale)
    return x.div_(length), length.div_(scale)


def _divisors(weights: Tensor) -> Tensor:
    return weights.masked_fill(weights < LEAST_WEIGHT, 1)


def _similarities(out: Tensor, a: Tensor, b: Tensor, setting: Any) -> Tensor:
    return torch.addmm(out, a, b.t(), beta=0, alpha=1 / setting.temperature, out=out)  # out=: autocast leaves it alone


# ---- blocks ----------------------------------------------------------------------------------------------------------


def _block(x: Tensor, N: int, rows: slice, names: Tensor, mask: Tensor | None, setting: Any) -> tuple[Tensor, Tensor]:
    """Computes the losses [R] of some anchors, and the gradient of each for its row of S, [R, N + M]."""
    k, finite = setting.duplicates, torch.finfo(x.dtype)
    P = (names[rows, None] == names).to(x.dtype) if mask is None else mask[names[rows]][:, names].to(x.dtype)
    if len(names) < len(x):
        P = F.pad(P, (0, len(x) - len(names)))
    if k > 1:
        P[:, : N + setting.copied] *= k
    if not setting.self_positive:
        P[:, rows].fill_diagonal_(0) if k == 1 else P.diagonal(rows.start).mul_((k - 1) / k)
    W = P.sum(1, keepdim=True)

    S = _similarities(x.new_empty(P.shape), x[rows], x, setting)
    own = S.diagonal(rows.start)
    itself = own.clone() if setting.self_positive else None
    if k == 1:
        own.fill_(finite.min)  # no part of the maximum, exponential 0, and finite: it is multiplied by 0
    largest = S.amax(1, keepdim=True).clamp_(max=finite.max)  # infinities must not cancel
    if itself is not None:
        own.copy_(itself)
    S.sub_(largest)
    attraction = (P * S).sum(1, keepdim=True)
    S.exp_()
    if k > 1:
        S[:, : N + setting.copied] *= k
        own.mul_((k - 1) / k)
    elif itself is not None:
        own.fill_(0)
    Z = S.sum(1, keepdim=True)
    per_weight = setting.scale / _divisors(W)
    losses = (Z.log() * W).sub_(attraction).mul_(per_weight)
    return losses.squeeze(1), S.mul_(W / Z).sub_(P).mul_(per_weight)


# ---- tiles -----------------------------------------------------------------------------------------------------------


def _uses_tiles(x: Tensor, N: int, mask: Tensor | None, setting: Any) -> bool:
    """Tells if there are many rows, and every |S_ij| is certainly below SAFE_EXPONENT, so that e^S can be summed as it is."""
    if N * len(x) <= TILE**2 or mask is not None:
        return False
    if setting.normalize:
        return 1 / setting.temperature <= SAFE_EXPONENT
    if not x.is_cpu:  # the host would wait for the number
        return False
    length = torch.linalg.vector_norm(x, dim=1)
    return bool(length[:N].max() * length.max() <= SAFE_EXPONENT * setting.temperature)


def _exponentials(x: Tensor, N: int, setting: Any) -> Iterator[tuple[slice, slice, Tensor]]:
    """Yields the tiles of e^S on and above the diagonal, whose own entries weigh (k - 1) / k: in one memory, which may be overwritten."""
    memory, k = x.new_empty(TILE**2), setting.duplicates
    anchors, others = _slices(0, N, TILE), _slices(N, len(x), TILE)
    for number, rows in enumerate(anchors):
        for columns in anchors[number:] + others:
            shape = rows.stop - rows.start, columns.stop - columns.start
            tile = _similarities(memory[: shape[0] * shape[1]].view(shape), x[rows], x[columns], setting).exp_()
            if columns is rows:
                tile.diagonal().mul_((k - 1) / k)
            yield rows, columns, tile


def _counts(x: Tensor, N: int, setting: Any) -> Tensor:
    """Returns how often each column counts, [N + M]."""
    return x.new_ones(len(x)).index_fill_(0, torch.arange(N + setting.copied, device=x.device), setting.duplicates)


def _positives(x: Tensor, N: int, names: Tensor, setting: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the groups of the named rows, numbers from 0 on; and of each anchor the sum and the number of its positives."""
    ordered, order = names.sort()
    steps = (ordered[1:] != ordered[:-1]).cumsum(0)  # torch.unique would wait for the device
    groups = torch.zeros_like(order).scatter_(0, order[1:], steps)
    rows = F.pad(x[: len(names)], (0, 1), value=1.0)  # one more column counts the positives
    sums = _spread(_counts(x, N, setting)[: len(names), None] * rows, groups, N)
    if not setting.self_positive:
        sums -= rows[:N]
    return groups, sums[:, :-1].to(x.dtype), sums[:, -1].to(x.dtype)


def _spread(rows: Tensor, groups: Tensor, receivers: int) -> Tensor:
    """Sums the rows of each group; returns the sum of its own group for each of the first rows, as many as `receivers`.

    In float64, because an anchor is subtracted from its own group's sum again, and the rest may be far smaller.
    """
    sums = rows.new_zeros(len(groups), rows.shape[1], dtype=torch.float64)
    return sums.index_add_(0, groups[: len(rows)], rows.double()).index_select(0, groups[:receivers])


def _tiled_forward(x: Tensor, N: int, names: Tensor, setting: Any) -> tuple[Tensor, list[Tensor]]:
    counts, Z = _counts(x, N, setting), x.new_zeros(N)
    for rows, columns, tile in _exponentials(x, N, setting):
        Z[rows].addmv_(tile, counts[columns])
        if columns is not rows and columns.stop <= N:
            Z[columns].addmv_(tile.t(), counts[rows])
    _, positives, weights = _positives(x, N, names, setting)
    attraction = (x[:N] * positives).sum(1).div_(setting.temperature)
    return Z.log().mul_(weights).sub_(attraction).mul_(setting.scale).div_(_divisors(weights)), [Z]


def _add_tiled_gradients(d: Tensor, upstream: Tensor, x: Tensor, N: int, names: Tensor, Z: Tensor, setting: Any) -> None:
    """Adds the gradients of the first rows of x to d, which is 0."""
    groups, positives, weights = _positives(x, N, names, setting)
    h = upstream * setting.scale / _divisors(weights)
    # G_ij + G_ji = e^S_ij (share_i c_j / c_i + share_j): the two share their exponential
    counts = _counts(x, N, setting)
    share, relative = F.pad(weights * h / Z * counts[0], (0, len(x) - N)), counts / counts[0]
    memory = x.new_empty(TILE**2)
    for rows, columns, tile in _exponentials(x, N, setting):
        factor = memory[: tile.numel()].view(tile.shape)
        tile.mul_(torch.addcmul(share[columns], share[rows, None], relative[columns], out=factor))
        d[rows].addmm_(tile, x[columns])
        if columns is not rows and columns.stop <= len(d):
            d[columns].addmm_(tile.t(), x[rows])
    pulled, named = h[:, None] * x[:N], min(len(names), len(d))
    pull = counts[:named, None] * _spread(pulled, groups, named)
    if not setting.self_positive:
        pull[:N] -= pulled
    d[:named] -= pull.to(d.dtype)
    d[:N] -= h[:, None] * positives
    d /= setting.temperature
