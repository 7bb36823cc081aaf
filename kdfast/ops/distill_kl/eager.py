"""Logit distillation by PyTorch operations: the form that runs where the Triton kernel does not. ops/distill_kl.py has the mathematics.

The batch is walked in chunks of rows that stay in cache. KL is summed as p (log p - log q) + q - p: the last two add 0 to a row and
cancel the rounding of the logarithms, which at a high temperature are nearly equal.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from kdfast.ops.precision import arithmetic


class Options(NamedTuple):
    """What a call was asked for, beyond its tensors; the names are those of kd_loss."""

    temperature: float
    standardize: bool
    eps: float
    kd_weight: float
    ce_weight: float
    teacher_weights: tuple[float, ...]
    label_smoothing: float
    ignore_index: int
    divergence: str
    reduction: str


CHUNK = 2**16  # elements a thread: a handful of float32 temporaries of that size stay in its second-level cache
CHUNK_OFF_CPU = 2**26  # elements in all: few launches, bounded memory
# of so few standardized classes a gradient's sum, 0 but for rounding, is no small part of it once it is divided by a row's width
FEW = 128

Scale = float | Tensor  # of a loss and its gradients: one number, or one a row, [R, 1]


def loss_and_gradients(
    student: Tensor,
    teachers: Sequence[Tensor],
    labels: Tensor | None,
    options: Options,
    wanted: Sequence[bool],
    upstream: Tensor | None,
) -> tuple[Tensor, list[Tensor], None]:
    """The loss and its gradients, times `upstream` where given. Call it where autograd records nothing.

    Args:
        student: [..., C], floating.
        teachers: each [..., C], floating.
        labels: int64 [...], or None.
        options: see Options.
        wanted: for the student and each teacher, whether its gradient is computed.
        upstream: the gradient of the loss, in the loss's shape.

    Returns:
        The loss, [] or [...] for reduction "none", float32 (float64 if an input is), the wanted gradients in order, each
        contiguous in its input's shape and dtype, and None: no factor is left to apply to them.
    """
    loss, gradients = _batch(student, teachers, labels, options, wanted, upstream, zero_terms=not student.is_cpu)
    if student.is_cpu and not math.isfinite((loss.sum() if loss.dim() else loss).item()):
        # rare: a logit of -inf made 0 * inf where the class counts for nothing; once more, with such terms set to 0
        loss, gradients = _batch(student, teachers, labels, options, wanted, upstream, zero_terms=True)
    return loss, gradients, None


def rescale(gradients: Sequence[Tensor], upstream: Tensor, remaining: None) -> None:
    """Multiplies the gradients by the gradient of the loss, in place."""
    if not upstream.is_cpu or upstream.dim() or upstream.item() != 1:
        for gradient in gradients:
            gradient.mul_(upstream[..., None])  # of one dimension at least: without, it would be rounded to a 16-bit gradient's dtype


def _batch(
    student: Tensor,
    teachers: Sequence[Tensor],
    labels: Tensor | None,
    options: Options,
    wanted: Sequence[bool],
    upstream: Tensor | None,
    zero_terms: bool,
) -> tuple[Tensor, list[Tensor]]:
    shape = student.shape
    C = shape[-1]
    inputs = [student, *teachers]
    if len(shape) != 2:
        inputs = [x.reshape(-1, C) for x in inputs]
    N = inputs[0].shape[0]
    dtype = arithmetic(*inputs)
    labels, dropped, broken = _readable(labels, C, options.ignore_index)

    scale: Scale = 1.0
    if options.reduction == "mean":
        scale = 1 / max(N, 1) if dropped is None else (N - dropped.sum(dtype=dtype)).clamp_min_(1.0).reciprocal_()
    if upstream is not None:
        scale = upstream.to(dtype).reshape(-1, 1) * scale
    if isinstance(scale, Tensor):
        scale = scale.reshape(-1, 1).expand(N, 1)

    step = max(1, (CHUNK * torch.get_num_threads() if student.is_cpu else CHUNK_OFF_CPU) // C)
    if step >= N:
        rows, gradients = _chunk(inputs, dtype, labels, options, wanted, scale, zero_terms)
    else:
        rows = student.new_empty(N, 1, dtype=dtype)
        gradients = [x.new_empty(N, C) for need, x in zip(wanted, inputs) if need]
        for start in range(0, N, step):
            part = slice(start, start + step)
            rows[part], pieces = _chunk(
                [x[part] for x in inputs],
                dtype,
                None if labels is None else labels[part],
                options,
                wanted,
                scale[part] if isinstance(scale, Tensor) else scale,
                zero_terms,
            )
            for gradient, piece in zip(gradients, pieces):
                gradient[part] = piece

    if dropped is not None:
        for x in (rows, *gradients):
            x.masked_fill_(dropped, 0)
            if broken is not None:
                x.masked_fill_(broken, math.nan)
    loss = rows.view(shape[:-1]) if options.reduction == "none" else rows.sum()
    if len(shape) != 2:
        gradients = [g.view(shape) for g in gradients]
    return loss, gradients


def _readable(labels: Tensor | None, C: int, ignore_index: int) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Labels safe to index with, rows that count for nothing, and (not on the CPU) rows whose label is out of range; each [N, 1]."""
    if labels is None:
        return None, None, None
    labels = labels.reshape(-1, 1)
    if labels.is_cpu:
        if not labels.numel():
            return labels, None, None
        least, most = labels.aminmax()
        if least.item() >= 0 and most.item() < C and not 0 <= ignore_index < C:
            return labels, None, None
    dropped = labels == ignore_index
    broken = ((labels < 0) | (labels >= C)) & ~dropped
    if labels.is_cpu:
        if broken.any():
            label = labels[broken][0].item()
            raise ValueError(f"kd_loss: labels must be in [0, {C}) or equal to ignore_index {ignore_index}, got {label}")
        return labels.masked_fill(dropped, 0), dropped, None
    return labels.masked_fill(dropped | broken, 0), dropped, broken


def _chunk(
    logits: Sequence[Tensor],
    dtype: torch.dtype,
    labels: Tensor | None,
    options: Options,
    wanted: Sequence[bool],
    scale: Scale,
    zero_terms: bool,
) -> tuple[Tensor, list[Tensor]]:
    """The losses [R, 1] of R rows and the wanted gradients [R, C], both times `scale`."""
    T, standardize, eps, kd_weight, ce_weight = options[:5]
    student, *teachers = [x if x.dtype == dtype else x.to(dtype) for x in logits]
    if kd_weight != 0:
        q = _temper(student, T, standardize, eps)
        rows, gradients = _distillation(teachers, q, options, wanted, scale, zero_terms)
        if gradients[0] is not None:
            _to_logits(gradients[0], q, T)  # here, where the teachers' temporaries are gone
    else:
        rows = student.new_zeros(len(student), 1)
        gradients = [torch.zeros_like(x) if need else None for need, x in zip(wanted, (student, *teachers))]
    if ce_weight != 0 and labels is not None:
        if kd_weight == 0 or standardize or T != 1:
            q = _temper(student, 1.0, False, 0.0)
        _cross_entropy(q, labels, options, scale, rows, gradients[0])
    return rows, [(g if g.dtype == x.dtype else g.to(x.dtype)).contiguous() for g, x in zip(gradients, logits) if g is not None]


class _Tempered(NamedTuple):
    """Rows of logits as a divergence sees them, [R, C]; the last three with standardize only."""

    log_probability: Tensor
    probability: Tensor
    centred: Tensor | None = None  # x - mean, [R, C]
    norm: Tensor | None = None  # |x - mean| = sd * sqrt(C - 1), [R, 1]
    width: Tensor | None = None  # (sd + eps) * T, [R, 1]


def _temper(x: Tensor, T: float, standardize: bool, eps: float) -> _Tempered:
    """Standardizes rows [R, C] if so asked, divides by T, and takes the softmax."""
    if standardize:
        # moments of x - max: exact for a constant row, stable under an offset
        centred = x - x.amax(-1, keepdim=True)
        centred.sub_(_row_sums(centred).div_(_number(x.shape[1], x)))
        norm = _row_norms(centred)
        width = torch.add(_number(eps * T, x), norm, alpha=T / math.sqrt(x.shape[1] - 1))
        u = centred / width
        log_probability = torch.log_softmax(u, -1)
        return _Tempered(log_probability, torch.exp(log_probability, out=u), centred, norm, width)
    if T != 1:
        x = x / _number(T, x)
    log_probability = torch.log_softmax(x, -1)
    return _Tempered(log_probability, log_probability.exp() if T == 1 else torch.exp(log_probability, out=x))


def _number(value: float, like: Tensor) -> float | Tensor:
    """A number in the form that an operation with `like` takes fastest: a tensor on the CPU, where it needs no conversion."""
    return _constant(value, like.dtype) if like.is_cpu else value


@lru_cache(maxsize=1024)
def _constant(value: float, dtype: torch.dtype) -> Tensor:
    constant = torch.tensor(value, dtype=dtype, device="cpu")
    if type(constant) is not Tensor:  # raised, so never cached for later calls
        raise RuntimeError(f"kd_loss reads values on the CPU, which a {type(constant).__name__} does not have")
    return constant


# All threads share a lone long row, and then sum it in another order than beside other rows. Two such rows are one each.


def _row_sums(x: Tensor) -> Tensor:
    """[R, 1]."""
    if x.shape[0] == 1:
        return x.expand(2, -1).sum(-1, keepdim=True)[:1]
    return x.sum(-1, keepdim=True)


def _row_norms(x: Tensor) -> Tensor:
    """[R, 1]."""
    if x.shape[0] == 1:
        return torch.linalg.vector_norm(x.expand(2, -1), dim=-1, keepdim=True)[:1]
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True)


def _distillation(
    teachers: Sequence[Tensor], q: _Tempered, options: Options, wanted: Sequence[bool], scale: Scale, zero_terms: bool
) -> tuple[Tensor, list[Tensor | None]]:
    """Of R rows kd_weight * sum_k w_k T^2 divergence_k, [R, 1], and the gradients, the student's in u; all times `scale`."""
    T, divergence = options.temperature, _DIVERGENCE[options.divergence]
    through = T * T if options.standardize else T  # T^2 dL/du; without standardize dL/dx = dL/du / T at once
    rows = total = None
    gradients: list[Tensor | None] = []
    for teacher, weight, want in zip(teachers, options.teacher_weights, wanted[1:]):
        weight = weight * options.kd_weight
        p = _temper(teacher, T, options.standardize, options.eps)
        value, dp, dq = divergence(p, q, want, zero_terms)
        _times(value, weight * T * T, scale)
        rows = value if rows is None else rows.add_(value)
        gradients.append(_to_logits(_times(dp, weight * through, scale), p, T) if want and dp is not None else None)
        if wanted[0]:
            _times(dq, weight * through, scale)
            total = dq if total is None else total.add_(dq)
    assert rows is not None, "there is at least one teacher"
    return rows, [total, *gradients]


def _times(x: Tensor, weight: float, scale: Scale) -> Tensor:
    """Multiplies x by weight * scale, in place."""
    return x.mul_(scale * weight if isinstance(scale, Tensor) else _number(scale * weight, x))


def _to_logits(du: Tensor, x: _Tempered, T: float) -> Tensor:
    """dL/dx from dL/du of standardized rows, in place; as it is for others."""
    if x.centred is None or x.norm is None or x.width is None:
        return du
    if du.shape[1] <= FEW:
        du.sub_(_row_sums(du).div_(du.shape[1]))
    along = _row_sums(du * x.centred)
    # 0 / tiny in a constant row: it has no direction to grow in
    along.div_(x.norm.clamp_min(torch.finfo(x.norm.dtype).tiny)).div_(x.width)
    return du.addcmul_(x.centred, along, value=-T / math.sqrt(du.shape[1] - 1)).div_(x.width)


# A divergence takes the teacher's p, the student's q and whether its gradient in u_teacher is wanted, and returns its value
# [R, 1] and its gradients in u_teacher (None where not wanted) and u_student. All three belong to the caller.


def _kl(p: _Tempered, q: _Tempered, want_p: bool, zero_terms: bool) -> tuple[Tensor, Tensor | None, Tensor]:
    """KL(p || q). zero_terms: a class of probability 0 counts as 0 even where a logarithm is infinite. Without want_p, uses p up."""
    log_ratio = torch.sub(p.log_probability, q.log_probability, out=None if want_p else p.log_probability)
    if zero_terms:
        log_ratio.masked_fill_(p.probability == 0, 0)
    dq = q.probability - p.probability
    # q - p adds 0 to the row's sum of p log(p / q), and makes it stationary in both logarithms: their rounding cancels
    value = _row_sums(torch.addcmul(dq, p.probability, log_ratio, out=None if want_p else log_ratio))
    if not want_p:
        return value, None, dq
    dp = log_ratio.mul_(p.probability)
    return value, dp.addcmul_(p.probability, _row_sums(dp), value=-1), dq


def _reverse(p: _Tempered, q: _Tempered, want_p: bool, zero_terms: bool) -> tuple[Tensor, Tensor | None, Tensor]:
    """KL(q || p)."""
    value, dq, dp = _kl(q, p, True, zero_terms)
    assert dq is not None
    return value, dp, dq


def _jensen_shannon(p: _Tempered, q: _Tempered, want_p: bool, zero_terms: bool) -> tuple[Tensor, Tensor | None, Tensor]:
    """(KL(p || m) + KL(q || m)) / 2, m = (p + q) / 2."""
    # a class that both hold impossible needs some logarithm, whichever
    log_m = torch.add(p.probability, q.probability).div_(2).clamp_min_(torch.finfo(p.probability.dtype).tiny).log_()
    dp, dq = p.log_probability - log_m, q.log_probability - log_m
    if zero_terms:
        dp.masked_fill_(p.probability == 0, 0)
        dq.masked_fill_(q.probability == 0, 0)
    dp.mul_(p.probability).div_(2)
    dq.mul_(q.probability).div_(2)
    # m - (p + q) / 2 adds 0, and cancels the rounding of log m, from which this m comes
    terms = log_m.exp_().sub_(p.probability, alpha=0.5).sub_(q.probability, alpha=0.5).add_(dp).add_(dq)
    dq.addcmul_(q.probability, _row_sums(dq), value=-1)
    return _row_sums(terms), dp.addcmul_(p.probability, _row_sums(dp), value=-1) if want_p else None, dq


_DIVERGENCE = {"forward": _kl, "reverse": _reverse, "js": _jensen_shannon}


def _cross_entropy(x: _Tempered, labels: Tensor, options: Options, scale: Scale, rows: Tensor, total: Tensor | None) -> None:
    """Adds ce_weight * CE of labels [R, 1] to `rows`, its gradient to `total`. x at temperature 1; its probabilities are used up."""
    smoothing, C = options.label_smoothing, x.probability.shape[1]
    _add(rows, x.log_probability.gather(1, labels), options.ce_weight * (smoothing - 1), scale)
    if smoothing:
        _add(rows, _row_sums(x.log_probability), -options.ce_weight * smoothing / C, scale)
    if total is None:
        return
    difference = x.probability.scatter_add_(1, labels, rows.new_full(labels.shape, smoothing - 1))
    if smoothing:
        difference.sub_(smoothing / C)
    _add(total, difference, options.ce_weight, scale)


def _add(total: Tensor, x: Tensor, weight: float, scale: Scale) -> None:
    """Adds x * weight * scale to total."""
    if isinstance(scale, Tensor):
        total.addcmul_(x, scale, value=weight)
    else:
        total.add_(x, alpha=weight * scale)
