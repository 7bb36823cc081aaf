"""A run folder, read back.

config.toml      the options
metrics.jsonl    one line an epoch and stage: losses by term, validation loss and accuracy, seconds, images/s
results.json     accuracy on the test images, written when the run ends
"""

import json
import re
import tomllib
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from kdfast.runs import results
from kdfast.runs.results import Results

Role = Literal["teacher", "alone", "distilled"]


@dataclass(frozen=True)
class Curve:
    """One training of one stage.

    Attributes:
        stage: its name without the seed: "teacher", "alone", "distil", ...
        seed: of the student; None for a teacher.
        epochs: lines of metrics.jsonl, by epoch.
    """

    stage: str
    seed: int | None
    epochs: list[dict[str, Any]]

    def series(self, key: str) -> tuple[list[int], list[float]]:
        """Returns the epochs that have `key`, and its values there."""
        found = [(line["epoch"], line[key]) for line in self.epochs if isinstance(line.get(key), int | float)]
        return [epoch for epoch, _ in found], [value for _, value in found]

    @property
    def role(self) -> Role:
        """The network that is trained."""
        first = self.stage.split("/")[0]
        if self.seed is None and first == "teacher":
            return "teacher"
        return "alone" if first == "alone" else "distilled"


@dataclass(frozen=True)
class RunFolder:
    """The content of a run folder.

    Attributes:
        path: of the folder.
        config: tables of config.toml.
        curves: every training, in the order in which they first ran.
        unreadable: lines of metrics.jsonl that are no JSON: a run killed while it wrote leaves one.
        written: time at which metrics.jsonl last grew.
        results: None while the run is unfinished.
    """

    path: Path
    config: dict[str, Any]
    curves: list[Curve]
    unreadable: int
    written: datetime | None
    results: Results | None


def read_run(folder: Path) -> RunFolder:
    """Reads a run folder, finished or not.

    Raises:
        FileNotFoundError: the folder holds none of a run's files.
        ValueError: config.toml or results.json is damaged, or the other files are not those of these results.
    """
    config, metrics = folder / "config.toml", folder / "metrics.jsonl"
    if not any(path.is_file() for path in (config, metrics, folder / results.NAME)):
        raise FileNotFoundError(f"{folder} is no run folder: it holds neither config.toml nor metrics.jsonl nor {results.NAME}")
    results.check(folder, metrics.name)
    lines, unreadable = _read_metrics(metrics) if metrics.is_file() else ([], 0)
    written = datetime.fromtimestamp(metrics.stat().st_mtime) if metrics.is_file() else None
    return RunFolder(folder, _read_config(config) if config.is_file() else {}, _curves(lines), unreadable, written, results.read(folder))


def _read_config(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # TOML's and UTF-8's errors are kinds of it
        raise ValueError(f"{path} cannot be read: {error}") from error


def _read_metrics(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The lines of metrics.jsonl, and how many could not be read: a run killed while it wrote leaves half a line."""
    lines, unreadable = [], 0
    for text in path.read_bytes().splitlines():
        try:
            line = json.loads(text)
            line["epoch"], line["stage"].strip()
        except (ValueError, KeyError, TypeError, AttributeError):
            unreadable += bool(text.strip())
        else:
            lines.append(line)
    return lines, unreadable


def _curves(lines: Iterable[dict[str, Any]]) -> list[Curve]:
    """The lines of metrics.jsonl by training, in the order in which they first ran."""
    stages: dict[str, dict[int, dict[str, Any]]] = defaultdict(dict)
    for line in lines:
        stages[line["stage"]][line["epoch"]] = line  # an epoch repeated after a resume replaces its first attempt
    curves = []
    for name, epochs in stages.items():
        seeded = re.fullmatch(r"seed(\d+)/(.+)", name, re.DOTALL)
        stage, seed = (seeded[2], int(seeded[1])) if seeded else (name, None)
        curves.append(Curve(stage, seed, [epochs[epoch] for epoch in sorted(epochs)]))
    return curves


def group_by_stage(curves: Iterable[Curve]) -> dict[str, list[Curve]]:
    """Returns the seeds of every stage, stages in the order in which they first ran."""
    stages: dict[str, list[Curve]] = {}
    for curve in curves:
        stages.setdefault(curve.stage, []).append(curve)
    return stages
