"""Files of a killed run that were damaged, swapped, cut or edited: named before anything is trained, or made up for."""

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from kdfast.data import load, usable
from kdfast.engine.loop import StageLoop
from kdfast.models import read_weights, save_weights
from tests.commands.running import KD_SEEDS, TINY, assert_same_run, fail, kdfast, run_and_kill
from tests.data.samples import write_pngs

TEACHER, ALONE, DISTIL = "stages/teacher", "stages/seed0/alone", "stages/seed0/distil"
Damage = Callable[[Path, Path], object]  # of a run, with another one at hand


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two seeds, killed in the second epoch of seed0/distil. Tests do not change it."""
    return kill_in_epoch_2(tmp_path_factory.mktemp("killed") / "run")


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with another learning rate, killed at the same place."""
    return kill_in_epoch_2(tmp_path_factory.mktemp("stranger") / "run", "--lr", 0.002)


def kill_in_epoch_2(run: Path, *more: object) -> Path:
    with pytest.MonkeyPatch.context() as monkeypatch:
        run_and_kill(monkeypatch, 25, "distill", *KD_SEEDS, *more, "--out", run)
    state = torch.load(run / "checkpoint.pt", weights_only=True)
    assert (state["stage"], state["epoch"]) == ("seed0/distil", 1)
    return run


def flip(name: str, place: float) -> Damage:
    def damage(run: Path, stranger: Path) -> None:
        content = bytearray((run / name).read_bytes())
        content[int(place * (len(content) - 1))] ^= 16
        (run / name).write_bytes(content)

    return damage


def swap(name: str) -> Damage:
    return lambda run, stranger: shutil.copy(stranger / name, run / name)


def copy(name: str, source: str) -> Damage:
    return lambda run, stranger: shutil.copy(run / source, run / name)


def edit(name: str, old: str, new: str) -> Damage:
    return lambda run, stranger: (run / name).write_text((run / name).read_text().replace(old, new, 1))


def cut(name: str, size: int) -> Damage:
    return lambda run, stranger: (run / name).write_bytes((run / name).read_bytes()[:size])


def delete(*names: str) -> Damage:
    def damage(run: Path, stranger: Path) -> None:
        for name in names:
            shutil.rmtree(run / name) if (run / name).is_dir() else (run / name).unlink()

    return damage


def append(name: str, text: str) -> Damage:
    return lambda run, stranger: (run / name).write_text(((run / name).read_text() if (run / name).exists() else "") + text)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        *(
            pytest.param(flip("checkpoint.pt", place), "checkpoint.pt is damaged: delete it", id=f"checkpoint, bit at {place}")
            for place in (0, 0.0001, 0.01, 0.3, 0.6, 0.9, 0.99, 1)
        ),
        pytest.param(swap("checkpoint.pt"), r"checkpoint.pt is of another run, or this run's options .* changed", id="another checkpoint"),
        *(
            pytest.param(
                flip(f"{stage}/best.safetensors", place), r"best.safetensors is (damaged|truncated)", id=f"{stage}, bit at {place}"
            )
            for stage in (TEACHER, ALONE, DISTIL)
            for place in (0.001, 0.5, 1)
        ),
        pytest.param(swap(f"{ALONE}/last.safetensors"), "last.safetensors is of another run, stage or epoch: delete", id="another last"),
        pytest.param(swap(f"{DISTIL}/best.safetensors"), "best.safetensors is of another run.*: delete .*checkpoint.pt", id="another best"),
        pytest.param(
            copy(f"{DISTIL}/best.safetensors", f"{ALONE}/best.safetensors"), "is of another run, stage or epoch", id="best of another stage"
        ),
        pytest.param(swap(f"{ALONE}/stage.json"), "stage.json is of another run", id="stage.json of another run"),
        pytest.param(copy(f"{ALONE}/stage.json", f"{TEACHER}/stage.json"), "is of stage teacher", id="stage.json of another stage"),
        pytest.param(edit(f"{ALONE}/stage.json", '"epochs": 2', '"epochs": 3'), "stage.json is damaged", id="stage.json edited"),
        pytest.param(delete(TEACHER), "stages/teacher is missing, and stage seed0/alone", id="a stage deleted"),
        pytest.param(delete(f"{DISTIL}/best.safetensors"), "there is no file .*: delete .*checkpoint.pt", id="best deleted"),
        pytest.param(delete("metrics.jsonl"), "metrics.jsonl is not as the run wrote it", id="metrics deleted"),
        pytest.param(cut("metrics.jsonl", -30), "metrics.jsonl is not as the run wrote it", id="metrics cut"),
        pytest.param(swap("metrics.jsonl"), "metrics.jsonl is not as the run wrote it", id="metrics of another run"),
        pytest.param(edit("metrics.jsonl", '"val/top1": 0', '"val/top1": 1'), "metrics.jsonl is not as", id="metrics edited"),
        pytest.param(edit("config.toml", "lr = 0.001", "lr = 0.003"), "config.toml is damaged or has been edited", id="config edited"),
        pytest.param(cut("config.toml", 400), "config.toml is damaged or has been edited", id="config cut"),
        pytest.param(cut("config.toml", 0), "config.toml is damaged or has been edited", id="config emptied"),
        pytest.param(swap("config.toml"), "stage.json is of another run, or this run's options .* changed", id="config of another run"),
        pytest.param(edit("seconds.txt", ".", "x"), "seconds.txt is damaged: delete it", id="seconds edited"),
    ],
)
def test_damage_is_named_before_anything_is_trained(
    damage: Damage, message: str, killed: Path, stranger: Path, tmp_path: Path, monkeypatch, capsys
):
    shutil.copytree(killed, run := tmp_path / "run")
    damage(run, stranger)
    monkeypatch.setattr(StageLoop, "__init__", lambda *_: pytest.fail("a stage began"))
    assert re.search(message, fail(capsys, "distill", "--out", run, "--resume"))


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(delete("checkpoint.pt"), id="no checkpoint"),
        pytest.param(delete("checkpoint.pt", DISTIL), id="no current stage"),
        pytest.param(delete(ALONE, DISTIL), id="not the last two stages"),
        pytest.param(delete("stages"), id="no stages"),
        pytest.param(append("metrics.jsonl", '{"stage": "seed'), id="half a line more"),
        pytest.param(append("metrics.jsonl", '{"stage": "x", "epoch": 9}\n' * 9), id="lines more"),
        pytest.param(delete("seconds.txt"), id="no seconds"),
        pytest.param(append("results.json", '{"recipe":'), id="half of results.json"),
        pytest.param(append(f"{DISTIL}/.best.0123abcd.part.safetensors", "half"), id="a temporary file"),
    ],
)
def test_damage_that_a_run_makes_up_for_changes_no_number(damage: Damage, killed: Path, stranger: Path, finished: Path, tmp_path: Path):
    shutil.copytree(killed, run := tmp_path / "run")
    damage(run, stranger)
    assert kdfast("distill", "--out", run, "--resume") == 0
    assert_same_run(run, finished)
    assert not list(run.rglob("*.part*")), "temporary files of the killed run stay"


# ---- readers of a finished run ---------------------------------------------------------------------------------------


READERS = {
    "eval": ["eval", "RUN"],
    "predict": ["predict", "RUN", "image.png"],
    "export": ["export", "RUN", "--format", "safetensors", "--out", "out.safetensors"],
    "report": ["report", "RUN"],
    "teacher": ["distill", *KD_SEEDS, "--teacher", "RUN", "--out", "next"],
}


@pytest.mark.parametrize(
    ("readers", "damage", "message"),
    [
        *(
            pytest.param(
                "eval predict export teacher", damage, r"best.safetensors is damaged, missing or of another run", id=f"weights {name}"
            )
            for name, damage in {
                "with another bit": flip("best.safetensors", 0.5),
                "with another header": flip("best.safetensors", 0.001),
                "of another network": copy("best.safetensors", "teacher.safetensors"),
            }.items()
        ),
        pytest.param(
            "eval", edit("config.toml", "val_fraction = 0.1", "val_fraction = 0.2"), "config.toml is damaged", id="options edited"
        ),
        pytest.param("eval", cut("config.toml", 600), "config.toml is damaged", id="options cut"),
        *(
            pytest.param("eval predict report", damage, r"results.json is damaged", id=f"results {name}")
            for name, damage in {
                "cut": cut("results.json", 900),
                "empty": cut("results.json", 0),
                "edited": edit("results.json", '"best/top1": 0.', '"best/top1": 0.9'),
                "without an entry": edit("results.json", '"arms"', '"alms"'),
                "a list": lambda run, _: (run / "results.json").write_text("[1]"),
            }.items()
        ),
        pytest.param("report", edit("metrics.jsonl", '"val/top1": 0', '"val/top1": 1'), "metrics.jsonl is damaged", id="curves edited"),
        pytest.param("report", cut("metrics.jsonl", -40), "metrics.jsonl is damaged", id="curves cut"),
        pytest.param("report", delete("metrics.jsonl"), "metrics.jsonl is damaged, missing", id="curves deleted"),
    ],
)
def test_damage_is_named_by_all_readers(readers: str, damage: Damage, message: str, finished: Path, tmp_path: Path, monkeypatch, capsys):
    shutil.copytree(finished, run := tmp_path / "run")
    damage(run, finished)
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (8, 8)).save("image.png")
    before = set(tmp_path.iterdir())
    for name in readers.split():
        words = [run if word == "RUN" else word for word in READERS[name]]
        assert re.search(message, fail(capsys, *words)), name
    assert {path for path in tmp_path.iterdir() if path.name != "next"} == before


def test_a_damaged_weights_file_is_named_by_all_readers(finished: Path, tmp_path: Path, capsys):
    """On its own, without the run's folder, it has its own checksum."""
    shutil.copy(finished / "best.safetensors", tmp_path)
    flip("best.safetensors", 0.7)(tmp_path, tmp_path)
    path = tmp_path / "best.safetensors"
    for words in (
        ["eval", path, "--dataset", "digits"],
        ["export", path],
        ["distill", *KD_SEEDS, "--teacher", path, "--out", tmp_path / "x"],
    ):
        assert "best.safetensors is damaged: it is not as it was written" in fail(capsys, *words)


# ---- another data set, another teacher -------------------------------------------------------------------------------


def change_in_place(images: Path) -> None:
    """Other bytes, but the same size and time of modification."""
    path = max((images / "cat").iterdir(), key=lambda file: file.stat().st_size)
    before, other = path.stat(), (images / "cat" / "0.png").read_bytes()
    path.write_bytes(other.ljust(before.st_size, b"\0"))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize("recipe", ["kd", "crd"])
@pytest.mark.parametrize(
    ("change", "now"),
    [
        pytest.param(
            lambda images: shutil.copy(images / "cat" / "3.png", images / "cat" / "x.png"), r"\d+ \+ \d+ \+ \d+ images", id="added"
        ),
        pytest.param(lambda images: (images / "cat" / "3.png").unlink(), r"\d+ \+ \d+ \+ \d+ images", id="gone"),
        pytest.param(change_in_place, "images", id="altered"),
        pytest.param(lambda images: shutil.move(images / "cat" / "3.png", images / "dog" / "y.png"), "images", id="another class"),
        pytest.param(lambda images: (images / "dog").rename(images / "hound"), "images", id="a class renamed"),
    ],
)
def test_a_changed_data_set_is_told_before_anything_is_trained(change, now, recipe, tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "images").mkdir()
    for name in ("cat", "dog"):
        write_pngs(tmp_path / "images" / name, 30)
    command = ["distill", "--recipe", recipe, "--dataset", tmp_path / "images", *TINY[:-2], "--image-size", 8, "--no-baseline", "--loader"]
    run_and_kill(monkeypatch, 10, *command, "torchvision", "--workers", 0, "--seeds", 1, "--out", tmp_path / "run")
    change(tmp_path / "images")
    with monkeypatch.context() as patch:
        patch.setattr(StageLoop, "__init__", lambda *_: pytest.fail("a stage began"))
        error = fail(capsys, "distill", "--out", tmp_path / "run", "--resume")
    assert re.search(rf"this run's images changed since it was written: .* images \(\w+\) there, .*{now}", error)


def test_changed_heads_are_told_before_anything_is_trained(tmp_path: Path, monkeypatch, capsys):
    common = ["distill", "--recipe", "dih", *TINY, "--seeds", 1, "--no-baseline"]
    assert kdfast(*common, "--out", tmp_path / "first") == 0
    shutil.copy(tmp_path / "first" / "stages/teacher/heads/best.safetensors", heads := tmp_path / "heads.safetensors")
    given = ["--teacher", tmp_path / "first" / "teacher.safetensors", "--heads", heads]
    run_and_kill(monkeypatch, 3, *common, *given, "--out", tmp_path / "run")
    state, facts = read_weights(heads)
    save_weights({name: tensor + 1 for name, tensor in state.items()}, heads, facts)
    assert "this run's heads changed since it was written" in fail(capsys, "distill", "--out", tmp_path / "run", "--resume")


def test_a_changed_teacher_is_told_before_anything_is_trained(finished: Path, tmp_path: Path, monkeypatch, capsys):
    shutil.copy(finished / "teacher.safetensors", teacher := tmp_path / "teacher.safetensors")
    run_and_kill(monkeypatch, 7, "distill", *KD_SEEDS, "--teacher", teacher, "--out", tmp_path / "run")
    shutil.copy(finished / "best.safetensors", teacher)
    assert "this run's teacher changed since it was written" in fail(capsys, "distill", "--out", tmp_path / "run", "--resume")


def test_the_place_of_a_data_set_does_not_matter(tmp_path: Path):
    """Names of folders are no part of the images."""
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        for kind in ("cat", "dog"):
            write_pngs(tmp_path / name / kind, 20)
    one, two = (usable(load(str(tmp_path / name)), say=print).fingerprint() for name in ("one", "two"))
    assert one == two
