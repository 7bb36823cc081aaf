"""Checks that the tests of all operators share: comparison with float64, rows far apart, poison around inputs, random cases."""

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.numeric import ALLOWANCE, DEVICE, FLOAT32_ERROR, KERNELS, error, value_and_gradients

FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
Loss = Callable[..., Tensor]  # of tensors alone


def compare(
    ours: Loss,
    exact: Loss,
    inputs: Sequence[Tensor],
    upstream: Tensor | None = None,
    *,
    floor: float = 0.0,
    gradient_floor: float = 0.0,
    slack: float = 1.0,
    allowance: float = 0.0,
    eager_dtype: torch.dtype | None = None,
) -> None:
    """Compares a value and its gradients with float64 (contract 1), and shows that a permuted gradient and a zero fail the comparison.

    Args:
        ours: the operator.
        exact: its reference, in float64 and as eager PyTorch.
        inputs: tensors that get gradients.
        upstream: gradient of the value, or a weight for each of its elements; 1 by default.
        floor: absolute error that passes, for values and gradients that are small differences.
        gradient_floor: the same for gradients alone.
        slack: factor on eager PyTorch's own error where that is more than 1e-5.
        allowance: relative error that passes beyond the dtype's own.
        eager_dtype: dtype in which eager PyTorch computes; the inputs' by default.
    """
    want = value_and_gradients(exact, [x.double() for x in inputs], upstream)
    eager = value_and_gradients(exact, [x.to(eager_dtype or x.dtype) for x in inputs], upstream)
    got = value_and_gradients(ours, inputs, upstream)
    dtypes = {x.dtype for x in inputs}
    least = 1e-11 if dtypes == {torch.float64} else FLOAT32_ERROR
    allowance += max(ALLOWANCE[dtype] for dtype in dtypes)
    for index, (our, peer, true) in enumerate(zip(got, eager, want)):
        size = true.abs().max().item() if true.numel() and true.isfinite().all() else 1.0
        absolute = max(floor, gradient_floor if index else 0.0, FLOAT32_ERROR if size < 1e-12 else 0.0)
        allowed = max(least, slack * error(peer, true), absolute / max(size, 1e-300)) + allowance
        assert error(our, true) <= allowed, (index, error(our, true), allowed)
        if true.isfinite().all() and size > 1e3 * absolute and allowed < 0.1:  # eager's own gradient may have underflowed
            assert not true.numel() or error(torch.zeros_like(our), true) > allowed, "a zero would pass"
            assert not index or true.numel() < 9 or error(our.roll(1), true) > allowed, "a permuted gradient would pass"


def unit(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.nn.functional.normalize(torch.randn(shape), dim=-1).to(dtype)


def surround(x: Tensor) -> Tensor:
    """Copies x into the middle of larger rows of NaN."""
    rows = x.new_full((*x.shape[:-1], x.shape[-1] + 7), float("nan"))
    rows[..., 3:-4] = x
    return rows[..., 3:-4]


def place_far_apart(x: Tensor) -> Tensor:
    """Copies the rows of x, in float16, to more than 2^31 elements from each other: virtual memory, never touched between them."""
    stride = 2**31 + 64
    storage = torch.empty((len(x) - 1) * stride + x[0].numel(), dtype=torch.float16, device=DEVICE)
    return storage.as_strided(x.shape, (stride, *x[0].contiguous().stride())).copy_(x)


def make_fuzz(check: Callable[..., None], examples: int, interpreted_examples: int) -> Callable[[], None]:
    """A test that calls check(data) with that many random draws."""
    count = interpreted_examples if KERNELS else examples
    return settings(max_examples=count)(given(st.data())(check))


def record_launches(monkeypatch: pytest.MonkeyPatch, module: ModuleType, *names: str) -> list[str]:
    """The names of these kernels of a module, in the order in which they will be launched."""
    launched: list[str] = []

    class Recorded:
        def __init__(self, name: str):
            self.name, self.kernel = name, getattr(module, name)

        def __getitem__(self, grid: Any) -> Any:
            launched.append(self.name)
            return self.kernel[grid]

    for name in names:
        monkeypatch.setattr(module, name, Recorded(name))
    return launched
