"""Everything that needs a GPU, on one card and in minutes: python -m kdfast.benchmarks.maintain.gpu --out FILE [--minutes 9] [--rest]

The first call begins with what a first contact must show (checks.py says more):

    compile    the kernels, in parallel processes
    values     every kernel against float64
    times      device time of ours alone
    calls      eager call time of small cases
    ncu        registers, instructions and traffic of the operators' largest cases, by Nsight Compute
    tests      the tests marked `kernels`, on the device

A second call with --rest runs contract/... (contracts.py), memcheck, racecheck, initcheck and synccheck (compute-sanitizer), loaders,
training, and benchmarks (every operator against its peers) for what is left of the time.

FILE gets a line of JSON per result, written at once: first the machine, then the results of each step and how it ended: "passed",
"failed", "out of time" (it got less than it needed) or "not available" (a tool or a second GPU is missing). A step has its own
processes, so a crash or a hang costs that step alone. The exit status is 1 where a step failed.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import torch

from kdfast import machine
from kdfast.benchmarks import operators
from kdfast.benchmarks.maintain import ROOT
from kdfast.benchmarks.maintain.contracts import CONTRACTS, NOT_AVAILABLE

GRACE = 10.0  # seconds between interrupting a process and killing it
SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")
MODULE = "kdfast.benchmarks.maintain"
METRICS = ("gpu__time_duration.sum", "dram__bytes.sum", "sm__inst_executed.sum", "launch__registers_per_thread")


def judge(status: int, output: str) -> str:
    """How a step ended, from its exit status."""
    return {0: "passed", NOT_AVAILABLE: "not available"}.get(status, "failed")


def judge_tool(status: int, output: str) -> str:
    """How a step under compute-sanitizer or Nsight Compute ended; where the tool could not watch, it has found nothing."""
    counts = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (\d+) (?:errors?|hazards?)\b", output)
    if re.search(r"Device not supported|Failed to initialize|ERR_NVGPUCTRPERM|terminated early|cannot execute", output):
        return "not available"
    return "failed" if status or any(map(int, counts[-1:])) else "passed"


@dataclass(frozen=True)
class Step:
    """One step.

    Attributes:
        name: names its results.
        seconds: it gets at most.
        least: seconds that earlier steps leave it; with fewer it is not begun.
        commands: run side by side; none: their tool is not installed.
        judge: (exit status, output) -> how it ended.
        environment: variables in addition to those of this process.
    """

    name: str
    seconds: float
    least: float
    commands: Sequence[Sequence[str]]
    judge: Callable[[int, str], str] = judge
    environment: Mapping[str, str] = field(default_factory=dict)


# ---- running ---------------------------------------------------------------------------------------------------------


def run(steps: Sequence[Step], out: TextIO, seconds: float) -> bool:
    """Runs the steps in order while there is time; returns whether none failed."""
    end = time.monotonic() + seconds
    lock, statuses = threading.Lock(), []

    def write(record: Mapping[str, Any]) -> None:
        with lock:
            out.write(json.dumps(record) + "\n")
            out.flush()

    write({"machine": operators.facts(), "date": time.strftime("%Y-%m-%d")})
    for number, step in enumerate(steps):
        left = end - time.monotonic() - GRACE
        start = time.monotonic()
        if not step.commands:
            status, said = "not available", "its tool is not installed"
        elif left < step.least:
            status, said = "out of time", f"{max(left, 0):.0f} s were left, and it needs {step.least:.0f}"
        else:
            later = sum(step.least for step in steps[number + 1 :])
            status, said = execute(step, min(step.seconds, max(step.least, left - later)), write)
        write({"step": step.name, "status": status, "seconds": round(time.monotonic() - start, 1), "said": said, "gpus": machine.gpus()})
        print(f"{step.name}: {status}", flush=True)
        statuses.append(status)
    return "failed" not in statuses


def execute(step: Step, seconds: float, write: Callable[[Mapping[str, Any]], None]) -> tuple[str, str]:
    """Runs a step's commands side by side and writes their results as they come; returns how it ended and its last lines."""
    lines: deque[str] = deque(maxlen=2000)

    def read(stream: TextIO) -> None:
        for line in stream:
            lines.append(line.strip())
            if (result := parse(line)) is not None:
                write({"step": step.name, **result})

    processes = []
    try:
        for command in step.commands:
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env={**os.environ, **step.environment},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                process_group=0,  # so that what it starts can be stopped with it
            )
            processes.append(process)
        readers = [threading.Thread(target=read, args=(process.stdout,), daemon=True) for process in processes]
        for reader in readers:
            reader.start()
        in_time = wait(processes, seconds)
        if not in_time:
            stop(processes, signal.SIGINT)
            wait(processes, GRACE)
    except OSError as failure:
        return "failed", str(failure)
    finally:
        stop(processes, signal.SIGKILL)
    for reader, process in zip(readers, processes):
        reader.join(GRACE)
        process.wait()
        if not reader.is_alive():  # a grandchild that survives may hold the pipe
            process.communicate()  # closes it
    said = " | ".join([line for line in lines if line][-6:])[-1000:]
    if not in_time:
        return "out of time", said
    ends = [step.judge(process.returncode, "\n".join(lines)) for process in processes]
    return next((end for end in ("failed", "not available") if end in ends), "passed"), said


def parse(line: str) -> dict[str, Any] | None:
    """The result in a line of output: our JSON, a test that pytest lists as failed, or a row of Nsight Compute's table."""
    if line.startswith("{"):
        with contextlib.suppress(json.JSONDecodeError):
            return dict(json.loads(line))
    if line.startswith(("FAILED ", "ERROR ")):
        return {"failed": line.strip()[:300]}
    return {"row": line.strip()} if line.startswith('"') else None


def wait(processes: Sequence[subprocess.Popen[str]], seconds: float) -> bool:
    """Waits for all processes; returns whether they ended in time."""
    end = time.monotonic() + seconds
    try:
        for process in processes:
            process.wait(max(0.0, end - time.monotonic()))
    except subprocess.TimeoutExpired:
        return False
    return True


def stop(processes: Sequence[subprocess.Popen[str]], with_signal: signal.Signals) -> None:
    """Signals every process and all that it started."""
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, with_signal)


# ---- the steps -------------------------------------------------------------------------------------------------------


def first_steps() -> list[Step]:
    """The steps of a first contact; the seconds are what each may take where it goes badly."""
    parts = min(12, machine.cores())
    return [
        Step("compile", 60, 20, [_check("compile", "--part", f"{i}/{parts}") for i in range(parts)]),
        Step("values", 60, 30, [_check("values")]),
        Step("times", 110, 60, [_check("times")]),
        Step("calls", 20, 10, [_check("calls")]),
        Step(
            "ncu",
            60,
            20,
            _watch("ncu", "--csv", "--page", "raw", "--metrics", ",".join(METRICS), "-k", "regex:^_[a-z]", check="once"),
            judge_tool,
        ),
        Step("tests", 240, 90, [_tests()], environment={"KDFAST_TEST_DEVICE": "cuda"}),
    ]


def other_steps() -> list[Step]:
    """The steps of a second call."""
    # every tensor an allocation of its own, or a read beyond its end would reach a neighbour
    apart = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return [
        *(Step(f"contract/{name}", 45, 8, [[sys.executable, "-m", f"{MODULE}.contracts", name]]) for name in CONTRACTS),
        *(Step(tool, 45, 20, _sanitize(tool), judge_tool, apart) for tool in SANITIZERS),
        Step("loaders", 60, 30, [_check("loaders")]),
        Step("training", 60, 30, [_check("training")]),
        Step("benchmarks", 600, 60, [_check("benchmarks")]),
    ]


def _check(*arguments: str) -> list[str]:
    return [sys.executable, "-m", f"{MODULE}.checks", *arguments]


def _watch(tool: str, *options: str, check: str) -> list[list[str]]:
    program = shutil.which(tool, path=f"{os.environ.get('PATH', '')}{os.pathsep}/usr/local/cuda/bin")
    return [] if program is None else [[program, *options, *_check(check)]]


def _sanitize(tool: str) -> list[list[str]]:
    options = ["--tool", tool, "--launch-timeout", "60", "--target-processes", "application-only"]  # PyTorch is slow to import
    if tool == "memcheck":
        options += ["--report-api-errors", "no"]  # libraries try calls out and see them fail
    return _watch("compute-sanitizer", *options, check="sanitize")


def _tests() -> list[str]:
    # each example of a fuzz test would be a kernel of its own to compile: the interpreter is the place for those
    chosen = ["-m", "kernels and not slow and not speed", "-k", "not fuzz", "-rfE", "--tb=line", "-p", "no:cacheprovider"]
    parallel = ["-n", str(min(12, machine.cores()))] if importlib.util.find_spec("xdist") is not None else []
    return [sys.executable, "-m", "pytest", "tests", *chosen, *parallel]


def main() -> None:
    """Runs the steps on this machine's GPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the results, a line of JSON each")
    parser.add_argument("--minutes", type=float, default=9.0, help="for all steps together")
    parser.add_argument("--rest", action="store_true", help="run the steps of a second call")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit(f"{MODULE}.gpu: this PyTorch sees no CUDA GPU, and every measurement here needs one")
    with options.out.open("w") as out:
        good = run(other_steps() if options.rest else first_steps(), out, 60 * options.minutes)
    print(f"{'no step failed' if good else 'a step failed'}: {options.out}")
    sys.exit(not good)


if __name__ == "__main__":
    main()
