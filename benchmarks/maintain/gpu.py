"""All that a GPU is needed for, on one card and in minutes: python -m kdfast.benchmarks.maintain.gpu --out FILE [--minutes 9]

    contract/...    promises that only a device can show (contracts.py)
    tests           the operators' tests on the device
    sanitize, memcheck, racecheck, initcheck, synccheck
                    a small run of every kernel (sanitize.py), alone and under compute-sanitizer's tools
    loaders         images a second of every loader, and what share of a ResNet-18's training waits for them (loaders.py)
    training        a ConKD step, ResNet-101 to ResNet-18 (training.py); with time to spare, compiled as well
    benchmarks      every operator against its peers (pytest benchmarks), the quick cases first, for what is left of the time

Each step is a process of its own with a limit of time, and FILE is written anew after every step: a crash or a hang costs the step it
happens in. The exit status is 1 where a step failed; a step that ran out of time, or whose tool this machine lacks, is marked so and
is no failure, but tests and contracts that do not finish are.
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
import tempfile
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from kdfast import files, machine
from kdfast.benchmarks import operators
from kdfast.benchmarks.maintain import ROOT
from kdfast.benchmarks.maintain.contracts import CONTRACTS, NotAvailable

TESTS = (
    "ops/test_distill_kl",
    "ops/test_distill_kl_kernel",
    "ops/test_linear_kd",
    "ops/test_supcon",
    "ops/test_supcon_kernel",
    "losses/test_crd",
    "ops/test_nce_kernel",
    "ops/test_lion",
    "ops/test_lion_kernel",
    "losses/test_feature_losses",
    "ops/test_attention_map_kernel",
)
SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")
GRACE = 15.0  # seconds between asking a process to stop and stopping it: pytest writes its results meanwhile
FAILURES = 40  # named in the result, at most
LINE = 300  # characters


class Ended(NamedTuple):
    """How a process ended."""

    status: int | None  # its exit status; None: it ran out of time
    output: str  # the end of what it printed


@dataclass(frozen=True)
class Step:
    """One step.

    Attributes:
        name: its key in the result.
        seconds: it gets at most.
        command: (scratch folder, seconds it gets) -> what to run.
        read: (scratch folder, how it ended) -> its result, with "status": "passed", "failed", "out of time" or "not available".
        least: seconds that earlier steps leave it; with fewer it is not begun.
        spare: it is for the time that is left at the end: earlier steps leave it nothing.
        environment: variables beside those that are there.
    """

    name: str
    seconds: float
    command: Callable[[Path, float], Sequence[str]]
    read: Callable[[Path, Ended], dict[str, Any]]
    least: float = 15.0
    spare: bool = False
    environment: Mapping[str, str] = field(default_factory=dict)


# ---- running ---------------------------------------------------------------------------------------------------------


def run(steps: Sequence[Step], out: Path, seconds: float) -> bool:
    """Runs the steps in order while there is time, and writes `out` after each.

    Returns:
        Whether no step failed.
    """
    end = time.monotonic() + seconds
    results: dict[str, dict[str, Any]] = {step.name: {"status": "not begun"} for step in steps}
    record = {"machine": operators.facts(), "date": time.strftime("%Y-%m-%d"), "steps": results}
    files.write_json(out, record)
    for number, step in enumerate(steps):
        left = end - time.monotonic() - GRACE
        if left < step.least:
            results[step.name] = {"status": "out of time", "why": f"{max(left, 0):.0f} s were left, and it needs {step.least:.0f}"}
        else:
            kept = sum(later.least for later in steps[number + 1 :] if not later.spare)
            results[step.name] = _result(step, min(step.seconds, max(step.least, left - kept)))
        record["gpus_after"] = machine.gpus()  # clocks and temperature once it has worked
        files.write_json(out, record)
        line = {key: value for key, value in results[step.name].items() if isinstance(value, str | int | float)}
        print(f"{step.name}: {', '.join(f'{key} {value}' for key, value in line.items())}"[:LINE], flush=True)
    return all(result["status"] != "failed" for result in results.values())


def _result(step: Step, seconds: float) -> dict[str, Any]:
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        try:
            result = step.read(folder, execute(step.command(folder, seconds), seconds, step.environment))
        except NotAvailable as reason:
            result = {"status": "not available", "why": str(reason)}
        except Exception as error:  # a result that cannot be read must not lose the others
            result = {"status": "failed", "why": f"{type(error).__name__}: {error}"[:LINE]}
    return result | {"seconds": round(time.monotonic() - start, 1)}


def execute(command: Sequence[str], seconds: float, environment: Mapping[str, str]) -> Ended:
    """Runs a command in the checkout; interrupts it when its time is over, and kills it where it does not heed that."""
    with tempfile.TemporaryFile() as printed:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            stdout=printed,
            stderr=subprocess.STDOUT,
            process_group=0,  # so that what it starts can be stopped with it
        )
        try:
            status = _waited(process, seconds)
            if status is None:
                os.killpg(process.pid, signal.SIGINT)
                if _waited(process, GRACE) is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
        except BaseException:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            raise
        printed.seek(max(0, printed.seek(0, os.SEEK_END) - 20_000))
        return Ended(status, printed.read().decode(errors="replace"))


def _waited(process: subprocess.Popen, seconds: float) -> int | None:
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None


# ---- reading what came out -------------------------------------------------------------------------------------------


def _unfinished(ended: Ended) -> dict[str, Any]:
    """Of a process that left no result."""
    if ended.status is None:
        return {"status": "out of time", "why": _last_lines(ended.output)}
    return {"status": "failed", "why": f"exit status {ended.status}: {_last_lines(ended.output)}"}


def _last_lines(output: str, count: int = 6) -> str:
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return " | ".join(lines[-count:])[-4 * LINE :]


def read_contract(folder: Path, ended: Ended) -> dict[str, Any]:
    """The line that contracts.py prints, libraries' last words aside; a contract that hangs is broken."""
    for line in reversed(ended.output.splitlines()):
        if line.startswith('{"status"'):
            return dict(json.loads(line))
    return _unfinished(ended) | {"status": "failed"}


def read_tests(folder: Path, ended: Ended) -> dict[str, Any]:
    """Counts, and the failures' names and first lines, from pytest's JUnit XML; tests that do not finish have failed."""
    path = folder / "tests.xml"
    if not path.exists():
        return _unfinished(ended) | {"status": "failed"}
    suites = list(ET.parse(path).getroot().iter("testsuite"))
    counts = {key: sum(int(suite.get(key, 0)) for suite in suites) for key in ("tests", "failures", "errors", "skipped")}
    failures = [
        {"test": f"{case.get('classname')}::{case.get('name')}", "why": (bad.get("message") or "").partition("\n")[0][:LINE]}
        for suite in suites
        for case in suite.iter("testcase")
        for bad in (*case.findall("failure"), *case.findall("error"))
    ]
    result: dict[str, Any] = {"status": "passed" if ended.status == 0 and counts["tests"] else "failed", **counts}
    if ended.status is None:
        result["why"] = "out of time"
    return result | {"failed": failures[:FAILURES]}


def read_benchmarks(folder: Path, ended: Ended) -> dict[str, Any]:
    """pytest-benchmark's JSON, cut down to what the harness measured: every single timing would be most of it."""
    path = folder / "benchmarks.json"
    if not path.exists() or not path.stat().st_size:
        return _unfinished(ended)
    measured = [{"extra_info": benchmark["extra_info"]} for benchmark in json.loads(path.read_text())["benchmarks"]]
    result = {"cases": len(measured), "benchmarks": measured}
    if ended.status == 0:
        return {"status": "passed", **result}
    return {"status": "out of time" if ended.status is None else "failed", "why": _last_lines(ended.output), **result}


def read_training(folder: Path, ended: Ended) -> dict[str, Any]:
    """The one case that training.py writes."""
    path = folder / "training.json"
    if ended.status != 0 or not path.exists():
        return _unfinished(ended)
    (case,) = json.loads(path.read_text())["cases"]
    return {"status": "passed", **case}


def read_loaders(folder: Path, ended: Ended) -> dict[str, Any]:
    """All cases that loaders.py writes."""
    path = folder / "loaders.json"
    if ended.status != 0 or not path.exists():
        return _unfinished(ended)
    return {"status": "passed", "cases": json.loads(path.read_text())["cases"]}


def read_plain(folder: Path, ended: Ended) -> dict[str, Any]:
    """Of a program that has to end well, and says in its last lines what it did."""
    return {"status": "passed", "what": _last_lines(ended.output)} if ended.status == 0 else _unfinished(ended)


_SUMMARY = re.compile(r"(?:ERROR|RACECHECK) SUMMARY: (\d+) (?:errors?|hazards?)\b")
_REFUSED = re.compile(r"Device not supported|Failed to initialize")


def read_sanitizer(folder: Path, ended: Ended) -> dict[str, Any]:
    """compute-sanitizer's own count; where it was not able to watch, it has found nothing, and the machine is to blame."""
    if ended.status is None:
        return _unfinished(ended)
    told = [line.lstrip("= ")[:LINE] for line in ended.output.splitlines() if line.startswith("=====") and line.strip("= ")]
    counts = _SUMMARY.findall(ended.output)
    if not counts or _REFUSED.search(ended.output):
        return {"status": "not available", "why": " | ".join(told[:6])[: 2 * LINE] or _last_lines(ended.output)}
    errors = int(counts[-1])
    if errors == 0 and ended.status == 0:
        return {"status": "passed", "errors": 0}
    return {
        "status": "failed",
        "errors": errors,
        "why": f"exit status {ended.status}: {_last_lines(ended.output)}",
        "said": told[:FAILURES],
    }


# ---- the steps -------------------------------------------------------------------------------------------------------


def steps() -> list[Step]:
    """All of them; the seconds are what each may take where it goes badly."""
    # every tensor an allocation of its own, or a read beyond its end would land in a neighbour
    apart = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return [
        *(
            Step(f"contract/{name}", 45, _python("-m", "kdfast.benchmarks.maintain.contracts", name), read_contract, least=8)
            for name in CONTRACTS
        ),
        Step("tests", 180, _tests, read_tests, least=100, environment={"KDFAST_TEST_DEVICE": "cuda"}),
        Step("sanitize", 60, _python("-m", "kdfast.benchmarks.maintain.sanitize"), read_plain),  # compiles what the tools then watch
        *(Step(tool, 45, _sanitizer(tool), read_sanitizer, environment=apart) for tool in SANITIZERS),
        Step("loaders", 60, _loaders, read_loaders, least=45),
        Step("training", 60, _training("off"), read_training, least=40),
        Step("benchmarks", 400, _benchmarks, read_benchmarks, least=150),
        Step("training compiled", 120, _training("on"), read_training, least=60, spare=True),
    ]


def _python(*arguments: str) -> Callable[[Path, float], Sequence[str]]:
    return lambda folder, seconds: [sys.executable, *arguments]


def _tests(folder: Path, seconds: float) -> Sequence[str]:
    paths = [f"tests/{name}.py" for name in TESTS]
    # each of the fuzz tests' examples would be a kernel of its own to compile: the interpreter is the place for those
    chosen = ["-m", "not slow and not speed", "-k", "not fuzz"]
    command = [sys.executable, "-m", "pytest", *paths, *chosen, f"--junitxml={folder / 'tests.xml'}", "-p", "no:cacheprovider"]
    if importlib.util.find_spec("xdist") is not None:
        # most of the time goes into compiling kernels, which is the processor's work
        command += ["-n", str(min(12, machine.facts()["cores"]))]
    return command


def _benchmarks(folder: Path, seconds: float) -> Sequence[str]:
    return [sys.executable, "-m", "pytest", "benchmarks", f"--benchmark-json={folder / 'benchmarks.json'}", "-p", "no:cacheprovider"]


def _loaders(folder: Path, seconds: float) -> Sequence[str]:
    out = f"Path({str(folder / 'loaders.json')!r})"
    options = f"images=2000, epochs=3, batch_size=128, device='cuda', out={out}"
    return [sys.executable, "-c", f"from pathlib import Path; from kdfast.benchmarks.loaders import Loaders, run; run(Loaders({options}))"]


def _training(compile: str) -> Callable[[Path, float], Sequence[str]]:
    def command(folder: Path, seconds: float) -> Sequence[str]:
        options = f"compile={compile!r}, seconds=15, out=Path({str(folder / 'training.json')!r})"
        code = f"from pathlib import Path; from kdfast.benchmarks.training import Train, run; run(Train({options}))"
        return [sys.executable, "-c", code]

    return command


def _sanitizer(tool: str) -> Callable[[Path, float], Sequence[str]]:
    def command(folder: Path, seconds: float) -> Sequence[str]:
        program = shutil.which("compute-sanitizer", path=f"{os.environ.get('PATH', '')}{os.pathsep}/usr/local/cuda/bin")
        if program is None:
            raise NotAvailable("compute-sanitizer is not installed here")
        options = ["--tool", tool, "--launch-timeout", "60", "--target-processes", "application-only"]  # PyTorch is slow to import
        if tool == "memcheck":
            options += ["--report-api-errors", "no"]  # libraries try calls out and see them fail
        return [program, *options, sys.executable, "-m", "kdfast.benchmarks.maintain.sanitize"]

    return command


def main() -> None:
    """Runs all steps on this machine's GPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the results, as JSON")
    parser.add_argument("--minutes", type=float, default=9.0, help="for all steps together")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("kdfast.benchmarks.maintain.gpu: this PyTorch sees no CUDA GPU, and all that is measured here needs one")
    if not (ROOT / "tests").is_dir():
        sys.exit("kdfast.benchmarks.maintain.gpu: the tests are not installed with kdfast: install a checkout with pip install -e .")
    good = run(steps(), options.out, 60 * options.minutes)
    print(f"{'all is well' if good else 'something failed'}: {options.out}")
    sys.exit(not good)


if __name__ == "__main__":
    main()
