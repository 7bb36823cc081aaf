"""The one error measure of all numeric tests, and gradients by autograd."""

import os
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kdfast.ops.backend import INTERPRETED

# what a dtype may lose against float64 beyond eager PyTorch's own error in it
ALLOWANCE = {torch.float32: 0.0, torch.bfloat16: 1e-3, torch.float16: 1e-3, torch.float64: 0.0}
DEVICE = os.environ.get("KDFAST_TEST_DEVICE", "cpu")  # where tests of operators put their tensors
KERNELS = INTERPRETED or DEVICE != "cpu"  # operators run their Triton kernels in this process
FLOAT32_ERROR = 1e-5


def error(ours: Tensor, exact: Tensor) -> float:
    """max|ours - exact| / max|exact|; equal infinities and NaN in the same places count as equal."""
    ours, exact = ours.detach().double(), exact.detach().double()
    assert ours.shape == exact.shape, f"shape {tuple(ours.shape)} against {tuple(exact.shape)}"
    if exact.numel() == 0:
        return 0.0
    same = (ours == exact) | (ours.isnan() & exact.isnan())
    difference = torch.where(same, 0.0, (ours - exact).abs())
    finite = exact.abs()[exact.isfinite()]
    scale = finite.max() if finite.numel() else exact.new_ones(())
    return (difference.max() / scale.clamp_min(1e-300)).item() if difference.any() else 0.0


def value_and_gradients(function: Callable[..., Tensor], inputs: Sequence[Tensor], upstream: Tensor | None = None) -> list[Tensor]:
    """[function(*inputs), d/dinput_0, d/dinput_1, ...] for leaves that share the inputs' memory; upstream defaults to ones."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    value = function(*leaves)
    value.backward(torch.ones_like(value) if upstream is None else upstream.to(value.dtype))
    return [value.detach(), *(torch.zeros_like(x) if x.grad is None else x.grad for x in leaves)]
