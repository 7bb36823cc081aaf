"""Promises of the losses and of Lion that only a GPU can show, one function a promise: python -m kdfast.benchmarks.maintain.contracts NAME

Prints one line of JSON, {"status", "why" or what was seen}, and leaves with status 1 where the promise is broken. A process keeps to
one promise, since a kernel that goes wrong takes its whole process along. kdfast.benchmarks.maintain.gpu runs them all.
"""

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kdfast import functional
from kdfast.benchmarks.timing import launches
from kdfast.optim import Lion

LAUNCHES = 2  # of logit distillation with C <= 1000, forward and backward together
REPEATS = 8


class Broken(Exception):
    """A promise is not kept."""


class NotAvailable(Exception):
    """This machine cannot show it."""


class Work(NamedTuple):
    """A forward and backward pass of a loss on fixed tensors.

    Attributes:
        inputs: floating tensors that it reads; they may be filled with other values.
        run: computes the loss and its gradients.
    """

    inputs: list[Tensor]
    run: Callable[[], list[Tensor]]


def works(device: torch.device) -> dict[str, Work]:
    """Every loss of kdfast.functional, by name and case; kd_loss in each of its kernel's regimes."""
    torch.manual_seed(0)

    def leaf(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, device=device).to(dtype).requires_grad_()

    def work(loss: Callable[..., Tensor], *inputs: Tensor) -> Work:
        one = torch.ones((), device=device)  # given to backward, which would fill one of its own with a launch of its own

        def run() -> list[Tensor]:
            value = loss(*inputs)
            return [value.detach(), *torch.autograd.grad(value, inputs[:1], one)]

        return Work(list(inputs), run)

    def kd(N: int, C: int, teachers: int = 1, dtype: torch.dtype = torch.float32, **options: Any) -> Work:
        logits = [leaf(N, C, dtype=dtype), *(leaf(N, C, dtype=dtype).detach() for _ in range(teachers))]
        labels = torch.randint(C, (N,), device=device)
        labels[::7] = -100
        return work(lambda student, *rest: functional.kd_loss(student, rest, labels, **options), *logits)

    both = {"standardize": True, "ce_weight": 0.1}
    features = nn.functional.normalize(torch.randn(33, 2, 64, device=device), dim=2).requires_grad_()
    classes = torch.randint(5, (33,), device=device)
    banks = [nn.functional.normalize(torch.randn(500, 64, device=device), dim=1) for _ in range(2)]
    indices = torch.randint(500, (33, 701), device=device)
    return {
        "kd_loss 257 x 10": kd(257, 10),
        "kd_loss 256 x 100, five teachers": kd(256, 100, teachers=5, **both),
        "kd_loss 1024 x 1000": kd(1024, 1000, **both),
        "kd_loss 1024 x 1000, bfloat16": kd(1024, 1000, dtype=torch.bfloat16, **both),
        "kd_loss 33 x 1001, float16": kd(33, 1001, dtype=torch.float16, **both),
        "kd_loss 300 x 8192": kd(300, 8192, divergence="js"),
        "kd_loss 300 x 32003": kd(300, 32003, **both),
        "linear_kd_loss": work(
            lambda *layers: functional.linear_kd_loss(*layers, chunk_rows=20, standardize=True),
            leaf(50, 16),
            *(leaf(*shape).detach() for shape in ((1001, 16), (50, 24), (1001, 24))),
        ),
        "supcon_loss": work(lambda f: functional.supcon_loss(f, classes), features),
        "crd_loss": work(lambda s, t: functional.crd_loss(s, t, *banks, indices), leaf(33, 64), leaf(33, 64).detach()),
        "attention_transfer_loss": work(functional.attention_transfer_loss, leaf(4, 16, 9, 9), leaf(4, 32, 9, 9).detach()),
        "hint_loss": work(functional.hint_loss, leaf(4, 16, 9, 9), leaf(4, 16, 9, 9).detach()),
        "soft_cross_entropy": work(functional.soft_cross_entropy, leaf(33, 100), leaf(33, 100).detach()),
    }


# ---- the promises ----------------------------------------------------------------------------------------------------


def cuda_graph(device: torch.device) -> dict[str, Any]:
    """Every loss can be captured, and a replay on new inputs gives what eager mode gives."""

    def check(work: Work) -> None:
        results, replay = captured(work, device)
        for _ in range(2):
            refill(work)
            replay()
            close(results, work.run(), "the replay and eager mode")

    return of_each(works(device), check)


def captured(work: Work, device: torch.device) -> tuple[list[Tensor], Callable[[], None]]:
    """The results' tensors, and what computes them anew: a CUDA graph."""
    graph, here, side = torch.cuda.CUDAGraph(), torch.cuda.current_stream(device), torch.cuda.Stream(device)
    side.wait_stream(here)
    with torch.cuda.stream(side):  # around the capture too, which does not restore the stream when it fails
        for _ in range(3):  # compiles kernels and makes workspaces, which must not happen within a capture
            work.run()
        with torch.cuda.graph(graph, stream=side):
            results = work.run()
    here.wait_stream(side)
    return results, graph.replay


def no_waiting(device: torch.device) -> dict[str, Any]:
    """Neither a loss, forward and backward, nor a Lion step makes the host wait for the device."""

    def lion(**options: Any) -> Work:
        params = [nn.Parameter(torch.randn(shape, device=device)) for shape in ((300, 70), (70,), (1,))]
        for p in params:
            p.grad = torch.randn_like(p)
        optimizer = Lion(params, lr=1e-4, weight_decay=0.1, **options)

        def run() -> list[Tensor]:
            optimizer.step()
            return [p.detach() for p in params]

        return Work([], run)

    def check(work: Work) -> None:
        work.run()  # the first may compile
        torch.cuda.synchronize(device)
        torch.cuda.set_sync_debug_mode("error")
        try:
            work.run()
        finally:
            torch.cuda.set_sync_debug_mode("default")

    return of_each(works(device) | {"Lion": lion(), "Lion, clipping": lion(max_grad_norm=1.0)}, check)


def few_launches(device: torch.device) -> dict[str, Any]:
    """Logit distillation with C <= 1000 costs two kernel launches at most, forward and backward together."""
    seen = {}
    for name, work in works(device).items():
        if not name.startswith("kd_loss") or work.inputs[0].shape[-1] > 1000:
            continue
        work.run()
        seen[name] = kernels_of(work.run, device)
    judge_launches(seen)
    return {"kernels": seen}


def kernels_of(run: Callable[[], Any], device: torch.device) -> dict[str, float]:
    """How often each kernel runs in a call, on average."""
    return {kernel: count / REPEATS for kernel, count in launches(run, device, REPEATS).items()}


def judge_launches(seen: Mapping[str, Mapping[str, float]]) -> None:
    """Raises Broken where a case launched more than LAUNCHES kernels a step, or the profiler saw none."""
    if not seen or not all(seen.values()):
        raise Broken(f"the profiler saw no kernels of {', '.join(name for name, of in seen.items() if not of) or 'any loss'}")
    wrong = {name: of for name, of in seen.items() if sum(of.values()) > LAUNCHES}
    if wrong:
        raise Broken(f"more than {LAUNCHES} launches a step: {json.dumps(wrong)}")


def few_launches_of_attention(device: torch.device) -> dict[str, Any]:
    """Attention transfer costs four kernel launches a stage and one more at most, forward and backward together."""
    seen = {}
    for stages in (1, 3):
        students = [torch.randn(4, 16, 9, 7, device=device).requires_grad_() for _ in range(stages)]
        teachers = [torch.randn(4, 32, 9, 7, device=device) for _ in range(stages)]
        one = torch.ones((), device=device)

        def run(students: list[Tensor] = students, teachers: list[Tensor] = teachers, one: Tensor = one) -> None:
            torch.autograd.grad(functional.attention_transfer_loss(students, teachers), students, one)

        run()
        seen[stages] = kernels_of(run, device)
    if any(not 0 < sum(of.values()) <= 4 * stages + 1 for stages, of in seen.items()):
        raise Broken(f"not four launches a stage and one: {json.dumps(seen)}")
    return {"kernels": seen}


def lion_is_one_launch(device: torch.device) -> dict[str, Any]:
    """A Lion step of many parameters is one kernel, with a rate on the device too."""
    seen = {}
    for name, lr in {"a number": 1e-4, "on the device": torch.tensor(1e-4, device=device)}.items():
        params = [nn.Parameter(torch.randn(n, 7, device=device)) for n in range(1, 400, 3)]
        for p in params:
            p.grad = torch.randn_like(p)
        optimizer = Lion(params, lr=lr, weight_decay=0.1)
        optimizer.step()
        seen[name] = kernels_of(optimizer.step, device)
    if any(sum(of.values()) != 1 for of in seen.values()):
        raise Broken(f"not one launch a step: {json.dumps(seen)}")
    return {"kernels": seen}


def lion_graph(device: torch.device) -> dict[str, Any]:
    """A whole training step with Lion can be captured; replays follow new inputs and a changing rate as eager steps do."""
    for options in ({}, {"max_grad_norm": 0.5, "cautious": True}, {"momentum_dtype": torch.int8}):
        _one_lion_graph(device, options)
    return {}


def _one_lion_graph(device: torch.device, options: Mapping[str, Any]) -> None:
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

    graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for _ in range(3):
            train(0)
            train(1)
        optimizers[0].zero_grad(set_to_none=True)
        with torch.cuda.graph(graph, stream=side):
            train(0)
    torch.cuda.current_stream(device).wait_stream(side)
    for step in range(5):
        x.copy_(torch.randn_like(x))
        for rate in rates:
            rate.fill_(1e-3 / (step + 1))
        torch.empty(1 << 16, dtype=torch.int64).pin_memory().zero_()  # what an upload had left to others would be overwritten
        graph.replay()
        train(1)
        close([p.detach() for p in nets[0].parameters()], [p.detach() for p in nets[1].parameters()], "the replay and eager steps")


def same_bits(device: torch.device) -> dict[str, Any]:
    """Logit distillation gives the same bits in every run."""

    def check(work: Work) -> None:
        first = work.run()
        for _ in range(REPEATS):
            for a, b in zip(first, work.run()):
                if not torch.equal(a, b):
                    raise Broken("two runs on the same inputs differ")

    return of_each(_logit_distillation(device), check)


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
        close(late, want, "another stream and the default one")
        results = []
        for _ in range(REPEATS):
            for stream in (first, second):
                with torch.cuda.stream(stream):
                    results.append(work.run())
        torch.cuda.synchronize(device)
        for result in results:
            close(result, want, "two streams at once and one alone")

    return of_each(works(device), check)


def other_device(device: torch.device) -> dict[str, Any]:
    """Losses run on the device of their tensors, whichever is current."""
    if torch.cuda.device_count() < 2:
        raise NotAvailable("there is one GPU only")

    def check(work: Work) -> None:
        with torch.cuda.device(0):
            got = work.run()
        with torch.cuda.device(1):
            close(got, work.run(), "with another device current and with its own")

    return of_each(works(torch.device("cuda", 1)), check)


def compiled(device: torch.device) -> dict[str, Any]:
    """Logit distillation compiles without a graph break, and compiled equals eager."""

    def check(work: Work) -> None:
        student, *teachers = work.inputs

        def loss(student: Tensor, *teachers: Tensor) -> Tensor:
            return functional.kd_loss(student * 1, teachers, standardize=True)

        results = []
        for function in (loss, torch.compile(loss, fullgraph=True)):
            value = function(student, *teachers)
            results.append([value.detach(), *torch.autograd.grad(value, student)])
        close(results[1], results[0], "compiled and eager")

    cases = _logit_distillation(device)
    return of_each({name: cases[name] for name in ("kd_loss 257 x 10", "kd_loss 33 x 1001, float16", "kd_loss 300 x 32003")}, check)


CONTRACTS: Mapping[str, Callable[[torch.device], dict[str, Any]]] = {
    "same_bits": same_bits,
    "no_waiting": no_waiting,
    "few_launches": few_launches,
    "cuda_graph": cuda_graph,
    "other_streams": other_streams,
    "other_device": other_device,
    "compiled": compiled,
    "few_launches_of_attention": few_launches_of_attention,
    "lion_is_one_launch": lion_is_one_launch,
    "lion_graph": lion_graph,
}


# ---- tools -----------------------------------------------------------------------------------------------------------


def _logit_distillation(device: torch.device) -> dict[str, Work]:
    return {name: work for name, work in works(device).items() if name.startswith("kd_loss")}


def of_each(all_works: Mapping[str, Work], check: Callable[[Work], None]) -> dict[str, Any]:
    """Checks every work, and only then raises Broken for those that failed."""
    broken = []
    for name, work in all_works.items():
        try:
            check(work)
        except NotAvailable:
            raise
        except Exception as error:
            broken.append(f"{name}: {' '.join(str(error).split())[:300]}")
    if broken:
        raise Broken("; ".join(broken))
    return {"kept_by": list(all_works)}


def refill(work: Work) -> None:
    """Other values into the inputs, in place."""
    for x in work.inputs:
        x.detach().copy_(torch.randn(x.shape, device=x.device))


def close(got: list[Tensor], want: list[Tensor], what: str) -> None:
    """Raises Broken where two lists of results differ by more than rounding."""
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, msg=lambda message: f"{what} differ: {message}")


def verdict(contract: Callable[[torch.device], dict[str, Any]], device: torch.device) -> dict[str, Any]:
    """{"status": "passed", "failed" or "not available", and why, or what was seen}."""
    try:
        return {"status": "passed"} | contract(device)
    except NotAvailable as reason:
        return {"status": "not available", "why": str(reason)}
    except Exception as error:
        return {"status": "failed", "why": f"{type(error).__name__}: {error}"}


def main() -> None:
    """Checks the promise that the command line names, on the first GPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=CONTRACTS)
    result = verdict(CONTRACTS[parser.parse_args().name], torch.device("cuda", 0))
    print(json.dumps(result))
    sys.exit(result["status"] == "failed")


if __name__ == "__main__":
    main()
