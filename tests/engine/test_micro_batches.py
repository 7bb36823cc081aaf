"""Micro-batches give the gradient and the metrics of the whole batch."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from kdfast.data import make_loaders
from kdfast.engine import Options
from kdfast.recipes.supervised import supervised
from tests.engine.small import TRAINING, close, copy, fit, hide_labels, linear, lines, network, stage


def spread(outputs, batch):
    """Couples the rows of a batch."""
    return {"spread": (outputs["logits"] @ outputs["logits"].T).logsumexp(dim=1).mean()}


def square(outputs, batch):
    return {"square": (outputs["logits"] - batch.labels[:, None]).square().mean()}


@pytest.mark.parametrize("loss", [square, spread])
def test_micro_batches_give_weights_and_metrics_of_the_whole_batch(tmp_path: Path, loss):
    """Validation also passes micro-batches through the network, and gives its loss the whole batch."""
    ends = []
    for micro in (None, 5):
        model, sizes = linear().double(), []

        def forward(batch, model=model, sizes=sizes):
            sizes.append(len(batch.labels))
            return {"logits": model(batch.images.double())}

        training = replace(TRAINING, epochs=1, micro_batch=micro, lr=1e-3)
        fit(tmp_path / str(micro), stage("s", model, training, forward=forward, loss=loss, couples_rows=loss is spread, best="val/loss"))
        (line,) = lines(tmp_path / str(micro))
        assert max(sizes) == (4 if micro else 16), "no image is left over"
        ends.append((copy(model), {name: value for name, value in line.items() if name.endswith(("loss", "spread", "square"))}))
    (whole, metrics), (parts, metrics_of_parts) = ends
    assert close(whole, parts, rtol=1e-12, atol=1e-14)
    assert metrics_of_parts == pytest.approx(metrics, rel=1e-9)


def test_micro_batches_give_the_mean_over_visible_labels(tmp_path: Path):
    """Dividing each part by its own labelled images would weight them wrongly: hidden labels couple the rows of a batch."""
    ends = []
    for micro in (None, 4):
        model = linear()
        data = make_loaders(hide_labels(torch.arange(80) % 5 > 0), batch_size=16)
        fit(tmp_path / str(micro), supervised("s", model, data, replace(TRAINING, epochs=1, micro_batch=micro), hidden=True))
        ends.append(copy(model))
    assert close(*ends, rtol=1e-5, atol=1e-6)


def test_two_passes_update_batch_norm_once_a_part_and_repeat_dropout(tmp_path: Path):
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))
    seen: list[torch.Tensor] = []

    def forward(batch):
        logits = model(batch.images)
        if model.training:
            seen.append(logits.detach().clone())
        return {"logits": logits}

    training = replace(TRAINING, epochs=1, batch_size=80, micro_batch=40)
    fit(tmp_path, stage("s", model, training, forward=forward, couples_rows=True), Options(compile=True))
    assert torch.equal(torch.cat(seen[:2]), torch.cat(seen[2:])), "the passes drew different masks"
    assert model[2].num_batches_tracked == 2


def test_two_passes_keep_the_buffers_that_the_loss_writes(tmp_path: Path):
    """The loss updates a memory bank once a batch, between the passes."""
    model, bank = network(), nn.Module()
    bank.register_buffer("images", torch.zeros(()))

    def loss(outputs, batch):
        if torch.is_grad_enabled():
            bank.images += len(batch.labels)
        return {"square": outputs["logits"].square().mean()}

    training = replace(TRAINING, epochs=1, micro_batch=5)
    fit(tmp_path, stage("s", model, training, train=(model, bank), loss=loss, couples_rows=True))
    assert bank.images == 80


@pytest.mark.parametrize(
    ("micro", "images", "processes", "sizes"),
    [
        (None, 7, 1, [7]),
        (None, 1, 1, [1]),
        (4, 3, 1, [3]),
        (4, 8, 1, [4, 4]),
        (4, 10, 1, [4, 4, 2]),
        (4, 9, 1, [3, 3, 3]),
        (32, 65, 1, [22, 22, 21]),
        (2, 5, 1, [2, 2, 1]),
        (1, 2, 1, [1, 1]),
        (8, 9, 2, [3, 3, 3]),
    ],
)
def test_no_forward_pass_has_a_single_image_where_that_can_be(micro, images, processes, sizes):
    assert replace(TRAINING, micro_batch=micro).split_batch(images, processes) == sizes


def test_a_left_over_image_trains_batch_norm(tmp_path: Path):
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    fit(tmp_path, stage("s", model, replace(TRAINING, epochs=1, batch_size=16, micro_batch=5)))


@pytest.mark.parametrize("micro", [None, 5])
def test_training_cross_entropy_is_the_mean_over_the_labelled_images(tmp_path: Path, micro: int | None):
    """Batches without a label do not count, and batches with few count little."""
    model, data = linear(), make_loaders(hide_labels(torch.arange(80) >= 5), batch_size=16)
    training = replace(TRAINING, epochs=1, micro_batch=micro, lr=1e-12)
    fit(tmp_path, supervised("s", model, data, training, hidden=True))
    batch = next(data.train.in_order())
    (line,) = lines(tmp_path)
    expected = nn.functional.cross_entropy(model(batch.images[:5]), batch.labels[:5]).item()
    assert line["train/loss"] == line["train/ce"] == pytest.approx(expected, rel=1e-5)
