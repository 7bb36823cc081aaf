"""Every distillation method as a short recipe: one file a method, which reads like the paper's method section."""

import difflib
import importlib
import pkgutil

from kdfast.recipes.recipe import Preset, Recipe, Setup

_SHARED = {"recipe", "supervised", "features", "plus"}  # modules here that are no method

__all__ = ["Preset", "Recipe", "Setup", "get", "names"]


def names() -> list[str]:
    """The recipes, sorted."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if m.name not in _SHARED)


def get(name: str) -> Recipe:
    """The recipe of that name.

    Raises:
        ValueError: there is none; the nearest names are listed.
    """
    if name not in names():
        near = difflib.get_close_matches(name, names()) or names()
        raise ValueError(f"recipe must be one of {', '.join(names())}, got {name!r}; did you mean {' or '.join(near)}?")
    return importlib.import_module(f"kdfast.recipes.{name}").RECIPE
