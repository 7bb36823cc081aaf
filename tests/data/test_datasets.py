"""Data sets by name, from small files made here: what is read, how it is divided, and one clear sentence for each thing wrong."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from kdfast.data import DataError, hide_labels, load
from kdfast.data import datasets as module
from kdfast.data.cifar import CIFAR10
from kdfast.data.splits import FEWER, TEST, choose_stratified
from tests.data.samples import Payload


def pixels(height=12, width=16, seed=0):
    """A smooth picture: JPEG changes it little."""
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([(seed * 37 + 9 * y) % 256, (120 + 5 * x) % 256, (40 + 3 * (x + y)) % 256], axis=-1).astype(np.uint8)


def class_folders(root, counts, *, ending="png"):
    """root/<class>/<i>.png, counts[class] images each."""
    root.mkdir(parents=True, exist_ok=True)
    for c, (name, count) in enumerate(counts.items()):
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            Image.fromarray(pixels(seed=31 * c + i)).save(root / name / f"{i:03d}.{ending}")
    return root


def make_cifar_batch(classes=10, images=40, **changes):
    pixels = np.random.default_rng(0).integers(0, 256, (images, 3072), dtype=np.uint8)
    return pickle.dumps({"data": pixels, "labels": [i % classes for i in range(images)]} | changes, protocol=4)


def cifar_folder(root, batches):
    """cifar-10-batches-py with random images."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    for name in [*(f"data_batch_{b}" for b in batches), "test_batch"]:
        (folder / name).write_bytes(make_cifar_batch())
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": [f"class{c}" for c in range(10)]}))
    return folder


def tiny_folder(root, wnids=("n01", "n02", "n03"), train=10, val=4):
    folder = root / "tiny-imagenet-200"
    for wnid in wnids:
        class_folders(folder / "train" / wnid, {"images": train}, ending="JPEG")
        (folder / "train" / wnid / f"{wnid}_boxes.txt").write_text("0 0 1 1\n")
    class_folders(folder / "val", {"images": val * len(wnids)}, ending="JPEG")
    lines = [f"{i:03d}.JPEG\t{wnids[i % len(wnids)]}\t0\t0\t62\t62" for i in range(val * len(wnids))]
    (folder / "val" / "val_annotations.txt").write_text("\n".join(lines) + "\n")
    (folder / "words.txt").write_text("n01\tcrane\nn02\tcrane, wading bird\nn03\tteapot\n")
    return folder


def counts(split, classes):
    return torch.bincount(split.labels, minlength=classes).tolist()


# ---- dividing -------------------------------------------------------------------------------------------------------------------


def test_stratified_choice_gives_every_class_its_share():
    labels = torch.repeat_interleave(torch.arange(4), torch.tensor([400, 200, 100, 3]))[torch.randperm(703)]
    chosen, others = choose_stratified(labels, 70, seed=1, purpose=TEST)
    assert torch.equal(torch.cat([chosen, others]).sort().values, torch.arange(703))
    taken = torch.bincount(labels[chosen], minlength=4)
    assert taken.sum() == 70
    assert ((taken - torch.tensor([39.8, 19.9, 10.0, 0.3])).abs() <= 1).all()
    assert taken[3] == 1, "a small class keeps an image"


def test_stratified_choice_depends_on_seed_and_purpose_only():
    """And not on PyTorch's version."""
    chosen, _ = choose_stratified(torch.arange(3).repeat(10), 6, seed=0, purpose=TEST)
    assert chosen.tolist() == [4, 8, 11, 21, 22, 27]
    for others in ({"seed": 1, "purpose": TEST}, {"seed": 0, "purpose": FEWER}):
        assert not torch.equal(chosen, choose_stratified(torch.arange(3).repeat(10), 6, **others)[0])


def test_hide_labels_keeps_a_stratified_part_and_the_images():
    data = load("digits")
    split = hide_labels(data.train, 0.1, seed=3)
    visible = split.labels >= 0
    assert torch.equal(split.labels[visible], data.train.labels[visible])
    assert (split.labels[~visible] == -100).all()
    assert visible.sum() == round(0.1 * len(data.train))
    assert all(10 <= n <= 12 for n in torch.bincount(split.labels[visible]).tolist())
    assert split.pixels is data.train.pixels
    assert torch.equal(split.labels, hide_labels(data.train, 0.1, seed=3).labels)
    assert not torch.equal(split.labels, hide_labels(data.train, 0.1, seed=4).labels)
    assert (hide_labels(data.train, 1e-9, seed=0).labels >= 0).sum() == 10, "at least one a class"
    assert torch.equal(hide_labels(data.train, 1.0, seed=0).labels, data.train.labels)
    for fraction in (0.0, 1.1, float("nan")):
        with pytest.raises(DataError, match="above 0 and at most 1"):
            hide_labels(data.train, fraction, seed=0)


# ---- digits ---------------------------------------------------------------------------------------------------------------------


def test_digits_are_divided_60_20_20_and_stratified():
    data = load("digits")
    assert (len(data.train), len(data.val), len(data.test)) == (1079, 359, 359)
    assert not data.val_is_test
    for split, share in ((data.train, 0.6), (data.val, 0.2), (data.test, 0.2)):
        assert all(abs(n - share * 179.7) < 5 for n in counts(split, 10))
        assert split.pixels.dtype == torch.uint8
        assert split.pixels.shape[1:] == (3, 8, 8)
    seen = torch.cat([split.pixels for split in (data.train, data.val, data.test)])
    assert len(seen.flatten(1).unique(dim=0)) == 1797, "no image twice"
    assert seen.max() == 255
    scaled = seen.double() / 255
    assert scaled.mean().item() == pytest.approx(data.mean[0], abs=1e-3)
    assert scaled.std().item() == pytest.approx(data.std[0], abs=1e-3)
    few = load("digits", val_fraction=0, max_images=100, seed=1)
    assert few.val_is_test
    assert few.val is few.test
    assert (len(few.train), len(few.test)) == (100, 359)
    assert all(9 <= n <= 11 for n in counts(few.train, 10)), "a stratified part"
    assert torch.equal(few.test.pixels, load("digits", val_fraction=0, seed=1).test.pixels)
    assert not torch.equal(few.test.pixels, data.test.pixels)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param({"val_fraction": 1.0}, "val_fraction must be", id="val_fraction 1"),
        pytest.param({"val_fraction": -0.1}, "val_fraction must be", id="val_fraction -0.1"),
        pytest.param({"max_images": 0}, "max_images must be", id="max_images 0"),
        pytest.param({"max_images": 5}, "cannot choose 5 of 1079 images", id="max_images 5"),
        pytest.param({"name": "mnist"}, r"'mnist'; known names: digits, cifar10, .*folder", id="name"),
        pytest.param({"name": "folder"}, "folder: name the folder of images with --data-dir", id="no folder"),
        pytest.param({"name": "folder", "data_dir": "nowhere"}, "--data-dir nowhere is not a folder", id="absent folder"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(DataError, match=message):
        load(**{"name": "digits"} | options)


# ---- folders --------------------------------------------------------------------------------------------------------------------


def test_class_folders_are_divided_80_10_10(tmp_path, monkeypatch):
    class_folders(tmp_path, {"cat": 40, "ant": 20, "bee": 10})
    (tmp_path / "cat" / "notes.txt").write_text("not an image")
    (tmp_path / ".hidden").mkdir()
    data = load("folder", data_dir=tmp_path)
    assert data.classes == ("ant", "bee", "cat")
    assert [len(split) for split in (data.train, data.val, data.test)] == [56, 7, 7]
    assert counts(data.train, 3) == [16, 8, 32]
    assert sorted(data.train.paths + data.val.paths + data.test.paths) == sorted(map(str, tmp_path.glob("*/*.png")))
    assert all(f"/{data.classes[c]}/" in path for c, path in zip(data.test.labels.tolist(), data.test.paths))
    walk = module.images.os.walk
    monkeypatch.setattr(module.images.os, "walk", lambda *a, **k: ((p, d, f[::-1]) for p, d, f in walk(*a, **k)))
    assert load(str(tmp_path)).train.paths == data.train.paths, "in whatever order the file system lists them"


@pytest.mark.parametrize("held_out", ["val", "valid", "test"])
def test_the_second_of_two_folders_is_test_and_val_comes_from_train(tmp_path, held_out):
    class_folders(tmp_path / "train", {"ant": 30, "train": 20})  # a class may be called train
    class_folders(tmp_path / held_out, {"ant": 3, "train": 4})
    data = load("folder", data_dir=tmp_path, val_fraction=0.2)
    assert [counts(split, 2) for split in (data.train, data.val, data.test)] == [[24, 16], [6, 4], [3, 4]]
    assert all(f"{tmp_path}/train/" in path for path in data.train.paths + data.val.paths)
    assert all(f"/{held_out}/" in path for path in data.test.paths)
    data = load("folder", data_dir=tmp_path, val_fraction=0)
    assert data.val_is_test
    assert (len(data.train), data.val.paths) == (50, data.test.paths)
    if held_out == "test":
        class_folders(tmp_path / "val", {"ant": 2, "train": 2})
        data = load("folder", data_dir=tmp_path, val_fraction=0.5)
        assert [len(split) for split in (data.train, data.val, data.test)] == [50, 4, 7], "three folders are used as they are"


# images of each class of train/ and of val/ (0: an empty class folder), and the message
WRONG = {
    "no images in val": ({"ant": 4, "bee": 4}, {"ant": 0, "bee": 0}, "val: no image of classes 'ant', 'bee'"),
    "class without images in train": ({"ant": 0, "bee": 4}, {"ant": 2, "bee": 2}, "train: no image of class 'ant'"),
    "class not in train": ({"ant": 4, "bee": 4}, {"ant": 2, "bee": 2, "cat": 1}, "val: class 'cat' is not among the 2 classes of train/"),
    "no images": ({"ant": 0, "bee": 0}, {"ant": 0}, r"train: no image of classes 'ant', 'bee'; known endings: \.jpg"),
    "no class folders": ({".": 1}, {"ant": 2}, "train: expected one folder a class with images inside, found no folder"),
    "one class": ({"ant": 4}, {"ant": 2}, "at least 2 classes are needed, found 1: ant"),
    "one image a class": ({"ant": 4, "bee": 1}, {"ant": 2, "bee": 2}, "class 'bee' with 1 image"),
}


@pytest.mark.parametrize(("train", "val", "message"), WRONG.values(), ids=list(WRONG))
def test_a_broken_folder_gets_one_sentence(tmp_path, train, val, message):
    class_folders(tmp_path / "train", train)
    class_folders(tmp_path / "val", val)
    with pytest.raises(DataError, match=message) as caught:
        load("folder", data_dir=tmp_path)
    assert "\n" not in str(caught.value)


def test_train_alone_is_no_class(tmp_path):
    class_folders(tmp_path / "train", {"ant": 4, "bee": 4})
    with pytest.raises(DataError, match="has train/ but neither val/ nor test/"):
        load("folder", data_dir=tmp_path)


# ---- named folders of images ----------------------------------------------------------------------------------------------------


def test_imagenette_is_found_under_data_dir_or_as_data_dir_and_has_readable_names(tmp_path):
    folder = tmp_path / "imagenette2-160"
    for part in ("train", "val"):
        class_folders(folder / part, {"n01440764": 10, "n03425413": 10}, ending="JPEG")
    data = load("imagenette", data_dir=tmp_path, download=False)
    assert data.classes == ("tench", "gas pump")
    assert data.image_size == 160
    assert (len(data.train), len(data.val), len(data.test)) == (18, 2, 20)
    assert load("imagenette", data_dir=folder).test.paths == data.test.paths
    folder.rename(tmp_path / "imagenette2")
    assert load("imagenette", data_dir=tmp_path).image_size == 224


def test_tiny_imagenet_reads_the_official_layout(tmp_path):
    folder = tiny_folder(tmp_path)
    data = load("tiny-imagenet", data_dir=tmp_path)
    assert data.classes == ("crane 1", "crane 2", "teapot")
    assert [counts(split, 3) for split in (data.train, data.val, data.test)] == [[9] * 3, [1] * 3, [4] * 3]
    assert data.test.paths[4] == str(folder / "val" / "images" / "004.JPEG")
    assert data.test.labels[:5].tolist() == [0, 1, 2, 0, 1]
    assert data.test.read(4).shape == (3, 12, 16)
    (folder / "val" / "val_annotations.txt").write_text("000.JPEG\tn77\t0\n")
    with pytest.raises(DataError, match=r"val_annotations\.txt, line 1: .*'000.JPEG\\tn77"):
        load("tiny-imagenet", data_dir=tmp_path)


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "tiny-imagenet", "imagenette"])
def test_an_absent_data_set_is_described(tmp_path, name):
    with pytest.raises(DataError, match=rf"{name} was not found: looked for .* in {tmp_path} \(--data-dir\)"):
        load(name, data_dir=tmp_path, download=False)


def test_a_failed_download_says_what_to_do(tmp_path, monkeypatch):
    import torchvision.datasets.utils as utils

    def no_network(*_args, **_options):
        raise OSError("no route to host")

    monkeypatch.setattr(utils, "download_and_extract_archive", no_network)
    with pytest.raises(DataError, match=r"could not be downloaded from https://.*no route to host.*put the unpacked folder cifar-10"):
        load("cifar10", data_dir=tmp_path)


def test_half_an_unpacked_download_is_no_data_set(tmp_path, monkeypatch):
    """The disk fills up in the middle; what is there looks complete, since its marker comes early."""
    import torchvision.datasets.utils as utils

    def unpack(url, root, extract_root, md5):
        (Path(extract_root) / "imagenette2-160" / "train").mkdir(parents=True)
        raise OSError("no space left on device")

    monkeypatch.setattr(utils, "download_and_extract_archive", unpack)
    for _ in range(2):
        with pytest.raises(DataError, match=r"imagenette is not in .* and could not be downloaded from .*no space left"):
            load("imagenette", data_dir=tmp_path)
    assert list(tmp_path.iterdir()) == []


# ---- CIFAR ----------------------------------------------------------------------------------------------------------------------


def test_cifar_reads_whichever_batches_are_present(tmp_path):
    folder = cifar_folder(tmp_path, (1, 2))
    with pytest.warns(UserWarning, match="2 of 5 training batches"):
        data = load("cifar10", data_dir=tmp_path, val_fraction=0.25)
    assert (len(data.train), len(data.val), len(data.test)) == (60, 20, 40)
    assert data.classes[3] == "class3"
    stored = pickle.loads((folder / "test_batch").read_bytes())
    assert torch.equal(data.test.read(7), torch.from_numpy(stored["data"][7]).view(3, 32, 32))
    assert data.test.labels.tolist() == stored["labels"]


def test_cifar100_reads_fine_labels(tmp_path):
    for name in ("train", "test"):
        (tmp_path / name).write_bytes(make_cifar_batch(fine_labels=[0, 1] * 20))
    (tmp_path / "meta").write_bytes(pickle.dumps({"fine_label_names": ["apple", "bear"]}))
    data = load("cifar100", data_dir=tmp_path)
    assert data.classes == ("apple", "bear")
    assert counts(data.train, 2) == [18, 18]


def test_a_pickle_that_would_run_code_is_refused(tmp_path):
    target = tmp_path / "written"
    (cifar_folder(tmp_path, (1,)) / "test_batch").write_bytes(make_cifar_batch(data=Payload(target)))
    refusal = r"test_batch: .*_?io\.open, which no CIFAR batch needs"
    with pytest.warns(UserWarning, match="batches are present"), pytest.raises(DataError, match=refusal):
        load("cifar10", data_dir=tmp_path)
    assert not target.exists()


UNOFFICIAL = "data_batch_1: not an official CIFAR batch: expected 'data'"
DAMAGED = r"data_batch_3: not an official CIFAR batch: \S+"


@pytest.mark.parametrize(
    ("files", "content", "message"),
    [
        pytest.param("data_batch_1", {"labels": [10, 1] * 20}, "labels of train must be 0 to 9 for 10 classes, got 10", id="range"),
        pytest.param("data_batch_1", {"labels": [0]}, UNOFFICIAL, id="one label"),
        pytest.param("data_batch_1", {"labels": None}, UNOFFICIAL, id="no labels"),
        pytest.param("data_batch_1", {"data": np.zeros((40, 100), np.uint8)}, UNOFFICIAL, id="shape"),
        pytest.param("data_batch_1", {"data": np.zeros((40, 3072), np.float32)}, UNOFFICIAL, id="dtype"),
        pytest.param("data_batch_3", b"", DAMAGED, id="empty"),
        pytest.param("data_batch_3", b"garbage", DAMAGED, id="garbage"),
        pytest.param("data_batch_3", pickle.dumps([1, 2]), DAMAGED, id="list"),
        pytest.param("test_batch", None, "the file test_batch is missing", id="no test batch"),
        pytest.param("data_batch_*", None, "the file data_batch_1 is missing", id="no training batch"),
    ],
)
def test_a_bad_cifar_file_is_named(tmp_path, files, content, message):
    for path in cifar_folder(tmp_path, range(1, 1 + len(CIFAR10.train))).glob(files):
        path.unlink()
        if content is not None:
            path.write_bytes(make_cifar_batch(**content) if isinstance(content, dict) else content)
    with pytest.raises(DataError, match=message):
        load("cifar10", data_dir=tmp_path, val_fraction=0)


# ---- the real thing -------------------------------------------------------------------------------------------------------------


@pytest.mark.data
def test_real_cifar10(real_data):
    with pytest.warns(UserWarning, match="1 of 5 training batches"):
        data = load("cifar10", data_dir=real_data)
    assert (len(data.train), len(data.val), len(data.test)) == (9000, 1000, 10000)
    assert data.classes[0] == "airplane"
    assert counts(data.test, 10) == [1000] * 10
    assert data.test.labels[:5].tolist() == [3, 8, 8, 0, 6]
