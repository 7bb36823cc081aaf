"""The dtype of losses and of the arithmetic behind them: float32, or float64 where an input is float64."""

import torch
from torch import Tensor


def arithmetic(*tensors: Tensor) -> torch.dtype:
    """Returns float64 if one of the tensors has it, else float32."""
    return torch.float64 if torch.float64 in [x.dtype for x in tensors] else torch.float32


def at_least_float32(x: Tensor) -> Tensor:
    """Returns the tensor in float32, or as it is in float64."""
    return x if x.dtype == torch.float64 else x.float()
