"""kdfast list: recipes, presets, models, data sets."""

from collections.abc import Sequence

from rich.table import Table

from kdfast import data, models, recipes
from kdfast.commands.command_line import HELP
from kdfast.commands.config import DATASETS
from kdfast.commands.tables import make_table
from kdfast.engine import Training
from kdfast.engine.terminal import Terminal


def run(arguments: Sequence[str]) -> None:
    """Prints the recipes, presets, models or datasets.

    Raises:
        ValueError: another word.
    """
    tables = {"recipes": _recipes, "presets": _presets, "models": _models, "datasets": _datasets}
    if not arguments or arguments[0] in HELP:
        print(f"usage: kdfast list {'|'.join(tables)}")
        return
    if len(arguments) > 1 or arguments[0] not in tables:
        raise ValueError(f"list shows {', '.join(tables)}, got {' '.join(arguments)!r}")
    Terminal(soft_wrap=False).print(tables[arguments[0]]())


def _recipes() -> Table:
    found = [(name, recipes.get(name)) for name in recipes.names()]
    rows = [(name, recipe.title, ", ".join(recipe.presets)) for name, recipe in found]
    own = ("package.module:RECIPE", "your own: a kdfast.recipes.Recipe", "")
    return make_table(("recipe", "method", "presets"), [*rows, own], left=3)


def _presets() -> Table:
    rows = [
        (name, preset, content.source, ", ".join(f"{key} {value}" for key, value in content.values.items()))
        for name in recipes.names()
        for preset, content in recipes.get(name).presets.items()
    ]
    return make_table(("recipe", "preset", "source", "values"), rows, left=4)


def _models() -> Table:
    rows = [(name, _size(name)) for name in models.names()]
    own = ("package.module:function", "your own: called with num_classes and the options")
    return make_table(("model", "parameters (10 classes)"), [*rows, own], left=2)


def _size(name: str) -> str:
    return f"{models.parameter_count(models.create(name, 10)):,}" if name in models.zoo.NETWORKS else "torchvision's"


def _datasets() -> Table:
    rows = []
    for name in data.names():
        values = DATASETS[name]
        epochs, optimizer, lr = (values.get(option, getattr(Training, option)) for option in ("epochs", "optimizer", "lr"))
        training = f"{epochs} epochs, {optimizer} lr {lr:g}"
        rows.append((name, values["teacher_model"], values["student"], training))
    own = ("PATH", "", "", "an image folder: train/val, train/test or all three, or class folders")
    return make_table(("dataset", "teacher", "student", "default training"), [*rows, own], left=4)
