"""Inputs and calls that the tests of kd_loss and linear_kd_loss share."""

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from kdfast import functional, reference
from tests.ops.contracts import Loss, compare


def make_logits(*shape: int, dtype: torch.dtype = torch.float32, spread: float = 3.0) -> Tensor:
    return (spread * torch.randn(shape)).to(dtype)


def make_layers(
    N: int, C: int, D_s: int, D_t: int, dtype: torch.dtype = torch.float32, teacher_dtype: torch.dtype | None = None
) -> list[Tensor]:
    """Hidden, weight and bias of student and teacher; logits have a standard deviation of about 3."""
    sides = (D_s, dtype), (D_t, teacher_dtype or dtype)
    return [x.to(kind) for D, kind in sides for x in (torch.randn(N, D), 3 * torch.randn(C, D) / D**0.5, torch.randn(C))]


def kd(labels: Tensor | None = None, module: ModuleType = functional, **options: Any) -> Loss:
    """kd_loss of `module` as a function of student and teachers."""
    return lambda student, *teachers: module.kd_loss(student, list(teachers), labels, **options)


def linear(labels: Tensor | None = None, module: ModuleType = functional, **options: Any) -> Loss:
    """linear_kd_loss of `module` as a function of hidden, weight and bias of student and teacher."""
    return lambda h, w, b, h_t, w_t, b_t: module.linear_kd_loss(h, w, h_t, w_t, labels, student_bias=b, teacher_bias=b_t, **options)


def chunked(labels: Tensor | None = None, module: ModuleType = functional, **options: Any) -> Loss:
    """kd_loss in chunks of two rows: linear_kd_loss of `module` whose layers copy their inputs."""

    def call(student: Tensor, teacher: Tensor) -> Tensor:
        copy = torch.eye(student.shape[-1], dtype=student.dtype)
        return module.linear_kd_loss(student, copy, teacher, copy, labels, chunk_rows=2, **options)

    return call


def agree(
    bind: Callable[..., Loss],
    inputs: Sequence[Tensor],
    labels: Tensor | None = None,
    *,
    upstream: Tensor | None = None,
    chunks: Sequence[int | None] = (),
    floor: float = 0.0,
    slack: float = 1.0,
    **options: Any,
) -> None:
    """Compares kd or linear with its reference, for each of these values of chunk_rows."""
    # a 16-bit gradient that was rounded is scaled and rounded again: twice half a unit in bf16's last place
    allowance = 2**-7 if upstream is not None and any(x.itemsize == 2 for x in inputs) else 0.0
    for case in [{"chunk_rows": rows} for rows in chunks] or [{}]:
        ours, exact = bind(labels, **case, **options), bind(labels, reference, **options)
        compare(ours, exact, inputs, upstream, floor=floor, slack=slack, allowance=allowance)


OPTIONS = st.fixed_dictionaries(
    {
        "temperature": st.floats(0.5, 8),
        "standardize": st.booleans(),
        "divergence": st.sampled_from(["forward", "reverse", "js"]),
        "reduction": st.sampled_from(["mean", "sum", "none"]),
        "label_smoothing": st.sampled_from([0.0, 0.1]),
    }
)
