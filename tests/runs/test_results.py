"""results.json: what is written is read back, and many classes do not make it large."""

import json
from pathlib import Path

import pytest

from kdfast.report import write_report
from kdfast.runs import results
from tests.report.making import make_run


@pytest.mark.parametrize("classes", [10, 1200])
def test_results_come_back_and_stay_small(classes: int, tmp_path: Path):
    made = make_run(tmp_path / "run", classes=classes, curves=False)
    results.write(tmp_path / "run", made)  # type: ignore[arg-type]
    text = (tmp_path / "run" / "results.json").read_text()
    assert results.read(tmp_path / "run") == made
    assert isinstance(json.loads(text)["confusion"]["distilled"][0], list if classes == 10 else str)
    assert max(len(text), write_report(tmp_path / "run").stat().st_size) < 2e6
