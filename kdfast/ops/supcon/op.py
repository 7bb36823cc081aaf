"""Supervised contrastive loss: checks, choice of backend, autograd, registration, and its PyTorch form in tiles.

Anchors f_1 .. f_N are contrasted with each other, every f_j counting k times (k equal views of one row: `duplicates`; f_i itself
k - 1 times), and with M other rows g_j that are no anchors (the rows of other processes, which come first and count k times like
the anchors' own, then the further views in contrast_mode "one" and a queue, which count once: k_j is k or 1):

    S_ij  = f_i . f_j / tau, and f_i . g_j / tau
    lse_i = log[(k-1) e^{S_ii} + k sum_{j != i} e^{S_ij} + sum_{j > N} k_j e^{S_ij}]
    L_i   = scale (w_i lse_i - f_i . t_i / tau) / d_i,    d_i = w_i, or 1 where w_i < 1e-6 (no positives)

t_i is the sum of the positives of i and w_i their number; with a mask, the weighted sum and the sum of weights. The positives are
a linear map P of the rows: for labels a class sum less the row itself, O(N D), for a mask one product with it. So only lse is
N x N work, and S is symmetric: the tiles on and above the diagonal serve their rows and their columns. For the upstream gradient v,
with h_i = v_i scale / d_i, u_i = w_i h_i and G_ij = u_i e^{S_ij - lse_i},

    dL/df = [(G + G') f + G g - h t - P' (h f)] / tau

Process groups end in `supcon_loss`: what follows it knows of other rows only. gather.py brings their gradients home.

A tile is recomputed once and multiplied twice, for its rows and for its columns: 4 N^2 D operations forward and backward, where
the N x N form takes 6. Memory is O(N D); a tile fits a core's second-level cache. What fits one tile is not worth the bookkeeping:
there, on a CPU, the positives are a matrix, and the gradient of the similarities is kept for backward.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from kdfast.ops import checks, gather
from kdfast.ops.backend import kernel
from kdfast.ops.precision import arithmetic

TILE = 512
# sums of up to 2^31 terms e^{+-SAFE_EXPONENT}, and weights divided by them, are normal float32 numbers: no maximum is subtracted
SAFE_EXPONENT = 40.0
LEAST_WEIGHT = 1e-6  # SupContrast's: anchors whose positives weigh less are not divided by that weight
LEAST_NORM = 1e-12  # torch.nn.functional.normalize's


class Setting(NamedTuple):
    """What one call computes, beside its tensors."""

    temperature: float
    scale: float
    duplicates: int
    self_positive: bool
    normalize: bool
    copied: int = 0
    """How many leading other rows count `duplicates` times, as the anchors do."""


# ---- entry and checks ------------------------------------------------------------------------------------------------


def supcon_loss(
    features: Tensor,
    labels: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    contrast: Tensor | None = None,
    contrast_labels: Tensor | None = None,
    temperature: float = 0.07,
    base_temperature: float | None = None,
    contrast_mode: str = "all",
    self_positive: bool = False,
    duplicates: int = 1,
    normalize: bool = False,
    reduction: str = "mean",
    group: "dist.ProcessGroup | None" = None,
    uneven: bool = False,
) -> Tensor:
    """kdfast.functional.supcon_loss, which documents it."""
    temperature, base_temperature = checked_choices(temperature, base_temperature, contrast_mode, reduction)
    _check_rows(features, contrast, duplicates)
    _check_positives(features, labels, mask, contrast, contrast_labels)
    _check_group(group, uneven, mask)
    if group is not None and group.size() == 1:
        group = None

    views = features[:, None] if features.ndim == 2 else features.flatten(2)
    B, V, D = views.shape
    in_all = contrast_mode == "all"
    anchors = views.reshape(B * V, D) if in_all else views[:, 0]
    others = [] if in_all or V == 1 else [views[:, 1:].reshape(B * (V - 1), D)]
    others += [] if contrast is None else [contrast]
    # a copy: the caller may fill his labels anew before the backward pass
    names = torch.arange(B, device=features.device) if labels is None else labels.reshape(-1).to(features.device, copy=True)
    foreign_names: Tensor | None = None
    samples = B  # of all ranks
    if group is not None:
        foreign_rows, foreign_names = _of_other_ranks(views, None if labels is None else names, group, uneven)
        others.insert(0, foreign_rows)
        samples += len(foreign_names)
    other_rows = torch.cat(others) if others else views.new_empty(0, D)
    copied = V * (samples - B)

    if not len(anchors) or (len(anchors) + copied) * duplicates + len(other_rows) - copied < 2:  # nothing to contrast
        # other rows are part of it so that a rank without rows takes its part in the backward pass
        losses = 0 * (anchors.sum(1, dtype=arithmetic(anchors)) + other_rows.sum(dtype=arithmetic(anchors)))
    else:
        names = _names_of_rows(names, foreign_names, V, in_all, contrast_labels)
        scale = 1.0 if base_temperature is None else temperature / base_temperature
        setting = Setting(float(temperature), float(scale), duplicates, self_positive, normalize, copied)
        if mask is not None:
            mask = mask.detach().to(features.device)
        losses = _SupCon.apply(anchors, other_rows, names, mask, setting)

    copies = duplicates if in_all else 1
    if reduction == "none":
        return losses.view(B, V).repeat(1, copies) if in_all else losses
    if group is not None:
        total = gather.sum_over_ranks(losses.sum(), group)
        return copies * total if reduction == "sum" else total / max(samples * (V if in_all else 1), 1)
    if reduction == "sum":
        return copies * losses.sum()
    return losses.mean() if len(losses) else losses.sum()


def _check_rows(features: Tensor, contrast: Tensor | None, duplicates: int) -> None:
    checks.is_tensor("supcon_loss: features", features)
    if features.ndim < 2 or (features.ndim > 2 and features.shape[1] == 0):
        raise ValueError(f"supcon_loss: features must be [B, V, D] or [B, D], got shape {tuple(features.shape)}")
    if not features.is_floating_point():
        raise TypeError(f"supcon_loss: features must be floating, got {features.dtype}")
    if not isinstance(duplicates, int) or duplicates < 1:
        raise ValueError(f"supcon_loss: duplicates must be a positive integer, got {duplicates!r}")
    if duplicates > 1 and features.ndim != 2:
        raise ValueError(f"supcon_loss: duplicates = {duplicates} needs features [B, D], got shape {tuple(features.shape)}")
    if contrast is None:
        return
    checks.is_tensor("supcon_loss: contrast", contrast)
    D = features.shape[1] if features.ndim == 2 else math.prod(features.shape[2:])
    if contrast.ndim != 2 or contrast.shape[1] != D:
        raise ValueError(f"supcon_loss: contrast must be [M, {D}] as the features are, got shape {tuple(contrast.shape)}")
    if not contrast.is_floating_point():
        raise TypeError(f"supcon_loss: contrast must be floating, got {contrast.dtype}")
    if contrast.device != features.device:
        raise ValueError(f"supcon_loss: contrast must be on the features' device {features.device}, got {contrast.device}")


def _check_positives(
    features: Tensor, labels: Tensor | None, mask: Tensor | None, contrast: Tensor | None, contrast_labels: Tensor | None
) -> None:
    B = len(features)
    for name, tensor in (("labels", labels), ("mask", mask), ("contrast_labels", contrast_labels)):
        if tensor is not None:
            checks.is_tensor(f"supcon_loss: {name}", tensor)
    if labels is not None and mask is not None:
        raise ValueError("supcon_loss: give labels or mask, got both")
    if labels is not None and labels.numel() != B:
        raise ValueError(f"supcon_loss: labels must hold one label for each of the {B} samples, got shape {tuple(labels.shape)}")
    if mask is not None and mask.shape != (B, B):
        raise ValueError(f"supcon_loss: mask must be [{B}, {B}], got shape {tuple(mask.shape)}")
    if mask is not None and (mask.is_complex() or mask.requires_grad):
        raise TypeError(f"supcon_loss: mask must be bool, int or floating and not require grad, got {mask.dtype}")
    if contrast_labels is None:
        return
    if contrast is None or labels is None:
        raise ValueError("supcon_loss: contrast_labels need labels and contrast, got contrast_labels without them")
    if contrast_labels.numel() != len(contrast):
        wanted = f"one label for each of the {len(contrast)} rows of contrast"
        raise ValueError(f"supcon_loss: contrast_labels must hold {wanted}, got shape {tuple(contrast_labels.shape)}")


def checked_choices(
    temperature: float, base_temperature: float | None = None, contrast_mode: str = "all", reduction: str = "mean"
) -> tuple[float, float | None]:
    """The temperatures as numbers; raises one sentence that names an option which is out of range whatever the tensors."""
    temperature = checks.number("supcon_loss: temperature", temperature)
    base_temperature = None if base_temperature is None else checks.number("supcon_loss: base_temperature", base_temperature)
    if not 0 < temperature < math.inf:
        raise ValueError(f"supcon_loss: temperature must be positive, got {temperature}")
    if base_temperature is not None and not 0 < base_temperature < math.inf:
        raise ValueError(f"supcon_loss: base_temperature must be positive, got {base_temperature}")
    if contrast_mode not in ("all", "one"):
        raise ValueError(f"supcon_loss: contrast_mode must be 'all' or 'one', got {contrast_mode!r}")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"supcon_loss: reduction must be 'mean', 'sum' or 'none', got {reduction!r}")
    return temperature, base_temperature


def _check_group(group: Any, uneven: bool, mask: Tensor | None) -> None:
    if group is None:
        if uneven:
            raise ValueError("supcon_loss: uneven = True needs a group, got None")
        return
    gather.check_group("supcon_loss", group)
    if mask is not None and group.size() > 1:
        raise ValueError(f"supcon_loss: mask must be None with a group of {group.size()} ranks, whose rows it does not cover: give labels")


def _of_other_ranks(views: Tensor, labels: Tensor | None, group: "dist.ProcessGroup", uneven: bool) -> tuple[Tensor, Tensor]:
    """The rows of the other ranks, all views of theirs, and the names of their samples."""
    B, V, D = views.shape
    sizes = gather.sizes_of_ranks(B, group, views.device) if uneven else [B] * group.size()
    rows = gather.rows_of_others(views.reshape(B * V, D), [V * size for size in sizes], group)
    if labels is None:  # any numbers but this rank's own, 0 .. B - 1
        return rows, torch.arange(B, sum(sizes), device=views.device)
    return rows, gather.names_of_others(labels, sizes, group)


def _names_of_rows(names: Tensor, foreign: Tensor | None, V: int, in_all: bool, contrast_labels: Tensor | None) -> Tensor:
    """The name of every row that is somebody's positive: [N], or [N + M'] with the first M' of the other rows.

    Rows of one name are each other's positives. It is the label, or the number of the sample (SimCLR, and with a mask).
    """

    def of_views(names: Tensor, count: int) -> Tensor:
        return names[:, None].expand(len(names), count).reshape(-1) if count != 1 else names

    rows = [of_views(names, V)] if in_all else [names]
    rows += [] if foreign is None else [of_views(foreign, V)]
    rows += [] if in_all or V == 1 else [of_views(names, V - 1)]
    rows += [] if contrast_labels is None else [contrast_labels.reshape(-1).to(names.device)]
    return torch.cat(rows) if len(rows) > 1 else rows[0]


# ---- autograd --------------------------------------------------------------------------------------------------------


class _SupCon(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchors: Tensor, others: Tensor, names: Tensor, mask: Tensor | None, setting: Setting) -> Tensor:
        # fixed here for the backward pass too; a compiled graph asks when it runs
        run, ctx.run_backward = (_registered, None) if torch.compiler.is_compiling() else _implementation(anchors, others)
        losses, kept = run(anchors, others, names, mask, setting)
        ctx.save_for_backward(anchors, others, names, mask, *kept)
        ctx.setting = setting
        return losses

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        compiling = torch.compiler.is_compiling()
        if torch.is_grad_enabled() and not compiling:
            raise RuntimeError("supcon_loss has no second derivative: call backward() or grad() without create_graph=True")
        run = _registered_backward if compiling else ctx.run_backward
        anchors, others, names, mask, *kept = ctx.saved_tensors
        for_others = ctx.needs_input_grad[1]
        d_anchors, d_others = run(upstream, anchors, others, names, mask, kept, ctx.setting, for_others)
        return d_anchors, d_others if for_others else None, None, None, None


def _implementation(anchors: Tensor, others: Tensor) -> tuple[Callable, Callable]:
    """The functions that run forward and backward for these rows.

    forward(anchors [N, D], others [M, D], names [N + M'], mask [B, B] or None, setting) -> the losses [N], and what backward needs:
        [m [N], Z [N], t [N, D], w [N]] with lse = m + log Z, or one matrix for a few rows on a CPU; the kernel's own.
    backward(upstream [N], anchors, others, names, mask, kept, setting, for_others) -> the gradients of sum(upstream * losses) for
        the anchors [N, D] and the others ([M, D]; [0, D] unless for_others), in the rows' dtypes.
    """
    module = kernel("supcon", anchors, others)
    if module is not None:
        return module.forward, module.backward
    return (matrix_forward, matrix_backward) if _is_small(anchors, others) else (tiled_forward, tiled_backward)


def _is_small(anchors: Tensor, others: Tensor) -> bool:
    return anchors.device.type == "cpu" and len(anchors) + len(others) <= TILE


# ---- what torch.compile sees -----------------------------------------------------------------------------------------


def _registered(anchors: Tensor, others: Tensor, names: Tensor, mask: Tensor | None, setting: Setting) -> tuple[Tensor, list[Tensor]]:
    return _forward_op(anchors, others, names, mask, *setting)


def _registered_backward(
    upstream: Tensor,
    anchors: Tensor,
    others: Tensor,
    names: Tensor,
    mask: Tensor | None,
    kept: list[Tensor],
    setting: Setting,
    for_others: bool,
) -> tuple[Tensor, Tensor]:
    return _backward_op(upstream, anchors, others, names, mask, kept, for_others, *setting)


@torch.library.custom_op("kdfast::supcon_forward", mutates_args=())
def _forward_op(
    anchors: Tensor,
    others: Tensor,
    names: Tensor,
    mask: Tensor | None,
    temperature: float,
    scale: float,
    duplicates: int,
    self_positive: bool,
    normalize: bool,
    copied: int,
) -> tuple[Tensor, list[Tensor]]:
    run = _implementation(anchors, others)[0]
    return run(anchors, others, names, mask, Setting(temperature, scale, duplicates, self_positive, normalize, copied))


@_forward_op.register_fake
def _(anchors: Tensor, others: Tensor, names: Tensor, mask: Tensor | None, *_rest: Any) -> tuple[Tensor, list[Tensor]]:
    N, M = anchors.shape[0], others.shape[0]  # len() would make a number of a symbol
    row = anchors.new_empty(N, dtype=arithmetic(anchors))
    module = kernel("supcon", anchors, others)
    if module is not None:
        return row, [*(row.new_empty(N) for _ in range(3)), names.new_empty(names.shape, dtype=module.dtype_of_names(mask))]
    if _is_small(anchors, others):
        return row, [row.new_empty(N, N + M)]
    return row, [row.new_empty(N), row.new_empty(N), row.new_empty(anchors.shape), row.new_empty(N)]


@torch.library.custom_op("kdfast::supcon_backward", mutates_args=())
def _backward_op(
    upstream: Tensor,
    anchors: Tensor,
    others: Tensor,
    names: Tensor,
    mask: Tensor | None,
    kept: list[Tensor],
    for_others: bool,
    temperature: float,
    scale: float,
    duplicates: int,
    self_positive: bool,
    normalize: bool,
    copied: int,
) -> tuple[Tensor, Tensor]:
    setting = Setting(temperature, scale, duplicates, self_positive, normalize, copied)
    # where forward ran, whatever the backend is by now: only the kernels keep whole numbers
    if not kept[-1].is_floating_point():
        from kdfast.kernels.supcon import backward as run
    else:
        run = matrix_backward if len(kept) == 1 else tiled_backward
    return run(upstream, anchors, others, names, mask, kept, setting, for_others)


@_backward_op.register_fake
def _(
    upstream: Tensor, anchors: Tensor, others: Tensor, names: Tensor, mask: Tensor | None, kept: list[Tensor], for_others: bool, *_rest: Any
) -> tuple[Tensor, Tensor]:
    return anchors.new_empty(anchors.shape), others.new_empty(others.shape[0] if for_others else 0, others.shape[1])


# ---- in PyTorch: rows, and one matrix for few of them ----------------------------------------------------------------


def _rows(x: Tensor, dtype: torch.dtype, normalize: bool) -> tuple[Tensor, Tensor | None]:
    """The rows in the arithmetic's dtype, of unit length if asked for, and the lengths they were divided by."""
    x = x.to(dtype).contiguous()
    if not normalize:
        return x, None
    length = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    most = torch.finfo(dtype).max
    long = length > most**0.4
    if x.device.type != "cpu" or long.any():  # for another device's answer the host would wait
        # squares overflow long before rows do: these rows are made shorter first
        scale = torch.ones_like(length).masked_fill_(long, most**-0.6)
        x = x * scale
        length = torch.maximum(torch.linalg.vector_norm(x, dim=1, keepdim=True), LEAST_NORM * scale)
        return x.div_(length), length.div_(scale)
    return x / length.clamp_min_(LEAST_NORM), length


def _through_rows(d: Tensor, unit: Tensor, length: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The gradient for the rows as they came, from that for the rows that _rows made of them."""
    if length is not None:
        along = (d * unit).sum(1, keepdim=True).masked_fill_(length <= LEAST_NORM, 0)  # a clamped length is constant
        d = (d - unit * along) / length
    return d.to(dtype)


def _divisors(weights: Tensor) -> Tensor:
    return weights.masked_fill(weights < LEAST_WEIGHT, 1)


def _positive_matrix(N: int, M: int, names: Tensor, mask: Tensor | None, setting: Setting, dtype: torch.dtype) -> Tensor:
    """P [N, N + M]."""
    k = setting.duplicates
    P = (names[:N, None] == names).to(dtype) if mask is None else mask[names[:N]][:, names].to(dtype)
    if len(names) < N + M:
        P = F.pad(P, (0, N + M - len(names)))
    if k > 1:
        P[:, : N + setting.copied] *= k
    if not setting.self_positive:
        P.fill_diagonal_(0) if k == 1 else P.diagonal().mul_((k - 1) / k)
    return P


def matrix_forward(anchors: Tensor, others: Tensor, names: Tensor, mask: Tensor | None, setting: Setting) -> tuple[Tensor, list[Tensor]]:
    """The losses [N], and [the gradient of loss i for row i of S, [N, N + M]]."""
    N, M, dtype, k = len(anchors), len(others), arithmetic(anchors), setting.duplicates
    f = _rows(anchors, dtype, setting.normalize)[0]
    columns = torch.cat([f, _rows(others, dtype, setting.normalize)[0]]) if M else f
    P = _positive_matrix(N, M, names, mask, setting, dtype)
    weights = P.sum(1, keepdim=True)

    S = _similarities(f.new_empty(N * (N + M)), f, columns, setting.temperature)
    own = S.diagonal().clone() if k == 1 and setting.self_positive else None
    if k == 1:
        S.fill_diagonal_(torch.finfo(dtype).min)  # no part of the maximum, exponential 0, and finite: it is multiplied by 0
    largest = S.amax(1, keepdim=True).clamp_(max=torch.finfo(dtype).max)  # infinities are not to cancel
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


def matrix_backward(
    upstream: Tensor,
    anchors: Tensor,
    others: Tensor,
    names: Tensor,
    mask: Tensor | None,
    kept: list[Tensor],
    setting: Setting,
    for_others: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of sum(upstream * losses) for the anchors [N, D] and, if asked for, the others [M, D]."""
    N, M, dtype, per_tau = len(anchors), len(others), arithmetic(anchors), 1 / setting.temperature
    f, f_length = _rows(anchors, dtype, setting.normalize)
    dS = upstream[:, None] * kept[0]
    square = dS[:, :N]
    df = torch.empty_like(f)
    torch.addmm(df, square + square.t(), f, beta=0, alpha=per_tau, out=df)
    if not M:
        return _through_rows(df, f, f_length, anchors.dtype), others.new_empty(0, others.shape[1])
    g, g_length = _rows(others, dtype, setting.normalize)
    df.addmm_(dS[:, N:], g, alpha=per_tau)
    d_anchors = _through_rows(df, f, f_length, anchors.dtype)
    if not for_others:
        return d_anchors, others.new_empty(0, others.shape[1])
    dg = torch.empty_like(g)
    torch.addmm(dg, dS[:, N:].t(), f, beta=0, alpha=per_tau, out=dg)
    return d_anchors, _through_rows(dg, g, g_length, others.dtype)


# ---- in PyTorch: positives by sums over their groups -----------------------------------------------------------------


def _dense_rank(names: Tensor) -> Tensor:
    """0, 1, 2 ... for the distinct names in ascending order; torch.unique would wait for the device."""
    ordered, order = names.sort()
    steps = (ordered[1:] != ordered[:-1]).cumsum(0)
    return torch.zeros_like(order).scatter_(0, order[1:], steps)


def _group_sums(rows: Tensor, groups: Tensor, count: int) -> Tensor:
    """The sums over the rows of each of the groups 0 .. count - 1: float64 [count, D].

    In float64 because an anchor is subtracted from its own group's sum again: what is left may be far smaller.
    """
    return rows.new_zeros(count, rows.shape[1], dtype=torch.float64).index_add_(0, groups, rows.double())


def _spread(sums: Tensor, itself: Tensor | None, groups: Tensor, mask: Tensor | None, dtype: torch.dtype) -> Tensor:
    """For the rows in these groups the sums over their positives, `itself` (if given) not being one."""
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


# ---- in PyTorch: tiles -----------------------------------------------------------------------------------------------


def _blocks(rows: int) -> list[slice]:
    return [slice(start, min(start + TILE, rows)) for start in range(0, rows, TILE)]


def _needs_no_maximum(f: Tensor, g: Tensor, setting: Setting) -> bool:
    """Whether every |S_ij| is below SAFE_EXPONENT for sure, so that e^S can be summed as it is."""
    if setting.normalize:
        return 1 / setting.temperature <= SAFE_EXPONENT
    if f.device.type != "cpu":  # reading a number back would make the host wait
        return False
    longest = torch.linalg.vector_norm(f, dim=1).max()
    across = torch.maximum(longest, torch.linalg.vector_norm(g, dim=1).max()) if len(g) else longest
    return bool(longest * across <= SAFE_EXPONENT * setting.temperature)


def _similarities(out: Tensor, a: Tensor, b: Tensor, temperature: float) -> Tensor:
    """The products a b' / temperature, in the memory of `out`."""
    tile = out[: len(a) * len(b)].view(len(a), len(b))
    return torch.addmm(tile, a, b.t(), beta=0, alpha=1 / temperature, out=tile)  # out=: autocast leaves it alone


def _square_tiles(f: Tensor, setting: Setting, direct: bool) -> Iterator[tuple[slice, slice, Tensor]]:
    """The tiles of S (direct: of e^S) among anchors on and above the diagonal, its own entries weighed (k - 1) / k.

    Each is in the same memory, and the caller's to overwrite.
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


def _oblong_tiles(f: Tensor, g: Tensor, setting: Setting, direct: bool) -> Iterator[tuple[slice, slice, Tensor]]:
    """The tiles of S (direct: of e^S) between anchors and other rows."""
    memory = f.new_empty(min(len(f), TILE) * min(len(g), TILE))
    for rows in _blocks(len(f)):
        for columns in _blocks(len(g)):
            tile = _similarities(memory, f[rows], g[columns], setting.temperature)
            yield rows, columns, tile.exp_() if direct else tile


def _denominators(f: Tensor, g: Tensor, setting: Setting) -> tuple[Tensor, Tensor]:
    """Two [N], m and Z with lse = m + log Z: kept apart, for the sum may round off what Z says of differences in a large S."""
    direct = _needs_no_maximum(f, g, setting)
    finite = torch.finfo(f.dtype)
    m, Z = f.new_full((len(f),), 0.0 if direct else finite.min), f.new_zeros(len(f))

    def add(rows: slice, tile: Tensor, dim: int) -> None:
        if direct:
            Z[rows] += tile.sum(dim)
            return
        larger = torch.maximum(m[rows], tile.amax(dim)).clamp_(finite.min, finite.max)  # infinities are not to cancel
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


def _denominator_gradients(f: Tensor, g: Tensor, m: Tensor, share: Tensor, setting: Setting, for_others: bool) -> tuple[Tensor, Tensor]:
    """For f [N, D] and, if asked for, g [M, D], with G_ij = share_i e^{S_ij - m_i}: (G + G') f + G g, and G' f."""
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


# ---- in PyTorch: the tiled whole -------------------------------------------------------------------------------------


def tiled_forward(anchors: Tensor, others: Tensor, names: Tensor, mask: Tensor | None, setting: Setting) -> tuple[Tensor, list[Tensor]]:
    """The losses [N], and [m [N], Z [N], t [N, D], w [N]] with lse = m + log Z."""
    N, dtype = len(anchors), arithmetic(anchors)
    f, g = _rows(anchors, dtype, setting.normalize)[0], _rows(others, dtype, setting.normalize)[0]
    groups = _dense_rank(names) if mask is None else names
    named, copied = len(groups) - N, setting.copied
    counted = F.pad(f, (0, 1), value=1.0)  # one more column counts the positives
    sums = _group_sums(counted, groups[:N], len(groups))
    if copied:
        sums += _group_sums(F.pad(g[:copied], (0, 1), value=1.0), groups[N : N + copied], len(groups))
    sums *= setting.duplicates
    if named > copied:
        sums += _group_sums(F.pad(g[copied:named], (0, 1), value=1.0), groups[N + copied :], len(groups))
    spread = _spread(sums, None if setting.self_positive else counted, groups[:N], mask, dtype)
    positives, weights = spread[:, :-1].contiguous(), spread[:, -1].contiguous()
    m, Z = _denominators(f, g, setting)
    attraction = (f * positives).sum(1).div_(setting.temperature)
    losses = (m + Z.log()).mul_(weights).sub_(attraction).mul_(setting.scale).div_(_divisors(weights))
    return losses, [m, Z, positives, weights]


def tiled_backward(
    upstream: Tensor,
    anchors: Tensor,
    others: Tensor,
    names: Tensor,
    mask: Tensor | None,
    kept: list[Tensor],
    setting: Setting,
    for_others: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of sum(upstream * losses) for the anchors [N, D] and, if asked for, the others [M, D]."""
    m, Z, positives, weights = kept
    N, dtype = len(anchors), m.dtype
    f, f_length = _rows(anchors, dtype, setting.normalize)
    g, g_length = _rows(others, dtype, setting.normalize)
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
    d_anchors = _through_rows(df.div_(setting.temperature), f, f_length, anchors.dtype)
    return d_anchors, _through_rows(dg.div_(setting.temperature), g, g_length, others.dtype) if for_others else dg.to(others.dtype)
