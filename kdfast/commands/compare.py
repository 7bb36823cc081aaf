"""kdfast compare: several recipes on the same images, student, seeds and teacher, and one table of how they did.

    OUT/teacher/            trained once, where none is given
    OUT/<recipe>/           a run of `kdfast distill` each; the first also trains the student alone, with every seed
    OUT/comparison.json     the table below in numbers, with machine and versions
    OUT/comparison.md       the same as Markdown
    OUT/comparison.html     curves and accuracies of all runs on one page

Every run can be continued, so the grid can: the same command again does what is left.
"""

import os
import statistics
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console as RichConsole
from rich.table import Table

from kdfast import files, machine, recipes, report
from kdfast.commands.config import Distill, Teach, TeachRunOptions
from kdfast.commands.distill import distill
from kdfast.commands.teacher import teach
from kdfast.report import comparison


def compare(configs: Mapping[str, Distill[Any]], out: Path) -> Path:
    """Runs the grid, or what is left of it, and writes the comparison; returns the folder.

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
        teacher = str(teach(_teacher(first, out / "teacher")))
    for number, (name, config) in enumerate(configs.items()):
        run = replace(config.run, out=out / name, resume=_begun(out / name), baseline=config.run.baseline and number == 0)
        distill(replace(config, run=run, teacher=teacher if recipes.get(config.recipe).needs_teacher else "train"))
    if int(os.environ.get("RANK", "0")) > 0:  # under torchrun the main process writes
        return out
    settings, own = _settings(configs)
    rows = [row | {"own": own[row["recipe"]]} if own.get(row["recipe"]) else row for row in table({n: _results(out / n) for n in configs})]
    facts = {"settings": settings, "machine": machine.facts(), "date": time.strftime("%Y-%m-%d"), "rows": rows}
    files.write_json(out / "comparison.json", facts)
    files.write_text(out / "comparison.md", comparison.markdown(facts))
    page = report.write_comparison([out / name for name in configs], out / "comparison.html")
    shown = Table(box=box.SIMPLE_HEAD)
    for column in comparison.COLUMNS:
        shown.add_column(column, justify="left" if column == comparison.COLUMNS[0] else "right")
    for row in rows:
        shown.add_row(*comparison.cells(row))
    RichConsole().print(shown)
    print(page)
    return out


def _teacher(config: Distill[Any], folder: Path) -> Teach:
    """The training of the teacher that all recipes share."""
    return Teach(
        model=config.teacher_model,
        model_options=config.teacher_options,
        pretrained=config.teacher_pretrained,
        data=replace(config.data, label_fraction=1.0),
        training=config.teacher_training,
        run=TeachRunOptions(**vars(replace(config.run, out=folder, resume=_begun(folder), seeds=1))),
    )


def _settings(configs: Mapping[str, Distill[Any]]) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """What all recipes have in common, and what each has of its own: method defaults may bring an optimizer (conkd: Lion)."""
    each = {
        name: {"dataset": c.data.dataset, "label_fraction": c.data.label_fraction, "student": c.student, "precision": c.run.precision}
        | {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(c.training).items()}
        for name, c in configs.items()
    }
    first = next(iter(each.values()))
    common = {key: value for key, value in first.items() if all(of[key] == value for of in each.values())}
    return common, {name: {key: value for key, value in of.items() if key not in common} for name, of in each.items()}


def _begun(folder: Path) -> bool:
    return (folder / "config.toml").exists()


def _results(run: Path) -> dict[str, Any]:
    results = report.read_run(run).results
    assert results is not None  # the run has just ended
    return dict(results)


def table(results: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The rows: the teacher, the student alone, then every recipe.

    Args:
        results: of each recipe's run, results.json.

    Returns:
        Dicts with recipe, seeds, top-1 accuracies of every seed (best and last epoch), images/s and seconds of training; recipes also
        with "kept", which of the two counts, and "paired", its difference from the student alone's, where both have the same seeds.
    """
    first = next(iter(results.values()))
    rows: list[dict[str, Any]] = []
    teachers = [of["teacher"] for of in results.values() if of["teacher"]]
    if teachers:
        rows.append({"recipe": f"teacher {teachers[0]['model']}", "best": [teachers[0]["top1"]], "last": []})
    alone = first["arms"]["alone"]
    if alone:
        rows.append({"recipe": f"{first['student']['model']} alone", **_arm(alone)})
    for name, of in results.items():
        row = {"recipe": name, **_arm(of["arms"]["distilled"]), "kept": of["kept"]}
        if alone and [arm["seed"] for arm in alone] == row["seeds"]:
            pairs = [arm[f"{first['kept']}/top1"] for arm in alone], row[of["kept"]]
            row["paired"] = report.paired_difference(*pairs) if len(pairs[0]) > 1 else {"mean": pairs[1][0] - pairs[0][0]}
        rows.append(row)
    return rows


def _arm(arms: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "seeds": [arm["seed"] for arm in arms],
        "best": [arm["best/top1"] for arm in arms],
        "last": [arm["last/top1"] for arm in arms],
        "images_per_s": statistics.median(arm["train_images_per_s"] for arm in arms),
        "seconds": round(statistics.mean(arm["seconds"] for arm in arms), 1),
    }
