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
from tests.engine.test_engine import noise

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
tasks = Path("/proc/self/task")  # Linux
names = [(task / "comm").read_text().strip() for task in tasks.iterdir()] if tasks.exists() else []
assert not any("gloo" in name for name in names), names  # one that runs at the interpreter's end can abort it
"""


CONTRAST = """
import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from kdfast.data import make_loaders
from kdfast.engine import Options, Run, Training, join
from kdfast.models import ModelSpec, create, projection_head
from kdfast.recipes import conkd
from kdfast.recipes.recipe import Setup
from tests.engine.test_engine import noise, split

world = join("cpu")
torch.set_default_dtype(torch.float64)
training = Training(epochs=2, batch_size=16, micro_batch={micro}, lr=0.01, schedule="constant")


data = replace(noise(), val=split(17, 1))  # in validation the second process has one batch less


class Doubled(nn.Sequential):
    def forward(self, images):
        return super().forward(images.double())


def network(num_classes):
    return Doubled(nn.Flatten(), nn.Linear(192, 12), nn.Tanh(), nn.Linear(12, num_classes))


def loaders(training, augment, all_labels, seed):
    size = training.batch_size // world.size
    return make_loaders(data, batch_size=size, label_fraction=0.6, rank=world.rank, world_size=world.size)


spec = ModelSpec("__main__:network", 3)
setup = Setup(data, training, training, spec, spec, False, False, True, 0, loaders, print)


def first_stage(procedure):
    settings = conkd.Settings(procedure=procedure, alpha=3.0, kd_weight=0.1)  # the contrast is what is trained on
    teacher = conkd.EmbeddingTeacher(create(spec.name, 3), projection_head(12))
    yield next(conkd.distil(setup, settings, teacher))


ends = {{}}
for procedure in ("joint", "readme", "notebook"):
    folder = Path(sys.argv[1]) / procedure
    folder.mkdir(exist_ok=True)
    Run(folder, world, Options()).complete(first_stage(procedure))
    ends[procedure] = torch.load(folder / "checkpoint.pt", weights_only=True)["weights"]
if world.main:
    torch.save(ends, Path(sys.argv[1]) / "end.pt")
world.barrier()
world.close()
"""

# what kdfast compare does: a run after another in one process, the main one later for the table that it prints
JOINS = """
import sys
import time
from pathlib import Path

import torch

from kdfast.engine import join

for k in range(3):
    world = join("cpu")
    assert world.gather([k, world.rank]) == [[k, 0], [k, 1]]
    world.close()
    if world.main:
        time.sleep(0.5)
if world.main:
    torch.save("met", Path(sys.argv[1]) / "end.pt")
"""

# what each process draws while it trains, and what it draws between stages
DRAWS = """
import sys
from pathlib import Path

import torch
from torch import nn

from kdfast.engine import Options, Run, Training, join
from kdfast.data import make_loaders
from tests.engine.test_engine import noise, stage

world = join("cpu")
training = Training(epochs=1, batch_size=16, schedule="constant")
data = make_loaders(noise(), batch_size=16 // world.size, rank=world.rank, world_size=world.size)
drawn, between = [], []


def stages():
    for name in ("first", "second"):
        model = nn.Sequential(nn.Flatten(), nn.Linear(192, 3))
        between.append(torch.rand(4))

        def forward(batch, model=model):
            drawn.append(torch.rand(4))
            return {"logits": model(batch.images)}

        yield stage(name, model, training, forward=forward, data=data)


Run(Path(sys.argv[1]), world, Options()).complete(stages())
everyones = world.gather([torch.stack(drawn[:5]), torch.stack(between)])
if world.main:
    torch.save(everyones, Path(sys.argv[1]) / "end.pt")
world.barrier()
world.close()
"""


def run(folder: Path, processes: int, script: str) -> list:
    import torch

    folder.mkdir()
    (folder / "script.py").write_text(script)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
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


@pytest.mark.parametrize("micro", [None, 6])
def test_the_contrast_of_conkd_sees_all_processes(tmp_path: Path, micro: int | None):
    import torch

    one = run(tmp_path / "one", 1, CONTRAST.format(micro=None))
    two = run(tmp_path / "two", 2, CONTRAST.format(micro=micro))
    for procedure, weights in one.items():
        for name in weights:
            assert torch.allclose(weights[name], two[procedure][name], rtol=1e-9, atol=1e-9), f"{procedure}: {name}"
        terms, terms2 = (json.loads((tmp_path / n / procedure / "metrics.jsonl").read_text().splitlines()[0]) for n in ("one", "two"))
        trained = [name for name in terms if name.startswith("train/")]
        assert "train/supcon" in trained
        assert {name: terms2[name] for name in trained} == {name: pytest.approx(terms[name], rel=1e-9) for name in trained}


def test_processes_join_again_and_again(tmp_path: Path):
    assert run(tmp_path / "two", 2, JOINS) == "met"


def test_processes_draw_numbers_of_their_own_within_a_stage_and_the_same_between_stages(tmp_path: Path):
    import torch

    ((alone, _),) = run(tmp_path / "one", 1, DRAWS)
    (main, built), (other, built2) = run(tmp_path / "two", 2, DRAWS)
    assert torch.equal(built, built2)
    assert torch.equal(main, alone), "a single process draws what the main process does"
    assert not (main == other).any()


@pytest.mark.parametrize(
    ("recipe", "more"),
    [
        ("kd", []),
        ("fitnets", []),  # parameters without a part in the loss
        ("tofd", []),  # heads, and a norm that can be large
        ("conkd", ["--preset", "large-batch", "--warmup", "0", "--teacher-training.warmup", "0"]),  # docs/large-batch.md
        ("crd", ["--negatives", "64", "--micro-batch", "16"]),  # banks that all processes update, in two passes
    ],
)
def test_torchrun_runs_the_command_line(tmp_path: Path, recipe: str, more: list[str]):
    arguments = [
        *more,
        "--recipe",
        recipe,
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
