"""One harness for all operators: a case is data, and measure() runs its variants in turn, checks each against float64 and times it.

For every variant that runs here:

    call_ms       what the caller waits for, forward and backward (Lion: one step), in eager mode; median of rounds in turn
    speedup       its time over ours, median over rounds: above 1, ours is faster
    backward_ms   the backward pass by itself
    memory        most bytes live at once, beyond the inputs
    value_error, gradient_error     max|x - exact| / max|exact| (Lion: of the momentum and of the parameters' change)
    device_ms     on a GPU: without the host, a CUDA graph of calls that go round sets of buffers
    cold_ms       on a GPU: a single call on an emptied cache
    launches      on a GPU: kernels of a call
    floor_share   floor_ms / device_ms, on the CPU floor_ms / call_ms

A variant that is not installed, cannot run here or computes something else has `skipped`, the reason, instead. One that is meant to compute
something else (Variant.other) is timed, and has neither errors nor a share of a floor that is not its own.
"""

import gc
import math
import statistics
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from kdfast.benchmarks import timing

OURS, EAGER, COMPILED, AUTOTUNED = "kdfast", "eager", "torch.compile", "torch.compile max-autotune"
TIERS = ("quick", "usual", "long")
WRONG = {torch.float32: 1e-3, torch.bfloat16: 0.25}  # an error beyond this is another formula, not rounding
MOST_SETS = 64  # of buffers


class Step(NamedTuple):
    """A variant on one set of inputs.

    Attributes:
        run: a call, as it is timed.
        results: a call on untouched inputs, and what it computed: the value, then gradients.
        backward: runs the forward pass and returns the backward pass; None where there is none.
    """

    run: Callable[[], Any]
    results: Callable[[], Sequence[Tensor]]
    backward: Callable[[], Callable[[], Any]] | None = None


@dataclass(frozen=True)
class Variant:
    """A way to compute a case.

    Attributes:
        prepare: imports and compiles what it needs; what it returns makes a Step of a set of inputs.
        gpu: runs on a GPU only.
        synchronizes: makes the host wait, so that no CUDA graph can capture it.
        own_graphs: replays CUDA graphs of its own: no other can capture it, and its memory is reserved for good.
        other: computes something else and is timed for orientation: its errors are not measured.
    """

    prepare: Callable[[], Callable[..., Step]]
    gpu: bool = False
    synchronizes: bool = False
    own_graphs: bool = False
    other: bool = False


@dataclass(frozen=True, repr=False)
class Case:
    """An operator at one size.

    Attributes:
        operator: as the tables call it.
        name: the size, as the tables call it.
        shape: the size in numbers.
        dtype: of the floating inputs.
        device: where they are.
        bytes: the floor, what any version has to move.
        operations: floating-point operations; a multiply-add is two.
        inputs: seed -> fresh random inputs, which nobody writes to.
        exact: inputs -> what Step.results should give, in float64.
        variants: by name.
        tier: "quick", "usual" or "long", by how long it takes.
    """

    operator: str
    name: str
    shape: dict[str, int]
    dtype: torch.dtype
    device: torch.device
    bytes: int
    operations: int
    inputs: Callable[[int], Sequence[Any]]
    exact: Callable[..., Sequence[Tensor]]
    variants: Mapping[str, Variant]
    tier: Literal["quick", "usual", "long"] = "usual"

    def __repr__(self) -> str:
        return f"{self.operator} {self.name} {dtype_name(self.dtype)}"

    def step(self, variant: str) -> Step:
        """One variant, ready to run."""
        return self.variants[variant].prepare()(*self.inputs(0))


class Skipped(Exception):
    """A variant cannot be compared here; the message says why."""


# ---- variants --------------------------------------------------------------------------------------------------------


def loss_step(loss: Callable[..., Tensor]) -> Callable[..., Step]:
    """Makes Steps of a loss function: its value, and its gradient in every input that requires one."""

    def make(*inputs: Any) -> Step:
        leaves = [x for x in inputs if isinstance(x, Tensor) and x.requires_grad]

        def forward() -> Callable[[], Any]:
            value = loss(*inputs)
            return lambda: torch.autograd.grad(value, leaves)

        def run() -> Sequence[Tensor]:
            value = loss(*inputs)
            return value.detach(), *torch.autograd.grad(value, leaves)

        return Step(run, run, forward)

    return make


def loss_variants(
    original: Callable[..., Tensor], ours: Callable[..., Tensor], peers: Mapping[str, Variant] | None = None
) -> dict[str, Variant]:
    """The original in eager mode and compiled, its peers, and ours."""

    def autotuned() -> Callable[..., Step]:
        compiled = torch.compile(original, mode="max-autotune")

        def loss(*inputs: Any) -> Tensor:
            torch.compiler.cudagraph_mark_step_begin()  # the last call's results may be overwritten
            return compiled(*inputs)

        return loss_step(loss)

    return {
        EAGER: Variant(lambda: loss_step(original)),
        COMPILED: Variant(lambda: loss_step(torch.compile(original))),
        AUTOTUNED: Variant(autotuned, gpu=True, own_graphs=True),
        **(peers or {}),
        OURS: Variant(lambda: loss_step(ours)),
    }


# ---- measurement -----------------------------------------------------------------------------------------------------


def measure(case: Case, *, only: Collection[str] | None = None, rounds: int = 20) -> dict[str, Any]:
    """Checks and times the variants of a case.

    Args:
        case: what to measure.
        only: names of variants; None: all. Ours has to be among them.
        rounds: how often each is timed.

    Returns:
        The case, the ceilings measured here, and `variants`: for each its numbers, see the module's docstring.

    Raises:
        AssertionError: our own result is wrong.
        torch.OutOfMemoryError: the case does not fit on the GPU.
    """
    device, gpu = case.device, case.device.type == "cuda"
    torch._dynamo.reset()  # every case is compiled for its own shape
    gc.collect()
    if gpu:
        torch.cuda.empty_cache()
    bandwidth, rate = timing.copy_bandwidth(device), timing.dense_rate(device, case.dtype)
    floor = max(case.bytes / bandwidth, case.operations / rate)

    rows: dict[str, dict[str, Any]] = {}
    makers: dict[str, Callable[..., Step]] = {}
    steps: dict[str, Step] = {}
    inputs = case.inputs(0)
    exact = case.exact(*inputs)
    for name in case.variants:
        if only is None or name in only:
            try:
                makers[name], steps[name], rows[name] = _checked(case, name, inputs, exact)
            except Skipped as reason:
                rows[name] = {"skipped": str(reason)}
    del exact

    seconds = timing.in_turn({name: step.run for name, step in steps.items()}, rounds=rounds, device=device)
    for name, step in steps.items():
        row, variant = rows[name], case.variants[name]
        row["call_ms"] = _short(1e3 * statistics.median(seconds[name]))
        row["speedup"] = _short(timing.speedup(seconds[OURS], seconds[name]))
        if step.backward is not None:
            row["backward_ms"] = _short(1e3 * timing.backward_seconds(step.backward, rounds=rounds, device=device))
        if not variant.own_graphs:
            row["memory"] = timing.peak_memory(step.run, device)
        if gpu and not (variant.own_graphs or variant.synchronizes):
            row |= _on_device(case, makers[name], step, rounds)
        time_ms = row.get("device_ms") if gpu else row["call_ms"]
        if time_ms is not None and not variant.other:
            row["floor_share"] = _short(1e3 * floor / time_ms)
    return {
        "operator": case.operator,
        "case": case.name,
        "shape": case.shape,
        "dtype": dtype_name(case.dtype),
        "device": device.type,
        "bytes": case.bytes,
        "operations": case.operations,
        "copy_bytes_per_s": _short(bandwidth),
        "dense_operations_per_s": _short(rate),
        "floor_ms": _short(1e3 * floor),
        "variants": rows,
    }


def _checked(case: Case, name: str, inputs: Sequence[Any], exact: Sequence[Tensor]) -> tuple[Callable[..., Step], Step, dict[str, Any]]:
    """What makes the variant's Steps, the one on these inputs, and its errors; ours fails loudly, others are Skipped."""
    variant = case.variants[name]
    if variant.gpu and case.device.type != "cuda":
        raise Skipped("needs a GPU")
    try:
        make = variant.prepare()
        step = make(*inputs)
        results = step.results()
        if variant.other:
            return make, step, {}
        errors = [error(got, want) for got, want in zip(results, exact, strict=True)]
    except Exception as failure:  # whatever a peer may raise
        if name == OURS:
            raise
        if isinstance(failure, ImportError):
            raise Skipped(f"{failure.name} is not installed") from None
        raise Skipped(f"{type(failure).__name__}: {str(failure).strip().partition(chr(10))[0][:120]}") from failure
    if not all(e <= WRONG[case.dtype] for e in errors):
        sentence = f"computes something else: value and gradients are off by {', '.join(f'{e:.1e}' for e in errors)}"
        if name == OURS:
            raise AssertionError(f"{case}: {name} {sentence}")
        raise Skipped(sentence)
    return make, step, {"value_error": _short(errors[0]), "gradient_error": _short(max(errors[1:]))}


def _on_device(case: Case, make: Callable[..., Step], step: Step, rounds: int) -> dict[str, Any]:
    """Device times, or why there are none."""
    # together far larger than the cache, or as near to that as small cases come
    sets = min(MOST_SETS, math.ceil(3 * timing.cache_bytes() / case.bytes))
    try:
        runs = [step.run, *(make(*case.inputs(seed)).run for seed in range(1, sets))]
        return {
            "device_ms": _short(1e3 * timing.device_seconds(runs, rounds=rounds)),
            "cold_ms": _short(1e3 * timing.cold_seconds(step.run, rounds=rounds)),
            "launches": timing.launches(step.run).total(),
        }
    except RuntimeError as failure:
        return {"device_skipped": str(failure).strip().partition("\n")[0][:120]}


def error(got: Tensor, exact: Tensor) -> float:
    """max|got - exact| / max|exact|; infinite where a shape differs, NaN where `got` holds one."""
    if got.shape != exact.shape:
        return math.inf
    return ((got.double() - exact).abs().max() / exact.abs().max()).item()


def _short(x: float) -> float:
    """Four digits: more are noise, and would change with every run."""
    return float(f"{x:.4g}")


def dtype_name(dtype: torch.dtype) -> str:
    """torch.float32 -> "float32"."""
    return str(dtype).removeprefix("torch.")
