"""Parameters, gradients and comparisons for the tests of Lion."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kdfast
from kdfast.ops.lion import eager, rows
from kdfast.optim import Lion
from tests.numeric import INTERPRETED

SETTINGS: dict[str, Any] = {"lr": 3e-4, "betas": (0.95, 0.98), "weight_decay": 0.1}
SHAPES: list[tuple[int, ...]] = [(64, 3, 7, 7), (10, 512), (10,), (1,), (129, 257), (), (0, 3)]


@pytest.fixture(autouse=True, params=["auto"] if INTERPRETED else ["auto", "torch"])
def form(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs every test of a module twice: by this machine's kernel (Triton's interpreted, or C), and by PyTorch operations."""
    with kdfast.backend(request.param):
        yield request.param


by_kernel = pytest.mark.parametrize("form", ["auto"], indirect=True)


def peers() -> ModuleType:
    module: ModuleType = pytest.importorskip("lion_pytorch", reason="compares with lion-pytorch")
    return module


def parameters(shapes: Sequence[Sequence[int]] = SHAPES, dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    return [nn.Parameter(torch.randn(shape).to(dtype)) for shape in shapes]


def twins(params: Sequence[Tensor]) -> list[nn.Parameter]:
    return [nn.Parameter(p.detach().clone(memory_format=torch.preserve_format)) for p in params]


def give_gradients(*lists: Sequence[Tensor]) -> None:
    """The same fresh random gradients to each list."""
    for same in zip(*lists):
        g = torch.randn(same[0].shape).to(same[0].dtype)
        for p in same:
            p.grad = g.clone()


def momenta(optimizer: torch.optim.Optimizer, params: Sequence[Tensor]) -> list[Tensor]:
    return [optimizer.state[p]["exp_avg"] for p in params]


def state_tensors(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [t for state in optimizer.state.values() for t in state.values()]


def bits_equal(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    """Equal bytes, so that -0 is not 0 and a NaN equals itself."""

    def same(x: Tensor, y: Tensor) -> bool:
        raw = (t.detach().resolve_neg().reshape(-1).view(torch.uint8) for t in (x, y))
        return x.dtype == y.dtype and x.shape == y.shape and torch.equal(*raw)

    return len(a) == len(b) and all(map(same, a, b))


def run_steps(
    steps: int,
    shapes: Sequence[Sequence[int]] = SHAPES,
    dtype: torch.dtype = torch.float32,
    within: Callable[[], AbstractContextManager[Any]] = nullcontext,
    **options: Any,
) -> tuple[list[nn.Parameter], Lion]:
    """Parameters after some steps on gradients that depend on the seed alone, and their optimizer."""
    torch.manual_seed(1)
    params = parameters(shapes, dtype)
    optimizer = Lion(params, **{**SETTINGS, **options})
    for _ in range(steps):
        give_gradients(params)
        with within():
            optimizer.step()
    return params, optimizer


def decide_on_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the PyTorch form treat CPU tensors as a GPU's: nothing is read, masks decide."""
    for module in (rows, eager):
        monkeypatch.setattr(module, "is_readable", lambda tensor: False)


def use_large_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the interpreter, which is slow for each program, run few of them."""
    from kdfast.kernels import lion

    monkeypatch.setattr(lion, "BLOCK", 2**17)
