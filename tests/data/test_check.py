"""One check of image files for all loaders: what is bad is named once with its reason, and what is known is not opened again."""

import errno
import io
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from kdfast import cli, files
from kdfast.data import Checked, DataError, Split, check, load, usable
from kdfast.data.images import LARGEST, PLAIN, decode, find

MODULE = sys.modules["kdfast.data.checking"]


@pytest.fixture(autouse=True)
def _no_hanging():
    """A check that waits for a FIFO's writer would wait for ever."""
    if not hasattr(signal, "alarm"):
        yield
        return
    before = signal.signal(signal.SIGALRM, lambda *_: pytest.fail("the test hangs"))
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def kdfast(*arguments: object) -> int:
    return cli.main([str(a) for a in arguments])


def picture(height: int = 24, width: int = 32, seed: int = 0) -> Image.Image:
    """Noise, so that damage anywhere shows."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def encoded(form: str, image: Image.Image | None = None, **options: object) -> bytes:
    buffer = io.BytesIO()
    (image or picture()).save(buffer, format=form, **options)
    return buffer.getvalue()


def png_that_claims(width: int, height: int) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


def jpeg_that_claims(width: int, height: int) -> bytes:
    data = bytearray(encoded("JPEG"))
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = struct.pack(">HH", height, width)
    return bytes(data)


def damaged_png() -> bytes:
    data = bytearray(encoded("PNG"))
    data[data.index(b"IDAT") + 200] ^= 0xFF
    return bytes(data)


def jpeg_header() -> bytes:
    data = encoded("JPEG")
    return data[: data.index(b"\xff\xda")]  # up to the scan


BAD = {
    "zero.jpg": (b"", r"empty \(0 bytes\)"),
    "truncated.jpg": (encoded("JPEG")[:-400], "truncated"),
    "truncated.png": (encoded("PNG")[:-400], "truncated"),
    "text.jpg": (b"what a nice picture this would be", "not an image"),
    "random.png": (np.random.default_rng(0).bytes(5000), "not an image"),
    "page.jpeg": (b"<!DOCTYPE html><html><body>404</body></html>", "not an image"),
    "header.jpg": (jpeg_header(), "truncated|cannot"),
    "chunk.png": (damaged_png(), "broken|decoding|CRC|checksum"),
    "bomb.png": (png_that_claims(60_000, 60_000), "too large: at most 178,956,970 pixels"),
    "bomb.jpg": (jpeg_that_claims(60_000, 60_000), "too large: .* claims 60000 x 60000"),
}


def plant(folder: Path, name: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    match name:
        case "fifo.jpg":
            os.mkfifo(path)
        case "dangling.jpg":
            path.symlink_to(folder / "nowhere.jpg")
        case "loop.jpg":
            path.symlink_to(path)
        case "socket.jpg":
            here = Path.cwd()
            os.chdir(folder)  # a socket's path must be short
            try:
                with socket.socket(socket.AF_UNIX) as s:
                    s.bind(name)
            finally:
                os.chdir(here)
        case "locked.jpg":
            path.write_bytes(encoded("JPEG"))
            path.chmod(0)
        case _:
            path.write_bytes(BAD[name][0])
    return path


SPECIAL = {
    "fifo.jpg": "no regular file",
    "socket.jpg": "no regular file",
    "dangling.jpg": "a link to a file that is not there",
    "loop.jpg": os.strerror(errno.ELOOP),
}
REASONS = {name: reason for name, (_, reason) in BAD.items()} | SPECIAL

GOOD = {
    "colour.jpg": (encoded("JPEG"), PLAIN),
    "grey.jpg": (encoded("JPEG", picture().convert("L")), PLAIN),
    "progressive.jpg": (encoded("JPEG", progressive=True), PLAIN),
    "cmyk.jpg": (encoded("JPEG", picture().convert("CMYK")), "other jpeg"),
    "rgb.jpg": (encoded("JPEG", keep_rgb=True), "other jpeg"),
    "palette.png": (encoded("PNG", picture().convert("P")), "png"),
    "sixteen.png": (encoded("PNG", Image.fromarray(np.arange(24 * 32, dtype=np.uint16).reshape(24, 32) * 80)), "png"),
    "picture.bmp": (encoded("BMP"), "bmp"),
    "picture.webp": (encoded("WEBP"), "webp"),
    "picture.gif": (encoded("GIF", picture().convert("P")), "gif"),
}


def never(*_: object) -> None:
    raise AssertionError("a file was opened")


# ---- one file -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "reason"), REASONS.items(), ids=list(REASONS))
def test_a_bad_file_is_named_once_with_its_reason(tmp_path: Path, name: str, reason: str):
    path = str(plant(tmp_path, name))
    assert find(tmp_path) == [path]
    with pytest.raises(DataError, match=rf"^{path}: .*({reason})") as caught:
        decode(path)
    assert "\n" not in str(caught.value)
    found = check([path])
    assert list(found.bad) == [path]
    assert f"{path}: {found.bad[path]}" == str(caught.value)
    assert (found.sizes.tolist(), found.kinds) == ([[0, 0]], ("",))


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_is_bad_until_it_may(tmp_path: Path):
    path = plant(tmp_path, "locked.jpg")
    assert "Permission denied" in check([str(path)]).bad[str(path)]
    path.chmod(0o600)
    assert not check([str(path)]).bad


def test_what_could_not_be_opened_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "a.jpg"
    path.write_bytes(encoded("JPEG"))

    def refused(self: Path) -> bytes:
        raise PermissionError(errno.EACCES, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", refused)
        assert check([str(path)]).bad == {str(path): "the image cannot be opened: Permission denied"}
    assert not check([str(path)]).bad


@pytest.mark.parametrize(("name", "content", "kind"), [(n, c, k) for n, (c, k) in GOOD.items()], ids=list(GOOD))
def test_a_good_file_has_three_channels_a_size_and_a_kind(tmp_path: Path, name: str, content: bytes, kind: str):
    (tmp_path / name).write_bytes(content)
    image = decode(str(tmp_path / name))
    assert (image.shape, image.dtype) == ((3, 24, 32), torch.uint8)
    found = check([str(tmp_path / name)])
    assert (found.sizes.tolist(), found.kinds, found.bad) == ([[24, 32]], (kind,), {})
    assert found.sizes.dtype == torch.int32


def test_what_pillow_only_warns_about_is_an_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder):
    assert 2 * Image.MAX_IMAGE_PIXELS == LARGEST
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)  # Pillow warns of more, and refuses twice as many
    (tmp_path / "large.png").write_bytes(encoded("PNG"))
    assert not check([str(tmp_path / "large.png")]).bad
    assert not recwarn


def test_folders_with_an_images_ending_are_walked_and_loops_are_not(tmp_path: Path):
    inner = tmp_path / "album.jpg" / "a.jpg"
    inner.parent.mkdir()
    inner.write_bytes(encoded("JPEG"))
    for name in ("up", "around"):
        (inner.parent / name).symlink_to(tmp_path, target_is_directory=True)
    assert find(tmp_path) == [str(inner)]


# ---- what is known stays shut -----------------------------------------------------------------------------------------------------


@pytest.fixture
def mixture(tmp_path: Path) -> list[str]:
    """Every kind of good and bad file that there is."""
    folder = tmp_path / "mixture"
    for name in REASONS:
        plant(folder, name)
    for name, (content, _) in GOOD.items():
        (folder / name).write_bytes(content)
    return find(folder)


def same(a: Checked, b: Checked) -> bool:
    return torch.equal(a.sizes, b.sizes) and (a.kinds, a.bad) == (b.kinds, b.bad)


def test_a_second_check_opens_nothing(mixture: list[str], monkeypatch: pytest.MonkeyPatch):
    paths = [path for path in mixture if Path(path).name not in SPECIAL]
    first = check(paths)
    assert first.decoded == len(paths) == len(BAD) + len(GOOD)
    monkeypatch.setattr(MODULE, "decode_kind", never)
    second = check(paths[::-1])
    assert second.decoded == 0
    assert same(check(paths), first)
    assert second.sizes.tolist() == first.sizes.tolist()[::-1]


def test_a_relative_path_and_one_given_twice_are_the_same_file(mixture: list[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(Path(mixture[0]).parent)
    found = check(["zero.jpg", "colour.jpg", "zero.jpg", os.path.abspath("zero.jpg")])
    assert found.decoded == 2
    assert found.sizes.tolist() == [[0, 0], [24, 32], [0, 0], [0, 0]]
    assert list(found.bad) == ["zero.jpg", os.path.abspath("zero.jpg")]


def test_without_a_cache_everything_is_opened(mixture: list[str]):
    check(mixture)
    assert check(mixture, cache=False).decoded == len(mixture)


@pytest.mark.parametrize("change", ["size", "time"])
def test_a_changed_file_is_opened_again(tmp_path: Path, change: str):
    path = tmp_path / "a.png"
    path.write_bytes(encoded("PNG"))
    other = tmp_path / "b.png"
    other.write_bytes(encoded("PNG"))
    check([str(path), str(other)])
    before = path.stat()
    if change == "size":
        path.write_bytes(encoded("PNG", picture(10, 12)))
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    else:
        path.write_bytes(bytes(before.st_size))
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    found = check([str(path), str(other)])
    assert found.decoded == 1
    assert found.sizes.tolist() == ([[10, 12], [24, 32]] if change == "size" else [[0, 0], [24, 32]])


def kept() -> list[Path]:
    return sorted((MODULE.cache_folder() / "checks").iterdir())


@pytest.mark.parametrize("damage", ["empty", "cut", "bit", "foreign", "version", "elsewhere", "folder"])
def test_a_broken_or_foreign_cache_is_ignored_and_replaced(mixture: list[str], damage: str, monkeypatch: pytest.MonkeyPatch):
    first = check(mixture)
    path_of = {Path(path).name: path for path in mixture}
    (path,) = kept()
    content = path.read_bytes()
    match damage:
        case "empty":
            path.write_bytes(b"")
        case "cut":
            path.write_bytes(content[: len(content) // 2])
        case "bit":
            at = content.index(b"colour.jpg")
            path.write_bytes(content[:at] + b"d" + content[at + 1 :])
        case "foreign":
            path.write_bytes(encoded("PNG"))
        case "version":
            monkeypatch.setattr(MODULE, "VERSION", MODULE.VERSION + 1)
        case "elsewhere":
            twin = Path(mixture[0]).parents[1] / "twin"
            twin.mkdir()
            for name in [*BAD, *GOOD]:  # of the same names, sizes and times
                shutil.copy2(path_of[name], twin)
            check(find(twin))
            (other,) = set(kept()) - {path}
            path.write_bytes(other.read_bytes())
        case "folder":
            path.unlink()
            path.mkdir()
    again = check(mixture)
    assert again.decoded == len(mixture)
    assert same(again, first)
    if damage != "folder":
        assert check(mixture).decoded == len(SPECIAL)


def test_a_cache_that_cannot_be_written_costs_only_time(mixture: list[str], monkeypatch: pytest.MonkeyPatch):
    def full(path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files, "replacing", full)
    assert check(mixture).decoded == check(mixture).decoded == len(mixture)


def test_the_cache_is_where_xdg_says_and_holds_names_of_all_kinds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from kdfast.data.datasets import cache_folder

    monkeypatch.setattr(MODULE, "cache_folder", cache_folder)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    paths = [str(tmp_path / "images" / name) for name in ("a\nb.png", "ü.png", os.fsdecode(b"\xff.png"), " .png")]
    (tmp_path / "images").mkdir()
    for path in paths:
        Path(path).write_bytes(encoded("PNG"))
    assert not check(paths).bad
    assert kept()[0].is_relative_to(tmp_path / "xdg" / "kdfast")
    assert check(paths).decoded == 0


def test_a_check_of_some_keeps_what_is_known_of_others(tmp_path: Path):
    paths = [str(tmp_path / f"{i}.png") for i in range(4)]
    for path in paths:
        Path(path).write_bytes(encoded("PNG"))
    check(paths[:2])
    check(paths[2:])
    assert check(paths).decoded == 0


def test_what_was_found_before_an_interruption_is_kept(mixture: list[str]):
    def stop(done: int, total: int) -> None:
        assert total == len(mixture)
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        check(mixture, progress=stop)
    opened = check(mixture).decoded
    assert len(mixture) - 5 <= opened <= len(mixture) - 1


# ---- several processes ------------------------------------------------------------------------------------------------------------


def test_processes_find_what_one_finds(mixture: list[str], monkeypatch: pytest.MonkeyPatch):
    alone = check(mixture, cache=False)
    monkeypatch.setattr(MODULE, "ALONE", 0.0)
    monkeypatch.setattr(MODULE, "CHUNK", 4)
    monkeypatch.setattr(MODULE, "_look", never)  # here, not in the others
    seen: list[tuple[int, int]] = []
    together = check(mixture, workers=2, progress=lambda done, total: seen.append((done, total)))
    assert same(together, alone)
    assert seen[-1] == (len(mixture), len(mixture))
    assert len(seen) == len(mixture) // 4


def test_checks_at_the_same_time_do_no_harm(mixture: list[str]):
    alone = check(mixture, cache=False)
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda _: check(mixture), range(20)))
    assert all(same(one, alone) for one in found)
    assert len(kept()) == 1, "temporary files are left"
    assert check(mixture).decoded == len(SPECIAL)


def test_a_few_files_start_no_processes(mixture: list[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(MODULE, "ProcessPoolExecutor", never)
    check(mixture)


def test_workers_must_be_positive():
    with pytest.raises(DataError, match="workers must be at least 1, got 0"):
        check([], workers=0)
    assert check([]).sizes.shape == (0, 2)


# ---- a data set -------------------------------------------------------------------------------------------------------------------


def images(root: Path, bad: dict[str, str], each: int = 8) -> Path:
    """root/{train,val}/{cat,dog}/<i>.jpg of 24 x (30 + i), with BAD files at `bad`: path -> name in BAD."""
    for part in ("train", "val"):
        for kind in ("cat", "dog"):
            (root / part / kind).mkdir(parents=True)
            for i in range(each):
                (root / part / kind / f"{i}.jpg").write_bytes(encoded("JPEG", picture(24, 30 + i)))
    (root / "train" / "cat" / "0.jpg").write_bytes(encoded("PNG", picture(24, 30)))
    for path, name in bad.items():
        (root / path).write_bytes(BAD[name][0])
    return root


TWO = {"train/dog/3.jpg": "zero.jpg", "val/cat/5.jpg": "truncated.jpg"}


def test_usable_drops_bad_files_and_knows_the_others(tmp_path: Path):
    data = load(str(images(tmp_path / "i", TWO)), val_fraction=0.25)
    said: list[str] = []
    good = usable(data, max_bad_files=2, say=said.append, list_to=tmp_path / "list.txt")
    assert sum(map(len, (good.train, good.val, good.test))) == 30
    for part in ("train", "val", "test"):
        before, after = getattr(data, part), getattr(good, part)
        assert after.paths == tuple(p for p in before.paths if not p.endswith(tuple(TWO)))
        assert after.labels.tolist() == [label for label, p in zip(before.labels.tolist(), before.paths) if p in after.paths]
        assert (after.sizes.dtype, after.plain.dtype) == (torch.int32, torch.bool)
        assert after.sizes.tolist() == [[24, 30 + int(Path(p).stem)] for p in after.paths]
        assert after.plain.tolist() == [not p.endswith("train/cat/0.jpg") for p in after.paths]
    (line,) = said
    assert "left out 2 bad image files" in line
    assert all(line.count(name) == 1 for name in TWO)
    assert sorted(row.split("\t")[0] for row in (tmp_path / "list.txt").read_text().splitlines()) == [
        str(tmp_path / "i" / name) for name in sorted(TWO)
    ]


def test_more_bad_files_than_allowed_are_an_error_of_one_sentence(tmp_path: Path):
    data = load(str(images(tmp_path / "i", TWO)))
    with pytest.raises(DataError, match=r"2 image files are bad, where --max-bad-files allows 1: .*empty \(0 bytes\)") as caught:
        usable(data, max_bad_files=1)
    assert all(str(caught.value).count(name) == 1 for name in TWO)
    with pytest.raises(DataError, match="max_bad_files must be at least 0, got -1"):
        usable(data, max_bad_files=-1)


def test_twenty_are_named_and_the_others_counted(tmp_path: Path):
    root = images(tmp_path / "i", {f"train/dog/{i}.jpg": "zero.jpg" for i in range(1, 24)}, each=30)
    said: list[str] = []
    usable(load(str(root)), max_bad_files=23, say=said.append)
    assert said[0].count("0 bytes") == 20
    assert said[0].endswith("and 3 more")


def test_a_class_of_bad_files_only_is_an_error(tmp_path: Path):
    data = load(str(images(tmp_path / "i", {f"val/dog/{i}.jpg": "zero.jpg" for i in range(8)})))
    with pytest.raises(DataError, match="no image of class 'dog' in test"):
        usable(data, max_bad_files=8)


def test_val_that_is_test_stays_so_and_its_bad_file_counts_once(tmp_path: Path):
    data = load(str(images(tmp_path / "i", {"val/cat/5.jpg": "zero.jpg"})), val_fraction=0)
    good = usable(data, max_bad_files=1, say=lambda _: None)
    assert good.val is good.test
    assert len(good.test) == 15


def test_images_in_memory_pass_untouched():
    data = load("digits")
    assert usable(data) is data


def test_subsets_keep_sizes_and_kinds(tmp_path: Path):
    data = usable(load(str(images(tmp_path / "i", {}))))
    part = data.train.subset(torch.tensor([3, 1]))
    assert torch.equal(part.sizes, data.train.sizes[[3, 1]])
    assert torch.equal(part.plain, data.train.plain[[3, 1]])
    assert Split(torch.zeros(1), paths=("a",)).subset(torch.tensor([0])).sizes is None


# ---- the command line -------------------------------------------------------------------------------------------------------------


def test_data_info(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert kdfast("data", "info", images(tmp_path / "i", TWO), "--val-fraction", 0.25) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for expected in ("cat 6 2 8", "dog 6 2 8", "2 classes 12 4 16"):
        assert expected in shown
    assert "smallest 30 x 24, median 34 x 24, largest 37 x 24" in shown or "smallest 30 x 24, median 33 x 24, largest 37 x 24" in shown
    assert "formats: jpeg 29, png 1" in shown
    assert "bad files: 2" in shown
    assert kdfast("data", "info", "digits") == 0
    assert "all 8 x 8" in capsys.readouterr().out


@pytest.mark.parametrize(("allowed", "status"), [(0, 1), (1, 1), (2, 0)])
def test_data_check(tmp_path: Path, capsys: pytest.CaptureFixture[str], allowed: int, status: int):
    assert kdfast("data", "check", images(tmp_path / "i", TWO), "--max-bad-files", allowed) == status
    shown = capsys.readouterr()
    assert all(shown.out.count(name) == 1 for name in TWO)
    assert "images/s" in shown.out
    assert "32 image files" in shown.out
    assert ("2 bad image files, where --max-bad-files allows" in shown.err) == bool(status)


def test_data_check_of_every_bad_file_at_once(mixture: list[str], capsys: pytest.CaptureFixture[str]):
    assert kdfast("data", "check", Path(mixture[0]).parent) == 1
    shown = capsys.readouterr().out
    assert all(shown.count(f"/{name}: ") == 1 for name in REASONS)
    assert not any(name in shown for name in GOOD)


def test_data_check_of_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert kdfast("data", "check", "digits") == 0
    assert "in memory" in capsys.readouterr().out
    assert kdfast("data", "check", tmp_path) == 1
    assert "no image files" in capsys.readouterr().err


def test_data_preview(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    root, out = images(tmp_path / "i", {"train/cat/0.jpg": "zero.jpg"}), tmp_path / "sheet.png"
    options = ["--image-size", 80, "--count", 3, "--transform", "cifar", "--out", out]
    assert kdfast("data", "preview", root, *options) == 0
    shown = capsys.readouterr().out
    rows = [line.split()[2:] for line in shown.splitlines()[:3]]
    assert [kind for kind, _ in rows] == ["dog", "cat", "dog"], "the first cat cannot be read"
    assert all(f"/train/{kind}/" in path for kind, path in rows)
    with Image.open(out) as sheet:
        assert (sheet.format, sheet.size) == ("PNG", (7 * 82 - 2, 3 * 82 - 2))
        pixels = np.asarray(sheet)
    cells = [pixels[:80, 82 * k : 82 * k + 80] for k in range(7)]
    assert sum((cells[0] != cell).any() for cell in cells[1:]) >= 5, "draws differ from the image"
    assert len({cell.tobytes() for cell in cells}) >= 6, "and from one another"
    first = out.read_bytes()
    assert kdfast("data", "preview", root, *options) == 0
    assert out.read_bytes() == first, "the seed decides"
    assert kdfast("data", "preview", root, "--transform", "none", "--count", 0) == 1
    assert kdfast("data", "preview", root, "--transform", "swirl", "--out", tmp_path / "n.png") == 1
    assert not (tmp_path / "n.png").exists()


def test_data_needs_a_known_command(capsys: pytest.CaptureFixture[str]):
    assert kdfast("data", "clean") == 1
    assert "data knows info, check, preview, got 'clean'" in capsys.readouterr().err
    assert kdfast("data") == 0
    assert "preview" in capsys.readouterr().out


TINY = ["--seeds", 1, "--student", "resnet8", "--epochs", 1, "--image-size", 16, "--val-fraction", 0.3, "--workers", 0, "--warmup", 0]
TINY += ["--recipe", "kd", "--no-baseline", "--teacher-model", "resnet8", "--batch-size", 4]
TINY += ["--teacher-training.epochs", 1, "--teacher-training.warmup", 0, "--teacher-training.batch-size", 4]


def test_a_run_names_bad_files_before_it_trains_or_leaves_them_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    import json

    root, run = images(tmp_path / "i", {"train/dog/3.jpg": "zero.jpg"}), tmp_path / "run"
    assert kdfast("distill", "--dataset", root, *TINY, "--out", run) == 1
    error = capsys.readouterr().err
    assert error.count("train/dog/3.jpg (the image file is empty (0 bytes))") == 1
    assert "--max-bad-files" in error
    assert not (run / "config.toml").exists(), "the folder was taken"
    assert kdfast("distill", "--dataset", root, *TINY, "--out", run, "--max-bad-files", 1) == 0
    assert "left out 1 bad image file: " in capsys.readouterr().out
    assert any("3.jpg" in note for note in json.loads((run / "results.json").read_text())["notes"])
    assert "max_bad_files = 1" in (run / "config.toml").read_text()
    assert kdfast("eval", run) == 0
    assert "left out 1 bad image file: " in capsys.readouterr().out


def test_a_stop_that_was_asked_for_ends_the_check(mixture: list[str]):
    from rich.console import Console

    from kdfast.commands.images import checking
    from kdfast.engine import Interrupted
    from kdfast.engine.interrupt import StopRequest

    stop = StopRequest()
    stop.signal_number = signal.SIGTERM
    with pytest.raises(Interrupted, match="SIGTERM"), checking(Console(quiet=True), stop) as progress:
        check(mixture, progress=progress)


RANK = """
import importlib, sys, types
from rich.console import Console
from kdfast.commands import images
from kdfast.commands.config import DataOptions
from kdfast.engine import join

if __name__ == "__main__":
    module = importlib.import_module("kdfast.data.checking")
    images.BEAT_EVERY = 0.0
    world = join("cpu")
    if world.rank == 1:
        def opened(path):
            raise SystemExit("the second process opened a file")
        module.decode_kind = opened
    for allowed in (1, 0):
        try:
            data, notes = images.load_data(DataOptions(dataset=sys.argv[1], max_bad_files=allowed), 0, world, Console(soft_wrap=True))
            print("rank", world.rank, len(data.train), len(notes), flush=True)
        except ValueError as error:
            print("rank", world.rank, "3.jpg" in str(error), flush=True)
        world.barrier()
    world.close()
"""


def test_under_torchrun_one_process_checks_and_the_others_open_nothing(tmp_path: Path):
    root = images(tmp_path / "i", {"train/dog/3.jpg": "zero.jpg"})
    (tmp_path / "script.py").write_text(RANK)
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    places = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(tmp_path / "script.py"), str(root)]
    running = []
    for rank in ("0", "1"):
        environment = {**os.environ, **places, "RANK": rank, "LOCAL_RANK": rank, "XDG_CACHE_HOME": str(tmp_path / "xdg")}
        running.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment))
    shown = [process.communicate(timeout=120) for process in running]
    lines = [line for out, _ in shown for line in out.splitlines() if line.startswith("rank")]
    assert lines == ["rank 0 13 1", "rank 0 True", "rank 1 13 1", "rank 1 True"], shown
    assert sum(out.count("left out 1") for out, _ in shown) == 1, "one process speaks"


@pytest.mark.data
def test_a_real_folder_is_known_the_second_time(real_data: Path, monkeypatch: pytest.MonkeyPatch):
    data = load("imagenette", data_dir=real_data, max_images=100, val_fraction=0.02)
    first = check(data.train.paths)
    assert not first.bad
    assert first.sizes.min() > 0
    monkeypatch.setattr(MODULE, "decode_kind", never)
    start = time.monotonic()
    assert same(check(data.train.paths), first)
    assert time.monotonic() - start < 5
