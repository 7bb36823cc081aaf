"""The torchvision loader: each image once, the same batches whatever the workers, exact resuming, shards, and clear failures."""

import os
import pickle
import re
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace

import pytest
import torch
from PIL import Image

from kdfast.data import DataError, Loader, Split, TorchvisionLoader, evaluation_transform, load, make_loaders, training_transform
from kdfast.data.augment import Step
from kdfast.data.seeding import mix

HALF = ((0.5,) * 3, (0.5,) * 3)
AUGMENT = training_transform("cifar", 8, *HALF)
PLAIN = evaluation_transform("squash", 8, *HALF)


def split_of(n, size=8):
    """N images, each of its own; labels 0 1 2 0 1 2 ..."""
    pixels = (torch.arange(n * 3 * size * size) * 7 % 251).to(torch.uint8).view(n, 3, size, size)
    return Split(torch.arange(n) % 3, pixels=pixels)


def loader_of(split, transform=AUGMENT, batch_size=4, *, shuffle=True, seed=0, **options):
    return TorchvisionLoader(split, transform, batch_size, shuffle=shuffle, seed=seed, **options)


def same(a, b):
    """Two lists of batches are equal bit for bit."""
    return len(a) == len(b) and all(torch.equal(x, y) for batch_a, batch_b in zip(a, b) for x, y in zip(batch_a, batch_b))


def files(folder, n, size=(9, 12)):
    """N PNG files as a split, and that split in memory."""
    memory = split_of(n, size=16)
    pixels = memory.pixels[:, :, : size[0], : size[1]]
    paths = [str(folder / f"{i}.png") for i in range(n)]
    for path, image in zip(paths, pixels):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)
    return Split(memory.labels, paths=tuple(paths)), Split(memory.labels, pixels=pixels)


def test_it_is_a_loader():
    assert isinstance(loader_of(split_of(4)), Loader)


@pytest.mark.parametrize("n", [1, 4, 10])
def test_each_image_once_an_epoch(n):
    split = split_of(n)
    loader = loader_of(split)
    batches = list(loader)
    index = torch.cat([batch.index for batch in batches])
    assert torch.equal(index.sort().values, torch.arange(n))
    assert torch.equal(torch.cat([batch.labels for batch in batches]), split.labels[index])
    assert (len(loader), loader.samples) == (len(batches), n)
    assert all(batch.images.dtype == torch.float32 for batch in batches)
    assert all(batch.labels.dtype == batch.index.dtype == torch.int64 for batch in batches)


def test_images_are_the_splits_normalized():
    split = split_of(5)
    (first, second) = loader_of(split, PLAIN, shuffle=False)
    assert first.index.tolist() == [0, 1, 2, 3]
    assert torch.allclose(torch.cat([first.images, second.images]), (split.pixels / 255 - 0.5) / 0.5, atol=1e-6)


def test_files_and_memory_give_the_same_batches(tmp_path):
    on_disk, in_memory = files(tmp_path, 7)
    for transform in (AUGMENT, PLAIN, training_transform("imagenet", 8, *HALF)):
        assert same(list(loader_of(on_disk, transform)), list(loader_of(in_memory, transform)))


@pytest.mark.parametrize("channels_last", [False, True])
def test_memory_format(tmp_path, channels_last):
    on_disk, in_memory = files(tmp_path, 4)
    wanted = torch.channels_last if channels_last else torch.contiguous_format
    for split in (on_disk, in_memory):
        (batch,) = loader_of(split, channels_last=channels_last)
        assert batch.images.is_contiguous(memory_format=wanted)


def test_workers_change_nothing(tmp_path):
    on_disk, _ = files(tmp_path, 11)
    transform = training_transform("conkd-student", 8, *HALF)
    alone, helped = loader_of(on_disk, transform), loader_of(on_disk, transform, workers=2)
    for epoch in (0, 3):
        alone.set_epoch(epoch)
        helped.set_epoch(epoch)
        assert same(list(alone), list(helped))


def test_epochs_and_seeds_differ_in_order_and_augmentation():
    split = split_of(12)

    def epoch_of(seed, epoch, shuffle):
        loader = loader_of(split, batch_size=12, seed=seed, shuffle=shuffle)
        loader.set_epoch(epoch)
        return next(iter(loader))

    first = epoch_of(0, 0, True)
    assert same([first], [epoch_of(0, 0, True)])
    for other in (epoch_of(0, 1, True), epoch_of(1, 0, True)):
        assert not torch.equal(first.index, other.index)
    assert not torch.equal(epoch_of(0, 0, False).images, epoch_of(0, 1, False).images)


def test_augmentation_belongs_to_the_image_not_to_its_place():
    split = split_of(12)
    (ordered,) = loader_of(split, batch_size=12, shuffle=False)
    for batch in loader_of(split, batch_size=5):
        assert torch.equal(batch.images, ordered.images[batch.index])


def test_each_image_has_an_augmentation_of_its_own():
    (alike,) = loader_of(Split(torch.zeros(20, dtype=torch.int64), pixels=split_of(1).pixels.repeat(20, 1, 1, 1)), batch_size=20)
    assert len(alike.images.flatten(1).unique(dim=0)) > 10


@pytest.mark.parametrize("workers", [0, 2])
def test_the_random_state_is_untouched(workers):
    state = torch.get_rng_state()
    for _ in loader_of(split_of(9), workers=workers):
        assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("done", [0, 1, 3, 5])
def test_resuming_gives_the_very_next_batch(workers, done):
    split = split_of(18)
    loader = loader_of(split)
    loader.set_epoch(2)
    whole = list(loader)
    assert len(whole) == 5

    first = loader_of(split, workers=workers)
    first.set_epoch(2)
    running = iter(first)
    got = [next(running) for _ in range(done)]
    state = first.state_dict()
    assert state == {"epoch": 2, "batch": done}, "batches handed out, whatever was prefetched"

    second = loader_of(split, workers=workers)
    second.load_state_dict(state)
    assert same(got + list(second), whole)
    if done < len(whole):
        assert same(got + list(first), whole), "so does the interrupted loader itself"


def test_iterating_again_starts_the_epoch_over():
    loader = loader_of(split_of(6))
    loader.set_epoch(4)
    assert same(list(loader), list(loader))
    assert loader.state_dict() == {"epoch": 4, "batch": 2}
    restored = loader_of(split_of(6))
    restored.load_state_dict(loader.state_dict())
    assert list(restored) == [], "an epoch that was complete when saved has no rest"
    assert len(list(restored)) == 2


def test_a_state_of_something_else_is_refused():
    with pytest.raises(DataError, match="batch 9, but an epoch has 2 batches"):
        loader_of(split_of(6)).load_state_dict({"epoch": 0, "batch": 9})


@pytest.mark.parametrize("n", [2, 8, 11, 13, 16])
@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_share_every_image_exactly_once_in_evaluation(n, world_size):
    parts = [loader_of(split_of(n), PLAIN, 2, shuffle=False, rank=rank, world_size=world_size) for rank in range(world_size)]
    index = torch.cat([batch.index for part in parts for batch in part])
    assert torch.equal(index.sort().values, torch.arange(n))
    assert sum(part.samples for part in parts) == n
    assert all(len(list(part)) == len(part) for part in parts)


def test_ranks_joined_are_one_process_with_the_whole_batch():
    split = split_of(30)
    one = loader_of(split, batch_size=8, drop_last=True)
    two = [loader_of(split, batch_size=4, rank=rank, world_size=2, drop_last=True) for rank in range(2)]
    joined = [tuple(torch.cat(parts) for parts in zip(*pair)) for pair in zip(*two)]
    assert same(list(one), joined)
    assert len(joined) == 3


@pytest.mark.parametrize(("n", "world_size", "sizes"), [(10, 1, [4, 4]), (3, 1, [3]), (7, 2, [3]), (17, 2, [4, 4]), (2, 2, [1])])
def test_drop_last_keeps_ranks_even_and_never_empties_the_epoch(n, world_size, sizes):
    for rank in range(world_size):
        loader = loader_of(split_of(n), rank=rank, world_size=world_size, drop_last=True)
        assert [len(batch.labels) for batch in loader] == sizes
        assert (len(loader), loader.samples) == (len(sizes), sum(sizes))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"batch_size": 0}, "batch_size and views must be at least 1"),
        ({"workers": -1}, "workers must be at least 0"),
        ({"rank": 2, "world_size": 2}, "rank 2 of 2"),
        ({"rank": 0, "world_size": 9, "drop_last": True}, "3 images cannot be shared by 9 ranks"),
    ],
)
def test_bad_arguments_are_named(options, says):
    with pytest.raises(DataError, match=says):
        loader_of(split_of(3), **options)


def test_an_empty_split_is_refused():
    with pytest.raises(DataError, match="empty split"):
        loader_of(split_of(3).subset(torch.tensor([], dtype=torch.int64)))


def complaint(loader):
    """The sentence that iterating ends with. pytest.raises would keep the workers alive: it holds the traceback, and so the loader."""
    try:
        list(loader)
    except DataError as error:
        return str(error)
    return pytest.fail("no DataError was raised")


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("transform", [AUGMENT, PLAIN], ids=["training", "evaluation"])
def test_a_broken_image_is_one_sentence_that_names_it(tmp_path, workers, transform):
    on_disk, _ = files(tmp_path, 9)
    path = tmp_path / "6.png"
    path.write_bytes(path.read_bytes()[:60])
    assert re.fullmatch(r".*6\.png: the image cannot be read: .*", complaint(loader_of(on_disk, transform, workers=workers)))


def test_images_of_different_sizes_are_one_sentence(tmp_path):
    for i, size in enumerate([(8, 9), (10, 8)]):
        Image.new("RGB", size).save(tmp_path / f"{i}.png")
    split = Split(torch.tensor([0, 1]), paths=(str(tmp_path / "0.png"), str(tmp_path / "1.png")))
    with pytest.raises(DataError, match=r"images differ in size \(10x8 and 8x9\)"):
        list(loader_of(split, evaluation_transform("none", 8, *HALF)))


class Dying(Step):
    """What the kernel does to a process that takes too much memory."""

    def alone(self, image):
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_dead_worker_is_one_sentence():
    loader = loader_of(split_of(9), replace(AUGMENT, steps=(Dying(),)), workers=1)
    assert re.fullmatch(r"a process that reads images died.*fewer workers \(.*worker.*\)", complaint(loader))


def test_what_workers_are_given_can_be_pickled():
    loader = loader_of(split_of(5), training_transform("conkd-student", 8, *HALF))
    samples = pickle.loads(pickle.dumps(loader._loader.dataset))
    request = (1, [3, 1])
    assert same([samples[request]], [loader._loader.dataset[request]])


SIGNALLED = """
    import signal, sys, time, torch
    torch.set_num_threads(1)
    from kdfast.data import Split, TorchvisionLoader, training_transform
    transform = training_transform("cifar", 8, (0.5,) * 3, (0.5,) * 3)
    split = Split(torch.zeros(4000, dtype=torch.int64), pixels=torch.zeros(4000, 3, 8, 8, dtype=torch.uint8))
    loader = TorchvisionLoader(split, transform, 4, shuffle=True, seed=0, workers=2)
    seen = set()
    for batch in loader:
        # only now that the workers run: they have not inherited these
        signal.signal(signal.SIGINT, lambda *_: seen.add("SIGINT"))
        signal.signal(signal.SIGTERM, lambda *_: seen.add("SIGTERM"))
        print("batch", flush=True)
        time.sleep(0.01)
        if len(seen) == 2 and loader.state_dict()["batch"] > 30:
            print(*sorted(seen), flush=True)
            break
"""


@pytest.mark.parametrize("workers", [0, 1])
def test_an_iteration_within_another_is_right_or_an_error(workers):
    loader = loader_of(split_of(40), workers=workers)
    whole = list(loader)
    loader.set_epoch(0)
    outer = iter(loader)
    first = next(outer)
    within = list(loader.in_order())
    assert torch.cat([batch.index for batch in within]).tolist() == list(range(40))
    if workers:
        with pytest.raises(DataError, match="iterated anew before an earlier iteration was over"):
            next(outer)
    else:
        assert same([first, *outer], whole)


def test_signals_to_the_process_group_leave_the_workers_working():
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(SIGNALLED)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "PYTHONWARNINGS": "ignore"},  # PyTorch's, of more workers than cores
    )
    assert process.stdout.readline() == "batch\n"  # of the first worker: the other may still be starting
    os.killpg(process.pid, signal.SIGINT)
    os.killpg(process.pid, signal.SIGTERM)
    started = time.monotonic()
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0
    assert out.splitlines()[-1] == "SIGINT SIGTERM"
    assert err == ""
    assert time.monotonic() - started < 20, "workers end with the main process"


def test_seeds_of_neighbours_are_unrelated():
    seeds = {mix(a, b, c) % 2**32 for a in range(10) for b in range(10) for c in range(100)}
    assert len(seeds) >= 9_990, "the generator uses the low 32 bits: hardly any may coincide"
    assert mix(0, 1) != mix(1, 0)
    assert mix(-1) == mix(2**64 - 1)


# ---- make_loaders ---------------------------------------------------------------------------------------------------------------


def test_make_loaders_follows_the_data_set():
    loaders = make_loaders(load("digits"), batch_size=64)
    assert [loader.samples for loader in loaders] == [1024, 359, 359]
    order = torch.cat([batch.index for batch in loaders.val])
    assert torch.equal(order, torch.arange(359)), "evaluation does not shuffle"
    images = torch.cat([batch.images for batch in loaders.test])
    assert images.mean().abs() < 0.05
    assert abs(images.std().item() - 1) < 0.05


def test_make_loaders_takes_names_sizes_and_a_part_of_the_labels():
    data = load("digits")
    loaders = make_loaders(
        data, batch_size=32, train_transform="none", eval_transform="center-crop", image_size=14, normalization="half", label_fraction=0.25
    )
    batches = list(loaders.train)
    assert batches[0].images.shape == (32, 3, 14, 14)
    assert torch.cat([batch.images for batch in batches]).min() >= -1
    labels = torch.cat([batch.labels for batch in batches])
    assert 0.2 < (labels >= 0).float().mean() < 0.3
    assert torch.cat([batch.labels for batch in loaders.val]).min() >= 0, "evaluation sees every label"


def test_make_loaders_names_what_is_unknown():
    data = load("digits")
    with pytest.raises(DataError, match=r"normalization must be one of imagenet, .* got 'cifar'"):
        make_loaders(data, batch_size=8, normalization="cifar")
    with pytest.raises(DataError, match="training transform must be one of"):
        make_loaders(data, batch_size=8, train_transform="digit")


def test_digits_cost_little():
    loader = make_loaders(load("digits"), batch_size=64).train
    seconds = []
    for epoch in range(5):
        loader.set_epoch(epoch)
        start = time.perf_counter()
        assert sum(len(batch.labels) for batch in loader) == 1024
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.15, "a laptop's minute is for training"


def test_importing_is_cheap():
    code = "import sys, kdfast.data; print([m for m in ('torchvision', 'sklearn', 'PIL') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.data
def test_real_imagenette_through_workers(real_data):
    data = load("imagenette", data_dir=real_data, max_images=64)
    train, val, _ = make_loaders(data, batch_size=16, workers=2, image_size=64)
    assert sum(len(batch.labels) for batch in train) == 64
    batch = next(iter(val))
    assert batch.images.shape == (16, 3, 64, 64)
    assert batch.images.abs().max() < 3
