"""The contract of the three loaders: order, ranks, resuming, views, formats, errors; options, and the choice between loaders."""

import pytest
import torch

from kdfast.data import DataError, ImageData, LoaderOptions, evaluation_transform, load, make_loaders, training_transform
from kdfast.data.loaders import CLASSES, choose_loader, dali_installed
from kdfast.data.protocol import Loader
from kdfast.data.splits import HIDDEN
from tests.data.samples import HALF, join_images, join_index, make_loader, make_split, same, write_pngs

NAMES = [
    "resident",
    "torchvision",
    pytest.param("dali", marks=pytest.mark.skipif(not dali_installed(), reason="NVIDIA DALI is not installed: pip install kdfast[dali]")),
]
every_loader = pytest.mark.parametrize("name", NAMES)
AUGMENT = training_transform("imagenet", 32, *HALF)
PLAIN = evaluation_transform("squash", 32, *HALF)


# ---- order, ranks, position -----------------------------------------------------------------------------------------------------


@every_loader
def test_seed_epoch_and_image_alone_decide_the_order_and_the_augmentation(photographs, name):
    def collect(kind=name, epoch=0, **options):
        loader = make_loader(kind, photographs, AUGMENT, **options)
        assert isinstance(loader, Loader)
        loader.set_epoch(epoch)
        batches = list(loader)
        assert all(torch.equal(batch.labels, photographs.labels[batch.index]) for batch in batches)
        assert all(batch.labels.dtype == batch.index.dtype == torch.int64 for batch in batches)
        images = {int(i): image for batch in batches for i, image in zip(batch.index, batch.images)}
        return list(images), images

    order, images = collect()
    assert order == collect("torchvision")[0]
    for options in ({"batch_size": 5}, {"rank": 1, "world_size": 2}, {"shuffle": False}):
        others = collect(**options)[1]
        assert all(torch.allclose(image, images[i], atol=0.02) for i, image in others.items()), "a rounding where sizes are mixed otherwise"
    for options in ({"epoch": 1}, {"seed": 1}):
        other_order, others = collect(**options)
        assert other_order != order
        assert any(not torch.equal(image, images[i]) for i, image in others.items())


@every_loader
@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("drop_last", [False, True])
def test_every_image_comes_once_an_epoch(photographs, name, world_size, drop_last):
    ranks = [make_loader(name, photographs, PLAIN, rank=rank, world_size=world_size, drop_last=drop_last) for rank in range(world_size)]
    epochs = [list(loader) for loader in ranks]
    assert [len(epoch) for epoch in epochs] == [len(loader) for loader in ranks]
    assert [sum(len(batch.labels) for batch in epoch) for epoch in epochs] == [loader.samples for loader in ranks]
    assert all(len(batch.images) == len(batch.labels) == len(batch.index) for epoch in epochs for batch in epoch)
    index = join_index(*epochs)
    assert len(index.unique()) == len(index) == (22 if not drop_last else {1: 20, 2: 16, 3: 12}[world_size])


def test_batches_of_ranks_join_to_the_batches_of_one_process():
    one = make_loader("torchvision", make_split(30), AUGMENT, 8, drop_last=True)
    two = [make_loader("torchvision", make_split(30), AUGMENT, 4, rank=rank, world_size=2, drop_last=True) for rank in range(2)]
    joined = [tuple(torch.cat(parts) for parts in zip(*pair)) for pair in zip(*two)]
    assert same(list(one), joined)
    assert len(joined) == 3


@pytest.mark.parametrize(("n", "world_size", "sizes"), [(10, 1, [4, 4]), (3, 1, [3]), (7, 2, [3]), (17, 2, [4, 4]), (2, 2, [1])])
def test_drop_last_keeps_ranks_even_and_never_empties_the_epoch(n, world_size, sizes):
    for rank in range(world_size):
        loader = make_loader("resident", make_split(n), PLAIN, rank=rank, world_size=world_size, drop_last=True)
        assert [len(batch.labels) for batch in loader] == sizes
        assert (len(loader), loader.samples) == (len(sizes), sum(sizes))


@every_loader
def test_an_epoch_can_be_left_resumed_and_begun_again(photographs, name):
    loader = make_loader(name, photographs, AUGMENT)
    loader.set_epoch(4)
    whole = list(loader)
    assert same(list(loader), whole), "iterating again starts the epoch over"
    for done in (0, 1, 3, 6):
        loader.set_epoch(4)
        running = iter(loader)
        got = [next(running) for _ in range(done)]
        state = loader.state_dict()
        assert state == {"epoch": 4, "batch": done}, "batches handed out, whatever was prefetched"
        assert same(got + list(loader), whole) or done == 6, "the interrupted loader goes on"
        restored = make_loader(name, photographs, AUGMENT)
        restored.load_state_dict(state)
        assert same(got + list(restored), whole)
    assert len(list(restored)) == 6, "an epoch that was complete when saved has no rest, and can be begun again"


def test_a_state_of_another_split_is_an_error():
    with pytest.raises(DataError, match="batch 9, but an epoch has 2 batches"):
        make_loader("resident", make_split(6), PLAIN).load_state_dict({"epoch": 0, "batch": 9})


@every_loader
def test_in_order_gives_all_images_on_every_rank(photographs, name):
    loader = make_loader(name, photographs, AUGMENT, rank=1, world_size=2, micro_batch=3)
    assert not loader.deterministic
    assert make_loader(name, photographs, PLAIN).deterministic
    loader.set_epoch(2)
    images = {int(i): image for batch in loader for i, image in zip(batch.index, batch.images)}
    loader.set_epoch(2)
    next(iter(loader))
    found = list(loader.in_order())
    assert max(len(batch.labels) for batch in found) == 3
    assert join_index(found).tolist() == list(range(22))
    assert torch.equal(torch.cat([batch.labels for batch in found]), photographs.labels)
    assert torch.equal(loader.labels, photographs.labels)
    assert all(torch.equal(join_images(found)[i], image) for i, image in images.items()), "as the epoch under way has them"
    assert loader.state_dict() == {"epoch": 2, "batch": 1}
    assert len(join_index(loader)) == loader.samples - 4, "the epoch goes on"


@every_loader
def test_the_random_state_is_untouched(photographs, name):
    state = torch.get_rng_state()
    for _ in make_loader(name, photographs, training_transform("conkd-student", 32, *HALF)):
        assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(state, torch.get_rng_state())


# ---- images ---------------------------------------------------------------------------------------------------------------------


@every_loader
def test_two_views_are_two_augmentations(photographs, name):
    one, two = list(make_loader(name, photographs, AUGMENT)), list(make_loader(name, photographs, AUGMENT, views=2))
    assert two[0].images.shape == (4, 2, 3, 32, 32)
    assert same([(b.images,) for b in one], [(b.images[:, 0],) for b in two])
    assert any(not torch.equal(b.images[:, 0], b.images[:, 1]) for b in two)
    with pytest.raises(DataError, match="2 views of an image need a transform that draws random numbers"):
        make_loader(name, photographs, PLAIN, views=2)


@every_loader
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("augmentation", ["imagenet", "cifar-cutout"])
def test_dtype_and_memory_format(photographs, name, dtype, channels_last, augmentation):
    transform = training_transform(augmentation, 32, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    images = next(iter(make_loader(name, photographs, transform, dtype=dtype, channels_last=channels_last))).images
    assert images.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    exact = next(iter(make_loader(name, photographs, transform, channels_last=channels_last))).images
    assert exact.dtype == torch.float32
    assert torch.equal(images, exact.to(dtype)), "rounded once"


@every_loader
def test_a_broken_image_is_one_sentence_that_names_it(tmp_path, name):
    split, _ = write_pngs(tmp_path, 9)
    loaders = [make_loader(name, split, transform) for transform in (AUGMENT, PLAIN)]
    (tmp_path / "6.png").write_bytes((tmp_path / "6.png").read_bytes()[:60])
    for loader in loaders:
        with pytest.raises(DataError, match=r"^.*6\.png: the image cannot be read: [^\n]*$"):
            list(loader)


@every_loader
def test_different_sizes_need_a_transform_that_resizes(photographs, name):
    with pytest.raises(DataError, match=r"images differ in size \(\d+x\d+ and \d+x\d+\): choose a transform that resizes"):
        list(make_loader(name, photographs, evaluation_transform("none", 8, *HALF)))


# ---- options and make_loaders ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param({"batch_size": 0}, "batch_size and views must be at least 1, got 0 and 1", id="batch size"),
        pytest.param({"views": 0}, "batch_size and views must be at least 1, got 4 and 0", id="views"),
        pytest.param({"micro_batch": 0}, "micro_batch must be at least 1, got 0", id="micro batch"),
        pytest.param({"workers": -1}, "workers must be at least 0, got -1", id="workers"),
        pytest.param({"rank": 2, "world_size": 2}, "rank 2 of 2", id="rank"),
        pytest.param({"dtype": torch.float64}, r"dtype must be .*, got torch.float64", id="dtype"),
        pytest.param({"world_size": 1080, "drop_last": True}, "1079 images cannot be shared by 1080 ranks", id="world size"),
        pytest.param({"normalization": "cifar"}, r"normalization must be one of imagenet, .* got 'cifar'", id="normalization"),
        pytest.param({"train_transform": "digit"}, "training transform must be one of none, digits", id="training transform"),
        pytest.param({"eval_transform": "cifar"}, "evaluation transform must be one of none, squash, .* got 'cifar'", id="evaluation"),
        pytest.param({"image_size": 0}, "image_size must be at least 1, got 0", id="image size"),
        pytest.param({"loader": "fast"}, "loader must be one of auto, dali, resident, torchvision, got 'fast'", id="loader"),
    ],
)
def test_a_bad_option_is_named(options, message):
    with pytest.raises(DataError, match=message):
        make_loaders(load("digits"), **({"batch_size": 4} | options))


def test_make_loaders_follows_the_data_set():
    data, said = load("digits"), []
    loaders = make_loaders(data, batch_size=64, say=said.append)
    assert said == ["resident loader: the images are in memory"]
    assert [loader.samples for loader in loaders] == [1024, 359, 359]
    assert torch.equal(join_index(loaders.val), torch.arange(359)), "evaluation does not shuffle"
    images = join_images(loaders.test)
    assert images.mean().abs() < 0.05
    assert abs(images.std().item() - 1) < 0.05
    small = make_loaders(data, batch_size=64, micro_batch=30)
    assert [max(len(batch.labels) for batch in part) for part in (*small, small.val.in_order())] == [64, 64, 30, 30]
    same_options = make_loaders(data, LoaderOptions(batch_size=32), batch_size=64)
    assert same(list(same_options.train), list(loaders.train)), "keywords replace fields of the options"


@every_loader
def test_make_loaders_takes_names_sizes_and_a_part_of_the_labels(photographs, name):
    data = ImageData("x", ("a", "b", "c"), photographs, photographs, photographs, *HALF, 32, False, "imagenet", "center-crop")
    options = {"train_transform": "cifar", "eval_transform": "squash", "image_size": 14, "normalization": "half", "label_fraction": 0.25}
    loaders = make_loaders(data, batch_size=8, loader=name, views=2, **options)
    assert all(type(loader) is CLASSES[name] for loader in loaders)
    batches = list(loaders.train)
    assert batches[0].images.shape == (8, 2, 3, 14, 14)
    assert next(iter(loaders.val)).images.shape == (8, 3, 14, 14)
    assert join_images(batches).min() >= -1
    assert (loaders.train.labels == HIDDEN).sum() == 16
    assert all(torch.equal(batch.labels, loaders.train.labels[batch.index]) for batch in batches)
    assert loaders.val.labels.min() >= 0, "evaluation sees every label"


def test_auto_names_its_choice_and_the_reason(tmp_path, monkeypatch):
    memory, (on_disk, _) = make_split(6), write_pngs(tmp_path, 6)
    augment, plain = training_transform("cifar", 8, *HALF), evaluation_transform("squash", 8, *HALF)
    parts, cpu, gpu = [(on_disk, augment), (on_disk, plain)], torch.device("cpu"), torch.device("cuda")
    assert choose_loader([(memory, augment)], cpu) == ("resident", "the images are in memory")
    installed = {"nvidia", "nvidia.dali"}
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name if name in installed else None)
    assert choose_loader(parts, cpu) == ("dali", "image files, and DALI is installed")
    monkeypatch.setattr("kdfast.data.loaders.free_bytes", lambda device: 2**30)
    assert choose_loader(parts, gpu) == ("resident", "the images take 0.0 of 1.0 GiB free on cuda")
    monkeypatch.setattr("kdfast.data.loaders.free_bytes", lambda device: 1000)
    assert choose_loader(parts, gpu)[0] == "dali"
    installed.clear()
    name, why = choose_loader(parts, cpu)
    assert name == "torchvision"
    assert "kdfast[dali]" in why
