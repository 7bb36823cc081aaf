"""The DALI loader alone: the pixels of the other loaders for all kinds of files, interrupted iterations, errors."""

import os
from pathlib import Path

import pytest
import torch

from kdfast.data import DaliLoader, DataError, LoaderOptions, Split, evaluation_transform, training_transform
from kdfast.data.images import has_standard_pixels
from tests.data.samples import (
    GOOD,
    HALF,
    LEVELS,
    STANDARD,
    join_images,
    make_loader,
    make_photograph,
    make_split,
    plant,
    same,
    write_photographs,
)

CROP = training_transform("imagenet", 64, *LEVELS)


def dali_of(split, transform=CROP, batch_size=4, **options):
    pytest.importorskip("nvidia.dali", reason="NVIDIA DALI is not installed: the extra kdfast[dali]")
    return make_loader("dali", split, transform, batch_size, **options)


# ---- iterations beside one another ----------------------------------------------------------------------------------------------


def test_two_iterations_beside_each_other_do_not_mix(photographs):
    loader = dali_of(photographs, shuffle=False)
    whole = list(loader)
    loader.set_epoch(0)
    one = iter(loader)
    for place in range(3):
        assert same([next(one)], [whole[place]])
        loader.set_epoch(0)
        assert same([next(iter(loader))], whole[:1])


@pytest.mark.parametrize("method", ["feed_input", "schedule_run", "outputs"])
def test_ctrl_c_at_any_moment_changes_no_later_batch(photographs, monkeypatch, method):
    loader = dali_of(photographs)
    whole = list(loader)
    loader.set_epoch(0)
    running = iter(loader)
    next(running)

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(loader._pipeline, method, interrupt)
    with pytest.raises(KeyboardInterrupt):
        next(running)
    assert same(list(loader), whole[1:])


# ---- pixels ---------------------------------------------------------------------------------------------------------------------


def compare(split, transform, least=0.5, **options):
    """Same windows, same flips. Only the outermost pixels may differ: DALI repeats the edge, the others leave out the pixels beyond it."""
    ours, theirs = dali_of(split, transform, **options), make_loader("torchvision", split, transform, **options)
    for epoch in (0, 5):
        ours.set_epoch(epoch)
        theirs.set_epoch(epoch)
        difference = (join_images(ours) - join_images(theirs)).abs()
        assert difference.flatten(1).mean(dim=1).max() < least, "of every image"
        assert difference[..., 2:-2, 2:-2].max() <= 2


@pytest.mark.parametrize(("name", "views"), [("imagenet", 1), ("imagenet", 2), ("cifar-cutout", 1), ("none", 1)])
def test_training_images_are_torchvisions(photographs, name, views):
    compare(photographs, training_transform(name, 64, *LEVELS), views=views)


@pytest.mark.parametrize("name", ["center-crop", "squash"])
@pytest.mark.parametrize("size", [64, 128])
def test_evaluation_images_are_torchvisions(photographs, name, size):
    compare(photographs, evaluation_transform(name, size, *LEVELS), least=1, shuffle=False)


# ---- all kinds of files ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GOOD)
def test_every_kind_of_file_gives_the_pixels_of_decode(tmp_path, name):
    path = str(plant(tmp_path, name))
    assert has_standard_pixels(path) == (name in STANDARD)
    split = Split(torch.tensor([1]), paths=(path,))
    loader = dali_of(split, evaluation_transform("none", 8, *LEVELS))
    (batch,) = loader
    assert torch.equal(batch.images[0].round(), split.read(0).float())
    (copy,) = loader._paths
    del loader
    assert os.path.exists(copy) == (copy == path) == (name in STANDARD), "copies exist as long as the loader"


def test_kinds_may_be_mixed(tmp_path):
    paths = [tmp_path / f"Bücher, 本 & {name}" for name in ("a.png", "b.jpg", "c.webp", "d.jpg", "e.gif", "f.bmp")]
    for i, path in enumerate(paths):
        image = make_photograph(i, (80 + i, 120 - i))
        (image.convert("CMYK") if path.name.endswith("d.jpg") else image).save(path)
    compare(Split(torch.arange(len(paths)), paths=tuple(map(str, paths))), CROP)


# ---- errors ---------------------------------------------------------------------------------------------------------------------


def cut_off(path):
    path.write_bytes(path.read_bytes()[:400])


@pytest.mark.parametrize(("harm", "message"), [(cut_off, "cannot be read"), (Path.unlink, "cannot be opened")], ids=["cut", "deleted"])
@pytest.mark.parametrize("name", ["imagenet", "conkd-student"])
def test_a_broken_image_in_mid_epoch_is_one_sentence_that_names_it(tmp_path, harm, message, name):
    split = write_photographs(tmp_path, 22)
    loader = dali_of(split, training_transform(name, 64, *HALF), shuffle=False)
    before = list(loader)
    loader.set_epoch(0)
    harm(tmp_path / "13.jpg")
    got, running = [], iter(loader)
    with pytest.raises(DataError, match=rf"^.*13\.jpg: the image {message}: [^\n]*$"):
        got.extend(running)
    assert loader.state_dict() == {"epoch": 0, "batch": 3}
    loader.load_state_dict({"epoch": 0, "batch": 4})
    assert same(list(loader), before[4:]), "later batches are unharmed"


def test_a_file_that_has_changed_is_named(tmp_path):
    split = write_photographs(tmp_path, 4)
    loader = dali_of(split, shuffle=False)
    make_photograph(9, (30, 20)).save(split.paths[2])
    with pytest.raises(DataError, match=r"2\.jpg: the image has changed since the loader was made"):
        list(loader)


def test_a_file_that_only_dali_cannot_read_is_one_sentence(photographs, monkeypatch):
    loader = dali_of(photographs, shuffle=False)
    monkeypatch.setattr(loader, "_paths", (photographs.paths[0], __file__, *photographs.paths[2:]))
    with pytest.raises(DataError, match=r"^.*1\.jpg: DALI cannot read the image: choose --loader torchvision \(.*\)$") as raised:
        list(loader)
    assert len(str(raised.value)) < 400, "DALI's reason, not its traceback"


def test_images_in_memory_are_refused():
    with pytest.raises(DataError, match="choose --loader resident"):
        DaliLoader(make_split(4), CROP, LoaderOptions(4))
