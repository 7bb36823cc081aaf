"""Operators that torch.compile does not look into."""

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def opaque(name: str, fake: Callable[..., R]) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorates a function of tensors, lists and numbers: torch.compile sees one call of the operator kdfast::<name>.

    Eager calls run the function itself: the dispatcher would add tens of microseconds to each.

    Args:
        name: of the operator, in torch.ops.kdfast.
        fake: makes empty results from the same arguments: their shapes, dtypes and devices.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        registered = torch.library.custom_op(f"kdfast::{name}", function, mutates_args=())
        registered.register_fake(fake)

        @wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            return (registered if torch.compiler.is_compiling() else function)(*args, **kwargs)

        return call

    return decorate
