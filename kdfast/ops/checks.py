"""Checks that the operators share. Each raises one sentence that names the argument."""

from numbers import Real
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T", Tensor, Tensor | None)


def number(name: str, value: Any) -> float:
    """A hyper-parameter's value; a tensor of one element is read.

    Raises:
        TypeError: it is no number, or a tensor that would have to get a gradient.
    """
    if isinstance(value, (float, int)):
        return value
    if isinstance(value, Tensor) and value.numel() == 1 and not value.requires_grad and not value.is_complex():
        return value.item()
    if isinstance(value, Tensor):
        got = f"a tensor of shape {tuple(value.shape)}{', which requires grad' * value.requires_grad}"
        raise TypeError(f"{name} must be a number, which gets no gradient, got {got}")
    if isinstance(value, Real):  # NumPy's
        return float(value)
    raise TypeError(f"{name} must be a number, got {value!r}")


def is_tensor(name: str, value: Any) -> None:
    """Raises TypeError unless the value is a tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")


def distinct(*tensors: T) -> tuple[T, ...]:
    """The tensors; while compiling, one that stands there twice is a view the second time, for an autograd function to take it."""
    if not torch.compiler.is_compiling():
        return tensors
    made: list[Any] = []
    for k, tensor in enumerate(tensors):
        again = any(tensor is other for other in tensors[:k])
        made.append(tensor.view_as(tensor) if tensor is not None and again else tensor)
    return tuple(made)
