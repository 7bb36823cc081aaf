"""kdfast compare: a grid of recipes with one teacher, continued by the same command."""

import shutil
from pathlib import Path

import pytest

from kdfast import recipes
from kdfast.commands import compare, config
from kdfast.runs import comparison
from tests.commands.running import TINY, fail, kdfast, metrics_of, read_json, results_of


@pytest.fixture(scope="module")
def grid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished grid."""
    out = tmp_path_factory.mktemp("grid") / "out"
    assert kdfast(*GRID, "--out", out) == 0
    return out


GRID = ["compare", "--recipes", "kd,self_distillation", "--seeds", 2, *TINY]


def test_the_table_has_every_recipe_against_the_student_alone(grid: Path):
    found = read_json(grid / "comparison.json")
    assert [row["recipe"] for row in found["rows"]] == ["teacher resnet8", "resnet8 alone", "kd", "self_distillation"]
    alone = results_of(grid / "kd")["arms"]["alone"]
    for row in found["rows"][2:]:
        arms = results_of(grid / row["recipe"])["arms"]
        assert row["best"] == [arm["best/top1"] for arm in arms["distilled"]]
        assert row["seeds"] == [0, 1]
        gaps = [ours - theirs["best/top1"] for ours, theirs in zip(row["best"], alone)]
        assert row["paired"]["mean"] == pytest.approx(sum(gaps) / 2)
        assert f"| {row['recipe']} | " in (grid / "comparison.md").read_text()
        assert bool(arms["alone"]) == (row["recipe"] == "kd"), "the student alone is trained once"
        assert "teacher" not in [line["stage"] for line in metrics_of(grid / row["recipe"])], "the teacher is trained once"
    assert (grid / "comparison.html").exists()
    assert found["settings"]["epochs"] == 2
    assert found["settings"]["label_fraction"] == 0.05
    assert not any("own" in row for row in found["rows"])


def test_the_same_command_does_what_is_left(grid: Path, capsys: pytest.CaptureFixture[str]):
    rows = read_json(grid / "comparison.json")["rows"]
    shutil.rmtree(grid / "self_distillation")
    before = {path: path.read_bytes() for path in grid.rglob("best.safetensors")}
    assert kdfast(*GRID, "--out", grid) == 0
    assert all(path.read_bytes() == content for path, content in before.items())
    assert read_json(grid / "comparison.json")["rows"][-1]["best"] == rows[-1]["best"]
    error = fail(capsys, *GRID, "--out", grid, "--student", "resnet14")
    assert "kd belongs to another configuration: student is resnet8 there and resnet14 here; give --out another" in error


@pytest.mark.usefixtures("own_recipes")
def test_a_recipe_of_ones_own_is_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert kdfast("compare", "--recipes", "kd,own_recipes:RECIPE", "--seeds", 1, *TINY, "--out", tmp_path / "grid") == 0
    rows = read_json(tmp_path / "grid" / "comparison.json")["rows"]
    assert [row["recipe"] for row in rows] == ["teacher resnet8", "resnet8 alone", "kd", "mine"]
    assert rows[2]["best"] == rows[3]["best"], "it is kd under another name"
    assert (tmp_path / "grid" / "mine" / "results.json").exists()
    error = fail(capsys, "compare", "--recipes", "kd,own_recipes:KD", *TINY, "--out", tmp_path / "other")
    assert "recipes kd and own_recipes:KD are both called kd" in error


def test_settings_of_one_recipe_are_said_apart():
    configs = {name: config.defaults(recipes.get(name), "default", "cifar10") for name in ("kd", "conkd", "at")}
    common, own = compare._settings(configs)
    assert common["batch_size"] == 64
    assert "optimizer" not in common
    assert (own["kd"]["optimizer"], own["conkd"]["optimizer"], own["at"]["lr"]) == ("sgd", "lion", 0.05)
    rows = [{"recipe": name, "own": own[name], "best": [0.5], "last": [0.5]} for name in configs]
    facts = {"settings": common, "rows": rows, "machine": {"cpu": "c", "threads": 1, "torch": "2", "python": "3"}, "date": "d"}
    text = comparison.markdown(facts)
    assert (
        "dataset cifar10, student resnet20, label_fraction 1.0, epochs 240, batch_size 64, precision auto. kd, at: optimizer sgd, " in text
    )
    assert " conkd: optimizer lion, lr 0.001, " in text
