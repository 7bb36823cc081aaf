"""Imports at run time: optional packages, and objects that a user names as "package.module:object"."""

import importlib
import importlib.util
import os
import sys
from collections.abc import Iterable
from types import ModuleType
from typing import Any

PACKAGES = {  # modules whose package has another name
    "PIL": "pillow",
    "nvidia.dali": "nvidia-dali",
    "rich.console": "rich",
    "sklearn": "scikit-learn",
    "torch.utils.tensorboard": "tensorboard",
}


class MissingPackage(ImportError):
    """A package of one of kdfast's extras is not installed; the text says what needs it and how to install it."""

    def __init__(self, module: str, *, extra: str, what: str):
        super().__init__(f"{what} needs {PACKAGES.get(module, module)}: pip install 'kdfast[{extra}]'", name=module)


def require(module: str, *, extra: str, what: str) -> ModuleType:
    """Imports a module of an optional package.

    Args:
        module: full name, "nvidia.dali.fn".
        extra: the extra of kdfast that installs it, "dali".
        what: the part of kdfast that needs it, as the subject of a sentence: "The dali loader".

    Raises:
        ImportError: it cannot be imported; the text is one sentence with the command that installs it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingPackage(module, extra=extra, what=what) from error


def check_installed(modules: Iterable[str], *, extra: str, what: str) -> None:
    """Checks that top-level modules are there, without importing them.

    Raises:
        ImportError: one is missing; see `require`.
    """
    for module in modules:
        if importlib.util.find_spec(module) is None:
            raise MissingPackage(module, extra=extra, what=what)


def import_object(name: str) -> Any:
    """Returns the object that "package.module:object" names.

    The current folder is importable, and `__main__` is the script or notebook that runs.

    Raises:
        ValueError: there is no such module, or no such object in it; the text is the import's own.
    """
    module, _, attribute = name.partition(":")
    # a console script does not have the current folder on its path, `python -m` does
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(str(error)) from error
