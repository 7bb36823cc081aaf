"""The DALI loader alone: the pixels of the other loaders for all kinds of files, interrupted iterations, errors."""

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

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


@pytest.mark.parametrize(
    "transform",
    [CROP, training_transform("conkd-student", 64, *LEVELS), evaluation_transform("squash", 64, *LEVELS)],
    ids=["imagenet", "conkd-student", "squash"],
)
def test_handed_out_batches_are_not_written_to(photographs, transform):
    loader = dali_of(photographs, transform, channels_last=True)
    kept, copies = [], []
    for epoch in range(3):
        loader.set_epoch(epoch)
        for batch in loader:
            kept.append(batch)
            copies.append([part.clone() for part in batch])
    assert same(kept, copies)


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


def compare(split, transform, other, least=0.5, **options):
    """Same windows, same flips. Only the outermost pixels may differ: DALI repeats the edge, the others leave out the pixels beyond it."""
    ours, theirs = dali_of(split, transform, **options), make_loader(other, split, transform, **options)
    for epoch in (0, 5):
        ours.set_epoch(epoch)
        theirs.set_epoch(epoch)
        difference = (join_images(ours) - join_images(theirs)).abs()
        assert difference.flatten(1).mean(dim=1).max() < least, "of every image"
        assert difference[..., 2:-2, 2:-2].max() <= 2


@pytest.mark.parametrize(
    ("transform", "views"),
    [
        pytest.param(CROP, 1, id="imagenet"),
        pytest.param(CROP, 2, id="two views"),
        pytest.param(replace(CROP, steps=training_transform("cifar-cutout", 64, *LEVELS).steps), 2, id="torch steps"),
        pytest.param(training_transform("cifar", 64, *LEVELS), 1, id="cifar"),
        pytest.param(training_transform("cifar-cutout", 64, *LEVELS), 1, id="cutout"),
        pytest.param(training_transform("none", 64, *LEVELS), 1, id="none"),
    ],
)
def test_training_images_are_the_resident_loaders(photographs, transform, views):
    compare(photographs, transform, "resident", views=views)


@pytest.mark.parametrize("name", ["conkd-teacher", "conkd-student"])
def test_conkd_images_are_the_resident_loaders(photographs, name):
    """These transforms turn, sharpen and equalize: a difference of one level before them may be larger after."""
    transform = training_transform(name, 64, *LEVELS)
    difference = (
        (join_images(dali_of(photographs, transform)) - join_images(make_loader("resident", photographs, transform))).abs().flatten(1)
    )
    assert difference.mean() < 1
    assert difference.median(dim=1).values.max() <= 2, "of every image: other operations would be another image"


@pytest.mark.parametrize("name", ["center-crop", "squash"])
@pytest.mark.parametrize("size", [64, 128])
def test_evaluation_images_are_torchvisions(photographs, name, size):
    compare(photographs, evaluation_transform(name, size, *LEVELS), "torchvision", least=1, shuffle=False)


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
    assert (copy == path) == (name in STANDARD)
    del loader
    assert os.path.exists(copy) == (name in STANDARD), "copies exist as long as the loader"


def test_kinds_may_be_mixed(tmp_path):
    paths = [tmp_path / f"Bücher, 本 & {name}" for name in ("a.png", "b.jpg", "c.webp", "d.jpg", "e.gif", "f.bmp")]
    for i, path in enumerate(paths):
        image = make_photograph(i, (80 + i, 120 - i))
        (image.convert("CMYK") if path.name.endswith("d.jpg") else image).save(path)
    compare(Split(torch.arange(len(paths)), paths=tuple(map(str, paths))), CROP, "resident")


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


@pytest.mark.parametrize("transform", [CROP, evaluation_transform("none", 64, *LEVELS)], ids=["crop", "none"])
def test_a_file_that_has_changed_is_one_sentence(tmp_path, transform):
    paths = tuple(str(tmp_path / f"{i}.jpg") for i in range(4))
    for i, path in enumerate(paths):
        make_photograph(i, (70, 90)).save(path)
    loader = dali_of(Split(torch.arange(4), paths=paths), transform)
    make_photograph(9, (30, 20)).save(paths[2])
    with pytest.raises(DataError, match=r"2\.jpg: the image has changed: it is 20x30 now, and was 90x70"):
        list(loader)


def test_a_file_that_only_dali_cannot_read_is_one_sentence(photographs, monkeypatch):
    loader = dali_of(photographs, shuffle=False)
    monkeypatch.setattr(loader, "_paths", (photographs.paths[0], __file__, *photographs.paths[2:]))
    with pytest.raises(DataError, match=r"^DALI cannot read .*0\.jpg or one of 3 others: choose --loader torchvision \(.*\)$") as raised:
        list(loader)
    assert len(str(raised.value)) < 400, "DALI's reason, not its traceback"


def test_a_file_that_dali_does_not_read_is_read_at_once(tmp_path):
    make_photograph(0, (50, 60)).convert("CMYK").save(tmp_path / "cmyk.jpg")
    cut_off(tmp_path / "cmyk.jpg")
    with pytest.raises(DataError, match=r"cmyk\.jpg: the image cannot be read: "):
        dali_of(Split(torch.tensor([0]), paths=(str(tmp_path / "cmyk.jpg"),)))


def test_images_in_memory_are_refused():
    with pytest.raises(DataError, match="choose --loader resident"):
        DaliLoader(make_split(4), CROP, LoaderOptions(4))


@pytest.mark.slow  # the fast tier holds these crops to the resident loader's, and those to torchvision's distribution
def test_crops_are_distributed_as_torchvisions(tmp_path):
    """2,000 crops of an image whose red rises from left to right, and whose green rises from top to bottom."""
    pixels = np.zeros((96, 128, 3), np.uint8)
    pixels[..., 0], pixels[..., 1] = np.arange(128) * 2, np.arange(96)[:, None] * 2.6
    Image.fromarray(pixels).save(tmp_path / "where.png")
    split = Split(torch.zeros(2000, dtype=torch.int64), paths=(str(tmp_path / "where.png"),) * 2000)

    def measure(loader):
        images = join_images(loader)
        across, down = images[:, 0, 16, -4] - images[:, 0, 16, 3], images[:, 1, -4, 16] - images[:, 1, 3, 16]
        width, height = across.abs() * 32 / 25 / 2 / 128, down * 32 / 25 / 2.6 / 96
        area, aspect = width * height, (width * 128 / (height * 96)).log()
        return torch.stack([area, aspect, (across < 0).float(), images.mean(dim=(1, 2, 3)), images.std(dim=(1, 2, 3))])

    transform = training_transform("imagenet", 32, *LEVELS)
    ours, theirs = measure(dali_of(split, transform, 100)), measure(make_loader("torchvision", split, transform, 100))
    error = (ours.var(dim=1) / 1000).sqrt()  # of the difference of two means of 2,000
    assert ((ours.mean(dim=1) - theirs.mean(dim=1)).abs() < 4 * error).all(), "area, aspect, flips, mean, deviation"
    assert torch.allclose(ours.std(dim=1), theirs.std(dim=1), rtol=0.1)
    assert abs(ours[2].mean() - 0.5) < 0.045
    assert ours[0].min() > 0.06
    assert ours[1].abs().max() < 0.36, "3:4 to 4:3"
