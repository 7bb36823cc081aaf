"""kdfast data, and the check of image files by the commands that train: what it prints, and what stops it."""

import importlib
import json
import signal
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from kdfast.commands import images
from kdfast.commands.config import DataOptions
from kdfast.data import check
from kdfast.engine import Interrupted, World
from kdfast.engine.interrupt import StopRequest
from tests.commands.running import SHORT, fail, kdfast, read_json
from tests.data.samples import GOOD, REASONS, TWO_BAD, plant_all, write_class_folders
from tests.processes import in_processes


def test_info_shows_classes_sizes_formats_and_bad_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert kdfast("data", "info", write_class_folders(tmp_path / "i", TWO_BAD), "--val-fraction", 0.25) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for expected in ("cat 6 2 8", "dog 6 2 8", "2 classes 12 4 16"):
        assert expected in shown
    assert "smallest 30 x 24, median 34 x 24, largest 37 x 24" in shown or "smallest 30 x 24, median 33 x 24, largest 37 x 24" in shown
    assert "formats: jpeg 29, png 1" in shown
    assert "bad files: 2" in shown
    assert kdfast("data", "info", "digits") == 0
    assert "all 8 x 8" in capsys.readouterr().out


def test_check_names_every_bad_file_and_fails_with_too_many(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    paths, bad = plant_all(tmp_path / "mixture"), len(REASONS)
    for allowed, status in ((0, 1), (bad - 1, 1), (bad, 0)):
        assert kdfast("data", "check", tmp_path / "mixture", "--max-bad-files", allowed) == status
        shown = capsys.readouterr()
        assert all(shown.out.count(f"/{name}: ") == 1 for name in REASONS)
        assert not any(name in shown.out for name in GOOD)
        assert f"{len(paths)} image files" in shown.out
        assert (f"{bad} bad image files, where --max-bad-files allows" in shown.err) == bool(status)
    (tmp_path / "empty").mkdir()
    assert kdfast("data", "check", "digits") == 0
    assert "in memory" in capsys.readouterr().out
    assert kdfast("data", "check", tmp_path / "empty") == 1
    assert "no image files" in capsys.readouterr().err


def test_preview_draws_a_sheet(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    root, out = write_class_folders(tmp_path / "i", {"train/cat/0.jpg": "zero.jpg"}), tmp_path / "sheet.png"
    options = ["--image-size", 80, "--count", 3, "--transform", "cifar", "--out", out]
    assert kdfast("data", "preview", root, *options) == 0
    shown = capsys.readouterr().out
    rows = [line.split()[2:] for line in shown.splitlines()[:3]]
    assert [kind for kind, _ in rows] == ["dog", "cat", "dog"], "the first cat cannot be read"
    assert all(f"/train/{kind}/" in path for kind, path in rows)
    with Image.open(out) as sheet:
        assert (sheet.format, sheet.size) == ("PNG", (7 * 82 + 2, 3 * 82 + 2))
        pixels = np.asarray(sheet)
    cells = [pixels[2:82, 82 * k + 2 : 82 * k + 82] for k in range(7)]
    assert sum((cells[0] != cell).any() for cell in cells[1:]) >= 5, "draws differ from the image"
    assert len({cell.tobytes() for cell in cells}) >= 6, "and from one another"
    first = out.read_bytes()
    assert kdfast("data", "preview", root, *options) == 0
    assert out.read_bytes() == first, "the seed decides"
    assert kdfast("data", "preview", root, "--transform", "none", "--count", 0) == 1
    assert kdfast("data", "preview", root, "--transform", "swirl", "--out", tmp_path / "n.png") == 1
    assert not (tmp_path / "n.png").exists()


SMALL = ["--recipe", "kd", *SHORT, "--image-size", 16, "--val-fraction", 0.3, "--batch-size", 4, "--teacher-training.batch-size", 4]


def test_a_run_names_bad_files_before_it_trains_or_leaves_them_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    root, run = write_class_folders(tmp_path / "i", {"train/dog/3.jpg": "zero.jpg"}), tmp_path / "run"
    assert kdfast("distill", "--dataset", root, *SMALL, "--out", run) == 1
    error = capsys.readouterr().err
    assert error.count("train/dog/3.jpg (the image file is empty (0 bytes))") == 1
    assert "--max-bad-files" in error
    assert not (run / "config.toml").exists(), "the folder was taken"
    assert kdfast("distill", "--dataset", root, *SMALL, "--out", run, "--max-bad-files", 1) == 0
    assert "left out 1 bad image file: " in capsys.readouterr().out
    assert any("3.jpg" in note for note in json.loads((run / "results.json").read_text())["notes"])
    assert "max_bad_files = 1" in (run / "config.toml").read_text()
    assert kdfast("eval", run) == 0
    assert "left out 1 bad image file: " in capsys.readouterr().out


def test_a_stop_request_ends_the_check(tmp_path: Path):
    stop = StopRequest()
    stop.signal_number = signal.SIGTERM
    with pytest.raises(Interrupted, match="SIGTERM"), images.checking(Console(quiet=True), stop) as progress:
        check(plant_all(tmp_path / "mixture"), progress=progress)


def fail_to_decode(path: str, data: bytes) -> None:
    raise SystemExit("the second process opened a file")


def load_by_rank(root: str, cache: Path, rank: int, size: int) -> list[str]:
    """The images that a process loads, with one bad file and with none allowed."""
    module = importlib.import_module("kdfast.data.checking")
    module.cache_folder = lambda: cache
    if rank == 1:
        module.decode_with_kind = fail_to_decode
    world, found = World(rank, size, torch.device("cpu")), []
    for allowed in (1, 0):
        try:
            data, notes = images.load_data(DataOptions(dataset=root, max_bad_files=allowed), 0, world, Console(soft_wrap=True))
            found.append(f"{len(data.train)} images, {len(notes)} note")
        except ValueError as error:
            found.append("3.jpg" if "3.jpg" in str(error) else str(error))
        world.barrier()
    return found


def test_one_of_two_processes_checks_and_the_other_opens_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    root = write_class_folders(tmp_path / "i", {"train/dog/3.jpg": "zero.jpg"})
    assert in_processes(partial(load_by_rank, str(root), tmp_path / "cache"), 2, tmp_path) == [["13 images, 1 note", "3.jpg"]] * 2
    assert capfd.readouterr().out.count("left out 1") == 1, "one process speaks"


def write_small_folder(root: Path, *, other: int = 40) -> Path:
    """Two classes of eight images of 40 x 40 pixels; one is `other` pixels wide."""
    for c, name in enumerate(("ant", "bee")):
        (root / name).mkdir(parents=True)
        for i in range(8):
            width = other if (c, i) == (1, 3) else 40
            Image.new("RGB", (width, 40), (90 * c + 60, 20 * i, 80)).save(root / name / f"{i}.png")
    return root


SMALL = [
    "--student",
    "resnet8",
    "--teacher-model",
    "resnet8",
    "--teacher-training.epochs",
    1,
    "--epochs",
    1,
    "--batch-size",
    4,
    "--recipe",
    "kd",
]


def test_a_run_inside_the_images_folder_works_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.chdir(write_small_folder(tmp_path / "photos"))
    for _ in range(2):
        assert kdfast("distill", "--dataset", ".", *SMALL) == 0
        assert "12 training images; 2 validation, 2 test" in capsys.readouterr().out
    (run, _) = sorted(Path("runs").iterdir())
    assert any("40 x 40" in note for note in read_json(run / "results.json")["notes"])
    assert kdfast("data", "check", ".") == 0
    assert "16 image files" in capsys.readouterr().out
    assert kdfast("predict", run, ".") == 0
    assert capsys.readouterr().out.count(".png") == 16


def test_data_and_predict_say_what_they_left_out(tmp_path: Path, finished: Path, capsys: pytest.CaptureFixture[str]):
    root = write_small_folder(tmp_path / "photos")
    (root / "bee" / "x.heic").write_bytes(b"x")
    (root / "bee" / ".ipynb_checkpoints").mkdir()
    (root / "bee" / ".ipynb_checkpoints" / "0.png").write_bytes(b"no image")
    Image.new("RGB", (40, 40), (9, 9, 9)).save(root / "ant" / "0.png")
    for command in (["data", "check"], ["data", "info"], ["predict", finished]):
        assert kdfast(*command, root) == 0
        shown = capsys.readouterr().out
        assert "left out 1 file without an image's ending: .heic 1 (bee/x.heic)" in shown
        assert ("1 image comes out nearly black" in shown) == (command[0] == "data")


def test_predict_of_different_sizes_without_resizing_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    root = write_small_folder(tmp_path / "photos")
    assert kdfast("teacher", "--dataset", root, "--model", "resnet8", "--epochs", 1, "--evaluation", "none", "--out", tmp_path / "run") == 0
    Image.new("RGB", (48, 40)).save(root / "ant" / "8.png")
    assert "images differ in size, and these weights were trained with evaluation none" in fail(capsys, "predict", tmp_path / "run", root)


@pytest.mark.parametrize("sizes", [["--batch-size", 1], ["--batch-size", 8, "--micro-batch", 1], ["--batch-size", 7, "--micro-batch", 2]])
def test_single_images_that_batch_norm_cannot_normalize_are_refused(tmp_path: Path, sizes: list, capsys: pytest.CaptureFixture[str]):
    root, out = write_small_folder(tmp_path / "photos"), tmp_path / "run"
    command = ["teacher", "--dataset", root, "--model", "resnet18", "--image-size", 32, "--epochs", 1, "--out", out, *sizes]
    assert "some forward passes have one image" in fail(capsys, *command)
    assert not out.exists()
