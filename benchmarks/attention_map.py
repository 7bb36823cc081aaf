"""Attention transfer, forward and backward, for the harness: stages of CIFAR networks (ResNet-110 to ResNet-20, resnet32x4 to resnet8x4)
and of ImageNet's ResNet-34 to ResNet-18, in both layouts.
"""

from collections.abc import Iterator
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kdfast import reference
from kdfast.benchmarks.harness import Case, loss_variants
from kdfast.benchmarks.timing import CPU
from kdfast.functional import attention_transfer_loss

MAPS = {
    "quick": [((64, 64, 32, 32), (64, 64, 32, 32))],
    "usual": [
        ((64, 16, 32, 32), (64, 16, 32, 32)),
        ((64, 256, 8, 8), (64, 256, 8, 8)),
        ((32, 128, 28, 28), (32, 128, 28, 28)),
        ((64, 64, 8, 8), (64, 256, 8, 8)),
    ],
}


def cases(device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    """Every pair of maps, contiguous and channels_last."""
    for tier, pairs in MAPS.items():
        for student, teacher in pairs:
            yield case(student, teacher, False, dtype, device, "usual")
            yield case(student, teacher, True, dtype, device, tier)


def case(
    student_shape: tuple[int, ...],
    teacher_shape: tuple[int, ...],
    channels_last: bool,
    dtype: torch.dtype = torch.float32,
    device: torch.device = CPU,
    tier: Any = "usual",
) -> Case:
    """Feature maps [B, C, H, W] of student and teacher, and the loss's gradient in the student's."""
    memory_format = torch.channels_last if channels_last else torch.contiguous_format

    def inputs(seed: int) -> tuple[Tensor, Tensor]:
        random = torch.Generator(device).manual_seed(seed)
        student, teacher = (
            torch.randn(shape, generator=random, device=device).to(dtype=dtype, memory_format=memory_format)
            for shape in (student_shape, teacher_shape)
        )
        return student.requires_grad_(), teacher

    def exact(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        student = student.detach().double().requires_grad_()
        value = reference.attention_transfer_loss([student], [teacher.double()])
        return value.detach(), torch.autograd.grad(value, student)[0]

    student, teacher = prod(student_shape), prod(teacher_shape)
    against = "" if student_shape == teacher_shape else f" to {teacher_shape[1]} channels"
    return Case(
        operator="attention_transfer_loss",
        name=" x ".join(map(str, student_shape)) + against + (", channels_last" if channels_last else ""),
        shape=dict(zip("BCHW", student_shape)),
        dtype=dtype,
        device=device,
        # the student's maps are read in both passes and their gradient is written, the teacher's are read once
        bytes=(3 * student + teacher) * dtype.itemsize,
        operations=3 * student + 2 * teacher,  # square and sum; the gradient's product
        inputs=inputs,
        exact=exact,
        variants=loss_variants(original, attention_transfer_loss),
        tier=tier,
    )


def original(student: Tensor, teacher: Tensor) -> Tensor:
    """The originals' formula for equal sizes, differentiated by autograd."""
    a, b = (F.normalize(f.pow(2).mean(1).flatten(1)) for f in (student, teacher))
    return (a - b).pow(2).mean()
