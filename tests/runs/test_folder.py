"""Run folders read back: finished, cut short, broken; and comparison.json."""

import json
from pathlib import Path
from typing import Any

import pytest

from kdfast.runs import comparison, results
from kdfast.runs.folder import read_run
from tests.report.making import make_run


def test_results_are_read_as_they_were_written(tmp_path: Path) -> None:
    made: Any = make_run(tmp_path / "run", curves=False)
    results.write(tmp_path, made)
    found = results.read(tmp_path)
    assert found == made
    assert results.read(tmp_path / "nowhere") is None
    assert results.accuracies(made, "alone") == [student["best/top1"] for student in made["arms"]["alone"]]
    assert results.accuracies(made | {"kept": "last"}, "alone") == [student["last/top1"] for student in made["arms"]["alone"]]


def test_a_line_cut_in_the_middle_is_counted_and_left_out(tmp_path: Path) -> None:
    make_run(tmp_path / "run", seeds=1, finished=False)
    path = tmp_path / "run" / "metrics.jsonl"
    assert read_run(tmp_path / "run").unreadable == 0
    path.write_text(path.read_text().rstrip()[:-25])
    run = read_run(tmp_path / "run")
    assert (run.unreadable, run.results) == (1, None)
    assert (run.curves[-1].stage, run.curves[-1].seed, len(run.curves[-1].epochs)) == ("classify", 0, 14)


def test_an_epoch_repeated_after_a_resume_counts_once(tmp_path: Path) -> None:
    make_run(tmp_path / "run", seeds=1, finished=False)
    path = tmp_path / "run" / "metrics.jsonl"
    again = json.loads(path.read_text().splitlines()[-1]) | {"val/top1": 0.4321}
    with path.open("a") as file:
        file.write(json.dumps(again) + "\n")
    curve = read_run(tmp_path / "run").curves[-1]
    assert [line["epoch"] for line in curve.epochs] == list(range(1, 16))
    assert curve.series("val/top1")[1][-1] == 0.4321


def test_a_folder_of_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="is no run folder"):
        read_run(tmp_path)


@pytest.mark.parametrize("name", ["results.json", "config.toml"])
def test_a_broken_file_is_named(name: str, tmp_path: Path) -> None:
    make_run(tmp_path / "run", seeds=1, curves=False)
    (tmp_path / "run" / name).write_text('{"recipe": ')
    with pytest.raises(ValueError, match=rf"{name} (cannot be read|is damaged)"):
        read_run(tmp_path / "run")


# ---- comparison.json -------------------------------------------------------------------------------------------------


def test_a_comparison_is_by_the_epoch_that_each_run_keeps() -> None:
    def arm(best: float, last: float) -> list[dict[str, Any]]:
        return [{"seed": 0, "best/top1": best, "last/top1": last, "train_images_per_s": 1.0, "seconds": 1.0}]

    run: Any = {
        "teacher": None,
        "student": {"model": "resnet8"},
        "kept": "last",
        "arms": {"alone": arm(0.8, 0.7), "distilled": arm(0.78, 0.76)},
    }
    rows = comparison.make_rows({"kd": run, "at": run})
    assert rows[1]["paired"]["mean"] == pytest.approx(0.06)
