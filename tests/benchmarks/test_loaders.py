"""kdfast bench loaders: both sides do the same work, on a user's own images or on generated ones."""

import json
import statistics
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from kdfast.benchmarks import loaders
from kdfast.benchmarks.loaders import Loaders, make_photographs, run
from kdfast.data import Batch, load, training_transform
from kdfast.data.loaders import dali_installed


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photographs")
    make_photographs(folder, 8)
    return folder


def test_generated_photographs_weigh_what_real_ones_do(photographs):
    files = sorted(photographs.rglob("*.jpg"))
    assert {path.parent.name for path in files} == {"class0", "class1"}
    assert len({path.read_bytes() for path in files}) == 8
    for path in files:
        with Image.open(path) as image:
            assert image.size == (500, 375)
    bits = statistics.mean(8 * path.stat().st_size / (500 * 375) for path in files)
    assert 3 < bits < 6, "ImageNet's have about 4.4 bits a pixel"


def test_a_folder_of_ones_own(photographs, tmp_path, capsys):
    out = tmp_path / "x.json"
    cases = run(Loaders(data_dir=photographs, workers=1, images=6, image_size=32, batch_size=2, epochs=1, device="cpu", out=out))
    expected = [("torchvision", 0, 0), ("torchvision", 1, 1)]
    assert [(case["loader"], case["workers"], case["peer_workers"]) for case in cases][:2] == expected
    assert [case["loader"] for case in cases[2:]] == ["dali"] * dali_installed()
    for case in cases:
        assert (case["name"], case["images"], case["image_size"]) == (photographs.name, 6, 32)
        assert min(case["images_per_s"], case["peer_images_per_s"], case["speedup"]) > 0
        assert case["speedup"] == pytest.approx(case["images_per_s"] / case["peer_images_per_s"], rel=0.01)
    assert json.loads(out.read_text())["cases"] == cases
    assert photographs.name in capsys.readouterr().out


def test_without_a_folder_images_are_generated_and_removed(monkeypatch, capsys):
    made = []
    monkeypatch.setattr(loaders, "GENERATED", 8)
    monkeypatch.setattr(loaders, "make_photographs", lambda folder, count: made.append(folder) or make_photographs(folder, count))
    cases = run(Loaders(workers=0, images=8, image_size=32, batch_size=4, epochs=1, device="cpu"))
    assert [(case["name"], case["loader"]) for case in cases if case["loader"] != "dali"] == [
        ("generated photographs", "torchvision"),
        ("generated 32x32", "torchvision"),
        ("generated 32x32", "resident"),
    ]
    assert [case["images"] for case in cases if case["name"] == "generated 32x32"] == [80, 80]
    assert not made[0].exists()


def test_both_sides_hand_out_the_same_kind_of_batch(photographs):
    data = load(str(photographs), val_fraction=0)
    theirs, label = loaders._theirs(data, 32)[0]
    ours = training_transform("imagenet", 32, data.mean, data.std)(data.train.read(0))
    assert theirs.shape == ours.shape == (3, 32, 32)
    assert theirs.dtype == ours.dtype == torch.float32
    assert label == data.train.labels[0]
    # random crops differ, but both have passed the same normalization
    assert abs(theirs.mean() - ours.mean()) < 0.5
    assert theirs.min() >= (0 - torch.tensor(data.mean)).div(torch.tensor(data.std)).min() - 1e-6


@pytest.mark.filterwarnings("ignore")  # CIFAR with some of its batches
def test_named_data_sets_are_found_beside_each_other(real_data):
    names = [name for name, _ in loaders._sources(Loaders(data_dir=real_data, images=50), real_data)]
    assert names == ["imagenette", "cifar10"]


class Loader(list):
    """Batches, each of which takes some seconds of the clock."""

    def __init__(self, clock, seconds):
        super().__init__(range(10))
        self.clock, self.seconds = clock, seconds

    def __iter__(self):
        for batch in range(10):
            self.clock.now += self.seconds
            yield batch

    def set_epoch(self, epoch):
        pass


def test_waiting_is_the_time_that_a_slow_loader_adds(monkeypatch):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(loaders.timing.time, "perf_counter", lambda: clock.now)

    def step(batch):
        clock.now += 1.0

    assert [loaders.waiting_share(Loader(clock, seconds), step, torch.device("cpu")) for seconds in (0.0, 3.0)] == [0.0, 0.75]


def test_a_resnet18_takes_a_step_with_a_batch():
    batch = Batch(torch.randn(2, 3, 32, 32), torch.tensor([0, 2]), torch.tensor([0, 1]))
    loaders.resnet18_step(torch.device("cpu"), 3)(batch)
