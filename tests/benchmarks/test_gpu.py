"""The GPU script without a GPU: its steps, its clock and its lines of results; stand-ins play the programs."""

import json
import os
import sys
from pathlib import Path

import pytest
import torch

from kdfast import machine
from kdfast.benchmarks.maintain import checks, gpu
from kdfast.benchmarks.maintain.gpu import Step

SLEEP = "import time; time.sleep(60)"
DEAF = f"import signal, subprocess, sys; signal.signal(signal.SIGINT, signal.SIG_IGN); {SLEEP}"
WITH_A_CHILD = DEAF.replace("import time", f"subprocess.Popen([sys.executable, '-c', {DEAF!r}]); import time")


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def run(tmp_path: Path, steps: list[Step], seconds: float = 300) -> tuple[bool, list[dict], dict[str, dict]]:
    """Whether none failed, all lines, and the last line of each step."""
    with (tmp_path / "gpu.json").open("w") as out:
        good = gpu.run(steps, out, seconds)
    lines = [json.loads(line) for line in (tmp_path / "gpu.json").read_text().splitlines()]
    return good, lines, {line["step"]: line for line in lines if "status" in line}


def test_step_that_crashes_hangs_or_is_missing_costs_only_itself(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "GRACE", 0.5)
    steps = [
        Step("good", 20, python("print('{\"a\": 1}'); print('words')")),
        Step("crash", 20, python("import os; os.abort()")),
        Step("hang", 1, python("print('{\"so far\": 3}', flush=True); " + SLEEP)),
        Step("deaf", 1, python(WITH_A_CHILD)),
        Step("missing program", 20, ["no-such-program-here"]),
        Step("missing tool", 20, python("pass"), ["no-such-tool-here"]),
        Step("variables", 20, python("import os; print(os.environ['X_TEST'])"), environment={"X_TEST": "5"}),
    ]
    good, lines, ends = run(tmp_path, steps)
    assert not good
    assert [line["status"] for line in ends.values()] == [
        "passed", "failed", "out of time", "out of time", "failed", "not available", "passed",
    ]  # fmt: skip
    assert lines[0]["machine"]["torch"] == torch.__version__
    assert lines[1] == {"step": "good", "a": 1}
    assert {"step": "hang", "so far": 3} in lines, "a result is written when it comes"
    assert (ends["good"]["said"], ends["variables"]["said"]) == ('{"a": 1} | words', "5")
    assert ends["hang"]["seconds"] >= 1
    assert ends["deaf"]["seconds"] < 30, "its child is killed, too, or its output would last a minute"


def test_step_without_its_time_is_out_of_time_and_no_failure(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "GRACE", 0.5)
    steps = [Step("quick", 5, python("pass")), Step("long", 1000, python(SLEEP)), Step("late", 5, python("pass"))]
    good, _, ends = run(tmp_path, steps, 2.5)
    assert good
    assert [line["status"] for line in ends.values()] == ["passed", "out of time", "out of time"]


@pytest.mark.parametrize("steps", [gpu.first_steps(), gpu.other_steps()], ids=["first", "other"])
def test_every_step_begins_within_six_minutes_in_its_order_and_runs_what_exists(steps):
    assert len(steps) == 7 or [step.name for step in steps] == ["compile", "times", "calls", "ncu", "tests"]
    assert sum(step.seconds for step in steps[:-1]) + gpu.GRACE < 6 * 60
    for step in steps:
        module, name = step.command[step.command.index("-m") + 1 :][:2]
        assert name in {f"{gpu.MODULE}.checks": [*checks.CHECKS], "pytest": ["tests"]}[module]


CLEAN = "========= COMPUTE-SANITIZER\n========= ERROR SUMMARY: 0 errors"
HAZARD = "========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)"


@pytest.mark.parametrize(
    ("status", "output", "ended"),
    [
        pytest.param(0, CLEAN, "passed", id="clean"),
        pytest.param(0, HAZARD.replace("1 hazard", "0 hazards"), "passed", id="no hazard"),
        pytest.param(0, CLEAN.replace("0 errors", "2 errors"), "failed", id="errors"),
        pytest.param(0, HAZARD, "failed", id="hazard"),
        pytest.param(1, CLEAN, "failed", id="program failed"),
        pytest.param(0, "========= Error: Device not supported.\n========= ERROR SUMMARY: 1 error", "not available", id="refused"),
        pytest.param(255, "========= Error: Target application terminated early", "not available", id="terminated"),
        pytest.param(1, "==ERROR== ERR_NVGPUCTRPERM", "not available", id="no permission for counters"),
    ],
)
def test_tools_are_judged_by_their_own_count(status, output, ended):
    assert gpu.judge(status, output, watched=True) == ended


@pytest.mark.parametrize(
    ("line", "result"),
    [
        pytest.param('{"operator": "x"}\n', {"operator": "x"}, id="result"),
        pytest.param("{'no': 'json'}\n", None, id="no JSON"),
        pytest.param("FAILED tests/x.py::test_y - 1\n", {"failed": "FAILED tests/x.py::test_y - 1"}, id="failed test"),
        pytest.param('"0","python","_resident"\n', {"row": '"0","python","_resident"'}, id="row of ncu"),
        pytest.param("123 passed in 5 s\n", None, id="words"),
    ],
)
def test_results_are_found_in_the_output(line, result):
    assert gpu.parse(line) == result


def test_without_a_gpu_there_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="sees no CUDA GPU"):
        gpu.main(tmp_path / "x.json")
    assert not (tmp_path / "x.json").exists()


def test_nvidia_smi_is_read(tmp_path, monkeypatch):
    fake = tmp_path / "nvidia-smi"
    fake.write_text("#!/bin/sh\necho 'NVIDIA H200, 580.159, 143771, 345, 1980, 3201, 3201, 75.20, 700.00, 31'\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    (facts,) = machine.gpus()
    assert (facts["name"], facts["driver_version"], facts["clocks.max.sm"]) == ("NVIDIA H200", "580.159", "1980")
    fake.write_text("#!/bin/sh\nexit 9\n")
    assert machine.gpus() == []
