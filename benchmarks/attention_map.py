"""Attention transfer, forward and backward, in both layouts of feature maps.

Sizes: stages of CIFAR networks (ResNet-110 to ResNet-20, resnet32x4 to resnet8x4) and of ImageNet's ResNet-34 to ResNet-18.
"""

import math
from collections.abc import Iterator, Sequence
from math import prod
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kdfast import reference
from kdfast.benchmarks.harness import Call, Case, Launch, in_float64, loss_call, loss_variants, short_names
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

    def inputs(seed: int) -> list[Tensor]:
        student, teacher = _maps([student_shape, teacher_shape], dtype, device, channels_last, seed)
        return [student.requires_grad_(), teacher]

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
        exact=in_float64(lambda student, teacher: reference.attention_transfer_loss([student], [teacher])),
        variants=loss_variants(original, attention_transfer_loss),
        tier=tier,
    )


def _maps(
    shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, device: torch.device, channels_last: bool, seed: int, skip: int = 0
) -> list[Tensor]:
    """Feature maps after `skip` channels of larger ones: the last channel ends where the allocation does."""
    random, layout = torch.Generator(device).manual_seed(seed), torch.channels_last if channels_last else torch.contiguous_format
    larger = [torch.randn(B, skip + C, H, W, generator=random, device=device).to(dtype) for B, C, H, W in shapes]
    return [x.to(memory_format=layout)[:, skip:] for x in larger]


def original(student: Tensor, teacher: Tensor) -> Tensor:
    """The originals' formula for equal sizes, differentiated by autograd."""
    a, b = (F.normalize(f.pow(2).mean(1).flatten(1)) for f in (student, teacher))
    return (a - b).pow(2).mean()


# ---- small calls -----------------------------------------------------------------------------------------------------


def calls(device: torch.device, dtype: torch.dtype) -> Iterator[Call]:
    """Both layouts, slices of larger maps, rows that can and that cannot be read wide, every kind of power, several stages."""
    for channels_last in (False, True):
        yield _call([(3, 17, 9, 7)], dtype, device, channels_last)
        yield _call([(2, 64, 8, 8)], dtype, device, channels_last, skip=8)
        if dtype == torch.float32:
            yield _call([(2, 700, 3, 1)], dtype, device, channels_last, p=2.5)
            yield _call([(1, 2, 70, 61)], dtype, device, channels_last, p=1)
            yield _call([(2, 5, 4, 4)], dtype, device, channels_last, skip=1, p=3)
            yield _call([(4, 16, 9, 7)] * 3, dtype, device, channels_last)


def _call(
    stages: list[tuple[int, ...]], dtype: torch.dtype, device: torch.device, channels_last: bool, *, skip: int = 0, p: float = 2
) -> Call:
    n = len(stages)
    shapes = [*stages, *((B, C + 3, H, W) for B, C, H, W in stages)]

    def inputs(seed: int) -> list[Tensor]:
        return [x.requires_grad_() for x in _maps(shapes, dtype, device, channels_last, seed, skip)]

    name = f"{stages[0]}, {n} stage{'s' * (n > 1)}, p {p}{', channels_last' * channels_last}{f', after {skip} channels' * bool(skip)}"
    return loss_call(
        name,
        inputs,
        lambda *maps: attention_transfer_loss(maps[:n], maps[n:], p=p),
        lambda *maps: reference.attention_transfer_loss(maps[:n], maps[n:], p),
        # two energies, a comparison, two gradients; once the stages' sum and the fill of the upstream gradient
        launches=None if skip or channels_last else 5 * n + 2,
    )


# ---- launches whose machine code is read -----------------------------------------------------------------------------


class Maps(NamedTuple):
    """The properties of a stage that change the kernels; student and teacher are alike."""

    C: int
    H: int
    W: int
    channels_last: bool = False
    dtype: torch.dtype = torch.float32
    p: float = 2.0


IMAGES = 2  # B: nothing is run, and no plan depends on it
WALKS = ("_energies", "_gradients")


def launches(target: str) -> Iterator[Launch]:
    """Every plan for 16 channels and 33 pixels or more, as wide as its rows can be; smaller maps, every kind of power, comparisons."""
    from kdfast.kernels import attention_map as kernel

    fp32, bf16, fp16 = torch.float32, torch.bfloat16, torch.float16
    seen = set()
    for channels_last in (False, True):
        for dtype in (fp32, bf16):
            for C in (2**i + odd for i in range(4, 12) for odd in (0, 1)):
                for side in (7, 8, 14, 56):
                    V = math.gcd(8, C if channels_last else side**2)
                    key = channels_last, dtype, V, kernel.plan(C, side**2, channels_last, dtype.itemsize, V)
                    if key not in seen:
                        seen.add(key)
                        yield from stage_launches(Maps(C, side, side, channels_last, dtype), WALKS)
            for C, H, W in ((2048, 1, 1), (5, 3, 1), (64, 112, 112)):
                yield from stage_launches(Maps(C, H, W, channels_last, dtype), WALKS)
        for p in (1.0, 3.0, 0.5, 2.5, 4.0):
            yield from stage_launches(Maps(256, 56, 56, channels_last, bf16, p), WALKS)
        yield from stage_launches(Maps(256, 56, 56, channels_last, fp16), WALKS)
    for side in (1, 7, 8, 14, 28, 32, 56, 112):
        yield from stage_launches(Maps(64, side, side), ("_compare",))


def stage_launches(maps: Maps, functions: Sequence[str]) -> Iterator[Launch]:
    """Launches of a training step in which the student's gradient is wanted: those of the functions."""
    from kdfast.kernels import attention_map as kernel

    C, P, channels_last = maps.C, maps.H * maps.W, maps.channels_last

    def call() -> None:
        student, teacher = _maps([(IMAGES, C, maps.H, maps.W)] * 2, maps.dtype, CPU, channels_last, 0)
        _, (slopes,) = kernel.loss_and_slopes([student], [teacher], maps.p, [True, False])
        kernel.gradient(student, slopes, torch.ones(()), maps.p)

    features, energies = IMAGES * C * P * maps.dtype.itemsize, IMAGES * P * 4
    # the features' accesses are judged by their rows; the comparison's tensors have one dimension
    counted = {
        "_energies": (features + energies, features, (0, 0)),
        "_gradients": (2 * features + energies, 2 * features, (0, 0)),
        "_compare": (7 * energies, 3 * energies, (0, 0) if P % 4 or P < 128 else (6, 1)),  # threads of small blocks have fewer elements
    }
    variant = f"{maps.H} x {maps.W}{', channels_last' * channels_last}{f', p {maps.p:g}' * (maps.p != 2)}"
    for function in functions:
        moved, floor, wide = counted[function]
        yield Launch("attention_map", IMAGES, C, short_names(maps.dtype), variant, call, moved, floor, function, wide)
