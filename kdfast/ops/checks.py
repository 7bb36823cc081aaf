"""Checks that the operators share. Each raises one sentence that names the argument."""

import math
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

IGNORED = -100  # the label of a sample that adds nothing, as in torch.nn.functional.cross_entropy


def savable(x: Any) -> Any:
    """Returns what autograd can save: a copy of a tensor that was made in torch.inference_mode(), all else as it is."""
    if x is None:
        return None
    # torch.compile cannot ask, so a compiled graph always copies
    return x.clone() if torch.compiler.is_compiling() or (x.is_inference() and not torch.is_inference_mode_enabled()) else x


def number(name: str, value: Any) -> float:
    """Returns a hyper-parameter as a Python number; reads a tensor of one element.

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
    if isinstance(value, Real) or getattr(value, "shape", None) == ():  # NumPy's
        return float(value)
    raise TypeError(f"{name} must be a number, got {value!r}")


def positive_number(name: str, value: Any) -> float:
    """Returns the number; raises ValueError unless it is positive and finite."""
    value = number(name, value)
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be positive, got {value}")
    return value


def number_within(name: str, value: Any, least: float = -math.inf, most: float = math.inf) -> float:
    """Returns the number; raises ValueError unless it is finite and in [least, most]."""
    value = number(name, value)
    if not (least <= value <= most and -math.inf < value < math.inf):
        limits = (
            "finite"
            if least == -most == -math.inf
            else f"finite and at least {least:g}"
            if most == math.inf
            else f"in [{least:g}, {most:g}]"
        )
        raise ValueError(f"{name} must be {limits}, got {value}")
    return value


def are_counts(least: int | None = 1, **values: Any) -> None:
    """Raises TypeError or ValueError unless every value is an integer, of at least `least` unless that is None; keywords name them."""
    for name, value in values.items():
        if not isinstance(value, Integral) or isinstance(value, bool):
            raise TypeError(f"{name} must be an integer, got {value!r}")
        if least is not None and value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")


def is_a(name: str, value: Any, kind: type) -> None:
    """Raises TypeError unless the value is of that class."""
    if not isinstance(value, kind):
        raise TypeError(f"{name} must be a {kind.__module__.split('.')[0]} {kind.__name__}, got {value!r}")


def is_one_of(name: str, value: Any, choices: Sequence[Any]) -> None:
    """Raises ValueError unless the value is one of the choices, of which there are at least two."""
    if value not in choices:
        *first, last = map(repr, choices)
        raise ValueError(f"{name} must be {', '.join(first)} or {last}, got {value!r}")


def is_tensor(name: str, value: Any) -> None:
    """Raises TypeError unless the value is a tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")


def as_list(name: str, value: Any) -> list[Tensor]:
    """Returns the tensors of a sequence, or the one that stands alone; raises TypeError unless all are tensors."""
    if isinstance(value, (str, Mapping)) or not isinstance(value, Iterable):
        raise TypeError(f"{name} must be a tensor or a sequence of tensors, got {type(value).__name__}")
    tensors = [value] if isinstance(value, Tensor) else list(value)
    for i, x in enumerate(tensors):
        is_tensor(f"{name}[{i}]", x)
    return tensors


def class_labels(name: str, labels: Any) -> Tensor:
    """Returns labels in int64; raises TypeError unless they are a tensor of integers."""
    is_tensor(name, labels)
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(f"{name} must be integers, got {labels.dtype}")
    return labels.long()


def is_floating(name: str, tensor: Tensor) -> None:
    """Raises TypeError unless the tensor is dense and its dtype floating."""
    if not tensor.is_floating_point():
        raise TypeError(f"{name} must be floating, got {tensor.dtype}")
    if tensor.layout != torch.strided:
        raise TypeError(f"{name} must be dense, got a tensor of layout {tensor.layout}")


def is_on(name: str, tensor: Tensor, whose: str, device: torch.device) -> None:
    """Raises ValueError unless the tensor is on the device; `whose` describes it."""
    if tensor.device != device:
        raise ValueError(f"{name} must be on {whose} {device}, got {tensor.device}")


def is_in_range(name: str, indices: Tensor, size: int, what: str = "") -> None:
    """Raises ValueError unless all indices are in [0, size). Only on the CPU: reading them elsewhere would wait for the device."""
    if indices.device.type == "cpu" and indices.numel():
        least, most = indices.aminmax()
        if least < 0 or most >= size:
            raise ValueError(f"{name} must be in [0, {size}){what}, got {int(least if least < 0 else most)}")


def refuse_second_derivative(operator: str) -> None:
    """Raises RuntimeError in a backward pass that is itself recorded (create_graph=True); compiled graphs cannot tell."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(f"{operator} has no second derivative: call backward() or grad() without create_graph=True")
