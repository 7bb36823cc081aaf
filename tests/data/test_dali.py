"""The DALI loader: the batches of the other loaders, pixel for pixel or nearly, whatever the files, and wherever an epoch is left."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from kdfast.data import (
    DaliLoader,
    DataError,
    ImageData,
    Loader,
    ResidentLoader,
    Split,
    TorchvisionLoader,
    evaluation_transform,
    make_loaders,
    training_transform,
)
from kdfast.data.loaders.dali import decoded_alike

LEVELS = ((0.0,) * 3, (1 / 255,) * 3)
"""A normalization that leaves grey levels."""
HALF = ((0.5,) * 3, (0.5,) * 3)
CROP = training_transform("imagenet", 64, *LEVELS)


def dali_of(split, transform=CROP, batch_size=4, *, shuffle=True, seed=0, **options):
    pytest.importorskip("nvidia.dali", reason="NVIDIA DALI is not installed: the extra kdfast[dali]")
    return DaliLoader(split, transform, batch_size, shuffle=shuffle, seed=seed, **options)


def resident_of(split, transform=CROP, batch_size=4, *, shuffle=True, seed=0, **options):
    return ResidentLoader(split, transform, batch_size, shuffle=shuffle, seed=seed, **options)


def torchvision_of(split, transform=CROP, batch_size=4, *, shuffle=True, seed=0, **options):
    return TorchvisionLoader(split, transform, batch_size, shuffle=shuffle, seed=seed, **options)


def same(a, b):
    """Two lists of batches are equal bit for bit."""
    return len(a) == len(b) and all(torch.equal(x, y) for batch_a, batch_b in zip(a, b) for x, y in zip(batch_a, batch_b))


def photograph(n, size):
    """Shapes and some noise: what JPEG is made for; as an image of Pillow."""
    random = torch.Generator().manual_seed(n)
    coarse = torch.nn.functional.interpolate(255 * torch.rand(1, 3, 6, 7, generator=random), size, mode="bicubic")[0]
    noisy = coarse + 4 * torch.randn(coarse.shape, generator=random)
    return Image.fromarray(noisy.clamp(0, 255).byte().permute(1, 2, 0).numpy())


def photographs(folder, n):
    """N JPEG files of mixed sizes as a split; labels 0 1 2 0 1 2 ..."""
    paths = [str(folder / f"{i}.jpg") for i in range(n)]
    for i, path in enumerate(paths):
        photograph(i, (90 + 13 * (i % 5), 80 + 17 * (i % 7))).save(path, quality=90, subsampling=2 * (i % 2))
    return Split(torch.arange(n) % 3, paths=tuple(paths))


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    return photographs(tmp_path_factory.mktemp("photographs"), 22)


@pytest.fixture(scope="module")
def real(real_data):
    paths = sorted((real_data / "imagenette2-160" / "val").glob("*/*"))[::100]
    return Split(torch.arange(len(paths)) % 10, paths=tuple(map(str, paths)))


def images_of(loader):
    return torch.cat([batch.images for batch in loader])


# ---- whose turn it is ------------------------------------------------------------------------------------------------


def test_it_is_a_loader(split):
    assert isinstance(dali_of(split), Loader)


def test_labels_and_order_are_the_other_loaders_and_differ_by_epoch(split):
    loaders = [make(split) for make in (dali_of, resident_of, torchvision_of)]
    orders = []
    for epoch in (0, 3):
        for loader in loaders:
            loader.set_epoch(epoch)
        ours, *others = [[(batch.index.tolist(), batch.labels.tolist()) for batch in loader] for loader in loaders]
        assert all(ours == other for other in others)
        orders.append(ours)
    assert orders[0] != orders[1]


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("drop_last", [False, True])
def test_each_image_once_an_epoch(split, world_size, drop_last):
    loaders = [dali_of(split, rank=rank, world_size=world_size, drop_last=drop_last) for rank in range(world_size)]
    epochs = [list(loader) for loader in loaders]
    assert [len(epoch) for epoch in epochs] == [len(loader) for loader in loaders]
    assert all(sum(len(batch.labels) for batch in epoch) == loader.samples for epoch, loader in zip(epochs, loaders))
    assert all(len(batch.images) == len(batch.labels) == len(batch.index) for epoch in epochs for batch in epoch)
    index = torch.cat([batch.index for epoch in epochs for batch in epoch])
    assert len(index.unique()) == len(index) == (22 if not drop_last else 20 if world_size == 1 else 16)


# ---- leaving and going on --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("done", [0, 1, 3, 6])
def test_resuming_gives_the_very_next_batch(split, done):
    loader = dali_of(split)
    loader.set_epoch(2)
    whole = list(loader)
    first = dali_of(split)
    first.set_epoch(2)
    running = iter(first)
    got = [next(running) for _ in range(done)]
    state = first.state_dict()
    assert state == {"epoch": 2, "batch": done}, "batches handed out, whatever DALI has begun"
    second = dali_of(split)
    second.load_state_dict(state)
    assert same(got + list(second), whole)
    if done < len(whole):
        assert same(got + list(first), whole), "so does the interrupted loader itself"


def test_an_epoch_can_be_left_and_begun_again(split):
    loader = dali_of(split)
    whole = list(loader)
    for _ in range(3):
        loader.set_epoch(0)
        for batch in loader:
            assert same([batch], whole[:1])
            break
    loader.set_epoch(0)
    assert same(list(loader), whole)


def test_two_iterations_beside_each_other_do_not_mix(split):
    """What DALI works on for the one is not handed to the other."""
    loader = dali_of(split, shuffle=False)
    whole = list(loader)
    loader.set_epoch(0)
    one, other = iter(loader), None
    for place in range(3):
        assert same([next(one)], [whole[place]])
        loader.set_epoch(0)
        other = iter(loader)
        assert same([next(other)], whole[:1])


def test_batches_that_are_kept_stay_as_they_were(split):
    for transform in (CROP, training_transform("conkd-student", 64, *LEVELS), evaluation_transform("squash", 64, *LEVELS)):
        loader = dali_of(split, transform, channels_last=True)
        kept, copies = [], []
        for epoch in range(4):
            loader.set_epoch(epoch)
            for batch in loader:
                kept.append(batch)
                copies.append([part.clone() for part in batch])
        assert same(kept, copies)


def test_the_random_state_is_untouched(split):
    loader, state = dali_of(split, training_transform("conkd-student", 64, *HALF)), torch.get_rng_state()
    list(loader)
    assert torch.equal(state, torch.get_rng_state())


# ---- pixels ----------------------------------------------------------------------------------------------------------


def crops_agree(split, transform, **options):
    """Same windows, same flips: only the outermost pixels may differ, where DALI repeats the edge rather than leave out what is beyond."""
    ours, theirs = dali_of(split, transform, **options), resident_of(split, transform, **options)
    for epoch in (0, 5):
        ours.set_epoch(epoch)
        theirs.set_epoch(epoch)
        difference = (images_of(ours) - images_of(theirs)).abs()
        assert difference.mean() < 0.5
        assert difference.flatten(1).mean(dim=1).max() < 0.5, "of every image"
        assert difference[..., 2:-2, 2:-2].max() <= 2


def test_crops_are_those_of_the_resident_loader(split):
    crops_agree(split, CROP)


@pytest.mark.data
def test_crops_of_photographs_are_those_of_the_resident_loader(real):
    crops_agree(real, training_transform("imagenet", 112, *LEVELS))


def test_two_views_are_those_of_the_resident_loader(split):
    crops_agree(split, CROP, views=2)
    first = next(iter(dali_of(split, views=2)))
    assert first.images.shape == (4, 2, 3, 64, 64)
    assert not torch.equal(first.images[:, 0], first.images[:, 1])
    one = next(iter(dali_of(split)))
    assert torch.equal(first.images[:, 0], one.images), "the first view is the only one of a loader that gives one"


def test_two_views_with_what_dali_leaves_to_torch(split):
    transform = replace(CROP, steps=(CROP.steps[0], *training_transform("cifar-cutout", 64, *LEVELS).steps[1:]))
    crops_agree(split, transform, views=2)


@pytest.mark.parametrize("name", ["cifar", "cifar-cutout", "none"])
def test_other_training_transforms(split, name):
    crops_agree(split, training_transform(name, 64, *LEVELS))


@pytest.mark.parametrize("name", ["conkd-teacher", "conkd-student"])
def test_conkd_transforms(split, name):
    """They turn, sharpen and equalize: what differs by a level before them may differ by more after."""
    transform = training_transform(name, 64, *LEVELS)
    difference = (images_of(dali_of(split, transform)) - images_of(resident_of(split, transform))).abs().flatten(1)
    assert difference.mean() < 1
    assert difference.median(dim=1).values.max() <= 2, "of every image: other operations would be another image"


@pytest.mark.parametrize("name", ["center-crop", "squash"])
@pytest.mark.parametrize("size", [64, 128])
def test_evaluation_is_torchvisions(split, name, size):
    transform = evaluation_transform(name, size, *LEVELS)
    difference = (images_of(dali_of(split, transform, shuffle=False)) - images_of(torchvision_of(split, transform, shuffle=False))).abs()
    assert difference.flatten(1).mean(dim=1).max() < 1
    assert difference[..., 2:-2, 2:-2].max() <= 2


@pytest.mark.data
@pytest.mark.parametrize("name", ["center-crop", "squash"])
def test_evaluation_of_photographs_is_torchvisions(real, name):
    transform = evaluation_transform(name, 112, *LEVELS)
    difference = (images_of(dali_of(real, transform, shuffle=False)) - images_of(torchvision_of(real, transform, shuffle=False))).abs()
    assert difference.flatten(1).mean(dim=1).max() < 1


def test_crops_are_distributed_as_torchvisions(tmp_path):
    """2,000 crops of an image whose red says where a pixel is from left to right, and whose green says where from top to bottom."""
    pixels = np.zeros((96, 128, 3), np.uint8)
    pixels[..., 0], pixels[..., 1] = np.arange(128) * 2, np.arange(96)[:, None] * 2.6
    Image.fromarray(pixels).save(tmp_path / "where.png")
    split = Split(torch.zeros(2000, dtype=torch.int64), paths=(str(tmp_path / "where.png"),) * 2000)

    def measures(loader):
        images = images_of(loader)
        across, down = images[:, 0, 16, -4] - images[:, 0, 16, 3], images[:, 1, -4, 16] - images[:, 1, 3, 16]
        width, height = across.abs() * 32 / 25 / 2 / 128, down * 32 / 25 / 2.6 / 96
        area, aspect = width * height, (width * 128 / (height * 96)).log()
        return torch.stack([area, aspect, (across < 0).float(), images.mean(dim=(1, 2, 3)), images.std(dim=(1, 2, 3))])

    transform = training_transform("imagenet", 32, *LEVELS)
    ours, theirs = (measures(make(split, transform, 100)) for make in (dali_of, torchvision_of))
    error = (ours.var(dim=1) / 1000).sqrt()  # of the difference of two means of 2,000
    assert ((ours.mean(dim=1) - theirs.mean(dim=1)).abs() < 4 * error).all(), "area, aspect, flips, mean, deviation"
    assert torch.allclose(ours.std(dim=1), theirs.std(dim=1), rtol=0.1)
    assert abs(ours[2].mean() - 0.5) < 0.045
    assert ours[0].min() > 0.06
    assert ours[1].abs().max() < 0.36, "3:4 to 4:3"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("name", ["imagenet", "cifar-cutout"])
def test_dtype_and_memory_format(split, dtype, channels_last, name):
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    transform = training_transform(name, 64, mean, std)
    ours, theirs = (next(iter(make(split, transform, dtype=dtype, channels_last=channels_last))).images for make in (dali_of, resident_of))
    assert ours.dtype == dtype
    assert ours.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    exact = next(iter(dali_of(split, transform, channels_last=channels_last))).images
    assert torch.equal(ours, exact.to(dtype)), "rounded once"
    level = 1 / (255 * min(std))
    assert (ours[..., 2:-2, 2:-2].float() - theirs[..., 2:-2, 2:-2].float()).abs().max() < 2 * level + 4 * torch.finfo(dtype).eps


# ---- all kinds of files ----------------------------------------------------------------------------------------------


def _depth_16(image):
    return Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)


def _translucent(image):
    image = image.convert("RGBA")
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    return image


def _turned(path, image):
    exif = Image.Exif()
    exif[0x112] = 6  # lies on its side
    image.save(path, exif=exif)


KINDS = {
    "plain.jpg": lambda path, image: image.save(path),
    "progressive.jpg": lambda path, image: image.save(path, progressive=True),
    "full-color.jpg": lambda path, image: image.save(path, subsampling=0),
    "grey.jpg": lambda path, image: image.convert("L").save(path),
    "turned.jpg": _turned,
    "cmyk.jpg": lambda path, image: image.convert("CMYK").save(path),
    "rgb.jpg": lambda path, image: image.save(path, keep_rgb=True),
    "plain.png": lambda path, image: image.save(path),
    "grey.png": lambda path, image: image.convert("L").save(path),
    "palette.png": lambda path, image: image.quantize(32).save(path),
    "translucent.png": lambda path, image: _translucent(image).save(path),
    "16-bit.png": lambda path, image: _depth_16(image).save(path),
    "one-bit.png": lambda path, image: image.convert("1").save(path),
    "a.bmp": lambda path, image: image.save(path),
    "a.webp": lambda path, image: image.save(path),
    "a.gif": lambda path, image: image.quantize(64).save(path),
    "a.tif": lambda path, image: image.save(path),
    "a.ppm": lambda path, image: image.save(path),
}
LEFT_TO_DALI = {"plain.jpg", "progressive.jpg", "full-color.jpg", "grey.jpg", "turned.jpg", "plain.png", "grey.png"}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_file_is_what_pillow_says(tmp_path, kind):
    path = str(tmp_path / kind)
    KINDS[kind](path, photograph(3, (57, 83)))
    assert decoded_alike(path) == (kind in LEFT_TO_DALI)
    split = Split(torch.tensor([1]), paths=(path,))
    (batch,) = dali_of(split, evaluation_transform("none", 8, *LEVELS))
    assert torch.equal(batch.images[0].round(), split.read(0).float())


def test_kinds_may_be_mixed(tmp_path):
    paths = [str(tmp_path / kind) for kind in KINDS]
    for i, (path, save) in enumerate(zip(paths, KINDS.values())):
        save(path, photograph(i, (80 + i, 120 - i)))
    crops_agree(Split(torch.arange(len(paths)), paths=tuple(paths)), CROP)


def test_a_name_may_hold_any_character(tmp_path):
    path = tmp_path / "Bücher, 本 & more.jpg"
    photograph(1, (50, 60)).save(path)
    assert len(list(dali_of(Split(torch.tensor([0]), paths=(str(path),))))) == 1


def test_copies_live_as_long_as_the_loader(tmp_path):
    photograph(0, (50, 60)).convert("CMYK").save(tmp_path / "cmyk.jpg")
    loader = dali_of(Split(torch.tensor([0]), paths=(str(tmp_path / "cmyk.jpg"),)))
    (copy,) = loader._paths
    assert os.path.exists(copy)
    list(loader)
    del loader
    assert not os.path.exists(os.path.dirname(copy))


def test_files_as_they_are_make_no_copies(split):
    assert dali_of(split)._paths == split.paths


# ---- what can go wrong -----------------------------------------------------------------------------------------------


def cut_off(path):
    path.write_bytes(path.read_bytes()[:400])


@pytest.mark.parametrize(("harm", "says"), [(cut_off, "cannot be read"), (Path.unlink, "cannot be opened")])
@pytest.mark.parametrize("name", ["imagenet", "conkd-student"])
def test_a_broken_image_in_mid_epoch_is_one_sentence_that_names_it(tmp_path, harm, says, name):
    split = photographs(tmp_path, 22)
    loader = dali_of(split, training_transform(name, 64, *HALF), shuffle=False)
    before = list(loader)
    loader.set_epoch(0)
    harm(tmp_path / "13.jpg")
    got, running = [], iter(loader)
    with pytest.raises(DataError, match=rf"13\.jpg: the image {says}: ") as raised:
        got.extend(running)
    assert "\n" not in str(raised.value)
    assert loader.state_dict() == {"epoch": 0, "batch": 3}
    loader.load_state_dict({"epoch": 0, "batch": 4})
    assert same(list(loader), before[4:]), "what comes after is unharmed"


@pytest.mark.parametrize("transform", [CROP, evaluation_transform("none", 64, *LEVELS)], ids=["crop", "none"])
def test_a_file_that_has_changed_is_one_sentence(tmp_path, transform):
    paths = tuple(str(tmp_path / f"{i}.jpg") for i in range(4))
    for i, path in enumerate(paths):
        photograph(i, (70, 90)).save(path)
    loader = dali_of(Split(torch.arange(4), paths=paths), transform)
    photograph(9, (30, 20)).save(paths[2])
    with pytest.raises(DataError, match=r"2\.jpg: the image has changed: it is 20x30 now, and was 90x70"):
        list(loader)


def test_what_only_dali_cannot_read_is_one_sentence(split, monkeypatch):
    loader = dali_of(split, shuffle=False)
    monkeypatch.setattr(loader, "_paths", (split.paths[0], __file__, *split.paths[2:]))
    with pytest.raises(DataError, match=r"^DALI cannot read .*0\.jpg or one of 3 others: choose --loader torchvision \(.*\)$") as raised:
        list(loader)
    assert len(str(raised.value)) < 400, "DALI's reason, not its traceback"


@pytest.mark.parametrize("method", ["feed_input", "schedule_run", "outputs"])
def test_ctrl_c_at_the_worst_moment_changes_no_later_batch(split, monkeypatch, method):
    loader = dali_of(split)
    whole = list(loader)
    loader.set_epoch(0)
    running = iter(loader)
    next(running)

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(loader._pipeline, method, interrupted)
    with pytest.raises(KeyboardInterrupt):
        next(running)
    assert same(list(loader), whole[1:])


def test_a_file_that_dali_is_not_given_is_read_at_once(tmp_path):
    photograph(0, (50, 60)).convert("CMYK").save(tmp_path / "cmyk.jpg")
    cut_off(tmp_path / "cmyk.jpg")
    with pytest.raises(DataError, match=r"cmyk\.jpg: the image cannot be read: "):
        dali_of(Split(torch.tensor([0]), paths=(str(tmp_path / "cmyk.jpg"),)))


def test_images_of_different_sizes_are_one_sentence(tmp_path):
    for i, size in enumerate([(8, 9), (10, 8)]):
        Image.new("RGB", size).save(tmp_path / f"{i}.png")
    split = Split(torch.tensor([0, 1]), paths=(str(tmp_path / "0.png"), str(tmp_path / "1.png")))
    with pytest.raises(DataError, match=r"images differ in size \(10x8 and 8x9\)"):
        dali_of(split, evaluation_transform("none", 8, *HALF))


def test_images_in_memory_are_refused():
    split = Split(torch.zeros(4, dtype=torch.int64), pixels=torch.zeros(4, 3, 8, 8, dtype=torch.uint8))
    with pytest.raises(DataError, match="choose --loader resident"):
        DaliLoader(split, CROP, 4, shuffle=False, seed=0)


def test_without_threads_nothing_is_read(split):
    with pytest.raises(DataError, match="workers must be at least 1, got 0"):
        DaliLoader(split, CROP, 4, shuffle=False, seed=0, workers=0)


def test_without_dali_a_sentence_names_the_extra(split, monkeypatch):
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    with pytest.raises(DataError, match=r"kdfast\[dali\]"):
        DaliLoader(split, CROP, 4, shuffle=False, seed=0)


def test_importing_data_imports_no_dali():
    code = "import sys, kdfast.data; print('nvidia.dali' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout == "False\n"


def test_make_loaders_makes_it(split):
    pytest.importorskip("nvidia.dali", reason="NVIDIA DALI is not installed: the extra kdfast[dali]")
    data = ImageData("x", ("a", "b", "c"), split, split, split, *HALF, 32, False, "imagenet", "center-crop")
    loaders = make_loaders(data, batch_size=8, loader="dali", views=2, workers=2)
    assert all(isinstance(loader, DaliLoader) for loader in loaders)
    assert next(iter(loaders.train)).images.shape == (8, 2, 3, 32, 32)
    assert next(iter(loaders.val)).images.shape == (8, 3, 32, 32)
