"""Rows of the other ranks of a process group, as contrasts."""

import torch
import torch.distributed as dist
from torch import Tensor

from kdfast.ops import gather


def rows_of_other_ranks(views: Tensor, labels: Tensor | None, group: "dist.ProcessGroup", uneven: bool) -> tuple[Tensor, Tensor]:
    """Exchanges rows: this rank's [B, V, D] for the other ranks', all views of a sample together, and the names of their samples.

    Args:
        views: [B, V, D].
        labels: [B]; None: every sample has a name of its own, which on this rank is its number.
        group: of at least two ranks.
        uneven: lets the ranks differ in B.

    Returns:
        [V * samples, D], differentiable once, and [samples].
    """
    B, V, D = views.shape
    sizes = gather.sizes_of_ranks(B, group, views.device) if uneven else [B] * group.size()
    rows = gather.rows_of_others(views.reshape(B * V, D), [V * size for size in sizes], group)
    if labels is None:
        return rows, torch.arange(B, sum(sizes), device=views.device)
    return rows, gather.names_of_others(labels, sizes, group)
