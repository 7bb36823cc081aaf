"""Logit distillation in PyTorch: the form that runs where the Triton kernel does not. op.py has the mathematics.

The batch is walked in chunks of rows that stay in cache. KL is summed as p (log p - log q) + q - p: the last two terms add 0 to a row and
cancel the rounding of the logarithms, which at a high temperature are nearly equal. On the CPU, rows whose divergence is below SMALL are
computed again in float64.
"""

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from kdfast.ops.distill_kl.options import KDOptions
from kdfast.ops.precision import arithmetic
from kdfast.reference import masked

CHUNK = 2**16  # elements a thread: a handful of float32 temporaries of that size stay in its second-level cache
CHUNK_OFF_CPU = 2**26  # elements in all: few launches, bounded memory
# the norm of a standardized row in which a class is masked, or whose squares overflow, is larger, infinite or NaN
ORDINARY = 1e7
# up to this many standardized classes, dL/du is centred: the rounding of its sum counts once it is divided by a row's width
FEW_CLASSES = 128

# divergences below this, differences of nearly equal numbers, are computed again in float64: float32 would leave them few digits
SMALL = 2.0**-10

Scale = float | Tensor  # factor of a loss and its gradients: one number, or one a row, [R, 1]


def loss_and_gradients(
    student: Tensor,
    teachers: Sequence[Tensor],
    labels: Tensor | None,
    options: KDOptions,
    wanted: Sequence[bool],
    upstream: Tensor | None,
    in_graph: bool = False,
) -> tuple[Tensor, list[Tensor], None]:
    """The loss and its gradients, times `upstream` where given. Call it where autograd records nothing.

    Args:
        student: [..., C], floating.
        teachers: each [..., C], floating.
        labels: int64 [...], or None.
        options: see KDOptions.
        wanted: for the student and each teacher, whether its gradient is computed.
        upstream: the gradient of the loss, in the loss's shape.
        in_graph: for the kernel, whose signature this is; it changes nothing here.

    Returns:
        The loss, [] or [...] for reduction "none", float32 (float64 if an input is), the wanted gradients in order, each
        contiguous in its input's shape and dtype, and None: no factor is left to apply to them.
    """
    arguments = student, teachers, labels, options, wanted, upstream
    loss, gradients = _evaluate(*arguments, zero_terms=not student.is_cpu)
    if student.is_cpu and not math.isfinite((loss.sum() if loss.dim() else loss).item()):
        # rare: a logit of -inf made 0 * inf where the class counts as nothing; repeat with such terms set to 0
        loss, gradients = _evaluate(*arguments, zero_terms=True)
    return loss, gradients, None


def rescale(gradients: Sequence[Tensor], upstream: Tensor, remaining: None) -> None:
    """Multiplies the gradients by the gradient of the loss, in place."""
    if upstream.is_cpu and not upstream.dim() and upstream.item() == 1:
        return
    for gradient in gradients:
        # in pieces, because a CPU multiplies a 16-bit tensor in a float32 copy
        for piece in gradient.view(-1).split(2**20) if gradient.is_cpu and not upstream.dim() else (gradient,):
            piece.mul_(upstream[..., None])  # of one dimension at least: without, it would be rounded to a 16-bit gradient's dtype


def _evaluate(
    student: Tensor,
    teachers: Sequence[Tensor],
    labels: Tensor | None,
    options: KDOptions,
    wanted: Sequence[bool],
    upstream: Tensor | None,
    zero_terms: bool,
) -> tuple[Tensor, list[Tensor]]:
    """The loss and the wanted gradients. zero_terms: a class of probability 0 counts as 0 even where a logarithm is infinite."""
    shape, C = student.shape, student.shape[-1]
    inputs = [student, *teachers]
    if len(shape) != 2:
        inputs = [x.reshape(-1, C) for x in inputs]
    N, dtype = inputs[0].shape[0], arithmetic(*inputs)
    labels, ignored, invalid = check_labels(labels, C, options)

    scale: Scale = 1.0
    if options.reduction == "mean":
        scale = 1 / max(N, 1) if ignored is None else (N - ignored.sum(dtype=dtype)).clamp_min_(1.0).reciprocal_()
    if upstream is not None:
        scale = upstream.to(dtype).reshape(-1, 1) * scale
    if isinstance(scale, Tensor):
        scale = scale.reshape(-1, 1).expand(N, 1)

    step = max(1, (CHUNK * torch.get_num_threads() if student.is_cpu else CHUNK_OFF_CPU) // C)
    if step >= N:
        losses, gradients = _evaluate_chunk(inputs, dtype, labels, options, wanted, scale, zero_terms)
    else:
        losses = student.new_empty(N, 1, dtype=dtype)
        gradients = [x.new_empty(N, C) for need, x in zip(wanted, inputs) if need]
        for start in range(0, N, step):
            rows = slice(start, start + step)
            chunk, chunk_labels = [x[rows] for x in inputs], None if labels is None else labels[rows]
            chunk_scale = scale[rows] if isinstance(scale, Tensor) else scale
            losses[rows], pieces = _evaluate_chunk(chunk, dtype, chunk_labels, options, wanted, chunk_scale, zero_terms)
            for gradient, piece in zip(gradients, pieces):
                gradient[rows] = piece

    if ignored is not None:
        for x in (losses, *gradients):
            x.masked_fill_(ignored, 0)
            if invalid is not None:
                x.masked_fill_(invalid, math.nan)
    loss = losses.view(shape[:-1]) if options.reduction == "none" else losses.sum()
    if len(shape) != 2:
        gradients = [g.view(shape) for g in gradients]
    return loss, gradients


def check_labels(labels: Tensor | None, C: int, options: KDOptions) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Labels that can be used as indices, ignored rows, and (not on the CPU) rows whose label is out of range; each [N, 1]."""
    if labels is None:
        return None, None, None
    labels, ignore_index = labels.reshape(-1, 1), options.ignore_index
    if labels.is_cpu:
        if not labels.numel():
            return labels, None, None
        least, most = labels.aminmax()
        if least.item() >= 0 and most.item() < C and not 0 <= ignore_index < C:
            return labels, None, None
    ignored = labels == ignore_index
    invalid = ((labels < 0) | (labels >= C)) & ~ignored
    if not labels.is_cpu:
        return labels.masked_fill(ignored | invalid, 0), ignored, invalid
    if invalid.any():
        label = labels[invalid][0].item()
        raise ValueError(f"{options.operator}: labels must be in [0, {C}) or equal to ignore_index {ignore_index}, got {label}")
    return labels.masked_fill(ignored, 0), ignored, None


def _evaluate_chunk(
    logits: Sequence[Tensor],
    dtype: torch.dtype,
    labels: Tensor | None,
    options: KDOptions,
    wanted: Sequence[bool],
    scale: Scale,
    zero_terms: bool,
) -> tuple[Tensor, list[Tensor]]:
    """The losses [R, 1] of R rows and the wanted gradients [R, C], both times `scale`."""
    T, standardize, eps = options.temperature, options.standardize, options.eps
    student, *teachers = [x if x.dtype == dtype else x.to(dtype) for x in logits]
    if options.kd_weight != 0:
        q = _temper(student, T, standardize, eps)
        losses, gradients = _distil(student, teachers, q, options, wanted, scale, zero_terms)
        if gradients[0] is not None:
            _to_logits(gradients[0], q, T)  # here, where the teachers' temporaries are gone
    else:
        losses = student.new_zeros(len(student), 1)
        gradients = [torch.zeros_like(x) if need else None for need, x in zip(wanted, (student, *teachers))]
    if options.ce_weight != 0 and labels is not None:
        if options.kd_weight == 0 or standardize or T != 1:
            q = _temper(student, 1.0, False, 0.0)
        _add_cross_entropy(q, labels, options, scale, losses, gradients[0])
    return losses, [(g if g.dtype == x.dtype else g.to(x.dtype)).contiguous() for g, x in zip(gradients, logits) if g is not None]


class _Tempered(NamedTuple):
    """Rows of logits as a divergence sees them, [R, C]; what follows the probabilities with standardize only."""

    log_probability: Tensor
    probability: Tensor
    centred: Tensor | None = None  # x - mean, [R, C], 0 where a class is masked
    norm: Tensor | None = None  # |x - mean| = sd * sqrt(C - 1), [R, 1]
    width: Tensor | None = None  # (sd + eps) * T, [R, 1]
    root: Scale = 1.0  # sqrt(C - 1), C without masked classes
    counts: Tensor | None = None  # classes that are not masked, [R, C]; None: all


def _temper(x: Tensor, T: float, standardize: bool, eps: float) -> _Tempered:
    """Standardizes rows [R, C] if so asked, divides by T, and takes the softmax."""
    if standardize:
        # moments of x - max: exact for a constant row, stable under an offset
        centred = x - x.amax(-1, keepdim=True)
        centred.sub_(_reduce_rows(torch.sum, centred).div_(_number(x.shape[1], x)))
        norm, root = _reduce_rows(torch.linalg.vector_norm, centred), math.sqrt(x.shape[1] - 1)
        if not (x.is_cpu and norm.numel() and norm.max().item() < ORDINARY):
            return _temper_odd(x, T, eps, centred, norm)
        width = torch.add(_number(eps * T, x), norm, alpha=T / root)
        u = centred / width
        log_probability = torch.log_softmax(u, -1)
        return _Tempered(log_probability, torch.exp(log_probability, out=u), centred, norm, width, root)
    if T != 1:
        x = x / _number(T, x)
    log_probability = torch.log_softmax(x, -1)
    return _Tempered(log_probability, log_probability.exp() if T == 1 else torch.exp(log_probability, out=x))


def _temper_odd(x: Tensor, T: float, eps: float, centred: Tensor, norm: Tensor) -> _Tempered:
    """_temper of rows [R, C] among which some have masked classes or squares that overflow; the others keep their bits."""
    ordinary = norm < ORDINARY
    counts = ~masked(x) | ordinary
    n = counts.sum(-1, keepdim=True)
    d = x - x.amax(-1, keepdim=True)
    size = d.where(counts, 0).abs().amax(-1, keepdim=True).clamp_min_(1)
    offset = (d.where(counts, 0) / size).sum(-1, keepdim=True) / n
    off = (d / size - offset).where(counts, 0)
    norm = norm.where(ordinary, torch.linalg.vector_norm(off, dim=-1, keepdim=True) * size)
    root = (n - 1).clamp_min(1).to(x.dtype).sqrt()
    width = torch.add(_number(eps * T, x), norm, alpha=T / math.sqrt(x.shape[1] - 1)).where(ordinary, norm / root * T + eps * T)
    log_probability = torch.log_softmax(centred.where(ordinary, d - offset * size) / width, -1)
    return _Tempered(log_probability, log_probability.exp(), centred.where(ordinary, off * size), norm, width, root, counts)


def _number(value: float, like: Tensor) -> float | Tensor:
    """A number in the form that an operation with `like` takes fastest: a tensor on the CPU, where it needs no conversion."""
    return _constant(value, like.dtype) if like.is_cpu else value


@lru_cache(maxsize=1024)
def _constant(value: float, dtype: torch.dtype) -> Tensor:
    constant = torch.tensor(value, dtype=dtype, device="cpu")
    if type(constant) is not Tensor:  # raised, so never cached for later calls
        raise RuntimeError(f"kd_loss reads values on the CPU, which a {type(constant).__name__} does not have")
    return constant


def _reduce_rows(reduction: Callable[..., Tensor], x: Tensor) -> Tensor:
    """The reduction of each row, [R, 1]."""
    if x.shape[0] == 1:  # a lone long row would be shared by all threads, in another order than beside other rows: two are not
        return reduction(x.expand(2, -1), dim=-1, keepdim=True)[:1]
    return reduction(x, dim=-1, keepdim=True)


def _distil(
    student: Tensor, teachers: Sequence[Tensor], q: _Tempered, options: KDOptions, wanted: Sequence[bool], scale: Scale, zero_terms: bool
) -> tuple[Tensor, list[Tensor | None]]:
    """kd_weight * sum_k w_k T^2 divergence_k of R rows, [R, 1], and the gradients, the student's in u; all times `scale`."""
    T, divergence = options.temperature, _DIVERGENCE[options.divergence]
    through = T * T if options.standardize else T  # T^2 dL/du; without standardize dL/dx = dL/du / T at once
    losses = total = None
    gradients: list[Tensor | None] = []
    for teacher, weight, want in zip(teachers, options.weights(len(teachers)), wanted[1:]):
        weight = weight * options.kd_weight
        p = _temper(teacher, T, options.standardize, options.eps)
        value, dp, dq = divergence(p, q, want, zero_terms)
        if value.is_cpu and value.dtype == torch.float32 and value.numel() and not value.min().item() >= SMALL:
            _refine((value, dp, dq), teacher, student, options)
        _multiply(value, weight * T * T, scale)
        losses = value if losses is None else losses.add_(value)
        gradients.append(_to_logits(_multiply(dp, weight * through, scale), p, T) if want and dp is not None else None)
        if wanted[0]:
            _multiply(dq, weight * through, scale)
            total = dq if total is None else total.add_(dq)
    assert losses is not None, "there is at least one teacher"
    return losses, [total, *gradients]


def _refine(results: Sequence[Tensor | None], teacher: Tensor, student: Tensor, options: KDOptions) -> None:
    """Computes the small ones of a divergence's results, values [R, 1] and gradients [R, C], again in float64; reads values."""
    value, dp, _ = results
    assert value is not None
    small = (value < SMALL).nonzero()[:, 0]
    for rows in small.split(max(1, len(value) // 4)):  # float64 needs more memory
        p, q = (_temper(x[rows].double(), options.temperature, options.standardize, options.eps) for x in (teacher, student))
        exact = _DIVERGENCE[options.divergence](p, q, dp is not None, True)
        for result, better in zip(results, exact):
            if result is not None and better is not None:
                result[rows] = better.to(result.dtype)


def _multiply(x: Tensor, weight: float, scale: Scale) -> Tensor:
    """Multiplies x by weight * scale, in place."""
    return x.mul_(scale * weight if isinstance(scale, Tensor) else _number(scale * weight, x))


def _to_logits(du: Tensor, x: _Tempered, T: float) -> Tensor:
    """dL/dx from dL/du of standardized rows, in place; unchanged for others."""
    if x.centred is None or x.norm is None or x.width is None:
        return du
    if du.shape[1] <= FEW_CLASSES:
        rounding = _reduce_rows(torch.sum, du).div_(du.shape[1])
        du.sub_(rounding if x.counts is None else rounding * x.counts)
    along = _reduce_rows(torch.sum, du * x.centred)
    # 0 / tiny in a constant row: it has no direction to grow in
    along.div_(x.norm.clamp_min(torch.finfo(x.norm.dtype).tiny)).div_(x.width)
    if isinstance(x.root, Tensor):
        return du.addcmul_(x.centred, along.div_(x.root), value=-T).div_(x.width)
    return du.addcmul_(x.centred, along, value=-T / x.root).div_(x.width)


# A divergence takes the teacher's p, the student's q and whether its gradient in u_teacher is wanted, and returns its value
# [R, 1] and its gradients in u_teacher (None where not wanted) and u_student. All three belong to the caller.


def _kl(p: _Tempered, q: _Tempered, want_p: bool, zero_terms: bool) -> tuple[Tensor, Tensor | None, Tensor]:
    """KL(p || q). Without want_p, it overwrites p."""
    log_ratio = torch.sub(p.log_probability, q.log_probability, out=None if want_p else p.log_probability)
    if zero_terms:
        log_ratio.masked_fill_(p.probability == 0, 0)
    dq = q.probability - p.probability
    # q - p adds 0 to the row's sum of p log(p / q), and makes it stationary in both logarithms: their rounding cancels
    value = _reduce_rows(torch.sum, torch.addcmul(dq, p.probability, log_ratio, out=None if want_p else log_ratio))
    if not want_p:
        return value, None, dq
    dp = log_ratio.mul_(p.probability)
    return value, dp.addcmul_(p.probability, _reduce_rows(torch.sum, dp), value=-1), dq


def _reverse(p: _Tempered, q: _Tempered, want_p: bool, zero_terms: bool) -> tuple[Tensor, Tensor | None, Tensor]:
    """KL(q || p)."""
    value, dq, dp = _kl(q, p, True, zero_terms)
    assert dq is not None
    return value, dp, dq


def _jensen_shannon(p: _Tempered, q: _Tempered, want_p: bool, zero_terms: bool) -> tuple[Tensor, Tensor | None, Tensor]:
    """(KL(p || m) + KL(q || m)) / 2, m = (p + q) / 2."""
    # a class of probability 0 in both needs some finite logarithm
    log_m = torch.add(p.probability, q.probability).div_(2).clamp_min_(torch.finfo(p.probability.dtype).tiny).log_()
    dp, dq = p.log_probability - log_m, q.log_probability - log_m
    if zero_terms:
        dp.masked_fill_(p.probability == 0, 0)
        dq.masked_fill_(q.probability == 0, 0)
    dp.mul_(p.probability).div_(2)
    dq.mul_(q.probability).div_(2)
    # m - (p + q) / 2 adds 0, and cancels the rounding of log m, from which this m comes
    terms = log_m.exp_().sub_(p.probability, alpha=0.5).sub_(q.probability, alpha=0.5).add_(dp).add_(dq)
    dq.addcmul_(q.probability, _reduce_rows(torch.sum, dq), value=-1)
    return _reduce_rows(torch.sum, terms), dp.addcmul_(p.probability, _reduce_rows(torch.sum, dp), value=-1) if want_p else None, dq


_DIVERGENCE = {"forward": _kl, "reverse": _reverse, "js": _jensen_shannon}


def _add_cross_entropy(x: _Tempered, labels: Tensor, options: KDOptions, scale: Scale, losses: Tensor, total: Tensor | None) -> None:
    """Adds ce_weight * CE of labels [R, 1] to `losses`, its gradient to `total`. x: at temperature 1; its probabilities are overwritten."""
    smoothing, C = options.label_smoothing, x.probability.shape[1]
    _add(losses, x.log_probability.gather(1, labels), options.ce_weight * (smoothing - 1), scale)
    if smoothing:
        _add(losses, _reduce_rows(torch.sum, x.log_probability), -options.ce_weight * smoothing / C, scale)
    if total is None:
        return
    difference = x.probability.scatter_add_(1, labels, losses.new_full(labels.shape, smoothing - 1))
    if smoothing:
        difference.sub_(smoothing / C)
    _add(total, difference, options.ce_weight, scale)


def _add(total: Tensor, x: Tensor, weight: float, scale: Scale) -> None:
    """Adds x * weight * scale to total."""
    if isinstance(scale, Tensor):
        total.addcmul_(x, scale, value=weight)
    else:
        total.add_(x, alpha=weight * scale)
