"""Timing on a noisy machine: callables run in turn and are compared round by round; device time; peak memory."""

import math
import os
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from itertools import accumulate
from typing import Any

import torch
from torch.autograd import DeviceType

CPU = torch.device("cpu")

# ---- as the caller sees it -------------------------------------------------------------------------------------------


def _once(function: Callable[[], Any], calls: int, device: torch.device = CPU) -> float:
    """Seconds a call, until the device is done."""
    start = time.perf_counter()
    for _ in range(calls):
        function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - start) / calls


def in_turn(
    functions: Mapping[Any, Callable[[], Any]], *, rounds: int = 20, at_least: float = 2e-3, device: torch.device = CPU
) -> dict[Any, list[float]]:
    """Times functions in turn, a b c a b c ..., so that other work on the machine slows all of them.

    Args:
        functions: callables without arguments, by name.
        rounds: how often each is timed.
        at_least: seconds that one timing lasts; short calls are repeated to fill it.
        device: where they compute; a timing ends when it is done.

    Returns:
        Seconds a call by name, round by round.
    """
    calls = {}
    for name, function in functions.items():
        _once(function, 1, device)  # warms up
        seconds = _once(function, 1, device)
        if seconds < at_least:
            seconds = _once(function, 3, device)
        calls[name] = max(1, round(at_least / max(seconds, 1e-7)))
    measured: dict[Any, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            measured[name].append(_once(function, calls[name], device))
    return measured


def speedup(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Median over rounds of theirs / ours: above 1, ours is faster."""
    return statistics.median(b / a for a, b in zip(ours, theirs, strict=True))


def interleaved(ours: Callable[[], Any], theirs: Callable[[], Any], *, pairs: int = 20) -> float:
    """The speedup of ours over theirs, run in turn."""
    return speedup(*in_turn({"ours": ours, "theirs": theirs}, rounds=pairs).values())


# ---- as a GPU sees it ------------------------------------------------------------------------------------------------


def capture(function: Callable[[], Any]) -> torch.cuda.CUDAGraph:
    """A CUDA graph of one call."""
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # restores the stream where a capture fails, which torch.cuda.graph does not
        for _ in range(3):  # compiles kernels and makes workspaces, which must not happen while capturing
            function()
        with torch.cuda.graph(graph, stream=stream):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    return graph


def device_seconds(functions: Sequence[Callable[[], Any]], *, rounds: int = 20) -> float:
    """Device time of a call, without the host's share: a CUDA graph of many calls, replayed.

    Args:
        functions: the same computation on several sets of buffers. The calls go round them, so that with enough sets none finds its
            inputs in the cache.
        rounds: replays.

    Raises:
        RuntimeError: the computation cannot be captured.
    """
    functions[0]()  # warms up
    seconds = _once(functions[0], 1, torch.device("cuda"))
    calls = max(len(functions), min(100, math.ceil(5e-3 / seconds)))  # a replay of milliseconds, beside which its launch is nothing

    def work() -> None:
        for call in range(calls):
            functions[call % len(functions)]()

    graph = capture(work)
    graph.replay()
    return _replay_seconds(graph, lambda: None, rounds) / calls


def cold_seconds(function: Callable[[], Any], *, rounds: int = 20) -> float:
    """Device time of a single call that finds the second-level cache full of other data, the launch of its graph included.

    Raises:
        RuntimeError: the computation cannot be captured.
    """
    other = torch.empty(4 * cache_bytes(), dtype=torch.uint8, device="cuda")
    return _replay_seconds(capture(function), other.zero_, rounds)


def _replay_seconds(graph: torch.cuda.CUDAGraph, before: Callable[[], Any], rounds: int) -> float:
    """Median seconds of a replay on the device; `before` runs first, untimed."""
    pairs = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(rounds)]
    for start, end in pairs:
        before()
        start.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(1e-3 * start.elapsed_time(end) for start, end in pairs)


def launches(function: Callable[[], Any], calls: int = 1) -> Counter[str]:
    """The kernels that so many calls run on the GPU, as the profiler sees them: how often each."""
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiled:
        for _ in range(calls):
            function()
        torch.cuda.synchronize()
    return kernels(profiled.events())


def kernels(events: Iterable[Any]) -> Counter[str]:
    """How often each kernel ran, from a profile's events; copies and fills by the copy engines are no kernels."""
    on_device = (event.name for event in events if event.device_type == DeviceType.CUDA)
    return Counter(name[:80] for name in on_device if not name.startswith(("Memcpy", "Memset")))


def cache_bytes() -> int:
    """Size of the GPU's second-level cache."""
    return torch.cuda.get_device_properties().L2_cache_size


# ---- ceilings --------------------------------------------------------------------------------------------------------


@cache
def copy_bandwidth(device: torch.device = CPU) -> float:
    """Bytes a second that copy_ reads and writes, on tensors far larger than any cache."""
    elements = 2**27 if device.type == "cuda" else 2**25
    source, target = torch.randn(elements, device=device), torch.empty(elements, device=device)
    return 8 * elements / _least_seconds(lambda: target.copy_(source), device)


@cache
def dense_rate(device: torch.device = CPU, dtype: torch.dtype = torch.float32) -> float:
    """Operations a second (a multiply-add is two) of a large matrix product in the dtype, at PyTorch's precision settings."""
    n = 8192 if device.type == "cuda" else 1024
    a, b = torch.randn(n, n, device=device).to(dtype), torch.randn(n, n, device=device).to(dtype)
    return 2 * n**3 / _least_seconds(lambda: a @ b, device)


def _least_seconds(function: Callable[[], Any], device: torch.device) -> float:
    if device.type == "cuda":
        return device_seconds([function], rounds=5)
    return min(_once(function, 1) for _ in range(10))


# ---- memory ----------------------------------------------------------------------------------------------------------


def peak_memory(function: Callable[[], Any], device: torch.device = CPU) -> int:
    """Most bytes live at once during a call, beyond what lived before; call it once first, for what stays."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's notes on itself
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profile:
        function()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())), default=0)
