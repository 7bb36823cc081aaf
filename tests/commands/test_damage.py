"""Files of a killed run that were damaged, swapped, cut or edited: named before anything is trained, or made up for."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from kdfast.engine.loop import StageLoop
from tests.commands.running import KD_SEEDS, assert_same_run, fail, kdfast, run_and_kill

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
