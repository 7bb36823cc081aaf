"""A run that ends early: killed, stopped, damaged, out of disk space; and the run that continues it."""

import errno
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from tests.commands.running import KD, KD_SEEDS, SHORT, TEACHER, assert_same_run, fail, kdfast, metrics_of, results_of, run_and_kill


def wait_for_epochs(run: Path, count: int) -> None:
    """Waits until a run that goes on elsewhere has ended so many epochs."""
    deadline = time.monotonic() + 300
    path = run / "metrics.jsonl"
    while not (path.exists() and path.read_text().count("\n") >= count):
        assert time.monotonic() < deadline
        time.sleep(0.01)


# ---- stopped in the middle -------------------------------------------------------------------------------------------


def test_kill_9_again_and_again_gives_the_uninterrupted_bytes(finished: Path, tmp_path: Path):
    run = tmp_path / "run"
    command = [sys.executable, "-m", "kdfast.cli", "distill", *KD_SEEDS, "--out", str(run)]
    for epochs in (1, 5, 8):
        resume = ["--resume"] if run.exists() else []
        process = subprocess.Popen([*command, *resume], env={**os.environ, "OMP_NUM_THREADS": "1"})  # the same sums as in this process
        wait_for_epochs(run, epochs)
        process.kill()
        process.wait()
    assert not (run / "results.json").exists(), "the kills came too late to show anything"
    assert kdfast("distill", "--out", run, "--resume") == 0
    assert_same_run(run, finished)
    for path in finished.glob("**/*.safetensors"):
        assert (run / path.relative_to(finished)).read_bytes() == path.read_bytes(), path


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_saves_and_ends_with_one_sentence(tmp_path: Path, number: signal.Signals, capsys: pytest.CaptureFixture[str]):
    run = tmp_path / "run"

    def interrupt() -> None:
        wait_for_epochs(run, 3)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=interrupt)
    thread.start()
    error = fail(capsys, "distill", *KD, "--epochs", 5000, "--out", run, status=128 + number)
    thread.join()
    assert error == f"kdfast: stopped by {number.name}; the run is saved, continue with the same command and --resume"
    assert torch.load(run / "checkpoint.pt", weights_only=True)["stage"].startswith(("teacher", "seed0"))
    trained = sum(float(seconds) for seconds in re.findall(r'"seconds": ([\d.]+)', (run / "metrics.jsonl").read_text()))
    assert float((run / "seconds.txt").read_text()) > trained, "a resumed run counts on from these"


@pytest.mark.parametrize(
    ("limit", "name"),
    [
        pytest.param(700, "config.toml", id="config"),
        pytest.param(1_600, "checkpoint.pt", id="checkpoint"),
        pytest.param(200_000, "checkpoint.pt", id="half a checkpoint"),
        pytest.param(319_000, "checkpoint.pt", id="nearly a checkpoint"),
        pytest.param(330_000, "checkpoint.pt", id="the optimizer's momenta"),
    ],
)
def test_a_full_disk_is_one_sentence_and_the_run_resumes(limit: int, name: str, finished: Path, tmp_path: Path, capsys):
    """The limit on the size of a file stands in for a disk that fills up: one file does not fit any more."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
    try:
        error = fail(capsys, "distill", *KD_SEEDS, "--out", tmp_path / "run")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert re.search(rf"the disk is full or the file too large \(.*{name}\); what was saved before is intact", error)
    assert not list(tmp_path.rglob("*.part*")), "half a file was left"
    begun = (tmp_path / "run" / "config.toml").exists()
    assert kdfast("distill", *KD_SEEDS, "--out", tmp_path / "run", *["--resume"] * begun) == 0
    assert_same_run(tmp_path / "run", finished)


@pytest.mark.parametrize("write", [3, 8, 21, 40])
def test_a_disk_that_fills_at_any_write_is_one_sentence(write: int, finished: Path, tmp_path: Path, monkeypatch, capsys):
    real, left = os.fsync, [write]

    def fsync(descriptor: int) -> None:
        left[0] -= 1
        if left[0] <= 0:  # and it stays full: the count of seconds is not worth an error
            raise OSError(errno.ENOSPC, "it is full")
        real(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        assert "the disk is full or the file too large (it is full" in fail(capsys, "distill", *KD_SEEDS, "--out", tmp_path / "run")
    assert kdfast("distill", *KD_SEEDS, "--out", tmp_path / "run", "--resume") == 0
    assert_same_run(tmp_path / "run", finished)


def test_a_loss_that_explodes_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    options = ["--optimizer", "sgd", "--lr", "1e30", "--teacher-training.epochs", 1]
    error = fail(capsys, "distill", *KD, *options, "--out", tmp_path / "run")
    assert re.search(r"stage seed0/alone: the loss term 'ce' is not finite at epoch \d+, step \d+; the last good", error)


RECIPES = ["at", "crd", "fitnets", "takd --assistants resnet8", "mhkd", "tofd", "dih"]


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_resumes_to_the_same_numbers(recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The crash is at a write in the middle of the student's last stage."""
    options = ["distill", "--recipe", *recipe.split(), *SHORT, "--out"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert kdfast(*options, whole) == 0
    run_and_kill(monkeypatch, len(metrics_of(whole)) * 3, *options, cut)
    assert not (cut / "results.json").exists(), "the crash came too late to show anything"
    assert kdfast(*options, cut, "--resume") == 0
    assert_same_run(cut, whole)
    assert kdfast("export", cut, "--format", "safetensors", "--out", tmp_path / "student.safetensors") == 0


# ---- continued -------------------------------------------------------------------------------------------------------


def test_resume_takes_the_options_of_the_run(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    """Options need not be repeated, and one that is must be the same."""
    run = tmp_path / "run"
    run_and_kill(monkeypatch, 12, "distill", *KD_SEEDS, "--out", run)
    for wrong, message in (
        (["--lr", 0.5], "lr is 0.001 there and 0.5 here"),
        (["--recipe", "lskd"], "recipe is kd there and lskd here"),
        (["--preset", "dih-code"], "preset is default there and dih-code here"),
    ):
        assert f"belongs to another configuration: {message}" in fail(capsys, "distill", "--resume", *wrong, "--out", run)
    assert kdfast("distill", "--resume", "--student", "resnet8", "--out", run) == 0
    assert_same_run(run, finished)


def test_a_teachers_run_is_resumed_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert kdfast(*TEACHER, 3, "--out", tmp_path / "whole") == 0
    run_and_kill(monkeypatch, 5, *TEACHER, 3, "--out", tmp_path / "cut")
    assert kdfast("teacher", "--out", tmp_path / "cut", "--resume") == 0
    assert_same_run(tmp_path / "cut", tmp_path / "whole")


def test_resuming_a_finished_run_changes_nothing_but_the_seconds(finished: Path, tmp_path: Path):
    shutil.copytree(finished, tmp_path / "copy")
    assert kdfast("distill", "--config", finished / "config.toml", "--out", tmp_path / "copy", "--resume") == 0
    assert_same_run(tmp_path / "copy", finished)
    took, took_in_all = (results_of(run)["seconds_total"] for run in (finished, tmp_path / "copy"))
    assert took < took_in_all, "the seconds of both sessions"


@pytest.mark.parametrize("command", ["distill", "teacher"])
@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--out", "empty"], "--resume: empty holds no run, so there is nothing to continue"),
        (["--out", "nowhere"], "--resume: nowhere is no folder, so there is nothing to continue"),
        ([], "--resume: there are no runs under runs/"),
    ],
    ids=["empty", "nowhere", "no runs"],
)
def test_resuming_nothing_is_an_error(command: str, more, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    assert message in fail(capsys, command, "--resume", *more)
    assert [p.name for p in tmp_path.rglob("*")] == ["empty"], "nothing was begun"


def test_resume_finds_the_run_with_the_same_options(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(finished, tmp_path / "runs" / "first")
    error = fail(capsys, "distill", *KD_SEEDS, "--lr", 0.5, "--resume")
    assert "no run under runs/ has these options, the newest are runs/first (lr is 0.001 there and 0.5 here): name one with --out" in error
    assert "runs/first (recipe is kd there and none (kdfast teacher) here)" in fail(capsys, "teacher", "--resume")
    assert kdfast("distill", *KD_SEEDS, "--resume") == 0, "its name does not matter"
    assert [p.name for p in (tmp_path / "runs").iterdir()] == ["first"]


@pytest.mark.parametrize("size", [10_000, 300, 0], ids=["whole", "half", "empty"])
@pytest.mark.parametrize(
    ("command", "resume"),
    [
        pytest.param([*KD_SEEDS, "--out", "run"], [], id="the same command"),
        pytest.param([*KD_SEEDS, "--out", "run"], ["--resume"], id="with resume"),
        pytest.param(KD_SEEDS, [], id="the same command without out"),
        pytest.param(KD_SEEDS, ["--resume"], id="with resume without out"),
    ],
)
def test_a_run_killed_while_it_writes_its_first_file_begins_again(command, resume, size, finished, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    killed = tmp_path / ("run" if "--out" in command else "runs/kd-digits-resnet8")
    killed.mkdir(parents=True)
    (killed / ".lock").touch()
    (killed / ".config.0123abcd.part.toml").write_bytes((finished / "config.toml").read_bytes()[:size])
    assert kdfast("distill", *command, *resume) == 0
    run = max(tmp_path.glob("**/results.json")).parent
    assert_same_run(run, finished)
    assert run == killed or not resume
    assert not list(run.glob(".config*"))


# ---- damaged or taken ------------------------------------------------------------------------------------------------


def test_a_damaged_checkpoint_is_named_and_can_be_deleted(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    run = tmp_path / "run"
    run_and_kill(monkeypatch, 14, "distill", *KD_SEEDS, "--out", run)
    checkpoint = run / "checkpoint.pt"
    for content in (checkpoint.read_bytes()[:5000], b"no checkpoint", b""):
        checkpoint.write_bytes(content)
        error = fail(capsys, "distill", "--out", run, "--resume")
        assert error.endswith("checkpoint.pt is damaged: delete it to continue from the last finished stage")
    checkpoint.unlink()
    assert kdfast("distill", "--out", run, "--resume") == 0
    assert metrics_of(run) == metrics_of(finished)


@pytest.mark.parametrize("name", ["best.safetensors", "last.safetensors", "stage.json"])
def test_a_damaged_stage_is_named_and_can_be_deleted(finished: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    stage = run / "stages" / "seed1" / "distil"
    (stage / name).write_bytes((stage / name).read_bytes()[:20])
    error = fail(capsys, "distill", "--out", run, "--resume")
    assert f"delete {stage} and the folders of the stages after it to train these again" in error
    if name == "stage.json":  # once is enough
        shutil.rmtree(stage)
        assert kdfast("distill", "--out", run, "--resume") == 0
        assert metrics_of(run) == metrics_of(finished)


def test_a_folder_of_a_run_is_not_overwritten(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    error = fail(capsys, "distill", *KD_SEEDS, "--lr", 0.5, "--out", finished, "--resume")
    assert error.endswith("belongs to another configuration: lr is 0.001 there and 0.5 here; give --out another folder")
    assert "already holds this run: pass --resume" in fail(capsys, "distill", *KD_SEEDS, "--out", finished)
    (tmp_path / "diary.txt").write_text("dear diary")
    assert "neither empty nor a run: it holds diary.txt" in fail(capsys, "distill", *KD, "--out", tmp_path)
    assert {p.name for p in tmp_path.iterdir()} <= {"diary.txt", ".lock"}


def test_an_error_comes_before_the_folder_is_claimed(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for more in (["--student", "nosuch"], ["--augment", "foo"], ["--teacher", "nowhere/at/all"]):
        fail(capsys, "distill", *KD, *more, "--out", tmp_path / "run")
    assert kdfast("distill", *KD, "--no-baseline", "--out", tmp_path / "run") == 0, "the corrected command takes the folder"
