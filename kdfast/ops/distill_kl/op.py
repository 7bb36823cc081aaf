"""Logit distillation: checks, choice of backend, autograd, registration. reference.kd_loss is its meaning.

It runs in one of two forms with the same two functions: the Triton kernel (kernels/distill_kl.py), or ops/distill_kl_torch.py.

A row of C logits x, at temperature T:

    u        x / T, or with standardize (x - mean) / (sd + eps) / T, sd unbiased
    p, q     softmax(u_teacher), softmax(u_student)
    KL       sum_c p_c (log p - log q)_c
    dKL/du   student: q - p         teacher: p (log p - log q - KL)
    dL/dx    g / T with g = dL/du; with standardize, c = x - mean:  [g - c sum(g c) / ((sd + eps) sd (C - 1))] / (sd + eps) / T

The forward pass computes the gradient as well, while the row is at hand. The first backward pass gives that buffer away,
so that it becomes the .grad of a leaf without a copy; a further one (retain_graph) computes it again.
"""

import math
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from kdfast.ops import checks
from kdfast.ops.backend import kernel
from kdfast.ops.distill_kl import eager as distill_kl_torch
from kdfast.ops.distill_kl.eager import Options
from kdfast.ops.precision import arithmetic

DIVERGENCES = ("forward", "reverse", "js")
REDUCTIONS = ("mean", "sum", "none")
_NUMBERS = ("temperature", "eps", "kd_weight", "ce_weight", "label_smoothing")


def separate(teacher: Tensor | Sequence[Tensor], student: Tensor) -> tuple[Tensor, ...]:
    """The teachers' logits one by one: from one tensor [..., C], one stacked [K, ..., C], or a sequence."""
    if not isinstance(teacher, Tensor):
        if not isinstance(teacher, Sequence):
            raise TypeError(f"kd_loss: teacher must be a tensor or a sequence of tensors, got {type(teacher).__name__}")
        return tuple(teacher)
    checks.is_tensor("kd_loss: student", student)
    return teacher.unbind(0) if teacher.dim() == student.dim() + 1 else (teacher,)


def kd_loss(student: Tensor, teachers: tuple[Tensor, ...], labels: Tensor | None, options: Options) -> Tensor:
    """functional.kd_loss, its options in one value."""
    options = plain(options)
    _check(student, teachers, labels, options)
    if torch.is_grad_enabled() and (student.requires_grad or any(t.requires_grad for t in teachers)):
        return _DistillKL.apply(options, labels, *checks.distinct(student, *teachers))
    return _form(student, teachers).loss_and_gradients(student, teachers, labels, options, (False,) * (1 + len(teachers)), None)[0]


def weights_of(teacher_weights: Sequence[float] | Tensor | None, count: int) -> tuple[float, ...]:
    """One number a teacher; None: ones."""
    if teacher_weights is None:
        return (1.0,) * count
    if not isinstance(teacher_weights, (Sequence, Tensor)):
        raise TypeError(f"kd_loss: teacher_weights must be a sequence of numbers, got {teacher_weights!r}")
    return tuple(teacher_weights)


def plain(options: Options) -> Options:
    """The options with Python numbers, which a graph, a kernel and a cache can keep.

    Raises:
        TypeError: one is no number, or a tensor that would have to get a gradient.
    """
    given = [*(getattr(options, name) for name in _NUMBERS), *options.teacher_weights]
    if all(type(value) is float for value in given):
        return options
    numbers: dict[str, Any] = {name: checks.number(f"kd_loss: {name}", value) for name, value in zip(_NUMBERS, given)}
    weights = tuple(checks.number("kd_loss: teacher_weights", weight) for weight in options.teacher_weights)
    return options._replace(teacher_weights=weights, **numbers)


def _check(student: Tensor, teachers: Sequence[Tensor], labels: Tensor | None, options: Options) -> None:
    """Raises one sentence that names the argument. The range of the labels is checked later, where their values are read."""
    checks.is_tensor("kd_loss: student", student)
    if not student.is_floating_point():
        raise TypeError(f"kd_loss: student must be floating, got {student.dtype}")
    if student.dim() == 0 or student.shape[-1] == 0:
        raise ValueError(f"kd_loss: student must be [..., C] with at least one class, got shape {tuple(student.shape)}")
    if not teachers:
        raise ValueError("kd_loss: teacher must be one tensor or a sequence of at least one, got an empty sequence")
    for teacher in teachers:
        checks.is_tensor("kd_loss: teacher", teacher)
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
    if options.standardize and student.shape[-1] == 1:
        raise ValueError("kd_loss: standardize needs at least two classes, got C = 1")
    check_options(options)
    if labels is None:
        if options.ce_weight != 0:
            raise ValueError(f"kd_loss: labels must be given where ce_weight is not 0, got None with ce_weight {options.ce_weight}")
        return
    checks.is_tensor("kd_loss: labels", labels)
    if labels.dtype != torch.int64:
        raise TypeError(f"kd_loss: labels must be int64, got {labels.dtype}")
    if labels.shape != student.shape[:-1]:
        images = student.dim() > 2 and labels.shape == student.shape[:1] + student.shape[2:]
        hint = ", as if student were [B, C, ...]: permute its classes to the end" if images else ""
        raise ValueError(f"kd_loss: labels must have shape {tuple(student.shape[:-1])}, got {tuple(labels.shape)}{hint}")
    if labels.device != student.device:
        raise ValueError(f"kd_loss: labels must be on student's device {student.device}, got {labels.device}")


def check_options(options: Options) -> None:
    """Raises one sentence that names an option which is out of range whatever the tensors."""
    if not 0 < options.temperature < math.inf:
        raise ValueError(f"kd_loss: temperature must be positive, got {options.temperature}")
    if options.standardize and not options.eps >= 0:
        raise ValueError(f"kd_loss: eps must not be negative, got {options.eps}")
    if not 0 <= options.label_smoothing <= 1:
        raise ValueError(f"kd_loss: label_smoothing must be in [0, 1], got {options.label_smoothing}")
    if options.divergence not in DIVERGENCES:
        raise ValueError(f"kd_loss: divergence must be one of {', '.join(DIVERGENCES)}, got {options.divergence!r}")
    if options.reduction not in REDUCTIONS:
        raise ValueError(f"kd_loss: reduction must be one of {', '.join(REDUCTIONS)}, got {options.reduction!r}")


class _DistillKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, options: Options, labels: Tensor | None, student: Tensor, *teachers: Tensor) -> Tensor:
        wanted, form = ctx.needs_input_grad[2:], _form(student, teachers)
        # a float16 gradient of a mean underflows before a GradScaler's upstream factor lifts it: such wait for the factor
        deferred = torch.float16 in [x.dtype for x, need in zip((student, *teachers), wanted) if need]
        now = (False,) * len(wanted) if deferred else wanted
        loss, gradients, ctx.remaining = form.loss_and_gradients(student, teachers, labels, options, now, None)
        ctx.options, ctx.form, ctx.wanted, ctx.deferred = options, form, wanted, deferred
        if torch.compiler.is_compiling() and not deferred:
            ctx.save_for_backward(*gradients)
        else:
            ctx.save_for_backward(labels, student, *teachers)
            ctx.gradients = None if deferred else gradients
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        if torch.compiler.is_compiling():
            if ctx.form is _Registered and not ctx.deferred:
                gradients = [_scaled(g, upstream) for g in ctx.saved_tensors]
            else:  # or the forward pass ran eagerly, and kept the inputs
                gradients = _again(ctx, _Registered, upstream)
        elif torch.is_grad_enabled():
            raise RuntimeError("kd_loss has no second derivative: call backward() or grad() without create_graph=True")
        else:
            gradients, ctx.gradients = ctx.gradients, None  # given away: whoever gets the buffer may keep it
            if gradients is None:
                gradients = _again(ctx, ctx.form, upstream)
            else:
                ctx.form.rescale(gradients, upstream, ctx.remaining)
        in_order = iter(gradients)
        return None, None, *[next(in_order) if need else None for need in ctx.wanted]


def _again(ctx: Any, form: ModuleType | type["_Registered"], upstream: Tensor) -> list[Tensor]:
    """The gradients from the inputs, scaled by `upstream` before they are rounded to their dtype."""
    labels, student, *teachers = ctx.saved_tensors
    return form.loss_and_gradients(student, teachers, labels, ctx.options, ctx.wanted, upstream)[1]


def _scaled(gradient: Tensor, upstream: Tensor) -> Tensor:
    return (gradient * upstream[..., None]).to(gradient.dtype)  # of one dimension at least: else it would be rounded to that dtype


def _form(student: Tensor, teachers: Sequence[Tensor]) -> ModuleType | type["_Registered"]:
    """The backend in force, fixed here for the backward pass too; a compiled graph asks when it runs."""
    if torch.compiler.is_compiling():
        return _Registered
    return kernel("distill_kl", student, *teachers) or distill_kl_torch


# ---- what torch.compile sees -----------------------------------------------------------------------------------------


class _Registered:
    """The form that a graph calls."""

    @staticmethod
    def loss_and_gradients(
        student: Tensor,
        teachers: Sequence[Tensor],
        labels: Tensor | None,
        options: Options,
        wanted: Sequence[bool],
        upstream: Tensor | None,
    ) -> tuple[Tensor, list[Tensor], None]:
        loss, *gradients = _op(student, list(teachers), labels, upstream, list(wanted), *options)
        return loss, gradients, None


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
    module = kernel("distill_kl", student, *teachers)
    if module is None:
        loss, gradients, _ = distill_kl_torch.loss_and_gradients(student, teachers, labels, options, wanted, upstream)
    else:
        loss, gradients, _ = module.loss_and_gradients(student, teachers, labels, options, wanted, upstream, in_graph=True)
    return [loss, *gradients]


@_op.register_fake
def _(
    student: Tensor, teachers: list[Tensor], labels: Tensor | None, upstream: Tensor | None, wanted: list[bool], *options: Any
) -> list[Tensor]:
    reduction = options[-1]
    loss = student.new_empty(student.shape[:-1] if reduction == "none" else (), dtype=arithmetic(student, *teachers))
    gradients = [torch.empty_like(x, memory_format=torch.contiguous_format) for need, x in zip(wanted, (student, *teachers)) if need]
    return [loss, *gradients]
