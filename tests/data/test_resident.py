"""The resident loader: the batches of the torchvision loader where nothing is drawn, the same order where something is."""

import gc
import warnings

import pytest
import torch

from kdfast.data import (
    DataError,
    Loader,
    ResidentLoader,
    Split,
    TorchvisionLoader,
    evaluation_transform,
    hide_labels,
    load,
    make_loaders,
    training_names,
    training_transform,
)
from kdfast.data.images import decode
from kdfast.data.loaders import choice, resident
from tests.data.test_loader import HALF, files, same, split_of

AUGMENT = training_transform("cifar", 8, *HALF)
CPU = torch.device("cpu")


def resident_of(split, transform=AUGMENT, batch_size=4, *, shuffle=True, seed=0, **options):
    return ResidentLoader(split, transform, batch_size, shuffle=shuffle, seed=seed, **options)


def torchvision_of(split, transform=AUGMENT, batch_size=4, *, shuffle=True, seed=0, **options):
    return TorchvisionLoader(split, transform, batch_size, shuffle=shuffle, seed=seed, **options)


def test_it_is_a_loader():
    assert isinstance(resident_of(split_of(4)), Loader)


@pytest.mark.parametrize("name", ["none", "squash", "center-crop"])
def test_evaluation_gives_torchvisions_batches_bit_for_bit(tmp_path, name):
    split, _ = files(tmp_path, 7)
    transform = evaluation_transform(name, 8, *HALF)
    assert same(list(resident_of(split, transform, shuffle=False)), list(torchvision_of(split, transform, shuffle=False)))


def test_images_in_memory_give_torchvisions_evaluation():
    transform = evaluation_transform("squash", 5, *HALF)
    assert same(list(resident_of(split_of(9), transform)), list(torchvision_of(split_of(9), transform)))


@pytest.mark.parametrize("name", training_names())
def test_order_labels_and_counts_are_torchvisions(name, tmp_path):
    split, _ = files(tmp_path, 11)
    transform = training_transform(name, 8, *HALF)
    for options in ({}, {"drop_last": True}, {"rank": 1, "world_size": 2}):
        ours, theirs = resident_of(split, transform, **options), torchvision_of(split, transform, **options)
        assert (len(ours), ours.samples) == (len(theirs), theirs.samples)
        for _ in range(2):
            for a, b in zip(ours, theirs, strict=True):
                assert torch.equal(a.index, b.index)
                assert torch.equal(a.labels, b.labels)
                assert (a.images.shape, a.images.dtype) == (b.images.shape, b.images.dtype)


@pytest.mark.parametrize("world_size", [1, 2])
def test_each_image_once_an_epoch_on_all_ranks(world_size):
    split = split_of(23)
    seen = torch.cat([batch.index for rank in range(world_size) for batch in resident_of(split, rank=rank, world_size=world_size)])
    assert seen.sort().values.tolist() == list(range(23))


def test_an_images_augmentation_depends_on_seed_epoch_and_image_alone():
    split = split_of(12)

    def images(epoch=0, seed=0, **options):
        loader = resident_of(split, seed=seed, **options)
        loader.set_epoch(epoch)
        return {int(i): image for batch in loader for i, image in zip(batch.index, batch.images)}

    one = images()
    for options in ({"batch_size": 5}, {"rank": 1, "world_size": 2}, {"shuffle": False}):
        assert all(torch.equal(image, one[i]) for i, image in images(**options).items())
    for options in ({"epoch": 1}, {"seed": 1}):
        assert any(not torch.equal(image, one[i]) for i, image in images(**options).items())


@pytest.mark.parametrize("done", [0, 1, 2, 3])
def test_resuming_gives_the_very_next_batch(done):
    transform = training_transform("conkd-student", 8, *HALF)
    whole = list(resident_of(split_of(12), transform))
    begun = resident_of(split_of(12), transform)
    for batch, _ in zip(begun, range(done)):
        assert len(batch.labels) == 4
    again = resident_of(split_of(12), transform)
    again.load_state_dict({"epoch": 0, "batch": done})
    assert same(list(again), whole[done:])


def test_files_of_many_sizes_are_cropped_as_decoded(tmp_path):
    split, _ = files(tmp_path, 3, size=(9, 12))
    (tmp_path / "wide").mkdir()
    others, _ = files(tmp_path / "wide", 3, size=(15, 10))
    both = Split(torch.arange(6) % 3, paths=split.paths + others.paths)
    transform = training_transform("imagenet", 8, *HALF)
    together = {int(i): image for batch in resident_of(both, transform) for i, image in zip(batch.index, batch.images)}
    for part, offset in ((split, 0), (others, 3)):
        stored = torch.stack([decode(path) for path in part.paths])
        labels = torch.zeros(offset + 3, dtype=torch.int64)
        pixels = torch.cat([torch.zeros(offset, 3, *stored.shape[-2:], dtype=torch.uint8), stored])
        alike = resident_of(Split(labels, pixels=pixels), transform, batch_size=1)
        for batch in alike:
            i = int(batch.index)
            assert i < offset or torch.allclose(batch.images[0], together[i], atol=0.02)  # a rounding of half a grey level


def test_two_views_are_two_augmentations():
    for of in (resident_of, torchvision_of):
        one, two = list(of(split_of(12))), list(of(split_of(12), views=2))
        assert two[0].images.shape == (4, 2, 3, 8, 8)
        assert same([(b.images,) for b in one], [(b.images[:, 0],) for b in two])
        assert any(not torch.equal(b.images[:, 0], b.images[:, 1]) for b in two)
        with pytest.raises(DataError, match="2 views of an image need a transform that draws random numbers"):
            of(split_of(4), evaluation_transform("none", 8, *HALF), views=2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("of", [resident_of, torchvision_of])
def test_dtypes_and_memory_formats(of, dtype):
    plain = next(iter(of(split_of(4), shuffle=False)))
    batch = next(iter(of(split_of(4), shuffle=False, dtype=dtype, channels_last=True)))
    assert batch.images.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(batch.images, plain.images.to(dtype))
    with pytest.raises(DataError, match=r"dtype must be .*, got torch.float64"):
        of(split_of(4), dtype=torch.float64)


def test_the_splits_own_pixels_are_not_written_to():
    split = split_of(8)
    before = split.pixels.clone()
    for name in training_names():
        for batch in resident_of(split, training_transform(name, 8, *HALF)):
            batch.images.fill_(7)
    assert torch.equal(split.pixels, before)


def test_hidden_labels_are_handed_out_hidden():
    hidden = hide_labels(split_of(30), 0.2, seed=0)
    labels = torch.cat([batch.labels for batch in resident_of(hidden)])
    assert (labels == -100).sum() == 24


def test_loaders_of_the_same_images_share_them(tmp_path, monkeypatch):
    split, _ = files(tmp_path, 6)
    decoded = []
    monkeypatch.setattr("kdfast.data.splits.decode", lambda path: decoded.append(path) or decode(path))
    transform = training_transform("cifar", 8, *HALF)
    for labelled in (split, hide_labels(split, 0.5, seed=0), split):
        list(resident_of(labelled, transform))
    assert sorted(decoded) == sorted(split.paths)
    kept = len(resident._STORES)
    del split, labelled
    gc.collect()
    assert len(resident._STORES) == kept - 1


def test_nothing_is_decoded_before_the_first_batch(tmp_path):
    split, _ = files(tmp_path, 3)
    loader = resident_of(split)
    (tmp_path / "1.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"1\.png: not an image"):
        list(loader)


def test_images_of_several_sizes_need_a_transform_that_resizes(tmp_path):
    split, _ = files(tmp_path, 2)
    (tmp_path / "other").mkdir()
    other, _ = files(tmp_path / "other", 2, size=(7, 8))
    both = Split(torch.zeros(4, dtype=torch.int64), paths=split.paths + other.paths)
    with pytest.raises(DataError, match=r"images differ in size \(8x7 and 12x9\)"):
        resident_of(both, evaluation_transform("none", 8, *HALF))


def test_what_does_not_fit_is_refused_with_its_size_and_the_free_memory(tmp_path, monkeypatch):
    split, _ = files(tmp_path, 10)
    monkeypatch.setattr(resident, "free_bytes", lambda device: 2**20)
    resident_of(split, AUGMENT)
    with pytest.raises(DataError, match=r"10 images take 0\.01 GiB, and cpu has 0\.00 GiB free, of which 80% may be used"):
        resident_of(split, training_transform("cifar", 512, *HALF))
    resident_of(split_of(10, size=600), training_transform("none", 600, *HALF))  # in memory already


def test_free_memory_is_what_the_machine_has():
    assert 2**26 < resident.free_bytes(CPU) < 2**44


def test_auto_says_what_it_picked_and_why(tmp_path, monkeypatch):
    memory, (on_files, _) = split_of(6), files(tmp_path, 6)
    plain = evaluation_transform("squash", 8, *HALF)
    gpu = torch.device("cuda")
    assert choice([(memory, AUGMENT)], CPU) == ("resident", "the images are in memory")
    installed = {"nvidia", "nvidia.dali"}
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name if name in installed else None)
    assert choice([(on_files, AUGMENT)], CPU) == ("dali", "image files, and DALI is installed")
    monkeypatch.setattr("kdfast.data.loaders.free_bytes", lambda device: 2**30)
    assert choice([(on_files, AUGMENT), (on_files, plain)], gpu) == ("resident", "the images take 0.0 of 1.0 GiB free on cuda")
    monkeypatch.setattr("kdfast.data.loaders.free_bytes", lambda device: 1000)
    assert choice([(on_files, AUGMENT), (on_files, plain)], gpu)[0] == "dali"
    installed.clear()
    assert choice([(on_files, AUGMENT)], CPU)[0] == "torchvision"
    assert "kdfast[dali]" in choice([(on_files, AUGMENT)], CPU)[1]


def test_make_loaders_by_name():
    data, said = load("digits"), []
    auto = make_loaders(data, batch_size=32, say=said.append)
    assert said == ["resident loader: the images are in memory"]
    assert all(isinstance(loader, ResidentLoader) for loader in auto)
    assert all(isinstance(loader, TorchvisionLoader) for loader in make_loaders(data, batch_size=32, loader="torchvision"))
    two = make_loaders(data, batch_size=32, views=2)
    assert next(iter(two.train)).images.shape == (32, 2, 3, 8, 8)
    assert next(iter(two.val)).images.shape == (32, 3, 8, 8)
    with pytest.raises(DataError, match="loader must be one of auto, dali, resident, torchvision, got 'fast'"):
        make_loaders(data, batch_size=32, loader="fast")


@pytest.mark.data
def test_crops_of_real_images_have_torchvisions_statistics(real_data):
    data = load("imagenette", data_dir=real_data, max_images=2000, val_fraction=0)
    transform = training_transform("imagenet", 64, data.mean, data.std)
    means, deviations, edges = [], [], []
    for of in (resident_of, torchvision_of):
        images = torch.cat([batch.images for batch in of(data.train, transform, batch_size=100)])
        means.append(images.mean((0, 2, 3)))
        deviations.append(images.std((0, 2, 3)))
        edges.append((images[..., 1:] - images[..., :-1]).abs().mean())
    assert (means[0] - means[1]).abs().max() < 0.06  # three deviations of the mean over 2,000 images
    assert (deviations[0] / deviations[1] - 1).abs().max() < 0.03
    assert abs(edges[0] / edges[1] - 1) < 0.03


@pytest.mark.data
def test_real_cifar10_from_memory(real_data):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data = load("cifar10", data_dir=real_data, download=False)
    ours, theirs = (make_loaders(data, batch_size=500, loader=name).test for name in ("resident", "torchvision"))
    assert same(list(ours), list(theirs))
