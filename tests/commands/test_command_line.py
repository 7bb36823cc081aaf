"""The command line itself: help, the layers of values, missing packages, and one sentence for each mistake."""

import os
import re
import subprocess
import sys
from functools import reduce
from pathlib import Path

import pytest

from kdfast import cli
from kdfast.commands.command_line import resolve
from kdfast.commands.listing import run as list_command
from tests.commands.running import KD, TINY, fail, kdfast

ROOT = Path(__file__).parents[2]


# ---- help ------------------------------------------------------------------------------------------------------------


def test_help_and_version_import_nothing_heavy():
    code = f"import sys; sys.modules.update(dict.fromkeys({('torch', 'numpy', *cli.PACKAGES)}))\n"
    code += "from kdfast.cli import main\nassert [main(words) for words in (['--help'], ['--version'], [])] == [0, 0, 0]"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.count("usage: kdfast COMMAND") == 2
    assert all(command in done.stdout for command in cli.COMMANDS)


@pytest.mark.parametrize(
    ("command", "shown", "hidden"),
    [
        pytest.param(["distill"], ['"none" only resizes images. (default: the data set\'s own)'], [], id="None is explained"),
        pytest.param(
            ["distill", "--preset", "notebook"], ['"none" only resizes images. (default: conkd-student)'], [], id="defaults of a preset"
        ),
        pytest.param(["teacher"], ["--config FILE", "--seed INT"], ["--seeds", "--baseline", "--strict"], id="teacher"),
        pytest.param(["eval"], ["(default: the run's)"], ["--augment", "--label-fraction"], id="eval"),
        pytest.param(["predict"], ["--top INT"], [], id="predict"),
        pytest.param(["export"], ["{onnx,pt2,safetensors}"], [], id="export"),
        pytest.param(["report"], ["--out PATH"], [], id="report"),
        pytest.param(["bench", "kernels"], ["kd_loss", "supcon_loss", "--tier {quick,usual,long}"], [], id="bench kernels"),
    ],
)  # fmt: skip
def test_help_shows_options_and_defaults(command, shown, hidden, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setenv("COLUMNS", "80")  # more would be two columns
    with pytest.raises(SystemExit) as stop:
        kdfast(*command, "--help")
    assert stop.value.code == 0
    text = " ".join(re.sub("[│╭╮╰╯─]", " ", capsys.readouterr().out).split())
    assert not [words for words in shown if words not in text]
    assert not [words for words in hidden if words in text]
    assert "data set's own. (default: None)" not in text


@pytest.mark.parametrize("command", ["data", "bench", "list", "compare"])
def test_a_command_of_commands_says_what_there_is(command: str, capsys: pytest.CaptureFixture[str]):
    assert kdfast(command, "--help") == 0
    assert f"usage: kdfast {command} " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("what", "expected"),
    [("recipes", "self_distillation"), ("presets", "notebook"), ("datasets", "imagenette"), ("models", "78,042")],
)
def test_list_prints_a_table(what: str, expected: str, capsys: pytest.CaptureFixture[str]):
    list_command([what])
    assert expected in capsys.readouterr().out


# ---- missing packages ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "missing", "message"),
    [
        pytest.param(["distill"], "rich", "kdfast distill needs rich: pip install 'kdfast[cli]'", id="distill without rich"),
        pytest.param(["list", "models"], "tyro", "kdfast list needs tyro: pip install 'kdfast[cli]'", id="list without tyro"),
        pytest.param(["bench", "codegen"], "kdfast.benchmarks.codegen", "pip install 'kdfast[bench]'", id="bench codegen"),
        pytest.param(["eval", "RUN"], "sklearn", "kdfast eval needs scikit-learn: pip install 'kdfast[cli]'", id="eval without it"),
        pytest.param(["export", "RUN"], "onnxscript", "export to onnx needs onnxscript: pip install 'kdfast[onnx]'", id="export to onnx"),
    ],
)  # fmt: skip
def test_a_missing_package_is_one_sentence(arguments, missing, message, request, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments = [request.getfixturevalue("finished") if argument == "RUN" else argument for argument in arguments]
    monkeypatch.setitem(sys.modules, missing, None)
    assert message in fail(capsys, *arguments, status=2)
    assert not list(tmp_path.rglob("*.safetensors"))


# ---- layers of values ------------------------------------------------------------------------------------------------


NOTEBOOK = {"data.image_size": 224, "data.augment": "conkd-student", "training.epochs": 300, "teacher_training.epochs": 60}
DIGITS = {"training.epochs": 30, "teacher_training.epochs": 30, "run.seeds": 5, "student": "resnet8"}


@pytest.mark.parametrize(
    ("arguments", "toml", "expected"),
    [
        pytest.param("--recipe kd", "", {"method.temperature": 4.0, "data.val_fraction": 0.1}, id="dataclasses"),
        pytest.param("--recipe kd", "", DIGITS, id="data set, for the teacher too"),
        pytest.param("--dataset .", "", {"training.epochs": 60, "training.warmup": 2, "student": "resnet18"}, id="data set: a path"),
        pytest.param("--preset notebook", "", NOTEBOOK, id="preset, with values of the teacher's own"),
        pytest.param(
            "--recipe kd --preset repdistiller", "", {"training.optimizer": "sgd", "student": "resnet20"}, id="preset of a source"
        ),
        pytest.param(
            "--recipe kd --preset large-batch", "", {"training.batch_size": 2048, "training.epochs": 30}, id="preset over data set"
        ),
        pytest.param("", 'preset = "notebook"\n[training]\nepochs = 3', NOTEBOOK | {"training.epochs": 3}, id="config.toml over preset"),
        pytest.param("", '[data]\ndataset = "cifar10"', {"training.epochs": 240, "student": "resnet20"}, id="data set of config.toml"),
        pytest.param("--lr 0.5", "[training]\nlr = 0.25\nema = 0.5", {"training.lr": 0.5, "training.ema": 0.5}, id="command line"),
        pytest.param("--batch_size=7", "", {"training.batch_size": 7}, id="underscores"),
        pytest.param("--dataset . --epochs 1", "", {"training.warmup_epochs": 0, "training.warmup": 2}, id="a warm-up that is too long"),
    ],
)
def test_a_later_layer_wins(arguments: str, toml: str, expected: dict, tmp_path: Path):
    (tmp_path / "c.toml").write_text(toml)
    made = resolve("distill", [*arguments.split(), "--config", str(tmp_path / "c.toml")])
    assert {name: reduce(getattr, name.split("."), made) for name in expected} == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param("epochs = = 3", "is no configuration", id="no TOML"),
        pytest.param("[training]\nepoch = 3", "there is no option 'epoch'", id="unknown key"),
        pytest.param('[training]\nepochs = "many"', "epochs must be int, got 'many'", id="another type"),
        pytest.param('[training]\noptimizer = "adam"', "optimizer must be one of sgd, adamw, lion, got 'adam'", id="no such choice"),
        pytest.param('recipe = "lskd"', "recipe is kd on the command line and lskd in", id="another recipe"),
    ],
)
def test_a_wrong_config_is_refused(text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "config.toml").write_text(text)
    assert message in fail(capsys, "distill", "--recipe", "kd", "--config", tmp_path / "config.toml")


# ---- one sentence for each mistake -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("distil", "there is no command 'distil'; did you mean distill?"),
        ("distill --recipe kdd", "did you mean kd"),
        ("distill --preset best", "preset must be one of default, notebook, readme"),
        ("distill --student resnet21", "resnet20"),
        ("distill --dataset cifar11", "no data set or folder is called 'cifar11'; known names: digits"),
        ("distill --dataset ./nowhere", "no data set or folder is called './nowhere'"),
        ("distill --teacher nowhere/at/all.pt", "there is no such path"),
        ("distill --config nowhere.toml", "nowhere.toml is no configuration: there is no such file"),
        ("distill --normalization none", "normalization must be one of"),
        ("distill --student-options shortcut", "student_options must be key=value, got 'shortcut'"),
        ("distill --device tpu", "device must be auto, cpu, cuda or cuda:N"),
        ("compare --label-fraction nan", "label_fraction must be above 0 and at most 1, got nan"),
        ("distill --seeds 0", "seeds must be at least 1"),
        ("distill --plus nst", "plus must begin with kd, lskd, supcon, got 'nst'"),
        ("distill --plus kd:wait=1", "plus kd takes weight=NUMBER"),
        ("distill --plus kd:weight=0", "both positive, got 'weight=0'"),
        (f"distill --recipe self_distillation --plus kd {' '.join(TINY)}", "plus kd and lskd need a teacher, and this recipe has none"),
        ("compare --recipes kd,dhi", "did you mean"),
        ("compare --recipes kd --resume", "compare does not take --resume"),
        ("teacher --seeds 3", "Unrecognized options: --seeds, 3"),
        ("teacher --no-baseline", "Unrecognized options: --no-baseline"),
        ("eval nowhere", "there is no such path"),
        ("eval nowhere --augment none", "Unrecognized options: --augment, none"),
        ("eval nowhere --label-fraction 0.5", "Unrecognized options: --label-fraction, 0.5"),
        ("export nowhere", "there is no such path"),
        ("predict nowhere a.jpg", "there is no such path"),
        ("data dance", "data knows info, check, preview, got 'dance'"),
        ("data info nowhere/at/all", "no data set or folder is called 'nowhere/at/all'"),
        ("data check nowhere/at/all", "no data set or folder is called 'nowhere/at/all'"),
        ("data check nowhere", "no data set or folder is called 'nowhere'"),
        ("bench loaders --data-dir nowhere", "no data set or folder is called"),
        ("bench kernel", "bench knows kernels, loaders, train, codegen, report, got 'kernel'"),
        ("bench kernels --operators softmax", "attention_transfer_loss, crd_loss, got 'softmax'"),
        ("bench kernels --device abacus", "device must be auto, cpu, cuda"),
        ("bench report nowhere.json", "No such file or directory: nowhere.json"),
        ("bench loaders --epochs 0", "epochs must be at least 1, got 0"),
        ("bench train --classes 1", "classes must be at least 2, got 1"),
        ("bench train --seconds 0", "seconds must be positive"),
        ("bench train --device cpu --student resnet19", "there is no network 'resnet19'"),
        ("list colours", "list shows recipes, presets, models, datasets"),
        ("report", "runs: name one run folder or several, got none"),
        ("report nowhere", "nowhere: there is no such path"),
        ("report .", "not a run folder: there is no config.toml in it"),
        (
            "distill --recipe own_recipes:OTHER",
            "must name an importable package.module:RECIPE: module 'own_recipes' has no attribute 'OTHER'",
        ),
        ("distill --recipe no_such_module:RECIPE", "must name an importable package.module:RECIPE: No module named 'no_such_module'"),
        ("distill --recipe own_recipes:Settings", "must name a kdfast.recipes.Recipe, got a type"),
    ],
    ids=lambda text: text[:50],
)
@pytest.mark.usefixtures("own_recipes")
def test_a_mistake_is_one_sentence(command: str, message: str, capsys: pytest.CaptureFixture[str]):
    try:
        error = fail(capsys, *command.split())
    except SystemExit:
        error = capsys.readouterr().err.replace("\n", " ")
    assert message in error


@pytest.mark.parametrize(
    ("command", "option", "kind"),
    [
        (["distill", *KD], "--out", "folder"),
        (["teacher", "--max-images", 200], "--out", "folder"),
        (["compare", "--recipes", "kd", *TINY], "--out", "folder"),
        (["bench", "report", "results.json"], "--out", "folder"),
        (["export", "RUN", "--format", "safetensors"], "--out", "file"),
        (["eval", "RUN"], "--json", "file"),
        (["report", "RUN", "RUN"], "--out", "file"),
        (["data", "preview", "digits"], "--out", "file"),
        (["bench", "kernels"], "--out", "file"),
        (["bench", "loaders"], "--out", "file"),
        (["bench", "codegen"], "--out", "file"),
    ],
    ids=lambda value: " ".join(map(str, value[:2])) if isinstance(value, list) else None,
)
def test_an_unwritable_place_is_found_before_any_work(command, option: str, kind: str, finished: Path, tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    for name in ("folder", "locked"):
        (tmp_path / name).mkdir()
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "locked" and access(path, mode))  # root may write everywhere
    command = [finished if argument == "RUN" else argument for argument in command]
    wrong, message = ("file", "a file: name a folder") if kind == "folder" else ("folder", "a folder: name a file")
    assert fail(capsys, *command, option, wrong) == f"kdfast: {option} {wrong} is {message}"
    assert f"{tmp_path / 'file'} is a file, no folder" in fail(capsys, *command, option, "file/below")
    assert f"the folder {tmp_path / 'locked'} cannot be written" in fail(capsys, *command, option, "locked/below")
    assert (tmp_path / "file").read_text() == "mine"
    assert not any((tmp_path / "locked").iterdir())


@pytest.mark.skipif(os.name != "posix", reason="POSIX signals")
@pytest.mark.parametrize("module", ["torch", "numpy", "tyro", "kdfast.commands.distill"])
def test_ctrl_c_while_libraries_load_ends_at_once(module: str):
    """An import that hides the exception, as some libraries' do, does not keep the process alive."""
    script = f"""
import importlib.abc, os, signal, sys
class Interrupt(importlib.abc.MetaPathFinder):
    def find_spec(self, name, *_):
        if name == {module!r}:
            try:
                os.kill(os.getpid(), signal.SIGINT)
                sum(range(1000))
            except KeyboardInterrupt:
                pass
sys.meta_path.insert(0, Interrupt())
from kdfast import cli
sys.exit(cli.main(["distill", "--help"]))
"""
    process = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (process.returncode, process.stderr) == (130, "kdfast: stopped before anything was begun\n")
