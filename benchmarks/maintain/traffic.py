"""The bytes that a kernel really asks memory for, and the operations of its products, counted in Triton's interpreter."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

from triton import knobs


@dataclass
class Traffic:
    """Bytes that loads and stores ask for, masked elements left out, an element read twice counted twice; atomics are not counted."""

    read: int = 0
    written: int = 0
    operations: int = 0  # of tl.dot: a multiply-add is two, zeros of a tile's padding included


@contextmanager
def counted_traffic() -> Iterator[Traffic]:
    """Counts what the kernels launched in the block read and write.

    Raises:
        RuntimeError: kernels are compiled here, not interpreted.
    """
    if not knobs.runtime.interpret:
        raise RuntimeError("counted_traffic needs a process started with TRITON_INTERPRET=1: a compiled kernel cannot be watched")
    from triton.runtime.interpreter import InterpreterBuilder as Builder

    traffic, load, store, dot = Traffic(), Builder.create_masked_load, Builder.create_masked_store, Builder.create_dot

    def size(pointers: Any, mask: Any) -> int:
        return int(mask.data.sum()) * max(8, pointers.get_element_ty().primitive_bitwidth) // 8

    # unmasked, block-pointer and descriptor accesses all come through these two
    def counted_load(self: Any, pointers: Any, mask: Any, *rest: Any, **options: Any) -> Any:
        traffic.read += size(pointers, mask)
        return load(self, pointers, mask, *rest, **options)

    def counted_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        traffic.written += size(pointers, mask)
        return store(self, pointers, value, mask, *rest)

    def counted_dot(self: Any, a: Any, b: Any, *rest: Any, **options: Any) -> Any:
        traffic.operations += 2 * a.data.size * b.data.shape[-1]
        return dot(self, a, b, *rest, **options)

    with mock.patch.multiple(Builder, create_masked_load=counted_load, create_masked_store=counted_store, create_dot=counted_dot):
        yield traffic
