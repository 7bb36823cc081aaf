"""Promises of all operators and losses: small calls are right, runs give the same bits; on a GPU also launches, graphs and streams."""

from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import DeviceType

from kdfast import functional, reference
from kdfast.benchmarks import harness
from kdfast.benchmarks.harness import Call, loss_call
from kdfast.benchmarks.operators import OPERATORS
from kdfast.benchmarks.timing import capture, kernels, launches
from kdfast.optim import Lion
from tests.numeric import DEVICE, INTERPRETED

pytestmark = [pytest.mark.kernels, *[pytest.mark.slow] * INTERPRETED]
on_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU: KDFAST_TEST_DEVICE=cuda")
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 5e-3}  # of max|x - exact| / max|exact|
REPEATS = 1 if DEVICE == "cpu" else 8


def pair(*shape: int) -> Callable[[int], list[Tensor]]:
    def inputs(seed: int) -> list[Tensor]:
        student, teacher = torch.randn(2, *shape, generator=torch.Generator(DEVICE).manual_seed(seed))
        return [student.requires_grad_(), teacher]

    return inputs


WITHOUT_KERNEL = {
    "hint_loss": loss_call("hint_loss", pair(4, 16, 9, 9), functional.hint_loss, nn.functional.mse_loss),
    "soft_cross_entropy": loss_call(
        "soft_cross_entropy",
        pair(33, 100),
        partial(functional.soft_cross_entropy, temperature=3.0),
        partial(reference.soft_cross_entropy, temperature=3.0),
    ),
}
EVERYTHING = [*OPERATORS, *WITHOUT_KERNEL]
LOSSES = [name for name in EVERYTHING if name != "Lion"]


def make_runs(name: str) -> Iterator[tuple[Call, list[Tensor], Callable[[], Any]]]:
    """Every small call in float32, its tensors, and what runs it on them."""
    of = OPERATORS[name].module.calls(torch.device(DEVICE), torch.float32) if name in OPERATORS else [WITHOUT_KERNEL[name]]
    for call in of:
        inputs = call.inputs(0)
        yield call, [x for x in inputs if isinstance(x, Tensor)], call.step(*inputs).run


def refill(inputs: list[Tensor]) -> None:
    for x in inputs:
        if x.is_floating_point():
            x.detach().copy_(torch.randn_like(x))


def compare(got: Any, want: Any, name: str) -> None:
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, msg=lambda message: f"{name}: {message}")


def test_every_public_loss_is_tested_here():
    assert {*EVERYTHING} == {*functional.__all__, "Lion"}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=harness.dtype_name)
@pytest.mark.parametrize("name", OPERATORS)
def test_small_calls_agree_with_the_reference_and_depend_on_their_inputs(name, dtype):
    names = []
    for call in OPERATORS[name].module.calls(torch.device(DEVICE), dtype):
        names.append(call.name)
        results, others = (call.step(*call.inputs(seed)).results() for seed in (0, 1))
        assert all(x.isfinite().all() for x in results), call.name
        assert not torch.equal(results[0], others[0]), f"{call.name} does not depend on its inputs"
        if call.exact is not None:
            errors = [harness.error(got, want) for got, want in zip(results, call.exact(*call.inputs(0)), strict=True)]
            assert max(errors) <= TOLERANCE[dtype], call.name
    assert len(set(names)) == len(names)


def test_small_calls_of_distillation_reach_every_regime_of_its_kernel():
    kernel = pytest.importorskip("kdfast.kernels.distill_kl")
    seen = set()
    for _, (_, *logits), _ in make_runs("kd_loss"):
        C, heavy = logits[0].shape[1], kernel.is_heavy(len(logits) - 1, [x.requires_grad for x in logits])
        plan = kernel.plan(C, heavy)
        kind = ("several rows" if plan.rows > 1 else "one row") if plan.resident(C) else f"walked, heavy={heavy}"
        seen.add((kind, "aligned" if C % 4 == 0 else "odd"))
    assert len(seen) == 8, seen


@pytest.mark.parametrize("name", LOSSES)
def test_loss_gives_the_same_bits_in_every_run(name):
    for call, _, run in make_runs(name):
        first = run()
        for _ in range(REPEATS):
            assert all(map(torch.equal, first, run())), call.name


@on_gpu
@pytest.mark.parametrize("name", EVERYTHING)
def test_call_does_not_wait_for_the_device(name):
    for _, _, run in make_runs(name):
        run()  # the first may compile
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@on_gpu
@pytest.mark.parametrize("name", EVERYTHING)
def test_call_launches_as_few_kernels_as_it_promises(name):
    for call, _, run in make_runs(name):
        if call.launches is not None:
            run()
            seen = launches(run, calls=REPEATS)
            assert 0 < seen.total() <= REPEATS * call.launches, (call.name, seen)


@on_gpu
@pytest.mark.parametrize("name", LOSSES)
def test_captured_loss_follows_its_inputs(name):
    for call, inputs, run in make_runs(name):
        results: list[Any] = []  # the last one is the graph's
        graph = capture(lambda run=run, results=results: results.append(run()))
        for _ in range(2):
            refill(inputs)
            graph.replay()
            compare(results[-1], run(), call.name)


@on_gpu
@pytest.mark.parametrize("name", LOSSES)
def test_loss_runs_on_the_current_stream_and_on_two_at_once(name):
    first, second = torch.cuda.Stream(), torch.cuda.Stream()
    for call, inputs, run in make_runs(name):
        want, values = run(), [x.detach().clone() for x in inputs]
        refill(inputs)
        torch.cuda.synchronize()
        with torch.cuda.stream(first):
            torch.cuda._sleep(20_000_000)  # cycles: a kernel on any other stream would read before the inputs are there
            for x, value in zip(inputs, values):
                x.detach().copy_(value)
            results = [run()]
        torch.cuda.synchronize()
        for _ in range(REPEATS):
            for stream in (first, second):
                with torch.cuda.stream(stream):
                    results.append(run())
        torch.cuda.synchronize()
        for result in results:
            compare(result, want, call.name)


@on_gpu
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="plain"),
        pytest.param({"max_grad_norm": 0.5, "cautious": True}, id="cautious, clipped"),
        pytest.param({"momentum_dtype": torch.int8}, id="int8"),
    ],
)
def test_captured_training_step_with_lion_follows_inputs_and_rate(options):
    nets = [nn.Sequential(nn.Linear(70, 90), nn.Tanh(), nn.Linear(90, 5)) for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    rates = [torch.tensor(1e-3) for _ in nets]
    optimizers = [Lion(net.parameters(), lr=rate, weight_decay=0.1, capturable=True, **options) for net, rate in zip(nets, rates)]
    x = torch.randn(64, 70)

    def train(i: int) -> None:
        optimizers[i].zero_grad(set_to_none=True)
        nets[i](x).square().mean().backward()
        optimizers[i].step()

    graph = capture(lambda: train(0))
    for _ in range(3):  # as often as the capture has warmed up
        train(1)
    for step in range(5):
        x.copy_(torch.randn_like(x))
        for rate in rates:
            rate.fill_(1e-3 / (step + 1))
        # overwrites pinned memory that an upload has given back too early
        torch.empty(1 << 16, dtype=torch.int64, device="cpu").pin_memory().zero_()
        graph.replay()
        train(1)
        compare([p.detach() for p in nets[0].parameters()], [p.detach() for p in nets[1].parameters()], "replayed and eager")


def test_launches_are_counted_without_copies():
    names = ("_resident", "_rescale", "_resident", "Memset (Device)", "Memcpy DtoD (Device -> Device)")
    events = [SimpleNamespace(name=name, device_type=DeviceType.CUDA) for name in names]
    events.append(SimpleNamespace(name="cudaLaunchKernel", device_type=DeviceType.CPU))
    assert kernels(events) == {"_resident": 2, "_rescale": 1}
