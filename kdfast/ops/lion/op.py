"""The Lion step of many tensors: chooses between kernel and PyTorch.

    p <- p (1 - lr wd);   u = sign(b1 m + (1 - b1) g);   p <- p - lr u;   m <- b2 m + (1 - b2) g

Floor: five passes over memory (read p, g, m; write p, m), 20 bytes a float32 parameter. Two kernels keep to it: Triton's on a GPU, and
on a CPU C that is compiled when kdfast is installed. Both take all tensors in one call. PyTorch's form (eager.py) needs fifteen passes.
"""

from collections.abc import Hashable
from operator import is_
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from kdfast.kernels import lion_cpu
from kdfast.ops import backend
from kdfast.ops.lion import eager
from kdfast.ops.lion.plan import Launch
from kdfast.ops.lion.rows import Options, Row, check_shapes, count_steps, in_order, is_plain, share_memory


def lion_step(
    rows: list[Row], options: Options, grad_factor: Tensor | None, found_inf: Tensor | None, tables: dict[Hashable, Any]
) -> tuple[list[Launch], bool]:
    """Updates parameters, momenta and compensations in place.

    Args:
        rows: one entry a parameter; any mixture of devices, floating dtypes and strides.
        options: for all of them. `fused` True: a kernel or an error. False: PyTorch. None: a kernel where there is one, but Triton's
            only if `foreach` is None. Under torch.compile it is PyTorch always: the compiler makes fused kernels of its own.
        grad_factor: 0-dim; gradients are multiplied by it first (clipping, 1 / loss scale). They are not written.
        found_inf: 0-dim; where it is not 0 nothing changes, decided on the device.
        tables: those of the step before, by the keys of its launches.

    Returns:
        The launches, and whether a later step can repeat them: they stepped all rows, where these are.

    Raises:
        RuntimeError: fused is True and there is no kernel for these tensors; a gradient or momentum has another shape than its parameter.
    """
    count_steps([row.step for row in rows if row.step is not None], found_inf)
    buckets: dict[Hashable, list[Row]] = {}
    for row in rows:
        buckets.setdefault((row.param.device, row.param.dtype, row.grad.dtype, row.momentum.dtype), []).append(row)
    launches, can_repeat = [], all(row.whole is None for row in rows)
    for bucket_key, bucket in buckets.items():
        kernel = _choose_kernel(bucket[0], options)
        plain, others = _split(bucket, options)
        if kernel is not None and plain:
            ordered = [in_order(row) for row in plain]
            key = bucket_key, plain[0].number
            table = kernel.make_table(ordered, tables.get(key), capturable=options.capturable)
            kernel.step(table, options, grad_factor, found_inf)
            written = [t for row in plain for t in (row.param, row.momentum, row.scale, row.compensation) if t is not None]
            torch.autograd.graph.increment_version(written)  # lets a backward pass that needs the old values raise
            launches.append(Launch(key, kernel, table, plain))
            can_repeat = can_repeat and all(map(is_, ordered, plain))
            bucket = others
        elif plain and options.foreach is not False and not plain[0].param.is_cpu:
            eager.update(plain, options, grad_factor, found_inf)
            bucket = others
        for row in bucket:  # on a CPU, _foreach_* would go through the tensors one by one too, with more memory
            eager.update([row], options, grad_factor, found_inf)
    return launches, can_repeat and sum(len(each.rows) for each in launches) == len(rows)


def _split(rows: list[Row], options: Options) -> tuple[list[Row], list[Row]]:
    """The rows that can be stepped together, and those that PyTorch steps one after the other, in their order."""
    if torch.compiler.is_compiling():
        return rows, []
    plain: list[Row] = []
    others: list[Row] = []
    for row in rows:
        check_shapes(row)
        # a cautious step of a shard needs what other processes count
        is_apart = not is_plain(row) or (options.cautious and row.whole is not None)
        (others if is_apart else plain).append(row)
    return ([], rows) if share_memory(plain) else (plain, others)


def _choose_kernel(like: Row, options: Options) -> ModuleType | None:
    """The kernel for plain rows of this one's device and dtypes; None for PyTorch."""
    fused, foreach = options.fused, options.foreach
    if fused is False or (foreach is False and not fused) or is_watched():
        return None
    kernel = backend.kernel("lion", like.param, like.grad, like.momentum) if fused or foreach is None else None
    if kernel is None and backend.current() == "auto" and lion_cpu.takes(like, options):
        kernel = lion_cpu
    if fused and kernel is None:
        raise RuntimeError(
            f"Lion: fused=True needs the Triton kernel or, on a CPU, the compiled step, which do not run here for {like.param.dtype} "
            f"parameters on {like.param.device.type} (backend {backend.current()!r}); leave fused=None"
        )
    return kernel


def is_watched() -> bool:
    """Whether the compiler, a TorchDispatchMode or a transform of torch.func sees operations, or puts others in their place."""
    is_compiling: bool = torch.compiler.is_compiling()
    return is_compiling or torch._C._len_torch_dispatch_stack() > 0 or torch._C._functorch.peek_interpreter_stack() is not None
