"""The table of `kdfast compare`, from its comparison.json."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from kdfast.machine import describe

SHOWN = ("label_fraction", "epochs", "batch_size", "optimizer", "lr", "weight_decay", "schedule", "precision")  # of what is common
COLUMNS = ("recipe", "best top-1, %", "last top-1, %", "against alone, points", "training images/s", "seconds")


def cells(row: Mapping[str, Any]) -> list[str]:
    """One row of the table, as text."""
    paired = row.get("paired")
    difference = ""
    if paired:
        difference = f"{100 * paired['mean']:+.2f}"
        difference += f" ({100 * paired['low']:+.2f} to {100 * paired['high']:+.2f})" if "low" in paired else ""
    speed = f"{row['images_per_s']:,.0f}" if "images_per_s" in row else ""
    return [row["recipe"], _mean(row["best"]), _mean(row["last"]), difference, speed, f"{row['seconds']:,.1f}" if "seconds" in row else ""]


def _mean(values: list[float]) -> str:
    if not values:
        return ""
    spread = f" ± {100 * statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{100 * statistics.mean(values):.2f}{spread}"


def percent(fraction: float) -> str:
    """0.05 -> 5%, 0.002 -> 0.2%."""
    return f"{100 * fraction:.4g}%"


def _words(settings: Mapping[str, Any]) -> str:
    """Settings as in: 30 epochs a stage, batch_size 64, lr 0.05."""
    said: dict[str, Callable[[Any], str]] = {
        "epochs": lambda epochs: f"{epochs} epoch{'s' * (epochs != 1)} a stage",
        "optimizer": str,
        "precision": str,
        "label_fraction": lambda fraction: f"{percent(fraction)} of the labels",
    }
    idle = {"label_fraction": 1.0, "precision": "auto"}
    return ", ".join(said.get(key, f"{key} {{}}".format)(value) for key, value in settings.items() if idle.get(key) != value)


def _compared(rows: Sequence[Mapping[str, Any]]) -> str:
    """By which of the two accuracies recipes are compared with the student alone."""
    last = [row["recipe"] for row in rows if row.get("kept") == "last"]  # where no epoch is chosen
    if not last:
        return "seed by seed"
    return (
        "seed by seed, of the last epochs"
        if all(row.get("kept", "last") == "last" for row in rows)
        else f"{', '.join(last)} by the last epochs"
    )


def markdown(facts: Mapping[str, Any]) -> str:
    """The table, its columns' meaning, and where it was measured."""
    lines = [f"| {' | '.join(COLUMNS)} |", "|---|---:|---:|---:|---:|---:|", *(f"| {' | '.join(cells(row))} |" for row in facts["rows"])]
    common = facts["settings"]
    words = [f"{common['dataset']}: {common['student']}", _words({key: common[key] for key in SHOWN if key in common})]
    training = f"{', '.join(filter(None, words))}."
    own: dict[str, list[str]] = {}
    for row in facts["rows"]:
        if "own" in row:
            own.setdefault(_words(row["own"]), []).append(row["recipe"])
    training += "".join(f" {', '.join(names)}: {words}." for words, names in own.items())
    note = (
        "Mean and sample standard deviation over seeds, of test accuracy with the weights of the best validation epoch and of the last; "
        f"against alone: {_compared(facts['rows'])}, with a 95 % interval; seconds of training a seed, the teacher's left out."
    )
    measured = f"{describe(facts['machine'], facts['date'])}."
    return "\n".join([*lines, "", f"{training} {note}", "", measured, ""])
