"""Distillation methods as short recipes: one file a method, which reads like the paper's method section.

Every module of this folder that defines RECIPE is a recipe; `names` lists them.
"""

import difflib
import importlib
import pkgutil

from kdfast import imports
from kdfast.recipes.recipe import Preset, Recipe, Setup

_SHARED = {"recipe", "supervised", "features", "remembered", "plus", "trainings"}  # modules of this folder that are not recipes

__all__ = ["Preset", "Recipe", "Setup", "get", "names"]


def names() -> list[str]:
    """Returns the names of the recipes, sorted.

    Example:
        >>> from kdfast import recipes
        >>> recipes.names()[:3]
        ['at', 'conkd', 'crd']
    """
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if m.name not in _SHARED)


def get(name: str) -> Recipe:
    """Returns the recipe of that name; "package.module:RECIPE" is a recipe of your own, and the current folder is importable.

    Raises:
        ValueError: there is no such recipe; the nearest names are listed.

    Example:
        >>> from kdfast import recipes
        >>> recipes.get("kd").settings()
        Settings(temperature=4.0, kd_weight=0.9, ce_weight=0.1, standardize=False, label_smoothing=0.0)
        >>> recipes.get("lskdd")
        Traceback (most recent call last):
        ValueError: recipe must be one of ...; did you mean lskd?
    """
    if not isinstance(name, str):
        raise TypeError(f"recipe must be a name, got {name!r}")
    if ":" in name:
        return _import_recipe(name)
    if name not in names():
        near = difflib.get_close_matches(name, names())
        guess = f"; did you mean {' or '.join(near)}?" if near else ""
        raise ValueError(f"recipe must be one of {', '.join(names())} or package.module:RECIPE, got {name!r}{guess}")
    return importlib.import_module(f"kdfast.recipes.{name}").RECIPE


def _import_recipe(name: str) -> Recipe:
    try:
        recipe = imports.import_object(name)
    except ValueError as error:
        raise ValueError(f"recipe {name!r} must name an importable package.module:RECIPE: {error}") from error
    if not isinstance(recipe, Recipe):
        raise ValueError(f"recipe {name!r} must name a kdfast.recipes.Recipe, got a {type(recipe).__name__}")
    return recipe
