"""Logit distillation: checks, choice of backend, autograd, registration. reference.kd_loss defines its value.

Two modules compute it, with the same two functions: kernels/distill_kl.py (Triton) and ops/distill_kl/eager.py (PyTorch).

A row of C logits x, at temperature T:

    u        x / T, or with standardize (x - mean) / (sd + eps) / T, sd unbiased
    p, q     softmax(u_teacher), softmax(u_student)
    KL       sum_c p_c (log p - log q)_c
    dKL/du   student: q - p         teacher: p (log p - log q - KL)
    dL/dx    g / T with g = dL/du; with standardize, c = x - mean:  [g - c sum(g c) / ((sd + eps) sd (C - 1))] / (sd + eps) / T

The forward pass computes the gradients as well, while the row is in cache. The first backward pass hands these buffers over, so
they become the .grad of leaves without a copy. A further pass (retain_graph) computes the gradients again.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from kdfast.ops import checks
from kdfast.ops.backend import kernel
from kdfast.ops.distill_kl import eager
from kdfast.ops.distill_kl.options import KDOptions
from kdfast.ops.precision import arithmetic


def separate_teachers(teacher: Tensor | Sequence[Tensor], student: Tensor) -> tuple[Tensor, ...]:
    """One tensor a teacher, from one tensor [..., C], one stacked [K, ..., C], or a sequence."""
    if not isinstance(teacher, Tensor):
        if not isinstance(teacher, Sequence):
            raise TypeError(f"kd_loss: teacher must be a tensor or a sequence of tensors, got {type(teacher).__name__}")
        return tuple(teacher)
    checks.is_tensor("kd_loss: student", student)
    return teacher.unbind(0) if teacher.dim() == student.dim() + 1 else (teacher,)


def kd_loss(student: Tensor, teachers: tuple[Tensor, ...], labels: Tensor | None, options: KDOptions) -> Tensor:
    """functional.kd_loss, its options in one value."""
    labels = None if labels is None else checks.class_labels("kd_loss: labels", labels)
    check_tensors(student, teachers, labels, options)
    return KDCall(options, choose_form(student, *teachers)).differentiate(labels, student, *teachers)


def check_tensors(student: Tensor, teachers: Sequence[Tensor], labels: Tensor | None, options: KDOptions) -> None:
    """Raises one sentence that names the argument. The range of labels is checked later, where their values are read."""
    name = options.operator
    checks.is_tensor(f"{name}: student", student)
    checks.is_floating(f"{name}: student", student)
    if student.dim() == 0 or student.shape[-1] == 0:
        raise ValueError(f"{name}: student must be [..., C] with at least one class, got shape {tuple(student.shape)}")
    if not teachers:
        raise ValueError(f"{name}: teacher must be one tensor or a sequence of at least one, got an empty sequence")
    for teacher in teachers:
        checks.is_tensor(f"{name}: teacher", teacher)
        if teacher.shape != student.shape:
            raise ValueError(
                f"{name}: teacher must have student's shape {tuple(student.shape)} "
                f"(or be [K, ...] or a sequence of such), got {tuple(teacher.shape)}"
            )
        checks.is_floating(f"{name}: teacher", teacher)
        checks.is_on(f"{name}: teacher", teacher, "student's device", student.device)
    weights = len(options.weights(len(teachers)))
    if weights != len(teachers):
        raise ValueError(f"{name}: teacher_weights must hold {len(teachers)} numbers, got {weights}")
    if options.standardize and student.shape[-1] == 1:
        raise ValueError(f"{name}: standardize needs at least two classes, got C = 1")
    if labels is None:
        if options.ce_weight != 0:
            raise ValueError(f"{name}: labels must be given where ce_weight is not 0, got None with ce_weight {options.ce_weight}")
        return
    if labels.shape != student.shape[:-1]:
        images = student.dim() > 2 and labels.shape == student.shape[:1] + student.shape[2:]
        hint = ", as if student were [B, C, ...]: permute its classes to the end" if images else ""
        raise ValueError(f"{name}: labels must have shape {tuple(student.shape[:-1])}, got {tuple(labels.shape)}{hint}")
    checks.is_on(f"{name}: labels", labels, "student's device", student.device)


def choose_form(*tensors: Tensor) -> ModuleType | None:
    """The module that computes the loss of these tensors, backward pass included; None while compiling: a graph chooses when it runs."""
    return None if torch.compiler.is_compiling() else kernel("distill_kl", *tensors) or eager


@dataclass(frozen=True)
class KDCall:
    """A call of kd_loss: its options, and the module that computes it."""

    options: KDOptions
    form: ModuleType | None

    def differentiate(self, labels: Tensor | None, *tensors: Tensor | None) -> Tensor:
        """The loss, with gradients for those tensors that require them."""
        if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors):
            if torch.compiler.is_compiling():  # which takes no tensor twice
                tensors = tuple([x if x is None else x.view_as(x) for x in tensors])
            return _DistillKL.apply(self, labels, *tensors)
        return self.evaluate(labels, tensors, (False,) * len(tensors), None)[0]

    def defers(self, learning: Sequence[Tensor]) -> bool:
        """Whether the gradients of these tensors are left to the backward pass.

        A float16 gradient of a mean underflows unless it is multiplied by a GradScaler's upstream factor first.
        """
        return torch.float16 in [x.dtype for x in learning]

    def evaluate(
        self, labels: Tensor | None, tensors: Sequence[Any], wanted: Sequence[bool], upstream: Tensor | None
    ) -> tuple[Tensor, list[Tensor], Tensor | None]:
        """The loss, the wanted gradients times `upstream`, and the factor that they still need: see kernels/distill_kl.py."""
        student, *teachers = tensors
        if torch.compiler.is_compiling():
            loss, *gradients = _op(student, teachers, labels, upstream, list(wanted), *self.options.encode())
            return loss, gradients, None
        assert self.form is not None
        return self.form.loss_and_gradients(student, teachers, labels, self.options, wanted, upstream)


class _DistillKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: KDCall, labels: Tensor | None, *tensors: Any) -> Tensor:
        wanted = ctx.needs_input_grad[2:]
        deferred = call.defers([x for x, need in zip(tensors, wanted) if need])
        loss, gradients, ctx.remaining = call.evaluate(labels, tensors, (False,) * len(wanted) if deferred else wanted, None)
        ctx.call, ctx.wanted, ctx.deferred = call, wanted, deferred
        if torch.compiler.is_compiling() and not deferred:
            ctx.save_for_backward(*gradients)
        else:
            saved = labels, *tensors  # large: not copied where torch.compile, which cannot ask if they are inference tensors, would
            ctx.save_for_backward(*(saved if torch.compiler.is_compiling() else map(checks.savable, saved)))
            ctx.gradients = None if deferred else gradients
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        call = ctx.call
        if torch.compiler.is_compiling():
            if call.form is None and not ctx.deferred:
                # upstream of one dimension at least: without, it would be rounded to a 16-bit gradient's dtype
                gradients = [(g * upstream[..., None]).to(g.dtype) for g in ctx.saved_tensors]
            else:  # or the forward pass ran eagerly, and saved the inputs
                gradients = _compute_again(ctx, upstream)
        elif torch.is_grad_enabled():
            raise RuntimeError(f"{call.options.operator} has no second derivative: call backward() or grad() without create_graph=True")
        else:
            gradients, ctx.gradients = ctx.gradients, None  # handed over: the caller may keep the buffers
            if ctx.deferred:
                gradients = _compute_again(ctx, upstream)
            else:
                if gradients is None:  # a further pass, in the steps of the first: it gives the same bits
                    gradients = _compute_again(ctx, None)
                call.form.rescale(gradients, upstream, ctx.remaining)
        in_order = iter(gradients)
        return None, None, *[next(in_order) if need else None for need in ctx.wanted]


def _compute_again(ctx: Any, upstream: Tensor | None) -> list[Tensor]:
    """The gradients from the inputs, multiplied by `upstream`, if given, before they are rounded to their dtype."""
    labels, *tensors = ctx.saved_tensors
    return ctx.call.evaluate(labels, tensors, ctx.wanted, upstream)[1]


# ---- what torch.compile sees -----------------------------------------------------------------------------------------


@torch.library.custom_op("kdfast::distill_kl", mutates_args=())
def _op(
    student: Tensor,
    teachers: list[Tensor],
    labels: Tensor | None,
    upstream: Tensor | None,
    wanted: list[bool],
    numbers: list[float],
    ignore_index: int,
    choices: str,
) -> list[Tensor]:
    form, options = kernel("distill_kl", student, *teachers) or eager, KDOptions.decode(numbers, ignore_index, choices)
    loss, gradients, _ = form.loss_and_gradients(student, teachers, labels, options, wanted, upstream, in_graph=True)
    return [loss, *gradients]


@_op.register_fake
def _(
    student: Tensor, teachers: list[Tensor], labels: Tensor | None, upstream: Tensor | None, wanted: list[bool], *options: Any
) -> list[Tensor]:
    return empty_results((student, *teachers), wanted, KDOptions.decode(*options))


def empty_results(tensors: Sequence[Tensor | None], wanted: Sequence[bool], options: KDOptions) -> list[Tensor]:
    """A loss of the first tensor's rows and gradients of the wanted tensors, without values."""
    present = [x for x in tensors if x is not None]
    loss = present[0].new_empty(present[0].shape[:-1] if options.reduction == "none" else (), dtype=arithmetic(*present))
    learning = [x for need, x in zip(wanted, tensors) if need and x is not None]
    return [loss, *[torch.empty_like(x, memory_format=torch.contiguous_format) for x in learning]]
