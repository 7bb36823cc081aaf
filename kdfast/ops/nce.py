"""Noise-contrastive estimation against a memory bank: checks, choice of backend, autograd, registration, and its PyTorch form in chunks.

Each of B anchors v_i is compared with 1 + K of the bank's n rows, x_ik: first its positive, then negatives. As in CRD's code the noise is
uniform, P_n = 1 / n, with m = K samples of it for each positive:

    P_ik = exp(x_ik . v_i / T) / Z
    L    = -(1/B) sum_i [log(P_i0 / (P_i0 + m P_n + eps)) + sum_k log(m P_n / (P_ik + m P_n + eps))]

With b = m P_n + eps and t_ik = log(P_ik / b) = x_ik . v_i / T - log(Z b) it is a logistic regression,

    L       = (1/B) sum_i [softplus(-t_i0) + sum_k softplus(t_ik)] + K log1p(eps / (m P_n))
    dL/dv_i = 1 / (B T) [sum_k sigmoid(t_ik) x_ik - sigmoid(-t_i0) x_i0]

so a gathered row is read once: the forward pass computes the gradient from it too, and backward only scales that. The gradient is
saved in float32 for every dtype of the anchors: float16 would lose a mean's gradient before a GradScaler's factor lifts it.

The gathered rows [B, 1 + K, D] never exist at once. The kernel (kernels/nce.py) holds a tile of one anchor's rows. The PyTorch form
gathers a chunk of columns at a time. On a CPU, if the bank has not many more rows than an anchor needs, it multiplies some anchors by the
whole bank and selects the needed products: a product costs a twentieth of a gathered row. reference.crd_loss defines the values.
"""

import math
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kdfast.ops import checks
from kdfast.ops.backend import kernel
from kdfast.ops.precision import arithmetic
from kdfast.ops.registration import opaque

EPS = 1e-7  # the authors'
CHUNK = 2**20  # elements of gathered rows, or of products, that exist at once
DENSE = 8  # up to so many bank rows for each needed row, the bank is multiplied whole (measured: equal at about 12)
DENSE_ROWS = 2**16  # larger banks are gathered from: too few anchors could be multiplied at once
UNSETTLED = -1.0  # a normalizer that is not yet known, as in the authors' code


# ---- entry and checks ------------------------------------------------------------------------------------------------


def nce_loss(anchors: Tensor, bank: Tensor, indices: Tensor, Z: Tensor, temperature: float) -> Tensor:
    """Returns the loss above.

    Args:
        anchors: v, [B, D], floating.
        bank: x, [n, D], floating; its dtype may differ. No gradient reaches it, and it may be overwritten before backward.
        indices: int64 [B, 1 + K], rows of the bank, for each anchor first its positive.
        Z: [], floating, a positive constant; see normalizer().
        temperature: T > 0.

    Returns:
        0-dim; 0 for no anchors. float32, or float64 if an input is. Equal inputs give equal bits.

    Raises:
        ValueError: shapes or devices do not fit, the temperature is not positive, or (on the CPU) an index is out of range; on a GPU
            loss and gradient are NaN then.
        TypeError: a tensor is not floating, indices are not int64, or bank or Z require grad.
        RuntimeError: the gradient is itself differentiated (create_graph=True).
    """
    _check("nce_loss", anchors, bank, indices, Z, temperature)
    if torch.is_grad_enabled() and anchors.requires_grad:
        return _NCE.apply(anchors, bank, indices, Z, float(temperature))
    return _run(anchors, bank, indices, Z, float(temperature), False)[0]


def normalizer(anchors: Tensor, bank: Tensor, indices: Tensor, temperature: float, Z: Tensor | None = None) -> Tensor:
    """Returns CRD's constant: Z itself if it is settled (positive and finite), else n times the batch's mean of exp(x_ik . v_i / T).

    The device decides; for a settled Z, the kernel and the CPU read no rows.

    Args:
        anchors: [B, D], as in nce_loss; no gradient reaches them.
        bank: [n, D].
        indices: int64 [B, 1 + K].
        temperature: T > 0.
        Z: [], floating; None: not known.

    Returns:
        0-dim, in the dtype of Z or of the arithmetic. NaN, which is unsettled, for no anchors.

    Raises:
        ValueError, TypeError: as nce_loss.
    """
    if Z is None:
        Z = torch.full((), UNSETTLED, dtype=arithmetic(anchors, bank), device=anchors.device)
    _check("normalizer", anchors, bank, indices, Z, temperature)
    return _normalizer(anchors.detach(), bank, indices, Z, float(temperature))


def is_settled(Z: Tensor) -> Tensor:
    """Tells, as a bool [] on its device, if Z is known: positive and finite, so that a first batch that overflowed does not count."""
    return Z.isfinite() & (Z > 0)


def _check(name: str, anchors: Tensor, bank: Tensor, indices: Tensor, Z: Tensor, temperature: float) -> None:
    """Raises one sentence that names the argument. The range of indices is checked later, where their values are read."""
    if anchors.dim() != 2:
        raise ValueError(f"{name}: anchors must be [B, D], got shape {tuple(anchors.shape)}")
    B, D = anchors.shape
    if bank.dim() != 2 or bank.shape[1] != D or bank.shape[0] == 0:
        raise ValueError(f"{name}: bank must be [n, {D}] as the anchors are, with at least one row, got {tuple(bank.shape)}")
    if indices.dim() != 2 or indices.shape[0] != B or indices.shape[1] == 0:
        wanted = f"[{B}, 1 + K], for each anchor its positive and K negatives"
        raise ValueError(f"{name}: indices must be {wanted}, got {tuple(indices.shape)}")
    if Z.dim() != 0:
        raise ValueError(f"{name}: Z must be 0-dim, got shape {tuple(Z.shape)}")
    for argument, tensor in (("anchors", anchors), ("bank", bank), ("Z", Z)):
        checks.is_floating(f"{name}: {argument}", tensor)
    if indices.dtype != torch.int64:
        raise TypeError(f"{name}: indices must be int64, got {indices.dtype}")
    for argument, tensor in (("bank", bank), ("indices", indices), ("Z", Z)):
        checks.is_on(f"{name}: {argument}", tensor, "the anchors' device", anchors.device)
        if tensor.requires_grad:
            raise TypeError(f"{name}: {argument} must not require grad, for only the anchors get one")
    checks.positive_number(f"{name}: temperature", temperature)


# ---- autograd, and what torch.compile sees ---------------------------------------------------------------------------


class _NCE(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchors: Tensor, bank: Tensor, indices: Tensor, Z: Tensor, temperature: float) -> Tensor:
        loss, gradient = _run(anchors, bank, indices, Z, temperature, True)
        ctx.save_for_backward(gradient)
        ctx.dtype = anchors.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None, None, None]:
        checks.refuse_second_derivative("nce_loss")
        (gradient,) = ctx.saved_tensors
        return (gradient * upstream).to(ctx.dtype), None, None, None, None


def _kernel(anchors: Tensor, bank: Tensor, Z: Tensor) -> ModuleType | None:
    module = kernel("nce", anchors, bank, Z)
    return module if module is not None and anchors.shape[1] <= module.WIDEST else None


def _empty_loss_and_gradient(
    anchors: Tensor, bank: Tensor, indices: Tensor, Z: Tensor, temperature: float, with_gradient: bool
) -> tuple[Tensor, Tensor]:
    loss = anchors.new_empty((), dtype=arithmetic(anchors, bank, Z))
    return loss, loss.new_empty(anchors.shape[0] if with_gradient else 0, anchors.shape[1])


@opaque("nce_loss", _empty_loss_and_gradient)
def _run(
    anchors: Tensor, bank: Tensor, indices: Tensor, Z: Tensor, temperature: float, with_gradient: bool
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Computes the loss [] and its gradient for the anchors, [B, D] or [0, D], by the backend in force."""
    checks.is_in_range("nce_loss: indices", indices, len(bank), ", rows of the bank")
    K, n = indices.shape[1] - 1, len(bank)
    log_b = math.log(K / n + EPS)
    constant = K * math.log1p(EPS * n / K) if K else 0.0
    module = _kernel(anchors, bank, Z)
    run = loss_and_gradient if module is None else module.loss_and_gradient
    return run(anchors, bank, indices, Z, temperature, log_b, constant, with_gradient)


def _empty_normalizer(anchors: Tensor, bank: Tensor, indices: Tensor, Z: Tensor, temperature: float) -> Tensor:
    return torch.empty_like(Z)


@opaque("nce_normalizer", _empty_normalizer)
def _normalizer(anchors: Tensor, bank: Tensor, indices: Tensor, Z: Tensor, temperature: float) -> Tensor:
    """Computes normalizer() by the backend in force; never returns Z itself, which its owner may overwrite."""
    checks.is_in_range("nce_loss: indices", indices, len(bank), ", rows of the bank")
    module = _kernel(anchors, bank, Z)
    run = mean_score if module is None else module.normalizer
    return run(anchors, bank, indices, Z, temperature)


# ---- in PyTorch ------------------------------------------------------------------------------------------------------


# anchors; if their positives are the first column; scores x . v / T [b, c], NaN if infinite or of no row of the bank, which the caller
# may overwrite; and the sum of rows weighted by [b, c], [b, D]
_Part = tuple[slice, bool, Tensor, Callable[[Tensor], Tensor]]


def _parts(v: Tensor, bank: Tensor, indices: Tensor, temperature: float) -> Iterator[_Part]:
    """Yields all scores, part by part."""
    # only on a CPU does scatter_add_ add the weights of one row in a fixed order
    if v.device.type == "cpu" and bank.dtype == v.dtype and len(bank) <= min(DENSE * indices.shape[1], DENSE_ROWS):
        return _by_anchors(v, bank, indices, temperature)
    return _by_columns(v, bank, indices, temperature)


def _by_anchors(v: Tensor, bank: Tensor, indices: Tensor, temperature: float) -> Iterator[_Part]:
    """Multiplies some anchors at a time by the whole bank and selects the needed products; indices have been checked."""
    most = max(1, CHUNK // max(len(bank), indices.shape[1]))
    finite = bank.where(bank.isfinite(), 0.0) if not math.isfinite(bank.sum().item()) else bank  # a row that no index names has weight 0
    for start in range(0, len(v), most):
        anchors = slice(start, start + most)
        index = indices[anchors]
        products = torch.mm(v[anchors], bank.T, out=v.new_empty(len(index), len(bank)))  # out=: autocast leaves it alone
        scores = products.gather(1, index).div_(temperature)

        def pull(weights: Tensor, index: Tensor = index, sums: Tensor = products) -> Tensor:
            sums.zero_().scatter_add_(1, index, weights)
            return torch.mm(sums, finite, out=v.new_empty(len(index), bank.shape[1]))

        yield anchors, True, scores.masked_fill_(~scores.isfinite(), math.nan), pull


def _by_columns(v: Tensor, bank: Tensor, indices: Tensor, temperature: float) -> Iterator[_Part]:
    """Gathers the rows [B, c, D] of some columns of all anchors at a time, into the same memory."""
    (B, D), n = v.shape, len(bank)
    width = max(1, min(CHUNK // max(1, B * D), indices.shape[1]))
    memory = bank.new_empty(B * width, D)
    for start in range(0, indices.shape[1], width):
        index = indices[:, start : start + width]
        inside = (index >= 0) & (index < n)  # all of them on a CPU, where they were checked
        rows = memory[: index.numel()]
        torch.index_select(bank, 0, index.clamp(0, n - 1).reshape(-1), out=rows)
        rows = rows.view(B, index.shape[1], D).to(v.dtype)
        scores = torch.bmm(rows, v[:, :, None], out=v.new_empty(B, index.shape[1], 1)).squeeze(2).div_(temperature)

        def pull(weights: Tensor, rows: Tensor = rows) -> Tensor:
            return torch.bmm(weights[:, None], rows, out=v.new_empty(B, 1, D)).squeeze(1)

        yield slice(0, B), start == 0, scores.where(scores.isfinite() & inside, math.nan), pull


def loss_and_gradient(
    anchors: Tensor, bank: Tensor, indices: Tensor, Z: Tensor, temperature: float, log_b: float, constant: float, with_gradient: bool
) -> tuple[Tensor, Tensor]:
    """Computes what kernels/nce.py's function of this name does; in float64 if an input is."""
    dtype, (B, D) = arithmetic(anchors, bank, Z), anchors.shape
    v = anchors.detach().to(dtype).contiguous()
    shift = Z.to(dtype).log() + log_b
    total = v.new_zeros(())
    gradient = v.new_zeros(B if with_gradient else 0, D)
    for part, has_positives, scores, pull in _parts(v, bank, indices, temperature):
        t = scores.sub_(shift)
        if has_positives:
            t[:, 0].neg_()
        total -= F.logsigmoid(-t).sum()  # softplus, exact also beyond torch's threshold
        if with_gradient:
            share = t.sigmoid_()
            if has_positives:
                share[:, 0].neg_()
            gradient[part] += pull(share)
    mean = 1 / max(B, 1)
    return total * mean + (constant if B else 0.0), gradient.mul_(mean / temperature)


def mean_score(anchors: Tensor, bank: Tensor, indices: Tensor, Z: Tensor, temperature: float) -> Tensor:
    """Computes what kernels/nce.py's normalizer does; in float64 if an input is."""
    if Z.device.type == "cpu" and is_settled(Z):  # the host would wait for another device's answer
        return Z.clone()
    v = anchors.to(arithmetic(anchors, bank, Z)).contiguous()
    total = v.new_zeros(())
    for _, _, scores, _ in _parts(v, bank, indices, temperature):
        total += scores.exp_().sum()
    made = (total / indices.numel() * len(bank) if indices.numel() else torch.full_like(total, math.nan)).to(Z.dtype)
    return torch.where(is_settled(Z), Z, made)
