"""Which implementation an operator runs: its Triton kernel or PyTorch.

    auto     the kernel for CUDA tensors (with TRITON_INTERPRET=1 for CPU tensors too), PyTorch otherwise; Lion has C for the CPU
    triton   the kernel, or one clear error where it cannot run
    torch    PyTorch always

The choice is set with set_backend(), for a block with backend(), or at start-up by the environment variable KDFAST_BACKEND.
"""

import importlib
import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

NAMES = ("auto", "triton", "torch")
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_TRITON = importlib.util.find_spec("triton") is not None
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # read once, as Triton does when a kernel is defined


def _checked(name: str, source: str) -> str:
    if name not in NAMES:
        raise ValueError(f"{source} must be one of {', '.join(NAMES)}, got {name!r}")
    return name


# a plain global, not a context variable: torch.compile can read it, and compiles again when it has changed
_current = _checked(os.environ.get("KDFAST_BACKEND", "auto"), "the environment variable KDFAST_BACKEND")


def set_backend(name: str) -> None:
    """Chooses the backend of all operators, for the whole process.

    Args:
        name: "auto", "triton" or "torch".

    Raises:
        ValueError: any other name.
    """
    global _current
    _current = _checked(name, "set_backend: name")


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Chooses the backend for a `with` block: `with kdfast.backend("torch"): ...`; for all threads, and restored afterwards.

    Gradients of what was computed inside use the same backend, wherever backward() is called.

    Args:
        name: "auto", "triton" or "torch".

    Raises:
        ValueError: any other name.
    """
    global _current
    before = _current
    _current = _checked(name, "backend: name")
    try:
        yield
    finally:
        _current = before


def current() -> str:
    """The backend in force here: "auto", "triton" or "torch"."""
    return _current


@cache
def _kernel_module(operator: str) -> ModuleType | None:
    """kdfast.kernels.<operator>, or None where there is no such kernel or no Triton."""
    name = f"kdfast.kernels.{operator}"
    # the parent first: find_spec raises where the parent of a dotted name is missing
    if any(importlib.util.find_spec(needed) is None for needed in ("triton", "kdfast.kernels", name)):
        return None
    return importlib.import_module(name)


def kernel(operator: str, *tensors: Tensor) -> ModuleType | None:
    """The kernel module that `operator` should launch for these tensors, or None for its PyTorch form.

    Raises:
        RuntimeError: the backend is "triton", and there is no such kernel or it does not take these tensors.
    """
    choice = current()
    # the usual CPU call is settled by its first tensor: small losses there cost little more than such questions
    if choice == "torch" or (choice == "auto" and not _INTERPRETED and not tensors[0].is_cuda):
        return None
    runs_here = _runs_here(*tensors)
    if choice == "auto":
        return _kernel_module(operator) if runs_here else None
    module = _kernel_module(operator)
    if module is None:
        raise RuntimeError(f"{operator}: the backend is 'triton', but there is no Triton kernel for it in this installation")
    if not runs_here:
        seen = ", ".join(sorted({f"{t.dtype} on {t.device.type}" for t in tensors}))
        raise RuntimeError(f"{operator}: the backend is 'triton', which needs float32, bfloat16 or float16 CUDA tensors, got {seen}")
    return module


def chooses_kernel(*tensors: Tensor) -> bool:
    """What `kernel` decides, for torch.compile, which can trace this; where the backend is "triton" its errors are left to it."""
    return current() == "triton" or (current() == "auto" and _TRITON and _runs_here(*tensors))


def _runs_here(*tensors: Tensor) -> bool:
    return all((t.is_cuda or (_INTERPRETED and t.is_cpu)) and t.dtype in KERNEL_DTYPES for t in tensors if t.is_floating_point())
