"""Tools for maintainers: they need a clone of the repository, and are not in the wheel."""

import json
from pathlib import Path
from typing import Any

from kdfast import machine

RESULTS = Path(__file__).resolve().parent / "results"
ROOT = RESULTS.parents[2]  # of the clone


def write_results(name: str, cases: list[dict[str, Any]]) -> Path:
    """Writes results/<name>.json: the machine, the date and one entry per case; returns its path."""
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(machine.document(cases), indent=1) + "\n")
    return path
