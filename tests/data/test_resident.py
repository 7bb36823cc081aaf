"""The resident loader alone: torchvision's batches bit for bit, images of many sizes, sharing, memory."""

import gc
import weakref

import pytest
import torch

from kdfast.data import (
    DataError,
    evaluation_names,
    evaluation_transform,
    hide_labels,
    training_names,
    training_transform,
)
from kdfast.data.images import decode
from kdfast.data.loaders import resident
from tests.data.samples import HALF, LEVELS, join_images, make_loader, make_split, same, write_pngs

AUGMENT = training_transform("cifar", 8, *HALF)


def resident_of(split, transform=AUGMENT, batch_size=4, **options):
    return make_loader("resident", split, transform, batch_size, **options)


@pytest.mark.parametrize("name", evaluation_names())
@pytest.mark.parametrize("in_memory", [False, True])
def test_evaluation_gives_torchvisions_batches_bit_for_bit(tmp_path, name, in_memory):
    split = write_pngs(tmp_path, 7)[in_memory]
    transform = evaluation_transform(name, 8, *HALF)
    assert same(list(resident_of(split, transform)), list(make_loader("torchvision", split, transform)))


@pytest.mark.parametrize("name", [name for name in training_names() if name != "imagenet"])
def test_training_gives_torchvisions_batches_bit_for_bit(tmp_path, name):
    split, _ = write_pngs(tmp_path, 7)
    transform = training_transform(name, 24, *HALF)
    assert same(*(list(make_loader(kind, split, transform, views=2 if transform.random else 1)) for kind in ("resident", "torchvision")))


def test_crops_of_many_sizes_are_torchvisions_within_a_grey_level(photographs):
    transform = training_transform("imagenet", 32, *LEVELS)
    ours, theirs = (join_images(make_loader(kind, photographs, transform)) for kind in ("resident", "torchvision"))
    assert (ours - theirs).abs().max() < 1.01


def test_the_splits_own_pixels_are_not_written_to():
    split = make_split(8)
    before = split.pixels.clone()
    for name in training_names():
        for batch in resident_of(split, training_transform(name, 8, *HALF)):
            batch.images.fill_(7)
    assert torch.equal(split.pixels, before)


def test_loaders_of_the_same_images_share_them(tmp_path, monkeypatch):
    split, _ = write_pngs(tmp_path, 6)
    decoded = []
    monkeypatch.setattr("kdfast.data.splits.decode", lambda path: decoded.append(path) or decode(path))
    for labelled in (split, hide_labels(split, 0.5, seed=0), split):
        list(resident_of(labelled))
    assert sorted(decoded) == sorted(split.paths)
    store = weakref.ref(*split.stores.values())
    assert next(iter(resident_of(split, training_transform("cifar", 4, *HALF)))).images.shape[-2:] == (4, 4), "of another size are others"
    del split, labelled
    gc.collect()
    assert store() is None


def test_nothing_is_decoded_before_the_first_batch(tmp_path):
    split, _ = write_pngs(tmp_path, 3)
    loader = resident_of(split)
    (tmp_path / "1.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"1\.png: not an image"):
        list(loader)


def test_too_many_images_are_refused_with_their_size_and_the_free_memory(tmp_path, monkeypatch):
    split, _ = write_pngs(tmp_path, 10)
    assert 2**26 < resident.free_bytes(torch.device("cpu")) < 2**44
    monkeypatch.setattr(resident, "free_bytes", lambda device: 2**20)
    resident_of(split, AUGMENT)
    with pytest.raises(DataError, match=r"10 images take 0\.01 GiB, and cpu has 0\.00 GiB free, of which 80% may be used"):
        resident_of(split, training_transform("cifar", 512, *HALF))
    resident_of(make_split(10, size=600), training_transform("none", 600, *HALF))  # in memory already
