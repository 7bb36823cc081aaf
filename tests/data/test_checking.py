"""The check of image files: a bad file is named once with its reason, and a known file is not opened again."""

import errno
import multiprocessing
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from kdfast.data import Checked, DataError, Split, check, load, usable
from kdfast.data.images import decode, decode_with_kind, find
from tests.data.samples import GOOD, REASONS, SIXTEEN, SPECIAL, TWO_BAD, encode, make_noise, plant, write_class_folders

MODULE = sys.modules["kdfast.data.checking"]


def fail(*_: object) -> None:
    raise AssertionError("a file was opened")


def same(a: Checked, b: Checked) -> bool:
    return torch.equal(a.sizes, b.sizes) and (a.kinds, a.bad) == (b.kinds, b.bad)


# ---- one file -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", REASONS)
def test_a_bad_file_is_named_once_with_its_reason(tmp_path: Path, name: str):
    path = str(plant(tmp_path, name))
    assert find(tmp_path).images == [path]
    with pytest.raises(DataError, match=rf"^{path}: [^\n]*({REASONS[name]})[^\n]*$") as caught:
        decode(path)
    found = check([path])
    assert found.bad == {path: str(caught.value).removeprefix(f"{path}: ")}
    assert (found.sizes.tolist(), found.kinds) == ([[0, 0]], ("",))


@pytest.mark.parametrize("name", GOOD)
def test_a_good_file_has_pillows_pixels_a_size_and_a_kind(tmp_path: Path, name: str, recwarn: pytest.WarningsRecorder):
    path = str(plant(tmp_path, name))
    with Image.open(path) as image:
        # 16 bits are scaled, where Pillow clips them
        expected = np.array(SIXTEEN)[..., None].repeat(3, -1) >> 8 if name == "sixteen.png" else np.array(image.convert("RGB"))
    recwarn.clear()
    assert torch.equal(decode(path), torch.from_numpy(expected.astype(np.uint8)).permute(2, 0, 1))
    found = check([path])
    assert (found.sizes.tolist(), found.kinds, found.bad) == ([[24, 32]], (GOOD[name][1],), {})
    assert found.sizes.dtype == torch.int32
    assert not [warning for warning in recwarn if warning.category is UserWarning]


def test_a_file_that_could_not_be_opened_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "a.jpg"
    path.write_bytes(encode("JPEG"))

    def refuse(self: Path) -> bytes:
        raise PermissionError(errno.EACCES, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", refuse)
        assert check([str(path)]).bad == {str(path): "the image cannot be opened: Permission denied"}
    assert not check([str(path)]).bad


def test_find_walks_folders_with_an_images_ending_and_leaves_loops(tmp_path: Path):
    inner = tmp_path / "album.jpg" / "a.jpg"
    inner.parent.mkdir()
    inner.write_bytes(encode("JPEG"))
    for name in ("up", "around"):
        (inner.parent / name).symlink_to(tmp_path, target_is_directory=True)
    assert find(tmp_path).images == [str(inner)]


# ---- known files ----------------------------------------------------------------------------------------------------------------


def test_a_second_check_opens_nothing(mixture: list[str], monkeypatch: pytest.MonkeyPatch):
    paths = [path for path in mixture if Path(path).name not in SPECIAL]
    for name in ("a\nb.png", "ü.png", os.fsdecode(b"\xff.png"), " .png"):
        paths.append(str(Path(paths[0]).with_name(name)))
        Path(paths[-1]).write_bytes(encode("PNG"))
    check(paths[:2])
    assert check(paths[2:]).decoded == len(paths) - 2
    first = check(paths)
    assert first.decoded == 0, "a check of some files keeps the outcomes of others"
    assert check(paths, cache=False).decoded == len(paths)
    monkeypatch.setattr(MODULE, "decode_with_kind", fail)
    second = check(paths[::-1])
    assert second.decoded == 0
    assert same(check(paths), first)
    assert second.sizes.tolist() == first.sizes.tolist()[::-1]


def test_a_relative_path_and_a_repeated_one_are_the_same_file(mixture: list[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(Path(mixture[0]).parent)
    found = check(["zero.jpg", "colour.jpg", "zero.jpg", os.path.abspath("zero.jpg")])
    assert found.decoded == 2
    assert found.sizes.tolist() == [[0, 0], [24, 32], [0, 0], [0, 0]]
    assert list(found.bad) == ["zero.jpg", os.path.abspath("zero.jpg")]


def test_a_changed_file_is_opened_again(tmp_path: Path):
    path, other = tmp_path / "a.png", tmp_path / "b.png"
    for file in (path, other):
        file.write_bytes(encode("PNG"))
    check([str(path), str(other)])
    before = path.stat()
    for content, time, size in ((encode("PNG", make_noise(10, 12)), 0, [10, 12]), (bytes(before.st_size), 1, [0, 0])):
        path.write_bytes(content)
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + time))
        found = check([str(path), str(other)])
        assert (found.decoded, found.sizes.tolist()) == (1, [size, [24, 32]])


def list_cache() -> list[Path]:
    return sorted((MODULE.cache_folder() / "checks").iterdir())


def test_a_broken_or_foreign_cache_is_ignored_and_replaced(mixture: list[str], monkeypatch: pytest.MonkeyPatch):
    first = check(mixture)
    (path,) = list_cache()
    content = path.read_bytes()
    for damaged in (b"", content[: len(content) // 2], content[:-1] + bytes([content[-1] ^ 1]), encode("PNG")):
        path.write_bytes(damaged)
        again = check(mixture)
        assert again.decoded == len(mixture)
        assert same(again, first)
        assert check(mixture).decoded == len(SPECIAL)
    monkeypatch.setattr(MODULE, "VERSION", MODULE.VERSION + 1)
    assert check(mixture).decoded == len(mixture)
    path.unlink()
    path.mkdir()
    assert check(mixture).decoded == check(mixture).decoded == len(mixture), "a cache that cannot be written costs only time"


@pytest.mark.parametrize("few", [0, 500], ids=["processes", "this process"])
def test_outcomes_before_an_interruption_are_kept(mixture: list[str], few: int, monkeypatch: pytest.MonkeyPatch):
    def stop(done: int, total: int) -> None:
        assert total == len(mixture)
        if done >= 8:
            raise KeyboardInterrupt

    monkeypatch.setattr(MODULE, "FEW", few)
    monkeypatch.setattr(MODULE, "CHUNK", 4)
    with pytest.raises(KeyboardInterrupt):
        check(mixture, workers=2, progress=stop)
    assert len(mixture) - 8 <= check(mixture, workers=1).decoded <= len(mixture) - 8 + len(SPECIAL)


# ---- several processes ----------------------------------------------------------------------------------------------------------


def decode_elsewhere(path: str, data: bytes) -> tuple[torch.Tensor, str]:
    assert multiprocessing.parent_process() is not None
    return decode_with_kind(path, data)


def test_processes_find_the_same_as_one(mixture: list[str], monkeypatch: pytest.MonkeyPatch):
    state, alone = torch.get_rng_state(), check(mixture, cache=False)
    monkeypatch.setattr(MODULE, "FEW", 0)
    monkeypatch.setattr(MODULE, "CHUNK", 4)
    monkeypatch.setattr(MODULE, "decode_with_kind", decode_elsewhere)
    seen: list[tuple[int, int]] = []
    together = check(mixture, workers=2, progress=lambda done, total: seen.append((done, total)))
    assert same(together, alone)
    assert seen[-1] == (len(mixture), len(mixture))
    assert len(seen) == -(-len(mixture) // 4)
    assert torch.equal(torch.get_rng_state(), state)


# ---- a data set -----------------------------------------------------------------------------------------------------------------


def test_usable_drops_bad_files_and_knows_the_others(tmp_path: Path):
    data = load(str(write_class_folders(tmp_path / "i", TWO_BAD)), val_fraction=0.25)
    said: list[str] = []
    good = usable(data, max_bad_files=2, say=said.append)
    assert sum(map(len, (good.train, good.val, good.test))) == 30
    for part in ("train", "val", "test"):
        before, after = getattr(data, part), getattr(good, part)
        assert after.paths == tuple(p for p in before.paths if not p.endswith(tuple(TWO_BAD)))
        assert after.labels.tolist() == [label for label, p in zip(before.labels.tolist(), before.paths) if p in after.paths]
        assert (after.sizes.dtype, after.plain.dtype) == (torch.int32, torch.bool)
        assert after.sizes.tolist() == [[24, 30 + int(Path(p).stem)] for p in after.paths]
        assert after.plain.tolist() == [not p.endswith("train/cat/0.jpg") for p in after.paths]
    (line,) = said
    assert "left out 2 bad image files" in line
    assert all(line.count(name) == 1 for name in TWO_BAD)
    part = good.train.subset(torch.tensor([3, 1]))
    assert torch.equal(part.sizes, good.train.sizes[[3, 1]])
    assert torch.equal(part.plain, good.train.plain[[3, 1]])
    assert Split(torch.zeros(1), paths=("a",)).subset(torch.tensor([0])).sizes is None


def test_too_many_bad_files_are_an_error_of_one_sentence(tmp_path: Path):
    data = load(str(write_class_folders(tmp_path / "i", {f"train/dog/{i}.jpg": "zero.jpg" for i in range(7)})))
    with pytest.raises(DataError, match=r"7 image files are bad, where --max-bad-files allows 1: .* and 2 more$") as caught:
        usable(data, max_bad_files=1)
    assert str(caught.value).count(".jpg (the image file is empty (0 bytes))") == 5
    with pytest.raises(DataError, match="max_bad_files must be at least 0, got -1"):
        usable(data, max_bad_files=-1)
    with pytest.raises(DataError, match="workers must be at least 1, got 0"):
        check([], workers=0)


def test_a_class_of_bad_files_only_is_an_error_in_training(tmp_path: Path):
    data = load(
        str(write_class_folders(tmp_path / "i", {f"{part}/dog/{i}.jpg": "zero.jpg" for part in ("train", "val") for i in range(8)}))
    )
    with pytest.raises(DataError, match="no image of class 'dog' in train"):
        usable(data, max_bad_files=16)
    (tmp_path / "i" / "train" / "dog" / "8.jpg").write_bytes(encode("JPEG"))
    good = usable(load(str(tmp_path / "i"), val_fraction=0), max_bad_files=16, say=lambda _: None)
    assert good.test.labels.unique().tolist() == [0]


def test_a_bad_file_of_two_splits_counts_once(tmp_path: Path):
    data = load(str(write_class_folders(tmp_path / "i", {"val/cat/5.jpg": "zero.jpg"})), val_fraction=0)
    good = usable(data, max_bad_files=1, say=lambda _: None)
    assert good.val is good.test
    assert len(good.test) == 15
