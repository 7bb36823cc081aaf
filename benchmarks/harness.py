"""The harness of all operators: a case is data; measure() runs its variants in turn, checks each against float64 and times it.

For every variant that runs here:

    call_ms       what the caller waits for, forward and backward (Lion: one step), in eager mode; median of rounds in turn
    speedup       its time over ours, median over rounds: above 1, ours is faster
    memory        most bytes live at once, beyond the inputs
    value_error, gradient_error     max|x - exact| / max|exact| (Lion: of the momentum and of the parameters' change)
    device_ms     on a GPU: without the host, a CUDA graph of calls that go round sets of buffers
    cold_ms       on a GPU: a single call on an emptied cache
    launches      on a GPU: kernels of a call
    floor_share   floor_ms / device_ms, on the CPU floor_ms / call_ms

A variant that is not installed, cannot run here or computes something else has only `skipped`, the reason. A variant that is meant to
compute something else (Variant.other) is timed, and has neither errors nor a share of the floor.
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
WRONG = {torch.float32: 1e-3, torch.bfloat16: 0.25, torch.float16: 0.05}  # an error beyond this is another formula, not rounding
MOST_SETS = 64  # of buffers


class Step(NamedTuple):
    """A variant on one set of inputs.

    Attributes:
        run: the timed call.
        results: makes a call on untouched inputs and returns the value, then the gradients.
    """

    run: Callable[[], Any]
    results: Callable[[], Sequence[Tensor]]


@dataclass(frozen=True)
class Variant:
    """A way to compute a case.

    Attributes:
        prepare: imports and compiles what it needs; what it returns makes a Step of a set of inputs.
        gpu: runs on a GPU only.
        synchronizes: makes the host wait, so that no CUDA graph can capture it.
        own_graphs: replays CUDA graphs of its own: no other can capture it, and its memory is reserved for good.
        other: computes something else, and is timed for orientation without errors.
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
        inputs: seed -> fresh random inputs, which no variant writes to.
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


class Call(NamedTuple):
    """A small call of an operator, at odd sizes: checked in the interpreter and on GPUs, watched by sanitizers.

    Attributes:
        name: what is special about it.
        inputs: seed -> fresh random inputs.
        step: inputs -> a Step.
        exact: inputs -> what Step.results should give, in float64; None where the result is random or coarse.
        launches: most kernels that Step.run may launch, the one that fills the upstream gradient included; None: no promise.
        loss: for torch.compile; None for an optimizer.
    """

    name: str
    inputs: Callable[[int], Sequence[Any]]
    step: Callable[..., Step]
    exact: Callable[..., Sequence[Tensor]] | None
    launches: int | None = None
    loss: Callable[..., Tensor] | None = None


class Launch(NamedTuple):
    """One kernel launch whose machine code is read (codegen.py); the launcher is called on CPU tensors and nothing runs.

    Attributes:
        kernel: file in kernels/.
        N, C: rows, and classes or features; for Lion 1 and elements.
        dtypes: as the table names them.
        variant: what is asked of the kernel.
        call: calls the launcher.
        moved: bytes of the [N, C] tensors that loads and stores ask for; operations for a walk over an N x N matrix.
        floor: the least that any kernel could move.
        function: the kernel that is meant, where the launcher launches several.
        wide: 128-bit loads and stores that there must be, for a kernel that looks its tensors up in a table.
    """

    kernel: str
    N: int
    C: int
    dtypes: str
    variant: str
    call: Callable[[], Any]
    moved: int
    floor: int
    function: str | None = None
    wide: tuple[int, int] = (0, 0)


# ---- variants --------------------------------------------------------------------------------------------------------


def in_float64(loss: Callable[..., Tensor]) -> Callable[..., Sequence[Tensor]]:
    """Makes the exact results of a loss: its value and gradients on float64 copies of the inputs."""

    def widen(x: Any) -> Any:
        is_floating = isinstance(x, Tensor) and x.is_floating_point()
        return x.detach().double().requires_grad_(x.requires_grad) if is_floating else x

    return lambda *inputs: loss_step(loss)(*map(widen, inputs)).results()


def loss_call(
    name: str,
    inputs: Callable[[int], Sequence[Any]],
    loss: Callable[..., Tensor],
    exact: Callable[..., Tensor],
    launches: int | None = None,
) -> Call:
    """A Call of a loss; `exact` is the reference, with the same arguments."""
    return Call(name, inputs, loss_step(loss), in_float64(exact), launches, loss)


def loss_step(loss: Callable[..., Tensor]) -> Callable[..., Step]:
    """Makes Steps of a loss function: its value, and its gradient in every input that requires one."""

    def make(*inputs: Any) -> Step:
        leaves = [x for x in inputs if isinstance(x, Tensor) and x.requires_grad]

        def run() -> Sequence[Tensor]:
            value = loss(*inputs)
            return value.detach(), *torch.autograd.grad(value, leaves)

        return Step(run, run)

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
    floor_ms = 1e3 * floor_seconds(case)

    rows: dict[str, dict[str, Any]] = {}
    steps: dict[str, Step] = {}
    inputs = case.inputs(0)
    exact = case.exact(*inputs)
    for name, variant in case.variants.items():
        if only is None or name in only:
            step, rows[name] = _check(case, name, variant, inputs, exact)
            if step is not None:
                steps[name] = step
    del exact

    seconds = timing.in_turn({name: step.run for name, step in steps.items()}, rounds=rounds, device=device)
    for name, step in steps.items():
        row, variant = rows[name], case.variants[name]
        row["call_ms"] = _round(1e3 * statistics.median(seconds[name]))
        row["speedup"] = _round(timing.speedup(seconds[OURS], seconds[name]))
        if not variant.own_graphs:
            row["memory"] = timing.peak_memory(step.run, device)
        if gpu and not (variant.own_graphs or variant.synchronizes):
            row |= time_on_device(case, variant, rounds)
        time_ms = row.get("device_ms") if gpu else row["call_ms"]
        if time_ms is not None and not variant.other:
            row["floor_share"] = _round(floor_ms / time_ms)
    return {
        "operator": case.operator,
        "case": case.name,
        "shape": case.shape,
        "dtype": dtype_name(case.dtype),
        "device": device.type,
        "bytes": case.bytes,
        "operations": case.operations,
        "copy_bytes_per_s": _round(timing.copy_bandwidth(device)),
        "dense_operations_per_s": _round(timing.dense_rate(device, case.dtype)),
        "floor_ms": _round(floor_ms),
        "variants": rows,
    }


def floor_seconds(case: Case) -> float:
    """The least time of any version: all bytes copied, or all operations made, at the rates that this machine reaches."""
    return max(case.bytes / timing.copy_bandwidth(case.device), case.operations / timing.dense_rate(case.device, case.dtype))


def _check(case: Case, name: str, variant: Variant, inputs: Sequence[Any], exact: Sequence[Tensor]) -> tuple[Step | None, dict[str, Any]]:
    """Returns a variant's Step on these inputs and its errors, or None and why it is skipped. Ours is never skipped: it raises."""
    if variant.gpu and case.device.type != "cuda":
        return None, {"skipped": "needs a GPU"}
    try:
        step = variant.prepare()(*inputs)
        results = step.results()
        if variant.other:
            return step, {}
        errors = [error(got, want) for got, want in zip(results, exact, strict=True)]
    except Exception as failure:  # whatever a peer may raise
        if name == OURS:
            raise
        if isinstance(failure, ImportError):
            return None, {"skipped": f"{failure.name} is not installed"}
        return None, {"skipped": f"{type(failure).__name__}: {_first_line(failure)}"}
    if all(e <= WRONG[case.dtype] for e in errors):
        return step, {"value_error": _round(errors[0]), "gradient_error": _round(max(errors[1:]))}
    sentence = f"computes something else: value and gradients are off by {', '.join(f'{e:.1e}' for e in errors)}"
    if name == OURS:
        raise AssertionError(f"{case}: {name} {sentence}")
    return None, {"skipped": sentence}


def time_on_device(case: Case, variant: Variant, rounds: int) -> dict[str, Any]:
    """Device times and number of launches, or why there are none."""
    # all sets together exceed the cache three times, as far as MOST_SETS of them can
    sets = min(MOST_SETS, math.ceil(3 * timing.cache_bytes() / case.bytes))
    try:
        make = variant.prepare()
        runs = [make(*case.inputs(seed)).run for seed in range(sets)]
        return {
            "device_ms": _round(1e3 * timing.device_seconds(runs, rounds=rounds)),
            "cold_ms": _round(1e3 * timing.cold_seconds(runs[0], rounds=rounds)),
            "launches": timing.launches(runs[0]).total(),
        }
    except RuntimeError as failure:
        return {"device_skipped": _first_line(failure)}


def _first_line(failure: Exception) -> str:
    return str(failure).strip().partition("\n")[0][:120]


def error(got: Tensor, exact: Tensor) -> float:
    """max|got - exact| / max|exact|; infinite where a shape differs, NaN where `got` holds one."""
    if got.shape != exact.shape:
        return math.inf
    return ((got.double() - exact).abs().max() / exact.abs().max()).item()


def _round(x: float) -> float:
    """Rounds to four digits: more are noise, and would change with every run."""
    return float(f"{x:.4g}")


def dtype_name(dtype: torch.dtype) -> str:
    """torch.float32 -> "float32"."""
    return str(dtype).removeprefix("torch.")


def short_names(*dtypes: torch.dtype) -> str:
    """(torch.float32, torch.bfloat16) -> "fp32 bf16"; equal ones once."""
    short = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int8: "int8"}
    return " ".join(dict.fromkeys(short[dtype] for dtype in dtypes))
