"""The part of a run's page that shows where the distilled student is wrong: a matrix for few classes, the worst pairs for many."""

from typing import Any, NamedTuple

import numpy as np

from kdfast.runs.results import Matrix, Results, students

MATRIX_CLASSES = 25  # a larger matrix cannot be read, and its most confused pairs say more
LISTED_PAIRS = 20
LISTED_CHANGES = 10


class ClassRow(NamedTuple):
    """One true class.

    Attributes:
        name: of the class.
        images: its test images, counted once for every seed.
        teacher: fraction of them that is right, NaN if unknown; so `alone` and `distilled`.
        change: distilled - alone.
        cells: by predicted class: images, depth of colour from 0 to 1, whether that is the true class; none where no matrix is shown.
    """

    name: str
    images: int
    teacher: float
    alone: float
    distilled: float
    change: float
    cells: list[tuple[int, float, bool]]


def describe_confusion(results: Results) -> dict[str, Any] | None:
    """Returns the mistakes of the distilled student, by class and as pairs of classes; None where no student was distilled."""
    tables = results["confusion"]
    if not tables or not tables["distilled"]:
        return None
    classes, distilled, alone = results["classes"], tables["distilled"], tables["alone"]
    rows, shares = _class_rows(results, distilled, alone), _shares(distilled)
    pairs: list[dict[str, Any]] = [
        {"true": classes[i], "predicted": classes[j], "images": n, "share": shares[i, j], "alone": alone[i][j] if alone else None}
        for i, row in enumerate(distilled)
        for j, n in enumerate(row)
        if i != j and n
    ]
    changed = sorted((row for row in rows if abs(row.change) > 0), key=lambda row: row.change)
    return {
        "matrix": len(classes) <= MATRIX_CLASSES,
        "rows": rows,
        "pairs": sorted(pairs, key=lambda pair: -pair["images"])[:LISTED_PAIRS],
        "gained": [row for row in reversed(changed) if row.change > 0][:LISTED_CHANGES],
        "lost": [row for row in changed if row.change < 0][:LISTED_CHANGES],
        "seeds": len(students(results, "distilled")),
    }


def _class_rows(results: Results, distilled: Matrix, alone: Matrix | None) -> list[ClassRow]:
    teacher, shares = results["teacher"], _shares(distilled)
    unknown = np.full(len(distilled), np.nan)
    right = [_shares(table).diagonal() if table else unknown for table in (teacher and teacher.get("confusion"), alone, distilled)]
    # mistakes are few: their colour is scaled to the largest of them, by the root so that single ones show
    wrong = np.nan_to_num(shares - np.diag(right[2]))
    depths = np.nan_to_num(np.sqrt(wrong / (wrong.max() or 1)) + np.diag(right[2]))
    rows = []
    for i, (name, counts, of_teacher, before, after) in enumerate(zip(results["classes"], distilled, *right)):
        cells = [(n, depth, i == j) for j, (n, depth) in enumerate(zip(counts, depths[i]))] if len(distilled) <= MATRIX_CLASSES else []
        rows.append(ClassRow(name, sum(counts), of_teacher, before, after, after - before, cells))
    return rows


def _shares(table: Matrix) -> np.ndarray:
    """Returns each count as a fraction of its row; NaN in a row without images."""
    counts = np.array(table, dtype=float)
    with np.errstate(invalid="ignore"):
        return counts / counts.sum(axis=1, keepdims=True)
