"""In which dtype losses are computed and returned: float32, or float64 where an input is."""

import torch
from torch import Tensor


def arithmetic(*tensors: Tensor) -> torch.dtype:
    """float64 where one of the tensors is, else float32."""
    return torch.float64 if torch.float64 in [x.dtype for x in tensors] else torch.float32


def at_least_float32(x: Tensor) -> Tensor:
    """The tensor in that dtype."""
    return x if x.dtype == torch.float64 else x.float()
