"""The run report: what it says, what it leaves out, and that it survives the run folders that real life leaves behind."""

import errno
import html
import json
import math
import random
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from kdfast import report
from kdfast.report import outcome, paired_difference, summary_rows, verdict, write_comparison, write_report

CONFIG = """recipe = "conkd"
seeds = 5
betas = [0.9, 0.99]
amp = true

[student]
model = "resnet18"

[distil.training]
lr = 1e-3
"""


def confusion(rng: random.Random, classes: int, images: int, accuracy: float) -> list[list[int]]:
    """`images` a class, of which about `accuracy` are right and most of the rest go to a neighbour."""
    table = [[0] * classes for _ in range(classes)]
    for i, row in enumerate(table):
        wrong = sum(rng.random() > accuracy for _ in range(images))
        row[i] = images - wrong
        for _ in range(wrong):
            row[(i + rng.choice([1, 1, 1, 2, classes - 1])) % classes] += 1
    return table


def metrics(stage: str, epochs: int, done: int, rng: random.Random, top1: float | None, terms: dict[str, float]) -> list[str]:
    lines = []
    for epoch in range(1, done + 1):
        left = math.exp(-5 * epoch / epochs)
        line: dict[str, Any] = {"stage": stage, "epoch": epoch, "epochs": epochs, "lr": 1e-3}
        line |= {f"train/{name}": value * (0.1 + left) * rng.uniform(0.95, 1.05) for name, value in terms.items()}
        line["train/loss"] = sum(value for key, value in line.items() if key.startswith("train/"))
        line["val/loss"] = 1.2 * line["train/loss"]
        if top1 is not None:
            line |= {"val/top1": top1 * (1 - 0.8 * left) + rng.gauss(0, 0.004), "val/top5": 0.99}
        line |= {"seconds": 1.2, "images_per_s": rng.gauss(5400, 60), "best": epoch % 7 == 1}
        lines.append(json.dumps(line))
    return lines


def make_run(
    folder: Path, *, seeds: int = 5, classes: int = 10, baseline: bool = True, finished: bool = True, gain: float = 0.02
) -> dict[str, Any]:
    """Writes a run folder as the engine does, and returns its results."""
    rng = random.Random(seeds * 1000 + classes)
    names = [f"class {i}" for i in range(classes)]
    folder.mkdir(parents=True)
    (folder / "config.toml").write_text(CONFIG)
    lines = metrics("teacher", 20, 20, rng, 0.97, {"ce": 2.3})
    arms: dict[str, list[dict[str, Any]]] = {"alone": [], "distilled": []}
    for seed in range(seeds):
        for arm in ("alone", "distilled") if baseline else ("distilled",):
            top1 = 0.93 + (gain if arm == "distilled" else 0) + rng.gauss(0, 0.005)
            if arm == "alone":
                lines += metrics(f"seed{seed}/alone", 30, 30, rng, top1, {"ce": 2.3})
            else:
                lines += metrics(f"seed{seed}/distil", 30, 30, rng, None, {"lskd": 9.1, "supcon": 4.2})
                lines += metrics(f"seed{seed}/classify", 15, 15, rng, top1, {"ce": 2.3})
            arms[arm].append(
                {
                    "seed": seed,
                    "best/top1": top1,
                    "best/top5": rng.uniform(0.98, 0.999),
                    "best/loss": rng.uniform(0.1, 0.2),
                    "last/top1": top1 - 0.0031,
                    "val/top1": top1 + 0.0042,
                    "epoch": rng.randint(3, 30),
                    "train_images_per_s": rng.uniform(4000, 6000),
                    "seconds": rng.uniform(20, 50),
                }
            )
    paired = None
    if baseline and seeds > 1:
        alone, distilled = ([run["best/top1"] for run in arms[arm]] for arm in ("alone", "distilled"))
        paired = paired_difference(alone, distilled)
    results = {
        "recipe": "conkd",
        "preset": "notebook",
        "dataset": "digits",
        "classes": names,
        "test_images": 360,
        "label_fraction": 0.1,
        "val_is_test": False,
        "teacher": {
            "model": "resnet101",
            "parameters": 44_549_160,
            "source": "trained in this run",
            "top1": 0.9735,
            "top5": 0.9991,
            "loss": 0.0871,
            "images_per_s": 812.4,
            "confusion": confusion(rng, classes, 36, 0.97),
        },
        "student": {"model": "resnet18", "parameters": 11_689_512, "images_per_s": 4321.0},
        "arms": arms,
        "confusion": {
            "alone": confusion(rng, classes, 36 * seeds, 0.93) if baseline else None,
            "distilled": confusion(rng, classes, 36 * seeds, 0.95),
        },
        "paired": paired,
        "notes": ["the teacher starts from random weights"],
        "environment": {
            "kdfast": "0.1.0",
            "torch": "2.15.0",
            "python": "3.11.2",
            "cpu": "a CPU of 2 cores",
            "cores": 2,
            "command": "kdfast distill --recipe conkd --seeds 5",
        },
        "seconds_total": 754.0,
    }
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    if finished:
        (folder / "results.json").write_text(json.dumps(results))
    return results


class Text(HTMLParser):
    """The text that a reader sees, and every address that the page names."""

    def __init__(self, page: str):
        super().__init__()
        self.words: list[str] = []
        self.addresses: list[str] = []
        self.tags: set[str] = set()
        self._hidden = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._hidden = tag == "style"
        self.tags.add(tag)
        self.addresses += [value or "" for key, value in attrs if key in ("src", "href", "xlink:href", "srcset", "data")]

    def handle_endtag(self, tag: str) -> None:
        self._hidden = False

    def handle_data(self, data: str) -> None:
        if not self._hidden:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def read(path: Path) -> Text:
    return Text(path.read_text(encoding="utf-8"))


def rewrite(folder: Path, results: dict[str, Any], **changes: Any) -> Text:
    """The report of the run with some of its results changed."""
    (folder / "results.json").write_text(json.dumps(results | changes))
    return read(write_report(folder))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "run"


# ---- numbers ---------------------------------------------------------------------------------------


def test_paired_difference_is_students_interval() -> None:
    # differences 1, 2, 3, 4, 5: mean 3, s = sqrt(2.5), t of 4 degrees of freedom at 0.975 is 2.776445 (any table)
    found = paired_difference([0, 0, 0, 0, 0], [1, 2, 3, 4, 5])
    reach = 2.776445 * math.sqrt(2.5) / math.sqrt(5)
    assert (found["n"], found["mean"], found["differences"]) == (5, 3, [1, 2, 3, 4, 5])
    assert found["low"] == pytest.approx(3 - reach, abs=1e-5)
    assert found["high"] == pytest.approx(3 + reach, abs=1e-5)


@pytest.mark.parametrize(("confidence", "quantile"), [(0.90, 6.313752), (0.95, 12.706205), (0.99, 63.656741)])
def test_paired_difference_of_two_seeds(confidence: float, quantile: float) -> None:
    found = paired_difference([0.5, 0.5], [0.6, 0.8], confidence)
    assert found["high"] - found["mean"] == pytest.approx(quantile * 0.1, rel=1e-5)  # s = 0.2 / sqrt(2), n = 2
    assert found["confidence"] == confidence


def test_paired_difference_pairs() -> None:
    # the seeds differ far more than the arms: an unpaired interval would hold zero
    found = paired_difference([0.5, 0.7, 0.9], [0.51, 0.712, 0.909])
    assert found["low"] > 0


@pytest.mark.parametrize(("alone", "distilled", "confidence"), [([1.0], [1.0], 0.95), ([1, 2], [1, 2, 3], 0.95), ([1, 2], [1, 2], 1.0)])
def test_paired_difference_refuses(alone: list[float], distilled: list[float], confidence: float) -> None:
    with pytest.raises(ValueError, match="must"):
        paired_difference(alone, distilled, confidence)


def test_summary_rows(folder: Path) -> None:
    results = make_run(folder)
    for run, top1 in zip(results["arms"]["alone"], (0.90, 0.92, 0.94, 0.96, 0.98)):
        run["best/top1"] = top1
    teacher, alone, distilled = summary_rows(results)
    assert [row.name for row in (teacher, alone, distilled)] == ["teacher", "student alone", "student distilled"]
    assert (teacher.top1, teacher.top1_std, teacher.parameters) == (0.9735, None, 44_549_160)
    assert alone.top1 == pytest.approx(0.94)
    assert alone.top1_std == pytest.approx(math.sqrt(0.001))  # sample: 4 in the denominator
    assert (distilled.seeds, distilled.model, distilled.images_per_s) == (5, "resnet18", 4321.0)


def test_summary_rows_without_teacher_and_baseline(folder: Path) -> None:
    results = make_run(folder, seeds=1, baseline=False) | {"teacher": None}
    assert [(row.name, row.top1_std) for row in summary_rows(results)] == [("student distilled", None)]


def compared(alone: list[float], distilled: list[float]) -> dict[str, Any]:
    arms = {"alone": [{"best/top1": x} for x in alone], "distilled": [{"best/top1": x} for x in distilled]}
    return {"arms": arms, "paired": paired_difference(alone, distilled) if len(alone) > 1 else None}


@pytest.mark.parametrize(
    ("alone", "distilled", "said", "kind"),
    [
        (
            [0.90, 0.91],
            [0.92, 0.9312],
            "Distillation raised test accuracy by 2.1 points (95 % interval 1.3 to 2.8, 2 seeds).",
            "raised",
        ),
        (
            [0.92, 0.9312],
            [0.90, 0.91],
            "Distillation lowered test accuracy by 2.1 points (95 % interval 1.3 to 2.8, 2 seeds).",
            "lowered",
        ),
        (
            [0.90, 0.91],
            [0.92, 0.90],
            "no difference that 2 seeds can show: +0.5 points (95 % interval -18.6 to +19.6)",
            "undecided",
        ),
        ([0.9000, 0.91], [0.9004, 0.91041], "raised test accuracy by 0.04 points (95 % interval 0.03 to 0.05", "raised"),
        ([0.9], [0.92], "+2.0 points against the 90.0 % without; one seed shows no spread", "unknown"),
        ([], [0.92], "without a student trained alone", "unknown"),
        ([], [], "No student was distilled", "unknown"),
    ],
)
def test_verdict_claims_what_the_seeds_show(alone: list[float], distilled: list[float], said: str, kind: str) -> None:
    results = compared(alone, distilled)
    assert said in verdict(results)
    assert outcome(results) == kind


def test_verdict_never_reads_as_zero_when_it_claims_a_difference() -> None:
    results: dict[str, Any] = {"arms": {"alone": [{"best/top1": 0.9}] * 3, "distilled": [{"best/top1": 0.901}] * 3}}
    results["paired"] = {"n": 3, "mean": 0.001, "low": 0.0002, "high": 0.0018, "confidence": 0.95, "differences": []}
    assert verdict(results).endswith("by 0.10 points (95 % interval 0.02 to 0.18, 3 seeds).")


# ---- the page --------------------------------------------------------------------------------------


def test_report_shows_every_number(folder: Path) -> None:
    results = make_run(folder)
    path = write_report(folder)
    assert path == folder / "report.html"
    text = read(path).text
    teacher, paired = results["teacher"], results["paired"]
    expected = [
        "97.35",
        "99.91",
        "0.0871",
        "44,549,160",
        "11,689,512",
        "812",
        "4,321",
        "3.8 ×",
        "5.3 ×",
        "360 test images",
        "10.0 %",
    ]
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
    results = make_run(folder)
    text = read(write_report(folder)).text
    assert "validation top-1, %" in text
    assert "are the same here" not in text
    text = rewrite(folder, results, val_is_test=True).text
    assert "the best epoch was chosen on the images that the test accuracy is measured on" in text
    assert "validation top-1, %" not in text


def test_report_loads_nothing(folder: Path) -> None:
    make_run(folder)
    page = write_report(folder).read_text()
    parsed = Text(page)
    assert all(address.startswith("#") or address == "data:," for address in parsed.addresses), parsed.addresses
    assert len([address for address in parsed.addresses if address.startswith("#")]) > 3  # the curves are in the page
    assert not parsed.tags & {"script", "iframe", "img", "object", "embed", "base"}
    assert "://" not in page
    assert "default-src 'none'" in page
    assert not re.search(r"@import|url\((?!#)", page)


def test_report_draws_all_stages_and_terms(folder: Path) -> None:
    make_run(folder)
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
    results = make_run(folder, seeds=1)
    text = read(write_report(folder)).text
    assert "one seed shows no spread" in text
    assert "fewer than two pairs of seeds" in text
    assert "±" not in text
    assert "Student's t" not in text
    assert f"{100 * results['arms']['alone'][0]['best/top1']:.2f}" in text


def test_report_without_baseline(folder: Path) -> None:
    make_run(folder, seeds=1, baseline=False)
    text = read(write_report(folder)).text
    assert "without a student trained alone" in text
    assert "student distilled" in text
    assert "student alone" not in text


def test_report_without_teacher_and_confusion(folder: Path) -> None:
    results = make_run(folder, seeds=2)
    text = rewrite(folder, results, teacher=None, confusion={"alone": None, "distilled": None}, paired=None).text
    assert "taught by" not in text
    assert "Where the distilled student is wrong" not in text
    assert "smaller" not in text


def test_report_of_a_teacher_alone(folder: Path) -> None:
    results = make_run(folder, seeds=1)
    bare: dict[str, Any] = {"student": None, "arms": {"alone": [], "distilled": []}, "confusion": None, "paired": None}
    text = rewrite(folder, results, **bare).text
    assert "No student was distilled" in text
    assert "97.35" in text


def test_report_of_numbers_that_are_none(folder: Path) -> None:
    results = make_run(folder, seeds=1)
    results["teacher"] |= {"images_per_s": None, "loss": math.nan, "parameters": None}
    text = rewrite(folder, results).text
    assert "nan" not in text
    assert "–" in text


def test_report_of_many_classes_lists_pairs(folder: Path) -> None:
    results = make_run(folder, seeds=2, classes=100)
    table = results["confusion"]["distilled"]
    table[7][93] = 41
    parsed = rewrite(folder, results)
    assert re.search("Most confused pairs true class taken for images of its class, % alone, images class 7 class 93 41 ", parsed.text)
    assert f"41 {100 * 41 / sum(table[7]):.1f} {results['confusion']['alone'][7][93]} " in parsed.text
    assert "All 100 classes" in parsed.text
    assert (folder / "report.html").stat().st_size < 400_000  # 10,000 cells would be megabytes


def test_class_that_no_test_image_has(folder: Path) -> None:
    results = make_run(folder, seeds=2)
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


def test_line_cut_in_the_middle_is_left_out(folder: Path) -> None:
    make_run(folder, seeds=1, finished=False)
    path = folder / "metrics.jsonl"
    whole = path.read_text()
    path.write_text(whole.rstrip()[:-25])
    text = read(write_report(folder)).text
    assert "1 line of metrics.jsonl could not be read" in text
    assert "seed 0, classify 14 of 15" in text
    path.write_text(whole)
    assert "could not be read" not in read(write_report(folder)).text


def test_epoch_repeated_after_a_resume_counts_once(folder: Path) -> None:
    make_run(folder, seeds=1, finished=False)
    path = folder / "metrics.jsonl"
    again = json.loads(path.read_text().splitlines()[-1]) | {"val/top1": 0.4321}
    with path.open("a") as file:
        file.write(json.dumps(again) + "\n")
    curve = report.read_run(folder).curves[-1]
    assert [line["epoch"] for line in curve.epochs] == list(range(1, 16))
    assert curve.series("val/top1")[1][-1] == 0.4321


def test_losses_below_zero_and_not_finite_are_drawn(folder: Path) -> None:
    folder.mkdir()
    losses = (1.0, -2.0, math.nan, math.inf, 1e9)
    lines = [{"stage": "seed0/distil", "epoch": i + 1, "epochs": 5, "train/kd": x, "val/loss": -x} for i, x in enumerate(losses)]
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert "Losses of distil" in read(write_report(folder)).text


def test_folder_of_no_run(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="is no run folder"):
        write_report(tmp_path)


def test_broken_results_say_which_file(folder: Path) -> None:
    make_run(folder, seeds=1)
    (folder / "results.json").write_text('{"recipe": ')
    with pytest.raises(ValueError, match=r"results\.json cannot be read"):
        write_report(folder)


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
    make_run(tmp_path / "a" / "run", seeds=1)
    results = make_run(tmp_path / "b" / "run", seeds=1)
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
