"""Attention maps of feature maps, and the loss between them: checks, choice of backend, autograd, registration.

    a = mean over channels of |F|^p,   A = a / |a|_2 over the pixels of an image   ("Paying More Attention to Attention",
    loss = sum over stages of the mean of (A_student - A_teacher)^2                 Zagoruyko & Komodakis, ICLR 2017)

    backward, from dA:   da = (dA - A <A, dA>) / |a|,   dF = (p / C) |F|^(p-1) sign(F) da

Floor: each feature map is read once forward and once backward, and its gradient written once; eager PyTorch also writes and reads
|F|^p and two more tensors of that size. The Triton kernel (kernels/attention_map.py) reaches the floor. The PyTorch form walks the batch in
blocks that fit the cache, or, for channels_last and p = 2, reduces along the innermost dimension; torch.compile traces its few tensor
operations, so only the kernel is registered. If sizes differ, PyTorch pools the larger map before either form sees it.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kdfast import reference
from kdfast.ops import backend, checks
from kdfast.ops.precision import arithmetic
from kdfast.ops.registration import opaque

_BLOCK = 262144  # elements, 1 MB of float32


def attention_transfer_loss(student_maps: Tensor | Sequence[Tensor], teacher_maps: Tensor | Sequence[Tensor], *, p: float = 2) -> Tensor:
    """Computes kdfast.functional.attention_transfer_loss, which documents it."""
    students = checks.as_list("attention_transfer_loss: student_maps", student_maps)
    teachers = checks.as_list("attention_transfer_loss: teacher_maps", teacher_maps)
    _check(students, teachers, p)
    for i, (student, teacher) in enumerate(zip(students, teachers)):
        # the feature tensor is pooled, not its map: pooling and the power do not commute
        size = min(student.shape[2], teacher.shape[2]), min(student.shape[3], teacher.shape[3])
        students[i], teachers[i] = _pool(student, size), _pool(teacher, size)
    if _kernel_runs(students, teachers):
        return _AttentionTransfer.apply(float(p), len(students), *students, *teachers)
    stages = []
    for student, teacher in zip(students, teachers):
        a, b = (_AttentionMap.apply(features, p) for features in (student, teacher))
        stages.append(reference.mean((a - b).square()))
    return torch.stack(stages).sum()


def _pool(features: Tensor, size: tuple[int, int]) -> Tensor:
    return features if tuple(features.shape[2:]) == size else F.adaptive_avg_pool2d(features, size)


def _kernel_runs(students: list[Tensor], teachers: list[Tensor]) -> bool:
    """Tells if the kernel runs; the PyTorch form handles maps without pixels or channels."""
    maps = (*students, *teachers)
    if any(features.numel() == 0 for features in maps):
        return False
    if torch.compiler.is_compiling():
        return backend.chooses_kernel(*maps)
    return backend.kernel("attention_map", *maps) is not None


# ---- the PyTorch form ------------------------------------------------------------------------------------------------


class _AttentionMap(torch.autograd.Function):
    """Turns features [B, C, H, W] into unit maps [B, H W], float32 for 16-bit features."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, p: float) -> Tensor:
        energy = _channel_sum(features, p).div_(max(1, features.shape[1]))
        norm = torch.linalg.vector_norm(energy, dim=1, keepdim=True).clamp_min(1e-12)
        unit = energy / norm
        ctx.save_for_backward(features, unit, norm)
        ctx.p = p
        return unit

    @staticmethod
    @torch.autograd.function.once_differentiable  # a second derivative raises instead of being wrong
    def backward(ctx: Any, d_unit: Tensor) -> tuple[Tensor, None]:
        features, unit, norm = ctx.saved_tensors
        along = unit * (unit * d_unit).sum(dim=1, keepdim=True)
        d_energy = (d_unit - torch.where(norm > 1e-12, along, 0.0)) / norm
        scale = (d_energy * (ctx.p / max(1, features.shape[1]))).view(features.shape[0], 1, *features.shape[2:])
        return _power_gradient(features, scale, ctx.p), None


def _channel_sum(features: Tensor, p: float) -> Tensor:
    """Sums |F|^p over channels, [B, H W], without a tensor of the features' size."""
    dtype = arithmetic(features)
    if p == 2 and features.is_contiguous(memory_format=torch.channels_last) and not features.is_contiguous():
        return torch.linalg.vector_norm(features, dim=1, dtype=dtype).square().flatten(1)
    return torch.cat([_power(x.to(dtype), p).sum(dim=1).flatten(1) for x in _blocks(features)])


def _power(x: Tensor, p: float) -> Tensor:
    return x * x if p == 2 else x.abs().pow(p)


def _power_gradient(features: Tensor, scale: Tensor, p: float) -> Tensor:
    """Multiplies scale, [B, 1, H, W], by |F|^(p-1) sign(F) in the features' dtype and layout."""
    if p == 2 and features.dtype == scale.dtype:
        return features * scale
    pieces = []
    for x, s in zip(_blocks(features), _blocks(scale, like=features)):
        x = x.to(scale.dtype)
        slope = x if p == 2 else x.abs().pow(p - 1) * x.sign()
        slope = slope.masked_fill(x == 0, 0) if p < 1 else slope  # as for p = 1: infinity times the sign 0
        pieces.append((slope * s).to(features.dtype))
    return torch.cat(pieces)


def _blocks(x: Tensor, like: Tensor | None = None) -> tuple[Tensor, ...]:
    """Cuts x along the batch into blocks that fit the cache; one block where torch.compile fuses or a device has many cores."""
    like = x if like is None else like
    if torch.compiler.is_compiling() or x.device.type != "cpu":
        return (x,)
    return x.split(max(1, _BLOCK * torch.get_num_threads() // max(1, like[:1].numel())))


# ---- the kernel, one operator to torch.compile -----------------------------------------------------------------------


class _AttentionTransfer(torch.autograd.Function):
    """Computes the loss, 0-dim, of `stages` students and then as many teachers."""

    @staticmethod
    def forward(ctx: Any, p: float, stages: int, *maps: Tensor) -> Tensor:
        wanted = list(ctx.needs_input_grad[2:])
        loss, *slopes = _loss_and_slopes(list(maps[:stages]), list(maps[stages:]), p, wanted)
        ctx.save_for_backward(*(features for features, need in zip(maps, wanted) if need), *slopes)
        ctx.p, ctx.wanted = p, wanted
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        checks.refuse_second_derivative("attention_transfer_loss")
        count = len(ctx.saved_tensors) // 2
        gradients = iter(_gradients(list(ctx.saved_tensors[:count]), list(ctx.saved_tensors[count:]), upstream, ctx.p))
        return None, None, *[next(gradients) if need else None for need in ctx.wanted]


def _empty_loss_and_slopes(students: list[Tensor], teachers: list[Tensor], p: float, wanted: list[bool]) -> list[Tensor]:
    pixels = [x.shape[0] * x.shape[2] * x.shape[3] for x in (*students, *teachers)]
    loss = students[0].new_empty((), dtype=torch.float32)
    return [loss, *(loss.new_empty(n) for n, need in zip(pixels, wanted) if need)]


@opaque("attention_transfer", _empty_loss_and_slopes)
def _loss_and_slopes(students: list[Tensor], teachers: list[Tensor], p: float, wanted: list[bool]) -> list[Tensor]:
    module = backend.kernel("attention_map", *students, *teachers)
    assert module is not None  # _kernel_runs has asked
    loss, slopes = module.loss_and_slopes(students, teachers, p, wanted)
    return [loss, *slopes]


def _empty_gradients(maps: list[Tensor], slopes: list[Tensor], upstream: Tensor, p: float) -> list[Tensor]:
    from kdfast.kernels import attention_map

    return [attention_map.gradient_like(features) for features in maps]


@opaque("attention_transfer_backward", _empty_gradients)
def _gradients(maps: list[Tensor], slopes: list[Tensor], upstream: Tensor, p: float) -> list[Tensor]:
    from kdfast.kernels import attention_map  # for any backend now in force: the kernel has run forward

    return [attention_map.gradient(features, slope, upstream, p) for features, slope in zip(maps, slopes)]


# ---- checks ----------------------------------------------------------------------------------------------------------


def _check(students: list[Tensor], teachers: list[Tensor], p: float) -> None:
    checks.positive_number("attention_transfer_loss: p", p)
    if not students or len(students) != len(teachers):
        raise ValueError(
            "attention_transfer_loss: student_maps and teacher_maps must be equally many, at least one, "
            f"got {len(students)} and {len(teachers)}"
        )
    for i, (student, teacher) in enumerate(zip(students, teachers)):
        for name, features in (("student_maps", student), ("teacher_maps", teacher)):
            if features.ndim != 4:
                raise ValueError(f"attention_transfer_loss: {name}[{i}] must be [B, C, H, W], got shape {tuple(features.shape)}")
            checks.is_floating(f"attention_transfer_loss: {name}[{i}]", features)
        if student.shape[0] != teacher.shape[0]:
            raise ValueError(
                f"attention_transfer_loss: teacher_maps[{i}] must hold the student's batch of {student.shape[0]}, got {teacher.shape[0]}"
            )
        checks.is_on(f"attention_transfer_loss: teacher_maps[{i}]", teacher, "the student's", student.device)
