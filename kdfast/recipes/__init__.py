"""Every distillation method as a short recipe: one file a method, which reads like the paper's method section."""

import difflib
import importlib
import pkgutil

from kdfast import imports
from kdfast.recipes.recipe import Preset, Recipe, Setup

_SHARED = {"recipe", "supervised", "features", "remembered", "plus"}  # modules here that are no method

__all__ = ["Preset", "Recipe", "Setup", "get", "names"]


def names() -> list[str]:
    """The recipes, sorted."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if m.name not in _SHARED)


def get(name: str) -> Recipe:
    """The recipe of that name, or with "package.module:RECIPE" one of the user's own; the current folder is importable.

    Raises:
        ValueError: there is none; the nearest names are listed.
    """
    if ":" in name:
        return _of_the_users(name)
    if name not in names():
        near = difflib.get_close_matches(name, names())
        guess = f"; did you mean {' or '.join(near)}?" if near else ""
        raise ValueError(f"recipe must be one of {', '.join(names())} or package.module:RECIPE, got {name!r}{guess}")
    return importlib.import_module(f"kdfast.recipes.{name}").RECIPE


def _of_the_users(name: str) -> Recipe:
    try:
        recipe = imports.import_object(name)
    except ValueError as error:
        raise ValueError(f"recipe {name!r} must name an importable package.module:RECIPE: {error}") from error
    if not isinstance(recipe, Recipe):
        raise ValueError(f"recipe {name!r} must name a kdfast.recipes.Recipe, got a {type(recipe).__name__}")
    return recipe
