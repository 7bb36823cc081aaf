"""Meters of loss terms and accuracies, and the evaluation of a classifier."""

import pytest
import torch

from kdfast.data import Batch
from kdfast.engine import Mean, World, evaluate
from kdfast.engine.metrics import AccuracyMeter, TermMeter
from tests.engine.small import CPU, loaders


def meter(*steps: tuple[dict, int], names: tuple[str, ...] = ()) -> TermMeter:
    """A meter after steps of (terms, rows), restored from its state."""
    added, restored = TermMeter(CPU.device, names), TermMeter(CPU.device)
    for number, (terms, rows) in enumerate(steps, start=1):
        added.add({k: v if isinstance(v, Mean) else torch.tensor(v) for k, v in terms.items()}, rows, number)
    restored.load_state_dict(added.state_dict())
    return restored


def test_terms_are_averaged_over_their_own_rows():
    found = meter(({"a": 1.0, "b": 2.0}, 3), ({"a": 5.0}, 1))
    assert found.averages("train", CPU) == {"train/loss": 4.0, "train/a": 2.0, "train/b": 2.0}
    assert meter(({"a": 1.0}, 3), names=("a", "b")).averages("val", CPU) == {"val/loss": 1.0, "val/a": 1.0}
    with pytest.raises(ValueError, match="the term 'c' is new; the first step had a, b"):
        found.add({"c": torch.tensor(1.0)}, rows=1, step=3)


def test_term_meter_weights_a_mean_over_some_rows_by_those_rows():
    some, none = Mean(torch.tensor(6.0), torch.tensor(2)), Mean(torch.tensor(0.0), torch.tensor(0))
    found = meter(({"a": some, "b": 2.0}, 8), ({"a": none, "b": 6.0}, 8), ({"a": 0.5 * Mean(some.value, 1), "b": 1.0}, 4), ({"b": 5.0}, 4))
    assert found.averages("train", CPU) == {"train/loss": 5 + 11 / 3, "train/a": 5.0, "train/b": 11 / 3}


def test_accuracy_leaves_out_hidden_labels():
    accuracy = AccuracyMeter(CPU.device)
    logits = torch.arange(6.0).expand(6, 6)
    accuracy.add({"logits": logits, "logits/a": -logits, "other": logits}, torch.tensor([5, 4, 0, -100, -100, -100]))
    third, two = pytest.approx(1 / 3), pytest.approx(2 / 3)
    assert accuracy.accuracy("val", CPU) == {"val/top1": third, "val/top5": two, "val/top1/a": third, "val/top5/a": two}


def test_evaluate_counts_by_hand():
    def brightest(images):
        return images.mean(dim=(2, 3)) * 50

    data = loaders()
    result = evaluate(brightest, data.test, ("a", "b", "c"), CPU)
    assert (result.top1, result.images) == (1.0, 18)
    assert result.confusion == [[6, 0, 0], [0, 6, 0], [0, 0, 6]]
    with pytest.raises(ValueError, match="has 4 classes"):
        evaluate(brightest, data.test, ("a", "b", "c", "d"), CPU)


def test_evaluate_takes_the_logits_of_a_dictionary():
    batch = Batch(torch.zeros(2, 3, 8, 8), torch.tensor([0, 1]), torch.tensor([0, 1]))
    result = evaluate(lambda x: {"logits": torch.eye(2), "features": x}, [batch], ("a", "b"), CPU)
    assert result.confusion == [[1, 0], [0, 1]]


def test_evaluate_returns_the_speed_of_this_device_not_of_all_processes(monkeypatch: pytest.MonkeyPatch):
    """Two processes with as many images: the counts are summed, the seconds are the process's own."""
    data, clock = loaders(), iter(range(100))
    monkeypatch.setattr(World, "sum", lambda self, values: values.mul_(2))
    monkeypatch.setattr("kdfast.engine.metrics._now", lambda device: float(next(clock)))
    result = evaluate(lambda images: images.mean(dim=(2, 3)), data.test, ("a", "b", "c"), CPU)
    assert result.images == 36
    assert result.images_per_s == 18 / len(data.test)


def test_the_first_pass_of_a_shape_is_not_timed(monkeypatch: pytest.MonkeyPatch):
    seconds, now = iter([100.0, 1.0, 100.0, 1.0]), [0.0]  # of each call: cold and warm, for 16 images and for the last 2

    def model(images):
        now[0] += next(seconds)
        return images.mean(dim=(2, 3))

    monkeypatch.setattr("kdfast.engine.metrics._now", lambda device: now[0])
    assert evaluate(model, loaders().test, ("a", "b", "c"), CPU).images_per_s == 18 / 2
