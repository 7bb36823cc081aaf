"""kdfast distill and kdfast teacher: the run folder, the recipes, and given teachers."""

import math
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

from kdfast.models import ModelSpec, create, save_weights
from kdfast.recipes.supervised import supervised
from tests.commands.running import KD, SHORT, TEACHER, TINY, assert_same_run, evaluate, fail, kdfast, metrics_of, results_of, stages_of
from tests.data.samples import write_class_folders

# ---- a run folder ----------------------------------------------------------------------------------------------------


def test_a_run_folder_holds_what_was_promised(finished: Path):
    names = {p.name for p in finished.iterdir()}
    assert names >= {"config.toml", "metrics.jsonl", "curves.png", "report.html", "results.json", "best.safetensors", "teacher.safetensors"}
    assert "checkpoint.pt" not in names, "a finished run needs none"
    results = results_of(finished)
    top1 = {arm: [student["best/top1"] for student in results["arms"][arm]] for arm in ("alone", "distilled")}
    assert len(top1["alone"]) == len(top1["distilled"]) == results["paired"]["n"] == 2
    assert results["paired"]["differences"] == [after - before for before, after in zip(top1["alone"], top1["distilled"])]
    for arm in results["arms"]["distilled"]:
        assert {"best/top1", "best/top5", "best/loss", "last/top1", "val/top1", "epoch", "train_images_per_s"} <= arm.keys()
    assert sum(map(sum, results["confusion"]["distilled"])) == 2 * results["test_images"]
    assert f"{100 * results['teacher']['top1']:.2f}" in (finished / "report.html").read_text()
    assert results["arms"]["alone"][0]["best/loss"] != results["arms"]["distilled"][0]["best/loss"]


def test_config_toml_repeats_the_run_to_the_bit(finished: Path, tmp_path: Path):
    assert kdfast("distill", "--config", finished / "config.toml", "--out", tmp_path / "again") == 0
    assert_same_run(tmp_path / "again", finished)
    assert (tmp_path / "again" / "config.toml").read_text() == (finished / "config.toml").read_text()


def test_a_run_is_logged_and_continued_in_its_logs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Logs write into the run folder, which has to be empty when the run begins."""
    made: list[dict] = []
    lines: list[dict] = []

    def init(**keywords):
        (Path(keywords["dir"]) / "wandb" / "run").mkdir(parents=True, exist_ok=True)  # as it does
        made.append(keywords)
        return SimpleNamespace(log=lines.append, finish=lambda exit_code: made[-1].update(ended=exit_code))

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    arguments = ["distill", *KD, "--no-baseline", "--out", tmp_path / "run", "--log", "wandb"]
    assert kdfast(*arguments) == kdfast(*arguments, "--resume") == 0
    written = metrics_of(tmp_path / "run")
    assert [line[f"{of['stage']}/val/top1"] for line, of in zip(lines, written, strict=True)] == [of["val/top1"] for of in written]
    assert made[0]["id"] == made[1]["id"]
    assert [of["ended"] for of in made] == [0, 0]


@pytest.mark.parametrize("error", [RuntimeError("api_key not configured"), OSError("no network")], ids=str)
def test_a_log_that_cannot_be_opened_leaves_no_folder(error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    def init(**keywords):
        (Path(keywords["dir"]) / "wandb" / "run").mkdir(parents=True)
        raise error

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    out = tmp_path / "run"
    assert fail(capsys, "distill", *KD, "--out", out, "--log", "wandb") == f"kdfast: --log wandb: {error}"
    assert not out.exists()


def test_weights_that_cannot_be_fetched_leave_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    def refuse(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr("torch.hub.download_url_to_file", refuse)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    options = [*KD, "--student", "resnet18", "--pretrained", "--image-size", "32", "--out", tmp_path / "run"]
    assert "the ImageNet weights of 'resnet18' could not be fetched" in fail(capsys, "distill", *options)
    assert not (tmp_path / "run").exists()


def test_the_given_teacher_is_named_everywhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    save_weights(create("resnet32", 10), tmp_path / "w.safetensors", {"model": ModelSpec("resnet32", 10).to_json()})
    options = ["--recipe", "takd", *SHORT, "--epochs", "1", "--teacher", tmp_path / "w.safetensors", "--teacher-model", "resnet32"]
    assert kdfast("distill", *options, "--out", tmp_path / "run") == 0
    assert "chain: resnet32 -> resnet14 -> resnet8" in capsys.readouterr().out
    assert kdfast("distill", *KD, "--epochs", "1", "--teacher", tmp_path / "run" / "best.safetensors", "--out", tmp_path / "next") == 0
    assert 'teacher_model = "resnet8"' in (tmp_path / "next" / "config.toml").read_text()
    assert results_of(tmp_path / "next")["teacher"]["model"] == "resnet8"


def test_the_header_says_how_long_the_teacher_is_trained(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert kdfast("distill", *KD, "--no-baseline", "--epochs", "1", "--out", tmp_path / "run") == 0
    assert "teacher: resnet8 first, 2 epochs of its own (--teacher-training.epochs)" in capsys.readouterr().out


def broken_weights(path: Path, value: float) -> Path:
    """Weights of resnet8 whose classifier has one number that is not finite for class 3."""
    model = create("resnet8", 10)
    with torch.no_grad():
        model.linear.weight[3, 0] = value
    save_weights(model, path, {})
    return path


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_teacher_that_is_not_finite_is_named_before_anything_trains(value: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    weights = broken_weights(tmp_path / "w.safetensors", value)
    options = [*KD, "--teacher", weights, "--teacher-model", "resnet8", "--out", tmp_path / "run"]
    error = fail(capsys, "distill", *options)
    assert f"teacher {weights} gives logits that are not finite" in error
    assert "learning rate" not in error
    assert not (tmp_path / "run").exists()
    error = fail(capsys, "eval", weights, "--model", "resnet8", "--dataset", "digits", "--json", tmp_path / "e.json")
    assert "gives logits that are not finite" in error
    assert not (tmp_path / "e.json").exists()


def test_without_validation_images_the_last_epoch_counts_and_is_saved(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run = tmp_path / "run"
    assert kdfast("distill", *KD, "--val-fraction", 0, "--epochs", 4, "--label-fraction", 0.155, "--out", run) == 0
    assert "15.5% of them with their label for the student" in capsys.readouterr().out
    assert results_of(run)["kept"] == "last"
    assert evaluate(run)["top1"] == results_of(run)["arms"]["distilled"][0]["last/top1"]
    for stage in ("teacher", "seed0/alone", "seed0/distil"):
        assert '"kept": "last"' in (run / "stages" / stage / "stage.json").read_text(), stage


# ---- the recipes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        "conkd --micro-batch 16",
        "kd --label-fraction 1.0 --ema 0.9 --optimizer adamw --schedule plateau",
        "at --plus lskd:weight=3 supcon",
        *(
            pytest.param(options, marks=pytest.mark.slow)
            for options in [
                "conkd --procedure readme",
                "conkd --label-fraction 1.0 --label-smoothing 0.1",
                "self_distillation --label-smoothing 0.1",
                "self_distillation --plus supcon:weight=0.3,temperature=0.1",
                "kd --precision bf16",
                "kd --preset large-batch --warmup 0 --teacher-training.warmup 0",
                "fitnets --procedure joint",
                "crd --kd-weight 0.9 --plus supcon",
                "crd --label-fraction 0.5 --micro-batch 16 --precision bf16 --ema 0.9",
            ]
        ),
    ],
)
def test_a_recipe_runs_to_a_report(options: str, tmp_path: Path):
    assert kdfast("distill", *SHORT, "--recipe", *options.split(), "--out", tmp_path / "run") == 0
    assert (tmp_path / "run" / "report.html").exists()


NOTEBOOK = ["--procedure", "notebook", "--classify-epochs", "2", "--teacher-classify-epochs", "2", *SHORT]


def test_conkds_notebook_procedure_runs_its_stages_and_its_weights_come_back(tmp_path: Path):
    run = tmp_path / "run"
    assert kdfast("distill", *NOTEBOOK, "--cosine-from-one", "--keep-last-classifier", "--classify-epochs", "3", "--out", run) == 0
    assert stages_of(run) == ["teacher/contrast", "teacher/classify", "seed0/distil", "seed0/classify"]
    assert results_of(run)["kept"] == "last"
    assert evaluate(run)["top1"] == results_of(run)["arms"]["distilled"][0]["last/top1"]
    # the embedding teacher is not trained a second time
    following = ["--teacher", run / "teacher.safetensors", "--out", tmp_path / "next"]
    assert kdfast("distill", *NOTEBOOK, "--cosine-from-one", "--keep-last-classifier", "--classify-epochs", "3", *following) == 0
    assert stages_of(tmp_path / "next") == ["seed0/distil", "seed0/classify"]
    assert not (tmp_path / "next" / "teacher.safetensors").exists()
    numbers = [{key: results_of(folder)["teacher"][key] for key in ("top1", "loss")} for folder in (run, tmp_path / "next")]
    assert numbers[0] == numbers[1]
    assert results_of(run)["arms"]["distilled"][0]["best/loss"] == results_of(tmp_path / "next")["arms"]["distilled"][0]["best/loss"]
    assert kdfast("distill", *KD, "--no-baseline", "--teacher", run / "teacher.safetensors", "--out", tmp_path / "kd") == 0


def test_dihs_heads_are_used_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    first, again, other = (tmp_path / name for name in ("first", "again", "other"))
    options = ["distill", "--recipe", "dih", *SHORT]
    assert kdfast(*options, "--out", first) == 0
    assert re.search(r"heads, validation top-1: layer1 \S+ %, layer2 \S+ %, layer3 \S+ %", capsys.readouterr().out)
    assert kdfast(*options, "--teacher", first / "teacher.safetensors", "--heads", first, "--out", again) == 0
    assert stages_of(again) == ["seed0/distil"]
    assert results_of(first)["arms"]["distilled"][0]["best/loss"] == results_of(again)["arms"]["distilled"][0]["best/loss"]
    save_weights(create("resnet8", 10), other.with_suffix(".safetensors"), {})
    wrong = ["--teacher", other.with_suffix(".safetensors"), "--heads", first, "--out", tmp_path / "wrong"]
    assert "another teacher's" in fail(capsys, *options, *wrong)


@pytest.mark.parametrize("more", ["--recipe kd", pytest.param("--procedure notebook --classify-epochs 1", marks=pytest.mark.slow)])
def test_no_forward_pass_has_more_images_than_a_micro_batch(more: str, tmp_path: Path):
    """In training, in validation, where a teacher is asked beforehand, and in tests."""
    sizes = []
    hook = register_module_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])) if isinstance(module, nn.Conv2d) else None)
    more += " --max-images 60 --micro-batch 12 --teacher-training.micro-batch 12 --augment none --label-fraction 1.0 --seeds 1"
    try:
        assert kdfast("distill", *TINY, *more.split(), "--out", tmp_path / "run") == 0
    finally:
        hook.remove()
    assert max(sizes) == 12


@pytest.mark.usefixtures("own_recipes")
def test_a_recipe_of_ones_own_is_distilled_resumed_and_evaluated(tmp_path: Path):
    options = ["distill", "--recipe", "own_recipes:RECIPE", "--extra", 0.5, *SHORT]
    assert kdfast(*options) == 0
    run = tmp_path / "runs" / "mine-digits-resnet8"
    assert results_of(run)["recipe"] == "mine"
    config = (run / "config.toml").read_text()
    assert 'recipe = "own_recipes:RECIPE"' in config
    assert "extra = 0.5" in config
    before = (run / "best.safetensors").read_bytes()
    assert kdfast(*options, "--resume") == 0
    assert (run / "best.safetensors").read_bytes() == before
    evaluate(run)


# ---- teachers --------------------------------------------------------------------------------------------------------


def test_a_trained_teacher_serves_the_next_run(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    arguments = ["--recipe", "lskd", "--teacher", finished / "teacher.safetensors", *SHORT]
    assert kdfast("distill", *arguments, "--out", tmp_path / "run") == 0
    shown = capsys.readouterr().out
    assert f"test top-1 {100 * results_of(finished)['teacher']['top1']:.2f} %" in shown
    assert "effective weights" in shown
    assert "teacher" not in stages_of(tmp_path / "run")


def test_a_given_teacher_that_is_trained_further_is_saved_and_said_to_be(finished: Path, tmp_path: Path):
    given = finished / "teacher.safetensors"
    assert kdfast("distill", "--teacher", given, *NOTEBOOK, "--out", tmp_path / "run") == 0
    results = results_of(tmp_path / "run")
    assert results["teacher"]["source"] == f"{given}, trained further in this run"
    assert any("not the one that was given" in note for note in results["notes"])
    assert (tmp_path / "run" / "teacher.safetensors").exists()


def test_a_teacher_at_chance_is_an_error_with_strict(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    options = ["--recipe", "kd", *SHORT, "--teacher-training.lr", "1e-9", "--out", tmp_path / "run"]
    assert "the teacher is no better than chance" in fail(capsys, "distill", *options, "--strict")


def test_a_teacher_of_other_classes_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    save_weights(create("resnet8", 7), tmp_path / "w.safetensors", {})
    error = fail(capsys, "distill", *KD, "--teacher", tmp_path / "w.safetensors", "--out", tmp_path / "run")
    assert "has 7 classes, but digits has 10" in error


@pytest.mark.parametrize(("more", "kept"), [([], "best"), (["--val-fraction", 0], "last")], ids=["best epoch", "last epoch"])
def test_the_teacher_command_says_the_numbers_of_eval(more: list, kept: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert kdfast(*TEACHER, 3, *more, "--out", tmp_path / "t") == 0
    (shown,) = re.findall(r"^test top-1 (\S+) %", capsys.readouterr().out, re.MULTILINE)
    assert shown == f"{100 * evaluate(tmp_path / 't')['top1']:.2f}"
    assert results_of(tmp_path / "t")["kept"] == kept
    assert not {"student_alone"} & results_of(tmp_path / "t").keys()


@pytest.mark.parametrize("fraction", [0.2, 1.0])
def test_the_teacher_command_divides_by_the_labels_of_the_whole_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fraction: float):
    coupled = []

    def observe(*arguments, **keywords):
        stage = next(supervised(*arguments, **keywords))
        coupled.append(stage.couples_rows)
        yield stage
        return stage.train[0]

    monkeypatch.setattr("kdfast.commands.teacher.supervised", observe)
    assert kdfast(*TEACHER, 1, "--label-fraction", fraction, "--micro-batch", 16, "--out", tmp_path / "t") == 0
    assert set(coupled) == {fraction < 1}  # of the rehearsal's stage and of the one that trains


def test_an_image_folder_is_trained_on(tmp_path: Path):
    images = write_class_folders(tmp_path / "images", {})
    common = ["--dataset", images, "--epochs", 1, "--image-size", 32, "--val-fraction", 0.3, "--batch-size", 4, "--workers", 0]
    networks = ["--student", "resnet8", "--teacher-model", "resnet8", "--teacher-training.epochs", 1, "--teacher-training.batch-size", 4]
    assert kdfast("distill", "--recipe", "kd", *common, *networks, "--out", tmp_path / "run") == 0
    assert kdfast("teacher", "--model", "resnet8", *common, "--out", tmp_path / "teacher") == 0
