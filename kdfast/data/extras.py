"""Packages that kdfast.data imports when they are first needed: torchvision, Pillow, scikit-learn."""

import importlib
from typing import Any

from kdfast.imports import require


def need(module: str) -> Any:
    """Imports a module of the extra kdfast[cli].

    Raises:
        ImportError: its package is not installed; the sentence names the extra.
    """
    require(module.partition(".")[0], extra="cli", what="kdfast.data")
    return importlib.import_module(module)
