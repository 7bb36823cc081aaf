"""What the three loaders promise together: labels, counts and order alike, on one and two ranks, over a folder with bad files in it."""

from pathlib import Path

import pytest
import torch

from kdfast.data import DataError, load, make_loaders, usable
from kdfast.data.loaders import dali_installed
from tests.data.test_check import BAD, GOOD, SPECIAL, encoded, picture, plant

NAMES = [
    "resident",
    "torchvision",
    pytest.param("dali", marks=pytest.mark.skipif(not dali_installed(), reason="NVIDIA DALI is not installed: pip install kdfast[dali]")),
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes of good files of all kinds and sizes in train/ and val/, and every kind of bad file in one of them."""
    for split in ("train", "val"):
        for kind in ("cat", "dog"):
            (tmp_path / split / kind).mkdir(parents=True)
            for i in range(7):
                (tmp_path / split / kind / f"{i}.jpg").write_bytes(encoded("JPEG", picture(24 + i, 32 - i, seed=i)))
    for name, (content, _) in GOOD.items():
        (tmp_path / "train" / "cat" / name).write_bytes(content)
    for name in [*BAD, *SPECIAL]:
        plant(tmp_path / "train" / "dog" / "bad", name)
    return tmp_path


def loaders(folder: Path, name: str, **options):
    data = usable(load(str(folder), val_fraction=0), max_bad_files=len(BAD) + len(SPECIAL), say=lambda line: None)
    return data, make_loaders(data, batch_size=4, image_size=16, loader=name, workers=1, **options)


def test_at_least_twelve_kinds_are_planted_and_each_is_named(folder: Path):
    said: list[str] = []
    usable(load(str(folder), val_fraction=0), max_bad_files=99, say=said.append)
    assert len(BAD) + len(SPECIAL) >= 12
    assert all(" ".join(said).count(f"{name} (") == 1 for name in [*BAD, *SPECIAL])
    with pytest.raises(DataError, match=r"14 image files are bad, where --max-bad-files allows 13"):
        usable(load(str(folder), val_fraction=0), max_bad_files=13)


@pytest.mark.parametrize("name", NAMES)
def test_no_loader_meets_a_bad_file(folder: Path, name: str):
    data, made = loaders(folder, name)
    assert not any("/bad/" in path for path in data.train.paths)
    for loader, split in ((made.train, data.train), (made.test, data.test)):
        seen = [batch for _ in range(2) for batch in loader]
        assert all(batch.images.shape[1:] == (3, 16, 16) and batch.images.isfinite().all() for batch in seen)
        assert all(torch.equal(batch.labels, split.labels[batch.index]) for batch in seen)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("world_size", [1, 2])
def test_every_sample_once_an_epoch_on_all_ranks(folder: Path, name: str, world_size: int):
    ranks = [loaders(folder, name, rank=rank, world_size=world_size)[1] for rank in range(world_size)]
    for part in ("train", "val", "test"):
        index = torch.cat([batch.index for made in ranks for batch in getattr(made, part)])
        assert len(index) == len(index.unique()) == sum(getattr(made, part).samples for made in ranks)
        if part != "train":  # training leaves out what fills no batch
            assert index.sort().values.tolist() == list(range(14))


@pytest.mark.parametrize("name", NAMES)
def test_order_and_labels_are_the_same_in_all(folder: Path, name: str):
    (_, ours), (_, theirs) = loaders(folder, name, seed=3), loaders(folder, "torchvision", seed=3)
    for _ in range(2):
        for a, b in zip(ours.train, theirs.train, strict=True):
            assert torch.equal(a.index, b.index)
            assert torch.equal(a.labels, b.labels)
    for a, b in zip(ours.test, theirs.test, strict=True):
        assert torch.equal(a.index, b.index)
        grey = (a.images - b.images).abs().mean() * 255 * 0.225  # ImageNet's least deviation
        assert grey < 1


@pytest.mark.parametrize("name", NAMES)
def test_all_images_in_order_on_every_rank(folder: Path, name: str):
    data, made = loaders(folder, name, rank=1, world_size=2, seed=3)
    assert not made.train.deterministic
    assert made.val.deterministic
    made.train.set_epoch(2)
    batches = {int(i): image for batch in made.train for i, image in zip(batch.index, batch.images)}
    made.train.set_epoch(2)
    iteration = iter(made.train)
    next(iteration)
    iteration.close()
    found = list(made.train.in_order())
    assert torch.cat([batch.index for batch in found]).tolist() == list(range(len(data.train)))
    assert torch.equal(torch.cat([batch.labels for batch in found]), data.train.labels)
    assert torch.equal(made.train.labels, data.train.labels)
    images = torch.cat([batch.images for batch in found])
    assert all(torch.equal(images[i], image) for i, image in batches.items()), "of the epoch under way"
    assert made.train.state_dict() == {"epoch": 2, "batch": 1}
    rest = torch.cat([batch.index for batch in made.train])
    assert len(rest) == made.train.samples - 4, "the epoch goes on"


@pytest.mark.parametrize("name", NAMES)
def test_a_micro_batch_is_the_most_that_a_network_is_given_without_a_gradient(folder: Path, name: str):
    _, whole = loaders(folder, name)
    _, made = loaders(folder, name, micro_batch=3)
    for part, most in ((made.train, 4), (made.val, 4), (made.test, 3), (made.train.in_order(), 3), (made.val.in_order(), 3)):
        assert max(len(batch.labels) for batch in part) == most
    for a, b in ((made.test, whole.test), (made.val.in_order(), whole.val.in_order())):
        assert torch.equal(torch.cat([batch.images for batch in a]), torch.cat([batch.images for batch in b]))


@pytest.mark.parametrize("name", NAMES)
def test_a_resumed_epoch_goes_on_with_the_very_next_sample(folder: Path, name: str):
    _, made = loaders(folder, name)
    whole = list(made.train)
    _, begun = loaders(folder, name)
    for batch, _ in zip(begun.train, range(2)):
        assert len(batch.labels) == 4
    _, again = loaders(folder, name)
    again.train.load_state_dict(begun.train.state_dict())
    rest = list(again.train)
    done = begun.train.state_dict()["batch"]
    assert len(rest) == len(whole) - done
    assert all(torch.equal(x, y) for a, b in zip(rest, whole[done:]) for x, y in zip(a, b))
