"""Two processes do the work of one: the same weights after training, the same counts in evaluation."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.engine import scenarios
from tests.engine.small import close, lines

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
ROOT = Path(__file__).parents[2]


def torchrun(module: str, *arguments: str) -> str:
    """Runs a module in two processes; returns what they print."""
    command = [*TORCHRUN, module, *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict, Path, dict]:
    """The folder and the results of all scenarios in this process, and in two."""
    one, two = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
    alone = scenarios.run_all(one, (None,))
    torchrun("tests.engine.scenarios", str(two))
    return one, alone, two, torch.load(two / "results.pt", weights_only=True)


@pytest.mark.parametrize("micro", [None, 6])
def test_two_processes_train_as_one(runs, micro: int | None):
    one, alone, two, together = runs
    (weights, images, loss, confusion), (weights2, images2, loss2, confusion2) = alone["train-None"], together[f"train-{micro}"]
    assert close(weights, weights2, rtol=1e-9, atol=1e-9)
    assert (images, confusion) == (images2, confusion2)
    assert loss2 == pytest.approx(loss, rel=1e-6)  # evaluated in float32
    metrics, metrics2 = lines(one / "train-None"), lines(two / f"train-{micro}")
    assert len(metrics) == len(metrics2) == 3
    for line, line2 in zip(metrics, metrics2):
        assert {k: v for k, v in line2.items() if "/" in k} == pytest.approx({k: v for k, v in line.items() if "/" in k}, rel=1e-6)


@pytest.mark.parametrize("micro", [None, 6])
@pytest.mark.parametrize("procedure", scenarios.PROCEDURES)
def test_the_contrast_of_conkd_sees_all_processes(runs, procedure: str, micro: int | None):
    one, alone, two, together = runs
    assert close(alone[f"{procedure}-None"], together[f"{procedure}-{micro}"], rtol=1e-9, atol=1e-9)
    first, first2 = (lines(folder)[0] for folder in (one / f"{procedure}-None", two / f"{procedure}-{micro}"))
    trained = [name for name in first if name.startswith("train/")]
    assert "train/supcon" in trained
    assert {name: first2[name] for name in trained} == pytest.approx({name: first[name] for name in trained}, rel=1e-9)


def test_processes_draw_their_own_numbers_within_a_stage_and_the_same_between_stages(runs):
    _, alone, _, together = runs
    ((single, _),) = alone["draws-None"]
    (main, built), (other, built2) = together["draws-None"]
    assert torch.equal(built, built2)
    assert torch.equal(main, single), "a single process draws the main process's numbers"
    assert not (main == other).any()


RECIPES = [
    pytest.param("conkd", ["--preset", "large-batch", "--warmup", "0", "--teacher-training.warmup", "0"], id="large batch of conkd"),
    pytest.param("kd", [], id="kd", marks=pytest.mark.slow),
    pytest.param("fitnets", [], id="parameters without a part in fitnets' loss", marks=pytest.mark.slow),
    pytest.param("tofd", [], id="tofd's heads and large norms", marks=pytest.mark.slow),
    pytest.param("crd", ["--negatives", "64", "--micro-batch", "16"], id="crd's banks in two passes", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("recipe", "more"), RECIPES)
def test_torchrun_runs_the_command_line(tmp_path: Path, recipe: str, more: list[str]):
    networks = ["--student", "resnet8", "--teacher-model", "resnet8"]
    short = ["--seeds", "1", "--epochs", "2", "--teacher-training.epochs", "1", "--max-images", "200"]
    out = tmp_path / "run"
    printed = torchrun("kdfast.cli", "distill", "--recipe", recipe, *more, *networks, *short, "--out", str(out))
    results = json.loads((out / "results.json").read_text())
    assert results["environment"]["processes"] == 2
    assert results["test_images"] == 359
    assert printed.count("report:") == 1, "one process speaks"
