"""kdfast list: recipes, presets, models, data sets."""

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from kdfast import data, models, recipes
from kdfast.commands.command_line import HELP
from kdfast.commands.config import DATASETS


def run(arguments: Sequence[str]) -> None:
    """Prints the recipes, presets, models or datasets.

    Raises:
        ValueError: another word.
    """
    tables = {"recipes": _recipes, "presets": _presets, "models": _models, "datasets": _datasets}
    if len(arguments) != 1 or arguments[0] in HELP:
        print(f"usage: kdfast list {'|'.join(tables)}")
        return
    if arguments[0] not in tables:
        raise ValueError(f"list shows {', '.join(tables)}, got {arguments[0]!r}")
    Console().print(tables[arguments[0]]())


def _table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _recipes() -> Table:
    table = _table("recipe", "method", "presets")
    for name in recipes.names():
        recipe = recipes.get(name)
        table.add_row(name, recipe.title, ", ".join(recipe.presets))
    table.add_row("package.module:RECIPE", "your own: a kdfast.recipes.Recipe", "")
    return table


def _presets() -> Table:
    table = _table("recipe", "preset", "source", "values")
    for name in recipes.names():
        for preset, content in recipes.get(name).presets.items():
            values = ", ".join(f"{key} {value}" for key, value in content.values.items())
            table.add_row(name, preset, content.source, values)
    return table


def _models() -> Table:
    table = _table("model", "parameters (10 classes)")
    for name in models.names():
        own = name in models.zoo.NETWORKS
        count = f"{models.parameter_count(models.create(name, 10)):,}" if own else "torchvision's"
        table.add_row(name, count)
    table.add_row("package.module:function", "your own: called with num_classes and the options")
    return table


def _datasets() -> Table:
    table = _table("dataset", "teacher", "student", "default training")
    for name in data.names():
        values = DATASETS[name]
        training = f"{values.get('epochs', 240)} epochs, {values.get('optimizer', 'sgd')} lr {values.get('lr', 0.05):g}"
        table.add_row(name, values["teacher_model"], values["student"], training)
    table.add_row("PATH", "", "", "an image folder: train/val, train/test or all three, or class folders")
    return table
