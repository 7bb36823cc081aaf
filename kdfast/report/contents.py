"""The content of the pages, gathered from run folders as plain values for the templates."""

import math
import os
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kdfast.report.confusion import describe_confusion
from kdfast.report.curves import SERIES, STYLES, Line, Panel, svg
from kdfast.runs.folder import Curve, RunFolder, group_by_stage
from kdfast.runs.results import Paired, Results, accuracies, kept, students
from kdfast.runs.summary import mean, outcome, summary_rows, verdict
from kdfast.text import is_known


@dataclass(frozen=True)
class Scale:
    """Places numbers on a horizontal axis with round ends."""

    low: float
    high: float

    @classmethod
    def around(cls, values: Iterable[float], highest: float = math.inf) -> "Scale":
        """Returns the smallest scale with round ends that holds all `values`; it does not go beyond `highest`."""
        from matplotlib.ticker import MaxNLocator

        known = [value for value in values if is_known(value)] or [0.0, 1.0]
        ticks = MaxNLocator(4, steps=[1, 2, 2.5, 5, 10], min_n_ticks=3).tick_values(min(known), max(known))
        return cls(float(ticks[0]), min(float(ticks[-1]), highest))

    @classmethod
    def around_pairs(cls, pairs: Iterable[Paired | None]) -> "Scale | None":
        """Returns the scale that holds zero and all differences and intervals, or None without any."""
        found = [pair for pair in pairs if pair]
        return cls.around([0.0, *(x for pair in found for x in (pair["low"], pair["high"], *pair["differences"]))]) if found else None

    def at(self, value: float) -> float:
        """Returns the place of `value` in percent of the way from low to high."""
        return round(100 * (value - self.low) / (self.high - self.low), 2) if self.high > self.low else 50.0


# ---- one run -------------------------------------------------------------------------------------


def describe_run(run: RunFolder, drawn: Sequence[Panel]) -> dict[str, Any]:
    """Returns the values of report.html."""
    results = run.results
    page: dict[str, Any] = {
        "run": run,
        "results": results,
        "title": run.path.resolve().name,
        "figures": [(panel, svg(panel)) for panel in drawn],
        "stages": _stage_rows(run.curves),
        "progress": [_progress(curve) for curve in run.curves],
        "config": _sections(run.config),
    }
    if results is not None:
        rows = summary_rows(results)
        page |= {
            "verdict": verdict(results),
            "outcome": outcome(results),
            "rows": rows,
            "scale": Scale.around((top1 for row in rows for top1 in row.each), highest=1.0),
            "seeds": _seed_rows(results),
            "confusion": describe_confusion(results),
            "paired_scale": Scale.around_pairs([results.get("paired")]),
        }
    return page


def _sections(config: Mapping[str, Any], name: str = "") -> list[tuple[str, dict[str, Any]]]:
    """Tables of a TOML document with their dotted names, the top level first."""
    values = {key: value for key, value in config.items() if not isinstance(value, Mapping)}
    sections = [(name, values)] if values else []
    for key, value in config.items():
        if isinstance(value, Mapping):
            sections += _sections(value, f"{name}.{key}" if name else key)
    return sections


def _stage_rows(curves: Sequence[Curve]) -> list[dict[str, Any]]:
    """Epochs, speed and time of every stage over its seeds."""
    rows = []
    for stage, seeds in group_by_stage(curves).items():
        speeds = [value for curve in seeds for value in curve.series("images_per_s")[1]]
        seconds = [sum(curve.series("seconds")[1]) for curve in seeds]
        rows.append(
            {
                "stage": stage,
                "role": seeds[0].role,
                "seeds": len(seeds),
                "epochs": sum(len(curve.epochs) for curve in seeds),
                "images_per_s": statistics.median(speeds) if speeds else None,
                "seconds": sum(seconds),
                "seconds_a_seed": statistics.fmean(seconds),
            }
        )
    return rows


def _progress(curve: Curve) -> dict[str, Any]:
    """How far a training of an unfinished run has come."""
    return {
        "name": curve.stage if curve.seed is None else f"seed {curve.seed}, {curve.stage}",
        "epoch": curve.epochs[-1]["epoch"],
        "epochs": curve.epochs[-1].get("epochs"),
        "best": max(curve.series("val/top1")[1], default=None),
        "loss": min(curve.series("val/loss")[1], default=None),
        "seconds": sum(curve.series("seconds")[1]),
    }


def _seed_rows(results: Results) -> list[dict[str, Any]]:
    """Both students of every seed, and their difference in test top-1 if both exist."""
    top1: dict[int, list[float]] = defaultdict(list)
    found: dict[int, dict[str, Any]] = defaultdict(dict)
    for arm in ("alone", "distilled"):
        for student, accuracy in zip(students(results, arm), accuracies(results, arm)):
            found[student["seed"]][arm] = student
            top1[student["seed"]].append(accuracy)
    return [
        {"seed": seed, "arms": found[seed], "difference": top1[seed][1] - top1[seed][0] if len(top1[seed]) == 2 else None}
        for seed in sorted(found)
    ]


# ---- several runs --------------------------------------------------------------------------------


def describe_comparison(runs: Sequence[RunFolder]) -> dict[str, Any]:
    """Returns the values of comparison.html."""
    folders = [run.path.resolve() for run in runs]
    shared = os.path.commonpath([folder.parent for folder in folders])
    names = [str(folder.relative_to(shared)) for folder in folders]
    summaries = [summary_rows(run.results) if run.results else [] for run in runs]
    rows: list[dict[str, Any]] = []
    lines = []
    for place, (name, run, summary) in enumerate(zip(names, runs, summaries)):
        colour = SERIES[place % len(SERIES)]
        distilled = students(run.results, "distilled") if run.results else []
        rows.append(
            {
                "name": name,
                "colour": colour,
                "results": run.results,
                "arms": {row.name: row for row in summary},
                "train_images_per_s": mean(student.get("train_images_per_s") for student in distilled),
            }
        )
        if accuracy := _distilled_accuracy(run):
            lines.append(Line(name, colour, accuracy, STYLES[place // len(SERIES) % len(STYLES)]))
    panel = Panel("Validation accuracy of the distilled student", "top-1, %", lines, percent=True)
    finished = [(name, run.results) for name, run in zip(names, runs) if run.results]
    return {
        "rows": rows,
        "figures": [(panel, svg(panel))] if lines else [],
        "scale": Scale.around((top1 for summary in summaries for row in summary for top1 in row.each), highest=1.0),
        "paired_scale": Scale.around_pairs(results.get("paired") for _, results in finished),
        "same_task": len({(of.get("dataset"), of.get("test_images"), of.get("label_fraction")) for _, of in finished}) <= 1,
        "chosen_on_test": [name for name, results in finished if results.get("val_is_test") and kept(results) == "best"],
        "kept": sorted({kept(results) for _, results in finished}),
    }


def _distilled_accuracy(run: RunFolder) -> list[tuple[list[int], list[float]]]:
    """Validation top-1 of every seed over the epochs of all its stages of distillation, one stage after the other."""
    seeds: dict[int | None, tuple[list[int], list[float]]] = defaultdict(lambda: ([], []))
    before: dict[int | None, int] = defaultdict(int)
    for curve in run.curves:
        if curve.role == "distilled":
            epochs, values = curve.series("val/top1")
            seeds[curve.seed][0].extend(before[curve.seed] + epoch for epoch in epochs)
            seeds[curve.seed][1].extend(values)
            before[curve.seed] += curve.epochs[-1]["epoch"]
    return [series for series in seeds.values() if series[0]]
