"""Logit distillation: checks, choice of backend, autograd, registration, and the PyTorch form. reference.kd_loss is its meaning.

A row of C logits x, at temperature T:

    u        x / T, or with standardize (x - mean) / (sd + eps) / T, sd unbiased
    p, q     softmax(u_teacher), softmax(u_student)
    KL       sum_c p_c (log p - log q)_c
    dKL/du   student: q - p         teacher: p (log p - log q - KL)
    dL/dx    g / T with g = dL/du; with standardize, c = x - mean:  [g - c sum(g c) / ((sd + eps) sd (C - 1))] / (sd + eps) / T

The forward pass computes the gradient as well, while the row is at hand. The first backward pass gives that buffer away,
so that it becomes the .grad of a leaf without a copy; a further one (retain_graph) computes it again.

The PyTorch form walks the batch in chunks of rows that stay in cache, through buffers that every chunk uses again.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kdfast.ops.backend import kernel

DIVERGENCES = ("forward", "reverse", "js")
REDUCTIONS = ("mean", "sum", "none")


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


# (student, teachers, labels, options, wanted gradients, upstream) -> loss, gradients: the PyTorch form here, or a kernel's launcher
Launch = Callable[..., tuple[Tensor, list[Tensor]]]


def separate(teacher: Tensor | Sequence[Tensor], student: Tensor) -> tuple[Tensor, ...]:
    """The teachers' logits one by one: from one tensor [..., C], one stacked [K, ..., C], or a sequence."""
    if not isinstance(teacher, Tensor):
        return tuple(teacher)
    return teacher.unbind(0) if teacher.dim() == student.dim() + 1 else (teacher,)


def kd_loss(student: Tensor, teachers: tuple[Tensor, ...], labels: Tensor | None, options: Options) -> Tensor:
    """functional.kd_loss, its options in one value."""
    _check(student, teachers, labels, options)
    if torch.is_grad_enabled() and (student.requires_grad or any(t.requires_grad for t in teachers)):
        return _DistillKL.apply(options, labels, student, *teachers)
    launch = _launcher(student, teachers)
    return launch(student, teachers, labels, options, (False,) * (1 + len(teachers)), None)[0]


def _check(student: Tensor, teachers: Sequence[Tensor], labels: Tensor | None, options: Options) -> None:
    """Raises one sentence that names the argument. The range of the labels is checked later, where their values are read."""
    if not student.is_floating_point():
        raise TypeError(f"kd_loss: student must be floating, got {student.dtype}")
    if student.dim() == 0 or student.shape[-1] == 0:
        raise ValueError(f"kd_loss: student must be [..., C] with at least one class, got shape {tuple(student.shape)}")
    if not teachers:
        raise ValueError("kd_loss: teacher must be one tensor or a sequence of at least one, got an empty sequence")
    for teacher in teachers:
        if teacher.shape != student.shape:
            raise ValueError(
                f"kd_loss: teacher must have student's shape {tuple(student.shape)} "
                f"(or be [K, ...] or a sequence of such), got {tuple(teacher.shape)}"
            )
        if not teacher.is_floating_point():
            raise TypeError(f"kd_loss: teacher must be floating, got {teacher.dtype}")
        if teacher.device != student.device:
            raise ValueError(f"kd_loss: teacher must be on student's device {student.device}, got {teacher.device}")
    if len(options.teacher_weights) != len(teachers):
        raise ValueError(f"kd_loss: teacher_weights must hold {len(teachers)} numbers, got {len(options.teacher_weights)}")
    if not options.temperature > 0:
        raise ValueError(f"kd_loss: temperature must be positive, got {options.temperature}")
    if options.standardize and student.shape[-1] == 1:
        raise ValueError("kd_loss: standardize needs at least two classes, got C = 1")
    if options.standardize and not options.eps >= 0:
        raise ValueError(f"kd_loss: eps must not be negative, got {options.eps}")
    if not 0 <= options.label_smoothing <= 1:
        raise ValueError(f"kd_loss: label_smoothing must be in [0, 1], got {options.label_smoothing}")
    if options.divergence not in DIVERGENCES:
        raise ValueError(f"kd_loss: divergence must be one of {', '.join(DIVERGENCES)}, got {options.divergence!r}")
    if options.reduction not in REDUCTIONS:
        raise ValueError(f"kd_loss: reduction must be one of {', '.join(REDUCTIONS)}, got {options.reduction!r}")
    if labels is None:
        if options.ce_weight != 0:
            raise ValueError(f"kd_loss: labels must be given where ce_weight is not 0, got None with ce_weight {options.ce_weight}")
        return
    if labels.dtype != torch.int64:
        raise TypeError(f"kd_loss: labels must be int64, got {labels.dtype}")
    if labels.shape != student.shape[:-1]:
        raise ValueError(f"kd_loss: labels must have shape {tuple(student.shape[:-1])}, got {tuple(labels.shape)}")
    if labels.device != student.device:
        raise ValueError(f"kd_loss: labels must be on student's device {student.device}, got {labels.device}")


class _DistillKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, options: Options, labels: Tensor | None, student: Tensor, *teachers: Tensor) -> Tensor:
        wanted = ctx.needs_input_grad[2:]
        ctx.options, ctx.launch, ctx.wanted = options, _launcher(student, teachers), wanted
        # a float16 gradient of a mean underflows before a GradScaler's upstream factor lifts it: such wait for the factor
        half = torch.float16
        ctx.deferred = (student.dtype == half and wanted[0]) or any(t.dtype == half and t.requires_grad for t in teachers)
        now = (False,) * len(wanted) if ctx.deferred else wanted
        loss, gradients = ctx.launch(student, teachers, labels, options, now, None)
        if torch.compiler.is_compiling() and not ctx.deferred:
            ctx.save_for_backward(*gradients)
        else:
            ctx.save_for_backward(labels, student, *teachers)
            ctx.gradients = None if ctx.deferred else gradients
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        if torch.compiler.is_compiling():
            gradients = _again(ctx, upstream) if ctx.deferred else [_scaled(g, upstream) for g in ctx.saved_tensors]
        else:
            if torch.is_grad_enabled():
                raise RuntimeError("kd_loss has no second derivative: call backward() or grad() without create_graph=True")
            gradients, ctx.gradients = ctx.gradients, None  # given away: whoever gets the buffer may keep it
            if gradients is None:
                gradients = _again(ctx, upstream)
            elif upstream.is_cuda or upstream.dim() or upstream.item() != 1:
                for gradient in gradients:
                    gradient.mul_(upstream[..., None] if upstream.dim() else upstream)
        remaining = iter(gradients)
        return None, None, *(next(remaining) if need else None for need in ctx.wanted)


def _again(ctx: Any, upstream: Tensor) -> list[Tensor]:
    """The gradients from the inputs, scaled by `upstream` before they are rounded to their dtype."""
    labels, student, *teachers = ctx.saved_tensors
    return ctx.launch(student, teachers, labels, ctx.options, ctx.wanted, upstream)[1]


def _scaled(gradient: Tensor, upstream: Tensor) -> Tensor:
    return (gradient * (upstream[..., None] if upstream.dim() else upstream)).to(gradient.dtype)


def _launcher(student: Tensor, teachers: Sequence[Tensor]) -> Launch:
    """The backend in force, fixed here for the backward pass too; a compiled graph asks when it runs."""
    if torch.compiler.is_compiling():
        return _registered
    module = kernel("distill_kl", student, *teachers)
    return loss_and_gradients if module is None else module.loss_and_gradients


# ---- what torch.compile sees -----------------------------------------------------------------------------------------


def _registered(
    student: Tensor,
    teachers: Sequence[Tensor],
    labels: Tensor | None,
    options: Options,
    wanted: Sequence[bool],
    upstream: Tensor | None,
) -> tuple[Tensor, list[Tensor]]:
    loss, *gradients = _op(student, list(teachers), labels, upstream, list(wanted), *options)
    return loss, gradients


@torch.library.custom_op("kdfast::distill_kl", mutates_args=())
def _op(
    student: Tensor,
    teachers: list[Tensor],
    labels: Tensor | None,
    upstream: Tensor | None,
    wanted: list[bool],
    temperature: float,
    standardize: bool,
    eps: float,
    kd_weight: float,
    ce_weight: float,
    teacher_weights: list[float],
    label_smoothing: float,
    ignore_index: int,
    divergence: str,
    reduction: str,
) -> list[Tensor]:
    options = Options(
        temperature, standardize, eps, kd_weight, ce_weight, tuple(teacher_weights),
        label_smoothing, ignore_index, divergence, reduction,
    )  # fmt: skip
    loss, gradients = _launcher(student, teachers)(student, teachers, labels, options, wanted, upstream)
    return [loss, *gradients]


@_op.register_fake
def _(
    student: Tensor, teachers: list[Tensor], labels: Tensor | None, upstream: Tensor | None, wanted: list[bool], *options: Any
) -> list[Tensor]:
    reduction = options[-1]
    loss = student.new_empty(student.shape[:-1] if reduction == "none" else (), dtype=_arithmetic(student, *teachers))
    gradients = [torch.empty_like(x, memory_format=torch.contiguous_format) for need, x in zip(wanted, (student, *teachers)) if need]
    return [loss, *gradients]


def _arithmetic(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


# ---- the PyTorch form ------------------------------------------------------------------------------------------------

CHUNK = 2**16  # elements a thread: a handful of float32 buffers of that size stay in its second-level cache
CHUNK_OFF_CPU = 2**26  # elements in all: few launches, bounded memory

Scale = float | Tensor  # of the gradients: one number, or one a row, [R, 1]


def loss_and_gradients(
    student: Tensor,
    teachers: Sequence[Tensor],
    labels: Tensor | None,
    options: Options,
    wanted: Sequence[bool],
    upstream: Tensor | None,
) -> tuple[Tensor, list[Tensor]]:
    """The loss, and its gradients times `upstream` (None: 1), by PyTorch operations. Call it where autograd records nothing.

    Args:
        student: [..., C], floating.
        teachers: each [..., C], floating.
        labels: int64 [...], or None.
        options: see Options.
        wanted: for the student and each teacher, whether its gradient is computed.
        upstream: the gradient of the loss, in the loss's shape.

    Returns:
        The loss, [] or [...] for reduction "none", float32 (float64 if an input is), and the wanted gradients in order, each
        contiguous in its input's shape and dtype.
    """
    loss, gradients = _batch(student, teachers, labels, options, wanted, upstream, zero_terms=not student.is_cpu)
    if student.is_cpu and not math.isfinite((loss.sum() if loss.dim() else loss).item()):
        # rare: a logit of -inf made 0 * inf where the class counts for nothing; once more, with such terms set to 0
        loss, gradients = _batch(student, teachers, labels, options, wanted, upstream, zero_terms=True)
    return loss, gradients


def _batch(
    student: Tensor,
    teachers: Sequence[Tensor],
    labels: Tensor | None,
    options: Options,
    wanted: Sequence[bool],
    upstream: Tensor | None,
    zero_terms: bool,
) -> tuple[Tensor, list[Tensor]]:
    leading, C = student.shape[:-1], student.shape[-1]
    inputs = [student, *teachers]
    gradients = [torch.empty_like(x, memory_format=torch.contiguous_format) if need else None for need, x in zip(wanted, inputs)]
    outputs = gradients
    if len(leading) != 1:
        inputs = [x.reshape(-1, C) for x in inputs]
        outputs = [g if g is None else g.view(-1, C) for g in gradients]
    N = inputs[0].shape[0]
    labels, dropped, broken = _readable(labels, C, options.ignore_index)
    rows = torch.zeros(N, 1, dtype=_arithmetic(*inputs), device=student.device)

    scale: Scale = 1.0
    if options.reduction == "mean":
        scale = 1 / max(N, 1) if dropped is None else (N - dropped.sum(dtype=rows.dtype)).clamp_min_(1.0).reciprocal_()
    if upstream is not None:
        scale = upstream.to(rows.dtype).reshape(-1, 1) * scale
    if isinstance(scale, Tensor):
        scale = scale.reshape(-1, 1).expand(N, 1)

    step = max(1, (CHUNK * torch.get_num_threads() if student.is_cpu else CHUNK_OFF_CPU) // C)
    if step >= N:
        _chunk(inputs, labels, options, scale, rows, outputs, _FRESH, zero_terms)
    else:
        scratch = _Scratch(rows, step, C)
        for start in range(0, N, step):
            part = slice(start, start + step)
            _chunk(
                [x[part] for x in inputs],
                None if labels is None else labels[part],
                options,
                scale[part] if isinstance(scale, Tensor) else scale,
                rows[part],
                [None if g is None else g[part] for g in outputs],
                scratch,
                zero_terms,
            )

    for mask, value in ((dropped, 0.0), (broken, math.nan)):
        if mask is not None:
            for x in (rows, *outputs):
                if x is not None:
                    x.masked_fill_(mask, value)
    loss = rows.view(leading) if options.reduction == "none" else rows.sum()
    return loss, [g for g in gradients if g is not None]


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


class _Scratch:
    """Buffers [rows, C] for out=, handed out in turn and again after rewind(). Without `like` None, which is a fresh tensor each."""

    def __init__(self, like: Tensor | None, rows: int = 0, C: int = 0) -> None:
        self.like, self.rows, self.C = like, rows, C
        self.buffers: list[Tensor] = []
        self.used = 0

    def take(self, rows: int) -> Tensor | None:
        if self.like is None:
            return None
        if self.used == len(self.buffers):
            self.buffers.append(self.like.new_empty(self.rows, self.C))
        self.used += 1
        return self.buffers[self.used - 1][:rows]

    def copy(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        buffer = self.take(len(x))
        return x.to(dtype) if buffer is None else buffer.copy_(x)

    def rewind(self, used: int = 0) -> None:
        self.used = used


_FRESH = _Scratch(None)


class _Tempered(NamedTuple):
    """Rows of logits as a divergence sees them, [R, C]; the last three with standardize only."""

    log_probability: Tensor
    probability: Tensor
    centred: Tensor | None = None  # x - mean, [R, C]
    norm: Tensor | None = None  # |x - mean| = sd * sqrt(C - 1), [R, 1]
    width: Tensor | None = None  # (sd + eps) * T, [R, 1]


def _chunk(
    logits: list[Tensor],
    labels: Tensor | None,
    options: Options,
    scale: Scale,
    rows: Tensor,
    gradients: list[Tensor | None],
    scratch: _Scratch,
    zero_terms: bool,
) -> None:
    """Adds the losses of R rows to `rows` [R, 1] and writes the gradients [R, C], both times `scale`."""
    scratch.rewind()
    student, *teachers = [x if x.dtype == rows.dtype else scratch.copy(x, rows.dtype) for x in logits]
    total = gradients[0]  # the student's gradient, summed in place where its dtype is that of the arithmetic
    if total is not None and total.dtype != rows.dtype:
        total = scratch.copy(total, rows.dtype)

    mark = scratch.used
    q = None
    if options.kd_weight != 0:
        q = _temper(student, options.temperature, options.standardize, options.eps, scratch)
        _distillation(teachers, q, options, scale, rows, total, gradients[1:], scratch, zero_terms)
    else:
        for gradient in (total, *gradients[1:]):
            if gradient is not None:
                gradient.zero_()
    if options.ce_weight != 0 and labels is not None:
        if q is None or options.standardize or options.temperature != 1:
            scratch.rewind(mark)
            q = _temper(student, 1.0, False, 0.0, scratch)
        _cross_entropy(q, labels, options, scale, rows, total)
    if total is not None and gradients[0] is not None and total is not gradients[0]:
        gradients[0].copy_(total)


def _distillation(
    teachers: list[Tensor],
    q: _Tempered,
    options: Options,
    scale: Scale,
    rows: Tensor,
    total: Tensor | None,
    gradients: list[Tensor | None],
    scratch: _Scratch,
    zero_terms: bool,
) -> None:
    """Adds kd_weight * sum_k w_k T^2 divergence_k to `rows`; writes the student's gradient to `total`, the teachers' to `gradients`."""
    T, weights, divergence = options.temperature, options.teacher_weights, _DIVERGENCE[options.divergence]
    mark = scratch.used
    for k, (teacher, weight, gradient) in enumerate(zip(teachers, weights, gradients)):
        scratch.rewind(mark)
        weight *= options.kd_weight
        p = _temper(teacher, T, options.standardize, options.eps, scratch)
        out = total if k == 0 else scratch.take(rows.shape[0])
        value, dp, dq = divergence(p, q, gradient is not None, total is not None, out, scratch, zero_terms)
        _add(rows, value, weight * T * T, scale)
        if gradient is not None:
            gradient.copy_(_to_logits(dp, p, T, scale * (weight * T), scratch))
        if total is not None and k > 0:
            total.add_(dq, alpha=weight)
        elif total is not None and len(teachers) > 1:
            total.mul_(weight)
    if total is not None:
        lone_weight = weight if len(teachers) == 1 else 1.0  # left for the last multiplication
        _to_logits(total, q, T, scale * (lone_weight * T), scratch)


def _add(total: Tensor, x: Tensor, weight: float, scale: Scale) -> None:
    """Total += weight * scale * x."""
    if isinstance(scale, Tensor):
        total.addcmul_(x, scale, value=weight)
    else:
        total.add_(x, alpha=weight * scale)


def _temper(x: Tensor, T: float, standardize: bool, eps: float, scratch: _Scratch) -> _Tempered:
    """Standardizes rows [R, C] if so asked, divides by T, and takes the softmax."""
    R, C = x.shape
    u, centred, norm, width = x, None, None, None
    if standardize:
        # moments of x - max: exact for a constant row, stable under an offset
        centred = torch.sub(x, x.amax(-1, keepdim=True), out=scratch.take(R))
        centred.sub_(_row_sums(centred).div_(C))
        norm = _row_norms(centred)
        width = torch.add(norm.new_full((), eps * T), norm, alpha=T / math.sqrt(C - 1))
        u = torch.div(centred, width, out=scratch.take(R))
    elif T != 1:
        u = torch.div(x, T, out=scratch.take(R))
    log_probability = torch.log_softmax(u, -1, out=scratch.take(R))
    probability = torch.exp(log_probability, out=scratch.take(R) if u is x else u)  # u is no longer needed
    return _Tempered(log_probability, probability, centred, norm, width)


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


def _to_logits(du: Tensor, x: _Tempered, T: float, scale: Scale, scratch: _Scratch) -> Tensor:
    """From dL/du to dL/dx, in place and times T * scale: through the division by T or the standardization."""
    if x.centred is None or x.norm is None or x.width is None:
        return du.mul_(scale)
    R, C = du.shape
    along = _row_sums(torch.mul(du, x.centred, out=scratch.take(R)))
    along.div_((x.width * x.norm).clamp_min_(1e-30))  # 0 / 1e-30 in a constant row: it has no direction to grow in
    return du.addcmul_(x.centred, along, value=-T / math.sqrt(C - 1)).mul_(scale * T / x.width)


# A divergence takes the teacher's p, the student's q, whether its gradients in u_teacher and u_student are wanted, and a buffer
# for the latter, and returns its value [R, 1] and these two (unspecified where not wanted).


def _kl(
    p: _Tempered, q: _Tempered, want_p: bool, out_p: Tensor | None, out_q: Tensor | None, scratch: _Scratch, zero_terms: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """KL(p || q). zero_terms: a class of probability 0 counts as 0 even where a logarithm is infinite."""
    log_ratio = torch.sub(p.log_probability, q.log_probability, out=out_p)
    if zero_terms:
        log_ratio.masked_fill_(p.probability == 0, 0)
    dq = torch.sub(q.probability, p.probability, out=out_q)
    # q - p sums to 0 over a row, and makes sum p log(p / q) + q - p stationary in both logarithms: their rounding cancels
    terms = torch.addcmul(dq, p.probability, log_ratio, out=scratch.take(len(dq)) if want_p else log_ratio)
    value = _row_sums(terms)
    return value, log_ratio.sub_(value).mul_(p.probability) if want_p else log_ratio, dq


def _forward(p: _Tempered, q: _Tempered, want_p: bool, want_q: bool, out: Tensor | None, scratch: _Scratch, zero_terms: bool) -> Any:
    """KL(teacher || student)."""
    R = len(p.probability)
    return _kl(p, q, want_p, scratch.take(R), scratch.take(R) if out is None else out, scratch, zero_terms)


def _reverse(p: _Tempered, q: _Tempered, want_p: bool, want_q: bool, out: Tensor | None, scratch: _Scratch, zero_terms: bool) -> Any:
    """KL(student || teacher)."""
    R = len(p.probability)
    value, dq, dp = _kl(q, p, want_q, scratch.take(R) if out is None else out, scratch.take(R), scratch, zero_terms)
    return value, dp, dq


def _jensen_shannon(p: _Tempered, q: _Tempered, want_p: bool, want_q: bool, out: Tensor | None, scratch: _Scratch, zero_terms: bool) -> Any:
    """(KL(teacher || m) + KL(student || m)) / 2, m the equal mixture; its gradients are half of each term's own in p and q."""
    R = len(p.probability)
    m = torch.add(p.probability, q.probability, out=scratch.take(R)).div_(2)
    mixture = _Tempered(torch.log(m, out=scratch.take(R)), m)
    unused = scratch.take(R)
    at_p, dp, _ = _kl(p, mixture, want_p, scratch.take(R), unused, scratch, zero_terms)
    at_q, dq, _ = _kl(q, mixture, want_q, scratch.take(R) if out is None else out, unused, scratch, zero_terms)
    return (at_p + at_q).div_(2), dp.div_(2), dq.div_(2)


_DIVERGENCE = {"forward": _forward, "reverse": _reverse, "js": _jensen_shannon}


def _cross_entropy(x: _Tempered, labels: Tensor, options: Options, scale: Scale, rows: Tensor, total: Tensor | None) -> None:
    """Adds ce_weight * CE of labels [R, 1] to `rows` and its gradient to `total`. x at temperature 1; its probabilities are used up."""
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
