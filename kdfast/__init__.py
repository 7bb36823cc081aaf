"""kdfast: fast, dependable knowledge distillation for PyTorch.

    kdfast.functional, kdfast.losses, kdfast.optim     drop-in losses and the Lion optimizer
    kdfast.models, kdfast.data                         networks and images by name
    kdfast.recipes, kdfast.engine                      distillation methods, and the loop that runs them
    kdfast.set_backend, kdfast.backend                 "auto", "triton" or "torch"

All of these load on first use: `import kdfast` itself does not import torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

from kdfast.version import __version__

if TYPE_CHECKING:
    from kdfast import data, engine, functional, losses, models, optim, recipes, reference
    from kdfast.ops.backend import backend, set_backend

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
    if name not in __all__:
        raise AttributeError(f"module 'kdfast' has no attribute {name!r}")
    if name not in ("backend", "set_backend"):
        return importlib.import_module(f"kdfast.{name}")
    globals()[name] = found = getattr(importlib.import_module("kdfast.ops.backend"), name)
    return found


def __dir__() -> list[str]:
    return sorted(__all__)
