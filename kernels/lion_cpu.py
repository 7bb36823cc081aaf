"""The Lion step of many tensors on a CPU in one call, compiled from lion_cpu.c where kdfast is installed beside a C compiler.

    p <- p (1 - lr wd);   u = sign(b1 m + (1 - b1) g), sign(0) = 0;   p <- p - lr u;   m <- b2 m + (1 - b2) g

It makes five passes over memory, which is the floor (read p, g, m; write p, m; 20 bytes a float32 parameter): a vector of each tensor is
loaded, stepped in registers and stored. PyTorch's operations read and write the tensors fifteen times and more. Threads are PyTorch's
own (both use the OpenMP library that PyTorch has loaded); each steps an equal part of all elements, wherever tensors end.

Rounding is PyTorch's on processors with fused multiply-adds: round(b1 m), then one with g. Everything is float32 until it is stored.
"""

import ctypes
import importlib.util
import platform
from array import array
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16)


class _Tensors(ctypes.Structure):
    """struct tensors of lion_cpu.c."""

    _fields_ = [
        *[(name, ctypes.c_void_p) for name in ("params", "grads", "momenta", "sizes")],
        *[(name, ctypes.c_int64) for name in ("count", "elements")],
        *[(name, ctypes.c_int32) for name in ("param_is_bfloat16", "grad_is_bfloat16", "momentum_is_bfloat16")],
    ]


@cache
def _function() -> Callable[..., None] | None:
    """kdfast_lion of lion_cpu.c; None if it was not built, is an older version's, or cannot run on this processor."""
    library = importlib.util.find_spec(f"{__package__}._lion_cpu")
    if library is None or library.origin is None:
        return None
    if platform.machine().lower() in ("x86_64", "amd64") and not torch.backends.cpu.get_cpu_capability().startswith("AVX"):
        return None  # without fused multiply-adds PyTorch rounds twice, and so would not have the same bits
    try:
        function = ctypes.CDLL(library.origin).kdfast_lion
    except (OSError, AttributeError):
        return None
    function.argtypes = ctypes.POINTER(_Tensors), ctypes.c_int, *[ctypes.c_float] * 7
    function.restype = None
    return function


def takes(like: Any, options: Any) -> bool:
    """Whether step() takes rows (kdfast.ops.lion.rows.Row) of this one's device and dtypes with these Options."""
    tensors = like.param, like.grad, like.momentum
    rounds = options.rounding == "nearest" or like.param.dtype == torch.float32
    return rounds and not options.cautious and all(t.is_cpu and t.dtype in DTYPES for t in tensors) and _function() is not None


class Table:
    """Tells the compiled step where its tensors are, as long as they stay there."""

    def __init__(
        self, params: "array[int]", grads: "array[int]", momenta: "array[int]", sizes: "array[int]", are_bfloat16: list[bool]
    ) -> None:
        self.arrays = params, grads, momenta, sizes  # 64 bits each; the struct points to them
        tensors = _Tensors(*[column.buffer_info()[0] for column in self.arrays], len(sizes), sum(sizes), *are_bfloat16)
        self.pointer = ctypes.pointer(tensors)


def make_table(rows: Sequence[Any], before: Table | None = None, *, capturable: bool = False) -> Table:
    """The table of these rows (kdfast.ops.lion.rows.Row).

    Args:
        rows: of the same dtypes, in DTYPES, on the CPU; the tensors of a row fill memory without gaps, all in the same order of dimensions.
        before: ignored; Triton's kernel needs it.
        capturable: ignored.
    """
    columns = list(zip(*((row.param, row.grad, row.momentum) for row in rows)))
    params, grads, momenta = (array("q", map(Tensor.data_ptr, column)) for column in columns)
    are_bfloat16 = [column[0].dtype == torch.bfloat16 for column in columns]
    return Table(params, grads, momenta, array("q", map(Tensor.numel, columns[0])), are_bfloat16)


def move_gradients(table: Table, addresses: Sequence[int]) -> None:
    """Writes other addresses of the gradients into the table."""
    table.arrays[1][:] = array("q", addresses)


def step(table: Table, options: Any, grad_factor: Tensor | None, found_inf: Tensor | None) -> None:
    """Updates the rows in place.

    Args:
        table: where the rows are.
        options: kdfast.ops.lion.rows.Options that `takes` takes.
        grad_factor: one element, multiplies the gradients.
        found_inf: one element; if it is not 0 nothing changes.
    """
    if found_inf is not None and found_inf.item():
        return
    function = _function()
    assert function is not None
    rate, beta1, beta2 = float(options.lr), options.beta1, options.beta2
    ascent = -1.0 if options.maximize else 1.0
    factor = 1.0 if grad_factor is None else grad_factor.item()
    decay = 1.0 - rate * options.weight_decay if options.weight_decay else 1.0
    rest1, rest2 = ascent * (1.0 - beta1), ascent * (1.0 - beta2)
    function(table.pointer, torch.get_num_threads(), factor, decay, rate, beta1, rest1, beta2, rest2)
