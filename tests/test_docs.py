"""What the documents show runs, and what they name exists."""

import contextlib
import json
import re
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kdfast import cli, models, recipes
from kdfast.benchmarks import report
from kdfast.benchmarks.maintain import documents
from kdfast.commands import bench, config, data
from kdfast.engine import Training

ROOT = Path(__file__).parents[1]
OTHERS_OPTIONS = {"--nproc-per-node", "--benchmark-json", "--quick", "--long"}  # torchrun's, pytest's, of benchmarks/tests/conftest.py


def blocks(name: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(), re.DOTALL)


def test_the_readmes_loop_examples_run():
    code, with_a_group = blocks("README.md")
    names = {
        "student_logits": torch.randn(8, 10, requires_grad=True),
        "teacher_logits": torch.randn(8, 10),
        "labels": torch.arange(8),
        "student_hidden": torch.randn(8, 4, requires_grad=True),
        "teacher_hidden": torch.randn(8, 6),
        "student_head": torch.nn.Linear(4, 10),
        "teacher_head": torch.nn.Linear(6, 10),
        "features": torch.nn.functional.normalize(torch.randn(8, 2, 16), dim=2).requires_grad_(),
        "model": torch.nn.Linear(2, 2),
    }
    exec(code, names)
    assert names["loss"].isfinite()
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        exec(with_a_group, names | {"torch": torch})
    finally:
        torch.distributed.destroy_process_group()


def test_the_recipe_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (code,) = blocks("docs/recipes.md")
    (tmp_path / "my_features.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    arguments = [
        "--recipe",
        "my_features:RECIPE",
        "--student",
        "resnet8",
        "--teacher-model",
        "resnet14",
        "--epochs",
        "1",
        "--max-images",
        "100",
    ]
    arguments += ["--teacher-training.epochs", "1", "--seeds", "1", "--no-baseline", "--out", str(tmp_path / "run"), "--weight", "0.5"]
    assert cli.main(["distill", *arguments]) == 0
    assert "train/features" in json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])


def test_the_readmes_recipe_table_is_the_registry():
    readme = (ROOT / "README.md").read_text()
    rows = dict(re.findall(r"^\| (\w+) \| .* \| (.*) \|$", readme, re.MULTILINE))
    rows.pop("recipe", None)
    assert set(rows) >= set(recipes.names())
    for name in recipes.names():
        for preset in recipes.get(name).presets:
            assert preset == "default" or preset.split("-")[0] in rows[name], f"{name}'s preset {preset} is not in README"


def test_the_commands_in_the_documents_exist():
    text = "\n".join(path.read_text() for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
    promised = text.split("## Not there yet")[0]
    for command in re.findall(r"^ +kdfast (\w+)", promised, re.MULTILINE):
        assert command in cli.COMMANDS


def options_in_help(capsys: pytest.CaptureFixture[str], *command: str) -> set[str]:
    with contextlib.suppress(SystemExit):
        cli.main([*command, "--help"])
    return set(re.findall(r"--[a-z][a-z0-9.-]*", capsys.readouterr().out))


def commands_and_options(page: Path) -> list[tuple[str, set[str]]]:
    """What stands in code: the command ("" where none is named, "bench loaders") and the options after it."""
    text = page.read_text().replace("\\\n", " ")
    blocks = re.findall(r"^    .*|^```(?:.|\n)*?^```", text, re.MULTILINE)
    lines = [line.split("  #")[0] for block in blocks for line in block.splitlines()]
    inline = re.findall(r"`([^`]+)`", re.sub(r"^```(?:.|\n)*?^```", "", text, flags=re.MULTILINE))
    found = []
    for code in [*lines, *inline]:
        named = re.search(r"kdfast(?:\.cli)? ((?:(?:bench|data) )?[a-z]+)\b", code)
        used = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9.-]*", code[named.end() :] if named else code))
        found.append((named[1] if named else "", used))
    return [(command, used) for command, used in found if used]


def test_the_options_in_the_documents_exist(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "200")
    known = {name: options_in_help(capsys, name) for name in cli.COMMANDS}
    known |= {f"bench {name}": options_in_help(capsys, "bench", name) for name in bench.BENCHES}
    known |= {f"data {name}": options_in_help(capsys, "data", name) for name in data.COMMANDS}
    known["distill"] = set().union(*(options_in_help(capsys, "distill", "--recipe", name) for name in recipes.names()))
    known["compare"] |= known["distill"]
    known[""] = set().union(*known.values()) | OTHERS_OPTIONS
    found = [(page, *of) for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")] for of in commands_and_options(page)]
    assert {("distill", "--resume"), ("eval", "--model"), ("", "--max-bad-files")} <= {(name, o) for _, name, used in found for o in used}
    for page, command, used in found:
        assert used <= known[command], f"{page.name}: {command or 'no command'} has no {', '.join(used - known[command])}"


def test_every_preset_makes_a_configuration_with_known_networks():
    for name in recipes.names():
        recipe = recipes.get(name)
        for preset in recipe.presets:
            made = config.defaults(recipe, preset, None)
            assert {made.student, made.teacher_model} <= set(models.names())
            table = config.to_toml(made)
            assert config.filled(made, tomllib.loads(table), "x") == made, f"{name} {preset} does not survive config.toml"


def test_the_figures_in_the_documents_come_from_the_committed_results():
    for page in documents.PAGES:
        text = page.read_text()
        assert "\n|---" in text.partition("<!-- table")[2], f"{page.name} has no table"
        assert documents.filled(text) == text, f"{page.name}: run kdfast bench report"
    shown = re.findall(r"!\[[^]]*\]\(figures/(.+?)\)", (ROOT / "docs" / "performance.md").read_text())
    assert set(shown) == {path.name for path in documents.FIGURES.iterdir()}
    for device in documents.devices():
        results = documents.committed(device)
        for name in report.figures(results):
            drawn = (documents.FIGURES / f"{device}-{name}.svg").read_text()
            assert report.digest(results) in drawn, f"{device}-{name}.svg is of other results: run kdfast bench report"


def trainings(recipe: str, preset: str) -> tuple:
    made = config.defaults(recipes.get(recipe), preset, None)
    return made.training, made.teacher_training, made.method, made.data


def test_presets_are_their_sources_trainings_whole():
    """Every field of the sources' tables: a data set's own defaults must not leak into a source's preset."""
    repdistiller = Training(epochs=240, batch_size=64, lr=0.05, weight_decay=5e-4, milestones=(150, 180, 210))
    dih = Training(epochs=200, batch_size=64, lr=0.1, weight_decay=5e-4, nesterov=True, milestones=(60, 120, 180))
    imagenet = Training(epochs=100, batch_size=512, lr=0.2, weight_decay=1e-4, milestones=(30, 60, 90))
    cosine = {"optimizer": "adamw", "lr": 6e-4, "weight_decay": 0.01, "schedule": "cosine", "final_lr": 1e-3}
    notebook = Training(epochs=300, batch_size=128, **cosine)
    tutorial = Training(epochs=5, batch_size=32, lr=0.01, weight_decay=0.0, schedule="constant")
    assert trainings("kd", "repdistiller")[:2] == (repdistiller, repdistiller)
    assert trainings("kd", "dih-readme")[:2] == (dih, dih)
    code = replace(dih, lr=0.05, batch_size=128, epochs=240, milestones=(150, 180, 210), gamma=0.2)
    assert trainings("kd", "dih-code")[0] == code
    assert trainings("kd", "imagenet")[0] == trainings("lskd", "imagenet")[0] == imagenet
    assert trainings("lskd", "cifar100")[0] == repdistiller
    assert trainings("lskd", "cifar100-resnet50-mobilenetv2")[0].lr == 0.01
    assert trainings("conkd", "notebook")[:2] == (notebook, replace(notebook, epochs=60, batch_size=64))
    assert trainings("self_distillation", "tutorial")[0] == tutorial
    assert trainings("self_distillation", "tutorial")[3].label_fraction == 1.0
    for preset in ("dih-readme", "dih-code"):
        method = trainings("kd", preset)[2]
        assert (method.temperature, method.kd_weight, method.ce_weight) == (5.0, 0.1, 0.9)
    for recipe, preset in (("fitnets", "dih"), ("takd", "dih"), ("mhkd", "dih"), ("dih", "dih-readme")):
        assert trainings(recipe, preset)[0] == dih
    for recipe in ("fitnets", "at", "crd"):
        training, _, method, data = trainings(recipe, "repdistiller")
        assert (training, method.ce_weight, method.kd_weight) == (repdistiller, 1.0, 0.0)
        assert (data.normalization, data.val_fraction) == ("repdistiller-cifar100", 0.0)
    assert trainings("dih", "dih-code")[0] == code
    assert trainings("takd", "takd")[0] == replace(dih, nesterov=False, weight_decay=1e-4, batch_size=128, epochs=160, milestones=(80, 120))
    tofd = Training(epochs=250, batch_size=128, lr=0.1, weight_decay=5e-4, milestones=(80, 160, 240))
    assert trainings("tofd", "tofd")[0] == tofd
    assert trainings("tofd", "tofd")[3].augment == "cifar-cutout"
    assert trainings("tofd", "dih")[0] == replace(dih, batch_size=128, gamma=0.2)
    training, _, method, _ = trainings("crd", "dih")
    assert training == replace(repdistiller, lr=0.1, batch_size=128, epochs=200, milestones=(60, 120, 180), gamma=0.2)
    assert (method.ce_weight, method.kd_weight, method.contrast_weight, method.temperature) == (1.0, 0.9, 0.8, 4.0)
    method = trainings("fitnets", "dih")[2]
    assert (method.hint_epochs, method.regressor, method.student_hint, method.teacher_hint) == (40, False, "layer1", "layer1")
    assert trainings("mhkd", "dih")[2].pull_teacher_heads
    large = {"batch_size": 2048, "optimizer": "lion", "warmup": 5, "schedule": "cosine"}
    for name in recipes.names():
        made = config.defaults(recipes.get(name), "large-batch", None)
        assert {key: getattr(made.training, key) for key in large} == large
        assert made.run.precision == "bf16"
        assert made.training.epochs == 30, "the digits' own"
