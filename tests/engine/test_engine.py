"""The loop, its checkpoints and its resuming, on a network of a few numbers and images made of noise."""

import json
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from kdfast.data import ImageData, Loaders, Split, make_loaders
from kdfast.engine import Interrupted, Mean, NonFiniteLoss, Options, Run, Stage, Training, World
from kdfast.engine.interrupt import StopRequest
from kdfast.engine.logs import logs
from kdfast.engine.metrics import AccuracyMeter, TermMeter, evaluate
from kdfast.engine.schedule import make_optimizer
from kdfast.engine.stage import lr_factor
from kdfast.recipes import conkd
from kdfast.recipes.recipe import cross_entropy
from kdfast.recipes.supervised import supervised

CPU = World(0, 1, torch.device("cpu"))
TRAINING = Training(epochs=3, batch_size=16, lr=0.1, schedule="cosine")


def split(n: int, seed: int) -> Split:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 3
    pixels = torch.randint(0, 256, (n, 3, 8, 8), generator=generator, dtype=torch.uint8)
    pixels[torch.arange(n), labels] = 255  # the class is the bright channel
    return Split(labels, pixels)


def noise() -> ImageData:
    parts = [split(80, 0), split(18, 1), split(18, 2)]
    return ImageData("noise", ("a", "b", "c"), *parts, (0.5,) * 3, (0.5,) * 3, 8, False, "digits", "none")


def network() -> nn.Module:
    layers = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Dropout(0.2), nn.Linear(144, 3)]
    return nn.Sequential(*layers)


def loaders(training: Training = TRAINING, seed: int = 0) -> Loaders:
    return make_loaders(noise(), batch_size=training.batch_size, seed=seed)


def stage(name: str, model: nn.Module, training: Training = TRAINING, **changes) -> Stage:
    made = Stage(
        name,
        train=(model,),
        forward=lambda batch: {"logits": model(batch.images)},
        loss=lambda outputs, batch: {"ce": cross_entropy(outputs["logits"], batch.labels)},
        data=loaders(training),
        training=training,
    )
    return replace(made, **changes)


def two_stages(training: Training = TRAINING) -> Iterator:
    """A network, then a head on top of it: what the second stage builds depends on random numbers drawn in between."""
    first = network()
    yield stage("first", first, training)
    second = nn.Sequential(first, nn.Linear(3, 3))
    yield stage("second", second, training)
    return second


def folder_after(path: Path, training: Training = TRAINING, **keywords) -> tuple[list[dict], dict]:
    """Runs (or resumes) the two stages; metrics without the times, and the final weights."""
    path.mkdir(exist_ok=True)
    model = Run(path, CPU, Options(), seed=7, **keywords).complete(two_stages(training))
    return lines(path), {name: value.clone() for name, value in model.state_dict().items()}


def lines(path: Path) -> list[dict]:
    timeless = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("seconds", "images_per_s")} for line in timeless]


def equal(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


class Crash(BaseException):
    """What kill -9 looks like from inside: nothing catches it."""


def test_a_stage_learns_and_writes_one_line_an_epoch(tmp_path: Path):
    metrics, _ = folder_after(tmp_path, replace(TRAINING, epochs=8))
    assert [(line["stage"], line["epoch"]) for line in metrics] == [(s, e + 1) for s in ("first", "second") for e in range(8)]
    assert metrics[-1]["val/top1"] > 0.9
    assert metrics[0].keys() >= {"lr", "train/loss", "train/ce", "train/top1", "val/loss", "val/ce", "val/top1", "val/top5", "best"}


@pytest.mark.parametrize(("keep", "epoch"), [("best", 2), ("last", 5)])
def test_the_best_epoch_is_kept_or_the_last_where_asked(tmp_path: Path, keep: str, epoch: int):
    model, data, seen = network(), loaders(), {}

    def loss(outputs, batch):
        now = data.train.state_dict()["epoch"]
        seen[now] = {name: value.clone() for name, value in model.state_dict().items()}
        return {"ce": cross_entropy(outputs["logits"], batch.labels), "score": torch.tensor([3.0, 1.0, 2.0, 4.0, 5.0][now])}

    def one():
        return (yield stage("s", model, replace(TRAINING, epochs=5), best="val/score", keep=keep, data=data, loss=loss))

    result = Run(tmp_path, CPU, Options()).complete(one())
    assert result.epoch == epoch
    assert equal(model.state_dict(), seen[epoch - 1])
    result.restore("last")
    assert equal(model.state_dict(), seen[4])
    result.restore("best")
    assert equal(model.state_dict(), seen[1])


def test_a_run_killed_at_any_write_resumes_to_the_same_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    expected, weights = folder_after(tmp_path / "whole")
    real = os.replace
    for n in range(100):
        calls = 0

        def dying(source, target, *, n=n):
            nonlocal calls
            calls += 1
            if calls == n + 1:
                raise Crash
            real(source, target)

        path = tmp_path / f"killed{n}"
        monkeypatch.setattr(os, "replace", dying)
        try:
            folder_after(path)
        except Crash:
            crashed = True
        else:
            crashed = False
        monkeypatch.setattr(os, "replace", real)
        metrics, resumed = folder_after(path)
        assert metrics == expected, f"killed at write {n + 1}"
        assert equal(resumed, weights), f"killed at write {n + 1}"
        if not crashed:
            break
    assert n >= 12, "too few writes were tried"


@pytest.mark.parametrize("after", [1, 7, 12])
def test_a_stop_request_within_an_epoch_saves_and_resumes_to_the_same_numbers(tmp_path: Path, after: int):
    training = replace(TRAINING, ema=0.9, clip_norm=1.0, optimizer="lion", lr=1e-2)
    expected, weights = folder_after(tmp_path / "whole", training)
    stop, steps = StopRequest(), 0

    class Counting(StopRequest):
        def __bool__(self) -> bool:
            nonlocal steps
            steps += 1
            if steps == after:
                self.signal_number = 15
            return self.signal_number is not None

    with pytest.raises(Interrupted):
        folder_after(tmp_path / "stopped", training, stop=Counting())
    assert len(lines(tmp_path / "stopped")) < len(expected) if (tmp_path / "stopped" / "metrics.jsonl").exists() else True
    metrics, resumed = folder_after(tmp_path / "stopped", training, stop=stop)
    assert metrics == expected
    assert equal(resumed, weights)


def test_a_finished_run_trains_nothing_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    expected, weights = folder_after(tmp_path)
    monkeypatch.setattr(nn.Module, "train", lambda self, mode=True: pytest.fail("trained again") if mode else self)
    metrics, again = folder_after(tmp_path)
    assert metrics == expected
    assert equal(again, weights)


def test_a_non_finite_loss_names_stage_step_and_term_and_keeps_the_checkpoint(tmp_path: Path):
    model, seen = network(), 0

    def loss(outputs, batch):
        nonlocal seen
        seen += model.training
        bad = torch.tensor(float("nan")) if seen == 8 and model.training else torch.tensor(0.0)
        return {"ce": cross_entropy(outputs["logits"], batch.labels), "odd": bad}

    def one():
        yield stage("s", model, loss=loss)

    with pytest.raises(NonFiniteLoss, match=r"stage s: the loss term 'odd' is not finite at epoch 2, step 3"):
        Run(tmp_path, CPU, Options()).complete(one())
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert saved["epoch"] == 1
    assert all(value.isfinite().all() for value in saved["weights"].values())


@pytest.mark.parametrize("couples_rows", [False, True])
def test_micro_batches_give_the_gradient_of_the_whole_batch(tmp_path: Path, couples_rows: bool):
    def weights_after(micro: int | None) -> dict:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.Tanh(), nn.Dropout(0.0), nn.Linear(8, 3)).double()
        training = replace(TRAINING, epochs=1, micro_batch=micro)

        def loss(outputs, batch):
            rows = outputs["logits"]
            if couples_rows:
                return {"spread": (rows @ rows.T).logsumexp(dim=1).mean()}
            return {"square": (rows - batch.labels[:, None]).square().mean()}

        def one():
            yield stage(
                "s",
                model,
                training,
                forward=lambda batch: {"logits": model(batch.images.double())},
                loss=loss,
                couples_rows=couples_rows,
                best="val/loss",
            )

        path = tmp_path / str(micro)
        path.mkdir()
        Run(path, CPU, Options()).complete(one())
        return model.state_dict()

    whole, parts = weights_after(None), weights_after(5)
    for name in whole:
        assert torch.allclose(whole[name], parts[name], rtol=1e-12, atol=1e-14)


def test_validation_passes_micro_batches_through_the_network_and_gives_its_losses_the_whole_batch(tmp_path: Path):
    def trained(micro: int | None) -> tuple[dict, int]:
        torch.manual_seed(0)
        model, sizes = nn.Sequential(nn.Flatten(), nn.Linear(192, 3)).double(), []

        def forward(batch):
            sizes.append(len(batch.labels))
            return {"logits": model(batch.images.double())}

        def loss(outputs, batch):
            return {"spread": (outputs["logits"] @ outputs["logits"].T).logsumexp(dim=1).mean()}

        def one():
            training = replace(TRAINING, epochs=1, micro_batch=micro, lr=1e-3)
            yield stage("s", model, training, forward=forward, loss=loss, couples_rows=True, best="val/loss")

        (folder := tmp_path / str(micro)).mkdir()
        Run(folder, CPU, Options()).complete(one())
        (line,) = lines(folder)
        return {name: value for name, value in line.items() if name.startswith("val/")}, max(sizes)

    (whole, sixteen), (parts, five) = trained(None), trained(5)
    assert (sixteen, five) == (16, 5)
    assert parts == {name: pytest.approx(value, rel=1e-12) for name, value in whole.items()}


def test_micro_batches_give_the_mean_over_visible_labels(tmp_path: Path):
    """Dividing each part by its own labelled images would weigh them wrongly: hidden labels couple the rows of a batch."""
    ends = []
    for micro in (None, 4):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(192, 3))
        training = replace(TRAINING, epochs=1, micro_batch=micro)
        data = noise()
        labels = data.train.labels.clone()
        labels[torch.arange(80) % 5 > 0] = -100
        hidden = replace(data, train=Split(labels, data.train.pixels))
        (tmp_path / str(micro)).mkdir()
        stages = supervised("s", model, make_loaders(hidden, batch_size=16), training, hidden=True)
        Run(tmp_path / str(micro), CPU, Options()).complete(stages)
        ends.append({name: value.clone() for name, value in model.state_dict().items()})
    for name in ends[0]:
        assert torch.allclose(ends[0][name], ends[1][name], rtol=1e-5, atol=1e-6)


def test_two_passes_update_batch_norm_once_a_part_and_repeat_dropout(tmp_path: Path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))
    seen: list[torch.Tensor] = []

    def forward(batch):
        logits = model(batch.images)
        if model.training:
            seen.append(logits.detach().clone())
        return {"logits": logits}

    training = replace(TRAINING, epochs=1, batch_size=80, micro_batch=40)

    def one():
        yield stage("s", model, training, forward=forward, couples_rows=True)

    Run(tmp_path, CPU, Options(compile=True)).complete(one())
    assert torch.equal(torch.cat(seen[:2]), torch.cat(seen[2:])), "the passes saw different masks"
    assert model[2].num_batches_tracked == 2


def test_two_passes_keep_what_the_loss_writes_into_a_module(tmp_path: Path):
    """A memory bank is updated once a batch, by the loss, between the passes."""
    model, bank = network(), nn.Module()
    bank.register_buffer("images", torch.zeros(()))

    def loss(outputs, batch):
        if torch.is_grad_enabled():
            bank.images += len(batch.labels)
        return {"square": outputs["logits"].square().mean()}

    def one():
        yield stage("s", model, replace(TRAINING, epochs=1, micro_batch=5), train=(model, bank), loss=loss, couples_rows=True)

    Run(tmp_path, CPU, Options()).complete(one())
    assert bank.images == 80


def test_a_memory_is_resumed_but_neither_averaged_nor_among_the_weights(tmp_path: Path):
    def trained(folder: Path, stop: StopRequest) -> nn.Module:
        folder.mkdir(exist_ok=True)
        torch.manual_seed(0)
        model, bank = network(), nn.Module()
        bank.register_buffer("images", torch.zeros(()))

        def loss(outputs, batch):
            if bank.training:
                bank.images += len(batch.labels)
            return {"square": outputs["logits"].square().mean()}

        def one():
            yield stage("s", model, replace(TRAINING, ema=0.5), memory=(bank,), loss=loss)
            return bank

        return Run(folder, CPU, Options(), stop=stop).complete(one())

    assert trained(tmp_path / "whole", StopRequest()).images == 80 * TRAINING.epochs
    stop = StopRequest()
    stop.signal_number = signal.SIGTERM
    with pytest.raises(Interrupted):
        trained(tmp_path / "stopped", stop)
    checkpoint = torch.load(tmp_path / "stopped" / "checkpoint.pt", weights_only=True)
    assert 0 < checkpoint["memory"]["0.images"] < 80 * TRAINING.epochs
    assert not any("images" in name for part in ("weights", "ema") for name in checkpoint[part])
    assert trained(tmp_path / "stopped", StopRequest()).images == 80 * TRAINING.epochs
    assert not any("images" in name for name in load_file(tmp_path / "stopped" / "stages" / "s" / "best.safetensors"))


def test_a_stage_brings_its_own_optimizer_whose_rate_is_scheduled_and_whose_state_is_resumed(tmp_path: Path):
    made = []

    def own(parameters, training):
        made.append(torch.optim.NAdam(parameters, lr=training.lr))
        return made[-1]

    def one(model):
        yield stage("s", model, optimizer=own)
        return model

    def trained(folder: Path, stop: StopRequest) -> dict:
        folder.mkdir(exist_ok=True)
        torch.manual_seed(0)
        return Run(folder, CPU, Options(), stop=stop).complete(one(network())).state_dict()

    whole = trained(tmp_path / "whole", StopRequest())
    assert [line["lr"] for line in lines(tmp_path / "whole")] == pytest.approx([0.1 * lr_factor(TRAINING, epoch) for epoch in range(3)])

    stop = StopRequest()
    stop.signal_number = signal.SIGTERM
    with pytest.raises(Interrupted):
        trained(tmp_path / "stopped", stop)
    assert equal(trained(tmp_path / "stopped", StopRequest()), whole)
    assert len(made) == 3


@pytest.mark.parametrize(
    ("best", "higher"), [("val/top1", True), ("val/top1/layer1", True), ("val/top5/x", True), ("val/loss", False), ("val/topology", False)]
)
def test_accuracies_are_better_when_higher(best, higher):
    assert stage("s", network(), best=best).higher_is_better == higher


def test_early_stop_ends_a_stage(tmp_path: Path):
    def one():
        return (yield stage("s", network(), replace(TRAINING, epochs=50, lr=1e-12, early_stop=2), best="val/loss"))

    result = Run(tmp_path, CPU, Options()).complete(one())
    assert result.epochs < 50


def test_a_metric_that_is_not_measured_is_named(tmp_path: Path):
    def one():
        yield stage("s", network(), best="val/acc")

    with pytest.raises(ValueError, match=r"best is 'val/acc', but the metrics are .*val/top1"):
        Run(tmp_path, CPU, Options()).complete(one())


def test_frozen_modules_stay_as_they_are(tmp_path: Path):
    teacher, student = network(), network()
    before = {k: v.clone() for k, v in teacher.state_dict().items()}

    def one():
        yield stage(
            "s",
            student,
            frozen=(teacher,),
            forward=lambda b: {"logits": student(b.images), "t": teacher(b.images)},
            loss=lambda o, b: {"mse": (o["logits"] - o["t"]).square().mean()},
        )

    Run(tmp_path, CPU, Options()).complete(one())
    assert equal(before, teacher.state_dict())


def test_bf16_and_compile_options_train(tmp_path: Path):
    def one():
        return (yield stage("s", network(), replace(TRAINING, epochs=2)))

    result = Run(tmp_path, CPU, Options(precision="bf16")).complete(one())
    assert result.metrics["val/loss"] < 1.2


# ---- schedules -------------------------------------------------------------------------------------------------------


def rates(training: Training, lr_factor=lr_factor) -> list[float]:
    return [round(lr_factor(training, epoch), 6) for epoch in range(training.epochs)]


def test_schedules():
    assert rates(Training(epochs=4, schedule="constant")) == [1, 1, 1, 1]
    assert rates(Training(epochs=5, schedule="steps", milestones=(2, 4), gamma=0.1)) == [1, 1, 0.1, 0.1, 0.01]
    cosine = rates(Training(epochs=4, schedule="cosine"))
    assert cosine == [1.0, 0.853553, 0.5, 0.146447]
    assert rates(Training(epochs=4, schedule="cosine"), lr_factor=conkd._lr_factor_from_one) == [*cosine[1:], 0.0]
    assert rates(Training(epochs=4, schedule="cosine", final_lr=0.5))[2] == 0.75
    assert rates(Training(epochs=5, schedule="cosine", warmup=3)) == [0.25, 0.5, 0.75, 1.0, 0.5]


def test_plateau_lowers_the_rate(tmp_path: Path):
    def one():
        training = Training(epochs=8, batch_size=16, schedule="plateau", plateau_patience=1, warmup=1)
        yield stage("s", network(), training, best="val/score", loss=loss)

    def loss(outputs, batch):
        return {"ce": cross_entropy(outputs["logits"], batch.labels), "score": torch.zeros(())}

    Run(tmp_path, CPU, Options()).complete(one())
    rates = [round(line["lr"] / TRAINING.lr, 6) for line in lines(tmp_path)]
    # half the rate to warm up, then two epochs without improvement before each tenth
    assert rates == [0.25, 0.5, 0.5, 0.05, 0.05, 0.005, 0.005, 0.0005]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"lr": 0.0}, "lr must be positive"),
        ({"weight_decay": -1.0}, "weight_decay must not be negative"),
        ({"warmup": 240}, "warmup must be from 0 to below epochs"),
        ({"ema": 1.0}, "ema must be between 0 and 1"),
        ({"gamma": -1.0}, "gamma must be between 0 and 1, got -1.0"),
        ({"momentum": 2.0}, "momentum must be between 0 and 1"),
        ({"early_stop": 0}, "early_stop must be at least 1"),
        ({"clip_norm": 0.0}, "clip_norm must be positive"),
        ({"micro_batch": 0}, "micro_batch must be at least 1"),
    ],
)
def test_bad_training_options_are_named(values: dict, message: str):
    with pytest.raises(ValueError, match=message):
        Training(**values)


def test_optimizers_by_name():
    parameters = [nn.Parameter(torch.ones(3))]
    names = {kind: type(make_optimizer(parameters, Training(optimizer=kind))).__name__ for kind in ("sgd", "adamw", "lion")}
    assert names == {"sgd": "SGD", "adamw": "AdamW", "lion": "Lion"}


# ---- metrics ---------------------------------------------------------------------------------------------------------


def test_term_meter_weighs_by_rows():
    meter = TermMeter(CPU.device)
    meter.add({"a": torch.tensor(1.0), "b": torch.tensor(2.0)}, rows=3, step=1)
    meter.add({"a": torch.tensor(5.0), "b": torch.tensor(2.0)}, rows=1, step=2)
    assert meter.averages("train", CPU) == {"train/loss": 4.0, "train/a": 2.0, "train/b": 2.0}


def test_a_term_that_validation_leaves_out_is_no_part_of_its_loss():
    meter = TermMeter(CPU.device, ("a", "b"))
    meter.add({"a": torch.tensor(1.0)}, rows=3, step=1)
    meter.add({"a": torch.tensor(5.0)}, rows=1, step=2)
    assert meter.averages("val", CPU) == {"val/loss": 2.0, "val/a": 2.0}


def test_a_term_that_comes_late_is_an_error_and_one_that_is_left_out_is_remembered():
    meter = TermMeter(CPU.device)
    meter.add({"a": torch.tensor(1.0), "b": torch.tensor(2.0)}, rows=3, step=1)
    meter.add({"a": torch.tensor(5.0)}, rows=1, step=2)
    with pytest.raises(ValueError, match="the term 'c' is new; the first step had a, b"):
        meter.add({"c": torch.tensor(1.0)}, rows=1, step=3)
    resumed = TermMeter(CPU.device)
    resumed.load_state_dict(meter.state_dict())
    assert resumed.averages("train", CPU) == meter.averages("train", CPU) == {"train/loss": 4.0, "train/a": 2.0, "train/b": 2.0}


def test_term_meter_weighs_a_mean_over_some_rows_by_those():
    meter = TermMeter(CPU.device)
    meter.add({"a": Mean(torch.tensor(6.0), torch.tensor(2)), "b": torch.tensor(2.0)}, rows=8, step=1)
    meter.add({"a": Mean(torch.tensor(0.0), torch.tensor(0)), "b": torch.tensor(6.0)}, rows=8, step=2)
    meter.add({"a": 0.5 * Mean(torch.tensor(6.0), 1), "b": torch.tensor(1.0)}, rows=4, step=3)
    meter.add({"b": torch.tensor(5.0)}, rows=4, step=4)
    assert meter.averages("train", CPU) == {"train/loss": 5 + 11 / 3, "train/a": 5.0, "train/b": 11 / 3}
    resumed = TermMeter(CPU.device)
    resumed.load_state_dict(meter.state_dict())
    assert resumed.averages("train", CPU) == meter.averages("train", CPU)


@pytest.mark.parametrize("micro", [None, 5])
def test_training_cross_entropy_is_the_mean_over_the_labelled_images(tmp_path: Path, micro: int | None):
    """Batches without a label say nothing of it, and those with few say little."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 3))
    training = Training(epochs=1, batch_size=16, micro_batch=micro, lr=1e-12, schedule="constant")
    data = noise()
    labels = data.train.labels.clone()
    labels[5:] = -100
    shown = make_loaders(replace(data, train=Split(labels, data.train.pixels)), batch_size=16)
    Run(tmp_path, CPU, Options()).complete(supervised("s", model, shown, training, hidden=True))
    batch = next(shown.train.in_order())
    expected = nn.functional.cross_entropy(model(batch.images[:5]), batch.labels[:5]).item()
    (line,) = lines(tmp_path)
    assert line["train/ce"] == pytest.approx(expected, rel=1e-5)
    assert line["train/loss"] == line["train/ce"]


def test_accuracy_leaves_out_hidden_labels():
    meter = AccuracyMeter(CPU.device)
    logits = torch.arange(6.0).expand(6, 6)
    meter.add({"logits": logits, "logits/a": -logits, "other": logits}, torch.tensor([5, 4, 0, -100, -100, -100]))
    third, two = pytest.approx(1 / 3), pytest.approx(2 / 3)
    assert meter.accuracy("val", CPU) == {"val/top1": third, "val/top5": two, "val/top1/a": third, "val/top5/a": two}


def test_evaluate_counts_by_hand():
    data = loaders()
    result = evaluate(lambda images: images.mean(dim=(2, 3)) * 50, data.test, ("a", "b", "c"), CPU)
    assert (result.top1, result.images) == (1.0, 18)
    assert result.confusion == [[6, 0, 0], [0, 6, 0], [0, 0, 6]]
    with pytest.raises(ValueError, match="has 4 classes"):
        evaluate(lambda images: images.mean(dim=(2, 3)), data.test, ("a", "b", "c", "d"), CPU)


def test_evaluate_tells_this_devices_speed_not_that_of_all_processes(monkeypatch: pytest.MonkeyPatch):
    """As where another process has as many images: the counts are summed, the seconds are one's own."""
    data = loaders()
    monkeypatch.setattr(World, "sum", lambda self, values: values.mul_(2))
    clock = iter(range(100))
    monkeypatch.setattr("kdfast.engine.metrics._now", lambda device: float(next(clock)))
    result = evaluate(lambda images: images.mean(dim=(2, 3)), data.test, ("a", "b", "c"), CPU)
    assert result.images == 36
    assert result.images_per_s == 18 / len(data.test)


# ---- logs and compilation --------------------------------------------------------------------------------------------


def test_tensorboard_is_told_every_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    told: list[tuple] = []

    class Writer:
        def __init__(self, folder: str):
            assert folder == str(tmp_path / "tensorboard")

        def add_scalar(self, name: str, value: float, epoch: int) -> None:
            told.append((name, value, epoch))

        def flush(self) -> None:
            pass

        def close(self) -> None:
            told.append(("closed",))

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=Writer))
    (log,) = logs(["tensorboard"])
    with log(tmp_path) as observer:
        folder_after(tmp_path, observers=[observer])
    assert told.pop() == ("closed",)
    expected = [(f"{line['stage']}/val/top1", line["val/top1"], line["epoch"]) for line in lines(tmp_path)]
    assert [entry for entry in told if entry[0].endswith("val/top1")] == expected


def test_weights_and_biases_continues_a_run_and_tells_runs_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    made, ended = [], []

    def init(**keywords):
        made.append(keywords)
        return SimpleNamespace(log=lambda numbers: None, finish=lambda exit_code: ended.append(exit_code))

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    (log,) = logs(["wandb"])
    for folder in ("a/kd", "a/kd", "b/kd"):  # the second time resumed
        with log(tmp_path / folder) as observer:
            observer({"stage": "s", "epoch": 1, "epochs": 1, "best": True, "val/top1": 0.5})
    with pytest.raises(Crash), log(tmp_path / "a/kd"):
        raise Crash
    first, resumed, other, crashed = (keywords["id"] for keywords in made)
    assert first == resumed == crashed != other
    assert ended == [0, 0, 0, 1]


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_missing_logger_is_one_sentence(monkeypatch: pytest.MonkeyPatch, name: str):
    for module in ("torch.utils.tensorboard", "wandb"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf"log {name} needs .*{name}: pip install 'kdfast\[{name}\]'"):
        logs([name])


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
def test_a_compiled_stage_follows_the_eager_one(tmp_path: Path):
    ends = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.ReLU(), nn.Linear(8, 3))
        (tmp_path / str(compiled)).mkdir()

        def one(model=model):
            return (yield stage("s", model, replace(TRAINING, epochs=2)))

        result = Run(tmp_path / str(compiled), CPU, Options(compile=compiled)).complete(one())
        ends.append((result.metrics["val/loss"], model[1].weight.detach().clone()))
    assert ends[0][0] == pytest.approx(ends[1][0], rel=1e-4)
    assert torch.allclose(ends[0][1], ends[1][1], rtol=1e-3, atol=1e-5)
