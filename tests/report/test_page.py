"""The run report: what it says, what it leaves out, and that it survives the run folders that real life leaves behind."""

import errno
import html
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from kdfast.report import summary_rows, verdict, write_comparison, write_report
from tests.report.making import CONFIG, Text, make_run, read, rewrite


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "run"


# ---- the page --------------------------------------------------------------------------------------


def test_report_shows_every_number(folder: Path) -> None:
    results = make_run(folder)
    path = write_report(folder)
    assert path == folder / "report.html"
    text = read(path).text
    teacher, paired = results["teacher"], results["paired"]
    expected = ["97.35", "99.91", "0.0871", "44,549,160", "11,689,512", "812", "4,321", "3.8 ×", "5.3 ×", "360 test images", "10.0 %"]
    expected += [verdict(results), "12 min 34 s", "trained in this run", *results["notes"]]
    expected += [f"{100 * paired[key]:+.2f}" for key in ("mean", "low", "high")]
    expected += [f"{100 * difference:+.2f}".replace("-", "−") for difference in paired["differences"]]
    for run in results["arms"]["alone"] + results["arms"]["distilled"]:
        expected += [f"{100 * run[key]:.2f}" for key in ("best/top1", "best/top5", "last/top1", "val/top1")]
        expected += [f"{run['best/loss']:.4f}", str(run["epoch"]), f"{run['train_images_per_s']:,.0f}", f"{run['seconds']:.1f} s"]
    for i, counts in enumerate(results["confusion"]["distilled"]):
        expected.append(f"class {i} " + " ".join(map(str, counts)) + f" {100 * counts[i] / sum(counts):.1f}")
    expected += [f"{100 * row[i] / sum(row):.1f}" for i, row in enumerate(teacher["confusion"])]
    expected += [str(value) for value in results["environment"].values()]
    expected += ["distil.training", "0.001", "0.9, 0.99", "true", "resnet18 taught by resnet101"]
    assert [item for item in expected if item not in text] == []


def test_report_names_what_each_number_was_measured_on(folder: Path) -> None:
    results = make_run(folder, curves=False)
    text = read(write_report(folder)).text
    assert "validation top-1, %" in text
    assert "are the same here" not in text
    text = rewrite(folder, results, val_is_test=True).text
    assert "the best epoch was chosen on the images that the test accuracy is measured on" in text
    assert "validation top-1, %" not in text


def test_report_loads_nothing(folder: Path) -> None:
    make_run(folder, seeds=2)
    page = write_report(folder).read_text()
    parsed = Text(page)
    assert all(address.startswith("#") or address == "data:," for address in parsed.addresses), parsed.addresses
    assert len([address for address in parsed.addresses if address.startswith("#")]) > 3  # the curves are in the page
    assert not parsed.tags & {"script", "iframe", "img", "object", "embed", "base"}
    assert "://" not in page
    assert "default-src 'none'" in page
    assert not re.search(r"@import|url\((?!#)", page)


def test_report_draws_all_stages_and_terms(folder: Path) -> None:
    make_run(folder, seeds=2)
    page = write_report(folder).read_text()
    curves = " ".join(re.findall(r"<svg.*?</svg>", page, re.DOTALL))
    for name in ("teacher", "alone", "classify", "lskd", "supcon", "sum", "validation", "Losses of distil"):
        assert f">{name}<" in curves
    assert "#0067a5" not in curves  # colours follow the page, or the dark one would be illegible
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_report_is_the_same_when_made_again(folder: Path) -> None:
    make_run(folder, seeds=2)
    first = write_report(folder).read_bytes(), (folder / "curves.png").read_bytes()
    assert (write_report(folder).read_bytes(), (folder / "curves.png").read_bytes()) == first
    assert {path.name for path in folder.iterdir()} == {
        "config.toml", "metrics.jsonl", "results.json", "report.html", "curves.png",
    }  # fmt: skip


EVIL = "<script>alert('x')</script>&\"$x^{$"


def test_report_escapes_all_text(folder: Path) -> None:
    results = make_run(folder, seeds=2)
    results["teacher"]["source"] = results["student"]["model"] = results["recipe"] = results["dataset"] = EVIL
    results["classes"][3] = results["environment"]["command"] = EVIL
    (folder / "config.toml").write_text(f"[{json.dumps(EVIL)}]\n{json.dumps(EVIL)} = {json.dumps(EVIL)}\n")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"stage": f"seed0/{EVIL}", "epoch": 1, "epochs": 1, f"train/{EVIL}": 1.0, "val/top1": 0.5}) + "\n")
    parsed = rewrite(folder, results, notes=[EVIL])
    assert "script" not in parsed.tags
    assert parsed.text.count(EVIL) >= 10
    page = (folder / "report.html").read_text()
    assert html.escape(EVIL).replace("&#x27;", "&#39;").replace("&quot;", "&#34;") in page


def test_report_of_one_seed(folder: Path) -> None:
    results = make_run(folder, seeds=1, curves=False)
    text = read(write_report(folder)).text
    assert "one seed shows no spread" in text
    assert "fewer than two pairs of seeds" in text
    assert "±" not in text
    assert "Student's t" not in text
    assert f"{100 * results['arms']['alone'][0]['best/top1']:.2f}" in text


def test_report_without_baseline(folder: Path) -> None:
    make_run(folder, seeds=1, baseline=False, curves=False)
    text = read(write_report(folder)).text
    assert "without a student trained alone" in text
    assert "student distilled" in text
    assert "student alone" not in text


def test_report_without_teacher_and_confusion(folder: Path) -> None:
    results = make_run(folder, seeds=2, curves=False)
    text = rewrite(folder, results, teacher=None, confusion={"alone": None, "distilled": None}, paired=None).text
    assert "taught by" not in text
    assert "Where the distilled student is wrong" not in text
    assert "smaller" not in text


def test_report_of_a_teacher_alone(folder: Path) -> None:
    results = make_run(folder, seeds=1, curves=False)
    bare: dict[str, Any] = {"student": None, "arms": {"alone": [], "distilled": []}, "confusion": None, "paired": None}
    text = rewrite(folder, results, **bare).text
    assert "No student was distilled" in text
    assert "97.35" in text


def test_report_of_numbers_that_are_none(folder: Path) -> None:
    results = make_run(folder, seeds=1, curves=False)
    results["teacher"] |= {"images_per_s": None, "loss": math.nan, "parameters": None}
    text = rewrite(folder, results).text
    assert "nan" not in text
    assert "–" in text


def test_report_of_many_classes_lists_pairs(folder: Path) -> None:
    results = make_run(folder, seeds=2, classes=100, curves=False)
    table = results["confusion"]["distilled"]
    table[7][93] = 41
    parsed = rewrite(folder, results)
    assert re.search("Most confused pairs true class taken for images of its class, % alone, images class 7 class 93 41 ", parsed.text)
    assert f"41 {100 * 41 / sum(table[7]):.1f} {results['confusion']['alone'][7][93]} " in parsed.text
    assert "All 100 classes" in parsed.text
    assert (folder / "report.html").stat().st_size < 400_000  # 10,000 cells would be megabytes


def test_class_that_no_test_image_has(folder: Path) -> None:
    results = make_run(folder, seeds=2, curves=False)
    for table in (*results["confusion"].values(), results["teacher"]["confusion"]):
        table[4] = [0] * 10
    assert "class 4 0 0 0 0 0 0 0 0 0 0 – – – –" in rewrite(folder, results).text


# ---- what real life leaves behind ------------------------------------------------------------------


def test_unfinished_run(folder: Path) -> None:
    make_run(folder, seeds=2, finished=False)
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines()
    cut = next(i for i, line in enumerate(lines) if "seed1/distil" in line) + 10
    path.write_text("\n".join(lines[:cut]) + "\n")
    text = read(write_report(folder)).text
    assert "This run is unfinished" in text
    assert "seed 1, distil 10 of 30" in text
    assert "test images" not in text
    assert (folder / "curves.png").exists()


def test_run_without_any_epoch(folder: Path) -> None:
    folder.mkdir()
    (folder / "config.toml").write_text(CONFIG)
    assert "no epoch has ended" in read(write_report(folder)).text
    assert not (folder / "curves.png").exists()


def test_a_line_cut_in_the_middle_is_mentioned(folder: Path) -> None:
    make_run(folder, seeds=1, finished=False)
    path = folder / "metrics.jsonl"
    path.write_text(path.read_text().splitlines()[0] + '\n{"stage": "tea')
    assert "1 line of metrics.jsonl could not be read" in read(write_report(folder)).text


def test_losses_below_zero_and_not_finite_are_drawn(folder: Path) -> None:
    folder.mkdir()
    losses = (1.0, -2.0, math.nan, math.inf, 1e9)
    lines = [{"stage": "seed0/distil", "epoch": i + 1, "epochs": 5, "train/kd": x, "val/loss": -x} for i, x in enumerate(losses)]
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert "Losses of distil" in read(write_report(folder)).text


def test_full_disk_leaves_the_old_report(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = make_run(folder, seeds=2)
    old = write_report(folder).read_bytes(), (folder / "curves.png").read_bytes()
    (folder / "results.json").write_text(json.dumps(results | {"recipe": "another"}))
    (folder / "metrics.jsonl").write_text("")

    def full(self: Path, *args: Any, **kwargs: Any) -> int:
        with self.open("wb") as file:
            file.write(b"<!doctype")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        write_report(folder)
    assert ((folder / "report.html").read_bytes(), (folder / "curves.png").read_bytes()) == old
    assert len(list(folder.iterdir())) == 5  # no temporary file stays behind


# ---- several runs ----------------------------------------------------------------------------------


def test_comparison(tmp_path: Path) -> None:
    first, second = make_run(tmp_path / "first"), make_run(tmp_path / "second", seeds=3, gain=-0.02)
    make_run(tmp_path / "third", seeds=1, finished=False)
    out = tmp_path / "pages" / "comparison.html"
    assert write_comparison([tmp_path / name for name in ("first", "second", "third")], out) == out
    parsed = read(out)
    for results in (first, second):
        for row in summary_rows(results)[1:]:
            assert f"{100 * row.top1:.2f} ± {100 * (row.top1_std or 0):.2f}" in parsed.text
        for key in ("mean", "low", "high"):
            assert f"{100 * results['paired'][key]:+.2f}".replace("-", "−") in parsed.text
    assert "third unfinished" in parsed.text
    assert "do not compare" not in parsed.text
    assert all(address.startswith("#") or address == "data:," for address in parsed.addresses)
    curves = re.findall(r"<svg.*?</svg>", out.read_text(), re.DOTALL)
    assert len(curves) == 1
    assert all(f">{name}<" in curves[0] for name in ("first", "second", "third"))


def test_comparison_of_different_tasks_says_so(tmp_path: Path) -> None:
    make_run(tmp_path / "a" / "run", seeds=1, curves=False)
    results = make_run(tmp_path / "b" / "run", seeds=1, curves=False)
    (tmp_path / "b" / "run" / "results.json").write_text(json.dumps(results | {"dataset": "cifar10", "val_is_test": True}))
    text = read(write_comparison([tmp_path / "a" / "run", tmp_path / "b" / "run"], tmp_path / "out.html")).text
    assert "their accuracies do not compare" in text
    assert f"test images themselves in {Path('b', 'run')}, which" in text  # two runs of one name are told apart
    assert "the best validation epoch: mean" in text
    (tmp_path / "b" / "run" / "results.json").write_text(json.dumps(results | {"val_is_test": True, "kept": "last"}))
    text = read(write_comparison([tmp_path / "a" / "run", tmp_path / "b" / "run"], tmp_path / "out.html")).text
    assert "test images themselves" not in text
    assert "the best validation epoch, or of the last where a run chose none: mean" in text


def test_comparison_of_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one run folder"):
        write_comparison([], tmp_path / "out.html")
