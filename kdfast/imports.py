"""Objects of the user's own by name: "package.module:object"."""

import importlib
import os
import sys
from typing import Any


def named(name: str) -> Any:
    """The object that "package.module:object" names; the current folder is importable, and `__main__` is the script or notebook that runs.

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
