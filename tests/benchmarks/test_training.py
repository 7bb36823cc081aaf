"""kdfast bench train: its step is the engine's, its peer computes the same losses, and its numbers hold together."""

import json
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from kdfast import optim
from kdfast.benchmarks import training
from kdfast.benchmarks.training import PARTS, Step, Train, plain_loss
from kdfast.data import Batch
from kdfast.engine import Options, World
from kdfast.engine.interrupt import StopRequest
from kdfast.engine.loop import StageLoop

CPU = torch.device("cpu")
SMALL = Train(student="resnet8", teacher="resnet14", classes=7, image_size=16, batch_size=6, seconds=0.2, device="cpu").on(CPU)
RECIPES = ["kd", "lskd", "conkd"]


def step(options: Train, *, plain: bool = False) -> tuple[Step, Batch]:
    """The same weights and batch at every call."""
    torch.manual_seed(3)
    images = torch.randn(6, 3, 16, 16).contiguous(memory_format=torch.channels_last)
    batch = Batch(images, torch.arange(6) % 3, torch.arange(6))
    return Step(options, batch, plain=plain), batch


def weights(made: Step) -> list[torch.Tensor]:
    return [p.detach().clone() for p in made.stage.parameters()]


@pytest.mark.parametrize(("recipe", "precision"), [("kd", "bf16"), ("lskd", "fp32"), ("conkd", "fp32"), ("conkd", "bf16")])
def test_a_step_is_the_engines_bit_for_bit(recipe, precision):
    options = replace(SMALL, recipe=recipe, precision=precision)
    ours, _ = step(options)
    theirs, batch = step(options)
    loop = StageLoop(theirs.stage, World(0, 1, CPU), Options(precision=precision), StopRequest())
    before = weights(ours)
    for _ in range(2):
        ours()
        loop._step(batch)
    assert all(torch.equal(a, b) for a, b in zip(weights(ours), weights(theirs)))
    assert not any(torch.equal(a, b) for a, b in zip(weights(ours), before)), "a weight did not move"


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_peer_computes_the_recipes_loss(recipe):
    options = replace(SMALL, recipe=recipe)
    made, batch = step(options)
    results = []
    for loss in (made.stage.loss, plain_loss(options)):
        outputs = {name: value.detach().requires_grad_(value.requires_grad) for name, value in made.stage.forward(batch).items()}
        terms = loss(outputs, batch)
        sum(terms.values()).backward()
        results.append([sum(terms.values()).detach(), *(x.grad for x in outputs.values() if x.requires_grad)])
    assert ("supcon" in terms) == (recipe == "conkd")
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_both_sides_start_from_the_same_weights_and_only_the_peer_lacks_kdfast():
    pytest.importorskip("lion_pytorch")
    ours, theirs = step(SMALL)[0], step(SMALL, plain=True)[0]
    assert all(torch.equal(a, b) for a, b in zip(weights(ours), weights(theirs)))
    assert isinstance(ours.optimizer, optim.Lion)
    assert type(theirs.optimizer).__module__ == "lion_pytorch.foreach"
    assert not any(p.grad is not None for p in theirs.stage.parameters())
    for optimizer in ("adamw", "sgd"):
        sides = [step(replace(SMALL, optimizer=optimizer), plain=plain)[0].optimizer for plain in (False, True)]
        assert type(sides[0]) is type(sides[1])


@pytest.fixture
def clock(monkeypatch):
    """A clock that only `clock.now += seconds` moves, instead of the machine's."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(training.time, "perf_counter", lambda: clock.now)
    return clock


def test_a_part_is_timed_where_it_happens(clock, monkeypatch):
    """A slow teacher, loss or optimizer shows in its own part and in no other; the parts are the whole step."""
    made, _ = step(SMALL)

    def slow(function):
        def call(*arguments):
            clock.now += 0.5
            return function(*arguments)

        return call

    places = {"teacher": (made.stage.frozen[0], "forward"), "losses": (made, "_loss"), "optimizer": (made.optimizer, "step")}
    for part, (owner, name) in places.items():
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, slow(getattr(owner, name)))
            made()
        (parts,) = made.clock.take()
        assert parts == dict.fromkeys(PARTS, 0.0) | {part: 500.0}
        assert tuple(parts) == PARTS


def test_numbers_hold_together(tmp_path, capsys):
    result = training.run(replace(SMALL, out=tmp_path / "x.json"))
    printed = capsys.readouterr().out
    for part in (*PARTS, "images/s", "losses and optimizer"):
        assert part in printed
    written = json.loads((tmp_path / "x.json").read_text())
    assert written["cases"] == [result]
    assert written["machine"]["torch"] == torch.__version__
    assert (result["teacher"], result["batch_size"], result["precision"], result["device"]) == ("resnet14", 6, "fp32", "cpu")
    assert result["steps"] >= training.ROUNDS
    assert result["speedup"] > 0
    for side in (result["kdfast"], result["plain"]):
        assert side["images_per_s"] == pytest.approx(1e3 * 6 / side["step_ms"], rel=1e-3)
        assert sum(side["parts_ms"].values()) == pytest.approx(side["step_ms"], rel=1e-3)
        share = (side["parts_ms"]["losses"] + side["parts_ms"]["optimizer"]) / side["step_ms"]
        assert side["losses_and_optimizer"] == pytest.approx(share, rel=1e-3)


def test_averages_leave_out_disturbed_steps():
    calm = dict.fromkeys(PARTS, 1.0)
    disturbed = calm | {"backward": 50.0}
    assert training.average_parts([calm, disturbed, calm, calm, calm | {"teacher": 0.1}]) == calm
    assert training.average_parts([disturbed]) == disturbed


@pytest.mark.slow
def test_compiled_it_computes_the_same(monkeypatch):
    torch._dynamo.reset()
    graphs = []

    def backend(module, inputs):
        graphs.append(sum(node.op.startswith("call") for node in module.graph.nodes))
        return module

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    plain, _ = step(SMALL)
    compiled, _ = step(replace(SMALL, compile="on"))
    for made in (plain, compiled):
        made()
    assert sum(operations > 0 for operations in graphs) == 2, "teacher and student, each one graph; the clock's marks lie between"
    for a, b in zip(weights(plain), weights(compiled)):
        assert torch.equal(a, b)
