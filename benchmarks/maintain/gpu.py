"""Everything that needs a GPU, on one card and in minutes: python -m kdfast.benchmarks.maintain.gpu --out FILE [--minutes 9] [--rest]

The first call begins with what a first contact must show (checks.py says more):

    compile    the kernels, in parallel processes
    times      device time of ours alone
    calls      eager call time of small cases
    ncu        registers, instructions and traffic of the operators' largest cases, by Nsight Compute
    tests      the tests marked `kernels`, on the device: every kernel against float64, and the promises that only a GPU can show

A second call with --rest runs memcheck, racecheck, initcheck and synccheck (compute-sanitizer), loaders, training, and benchmarks
(every operator against its peers) for what is left of the time.

FILE gets a line of JSON per result, written at once: first the machine, then the results of each step and how it ended: "passed",
"failed", "out of time" or "not available" (a tool is missing). A step has its own processes, so a crash or
a hang costs that step alone. The exit status is 1 where a step failed.
"""

import contextlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import torch
import tyro

from kdfast import machine
from kdfast.benchmarks import operators
from kdfast.benchmarks.maintain import ROOT

GRACE = 10.0  # seconds between interrupting a process and killing it
MODULE = "kdfast.benchmarks.maintain"
METRICS = ("gpu__time_duration.sum", "dram__bytes.sum", "sm__inst_executed.sum", "launch__registers_per_thread")


@dataclass(frozen=True)
class Step:
    """One step.

    Attributes:
        name: names its results.
        seconds: it gets at most.
        command: what it runs.
        tool: a program that watches the command, with its options.
        environment: variables in addition to those of this process.
    """

    name: str
    seconds: float
    command: Sequence[str]
    tool: Sequence[str] = ()
    environment: Mapping[str, str] = field(default_factory=dict)


# ---- running ---------------------------------------------------------------------------------------------------------


def run(steps: Sequence[Step], out: TextIO, seconds: float) -> bool:
    """Runs the steps in order while there is time; returns whether none failed."""
    end = time.monotonic() + seconds
    statuses = []

    def write(record: Mapping[str, Any]) -> None:
        out.write(json.dumps(record) + "\n")
        out.flush()

    write(machine.document([], **operators.describe_peers()))
    for step in steps:
        start = time.monotonic()
        left = end - start - GRACE
        status, said = execute(step, min(step.seconds, left), write) if left > 0 else ("out of time", "no time was left")
        write({"step": step.name, "status": status, "seconds": round(time.monotonic() - start, 1), "said": said, "gpus": machine.gpus()})
        print(f"{step.name}: {status}", flush=True)
        statuses.append(status)
    return "failed" not in statuses


def execute(step: Step, seconds: float, write: Callable[[Mapping[str, Any]], None]) -> tuple[str, str]:
    """Runs a step's command and writes its results as they come; returns how it ended and its last lines."""
    tool = list(step.tool)
    if tool:
        program = shutil.which(tool[0], path=f"{os.environ.get('PATH', '')}{os.pathsep}/usr/local/cuda/bin")
        if program is None:
            return "not available", "its tool is not installed"
        tool[0] = program
    lines: deque[str] = deque(maxlen=2000)
    start = time.monotonic()
    with subprocess.Popen(
        # interrupts, and later kills, the command with all that it started
        ["timeout", "--signal=INT", f"--kill-after={GRACE}", str(seconds), *tool, *step.command],
        cwd=ROOT,
        env={**os.environ, **step.environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    ) as process:
        for line in process.stdout or ():
            lines.append(line.strip())
            if (result := parse(line)) is not None:
                write({"step": step.name, **result})
    said = " | ".join([line for line in lines if line][-6:])[-1000:]
    if process.returncode and time.monotonic() - start >= seconds:
        return "out of time", said
    return judge(process.returncode, "\n".join(lines), bool(tool)), said


def judge(status: int, output: str, watched: bool) -> str:
    """How a step ended; where compute-sanitizer or Nsight Compute could not watch, it has found nothing."""
    counts = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (\d+) (?:errors?|hazards?)\b", output)
    if watched and re.search(r"Device not supported|Failed to initialize|ERR_NVGPUCTRPERM|terminated early|cannot execute", output):
        return "not available"
    return "failed" if status or any(map(int, counts[-1:])) else "passed"


def parse(line: str) -> dict[str, Any] | None:
    """The result in a line of output: our JSON, a test that pytest lists as failed, or a row of Nsight Compute's table."""
    if line.startswith("{"):
        with contextlib.suppress(json.JSONDecodeError):
            return dict(json.loads(line))
    if line.startswith(("FAILED ", "ERROR ")):
        return {"failed": line.strip()[:300]}
    return {"row": line.strip()} if line.startswith('"') else None


# ---- the steps -------------------------------------------------------------------------------------------------------


def first_steps() -> list[Step]:
    """The steps of a first contact; those before the tests leave them time, even where each takes all it may."""
    # each example of a fuzz test would be a kernel of its own to compile: the interpreter is the place for those
    tests = [sys.executable, "-m", "pytest", "tests", "-m", "kernels and not slow and not speed", "-k", "not fuzz", "-rfE", "--tb=line"]
    if importlib.util.find_spec("xdist") is not None:
        tests += ["-n", str(min(12, machine.cores()))]
    return [
        Step("compile", 60, _check("compile")),
        Step("times", 110, _check("times")),
        Step("calls", 20, _check("calls")),
        Step("ncu", 60, _check("once"), ("ncu", "--csv", "--page", "raw", "--metrics", ",".join(METRICS), "-k", "regex:^_[a-z]")),
        Step("tests", 300, tests, environment={"KDFAST_TEST_DEVICE": "cuda"}),
    ]


def other_steps() -> list[Step]:
    """The steps of a second call."""
    sanitizer = ("compute-sanitizer", "--launch-timeout", "60", "--target-processes", "application-only")  # PyTorch is slow to import
    # every tensor an allocation of its own, or a read beyond its end would reach a neighbour
    apart = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    quiet = ("--report-api-errors", "no")  # libraries try calls out and see them fail
    return [
        Step("memcheck", 45, _check("sanitize"), (*sanitizer, "--tool", "memcheck", *quiet), apart),
        *(Step(tool, 45, _check("sanitize"), (*sanitizer, "--tool", tool), apart) for tool in ("racecheck", "initcheck", "synccheck")),
        Step("loaders", 60, _check("loaders")),
        Step("training", 60, _check("training")),
        Step("benchmarks", 600, _check("benchmarks")),
    ]


def _check(name: str) -> list[str]:
    return [sys.executable, "-m", f"{MODULE}.checks", name]


def main(out: Path, minutes: float = 9.0, rest: bool = False) -> None:
    """Runs the steps on this machine's GPU.

    Args:
        out: file for the results, a line of JSON each.
        minutes: for all steps together.
        rest: run the steps of a second call.
    """
    if not torch.cuda.is_available():
        sys.exit(f"{MODULE}.gpu: this PyTorch sees no CUDA GPU, and every measurement here needs one")
    with out.open("w") as file:
        good = run(other_steps() if rest else first_steps(), file, 60 * minutes)
    print(f"{'no step failed' if good else 'a step failed'}: {out}")
    sys.exit(not good)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
