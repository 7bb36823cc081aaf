"""comparison.json of `kdfast compare`: its rows, and the table that shows them as text and as Markdown."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from kdfast import text
from kdfast.machine import describe
from kdfast.runs.results import Results, Student, accuracies, kept, students
from kdfast.runs.summary import is_too_little, paired_difference

# of the common settings
SHOWN = ("dataset", "student", "label_fraction", "epochs", "batch_size", "optimizer", "lr", "weight_decay", "schedule", "precision")
COLUMNS = ("recipe", "best top-1, %", "last top-1, %", "against alone, points", "training images/s", "seconds")


def make_rows(results: Mapping[str, Results]) -> list[dict[str, Any]]:
    """Returns the rows: the teacher, the student alone, then every recipe.

    Args:
        results: results.json of each recipe's run.

    Returns:
        Dicts with recipe, seeds, top-1 accuracies of every seed (best and last epoch), images/s and seconds of training; recipes also
        with "kept", which of the two counts, and "paired", its difference from the student alone, where both have the same seeds.
    """
    first = next(iter(results.values()))
    rows: list[dict[str, Any]] = []
    teachers = [run["teacher"] for run in results.values() if run["teacher"]]
    if teachers:
        rows.append({"recipe": f"teacher {teachers[0]['model']}", "best": [teachers[0]["top1"]], "last": []})
    if alone := students(first, "alone"):
        assert first["student"] is not None
        rows.append({"recipe": f"{first['student']['model']} alone", **_arm(alone)})
    for name, run in results.items():
        row = {"recipe": name, **_arm(students(run, "distilled")), "kept": kept(run)}
        if alone and [student["seed"] for student in alone] == row["seeds"]:
            before, after = accuracies(first, "alone"), accuracies(run, "distilled")
            row["paired"] = paired_difference(before, after) if len(before) > 1 else {"mean": after[0] - before[0]}
        rows.append(row)
    return rows


def _arm(arm: Sequence[Student]) -> dict[str, Any]:
    return {
        "seeds": [student["seed"] for student in arm],
        "best": [student["best/top1"] for student in arm],
        "last": [student["last/top1"] for student in arm],
        "images_per_s": statistics.median(student["train_images_per_s"] for student in arm),
        "seconds": round(statistics.mean(student["seconds"] for student in arm), 1),
    }


def cells(row: Mapping[str, Any]) -> list[str]:
    """Returns one row of the table, as text."""
    paired = row.get("paired")
    difference = ""
    if paired:
        difference = f"{100 * paired['mean']:+.2f}"
        if "low" in paired:
            interval = f"{100 * paired['low']:+.2f} to {100 * paired['high']:+.2f}"
            difference += f" ({'too little data' if is_too_little(paired) else interval})"
    speed = text.number(row["images_per_s"]) if "images_per_s" in row else ""
    return [row["recipe"], _mean(row["best"]), _mean(row["last"]), difference, speed, f"{row['seconds']:,.1f}" if "seconds" in row else ""]


def _mean(values: list[float]) -> str:
    if not values:
        return ""
    spread = f" ± {text.percent(statistics.stdev(values))}" if len(values) > 1 else ""
    return f"{text.percent(statistics.mean(values))}{spread}"


def _describe(settings: Mapping[str, Any]) -> str:
    """Formats settings: "epochs 30, batch_size 64, lr 0.05"."""
    return ", ".join(f"{name} {value}" for name, value in settings.items())


def markdown(facts: Mapping[str, Any]) -> str:
    """Returns the table, its columns' meaning, and where it was measured.

    Args:
        facts: the content of comparison.json: settings, rows, machine, date.
    """
    common = {name: facts["settings"][name] for name in SHOWN if name in facts["settings"]}
    own: dict[str, list[str]] = {}
    for row in facts["rows"]:
        if "own" in row:
            own.setdefault(_describe(row["own"]), []).append(row["recipe"])
    settings = [_describe(common), *(f"{', '.join(names)}: {words}" for words, names in own.items())]
    note = (
        "Mean and sample standard deviation over seeds, of test accuracy with the weights of the best validation epoch and of the last; "
        "against alone: seed by seed, with a 95 % interval, of the epoch that a run keeps, which is the last where validation chose none; "
        "seconds of training a seed, the teacher's left out."
    )
    measured = f"{describe(facts['machine'], facts['date'])}."
    return "\n".join([text.markdown_table(COLUMNS, map(cells, facts["rows"])), "", f"{'. '.join(settings)}. {note}", "", measured, ""])
