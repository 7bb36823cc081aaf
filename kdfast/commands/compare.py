"""kdfast compare: several recipes on the same images, student, seeds and teacher, and one table of how they did.

    OUT/teacher/            trained once, unless a teacher is given
    OUT/<recipe>/           a run of `kdfast distill` each; the first also trains the student alone, with every seed
    OUT/comparison.json     the table below in numbers, with machine and versions
    OUT/comparison.md       the same as Markdown
    OUT/comparison.html     curves and accuracies of all runs on one page

Every run can be continued, so the grid can: the same command again does what is left.
"""

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

from kdfast import files, machine, recipes, report
from kdfast.commands.command_line import HELP, resolve, take
from kdfast.commands.config import Distill, Teach, TeachRunOptions
from kdfast.commands.distill import distill
from kdfast.commands.tables import make_table
from kdfast.commands.teacher import teach
from kdfast.engine.terminal import Terminal
from kdfast.runs import comparison
from kdfast.runs.results import Results, read
from kdfast.text import printable

USAGE = """usage: kdfast compare [--recipes a,b,c] [--out FOLDER] [options of kdfast distill]

Runs several recipes (by default, or with --recipes all, every one) on the same images, student, seeds and teacher, and writes
FOLDER/comparison.html, .md and .json. Unless a teacher is given, one is trained for all. The same command again continues where it stopped.
A recipe of your own is named package.module:RECIPE. Every option of `kdfast distill` that all these recipes have applies to all of them,
for instance:

kdfast compare --recipes kd,lskd,conkd --seeds 3
kdfast compare --recipes all --dataset cifar10 --data-dir D --teacher WEIGHTS --teacher-model resnet56 --student resnet8 --epochs 30
"""


def run(arguments: Sequence[str]) -> None:
    """Runs the command."""
    if set(HELP) & set(arguments):
        print(USAGE)
        return
    chosen, others = take(arguments, "compare", "recipes", "out")
    names = recipes.names() if chosen.recipes in (None, "all") else list(dict.fromkeys(chosen.recipes.split(",")))
    for option in ("--recipe", "--config", "--resume"):
        if any(argument.split("=")[0] == option for argument in others):
            raise ValueError(f"compare does not take {option}: name the recipes with --recipes; the same command again continues the grid")
    configs: dict[str, Distill[Any]] = {}
    for name in names:
        title = recipes.get(name).name
        if title in configs:
            raise ValueError(f"recipes {configs[title].recipe} and {name} are both called {title}: rename one")
        configs[title] = cast("Distill[Any]", resolve("compare", ["--recipe", name, *others]))
    compare(configs, Path(chosen.out or "runs/comparison"))


def compare(configs: Mapping[str, Distill[Any]], out: Path) -> Path:
    """Runs the grid, or the rest of it, and writes the comparison; returns the folder.

    Args:
        configs: by the recipe's name, in the table's order; they should differ in the recipe alone.
        out: the folder.

    Raises:
        ValueError: as distill() and teach(); or a folder in `out` belongs to another grid.
        Interrupted, NonFiniteLoss: see kdfast.engine.
    """
    files.check_writable(out, "--out", folder=True)
    first = next(iter(configs.values()))
    teacher = first.teacher
    if teacher == "train" and any(recipes.get(config.recipe).needs_teacher for config in configs.values()):
        if any(config.teacher_training != first.teacher_training for config in configs.values()):
            print(f"The teacher is trained as recipe {first.recipe} trains its own; others would train theirs otherwise.")
        teacher = str(teach(_teacher_config(first, out / "teacher")))
    for place, (name, config) in enumerate(configs.items()):
        options = replace(config.run, out=out / name, resume=_has_begun(out / name), baseline=config.run.baseline and place == 0)
        distill(replace(config, run=options, teacher=teacher if recipes.get(config.recipe).needs_teacher else "train"))
    if int(os.environ.get("RANK", "0")) == 0:  # under torchrun the main process writes
        _write(configs, out)
    return out


def _write(configs: Mapping[str, Distill[Any]], out: Path) -> None:
    """Writes comparison.json, .md and .html, and prints the table."""
    settings, own = _settings(configs)
    rows = comparison.make_rows({name: cast(Results, read(out / name)) for name in configs})
    rows = [row | {"own": own[row["recipe"]]} if own.get(row["recipe"]) else row for row in rows]
    facts = {"settings": settings, "machine": machine.facts(), "date": time.strftime("%Y-%m-%d"), "rows": rows}
    files.write_json(out / "comparison.json", facts)
    files.write_text(out / "comparison.md", comparison.markdown(facts))
    page = report.write_comparison([out / name for name in configs], out / "comparison.html")
    Terminal(soft_wrap=False).print(make_table(comparison.COLUMNS, map(comparison.cells, rows)))
    print(printable(page))


def _teacher_config(config: Distill[Any], folder: Path) -> Teach:
    """The training of the teacher that all recipes share."""
    return Teach(
        model=config.teacher_model,
        model_options=config.teacher_options,
        pretrained=config.teacher_pretrained,
        data=replace(config.data, label_fraction=1.0),
        training=config.teacher_training,
        run=TeachRunOptions(**vars(replace(config.run, out=folder, resume=_has_begun(folder), seeds=1))),
    )


def _settings(configs: Mapping[str, Distill[Any]]) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """The settings that all recipes have in common, and each one's own: a method's defaults may bring an optimizer (conkd: Lion)."""
    each = {
        name: {"dataset": c.data.dataset, "label_fraction": c.data.label_fraction, "student": c.student, "precision": c.run.precision}
        | {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(c.training).items()}
        for name, c in configs.items()
    }
    first = next(iter(each.values()))
    common = {key: value for key, value in first.items() if all(of[key] == value for of in each.values())}
    return common, {name: {key: value for key, value in of.items() if key not in common} for name, of in each.items()}


def _has_begun(folder: Path) -> bool:
    return (folder / "config.toml").exists()
