"""Promises of the operators that only a GPU can show, one function per promise: python -m kdfast.benchmarks.maintain.contracts NAME

Prints one line of JSON with what was seen, or why the promise is broken (exit status 1) or cannot be shown here (exit status 3). Each
promise has a process of its own, since a kernel that goes wrong takes its process along. gpu.py runs them all.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kdfast import functional, reference
from kdfast.benchmarks.harness import Call, loss_call
from kdfast.benchmarks.operators import OPERATORS
from kdfast.benchmarks.timing import launches
from kdfast.optim import Lion

REPEATS = 8
NOT_AVAILABLE = 3  # exit status


class Broken(Exception):
    """A promise is not kept."""


class NotAvailable(Exception):
    """This machine cannot show it."""


class Work(NamedTuple):
    """A call on fixed tensors.

    Attributes:
        call: what is called.
        inputs: its tensors; floating ones may be filled with other values.
        run: computes the results.
    """

    call: Call
    inputs: list[Tensor]
    run: Callable[[], Any]


def works(device: torch.device) -> dict[str, Work]:
    """Every small call of every operator in float32, and the losses that have no kernel."""
    calls = {f"{name}: {call.name}": call for name, o in OPERATORS.items() for call in o.module.calls(device, torch.float32)}
    calls |= {call.name: call for call in _losses_without_kernel(device)}
    made = {}
    for name, call in calls.items():
        inputs = call.inputs(0)
        made[name] = Work(call, [x for x in inputs if isinstance(x, Tensor)], call.step(*inputs).run)
    return made


def _losses_without_kernel(device: torch.device) -> Iterator[Call]:
    def pair(*shape: int) -> Callable[[int], list[Tensor]]:
        return lambda seed: [torch.randn(shape, device=device).requires_grad_(), torch.randn(shape, device=device)]

    yield loss_call("hint_loss", pair(4, 16, 9, 9), functional.hint_loss, nn.functional.mse_loss)
    yield loss_call(
        "soft_cross_entropy",
        pair(33, 100),
        lambda student, teacher: functional.soft_cross_entropy(student, teacher, temperature=3.0),
        lambda student, teacher: reference.soft_cross_entropy(student, teacher, temperature=3.0),
    )


def losses(device: torch.device) -> dict[str, Work]:
    """The works of losses: all but optimizers'."""
    return {name: work for name, work in works(device).items() if work.call.loss is not None}


# ---- the promises ----------------------------------------------------------------------------------------------------


def same_bits(device: torch.device) -> dict[str, Any]:
    """Every loss gives the same bits in every run."""

    def check(work: Work) -> None:
        first = work.run()
        for _ in range(REPEATS):
            if not all(torch.equal(a, b) for a, b in zip(first, work.run(), strict=True)):
                raise Broken("two runs on the same inputs differ")

    return check_each(losses(device), check)


def no_waiting(device: torch.device) -> dict[str, Any]:
    """Neither a loss, forward and backward, nor a Lion step makes the host wait for the device."""

    def check(work: Work) -> None:
        work.run()  # the first may compile
        torch.cuda.synchronize(device)
        torch.cuda.set_sync_debug_mode("error")
        try:
            work.run()
        finally:
            torch.cuda.set_sync_debug_mode("default")

    return check_each(works(device), check)


def few_launches(device: torch.device) -> dict[str, Any]:
    """No call launches more kernels than it promises (Call.launches)."""
    seen = {}
    for name, work in works(device).items():
        if work.call.launches is not None:
            work.run()
            kernels = {kernel: count / REPEATS for kernel, count in launches(work.run, device, REPEATS).items()}
            seen[name] = (work.call.launches, kernels)
    judge_launches(seen)
    return {"kernels": seen}


def judge_launches(seen: Mapping[str, tuple[int, Mapping[str, float]]]) -> None:
    """Raises Broken where a call launched more kernels than it promises, or the profiler saw none."""
    unseen = [name for name, (_, kernels) in seen.items() if not kernels]
    if unseen or not seen:
        raise Broken(f"the profiler saw no kernels of {', '.join(unseen) or 'any call'}")
    wrong = {name: kernels for name, (most, kernels) in seen.items() if sum(kernels.values()) > most}
    if wrong:
        raise Broken(f"more launches than promised: {json.dumps(wrong)}")


def cuda_graph(device: torch.device) -> dict[str, Any]:
    """Every loss can be captured, and a replay on new inputs gives what eager mode gives."""

    def check(work: Work) -> None:
        results, replay = capture(work.run, device)
        for _ in range(2):
            refill(work)
            replay()
            compare(results, work.run(), "the replay and eager mode")

    return check_each(losses(device), check)


def capture(run: Callable[[], Any], device: torch.device) -> tuple[Any, Callable[[], None]]:
    """Captures a CUDA graph of a call; returns the tensors of its results and the replay that fills them."""
    graph, here, side = torch.cuda.CUDAGraph(), torch.cuda.current_stream(device), torch.cuda.Stream(device)
    side.wait_stream(here)
    with torch.cuda.stream(side):  # around the capture too, which does not restore the stream when it fails
        for _ in range(3):  # compiles kernels and makes workspaces, which must not happen within a capture
            run()
        with torch.cuda.graph(graph, stream=side):
            results = run()
    here.wait_stream(side)
    return results, graph.replay


def other_streams(device: torch.device) -> dict[str, Any]:
    """Losses run on the current stream, after what is queued there, and on two streams at once without disturbing each other."""

    def check(work: Work) -> None:
        want, values = work.run(), [x.detach().clone() for x in work.inputs]
        first, second = torch.cuda.Stream(device), torch.cuda.Stream(device)
        refill(work)
        torch.cuda.synchronize(device)
        with torch.cuda.stream(first):
            torch.cuda._sleep(20_000_000)  # cycles: a kernel on any other stream would read before the inputs are there
            for x, value in zip(work.inputs, values):
                x.detach().copy_(value)
            late = work.run()
        torch.cuda.synchronize(device)
        compare(late, want, "another stream and the default one")
        results = []
        for _ in range(REPEATS):
            for stream in (first, second):
                with torch.cuda.stream(stream):
                    results.append(work.run())
        torch.cuda.synchronize(device)
        for result in results:
            compare(result, want, "two streams at once and one alone")

    return check_each(losses(device), check)


def other_device(device: torch.device) -> dict[str, Any]:
    """Losses run on the device of their tensors, whichever is current."""
    if torch.cuda.device_count() < 2:
        raise NotAvailable("there is one GPU only")

    def check(work: Work) -> None:
        with torch.cuda.device(0):
            got = work.run()
        with torch.cuda.device(1):
            compare(got, work.run(), "with another device current and with its own")

    return check_each(losses(torch.device("cuda", 1)), check)


def compiled(device: torch.device) -> dict[str, Any]:
    """The first call of every loss compiles without a graph break, and compiled equals eager."""

    def check(work: Work) -> None:
        inputs = work.call.inputs(0)
        leaves = [x for x in inputs if isinstance(x, Tensor) and x.requires_grad]
        assert work.call.loss is not None
        results = []
        for loss in (work.call.loss, torch.compile(work.call.loss, fullgraph=True)):
            value = loss(*inputs)
            results.append([value.detach(), *torch.autograd.grad(value, leaves)])
        compare(results[1], results[0], "compiled and eager")

    first = {name.partition(":")[0]: work for name, work in reversed(losses(device).items())}
    return check_each(first, check)


def lion_graph(device: torch.device) -> dict[str, Any]:
    """A whole training step with Lion can be captured; replays follow new inputs and a changing rate as eager steps do."""
    for options in ({}, {"max_grad_norm": 0.5, "cautious": True}, {"momentum_dtype": torch.int8}):
        _check_lion_graph(device, options)
    return {}


def _check_lion_graph(device: torch.device, options: Mapping[str, Any]) -> None:
    torch.manual_seed(0)
    nets = [nn.Sequential(nn.Linear(70, 90), nn.Tanh(), nn.Linear(90, 5)).to(device) for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    rates = [torch.tensor(1e-3, device=device) for _ in nets]
    optimizers = [Lion(net.parameters(), lr=rate, weight_decay=0.1, capturable=True, **options) for net, rate in zip(nets, rates)]
    x = torch.randn(64, 70, device=device)

    def train(i: int) -> None:
        optimizers[i].zero_grad(set_to_none=True)
        nets[i](x).square().mean().backward()
        optimizers[i].step()

    _, replay = capture(lambda: train(0), device)
    for _ in range(3):  # as often as the capture has warmed up
        train(1)
    for step in range(5):
        x.copy_(torch.randn_like(x))
        for rate in rates:
            rate.fill_(1e-3 / (step + 1))
        torch.empty(1 << 16, dtype=torch.int64).pin_memory().zero_()  # overwrites pinned memory that an upload has given back too early
        replay()
        train(1)
        compare([p.detach() for p in nets[0].parameters()], [p.detach() for p in nets[1].parameters()], "the replay and eager steps")


CONTRACTS: Mapping[str, Callable[[torch.device], dict[str, Any]]] = {
    promise.__name__: promise
    for promise in (same_bits, no_waiting, few_launches, cuda_graph, other_streams, other_device, compiled, lion_graph)
}


# ---- tools -----------------------------------------------------------------------------------------------------------


def check_each(all_works: Mapping[str, Work], check: Callable[[Work], None]) -> dict[str, Any]:
    """Checks every work, and only then raises Broken for those that failed."""
    broken = []
    for name, work in all_works.items():
        try:
            check(work)
        except Exception as error:
            broken.append(f"{name}: {' '.join(str(error).split())[:300]}")
    if broken:
        raise Broken("; ".join(broken))
    return {"kept_by": len(all_works)}


def refill(work: Work) -> None:
    """Writes other values into the floating inputs, in place."""
    for x in work.inputs:
        if x.is_floating_point():
            x.detach().copy_(torch.randn(x.shape, device=x.device))


def compare(got: Any, want: Any, names: str) -> None:
    """Raises Broken where two lists of results differ by more than rounding."""
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, msg=lambda message: f"{names} differ: {message}")


def judge(contract: Callable[[torch.device], dict[str, Any]], device: torch.device) -> dict[str, Any]:
    """{"status": "passed", "failed" or "not available", and what was seen or why}."""
    try:
        return {"status": "passed"} | contract(device)
    except NotAvailable as reason:
        return {"status": "not available", "why": str(reason)}
    except Exception as error:
        return {"status": "failed", "why": f"{type(error).__name__}: {error}"}


def main() -> None:
    """Checks the named promise on the first GPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=CONTRACTS)
    result = judge(CONTRACTS[parser.parse_args().name], torch.device("cuda", 0))
    print(json.dumps(result))
    sys.exit({"passed": 0, "failed": 1, "not available": NOT_AVAILABLE}[result["status"]])


if __name__ == "__main__":
    main()
