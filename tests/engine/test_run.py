"""Runs of stages: the loop, the kept weights, checkpoints, and resuming to the same bits."""

import math
import os
import shutil
import signal
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from kdfast.engine import Interrupted, NonFiniteLoss, Options, Training, locked
from kdfast.engine.interrupt import StopRequest
from kdfast.engine.stage import lr_factor
from kdfast.recipes.recipe import cross_entropy
from tests.engine.small import TRAINING, close, copy, equal, fit, linear, lines, loaders, network, stage


class Crash(BaseException):
    """Simulates kill -9: nothing catches it."""


def two_stages(training: Training = TRAINING) -> Iterator:
    """A network, then a head on top of it. The second stage is built from random numbers that are drawn between the stages."""
    first = network()
    yield stage("first", first, training)
    second = nn.Sequential(first, nn.Linear(3, 3))
    yield stage("second", second, training)
    return second


def run(folder: Path, training: Training = TRAINING, **keywords) -> tuple[list[dict], dict]:
    """Runs or resumes the two stages; returns their metrics and the final weights."""
    model = fit(folder, two_stages(training), seed=7, **keywords)
    return lines(folder), copy(model)


def stopped() -> StopRequest:
    stop = StopRequest()
    stop.signal_number = signal.SIGTERM
    return stop


def test_a_stage_learns_and_writes_one_line_an_epoch(tmp_path: Path):
    metrics, _ = run(tmp_path, replace(TRAINING, epochs=6))
    assert [(line["stage"], line["epoch"]) for line in metrics] == [(s, e + 1) for s in ("first", "second") for e in range(6)]
    assert metrics[-1]["val/top1"] > 0.9
    assert metrics[0].keys() >= {"lr", "train/loss", "train/ce", "train/top1", "val/loss", "val/ce", "val/top1", "val/top5", "best"}


@pytest.mark.parametrize(("keep", "epoch"), [("best", 2), ("last", 5)])
def test_a_stage_keeps_the_best_or_the_last_epoch(tmp_path: Path, keep: str, epoch: int):
    model, data, seen = network(), loaders(), {}

    def loss(outputs, batch):
        now = data.train.state_dict()["epoch"]
        seen[now] = copy(model)
        return {"ce": cross_entropy(outputs["logits"], batch.labels), "score": torch.tensor([3.0, 1.0, 2.0, 4.0, 5.0][now])}

    result = fit(tmp_path, stage("s", model, replace(TRAINING, epochs=5), best="val/score", keep=keep, data=data, loss=loss))
    assert result.epoch == epoch
    assert equal(model.state_dict(), seen[epoch - 1])
    for which, saved in (("last", 4), ("best", 1)):
        result.restore(which)
        assert equal(model.state_dict(), seen[saved])


def test_a_run_killed_at_any_write_resumes_to_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    expected, real = run(tmp_path / "whole"), os.replace
    for n in range(100):
        calls, crashed = iter(range(n)), False

        def dying(source, target, *, calls=calls):
            if next(calls, None) is None:
                raise Crash
            real(source, target)

        monkeypatch.setattr(os, "replace", dying)
        try:
            run(tmp_path / str(n))
        except Crash:
            crashed = True
        monkeypatch.setattr(os, "replace", real)
        metrics, weights = run(tmp_path / str(n))
        assert metrics == expected[0], f"killed at write {n + 1}"
        assert equal(weights, expected[1]), f"killed at write {n + 1}"
        if not crashed:
            break
    assert n >= 12, "too few writes were tried"


@pytest.mark.parametrize("after", [1, 7, 12])
def test_a_stop_request_within_an_epoch_saves_and_resumes_to_the_same_bits(tmp_path: Path, after: int):
    training = replace(TRAINING, ema=0.9, clip_norm=1.0, optimizer="lion", lr=1e-2)
    expected, weights = run(tmp_path / "whole", training)
    steps = iter(range(1, after))

    class StopAfter(StopRequest):
        def __bool__(self) -> bool:
            if next(steps, None) is None:
                self.signal_number = 15
            return self.signal_number is not None

    with pytest.raises(Interrupted):
        run(tmp_path / "stopped", training, stop=StopAfter())
    journal = tmp_path / "stopped" / "metrics.jsonl"
    assert not journal.exists() or len(lines(journal.parent)) < len(expected)
    metrics, resumed = run(tmp_path / "stopped", training)
    assert metrics == expected
    assert equal(resumed, weights)


def test_a_finished_run_trains_nothing_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    expected, weights = run(tmp_path)
    monkeypatch.setattr(nn.Module, "train", lambda self, mode=True: pytest.fail("trained again") if mode else self)
    metrics, again = run(tmp_path)
    assert metrics == expected
    assert equal(again, weights)


def test_a_non_finite_loss_names_stage_step_and_term_and_keeps_the_checkpoint(tmp_path: Path):
    model, seen = network(), 0

    def loss(outputs, batch):
        nonlocal seen
        seen += model.training
        bad = torch.tensor(float("nan")) if seen == 8 and model.training else torch.tensor(0.0)
        return {"ce": cross_entropy(outputs["logits"], batch.labels), "odd": bad}

    with pytest.raises(NonFiniteLoss, match=r"stage s: the loss term 'odd' is not finite at epoch 2, step 3"):
        fit(tmp_path, stage("s", model, loss=loss))
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert saved["epoch"] == 1
    assert all(value.isfinite().all() for value in saved["weights"].values())


def test_a_memory_and_an_optimizer_of_its_own_are_resumed(tmp_path: Path):
    """The memory is neither averaged nor among the weights; the optimizer's rate is scheduled."""

    def train(folder: Path, stop: StopRequest) -> tuple[torch.Tensor, dict]:
        model, bank = linear(), nn.Module()
        bank.register_buffer("images", torch.zeros(()))

        def loss(outputs, batch):
            if bank.training:
                bank.images += len(batch.labels)
            return {"square": outputs["logits"].square().mean()}

        own = {"memory": (bank,), "loss": loss, "optimizer": lambda parameters, training: torch.optim.NAdam(parameters, lr=training.lr)}
        fit(folder, stage("s", model, replace(TRAINING, ema=0.5), **own), stop=stop)
        return bank.images, model.state_dict()

    images, weights = train(tmp_path / "whole", StopRequest())
    assert images == 80 * TRAINING.epochs
    assert [line["lr"] for line in lines(tmp_path / "whole")] == pytest.approx([0.1 * lr_factor(TRAINING, epoch) for epoch in range(3)])
    with pytest.raises(Interrupted):
        train(tmp_path / "stopped", stopped())
    checkpoint = torch.load(tmp_path / "stopped" / "checkpoint.pt", weights_only=True)
    assert 0 < checkpoint["memory"]["0.images"] < 80 * TRAINING.epochs
    assert not any("images" in name for part in ("weights", "ema") for name in checkpoint[part])
    images, resumed = train(tmp_path / "stopped", StopRequest())
    assert images == 80 * TRAINING.epochs
    assert equal(resumed, weights)
    assert not any("images" in name for name in load_file(tmp_path / "stopped" / "stages" / "s" / "best.safetensors"))


def test_the_moving_average_is_kept_and_training_continues_without_it(tmp_path: Path):
    histories = []
    for ema in (None, 0.75):
        model, seen = linear(), []

        def loss(outputs, batch, model=model, seen=seen):
            if torch.is_grad_enabled():
                seen.append(model[1].weight.detach().clone())
            return {"ce": cross_entropy(outputs["logits"], batch.labels)}

        fit(tmp_path / str(ema), stage("s", model, replace(TRAINING, epochs=2, ema=ema), loss=loss, keep="last"))
        seen.append(torch.load(tmp_path / str(ema) / "checkpoint.pt", weights_only=True)["weights"]["0.1.weight"])
        histories.append(seen[1:])  # after each step
    plain, averaged = histories
    assert all(torch.equal(a, b) for a, b in zip(plain, averaged, strict=True))
    average = plain[0]
    for weight in plain[1:]:
        average = 0.75 * average + 0.25 * weight
    assert torch.allclose(model[1].weight, average, atol=1e-6)
    assert not torch.allclose(plain[-1], average, atol=1e-3)


def test_plateau_lowers_the_rate(tmp_path: Path):
    def loss(outputs, batch):
        return {"ce": cross_entropy(outputs["logits"], batch.labels), "score": torch.zeros(())}

    training = Training(epochs=8, batch_size=16, lr=0.1, schedule="plateau", plateau_patience=1, warmup=1)
    fit(tmp_path, stage("s", linear(), training, best="val/score", loss=loss))
    # half the rate to warm up, then two epochs without improvement before each tenth
    assert [round(line["lr"] / 0.1, 6) for line in lines(tmp_path)] == [0.5, 1, 1, 0.1, 0.1, 0.01, 0.01, 0.001]


def test_early_stop_ends_a_stage(tmp_path: Path):
    training = replace(TRAINING, epochs=50, lr=1e-12, early_stop=2)
    assert fit(tmp_path, stage("s", network(), training, best="val/loss")).epochs < 50


def test_a_metric_that_is_not_measured_is_named(tmp_path: Path):
    with pytest.raises(ValueError, match=r"best is 'val/acc', but the metrics are .*val/top1"):
        fit(tmp_path, stage("s", network(), best="val/acc"))


def test_frozen_modules_do_not_change(tmp_path: Path):
    teacher, student = network(), network()
    before = copy(teacher)

    def forward(batch):
        return {"logits": student(batch.images), "teacher": teacher(batch.images)}

    def loss(outputs, batch):
        return {"mse": (outputs["logits"] - outputs["teacher"]).square().mean()}

    fit(tmp_path, stage("s", student, frozen=(teacher,), forward=forward, loss=loss))
    assert equal(before, teacher.state_dict())


def test_bf16_trains(tmp_path: Path):
    result = fit(tmp_path, stage("s", network(), replace(TRAINING, epochs=2)), Options(precision="bf16"))
    assert result.metrics["val/loss"] < 1.2


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_compiled_stage_follows_the_eager_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backend: str):
    if backend == "inductor" and shutil.which("g++") is None:
        pytest.skip("torch.compile needs a C++ compiler on a CPU")
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    eager, compiled = linear(), linear()
    results = [fit(tmp_path / str(c), stage("s", model), Options(compile=c)) for c, model in ((False, eager), (True, compiled))]
    assert results[0].metrics["val/loss"] == pytest.approx(results[1].metrics["val/loss"], rel=1e-4)
    assert close(eager.state_dict(), compiled.state_dict(), rtol=1e-3, atol=1e-5)


def test_a_run_folder_is_locked_for_one_process(tmp_path: Path):
    with locked(tmp_path), pytest.raises(ValueError, match="another process is running in it"), locked(tmp_path):
        pass


@pytest.mark.parametrize("more", [{}, {"micro_batch": 8}], ids=["whole batches", "micro-batches"])
def test_a_frozen_network_that_is_not_finite_is_named_in_place_of_the_learning_rate(more: dict, tmp_path: Path):
    student, teacher = linear(), linear()
    with torch.no_grad():
        teacher[1].weight[0, 0] = math.nan

    def forward(batch):
        with torch.no_grad():
            target = teacher(batch.images)
        return {"logits": student(batch.images), "teacher": target}

    def loss(outputs, batch):
        return {"kd": (outputs["logits"] - outputs["teacher"]).square().mean()}

    made = stage("s", student, Training(epochs=1, batch_size=16, **more), frozen=(teacher,), forward=forward, loss=loss)
    with pytest.raises(
        ValueError, match=r"'kd' is not finite at epoch 1, step 1: the outputs of a frozen network \(teacher\) are not finite"
    ):
        fit(tmp_path, made)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_process_that_outlives_its_parent_does_not_hold_the_lock(tmp_path: Path):
    """A run that is killed by -9 leaves its loaders' workers for some seconds."""
    with locked(tmp_path):
        reader, writer = os.pipe()
        worker = os.fork()
        if worker == 0:
            os.write(writer, b"it runs")
            signal.pause()
        os.read(reader, 1)
    with locked(tmp_path):
        os.kill(worker, signal.SIGKILL)
        os.waitpid(worker, 0)
    os.close(reader)
    os.close(writer)


def test_a_fork_does_not_unlock(tmp_path: Path):
    with locked(tmp_path):
        if (child := os.fork()) == 0:
            os._exit(0)
        os.waitpid(child, 0)
        with pytest.raises(ValueError, match="another process is running in it"), locked(tmp_path):
            pass
