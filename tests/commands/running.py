"""Commands run in this process, and what they leave behind."""

import json
import os
import re
from pathlib import Path

import pytest

from kdfast import cli
from tests.engine.small import lines as metrics_of

# teacher and student of two epochs on 200 digits: about a second
TINY = ["--student", "resnet8", "--teacher-model", "resnet8", "--teacher-training.epochs", "2", "--epochs", "2", "--max-images", "200"]
SHORT = ["--seeds", "1", "--no-baseline", *TINY]
KD = ["--recipe", "kd", "--seeds", "1", *TINY]
KD_SEEDS = [*KD, "--seeds", "2"]  # of the fixture `finished`
TEACHER = ["teacher", "--model", "resnet8", "--max-images", "200", "--epochs"]


def kdfast(*arguments: object) -> int:
    return cli.main([str(argument) for argument in arguments])


def fail(capsys: pytest.CaptureFixture[str], *arguments: object, status: int = 1) -> str:
    """Runs a command that fails, and returns its message: one line on stderr that begins with the program's name."""
    capsys.readouterr()
    assert kdfast(*arguments) == status
    error = capsys.readouterr().err.strip()
    assert re.fullmatch("kdfast: .*", error), error
    return error


def read_json(path: Path) -> dict:
    return json.loads(path.read_text())


def results_of(folder: Path) -> dict:
    return read_json(folder / "results.json")


def stages_of(folder: Path) -> list[str]:
    return list(dict.fromkeys(line["stage"] for line in metrics_of(folder)))


def assert_same_run(one: Path, other: Path) -> None:
    assert metrics_of(one) == metrics_of(other)
    assert (one / "best.safetensors").read_bytes() == (other / "best.safetensors").read_bytes()


def run_and_kill(monkeypatch: pytest.MonkeyPatch, write: int, *arguments: object) -> None:
    """Runs a command that stops at its `write`-th write of a file, as kill -9 would leave it."""
    real, left = os.replace, [write]

    def replace(*paths: object) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        real(*paths)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        assert kdfast(*arguments) == 130


def evaluate(run: Path, *options: object) -> dict:
    """The numbers that `kdfast eval` writes."""
    out = run.parent / "evaluation.json"
    assert kdfast("eval", run, "--json", out, *options) == 0
    return read_json(out)
