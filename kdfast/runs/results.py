"""results.json, the measurements of a finished run: a typed schema with one writer and one reader.

Accuracies are fractions of the test images, losses are nats, times are seconds. The rows of a confusion matrix of more than DENSE classes
are texts in the file, "class:images class:images ...", without the zeros.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NotRequired, TypedDict, cast

from kdfast import files

NAME = "results.json"
TIMES = {"seconds", "seconds_total", "images_per_s", "train_images_per_s", "environment"}  # what checksums leave out
RECORDED = ("best.safetensors", "metrics.jsonl")
DENSE = 100  # classes

Arm = Literal["alone", "distilled"]
Kept = Literal["best", "last"]
Matrix = list[list[int]]
"""Images by true class (rows) and predicted class (columns)."""


class Network(TypedDict):
    """A network and its speed at inference."""

    model: str
    parameters: int | None
    images_per_s: float | None


class Teacher(Network):
    """The teacher and its test numbers; `source` is "trained in this run" or the path that was given."""

    source: str
    top1: float
    top5: float
    loss: float
    confusion: Matrix


# the functional form, since these keys are no identifiers; other validation metrics of the kept epoch are there as well
Student = TypedDict(
    "Student",
    {
        "seed": int,
        "epoch": int,
        "train_images_per_s": float,
        "seconds": float,
        "best/top1": float,
        "best/top5": float,
        "best/loss": float,
        "last/top1": float,
        "last/top5": float,
        "last/loss": float,
        "val/top1": NotRequired[float],
        "val/loss": NotRequired[float],
    },
)
"""One trained student: its seed, the epoch that was kept, and test numbers of the best and the last epoch."""


class Arms(TypedDict):
    """The students of every seed, trained without and with the teacher."""

    alone: list[Student]
    distilled: list[Student]


class Confusion(TypedDict):
    """Confusion matrices of the students, summed over seeds."""

    alone: Matrix | None
    distilled: Matrix | None


class Paired(TypedDict):
    """Differences of accuracy seed by seed, and Student's t interval of their mean."""

    n: int
    mean: float
    low: float
    high: float
    confidence: float
    differences: list[float]


class Results(TypedDict):
    """The whole file.

    `val_is_test`: validation and test images are the same. `kept`: the epoch whose weights were kept and judge the run, by default "best".
    `student` is None for a run that trained only a teacher. `files`: checksums of the files that belong to these results.
    """

    recipe: str
    preset: str
    dataset: str
    classes: list[str]
    test_images: int
    label_fraction: float
    val_is_test: bool
    kept: NotRequired[Kept]
    teacher: Teacher | None
    student: Network | None
    student_alone: NotRequired[Network | None]
    arms: Arms
    confusion: Confusion
    paired: Paired | None
    notes: list[str]
    environment: dict[str, Any]
    seconds_total: float
    files: NotRequired[dict[str, str]]


def write(folder: Path, results: Results) -> None:
    """Writes RUN/results.json atomically, keys in the schema's order."""
    found = _map_matrices(results, _pack)
    if sums := {name: _sum(folder / name) for name in RECORDED if (folder / name).is_file()}:
        found["files"] = sums
    found = {key: found[key] for key in Results.__annotations__ if key in found}
    files.write_json(folder / NAME, found | {"sha256": files.checksum(_without_times(found))})


def check(folder: Path, name: str) -> None:
    """Checks that a file in the folder is the one that the results belong to, if the run has finished.

    Raises:
        ValueError: it is not, or results.json is damaged.
    """
    found, path = read(folder), folder / name
    known = found.get("files", {}).get(name) if found else None
    if known and (not path.is_file() or _sum(path) != known):
        raise ValueError(f"{path} is damaged, missing or of another run: {folder / NAME} knows another")


def _sum(path: Path) -> str:
    """The checksum of a file; of lines of JSON without their times, since two runs of one command differ in these alone."""
    if path.suffix != ".jsonl":
        return files.sha256(path)
    try:
        return files.checksum([_without_times(json.loads(line)) for line in path.read_bytes().splitlines()])
    except ValueError:
        return "damaged"


def _without_times(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_times(part) for key, part in value.items() if key not in TIMES}
    return [_without_times(part) for part in value] if isinstance(value, list) else value


def read(folder: Path) -> Results | None:
    """Reads RUN/results.json; None: the run is unfinished.

    Raises:
        ValueError: the file is damaged or has been edited.
    """
    path = folder / NAME
    if not path.is_file():
        return None
    found = files.read_json(path)
    if (seal := found.pop("sha256", None)) is not None and seal != files.checksum(_without_times(found)):
        raise ValueError(f"{path} is damaged or has been edited")
    if missing := Results.__required_keys__ - found.keys():
        raise ValueError(f"{path} is damaged: there is no {', '.join(sorted(missing))} in it")
    try:
        return cast(Results, _map_matrices(found, _unpack))
    except (ValueError, IndexError, AttributeError) as error:  # of a file without a checksum
        raise ValueError(f"{path} is damaged: {error}") from error


def _map_matrices(results: Mapping[str, Any], change: Callable[[list[Any]], list[Any]]) -> dict[str, Any]:
    """The results with every confusion matrix changed."""

    def confusions(holder: Any) -> Any:
        if not isinstance(holder, Mapping):
            return holder
        return {key: change(value) if isinstance(value, list) else value for key, value in holder.items()}

    return {key: confusions(value) if key in ("teacher", "confusion") else value for key, value in results.items()}


def _pack(table: list[Any]) -> list[Any]:
    if len(table) <= DENSE:
        return table
    return [" ".join(f"{k}:{n}" for k, n in enumerate(row) if n) for row in table]


def _unpack(table: list[Any]) -> list[Any]:
    if not all(isinstance(row, str) for row in table):
        return table
    rows = [[0] * len(table) for _ in table]
    for row, text in zip(rows, table):
        for cell in text.split():
            k, n = map(int, cell.split(":"))
            row[k] = n
    return rows


def kept(results: Results) -> Kept:
    """Returns the epoch whose weights judge the run."""
    return results.get("kept") or "best"


def students(results: Results, arm: Arm) -> list[Student]:
    """Returns the students of an arm, by seed; [] where the run has none."""
    arms = results.get("arms")
    return arms[arm] if arms and arms.get(arm) else []


def accuracies(results: Results, arm: Arm) -> list[float]:
    """Returns the test top-1 of an arm's students, by seed, with the weights that were kept."""
    key: Literal["best/top1", "last/top1"] = "best/top1" if kept(results) == "best" else "last/top1"
    return [student[key] for student in students(results, arm)]
