"""Optimizers."""

from kdfast.optim.lion import Lion

__all__ = ["Lion"]
