"""Logit distillation without the logits, forward and backward: from hidden states and weights, of which the student's get gradients.

The eager original is the loss as RepDistiller writes it, on two F.linear; "kd_loss of two F.linear" fuses the rows but keeps the logits.
A step is 8 N C D operations: two products for logits, two for gradients.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kdfast import reference
from kdfast.benchmarks import distill_kl
from kdfast.benchmarks.harness import Call, Case, Launch, Variant, in_float64, loss_call, loss_step, loss_variants
from kdfast.benchmarks.timing import CPU
from kdfast.functional import kd_loss, linear_kd_loss

SHAPES = {  # N, D, C
    "cpu": {
        "quick": [(512, 256, 1000)],
        "usual": [(2048, 512, 1000), (512, 256, 32000)],
        "long": [(1024, 1024, 32000), (512, 256, 131072)],
    },
    "cuda": {
        "quick": [(2048, 512, 1000)],
        "usual": [(4096, 1024, 32000)],
        "long": [(8192, 4096, 32000), (8192, 4096, 131072)],
    },
}
TEMPERATURE = 4.0
UNFUSED = "kd_loss of two F.linear"


def cases(device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    """Every size."""
    for tier, shapes in SHAPES[device.type].items():
        for N, D, C in shapes:
            yield case(N, D, C, dtype, device, tier)


def case(N: int, D: int, C: int, dtype: torch.dtype = torch.float32, device: torch.device = CPU, tier: Any = "usual") -> Case:
    """N rows of D features and C classes, for student and teacher."""
    unfused = Variant(lambda: loss_step(lambda *x: kd_loss(*_logits(*x), temperature=TEMPERATURE)))
    return Case(
        operator="linear_kd_loss",
        name=f"N {N:,}, D {D:,}, C {C:,}",
        shape={"N": N, "D": D, "C": C},
        dtype=dtype,
        device=device,
        bytes=3 * (N + C) * D * dtype.itemsize,  # hidden states and weights are read, the student's gradients are written
        operations=8 * N * C * D,
        inputs=lambda seed: _tensors(N, D, C, dtype, device, seed),
        exact=in_float64(lambda *x: reference.linear_kd_loss(*x, temperature=TEMPERATURE)),
        variants=loss_variants(original, lambda *x: linear_kd_loss(*x, temperature=TEMPERATURE), {UNFUSED: unfused}),
        tier=tier,
    )


def _tensors(N: int, D: int, C: int, dtype: torch.dtype, device: torch.device, seed: int) -> list[Tensor]:
    random = torch.Generator(device).manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, device=device)

    student = [x.to(dtype).requires_grad_() for x in (draw(N, D), draw(C, D) * 2 / D**0.5)]
    return [*student, *(x.to(dtype) for x in (draw(N, D), draw(C, D) * 2 / D**0.5))]


def _logits(student_hidden: Tensor, student_weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor) -> tuple[Tensor, Tensor]:
    return F.linear(student_hidden, student_weight), F.linear(teacher_hidden, teacher_weight)


def original(*tensors: Tensor) -> Tensor:
    """The original's own operations on whole logits."""
    return distill_kl.original(*_logits(*tensors), None, temperature=TEMPERATURE)


def calls(device: torch.device, dtype: torch.dtype) -> Iterator[Call]:
    """Several chunks, the last one smaller."""
    yield loss_call(
        "50 x 16 x 1001, chunks of 20",
        lambda seed: _tensors(50, 16, 1001, dtype, device, seed),
        lambda *x: linear_kd_loss(*x, chunk_rows=20, standardize=True),
        lambda *x: reference.linear_kd_loss(*x, standardize=True),
    )


def launches(target: str) -> Iterator[Launch]:
    """None of its own: kd_loss's kernel runs on each chunk."""
    return iter(())
