"""Rows of other processes as contrasts: gathered forward, their gradients brought home backward.

A rank is a process of the group. Every rank holds rows of its own, is given those of the others in the order of the ranks, and computes
with both; so the gradient of a row is the sum of what all ranks have to say about it. `sizes` tells how many rows each rank holds. Where
they differ, rows travel padded to the largest number, for the collectives that are fast everywhere want equal pieces.

All functions are collective: every rank of the group calls them, in the same order, and with them their backward passes. Only
`sizes_of_ranks` waits for the device. torch.compile traces the others.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from kdfast.ops.precision import arithmetic


def check_group(operator: str, group: Any) -> None:
    """Raises TypeError where `group` is none."""
    if not (dist.is_available() and isinstance(group, dist.ProcessGroup)):
        raise TypeError(f"{operator}: group must be a torch.distributed.ProcessGroup or None, got {type(group).__name__}")


def sizes_of_ranks(size: int, group: "dist.ProcessGroup", device: torch.device) -> list[int]:
    """What every rank passed as `size`; reads from the device."""
    sizes = torch.empty(group.size(), dtype=torch.int64, device=device)
    dist.all_gather_into_tensor(sizes, torch.tensor([size], device=device), group=group)
    return sizes.tolist()


def rows_of_others(rows: Tensor, sizes: list[int], group: "dist.ProcessGroup") -> Tensor:
    """This rank's rows [n, D] -> those of all other ranks, in their order; differentiable once."""
    return _RowsOfOthers.apply(rows, sizes, group)


def names_of_others(names: Tensor, sizes: list[int], group: "dist.ProcessGroup") -> Tensor:
    """This rank's names [n], of any dtype -> those of all other ranks, in their order."""
    as_bytes = names.detach().contiguous().view(-1, 1).view(torch.uint8)  # no backend sends every dtype
    return _exchange(as_bytes, sizes, group).view(names.dtype).view(-1)


def of_all_ranks(tensors: Sequence[Tensor], group: "dist.ProcessGroup") -> list[Tensor]:
    """Tensors [B, ...] of any dtypes, B > 0 alike on all ranks -> those of all ranks, [ranks * B, ...] in their order, in one exchange.

    Without gradients.
    """
    rows = len(tensors[0])
    as_bytes = [x.detach().contiguous().view(rows, -1).view(torch.uint8) for x in tensors]
    own = torch.cat(as_bytes, 1)
    joined = own.new_empty(group.size() * rows, own.shape[1])
    dist.all_gather_into_tensor(joined, own, group=group)
    parts = joined.split([x.shape[1] for x in as_bytes], 1)
    return [part.contiguous().view(x.dtype).view(-1, *x.shape[1:]) for part, x in zip(parts, tensors)]


def sum_over_ranks(value: Tensor, group: "dist.ProcessGroup") -> Tensor:
    """The sum of all ranks' values [], the same bits on every rank.

    Backward takes the sum of all ranks' upstream gradients to be `group.size()` times this rank's own: all of them start from the same
    loss. That is also what averaging parameters' gradients over ranks asks for, since every rank only computes its share of them.
    """
    return _SumOverRanks.apply(value, group)


def _exchange(rows: Tensor, sizes: list[int], group: "dist.ProcessGroup") -> Tensor:
    most, rank = max(sizes), group.rank()
    padded = rows.contiguous()
    if sizes[rank] < most:
        padded = torch.cat([padded, padded.new_zeros(most - sizes[rank], rows.shape[1])])
    gathered = rows.new_empty(most * len(sizes), rows.shape[1])
    dist.all_gather_into_tensor(gathered, padded, group=group)
    return torch.cat([gathered[r * most : r * most + size] for r, size in enumerate(sizes) if r != rank])


class _RowsOfOthers(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, sizes: list[int], group: "dist.ProcessGroup") -> Tensor:
        ctx.sizes, ctx.group, ctx.dtype = sizes, group, rows.dtype
        return _exchange(rows, sizes, group)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # on every rank, or some would wait for the others
            raise RuntimeError("rows of other ranks have no second derivative: call backward() or grad() without create_graph=True")
        sizes, rank = ctx.sizes, ctx.group.rank()
        most = max(sizes)
        # 16-bit gradients are summed in float32: one rounding, however many ranks there are
        parts = upstream.new_zeros(
            most * len(sizes), upstream.shape[1], dtype=arithmetic(upstream)
        )  # this rank's own part, and padding, stay 0
        start = 0
        for r, size in enumerate(sizes):
            if r != rank:
                parts[r * most : r * most + size] = upstream[start : start + size]
                start += size
        home = parts.new_empty(most, upstream.shape[1])
        dist.reduce_scatter_tensor(home, parts, group=ctx.group)
        return home[: sizes[rank]].to(ctx.dtype), None, None


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, group: "dist.ProcessGroup") -> Tensor:
        ctx.ranks = group.size()
        # not all_reduce: PyTorch 2.11 compiles a sum in the output's own memory to a gradient of zero
        values = value.new_empty(group.size())
        dist.all_gather_into_tensor(values, value.reshape(1), group=group)
        return values.sum()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        return upstream * ctx.ranks, None
