"""How folders are walked and read: which files and folders are images and classes, in training, data check and predict alike."""

from pathlib import Path

import pytest
from PIL import Image

from kdfast.data import DataError, load
from kdfast.data.images import find


def write_images(folder: Path, count: int = 3, side: int = 70) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        Image.new("RGB", (side, side + 5), (60, 70, 80)).save(folder / f"{i}.png")


def write_classes(*folders: Path) -> None:
    for folder in folders:
        for name in ("ant", "bee"):
            write_images(folder / name)


TOOLS = [
    ".ipynb_checkpoints", ".thumbnails", "@eaDir", "__MACOSX", "__pycache__", "#recycle", "$RECYCLE.BIN", "System Volume Information",
    "lost+found", ".git", "wandb",
]  # fmt: skip


@pytest.mark.parametrize("tool", TOOLS)
def test_folders_of_tools_hold_no_images_and_are_no_classes(tmp_path, tool):
    write_classes(tmp_path)
    expected = sorted(map(str, tmp_path.glob("*/*.png")))
    for place in (tmp_path / tool, tmp_path / tool / "ant", tmp_path / "ant" / tool, tmp_path / "bee" / tool / "deeper"):
        write_images(place)
    data = load(str(tmp_path))
    assert data.classes == ("ant", "bee")
    assert sorted(data.train.paths + data.val.paths + data.test.paths) == find(tmp_path).images == expected
    assert data.notes == ()


@pytest.mark.parametrize("name", ["._0.png", ".DS_Store", "Thumbs.db", "desktop.ini", ".0.png.swp"])
def test_files_of_tools_are_left_out_without_a_word(tmp_path, name):
    write_classes(tmp_path)
    (tmp_path / "ant" / name).write_bytes(b"x")
    data = load(str(tmp_path))
    assert len(data.train) + len(data.val) + len(data.test) == len(find(tmp_path).images) == 6
    assert (data.notes, find(tmp_path).others) == ((), [])


def test_a_hidden_folder_that_the_user_names_is_read(tmp_path):
    write_classes(tmp_path / ".cache" / "photos")
    assert load(str(tmp_path / ".cache" / "photos")).classes == ("ant", "bee")


@pytest.mark.parametrize("ending", [".JPG", ".jfif", ".jpe", ".avif", ".jp2", ".pbm", ".apng", ".tga", ".pnm", ".dib"])
def test_endings_stand_in_one_list(tmp_path, ending):
    write_classes(tmp_path)
    path = tmp_path / "ant" / f"x{ending}"
    path.write_bytes((tmp_path / "ant" / "0.png").read_bytes())
    data = load(str(tmp_path))
    assert str(path) in data.train.paths + data.val.paths + data.test.paths
    assert str(path) in find(tmp_path).images


def test_files_left_out_are_counted_and_named(tmp_path):
    write_classes(tmp_path)
    for name in ("ant/a.heic", "ant/b.heic", "bee/notes.txt", "bee/README"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "top.jpg").write_bytes(b"x")
    assert load(str(tmp_path)).notes == (
        f"{tmp_path}: left out 4 files without an image's ending: .heic 2, no ending 1, .txt 1 (ant/a.heic, ant/b.heic, bee/README, ...)",
        f"{tmp_path}: left out 1 of its images, which lie in no class folder: top.jpg",
    )


def test_run_folders_are_no_classes_and_hold_no_images(tmp_path):
    write_classes(tmp_path)
    for marker in ("runs/kd/.lock", "runs/compare/kd/metrics.jsonl", "mine/.lock"):
        path = tmp_path / marker
        write_images(path.parent / "figures")
        path.write_text("")
    write_images(tmp_path / "runs" / "kd", 1)  # a picture of its curves
    (tmp_path / "runs" / "kd" / "config.toml").write_text("")
    assert load(str(tmp_path)).classes == ("ant", "bee")
    assert len(find(tmp_path).images) == 6
    (tmp_path / "ant" / ".lock").write_text("")
    assert load(str(tmp_path)).classes == ("ant", "bee"), "a folder with images is one of images"


LAYOUTS = [
    ("Training", "Testing"),
    ("Train", "Test"),
    ("TRAIN", "TEST"),
    ("train", "validation"),
    ("train", "Valid"),
    ("training", "dev"),
    ("train", "val"),
    ("seg_train/seg_train", "seg_test/seg_test"),
    ("training_set/training_set", "test_set/test_set"),
    ("trainset", "testset"),
    ("train_images", "test_images"),
    ("train2017", "val2017"),
    ("dataset/dataset/train", "dataset/dataset/test"),
    ("archive/Training", "archive/Testing"),
]


@pytest.mark.parametrize(("train", "test"), LAYOUTS, ids=[train for train, _ in LAYOUTS])
def test_folders_of_splits_are_no_classes(tmp_path, train, test):
    write_classes(tmp_path / train, tmp_path / test)
    (tmp_path / "runs" / "kd").mkdir(parents=True)
    (tmp_path / "runs" / "kd" / ".lock").write_text("")
    data = load(str(tmp_path), val_fraction=0)
    assert data.classes == ("ant", "bee")
    assert {str(Path(path).parents[1]) for path in data.train.paths} == {str(tmp_path / train)}
    assert {str(Path(path).parents[1]) for path in data.test.paths} == {str(tmp_path / test)}
    assert bool(data.notes) == ((train, test) != ("train", "val")), "an unusual folder is said to be read so"


def test_three_folders_of_splits_have_their_places(tmp_path):
    write_classes(tmp_path / "TEST", tmp_path / "Validation", tmp_path / "Train", tmp_path / "seg_pred")
    data = load(str(tmp_path))
    places = [{Path(path).parents[1].name for path in split.paths} for split in (data.train, data.val, data.test)]
    assert places == [{"Train"}, {"Validation"}, {"TEST"}]
    assert data.notes == (f"{tmp_path}: Train/, Validation/, TEST/ are read as the splits, and seg_pred/ not at all",)


@pytest.mark.parametrize("folders", [("train", "plane", "bus"), ("test/1", "test/2", "control/3"), ("dev", "ops")])
def test_classes_may_be_called_like_splits_and_it_is_said(tmp_path, folders):
    for name in folders:
        write_images(tmp_path / name)
    data = load(str(tmp_path))
    assert data.classes == tuple(sorted({name.split("/")[0] for name in folders}))
    (note,) = data.notes
    assert "read as classes" in note


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        pytest.param(("train/ant", "train/bee"), "has train/ but neither val/ nor test/", id="train"),
        pytest.param(("Testing/ant", "val/ant"), "has val/, Testing/ but no train/", id="no train"),
        pytest.param(("train/ant", "Training/ant", "test/ant"), "both Training/ and train/ hold train images", id="two"),
        pytest.param(("train", "test1"), "train: expected one folder a class with images inside, found no folder", id="no classes"),
        pytest.param(("train/ant", "train/bee", "test"), r"test: expected one folder a class.*\(--no-use-test leaves out", id="kaggle"),
        pytest.param(("train/ant", "train/bee", "test/unknown"), r"class 'unknown' is not .*\(--no-use-test leaves out", id="unknown"),
    ],
)
def test_an_unclear_folder_gets_one_sentence(tmp_path, folders, message):
    for name in folders:
        write_images(tmp_path / name)
    with pytest.raises(DataError, match=message):
        load(str(tmp_path))


def test_a_test_folder_without_labels_can_be_left_out(tmp_path):
    write_classes(tmp_path / "train")
    write_images(tmp_path / "test")
    data = load(str(tmp_path), use_test=False)
    assert all("/train/" in path for path in data.train.paths + data.val.paths + data.test.paths)
    assert data.notes == (f"{tmp_path / 'test'} is left out (--no-use-test)",)
    with pytest.raises(DataError, match="only test/ of an image folder can be left out"):
        load("digits", use_test=False)


def test_only_training_needs_every_class(tmp_path):
    write_classes(tmp_path / "train")
    write_images(tmp_path / "test" / "bee")
    data = load(str(tmp_path))
    assert data.test.labels.tolist() == [1, 1, 1]
    assert data.notes == (f"{tmp_path / 'test'}: no image of class 'ant'",)


@pytest.mark.parametrize(("side", "size"), [(28, 28), (32, 32), (64, 64), (65, 224)])
def test_small_images_are_trained_at_their_size(tmp_path, side, size):
    for i, part in enumerate(("train/ant", "train/bee", "test/ant", "test/bee")):
        (tmp_path / part).mkdir(parents=True)
        for k in range(4):
            Image.new("RGB", (side, side), (40 * i, 9 * k, 90)).save(tmp_path / part / f"{k}.png")
    data = load(str(tmp_path))
    small = size == side
    assert (data.image_size, data.train_transform) == (size, "cifar" if small else "imagenet")
    assert bool(data.notes) == small
