"""Memory as the kernels read it."""

from torch import Tensor


def flat(x: Tensor) -> Tensor:
    """Returns all elements, row after row: a view, or a copy if there are gaps."""
    return x.resolve_neg().contiguous().view(-1)
