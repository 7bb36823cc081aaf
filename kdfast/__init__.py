"""kdfast: fast, dependable knowledge distillation for PyTorch.

    kdfast.functional, kdfast.losses, kdfast.optim     drop-in losses and the Lion optimizer
    kdfast.models, kdfast.data                         networks and images by name
    kdfast.recipes, kdfast.engine                      distillation methods, and the loop that runs them
    kdfast.set_backend, kdfast.backend                 "auto", "triton" or "torch"

Submodules load on first use: `import kdfast` costs little beyond `import torch`.
"""

import importlib
from typing import TYPE_CHECKING, Any

from kdfast.ops.backend import backend, set_backend
from kdfast.version import __version__

if TYPE_CHECKING:
    from kdfast import data, engine, functional, losses, models, optim, recipes, reference

_SUBMODULES = ("data", "engine", "functional", "losses", "models", "optim", "recipes", "reference")

__all__ = [
    "__version__",
    "backend",
    "data",
    "engine",
    "functional",
    "losses",
    "models",
    "optim",
    "recipes",
    "reference",
    "set_backend",
]


def __getattr__(name: str) -> Any:
    if name in _SUBMODULES:
        return importlib.import_module(f"kdfast.{name}")
    raise AttributeError(f"module 'kdfast' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
