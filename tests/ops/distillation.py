"""Inputs, calls and comparisons that the tests of kd_loss and linear_kd_loss share."""

import os
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kdfast import functional, reference
from tests.numeric import ALLOWANCE, FLOAT32_ERROR, KERNELS, error, value_and_gradients

FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
Loss = Callable[..., Tensor]  # of tensors alone


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
    """Compares a value and its gradients with float64, and shows that a zero and a permuted gradient fail the comparison.

    bind: kd or linear.
    chunks: values of chunk_rows to compare.
    floor: absolute error that passes, for a value or gradient that is a small difference of nearly equal probabilities.
    slack: factor on eager PyTorch's own error where that is more than 1e-5.
    """
    peer = bind(labels, reference, **options)
    exact, eager = (value_and_gradients(peer, x, upstream) for x in ([x.double() for x in inputs], inputs))
    allowance = max(ALLOWANCE[x.dtype] for x in inputs)
    if upstream is not None and allowance:  # a gradient that was rounded is scaled and rounded again
        allowance += 2**-7  # twice half a unit in bf16's last place
    for case in [{"chunk_rows": rows} for rows in chunks] or [{}]:
        ours = value_and_gradients(bind(labels, **case, **options), inputs, upstream)
        for index, (got, other, want) in enumerate(zip(ours, eager, exact)):
            size = want.abs().max().item() if want.numel() and want.isfinite().all() else 1.0
            allowed = max(FLOAT32_ERROR, slack * error(other, want), floor / max(size, 1e-300)) + allowance
            assert error(got, want) <= allowed, (case, index, error(got, want), allowed)
            if index and size > 1e3 * floor and want.shape[-1] > 2 and allowed < 0.1:  # eager's own gradient may have underflowed
                assert error(torch.zeros_like(got), want) > allowed, "a zero gradient would pass"
                assert error(got.roll(1, -1), want) > allowed, "a permuted gradient would pass"


OPTIONS = st.fixed_dictionaries(
    {
        "temperature": st.floats(0.5, 8),
        "standardize": st.booleans(),
        "divergence": st.sampled_from(["forward", "reverse", "js"]),
        "reduction": st.sampled_from(["mean", "sum", "none"]),
        "label_smoothing": st.sampled_from([0.0, 0.1]),
    }
)


def make_fuzz(check: Callable[..., None], examples: int, interpreted_examples: int) -> Callable[[], None]:
    """A test that calls check(data) with that many random draws."""
    count = interpreted_examples if KERNELS else examples
    return settings(max_examples=count, deadline=None, derandomize=bool(os.environ.get("CI")), database=None)(given(st.data())(check))
