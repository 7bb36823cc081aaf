"""Exchange of rows between processes: gathered forward, their gradients returned to their owners backward.

A rank is a process of the group. Every rank holds its own rows, receives the others' in the order of the ranks, and computes with both;
so the gradient of a row is the sum over all ranks. `sizes` are the numbers of rows of the ranks. If they differ, rows are padded to the
largest number, because the collectives that are fast everywhere need equal pieces.

All functions are collective: every rank of the group calls them, and their backward passes, in the same order. Only `sizes_of_ranks`
waits for the device. torch.compile traces the others.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from kdfast.ops import checks
from kdfast.ops.precision import arithmetic


def check_group(operator: str, group: Any) -> None:
    """Raises TypeError unless `group` is a process group."""
    if not (dist.is_available() and isinstance(group, dist.ProcessGroup)):
        raise TypeError(f"{operator}: group must be a torch.distributed.ProcessGroup or None, got {type(group).__name__}")


def sizes_of_ranks(size: int, group: "dist.ProcessGroup", device: torch.device) -> list[int]:
    """Returns every rank's `size`; reads from the device."""
    sizes = torch.empty(group.size(), dtype=torch.int64, device=device)
    dist.all_gather_into_tensor(sizes, torch.tensor([size], device=device), group=group)
    return sizes.tolist()


def rows_of_others(rows: Tensor, sizes: list[int], group: "dist.ProcessGroup") -> Tensor:
    """Sends this rank's rows [n, D]; returns the rows of all other ranks, in the order of the ranks; differentiable once."""
    return _RowsOfOthers.apply(rows, sizes, group)


def names_of_others(names: Tensor, sizes: list[int], group: "dist.ProcessGroup") -> Tensor:
    """Sends this rank's names [n], of any dtype; returns the names of all other ranks, in the order of the ranks."""
    as_bytes = names.detach().contiguous().view(-1, 1).view(torch.uint8)  # no backend sends every dtype
    return _exchange(as_bytes, sizes, group).view(names.dtype).view(-1)


def of_all_ranks(tensors: Sequence[Tensor], group: "dist.ProcessGroup") -> list[Tensor]:
    """Joins tensors [B, ...] of any dtypes, with the same B > 0 on all ranks, to [ranks * B, ...] in one exchange, without gradients."""
    rows = len(tensors[0])
    as_bytes = [x.detach().contiguous().view(rows, -1).view(torch.uint8) for x in tensors]
    own = torch.cat(as_bytes, 1)
    joined = own.new_empty(group.size() * rows, own.shape[1])
    dist.all_gather_into_tensor(joined, own, group=group)
    parts = joined.split([x.shape[1] for x in as_bytes], 1)
    return [part.contiguous().view(x.dtype).view(-1, *x.shape[1:]) for part, x in zip(parts, tensors)]


def sum_over_ranks(value: Tensor, group: "dist.ProcessGroup") -> Tensor:
    """Sums all ranks' values []; every rank has the same bits.

    Backward multiplies the upstream gradient by `group.size()`: the sum over ranks, all of which start from the same loss. Averaging
    parameters' gradients over ranks needs this factor too, since every rank only computes its share of them.
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
        checks.refuse_second_derivative("supcon_loss")  # on every rank, or some would wait for the others
        sizes, rank = ctx.sizes, ctx.group.rank()
        most = max(sizes)
        # this rank's own part and padding remain 0; 16-bit gradients are summed in float32: one rounding for any number of ranks
        parts = upstream.new_zeros(most * len(sizes), upstream.shape[1], dtype=arithmetic(upstream))
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
