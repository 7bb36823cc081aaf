"""Two processes do what one does: the same weights after training, the same counts in evaluation."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import sys
from pathlib import Path

import torch
from torch import nn

from kdfast.data import make_loaders
from kdfast.engine import Options, Run, Stage, Training, evaluate, join
from tests.test_engine import noise

world = join("cpu")
torch.manual_seed(world.rank)  # the processes start apart: DDP must make them alike
training = Training(epochs=3, batch_size=16, micro_batch={micro}, lr=0.1, schedule="cosine")
data = make_loaders(noise(), batch_size=16 // world.size, rank=world.rank, world_size=world.size)
model = nn.Sequential(nn.Flatten(), nn.Linear(192, 3)).double()
with torch.no_grad():
    for p in model.parameters():
        p.copy_(torch.linspace(-0.1, 0.1, p.numel()).view_as(p) + world.rank)


def stages():
    yield Stage(
        "s",
        train=(model,),
        forward=lambda batch: {{"logits": model(batch.images.double())}},
        loss=lambda o, b: {{"ce": nn.functional.cross_entropy(o["logits"], b.labels)}},
        data=data,
        training=training,
    )


folder = Path(sys.argv[1])
Run(folder, world, Options()).complete(stages())
result = evaluate(lambda x: model(x.double()), data.test, ("a", "b", "c"), world)
if world.main:
    torch.save([model.state_dict(), result.images, result.loss, result.confusion], folder / "end.pt")
world.barrier()
world.close()
"""


def run(folder: Path, processes: int, script: str) -> list:
    import torch

    folder.mkdir()
    (folder / "script.py").write_text(script)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    done = subprocess.run(
        [*(launch if processes > 1 else [sys.executable]), str(folder / "script.py"), str(folder)],
        capture_output=True,
        text=True,
        timeout=200,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(folder / "end.pt", weights_only=True)


@pytest.mark.parametrize("micro", [None, 6])
def test_two_processes_train_as_one(tmp_path: Path, micro: int | None):
    import torch

    weights, images, loss, confusion = run(tmp_path / "one", 1, SCRIPT.format(micro=None))
    weights2, images2, loss2, confusion2 = run(tmp_path / "two", 2, SCRIPT.format(micro=micro))
    for name in weights:
        assert torch.allclose(weights[name], weights2[name], rtol=1e-9, atol=1e-9)
    assert (images, confusion) == (images2, confusion2)
    assert loss2 == pytest.approx(loss, rel=1e-6)  # evaluated in float32
    lines, lines2 = ([json.loads(x) for x in (tmp_path / n / "metrics.jsonl").read_text().splitlines()] for n in ("one", "two"))
    assert len(lines) == len(lines2) == 3
    for a, b in zip(lines, lines2):
        assert {k: v for k, v in b.items() if "/" in k} == {k: pytest.approx(v, rel=1e-6) for k, v in a.items() if "/" in k}


def test_torchrun_runs_the_command_line(tmp_path: Path):
    arguments = [
        "--recipe",
        "kd",
        "--seeds",
        "1",
        "--student",
        "resnet8",
        "--teacher-model",
        "resnet8",
        "--epochs",
        "2",
        "--max-images",
        "200",
    ]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "kdfast.cli", "distill"]
    done = subprocess.run(
        [*launch, *arguments, "--teacher-training.epochs", "1", "--out", str(tmp_path / "run")],
        capture_output=True,
        text=True,
        timeout=250,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["environment"]["processes"] == 2
    assert results["test_images"] == 359
    assert done.stdout.count("report:") == 1, "one process speaks"
