"""Supervised contrastive loss: options, checks, choice of backend, autograd, registration.

Anchors f_1 .. f_N are compared with each other and with M other rows g_j that are no anchors. Every anchor stands for k equal views
(`duplicates`): f_j counts k times, f_i itself k - 1 times. Other rows are, in this order, rows of other processes, which count k times
as well (k_j = k), then the further views in contrast_mode "one" and a queue, which count once (k_j = 1):

    S_ij  = f_i . f_j / tau, and f_i . g_j / tau
    lse_i = log[(k-1) e^{S_ii} + k sum_{j != i} e^{S_ij} + sum_{j > N} k_j e^{S_ij}]
    L_i   = scale (w_i lse_i - f_i . t_i / tau) / d_i,    d_i = w_i, or 1 where w_i < 1e-6 (no positives)

t_i is the sum of the positives of i and w_i their number; with a mask, the weighted sum and the sum of weights: the positives are
a linear map P of the rows. For the upstream gradient v, with h_i = v_i scale / d_i, u_i = w_i h_i and G_ij = u_i e^{S_ij - lse_i},

    dL/df = [(G + G') f + G g - h t - P' (h f)] / tau

The kernel (kernels/supcon.py) and the PyTorch form (eager.py) compute losses and gradients from these rows. Neither knows process
groups: group.py brings the rows of other ranks here and their gradients home.
"""

import math
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.distributed as dist
from torch import Tensor

from kdfast.ops import checks, gather
from kdfast.ops.backend import chooses_kernel, kernel
from kdfast.ops.precision import arithmetic
from kdfast.ops.registration import opaque
from kdfast.ops.supcon import eager, group

ContrastMode = Literal["all", "one"]
Reduction = Literal["mean", "sum", "none"]


@dataclass(frozen=True)
class Options:
    """Options of a call, which functional.supcon_loss documents.

    Raises:
        ValueError, TypeError: an option is out of range.
    """

    temperature: float = 0.07
    base_temperature: float | None = None
    contrast_mode: ContrastMode = "all"
    self_positive: bool = False
    duplicates: int = 1
    normalize: bool = False
    reduction: Reduction = "mean"
    group: "dist.ProcessGroup | None" = None
    uneven: bool = False

    def __post_init__(self) -> None:
        checks.positive_number("supcon_loss: temperature", self.temperature)
        if self.base_temperature is not None:
            checks.positive_number("supcon_loss: base_temperature", self.base_temperature)
        checks.is_one_of("supcon_loss: contrast_mode", self.contrast_mode, get_args(ContrastMode))
        checks.is_one_of("supcon_loss: reduction", self.reduction, get_args(Reduction))
        for name in ("self_positive", "normalize", "uneven"):
            checks.is_one_of(f"supcon_loss: {name}", getattr(self, name), (True, False))
        if not isinstance(self.duplicates, int) or self.duplicates < 1:
            raise ValueError(f"supcon_loss: duplicates must be a positive integer, got {self.duplicates!r}")
        if self.group is not None:
            gather.check_group("supcon_loss", self.group)
        elif self.uneven:
            raise ValueError("supcon_loss: uneven = True needs a group, got None")

    @property
    def ranks(self) -> "dist.ProcessGroup | None":
        """The group, if it has other ranks than this one."""
        return None if self.group is None or self.group.size() == 1 else self.group


class Setting(NamedTuple):
    """The numbers that the PyTorch form and the kernels compute with."""

    temperature: float
    scale: float  # of the losses
    duplicates: int
    self_positive: bool
    normalize: bool
    copied: int = 0  # leading other rows that count `duplicates` times, as the anchors do


# ---- entry and checks ------------------------------------------------------------------------------------------------


def supcon_loss(
    features: Tensor, labels: Tensor | None, mask: Tensor | None, contrast: Tensor | None, contrast_labels: Tensor | None, options: Options
) -> Tensor:
    """Computes kdfast.functional.supcon_loss, which documents it."""
    _check_rows(features, contrast, options.duplicates)
    _check_positives(features, labels, mask, contrast, contrast_labels)
    ranks, in_all = options.ranks, options.contrast_mode == "all"
    if mask is not None and ranks is not None:
        raise ValueError(f"supcon_loss: mask must be None with a group of {ranks.size()} ranks, whose rows it does not cover: give labels")

    views = features[:, None] if features.ndim == 2 else features.flatten(2)
    B, V, D = views.shape
    # rows of one name are positives: the label, or the sample's number; a copy, for the caller may overwrite labels before backward
    names = torch.arange(B, device=features.device) if labels is None else labels.reshape(-1).to(features.device, copy=True)
    anchors = views.reshape(B * V, D) if in_all else views[:, 0]
    rows, row_names = [anchors], [_repeat(names, V if in_all else 1)]
    samples = names  # of all ranks
    if ranks is not None:
        foreign, foreign_names = group.rows_of_other_ranks(views, None if labels is None else names, ranks, options.uneven)
        rows.append(foreign)
        row_names.append(_repeat(foreign_names, V))
        samples = torch.cat([names, foreign_names])
    if not in_all and V > 1:
        rows.append(views[:, 1:].reshape(B * (V - 1), D))
        row_names.append(_repeat(names, V - 1))
    if contrast is not None:
        rows.append(contrast)
    if contrast_labels is not None:
        row_names.append(contrast_labels.reshape(-1).to(names.device))
    others = torch.cat(rows[1:]) if len(rows) > 1 else views.new_empty(0, D)

    copied = V * (len(samples) - B)
    if not len(anchors) or (len(anchors) + copied) * options.duplicates + len(others) - copied < 2:  # nothing to contrast
        # with a term for the other rows: a rank without rows must take part in the backward pass
        losses = 0 * (anchors.sum(1, dtype=arithmetic(anchors)) + others.sum(dtype=arithmetic(anchors)))
    else:
        temperature = float(options.temperature)
        scale = 1.0 if options.base_temperature is None else temperature / float(options.base_temperature)
        setting = Setting(temperature, scale, options.duplicates, options.self_positive, options.normalize, copied)
        mask = None if mask is None else mask.detach().to(features.device)
        if torch.compiler.is_compiling():
            chooses_kernel(anchors, others)  # a graph depends on the backend: reading it here makes torch.compile guard it
        losses = _SupCon.apply(anchors, others, torch.cat(row_names) if len(row_names) > 1 else row_names[0], mask, setting)
    kept: Tensor | int = len(samples)
    if labels is not None:
        losses = losses.where(_counts(row_names[0]), 0)
        kept = _counts(samples).sum()
    return _reduce(losses, (B, V) if in_all else None, kept, options)


def _repeat(names: Tensor, count: int) -> Tensor:
    return names[:, None].expand(-1, count).reshape(-1)


def _counts(names: Tensor) -> Tensor:
    """Tells which labels are none; in float64, because -100 is 156 to uint8."""
    return names.double() != checks.IGNORED


def _reduce(losses: Tensor, views: tuple[int, int] | None, samples: Tensor | int, options: Options) -> Tensor:
    """Reduces the anchors' losses; `views`: B and V where all views are anchors; `samples`: the number of all ranks' labelled ones."""
    copies = options.duplicates if views else 1
    if options.reduction == "none":
        return losses.view(views).repeat(1, copies) if views else losses
    total = losses.sum() if options.ranks is None else gather.sum_over_ranks(losses.sum(), options.ranks)
    if options.reduction == "sum":
        return copies * total
    anchors = samples * (views[1] if views else 1)
    return total / (anchors.clamp(min=1) if isinstance(anchors, Tensor) else max(anchors, 1))


def _check_rows(features: Tensor, contrast: Tensor | None, duplicates: int) -> None:
    checks.is_tensor("supcon_loss: features", features)
    if features.ndim < 2 or (features.ndim > 2 and features.shape[1] == 0):
        raise ValueError(f"supcon_loss: features must be [B, V, D] or [B, D], got shape {tuple(features.shape)}")
    checks.is_floating("supcon_loss: features", features)
    if duplicates > 1 and features.ndim != 2:
        raise ValueError(f"supcon_loss: duplicates = {duplicates} needs features [B, D], got shape {tuple(features.shape)}")
    if contrast is None:
        return
    checks.is_tensor("supcon_loss: contrast", contrast)
    D = features.shape[1] if features.ndim == 2 else math.prod(features.shape[2:])
    if contrast.ndim != 2 or contrast.shape[1] != D:
        raise ValueError(f"supcon_loss: contrast must be [M, {D}] as the features are, got shape {tuple(contrast.shape)}")
    checks.is_floating("supcon_loss: contrast", contrast)
    checks.is_on("supcon_loss: contrast", contrast, "the features' device", features.device)


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


# ---- autograd, and what torch.compile sees ---------------------------------------------------------------------------


class _SupCon(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchors: Tensor, others: Tensor, names: Tensor, mask: Tensor | None, setting: Setting) -> Tensor:
        losses, saved = _forward(anchors, others, names, mask, *setting)
        ctx.save_for_backward(anchors, others, names, checks.savable(mask), *saved)
        ctx.setting = setting
        return losses

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        checks.refuse_second_derivative("supcon_loss")
        anchors, others, names, mask, *saved = ctx.saved_tensors
        for_others = ctx.needs_input_grad[1]
        d_anchors, d_others = _backward(upstream, [anchors, others, names], mask, saved, for_others, *ctx.setting)
        return d_anchors, d_others if for_others else None, None, None, None


def _form(anchors: Tensor, others: Tensor) -> ModuleType:
    """The module whose `forward`, `backward` and `saved_like` compute with these rows."""
    return kernel("supcon", anchors, others) or eager


def _empty_losses(anchors: Tensor, others: Tensor, names: Tensor, mask: Tensor | None, *_setting: Any) -> tuple[Tensor, list[Tensor]]:
    losses = anchors.new_empty(anchors.shape[0], dtype=arithmetic(anchors))  # len() would make a number of a symbol
    return losses, _form(anchors, others).saved_like(losses, anchors, others, names, mask)


@opaque("supcon_forward", _empty_losses)
def _forward(
    anchors: Tensor, others: Tensor, names: Tensor, mask: Tensor | None,
    temperature: float, scale: float, duplicates: int, self_positive: bool, normalize: bool, copied: int,
) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
    setting = Setting(temperature, scale, duplicates, self_positive, normalize, copied)
    return _form(anchors, others).forward(anchors, others, names, mask, setting)


def _empty_gradients(
    upstream: Tensor, rows: list[Tensor], mask: Tensor | None, saved: list[Tensor], for_others: bool, *_setting: Any
) -> tuple[Tensor, Tensor]:
    anchors, others, _ = rows
    return anchors.new_empty(anchors.shape), others.new_empty(others.shape[0] if for_others else 0, others.shape[1])


@opaque("supcon_backward", _empty_gradients)
def _backward(
    upstream: Tensor, rows: list[Tensor], mask: Tensor | None, saved: list[Tensor], for_others: bool,
    temperature: float, scale: float, duplicates: int, self_positive: bool, normalize: bool, copied: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    setting = Setting(temperature, scale, duplicates, self_positive, normalize, copied)
    if saved[-1].is_floating_point():
        form: Any = eager
    else:  # only the kernels save integers, and backward runs where forward ran, whatever the backend is by now
        from kdfast.kernels import supcon as form
    return form.backward(upstream, *rows, mask, saved, setting, for_others)
