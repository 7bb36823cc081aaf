"""The part of a run's page that shows where the distilled student is wrong: a matrix for few classes, the worst pairs for many."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from kdfast.runs.results import Matrix, Results, students

MATRIX_CLASSES = 25  # a larger matrix cannot be read, and its most confused pairs say more
LISTED_PAIRS = 20
LISTED_CHANGES = 10


class ClassRow(NamedTuple):
    """One true class.

    Attributes:
        name: of the class.
        images: its test images, counted once for every seed.
        teacher: fraction of them that is right; so `alone` and `distilled`.
        change: distilled - alone.
        cells: by predicted class: images, depth of colour from 0 to 1, whether that is the true class.
    """

    name: str
    images: int
    teacher: float | None
    alone: float | None
    distilled: float | None
    change: float | None
    cells: list[tuple[int, float, bool]]


def describe_confusion(results: Results) -> dict[str, Any] | None:
    """Returns the mistakes of the distilled student, by class and as pairs of classes; None where no student was distilled."""
    tables = results.get("confusion") or {"alone": None, "distilled": None}
    distilled, alone = tables.get("distilled"), tables.get("alone")
    if not distilled:
        return None
    classes = results.get("classes") or [str(i) for i in range(len(distilled))]
    rows = _class_rows(results, classes, distilled, alone)
    pairs: list[dict[str, Any]] = [
        {"true": classes[i], "predicted": classes[j], "images": n, "share": n / sum(row), "alone": alone[i][j] if alone else None}
        for i, row in enumerate(distilled)
        for j, n in enumerate(row)
        if i != j and n
    ]
    changed = sorted((row for row in rows if row.change), key=lambda row: row.change or 0.0)
    return {
        "matrix": len(classes) <= MATRIX_CLASSES,
        "rows": rows,
        "pairs": sorted(pairs, key=lambda pair: -pair["images"])[:LISTED_PAIRS],
        "gained": [row for row in reversed(changed) if (row.change or 0.0) > 0][:LISTED_CHANGES],
        "lost": [row for row in changed if (row.change or 0.0) < 0][:LISTED_CHANGES],
        "seeds": len(students(results, "distilled")),
    }


def _class_rows(results: Results, classes: Sequence[str], distilled: Matrix, alone: Matrix | None) -> list[ClassRow]:
    teacher = results.get("teacher")
    recalls = [_recalls(table, len(classes)) for table in (teacher.get("confusion") if teacher else None, alone, distilled)]
    worst = max((share for i, row in enumerate(distilled) for j, share in enumerate(_shares(row)) if i != j), default=0) or 1
    rows = []
    for i, (name, counts, of_teacher, before, after) in enumerate(zip(classes, distilled, *recalls)):
        # mistakes are few: their colour is scaled to the largest of them, by the root so that single ones show
        cells = [
            (count, share if i == j else math.sqrt(share / worst), i == j) for j, (count, share) in enumerate(zip(counts, _shares(counts)))
        ]
        change = after - before if after is not None and before is not None else None
        rows.append(ClassRow(name, sum(counts), of_teacher, before, after, change, cells))
    return rows


def _shares(counts: Sequence[int]) -> list[float]:
    total = sum(counts)
    return [count / total if total else 0.0 for count in counts]


def _recalls(table: Matrix | None, classes: int) -> list[float | None]:
    if not table:
        return [None] * classes
    return [row[i] / sum(row) if sum(row) else None for i, row in enumerate(table)]
