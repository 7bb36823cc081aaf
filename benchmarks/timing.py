"""Timing that survives a noisy machine: two callables in turn, in one process, compared pair by pair."""

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kdfast import machine

RESULTS = Path(__file__).parent / "results"


def _once(function: Callable[[], Any], calls: int) -> float:
    """Seconds a call."""
    start = time.perf_counter()
    for _ in range(calls):
        function()
    return (time.perf_counter() - start) / calls


def interleaved(ours: Callable[[], Any], theirs: Callable[[], Any], *, pairs: int = 20, at_least: float = 2e-3) -> dict[str, float]:
    """Times the two in turn, ours theirs ours theirs ...; the speed-up is the median over pairs of theirs / ours.

    Args:
        ours: callable without arguments.
        theirs: the same.
        pairs: how often each is timed.
        at_least: seconds that one timing lasts; short calls are repeated to fill it.

    Returns:
        ours_ms and theirs_ms (medians, milliseconds a call) and speedup (above 1: ours is faster).
    """
    seconds = max(_once(ours, 1), _once(theirs, 1))  # the first calls warm up
    seconds = min(seconds, max(_once(ours, 3), _once(theirs, 3)))
    calls = max(1, round(at_least / max(seconds, 1e-7)))
    measured = [(_once(ours, calls), _once(theirs, calls)) for _ in range(pairs)]
    return {
        "ours_ms": 1e3 * statistics.median(a for a, _ in measured),
        "theirs_ms": 1e3 * statistics.median(b for _, b in measured),
        "speedup": statistics.median(b / a for a, b in measured),
    }


def write_json(name: str, cases: list[dict[str, Any]]) -> Path:
    """Writes benchmarks/results/<name>.json: the machine, the date and one entry a case."""
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"machine": machine.facts(), "date": time.strftime("%Y-%m-%d"), "cases": cases}, indent=1) + "\n")
    return path
