"""The run report: what it says, what it leaves out, and that it survives the run folders that real life leaves behind."""

import errno
import html
import json
import math
import os
import re
from pathlib import Path
from typing import Any

import pytest

from kdfast.report import curves, summary_rows, verdict, write_comparison, write_report
from kdfast.text import percent, signed
from tests.report.making import CONFIG, RESULTS, find_addresses, make_run, read, rewrite


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "run"


# ---- the page --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A run of five seeds with its report, and its results. Tests do not change it."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    results = make_run(folder)
    assert write_report(folder) == folder / "report.html"
    return folder, results


def test_report_shows_every_number(whole: tuple[Path, dict[str, Any]]) -> None:
    folder, results = whole
    text = read(folder / "report.html")
    teacher, paired = results["teacher"], results["paired"]
    expected = ["97.35", "99.91", "0.0871", "44,549,160", "11,689,512", "812", "4,321", "3.8 ×", "5.3 ×", "360 test images", "10.0 %"]
    expected += [verdict(results), "12 min 34 s", "trained in this run", *results["notes"]]
    expected += [f"{100 * paired[key]:+.2f}" for key in ("mean", "low", "high")]
    expected += [f"{100 * difference:+.2f}".replace("-", "−") for difference in paired["differences"]]
    for run in results["arms"]["alone"] + results["arms"]["distilled"]:
        expected += [f"{100 * run[key]:.2f}" for key in ("best/top1", "best/top5", "last/top1", "val/top1")]
        expected += [f"{run['best/loss']:.4f}", str(run["epoch"]), f"{run['train_images_per_s']:,.0f}", f"{run['seconds']:.1f} s"]
    for i, (counts, before) in enumerate(zip(results["confusion"]["distilled"], results["confusion"]["alone"])):
        right, right_before = counts[i] / sum(counts), before[i] / sum(before)
        expected.append(
            f"class {i} {' '.join(map(str, counts))} {percent(right, 1)} {percent(right_before, 1)} {signed(right - right_before)}"
        )
    expected += [f"{100 * row[i] / sum(row):.1f}" for i, row in enumerate(teacher["confusion"])]
    expected += [str(value) for value in results["environment"].values()]
    expected += ["distil.training", "0.001", "0.9, 0.99", "true", "resnet18 taught by resnet101"]
    assert [item for item in expected if item not in text] == []


def test_report_loads_nothing(whole: tuple[Path, dict[str, Any]]) -> None:
    page, addresses = (whole[0] / "report.html").read_text(), find_addresses(whole[0] / "report.html")
    assert all(address.startswith("#") or address == "data:," for address in addresses), addresses
    assert len(addresses) > 3  # the curves are in the page
    assert not re.search("<(script|iframe|img|object|embed|base)", page)
    assert "://" not in page
    assert "default-src 'none'" in page
    assert not re.search(r"@import|url\((?!#)", page)


def test_report_draws_all_stages_and_terms(whole: tuple[Path, dict[str, Any]]) -> None:
    curves = " ".join(re.findall(r"<svg.*?</svg>", (whole[0] / "report.html").read_text(), re.DOTALL))
    for name in ("teacher", "alone", "classify", "lskd", "supcon", "sum", "validation", "Losses of distil"):
        assert f">{name}<" in curves
    assert "#0067a5" not in curves  # colours follow the page, or the dark one would be illegible
    assert (whole[0] / "curves.png").read_bytes().startswith(b"\x89PNG")


NO_STUDENT: dict[str, Any] = {"student": None, "arms": {"alone": [], "distilled": []}, "confusion": None, "paired": None}
NO_TEACHER: dict[str, Any] = {"teacher": None, "confusion": {"alone": None, "distilled": None}, "paired": None}
SAME_IMAGES = "the best epoch was chosen on the images that the test accuracy is measured on"
NO_NUMBERS = {**RESULTS["teacher"], "images_per_s": None, "loss": math.nan, "parameters": None}


@pytest.mark.parametrize(
    ("run", "changes", "shown", "absent"),
    [
        pytest.param({}, {}, ["validation top-1, %"], ["are the same here"], id="validation images"),
        pytest.param({}, {"val_is_test": True}, [SAME_IMAGES], ["validation top-1, %"], id="validation on test images"),
        pytest.param({"seeds": 1}, {}, ["there is no spread", "fewer than two pairs of seeds"], ["±", "Student's t"], id="one seed"),
        pytest.param(
            {"seeds": 1, "baseline": False}, {}, ["without a student trained alone", "distilled"], ["student alone"], id="no baseline"
        ),
        pytest.param({}, NO_TEACHER, [], ["taught by", "Where the distilled student is wrong", "smaller"], id="no teacher"),
        pytest.param({"seeds": 1}, NO_STUDENT, ["No student was distilled", "97.35"], [], id="teacher only"),
        pytest.param({"seeds": 1}, {"teacher": NO_NUMBERS}, ["–"], ["nan"], id="numbers that are none"),
    ],
)  # fmt: skip
def test_report_of_other_runs(run: dict[str, Any], changes: dict[str, Any], shown: list[str], absent: list[str], folder: Path) -> None:
    text = rewrite(folder, make_run(folder, **({"seeds": 2, "curves": False} | run)), **changes)
    assert [words for words in shown if words not in text] == []
    assert [words for words in absent if words in text] == []


EVIL = "<script>alert('x')</script>&\"$x^{$"


def test_report_escapes_all_text(folder: Path) -> None:
    results = make_run(folder, seeds=2)
    results["teacher"]["source"] = results["student"]["model"] = results["recipe"] = results["dataset"] = EVIL
    results["classes"][3] = results["environment"]["command"] = EVIL
    (folder / "config.toml").write_text(f"[{json.dumps(EVIL)}]\n{json.dumps(EVIL)} = {json.dumps(EVIL)}\n")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"stage": f"seed0/{EVIL}", "epoch": 1, "epochs": 1, f"train/{EVIL}": 1.0, "val/top1": 0.5}) + "\n")
    assert rewrite(folder, results, notes=[EVIL]).count(EVIL) >= 10
    page = (folder / "report.html").read_text()
    assert "<script" not in page
    assert html.escape(EVIL).replace("&#x27;", "&#39;").replace("&quot;", "&#34;") in page


def test_report_of_many_classes_lists_pairs(folder: Path) -> None:
    results = make_run(folder, seeds=2, classes=100, curves=False)
    table = results["confusion"]["distilled"]
    table[7][93] = 41
    text = rewrite(folder, results)
    assert re.search("Most confused pairs true class taken for images of its class, % alone, images class 7 class 93 41 ", text)
    assert f"41 {100 * 41 / sum(table[7]):.1f} {results['confusion']['alone'][7][93]} " in text
    assert "All 100 classes" in text
    assert (folder / "report.html").stat().st_size < 400_000  # 10,000 cells would be megabytes


def test_class_that_no_test_image_has(folder: Path) -> None:
    results = make_run(folder, seeds=2, curves=False)
    for table in (*results["confusion"].values(), results["teacher"]["confusion"]):
        table[4] = [0] * 10
    assert "class 4 0 0 0 0 0 0 0 0 0 0 – – – –" in rewrite(folder, results)


# ---- what real life leaves behind ------------------------------------------------------------------


def test_unfinished_run(folder: Path) -> None:
    make_run(folder, seeds=2, finished=False)
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines()
    cut = next(i for i, line in enumerate(lines) if "seed1/distil" in line) + 10
    path.write_text("\n".join(lines[:cut]) + '\n{"stage": "tea')
    text = read(write_report(folder))
    assert "This run is unfinished" in text
    assert "seed 1, distil 10 of 30" in text
    assert "test images" not in text
    assert "1 line of metrics.jsonl could not be read" in text
    assert (folder / "curves.png").exists()


def test_run_without_any_epoch(folder: Path) -> None:
    folder.mkdir()
    (folder / "config.toml").write_text(CONFIG)
    assert "no epoch has ended" in read(write_report(folder))
    assert not (folder / "curves.png").exists()


def test_losses_below_zero_and_not_finite_are_drawn(folder: Path) -> None:
    folder.mkdir()
    losses = (1.0, -2.0, math.nan, math.inf, 1e9)
    lines = [{"stage": "seed0/distil", "epoch": i + 1, "epochs": 5, "train/kd": x, "val/loss": -x} for i, x in enumerate(losses)]
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert "Losses of distil" in read(write_report(folder))


# ---- several runs ----------------------------------------------------------------------------------


def test_comparison(tmp_path: Path) -> None:
    first, second = make_run(tmp_path / "first"), make_run(tmp_path / "second", seeds=3, gain=-0.02)
    make_run(tmp_path / "third", seeds=1, finished=False)
    out = tmp_path / "pages" / "comparison.html"
    assert write_comparison([tmp_path / name for name in ("first", "second", "third")], out) == out
    text = read(out)
    for results in (first, second):
        for row in summary_rows(results)[1:]:
            assert f"{100 * row.top1:.2f} ± {100 * (row.top1_std or 0):.2f}" in text
        for key in ("mean", "low", "high"):
            assert f"{100 * results['paired'][key]:+.2f}".replace("-", "−") in text
    assert "third unfinished" in text
    assert "do not compare" not in text
    assert all(address.startswith("#") or address == "data:," for address in find_addresses(out))
    curves = re.findall(r"<svg.*?</svg>", out.read_text(), re.DOTALL)
    assert len(curves) == 1
    assert all(f">{name}<" in curves[0] for name in ("first", "second", "third"))


def test_comparison_of_different_tasks_says_so(tmp_path: Path) -> None:
    make_run(tmp_path / "a" / "run", seeds=1, curves=False)
    results = make_run(tmp_path / "b" / "run", seeds=1, curves=False)
    (tmp_path / "b" / "run" / "results.json").write_text(json.dumps(results | {"dataset": "cifar10", "val_is_test": True}))
    text = read(write_comparison([tmp_path / "a" / "run", tmp_path / "b" / "run"], tmp_path / "out.html"))
    assert "their accuracies do not compare" in text
    assert f"test images themselves in {Path('b', 'run')}, which" in text  # two runs of one name are told apart
    assert "the best validation epoch: mean" in text
    (tmp_path / "b" / "run" / "results.json").write_text(json.dumps(results | {"val_is_test": True, "kept": "last"}))
    text = read(write_comparison([tmp_path / "a" / "run", tmp_path / "b" / "run"], tmp_path / "out.html"))
    assert "test images themselves" not in text
    assert "the best validation epoch, or of the last where a run chose none: mean" in text


def test_report_is_the_same_when_made_again(whole: tuple[Path, dict[str, Any]]) -> None:
    pages = [whole[0] / name for name in ("report.html", "curves.png")]
    first = [page.read_bytes() for page in pages]
    write_report(whole[0])
    assert [page.read_bytes() for page in pages] == first
    names = {path.name for path in whole[0].iterdir()}
    assert names == {"config.toml", "metrics.jsonl", "results.json", "report.html", "curves.png"}


def test_full_disk_leaves_the_old_report(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = make_run(folder, seeds=2)
    old = write_report(folder).read_bytes(), (folder / "curves.png").read_bytes()
    (folder / "results.json").write_text(json.dumps(results | {"recipe": "another"}))
    (folder / "metrics.jsonl").write_text("")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_report(folder)
    assert ((folder / "report.html").read_bytes(), (folder / "curves.png").read_bytes()) == old
    assert len(list(folder.iterdir())) == 5  # no temporary file stays behind


def test_the_limits_of_a_panel_hold_every_seed() -> None:
    seeds = [([1, 2, 3], [0.2, 0.9, 0.5]), ([1, 2, 3], [0.2, 0.3, 0.5])]
    for scale in (100, 1):
        panel = curves.Panel("accuracy", "top-1, %", [curves.Line("distilled", "distilled", seeds)], percent=scale == 100)
        low, high = curves._figure([panel], 1).axes[0].get_ylim()
        assert low <= 0.3 * scale
        assert high >= 0.9 * scale
