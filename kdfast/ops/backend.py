"""Choice of the implementation that an operator runs: its Triton kernel or PyTorch.

    auto     the kernel for CUDA tensors (with TRITON_INTERPRET=1 for CPU tensors too), PyTorch otherwise; Lion has C for the CPU
    triton   the kernel, or one clear error if it cannot run
    torch    PyTorch always

set_backend() sets the choice, backend() for a block, and the environment variable KDFAST_BACKEND at start-up.
"""

import importlib
import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from types import ModuleType
from typing import Literal, get_args

import torch
from torch import Tensor

Backend = Literal["auto", "triton", "torch"]
NAMES: tuple[str, ...] = get_args(Backend)
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_TRITON = importlib.util.find_spec("triton") is not None


def _is_interpreted() -> bool:
    """Reads TRITON_INTERPRET ("1", "true", "on", ...) once, by Triton's own rule, as Triton does when a kernel is defined."""
    if not (_TRITON and os.environ.get("TRITON_INTERPRET")):
        return False
    from triton import knobs

    return bool(knobs.runtime.interpret)


INTERPRETED = _is_interpreted()


def _check_name(name: str, source: str) -> str:
    if name not in NAMES:
        raise ValueError(f"{source} must be one of {', '.join(NAMES)}, got {name!r}")
    return name


# a plain global, not a context variable: torch.compile reads it, and compiles again when it has changed
_current = _check_name(os.environ.get("KDFAST_BACKEND", "auto"), "the environment variable KDFAST_BACKEND")


def set_backend(name: Backend) -> None:
    """Sets the backend of all operators, for the whole process.

    Args:
        name: "auto", "triton" or "torch".

    Raises:
        ValueError: any other name.

    Example:
        >>> import kdfast
        >>> kdfast.set_backend("torch")
        >>> kdfast.set_backend("auto")  # the default
    """
    global _current
    _current = _check_name(name, "set_backend: name")


@contextmanager
def backend(name: Backend) -> Iterator[None]:
    """Sets the backend for a `with` block, for all threads, and restores it afterwards.

    Gradients of losses from inside use the same backend, wherever backward() is called.

    Args:
        name: "auto", "triton" or "torch".

    Raises:
        ValueError: any other name.

    Example:
        >>> import torch, kdfast
        >>> with kdfast.backend("torch"):
        ...     loss = kdfast.functional.kd_loss(torch.zeros(2, 3), torch.zeros(2, 3))
        >>> loss
        tensor(0.)
    """
    global _current
    before = _current
    _current = _check_name(name, "backend: name")
    try:
        yield
    finally:
        _current = before


def current() -> str:
    """Returns the backend in force: "auto", "triton" or "torch"."""
    return _current


@cache
def _kernel_module(operator: str) -> ModuleType | None:
    """Imports kdfast.kernels.<operator>; None without such a kernel or without Triton."""
    name = f"kdfast.kernels.{operator}"
    # the parent first: find_spec raises if the parent of a dotted name is missing
    if any(importlib.util.find_spec(needed) is None for needed in ("triton", "kdfast.kernels", name)):
        return None
    return importlib.import_module(name)


def kernel(operator: str, *tensors: Tensor) -> ModuleType | None:
    """Returns the kernel module that `operator` should launch for these tensors, or None for its PyTorch form.

    Raises:
        RuntimeError: the backend is "triton", and there is no such kernel or it does not take these tensors.
    """
    choice = current()
    # the first tensor settles the usual CPU call: small losses cost little more than these questions
    if choice == "torch" or (choice == "auto" and not INTERPRETED and not tensors[0].is_cuda):
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
    """Decides as `kernel` does, but torch.compile can trace it; raises no errors for the backend "triton"."""
    return current() == "triton" or (current() == "auto" and _TRITON and _runs_here(*tensors))


def _runs_here(*tensors: Tensor) -> bool:
    """Tells if kernels take these tensors; tensors that are not floating may have any dtype and device."""
    return all((t.is_cuda or (INTERPRETED and t.is_cpu)) and t.dtype in KERNEL_DTYPES for t in tensors if t.is_floating_point())
