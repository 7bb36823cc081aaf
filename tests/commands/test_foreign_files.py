"""Files that name code: kdfast imports nothing that a file names, unless the command line names it too."""

import json
import sys

import pytest

from kdfast.commands import toml
from kdfast.models import ModelSpec, create, save_weights
from kdfast.runs import artifact
from tests.commands.running import TINY, fail, kdfast

CODE = """
from pathlib import Path

from kdfast.models import create

Path("imported").touch()


def make(num_classes):
    return create("resnet8", num_classes)
"""
PREPARATION = artifact.Preparation((0.5,) * 3, (0.5,) * 3, 32, "squash")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current folder: a module that leaves a mark when it is imported, and a weights file that names a function of it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "theirs", raising=False)
    (tmp_path / "theirs.py").write_text(CODE)
    spec, classes = ModelSpec("theirs:make", 10), tuple(map(str, range(10)))
    artifact.save(tmp_path / "theirs.safetensors", create("resnet8", 10).state_dict(), spec, classes, PREPARATION)
    yield tmp_path
    sys.modules.pop("theirs", None)


@pytest.mark.parametrize(
    "command",
    [
        pytest.param(["eval", "theirs.safetensors", "--dataset", "digits"], id="eval"),
        pytest.param(["export", "theirs.safetensors", "--format", "safetensors"], id="export"),
        pytest.param(["predict", "theirs.safetensors", "image.png"], id="predict"),
        pytest.param(["distill", "--recipe", "kd", "--teacher", "theirs.safetensors", *TINY[:2]], id="distill"),
    ],
)
def test_a_weights_file_imports_nothing(folder, capsys, command):
    assert "is of theirs:make, which is not kdfast's: files import nothing, so name it with --" in fail(capsys, *command)
    assert not (folder / "imported").exists()


def test_the_command_line_may_name_the_code_of_a_weights_file(folder):
    assert kdfast("eval", "theirs.safetensors", "--dataset", "digits", "--model", "theirs:make") == 0
    assert (folder / "imported").exists()


@pytest.mark.parametrize(
    ("command", "line"),
    [
        pytest.param("distill", 'recipe = "theirs:RECIPE"', id="recipe"),
        pytest.param("distill", 'student = "theirs:make"', id="student"),
        pytest.param("distill", 'teacher_model = "theirs:make"', id="teacher"),
        pytest.param("distill", 'recipe = "takd"\nmethod.assistants = ["theirs:make"]', id="assistant"),
        pytest.param("teacher", 'model = "theirs:make"', id="model"),
    ],
)
@pytest.mark.parametrize("resume", [False, True], ids=["config", "resume"])
def test_a_config_imports_nothing(folder, capsys, command, line, resume):
    (folder / "config.toml").write_text(toml.seal(line))
    options = ["--out", ".", "--resume"] if resume else ["--config", "config.toml"]
    assert "which is not kdfast's: files import nothing, so name it on the command line too" in fail(capsys, command, *options)
    assert not (folder / "imported").exists()


def test_the_command_line_may_name_the_code_of_a_config(folder):
    (folder / "config.toml").write_text('recipe = "kd"\nstudent = "theirs:make"\n[run]\nseeds = 1\nbaseline = false')
    assert kdfast("distill", "--config", "config.toml", "--student", "theirs:make", *TINY[2:]) == 0


@pytest.mark.parametrize(
    "header",
    [
        pytest.param("no JSON", id="no JSON"),
        pytest.param(json.dumps([1]), id="a list"),
        pytest.param(json.dumps({"spec": "{}"}), id="no preparation"),
        pytest.param(json.dumps({"spec": 5, "classes": 5, "preparation": {}}), id="other types"),
    ],
)
def test_a_damaged_header_is_one_sentence(tmp_path, capsys, header):
    save_weights(create("resnet8", 10), tmp_path / "theirs.safetensors", {artifact.METADATA: header})
    assert "has a damaged header" in fail(capsys, "eval", tmp_path / "theirs.safetensors", "--dataset", "digits")
