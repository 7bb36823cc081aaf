"""The command line as a person meets it: what works ends with status 0, what cannot work with one sentence and another status."""

import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

from kdfast import cli
from kdfast.commands.command_line import resolve
from kdfast.commands.config import DataOptions
from kdfast.commands.evaluate import Images, _as_trained
from kdfast.models import create, save_weights
from kdfast.recipes.supervised import supervised
from kdfast.runs.comparison import describe_settings

TINY = ["--student", "resnet8", "--teacher-model", "resnet8", "--teacher-training.epochs", "2", "--epochs", "2", "--max-images", "200"]
SMALL = ["--recipe", "kd", "--seeds", "1", *TINY]


def kdfast(*arguments: object) -> int:
    return cli.main([str(a) for a in arguments])


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run: kd on 200 digits, two seeds."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    assert kdfast("distill", *SMALL, "--seeds", "2", "--out", folder) == 0
    return folder


def sentence(capsys: pytest.CaptureFixture[str]) -> str:
    """What the command said on stderr: one line that begins with the program's name."""
    error = capsys.readouterr().err.strip()
    assert error.startswith("kdfast: "), error
    assert "\n" not in error, error
    assert "Traceback" not in error
    return error


def metrics(folder: Path) -> list[dict]:
    parsed = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("seconds", "images_per_s")} for line in parsed]


# ---- a run folder ----------------------------------------------------------------------------------------------------


def test_a_run_folder_holds_what_was_promised(finished: Path):
    names = {p.name for p in finished.iterdir()}
    assert names >= {"config.toml", "metrics.jsonl", "curves.png", "report.html", "results.json", "best.safetensors", "teacher.safetensors"}
    assert "checkpoint.pt" not in names, "a finished run needs none"
    results = json.loads((finished / "results.json").read_text())
    assert len(results["arms"]["alone"]) == len(results["arms"]["distilled"]) == results["paired"]["n"] == 2
    for arm in results["arms"]["distilled"]:
        assert {"best/top1", "best/top5", "best/loss", "last/top1", "val/top1", "epoch", "train_images_per_s"} <= arm.keys()
    assert sum(map(sum, results["confusion"]["distilled"])) == 2 * results["test_images"]
    page = (finished / "report.html").read_text()
    assert f"{100 * results['teacher']['top1']:.2f}" in page


def test_the_student_alone_and_distilled_start_alike_and_differ_after(finished: Path):
    results = json.loads((finished / "results.json").read_text())
    assert results["arms"]["alone"][0]["best/loss"] != results["arms"]["distilled"][0]["best/loss"]


def test_config_toml_repeats_the_run_to_the_bit(finished: Path, tmp_path: Path):
    assert kdfast("distill", "--config", finished / "config.toml", "--out", tmp_path / "again") == 0
    assert metrics(tmp_path / "again") == metrics(finished)
    assert (tmp_path / "again" / "best.safetensors").read_bytes() == (finished / "best.safetensors").read_bytes()
    assert (tmp_path / "again" / "config.toml").read_text() == (finished / "config.toml").read_text()


def test_resuming_a_finished_run_changes_nothing(finished: Path, tmp_path: Path):
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    assert kdfast("distill", "--config", finished / "config.toml", "--out", copy, "--resume") == 0
    assert metrics(copy) == metrics(finished)
    assert (copy / "best.safetensors").read_bytes() == (finished / "best.safetensors").read_bytes()
    took, took_in_all = (json.loads((run / "results.json").read_text())["seconds_total"] for run in (finished, copy))
    assert took < took_in_all < 2 * took, "the seconds of both sessions"


def test_a_run_is_logged_and_continued_in_its_logs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Logs write into the run folder, which has to be empty when the run begins."""
    made: list[dict] = []
    lines: list[dict] = []

    def init(**keywords):
        (Path(keywords["dir"]) / "wandb" / "run").mkdir(parents=True, exist_ok=True)  # as it does
        made.append(keywords)
        return SimpleNamespace(log=lines.append, finish=lambda exit_code: made[-1].update(ended=exit_code))

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    names = ["wandb"]
    if importlib.util.find_spec("tensorboard"):
        names.append("tensorboard")
    arguments = ["distill", *SMALL, "--no-baseline", "--out", tmp_path / "run", "--log", *names]
    assert kdfast(*arguments) == 0
    written = metrics(tmp_path / "run")
    assert [line[f"{of['stage']}/val/top1"] for line, of in zip(lines, written, strict=True)] == [of["val/top1"] for of in written]
    assert kdfast(*arguments, "--resume") == 0
    assert made[0]["id"] == made[1]["id"]
    assert [of["ended"] for of in made] == [0, 0]
    if "tensorboard" in names:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
        events.Reload()
        shown = [event.value for event in events.Scalars(f"{written[0]['stage']}/val/top1")]
        assert shown == pytest.approx([of["val/top1"] for of in written if of["stage"] == written[0]["stage"]])


def test_eval_repeats_the_runs_numbers(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert kdfast("eval", finished, "--json", tmp_path / "numbers.json") == 0
    numbers = json.loads((tmp_path / "numbers.json").read_text())
    arms = json.loads((finished / "results.json").read_text())["arms"]["distilled"]
    chosen = max(arms, key=lambda arm: arm["val/top1"])
    assert numbers["top1"] == chosen["best/top1"]
    assert numbers["images"] == 359
    assert "rows: true class" in capsys.readouterr().out


def test_eval_takes_what_is_given_also_where_it_is_the_default(tmp_path: Path):
    path = tmp_path / "config.toml"
    path.write_text('[data]\ndataset = "digits"\nval_fraction = 0.3\nloader = "torchvision"\nmax_images = 200\n[run]\nseed = 3\n')
    trained, seed = _as_trained(path, Images(), None)
    assert (trained.dataset, trained.val_fraction, trained.loader, trained.max_images, seed) == ("digits", 0.3, "torchvision", 200, 3)
    given, seed = _as_trained(path, Images(val_fraction=0.1, loader="auto"), 0)
    assert (given.dataset, given.val_fraction, given.loader, given.max_images, seed) == ("digits", 0.1, "auto", 200, 0)
    assert _as_trained(tmp_path / "none.toml", Images(dataset="digits"), None) == (DataOptions(dataset="digits"), 0)


def test_evals_options_come_over_the_runs(finished: Path, tmp_path: Path):
    sizes = []
    for options in ([], ["--max-images", 100, "--seed", 0, "--loader", "auto"]):
        assert kdfast("eval", finished, "--split", "train", *options, "--json", tmp_path / "n.json") == 0
        sizes.append(json.loads((tmp_path / "n.json").read_text())["images"])
    assert sizes == [200, 100]


@pytest.mark.parametrize("split", ["val", "train"])
def test_eval_of_other_splits(finished: Path, split: str):
    assert kdfast("eval", finished, "--split", split) == 0


def test_a_trained_teacher_serves_the_next_run(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    arguments = ["--recipe", "lskd", "--teacher", finished / "teacher.safetensors", "--seeds", 1, "--no-baseline", *TINY]
    assert kdfast("distill", *arguments, "--out", tmp_path / "run") == 0
    shown = capsys.readouterr().out
    expected = json.loads((finished / "results.json").read_text())["teacher"]["top1"]
    assert f"test top-1 {100 * expected:.2f} %" in shown
    assert "effective weights" in shown
    assert not any(line["stage"] == "teacher" for line in metrics(tmp_path / "run"))


def test_predict_names_classes_that_eval_counts(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    from torchvision.io import write_png

    from kdfast.data import load

    test = load("digits").test
    for i in range(4):
        write_png(test.read(i), str(tmp_path / f"{i}.png"))
    assert kdfast("predict", finished, tmp_path, "--top", "2") == 0
    shown = capsys.readouterr().out
    assert all(f"{i}.png" in shown for i in range(4))
    assert len(re.findall(r"\d %", shown)) == 8
    # what cannot be read is named, and the others are predicted all the same
    (tmp_path / "1.png").write_bytes(b"")
    capsys.readouterr()
    assert kdfast("predict", finished, tmp_path, tmp_path / "gone.png", "--batch-size", 1) == 1
    caught = capsys.readouterr()
    assert [name in caught.out for name in ("0.png", "1.png", "2.png", "3.png")] == [True, False, True, True]
    assert re.match(r"kdfast: 2 of 5 images cannot be read: \S+/1.png: [^;]+; \S+/gone.png: [^;]+\n$", caught.err)
    (tmp_path / "empty").mkdir()
    assert kdfast("predict", finished, tmp_path / "empty") == 1
    assert "no images in" in sentence(capsys)
    assert kdfast("predict", finished) == 1
    assert "images: name image files or folders after the run, got none" in sentence(capsys)


@pytest.mark.parametrize("kind", ["onnx", "pt2", "safetensors"])
def test_export_agrees_with_pytorch(finished: Path, tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / f"student.{kind}"
    assert kdfast("export", finished, "--format", kind, "--out", out) == 0
    assert float(re.search(r"agrees with PyTorch to (\S+)", capsys.readouterr().out)[1]) < 1e-5
    assert out.stat().st_size > 100_000


def test_report_is_made_again_and_compares_runs(finished: Path, tmp_path: Path):
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    (copy / "report.html").unlink()
    assert kdfast("report", copy) == 0
    assert (copy / "report.html").exists()
    assert kdfast("report", copy, finished, "--out", tmp_path / "both.html") == 0
    assert (tmp_path / "both.html").exists()


@pytest.mark.parametrize("what", ["recipes", "presets", "datasets", "models"])
def test_list(what: str, capsys: pytest.CaptureFixture[str]):
    assert kdfast("list", what) == 0
    expected = {"recipes": "self_distillation", "presets": "notebook", "datasets": "imagenette", "models": "78,042"}
    assert expected[what] in capsys.readouterr().out


def test_help_of_every_command(capsys: pytest.CaptureFixture[str]):
    assert kdfast("--help") == 0
    shown = capsys.readouterr().out
    assert all(command in shown for command in cli.COMMANDS)


@pytest.mark.parametrize("command", ["teacher", "distill", "eval", "predict", "export", "report"])
def test_help_names_the_options(command: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stop:
        kdfast(command, "--help")
    assert stop.value.code == 0
    assert "--" in capsys.readouterr().out


# ---- the recipes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recipe", "more"),
    [
        ("conkd", []),
        ("conkd", ["--procedure", "readme"]),
        ("conkd", ["--micro-batch", "16"]),
        ("conkd", ["--label-fraction", "1.0", "--label-smoothing", "0.1"]),
        ("self_distillation", ["--label-smoothing", "0.1"]),
        ("kd", ["--label-fraction", "1.0", "--ema", "0.9", "--optimizer", "adamw", "--schedule", "plateau"]),
        ("kd", ["--precision", "bf16"]),
        ("kd", ["--preset", "large-batch", "--warmup", "0", "--teacher-training.warmup", "0"]),
        ("at", ["--plus", "lskd:weight=3", "supcon"]),
        ("self_distillation", ["--plus", "supcon:weight=0.3,temperature=0.1"]),
        *((recipe, []) for recipe in ("at", "fitnets", "mhkd", "tofd", "dih")),
        ("fitnets", ["--procedure", "joint"]),
        ("takd", ["--assistants", "resnet14", "resnet8"]),
        ("crd", ["--kd-weight", "0.9", "--plus", "supcon"]),
        ("crd", ["--label-fraction", "0.5", "--micro-batch", "16", "--precision", "bf16", "--ema", "0.9"]),
    ],
)
def test_recipes_run_to_a_report(recipe: str, more: list[str], tmp_path: Path):
    assert kdfast("distill", "--recipe", recipe, "--seeds", 1, "--no-baseline", *TINY, *more, "--out", tmp_path / "run") == 0
    assert (tmp_path / "run" / "report.html").exists()


def test_conkds_notebook_procedure_runs_its_stages_and_its_weights_come_back(tmp_path: Path):
    stages = ["--classify-epochs", "2", "--teacher-classify-epochs", "2"]
    settings = ["--procedure", "notebook", "--cosine-from-one", *stages, "--seeds", 1, "--no-baseline", *TINY]
    run = tmp_path / "run"
    assert kdfast("distill", *settings, "--out", run) == 0
    expected = ["teacher/contrast", "teacher/classify", "seed0/distil", "seed0/classify"]
    assert list(dict.fromkeys(line["stage"] for line in metrics(run))) == expected
    assert kdfast("eval", run, "--json", tmp_path / "numbers.json") == 0
    arm = json.loads((run / "results.json").read_text())["arms"]["distilled"][0]
    assert json.loads((tmp_path / "numbers.json").read_text())["top1"] == arm["best/top1"]
    # the embedding teacher is not trained a second time
    assert kdfast("distill", *settings, "--teacher", run / "teacher.safetensors", "--out", tmp_path / "next") == 0
    assert {line["stage"] for line in metrics(tmp_path / "next")} == {"seed0/distil", "seed0/classify"}


def test_dihs_heads_are_used_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    options = ["--recipe", "dih", "--seeds", 1, "--no-baseline", *TINY]
    assert kdfast("distill", *options, "--out", tmp_path / "first") == 0
    assert re.search(r"heads, validation top-1: layer1 \S+ %, layer2 \S+ %, layer3 \S+ %", capsys.readouterr().out)
    again = [*options, "--teacher", tmp_path / "first" / "teacher.safetensors", "--heads", tmp_path / "first"]
    assert kdfast("distill", *again, "--out", tmp_path / "again") == 0
    assert {line["stage"] for line in metrics(tmp_path / "again")} == {"seed0/distil"}
    first, second = (json.loads((tmp_path / name / "results.json").read_text())["arms"]["distilled"][0] for name in ("first", "again"))
    assert first["best/loss"] == second["best/loss"]
    other = tmp_path / "other"
    assert kdfast("teacher", "--model", "resnet8", "--epochs", 1, "--max-images", 200, "--out", other) == 0
    capsys.readouterr()
    wrong = [*options, "--teacher", other, "--heads", tmp_path / "first", "--out", tmp_path / "wrong"]
    assert kdfast("distill", *wrong) == 1
    assert "another teacher's" in sentence(capsys)


@pytest.mark.parametrize("recipe", ["at", "crd", "fitnets", "takd", "mhkd", "tofd", "dih"])
def test_every_recipe_resumes_to_the_same_numbers(recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Crashes at a write in the middle of the student's last stage, as kill -9 would leave it."""
    options = ["--recipe", recipe, "--seeds", 1, "--no-baseline", *TINY]
    options += ["--assistants", "resnet8"] if recipe == "takd" else []
    assert kdfast("distill", *options, "--out", tmp_path / "whole") == 0
    real, left = os.replace, [len(metrics(tmp_path / "whole")) * 2]

    def replaced(*arguments: object) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        real(*arguments)

    monkeypatch.setattr(os, "replace", replaced)
    assert kdfast("distill", *options, "--out", tmp_path / "cut") == 130
    monkeypatch.setattr(os, "replace", real)
    assert not (tmp_path / "cut" / "results.json").exists(), "the crash came too late to show anything"
    assert kdfast("distill", *options, "--out", tmp_path / "cut", "--resume") == 0
    assert metrics(tmp_path / "cut") == metrics(tmp_path / "whole")
    assert (tmp_path / "cut" / "best.safetensors").read_bytes() == (tmp_path / "whole" / "best.safetensors").read_bytes()
    assert kdfast("export", tmp_path / "cut", "--format", "safetensors", "--out", tmp_path / "student.safetensors") == 0


def test_a_teacher_at_chance_is_an_error_where_strict(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    options = ["--recipe", "kd", "--seeds", 1, "--no-baseline", *TINY, "--teacher-training.lr", "1e-9", "--out", tmp_path / "run"]
    assert kdfast("distill", *options, "--strict") == 1
    assert "the teacher is no better than chance" in sentence(capsys)


def test_a_comparison_says_which_settings_a_recipe_has_of_its_own():
    from kdfast import recipes
    from kdfast.commands import compare, config
    from kdfast.runs import comparison

    configs = {name: config.defaults(recipes.get(name), "default", "cifar10") for name in ("kd", "conkd", "at")}
    common, own = compare._settings(configs)
    assert common["batch_size"] == 64
    assert "optimizer" not in common
    assert (own["kd"]["optimizer"], own["conkd"]["optimizer"], own["at"]["lr"]) == ("sgd", "lion", 0.05)
    rows = [{"recipe": name, "own": own[name], "best": [0.5], "last": [0.5]} for name in configs]
    facts = {"settings": common, "rows": rows, "machine": {"cpu": "c", "threads": 1, "torch": "2", "python": "3"}, "date": "d"}
    text = comparison.markdown(facts)
    assert "cifar10: resnet20, 240 epochs a stage, batch_size 64. kd, at: sgd, lr 0.05, " in text
    assert " conkd: lion, lr 0.001, " in text


def test_a_comparison_is_by_the_epoch_that_each_run_keeps():
    from kdfast.runs import comparison

    def arms(best: float, last: float):
        return [{"seed": 0, "best/top1": best, "last/top1": last, "train_images_per_s": 1.0, "seconds": 1.0}]

    results = {
        name: {
            "teacher": None,
            "student": {"model": "resnet8"},
            "kept": kept,
            "arms": {"alone": arms(0.8, 0.7), "distilled": arms(0.78, 0.76)},
        }
        for name, kept in (("kd", "last"), ("at", "last"))
    }
    rows = comparison.make_rows(results)
    assert rows[1]["paired"]["mean"] == pytest.approx(0.06)
    facts = {"settings": {"dataset": "d", "student": "s"}, "rows": rows, "machine": {"cpu": "c", "threads": 1, "torch": "2", "python": "3"}}
    assert "against alone: seed by seed, of the last epochs" in comparison.markdown(facts | {"date": "d"})


@pytest.mark.parametrize(
    "more", [["--recipe", "kd"], ["--recipe", "conkd", "--procedure", "notebook", "--classify-epochs", 1]], ids=lambda m: m[1]
)
def test_no_forward_pass_has_more_images_than_a_micro_batch(more: list, tmp_path: Path):
    """In training, in validation, where a teacher is asked beforehand, and in tests."""
    sizes = []
    hook = register_module_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])) if isinstance(module, nn.Conv2d) else None)
    both = ["--micro-batch", 12, "--teacher-training.micro-batch", 12, "--augment", "none", "--label-fraction", 1.0, "--seeds", 1]
    try:
        assert kdfast("distill", *more, *TINY, *both, "--out", tmp_path / "run") == 0
    finally:
        hook.remove()
    assert max(sizes) == 12


def test_few_labels_are_said_as_they_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    one_epoch = ["--epochs", 1, "--teacher-training.epochs", 1, "--no-baseline", "--label-fraction", 0.155]
    assert kdfast("distill", *SMALL, *one_epoch, "--out", tmp_path / "run") == 0
    assert "15.5% of them with their label for the student" in capsys.readouterr().out
    assert describe_settings({"label_fraction": 0.002, "epochs": 3}) == "0.2% of the labels, 3 epochs a stage"
    assert describe_settings({"label_fraction": 0.05, "optimizer": "lion", "lr": 0.1}) == "5% of the labels, lion, lr 0.1"


def test_teacher_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert kdfast("teacher", "--model", "resnet8", "--epochs", 2, "--max-images", 200, "--out", tmp_path / "t") == 0
    assert kdfast("eval", tmp_path / "t") == 0
    top1 = re.findall(r"(?:test|^)\s?top-1 (\S+) %", capsys.readouterr().out, re.MULTILINE)
    assert len(top1) == 2
    assert top1[0] == top1[1]


@pytest.mark.parametrize("fraction", [0.2, 1.0])
def test_teacher_command_divides_micro_batches_by_the_labels_of_the_whole_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fraction):
    coupled = []

    def seen(*arguments, **keywords):
        stages = supervised(*arguments, **keywords)
        stage = next(stages)
        coupled.append(stage.couples_rows)
        yield stage
        return stage.train[0]

    monkeypatch.setattr("kdfast.commands.teacher.supervised", seen)
    options = ["--model", "resnet8", "--epochs", 1, "--max-images", 200, "--label-fraction", fraction, "--micro-batch", 16]
    assert kdfast("teacher", *options, "--out", tmp_path / "t") == 0
    assert coupled == [fraction < 1]


def test_compare_runs_a_grid_once_with_one_teacher(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    grid = ["compare", "--recipes", "kd,self_distillation,dih", "--seeds", 2, *TINY, "--out", tmp_path / "grid"]
    assert kdfast(*grid) == 0
    found = json.loads((tmp_path / "grid" / "comparison.json").read_text())
    assert [row["recipe"] for row in found["rows"]] == ["teacher resnet8", "resnet8 alone", "kd", "self_distillation", "dih"]
    alone = json.loads((tmp_path / "grid" / "kd" / "results.json").read_text())["arms"]["alone"]
    for row in found["rows"][2:]:
        arms = json.loads((tmp_path / "grid" / row["recipe"] / "results.json").read_text())["arms"]
        assert row["best"] == [arm["best/top1"] for arm in arms["distilled"]]
        assert row["seeds"] == [0, 1]
        gaps = [ours - theirs["best/top1"] for ours, theirs in zip(row["best"], alone)]
        assert row["paired"]["mean"] == pytest.approx(sum(gaps) / 2)
        assert f"| {row['recipe']} | " in (tmp_path / "grid" / "comparison.md").read_text()
        assert bool(arms["alone"]) == (row["recipe"] == "kd"), "the student alone is trained once"
    trained = [line["stage"] for run in ("kd", "self_distillation", "dih") for line in metrics(tmp_path / "grid" / run)]
    assert "teacher" not in trained
    assert (tmp_path / "grid" / "comparison.html").exists()
    # what is left is done, what is done stays
    shutil.rmtree(tmp_path / "grid" / "dih")
    before = {path: path.read_bytes() for path in (tmp_path / "grid").rglob("best.safetensors")}
    assert kdfast(*grid) == 0
    assert all(path.read_bytes() == content for path, content in before.items())
    assert json.loads((tmp_path / "grid" / "comparison.json").read_text())["rows"][-1]["best"] == found["rows"][-1]["best"]
    assert found["settings"]["epochs"] == 2
    assert found["settings"]["label_fraction"] == 0.05
    assert not any("own" in row for row in found["rows"])
    capsys.readouterr()
    assert kdfast(*grid, "--student", "resnet14") == 1
    assert re.search(
        "kd belongs to another configuration: student is resnet8 there and resnet14 here; give --out another", sentence(capsys)
    )
    assert kdfast("compare", "--recipes", "kd,dhi") == 1
    assert "did you mean" in sentence(capsys)
    assert kdfast("compare", "--recipes", "kd", "--resume") == 1
    assert "compare does not take --resume" in sentence(capsys)


OWN = """from dataclasses import dataclass, replace

from kdfast.recipes import kd


@dataclass(frozen=True)
class Settings(kd.Settings):
    extra: float = 0.0
    \"\"\"More of it.\"\"\"


RECIPE = replace(kd.RECIPE, name="mine", settings=Settings)
KD = kd.RECIPE
"""


@pytest.fixture
def own_recipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """own_recipes.py in the current folder, which a console script does not have on its path."""
    (tmp_path / "own_recipes.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    yield
    sys.modules.pop("own_recipes", None)


@pytest.mark.usefixtures("own_recipes")
def test_a_recipe_of_ones_own_is_distilled_resumed_and_evaluated(tmp_path: Path):
    options = ["distill", "--recipe", "own_recipes:RECIPE", "--extra", 0.5, "--seeds", 1, "--no-baseline", *TINY]
    assert kdfast(*options) == 0
    run = tmp_path / "runs" / "mine-digits-resnet8"
    assert json.loads((run / "results.json").read_text())["recipe"] == "mine"
    config = (run / "config.toml").read_text()
    assert 'recipe = "own_recipes:RECIPE"' in config
    assert "extra = 0.5" in config
    before = (run / "best.safetensors").read_bytes()
    assert kdfast(*options, "--resume") == 0
    assert (run / "best.safetensors").read_bytes() == before
    assert kdfast("distill", "--config", run / "config.toml", "--out", tmp_path / "again") == 0
    assert (tmp_path / "again" / "best.safetensors").read_bytes() == before
    assert kdfast("eval", run) == 0


@pytest.mark.usefixtures("own_recipes")
def test_compare_takes_a_recipe_of_ones_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert kdfast("compare", "--recipes", "kd,own_recipes:RECIPE", "--seeds", 1, *TINY, "--out", tmp_path / "grid") == 0
    rows = json.loads((tmp_path / "grid" / "comparison.json").read_text())["rows"]
    assert [row["recipe"] for row in rows] == ["teacher resnet8", "resnet8 alone", "kd", "mine"]
    assert rows[2]["best"] == rows[3]["best"], "it is kd under another name"
    assert (tmp_path / "grid" / "mine" / "results.json").exists()
    capsys.readouterr()
    assert kdfast("compare", "--recipes", "kd,own_recipes:KD", *TINY, "--out", tmp_path / "other") == 1
    assert "recipes kd and own_recipes:KD are both called kd" in sentence(capsys)


@pytest.mark.usefixtures("own_recipes")
@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("own_recipes:OTHER", "must name an importable package.module:RECIPE: .*OTHER"),
        ("no_such_module:RECIPE", "must name an importable package.module:RECIPE: .*no_such_module"),
        (":RECIPE", "must name an importable package.module:RECIPE"),
        ("own_recipes:Settings", "must name a kdfast.recipes.Recipe, got a type"),
    ],
)
def test_mistakes_in_naming_a_recipe_are_one_sentence(recipe: str, message: str, capsys: pytest.CaptureFixture[str]):
    assert kdfast("distill", "--recipe", recipe) == 1
    assert re.search(message, sentence(capsys))


# ---- killed and continued --------------------------------------------------------------------------------------------


def one_thread() -> dict[str, str]:
    """As in this process: the same sums in the same order."""
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def start(out: Path, *more: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "kdfast.cli", "distill", *SMALL, "--out", str(out), *more]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=one_thread())


def wait_for_lines(out: Path, count: int, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    path = out / "metrics.jsonl"
    while not (path.exists() and path.read_text().count("\n") >= count):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("after", [1, 3, 5])
def test_kill_9_then_resume_gives_the_uninterrupted_runs_numbers(tmp_path: Path, after: int):
    assert kdfast("distill", *SMALL, "--out", tmp_path / "whole") == 0
    process = start(tmp_path / "killed")
    wait_for_lines(tmp_path / "killed", after, process)
    time.sleep(0.003 * after)
    process.kill()
    process.communicate()
    assert not (tmp_path / "killed" / "results.json").exists(), "the kill came too late to show anything"
    process = start(tmp_path / "killed", "--resume")
    assert process.wait(timeout=200) == 0, process.communicate()[1]
    assert metrics(tmp_path / "killed") == metrics(tmp_path / "whole")
    assert (tmp_path / "killed" / "best.safetensors").read_bytes() == (tmp_path / "whole" / "best.safetensors").read_bytes()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_leaves_with_a_clear_line(tmp_path: Path, number: signal.Signals):
    process = start(tmp_path / "run", "--epochs", "500")
    wait_for_lines(tmp_path / "run", 3, process)
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert "the run is saved, continue with the same command and --resume" in error
    assert "Traceback" not in error
    assert torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["stage"].startswith(("teacher", "seed0"))
    trained = sum(json.loads(line)["seconds"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    assert float((tmp_path / "run" / "seconds.txt").read_text()) > trained, "what a resumed run counts on from"


def cut_short(monkeypatch: pytest.MonkeyPatch, write: int, *arguments: object) -> None:
    """Runs a command that is killed at its `write`-th write of a file."""
    real, left = os.replace, [write]

    def replaced(*paths: object) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        real(*paths)

    monkeypatch.setattr(os, "replace", replaced)
    assert kdfast(*arguments) == 130
    monkeypatch.setattr(os, "replace", real)


def test_resume_with_out_takes_the_options_of_the_run(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    """As README and docs/large-batch.md say it: options need not be repeated, and one that is must be the same."""
    run = tmp_path / "run"
    cut_short(monkeypatch, 12, "distill", *SMALL, "--seeds", 2, "--out", run)
    capsys.readouterr()
    for wrong, message in (
        (["--lr", 0.5], "belongs to another configuration: lr is 0.001 there and 0.5 here"),
        (["--recipe", "lskd"], "belongs to another configuration: recipe is kd there and lskd here"),
        (["--preset", "dih-code"], "belongs to another configuration: preset is default there and dih-code here"),
    ):
        assert kdfast("distill", "--resume", *wrong, "--out", run) == 1
        assert message in sentence(capsys)
    assert kdfast("distill", "--resume", "--student", "resnet8", "--out", run) == 0
    assert metrics(run) == metrics(finished)
    assert (run / "best.safetensors").read_bytes() == (finished / "best.safetensors").read_bytes()


def test_a_teachers_run_is_resumed_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    options = ["teacher", "--model", "resnet8", "--epochs", 3, "--max-images", 200]
    assert kdfast(*options, "--out", tmp_path / "whole") == 0
    cut_short(monkeypatch, 5, *options, "--out", tmp_path / "cut")
    assert kdfast("teacher", "--out", tmp_path / "cut", "--resume") == 0
    assert metrics(tmp_path / "cut") == metrics(tmp_path / "whole")


@pytest.mark.parametrize("command", ["distill", "teacher"])
def test_resuming_nothing_is_an_error(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    for more, message in (
        (["--out", "empty"], "--resume: empty holds no run, so there is nothing to continue"),
        (["--out", "nowhere"], "--resume: nowhere is no folder, so there is nothing to continue"),
        ([], "--resume: there are no runs under runs/"),
    ):
        assert kdfast(command, "--resume", *more) == 1
        assert message in sentence(capsys)
    assert [p.name for p in tmp_path.rglob("*")] == ["empty"], "nothing was begun"


def test_resuming_a_run_that_is_not_there_names_those_that_are(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(finished, tmp_path / "runs" / "first")
    assert kdfast("distill", *SMALL, "--seeds", 2, "--lr", 0.5, "--resume") == 1
    said = sentence(capsys)
    assert "no run under runs/ has these options, the newest are runs/first (lr is 0.001 there and 0.5 here): name one with --out" in said
    assert kdfast("teacher", "--resume") == 1
    assert "runs/first (recipe is kd there and none (kdfast teacher) here)" in sentence(capsys)
    assert kdfast("distill", *SMALL, "--seeds", 2, "--resume") == 0, "the very same options find it, whatever it is called"
    assert {p.name for p in (tmp_path / "runs").iterdir()} == {"first"}


@pytest.mark.parametrize("content", [b"", b"no checkpoint", "cut"])
def test_a_damaged_checkpoint_is_named_and_can_be_deleted(finished: Path, tmp_path: Path, content, monkeypatch: pytest.MonkeyPatch, capsys):
    run = tmp_path / "run"
    cut_short(monkeypatch, 14, "distill", *SMALL, "--seeds", 2, "--out", run)
    checkpoint = run / "checkpoint.pt"
    checkpoint.write_bytes(checkpoint.read_bytes()[:5000] if content == "cut" else content)
    capsys.readouterr()
    assert kdfast("distill", "--out", run, "--resume") == 1
    assert re.search("checkpoint.pt is damaged: delete it to continue from the last finished stage$", sentence(capsys))
    checkpoint.unlink()
    assert kdfast("distill", "--out", run, "--resume") == 0
    assert metrics(run) == metrics(finished)


@pytest.mark.parametrize("name", ["best.safetensors", "last.safetensors", "stage.json"])
def test_a_damaged_stage_is_named_and_can_be_deleted(finished: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    stage = run / "stages" / "seed1" / "distil"
    (stage / name).write_bytes((stage / name).read_bytes()[:20])
    assert kdfast("distill", "--out", run, "--resume") == 1
    assert f"delete {stage} and the folders of the stages after it to train these again" in sentence(capsys)
    shutil.rmtree(stage)
    assert kdfast("distill", "--out", run, "--resume") == 0
    assert metrics(run) == metrics(finished)


# ---- one sentence each -----------------------------------------------------------------------------------------------


def write_images(folder: Path, count: int = 4) -> Path:
    from torchvision.io import write_jpeg

    for part in ("train", "val"):
        for kind in ("cat", "dog"):
            (folder / part / kind).mkdir(parents=True)
            for i in range(count):
                write_jpeg(torch.randint(0, 256, (3, 40, 40), dtype=torch.uint8), str(folder / part / kind / f"{i}.jpg"))
    return folder


FOLDER = ["--recipe", "kd", "--seeds", 1, "--student", "resnet8", "--teacher-model", "resnet8", "--epochs", 1, "--image-size", 32]
FOLDER += ["--teacher-training.epochs", 1, "--val-fraction", 0.3, "--batch-size", 4, "--teacher-training.batch-size", 4, "--workers", 0]


@pytest.mark.parametrize(
    ("arguments", "toml", "training", "teacher_training"),  # epochs, warmup
    [
        (["--epochs", "1"], "", (1, 0), (60, 2)),
        (["--epochs=2", "--teacher-training.epochs", "1"], "", (2, 1), (1, 0)),
        (["--epochs", "3"], "", (3, 2), (60, 2)),
        (["--epochs", "1", "--warmup", "0"], "", (1, 0), (60, 2)),
        (["--preset", "large-batch", "--epochs", "4"], "", (4, 3), (60, 5)),
        ([], "[training]\nepochs = 1\n[teacher_training]\nepochs = 2\n", (1, 0), (2, 1)),
        (["--epochs", "2"], "[training]\nepochs = 1\n", (2, 1), (60, 2)),
        (["--epochs", "5"], "[training]\nwarmup = 1\n", (5, 1), (60, 2)),
    ],
)
def test_a_warmup_that_nobody_asked_for_is_cut_to_the_epochs(arguments, toml: str, training, teacher_training, tmp_path: Path):
    (tmp_path / "c.toml").write_text(toml)
    made = resolve("distill", ["--dataset", str(tmp_path), "--config", str(tmp_path / "c.toml"), *arguments])
    assert (made.training.epochs, made.training.warmup) == training
    assert (made.teacher_training.epochs, made.teacher_training.warmup) == teacher_training


@pytest.mark.parametrize("command", ["distill", "teacher"])
def test_a_warmup_that_was_asked_for_and_is_too_long_is_an_error(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "c.toml").write_text("[training]\nwarmup = 2\n")
    message = "warmup must be from 0 to below epochs (1), got 2"
    assert kdfast(command, "--dataset", tmp_path, "--epochs", 1, "--config", tmp_path / "c.toml") == 1
    assert message in sentence(capsys)
    with pytest.raises(SystemExit):
        kdfast(command, "--dataset", tmp_path, "--epochs", 1, "--warmup", 2)
    assert message in capsys.readouterr().err


def test_an_image_folder_trains_one_epoch(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    images = write_images(tmp_path / "images", 6)
    assert kdfast("distill", "--dataset", images, *FOLDER, "--out", tmp_path / "run") == 0
    shown = capsys.readouterr().out
    assert "resnet8, 1 epoch, batch 4" in shown
    assert "seed0/distil: 1 epoch in" in shown
    teacher = ["--model", "resnet8", "--epochs", 1, "--image-size", 32, "--val-fraction", 0.3, "--batch-size", 4, "--workers", 0]
    assert kdfast("teacher", "--dataset", images, *teacher, "--out", tmp_path / "teacher") == 0


def test_a_truncated_image_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    images = write_images(tmp_path / "images", 6)
    bad = images / "train" / "dog" / "3.jpg"
    bad.write_bytes(bad.read_bytes()[:200])
    assert kdfast("distill", "--dataset", images, *FOLDER, "--out", tmp_path / "run") == 1
    assert "3.jpg" in sentence(capsys)


def test_a_folder_without_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "images").mkdir()
    assert kdfast("distill", "--dataset", tmp_path / "images", *FOLDER, "--out", tmp_path / "run") == 1
    assert str(tmp_path / "images") in sentence(capsys)


def test_a_class_missing_in_val(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    images = write_images(tmp_path / "images")
    shutil.rmtree(images / "val" / "dog")
    assert kdfast("distill", "--dataset", images, *FOLDER, "--out", tmp_path / "run") == 1
    assert "dog" in sentence(capsys)


def test_a_run_folder_of_another_configuration(finished: Path, capsys: pytest.CaptureFixture[str]):
    assert kdfast("distill", *SMALL, "--seeds", 2, "--lr", 0.5, "--out", finished, "--resume") == 1
    assert re.search("belongs to another configuration: lr is 0.001 there and 0.5 here; give --out another folder$", sentence(capsys))


def test_a_run_folder_needs_resume(finished: Path, capsys: pytest.CaptureFixture[str]):
    assert kdfast("distill", *SMALL, "--seeds", 2, "--out", finished) == 1
    assert "already holds this run: pass --resume" in sentence(capsys)


def test_a_folder_that_is_no_run_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "diary.txt").write_text("dear diary")
    assert kdfast("distill", *SMALL, "--out", tmp_path) == 1
    assert "neither empty nor a run: it holds diary.txt" in sentence(capsys)
    assert {p.name for p in tmp_path.iterdir()} <= {"diary.txt", ".lock"}


def test_weights_of_another_architecture(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    save_weights(create("resnet14", 10), tmp_path / "w.safetensors", {})
    assert kdfast("eval", tmp_path / "w.safetensors", "--model", "resnet8", "--dataset", "digits") == 1
    assert re.search(r"w.safetensors does not fit ResNet: \d+ unexpected: layer1.1.bn1.bias", sentence(capsys))


@pytest.mark.parametrize(
    ("command", "way_out"), [("eval", "name it with --model"), ("export", "name it with --model"), ("predict", "needs weights that kdfast")]
)
def test_weights_that_do_not_say_their_architecture(command: str, way_out: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    save_weights(create("resnet8", 10), tmp_path / "w.safetensors", {})
    more = {"eval": ["--dataset", "digits"], "export": [], "predict": [tmp_path]}
    assert kdfast(command, tmp_path / "w.safetensors", *more[command]) == 1
    assert re.search(f"w.safetensors does not say which architecture it is of: .*{way_out}", sentence(capsys))


def test_a_teacher_of_other_classes(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    save_weights(create("resnet8", 7), tmp_path / "w.safetensors", {})
    assert kdfast("distill", *SMALL, "--teacher", tmp_path / "w.safetensors", "--out", tmp_path / "run") == 1
    assert "has 7 classes, but digits has 10" in sentence(capsys)


def test_a_full_disk_leaves_nothing_half_written(tmp_path: Path):
    """The file-size limit of the process stands in for a disk that fills up: weights do not fit any more."""
    limited = "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
    limited += "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)); "
    limited += f"import sys; from kdfast.cli import main; sys.exit(main({['distill', *SMALL, '--out', str(tmp_path / 'run')]!r}))"
    done = subprocess.run([sys.executable, "-c", limited], capture_output=True, text=True, timeout=200, env=one_thread())
    assert done.returncode == 1
    assert "the disk is full or the file too large" in done.stderr
    assert "Traceback" not in done.stderr
    left = [p for p in (tmp_path / "run").rglob("*") if p.is_file() and p.name not in ("config.toml", "seconds.txt", ".lock")]
    assert left == [], f"{left} was left"


def test_a_loss_that_explodes_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    arguments = ["--optimizer", "sgd", "--lr", "1e30", "--teacher-training.epochs", 1]
    assert kdfast("distill", *SMALL, *arguments, "--out", tmp_path / "run") == 1
    assert re.search(r"stage seed0/alone: the loss term 'ce' is not finite at epoch \d+, step \d+; the last good", sentence(capsys))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["dance"], "there is no command 'dance'"),
        (["distil"], "there is no command 'distil'; did you mean distill?"),
        (["distill", "--recipe", "kdd"], "did you mean kd"),
        (["distill", "--recipe", "zzz"], "takd, tofd or package.module:RECIPE, got 'zzz'"),
        (["distill", "--preset", "best"], "preset must be one of default, notebook, readme"),
        (["distill", "--student", "resnet21"], "resnet20"),
        (["distill", "--dataset", "cifar11"], "no data set or folder is called 'cifar11'; known names: digits"),
        (["distill", "--dataset", "./nowhere"], "dataset ./nowhere: there is no such path"),
        (["distill", "--teacher", "nowhere/at/all.pt"], "there is no such path"),
        (["distill", "--config", "nowhere.toml"], "nowhere.toml is no configuration: there is no such file"),
        (["distill", "--normalization", "none"], "normalization must be one of"),
        (["distill", "--student-options", "shortcut"], "student_options must be key=value, got 'shortcut'"),
        (["distill", "--device", "tpu"], "device must be auto, cpu, cuda or cuda:N"),
        (["distill", "--label-fraction", "0"], "label_fraction must be above 0 and at most 1, got 0.0"),
        (["distill", "--label-fraction", "2"], "label_fraction must be above 0 and at most 1, got 2.0"),
        (["compare", "--label-fraction", "nan"], "label_fraction must be above 0 and at most 1, got nan"),
        (["distill", "--seeds", "0"], "seeds must be at least 1"),
        (["distill", "--temperature", "0"], "temperature must be positive"),
        (["eval", "nowhere"], "there is no such path"),
        (["eval", "nowhere", "--augment", "none"], "Unrecognized options: --augment, none"),
        (["eval", "nowhere", "--label-fraction", "0.5"], "Unrecognized options: --label-fraction, 0.5"),
        (["teacher", "--seeds", "3"], "Unrecognized options: --seeds, 3"),
        (["teacher", "--no-baseline"], "Unrecognized options: --no-baseline"),
        (["export", "nowhere"], "there is no such path"),
        (["predict", "nowhere", "a.jpg"], "there is no such path"),
        (["data", "info", "nowhere/at/all"], "dataset nowhere/at/all: there is no such path"),
        (["data", "check", "nowhere/at/all"], "dataset nowhere/at/all: there is no such path"),
        (["data", "check", "nowhere"], "no data set or folder is called 'nowhere'"),
        (["bench", "loaders", "--data-dir", "nowhere"], "data_dir nowhere: there is no such path"),
        (["distill", "--plus", "nst"], "plus must begin with kd, lskd, supcon, got 'nst'"),
        (["distill", "--plus", "kd:wait=1"], "plus kd takes weight=NUMBER"),
        (["distill", "--plus", "kd:weight=0"], "plus kd: weight must be positive, got 0"),
        (["distill", "--recipe", "self_distillation", "--plus", "kd", *TINY], "plus kd and lskd need a teacher, and this recipe has none"),
        (["list", "colours"], "list shows recipes, presets, models, datasets"),
        (["report", "nowhere"], "nowhere: there is no such path"),
        (["report", "."], "not a run folder: there is no config.toml in it"),
    ],
)
def test_bad_input_is_one_sentence(arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.chdir(tmp_path)
    try:
        status = kdfast(*arguments)
    except SystemExit as stop:
        status = stop.code
        assert message in capsys.readouterr().err.replace("\n", " ")
    else:
        assert message in sentence(capsys)
    assert status != 0


@pytest.mark.parametrize(
    ("command", "option", "of"),
    [
        (["distill", *SMALL], "--out", "folder"),
        (["teacher", "--max-images", 200], "--out", "folder"),
        (["compare", "--recipes", "kd", *TINY], "--out", "folder"),
        (["bench", "report", "results.json"], "--out", "folder"),
        (["export", "RUN", "--format", "safetensors"], "--out", "file"),
        (["eval", "RUN"], "--json", "file"),
        (["report", "RUN", "RUN"], "--out", "file"),
        (["data", "preview", "digits"], "--out", "file"),
        (["bench", "kernels"], "--out", "file"),
        (["bench", "loaders"], "--out", "file"),
        (["bench", "codegen"], "--out", "file"),
    ],
)
def test_where_nothing_can_be_written_is_said_before_any_work(command, option: str, of: str, finished, tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    for name in ("folder", "locked"):
        (tmp_path / name).mkdir()
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "locked" and access(path, mode))  # root may write everywhere
    command = [finished if argument == "RUN" else argument for argument in command]
    for out, message in (
        ({"file": "folder", "folder": "file"}[of], " is a file: name a folder" if of == "folder" else " is a folder: name a file"),
        ("file/below", f": {tmp_path / 'file'} is a file, no folder"),
        ("locked/below", f": the folder {tmp_path / 'locked'} cannot be written"),
    ):
        assert kdfast(*command, option, out) == 1
        assert sentence(capsys).endswith(f"kdfast: {option} {out}{message}")
    assert (tmp_path / "file").read_text() == "mine"
    assert not any((tmp_path / "locked").iterdir())


def test_help_names_what_there_is(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    from kdfast.benchmarks import operators

    monkeypatch.setenv("COLUMNS", "80")  # more would be two columns
    for command, shown, hidden in (
        (["distill"], ['Training augmentation by name (docs/loaders.md); "none" only resizes images. (default: the data set\'s own)'], []),
        (["distill", "--preset", "notebook"], ['"none" only resizes images. (default: conkd-student)'], []),
        (["teacher"], ["--config FILE", "--seed INT"], ["--seeds", "--baseline", "--strict"]),
        (["eval"], ["(default: the run's)"], ["--augment", "--label-fraction"]),
        (["bench", "kernels"], [*operators.OPERATORS], []),
    ):
        with pytest.raises(SystemExit):
            kdfast(*command, "--help")
        said = " ".join(re.sub("[│╭╮╰╯─]", " ", capsys.readouterr().out).split())
        assert not [words for words in shown if words not in said]
        assert not [words for words in hidden if words in said]
        assert "data set's own. (default: None)" not in said


def test_a_config_of_another_kind_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for text, message in (
        ("epochs = = 3", "is no configuration"),
        ("[training]\nepoch = 3", "there is no option 'epoch'"),
        ('[training]\nepochs = "many"', "epochs must be int, got 'many'"),
        ('[training]\noptimizer = "adam"', "optimizer must be one of sgd, adamw, lion, got 'adam'"),
    ):
        (tmp_path / "config.toml").write_text(text)
        assert kdfast("distill", "--config", tmp_path / "config.toml") == 1
        assert message in sentence(capsys)


def test_a_partial_config_keeps_its_presets_values(tmp_path: Path):
    from kdfast import recipes
    from kdfast.commands import config, toml

    (tmp_path / "config.toml").write_text('recipe = "conkd"\npreset = "notebook"\n[training]\nepochs = 3\n')
    table = toml.read(tmp_path / "config.toml")
    made = toml.fill(config.defaults(recipes.get("conkd"), "notebook", None), table, "x")
    assert (made.training.epochs, made.data.image_size, made.data.augment) == (3, 224, "conkd-student")


def test_a_config_and_another_recipe_contradict(finished: Path, capsys: pytest.CaptureFixture[str]):
    assert kdfast("distill", "--config", finished / "config.toml", "--recipe", "lskd") == 1
    assert "recipe is lskd on the command line and kd in" in sentence(capsys)


@pytest.mark.parametrize("more", [["--student", "nosuch"], ["--augment", "foo"], ["--teacher", "nowhere/at/all"]])
def test_what_cannot_work_fails_before_anything_is_trained_or_claimed(more: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert kdfast("distill", *SMALL, *more, "--out", tmp_path / "run") == 1
    sentence(capsys)
    assert kdfast("distill", *SMALL, "--out", tmp_path / "run") == 0, "the corrected command takes the folder"


def test_without_validation_images_the_last_epoch_counts_and_is_saved(tmp_path: Path):
    assert kdfast("distill", *SMALL, "--val-fraction", 0, "--epochs", 4, "--out", tmp_path / "run") == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["kept"] == "last"
    assert kdfast("eval", tmp_path / "run", "--json", tmp_path / "n.json") == 0
    assert json.loads((tmp_path / "n.json").read_text())["top1"] == results["arms"]["distilled"][0]["last/top1"]
    for stage in ("teacher", "seed0/alone", "seed0/distil"):
        assert json.loads((tmp_path / "run" / "stages" / stage / "stage.json").read_text())["kept"] == "last", stage


def test_a_teacher_without_validation_images_is_that_of_the_last_epoch(tmp_path: Path):
    options = ["--model", "resnet8", "--max-images", 200, "--val-fraction", 0]
    assert kdfast("teacher", *options, "--epochs", 3, "--out", tmp_path / "t") == 0
    assert json.loads((tmp_path / "t" / "results.json").read_text())["kept"] == "last"
    last = tmp_path / "t" / "stages" / "teacher" / "last.safetensors"
    saved, wanted = load_file(tmp_path / "t" / "best.safetensors"), load_file(last)
    assert all(torch.equal(value, wanted[f"0.{name}"]) for name, value in saved.items())


def test_a_given_teacher_that_is_trained_further_is_saved_and_said_to_be(tmp_path: Path):
    assert kdfast("teacher", "--model", "resnet8", "--max-images", 200, "--epochs", 2, "--out", tmp_path / "t") == 0
    given = tmp_path / "t" / "best.safetensors"
    more = ["--teacher", given, "--procedure", "notebook", "--classify-epochs", "1", "--teacher-classify-epochs", "1"]
    assert kdfast("distill", *more, "--seeds", 1, "--no-baseline", *TINY, "--out", tmp_path / "run") == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["teacher"]["source"] == f"{given}, trained further in this run"
    assert any("not the one that was given" in note for note in results["notes"])
    again = ["--teacher", tmp_path / "run" / "teacher.safetensors", "--procedure", "notebook", "--classify-epochs", "1"]
    assert kdfast("distill", *again, "--seeds", 1, "--no-baseline", *TINY, "--out", tmp_path / "again") == 0
    assert not (tmp_path / "again" / "stages" / "teacher").exists(), "it was trained already"
    assert not (tmp_path / "again" / "teacher.safetensors").exists()


def test_the_notebooks_quirk_reports_the_classifier_that_it_saves(tmp_path: Path):
    more = ["--procedure", "notebook", "--keep-last-classifier", "--classify-epochs", "3", "--teacher-classify-epochs", "1"]
    assert kdfast("distill", *more, "--seeds", 1, "--no-baseline", *TINY, "--out", tmp_path / "run") == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert kdfast("eval", tmp_path / "run", "--json", tmp_path / "n.json") == 0
    assert results["kept"] == "last"
    assert json.loads((tmp_path / "n.json").read_text())["top1"] == results["arms"]["distilled"][0]["last/top1"]
