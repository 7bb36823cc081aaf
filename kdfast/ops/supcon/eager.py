"""The PyTorch form of supcon_loss: blocks of rows of the similarity matrix, with their positives. op.py has the formulas.

Memory is O(N D) and a few blocks. The backward pass computes the blocks again, or, if there is one only, finds its gradient saved.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from kdfast.ops.precision import arithmetic

BLOCK = 2**20  # similarities that exist at once
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
    losses = x.new_empty(N)
    dS = x.new_empty(0, len(x))
    for rows in _blocks(N, len(x)):
        losses[rows], dS = _block(x, N, rows, names, mask, setting)
    return losses, [dS if len(dS) == N else dS[:0].clone()]


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
    learning = len(x) if for_others else N
    d = x.new_zeros(learning, x.shape[1])
    for rows in _blocks(N, len(x)):
        dS = saved[0] if len(saved[0]) else _block(x, N, rows, names, mask, setting)[1]
        dS = dS * upstream[rows, None]
        d[rows].addmm_(dS, x)  # in place: autocast leaves it alone
        d.addmm_(dS[:, :learning].t(), x[rows])
    d /= setting.temperature
    if length is not None:
        length, unit = length[:learning], x[:learning]
        along = (d * unit).sum(1, keepdim=True).masked_fill_(length <= LEAST_NORM, 0)  # a clamped length is constant
        d = (d - unit * along) / length
    return d[:N].to(anchors.dtype, copy=True), d[N:].to(others.dtype, copy=True)  # an operator's results must not share memory


def saved_like(losses: Tensor, anchors: Tensor, others: Tensor, names: Tensor, mask: Tensor | None) -> list[Tensor]:
    """Makes an empty tensor like that which forward returns beside the losses [N].

    It is the gradient of loss i for row i of S, [N, N + M], or [0, N + M] if S has several blocks.
    """
    N, columns = anchors.shape[0], anchors.shape[0] + others.shape[0]
    return [losses.new_empty(N if N * columns <= BLOCK else 0, columns)]


def _blocks(N: int, columns: int) -> Iterator[slice]:
    rows = max(1, BLOCK // columns)
    return (slice(start, min(start + rows, N)) for start in range(0, N, rows))


def _join(anchors: Tensor, others: Tensor, setting: Any) -> tuple[Tensor, Tensor | None]:
    """Returns all rows in the arithmetic's dtype; with normalize of unit length, and the lengths they were divided by, [N + M, 1]."""
    x = torch.cat([rows.to(arithmetic(anchors)) for rows in (anchors, others)])
    if not setting.normalize:
        return x, None
    # squares overflow long before rows do: long rows are made shorter first
    most = torch.finfo(x.dtype).max
    length = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    scale = torch.ones_like(length).masked_fill_(length > most**0.4, most**-0.6)
    x *= scale
    length = torch.maximum(torch.linalg.vector_norm(x, dim=1, keepdim=True), LEAST_NORM * scale)
    return x.div_(length), length.div_(scale)


def _block(x: Tensor, N: int, rows: slice, names: Tensor, mask: Tensor | None, setting: Any) -> tuple[Tensor, Tensor]:
    """Computes the losses [R] of some anchors, and the gradient of each for its row of S, [R, N + M]."""
    k, finite = setting.duplicates, torch.finfo(x.dtype)
    P, S = x.new_zeros(len(x[rows]), len(x)), x.new_empty(len(x[rows]), len(x))
    P[:, : len(names)] = names[rows, None] == names if mask is None else mask[names[rows]][:, names]
    torch.addmm(S, x[rows], x.t(), beta=0, alpha=1 / setting.temperature, out=S)  # out=: autocast leaves it alone
    counted, own = slice(N + setting.copied), S.diagonal(rows.start)
    if k > 1:
        P[:, counted] *= k
    if not setting.self_positive:
        P.diagonal(rows.start).mul_((k - 1) / k)
    W = P.sum(1, keepdim=True)

    itself = own.clone()
    if k == 1:
        own.fill_(finite.min)  # no part of the maximum, exponential 0, and finite: it is multiplied by 0
    largest = S.amax(1, keepdim=True).clamp_(max=finite.max)  # infinities must not cancel
    if setting.self_positive:
        own.copy_(itself)
    S -= largest
    attraction = (P * S).sum(1, keepdim=True)
    S.exp_()
    if k > 1:
        S[:, counted] *= k
        own *= (k - 1) / k
    else:
        own.fill_(0)
    Z = S.sum(1, keepdim=True)
    per_weight = setting.scale / W.masked_fill(W < LEAST_WEIGHT, 1)
    losses = (Z.log() * W).sub_(attraction).mul_(per_weight)
    return losses.squeeze(1), S.mul_(W / Z).sub_(P).mul_(per_weight)
