"""The GPU script, its contracts and its sanitizer run, as far as a machine without a GPU can show: stand-ins play the GPU's part."""

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType

from kdfast import functional, machine
from kdfast.benchmarks import report, timing
from kdfast.benchmarks.maintain import contracts, gpu, sanitize
from kdfast.benchmarks.maintain.contracts import Broken, NotAvailable, Work, verdict
from kdfast.benchmarks.maintain.gpu import Ended, Step, execute, read_sanitizer

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]


def python(code: str, *arguments: str):
    return lambda folder, seconds: [sys.executable, "-c", code, *arguments]


def says(folder, ended):
    return {"status": "passed" if ended.status == 0 else "failed", "said": ended.output.strip()}


# ---- running steps ---------------------------------------------------------------------------------------------------


def test_a_step_that_crashes_hangs_or_is_unreadable_costs_only_itself(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "GRACE", 0.5)
    out = tmp_path / "gpu.json"

    def unavailable(folder, seconds):
        raise NotAvailable("no such tool")

    steps = [
        Step("good", 20, python("print('hello')"), says),
        Step("crash", 20, python("import os; os.abort()"), says),
        Step("hang", 1, python("import time; time.sleep(60)"), lambda folder, ended: gpu._unfinished(ended)),
        Step("unreadable", 20, python("pass"), lambda folder, ended: json.loads(ended.output)),
        Step("missing program", 20, lambda folder, seconds: ["no-such-program-here"], says),
        Step("unavailable", 20, unavailable, says),
        Step("variables", 20, python("import os; print(os.environ['X_TEST'])"), says, environment={"X_TEST": "5"}),
        Step("file so far", 20, python(f"print(open({str(out)!r}).read())"), says),
    ]
    assert not gpu.run(steps, out, 300)
    record = json.loads(out.read_text())
    results = record["steps"]
    assert list(results) == [step.name for step in steps], "the order of the table"
    assert {name: result["status"] for name, result in results.items()} == {
        "good": "passed",
        "crash": "failed",
        "hang": "out of time",
        "unreadable": "failed",
        "missing program": "failed",
        "unavailable": "not available",
        "variables": "passed",
        "file so far": "passed",
    }
    assert (results["good"]["said"], results["variables"]["said"]) == ("hello", "5")
    assert 1 <= results["hang"]["seconds"] < 10
    assert results["unavailable"]["why"] == "no such tool"
    before = json.loads(results["file so far"]["said"])["steps"]
    assert before["good"] == results["good"], "written after every step"
    assert before["file so far"] == {"status": "not begun"}
    assert record["machine"]["torch"] == torch.__version__
    assert "crash: status failed" in capsys.readouterr().out


def test_only_failures_make_the_run_fail(tmp_path):
    fine = [Step(status, 20, python("pass"), lambda *_, s=status: {"status": s}) for status in ("passed", "out of time", "not available")]
    assert gpu.run(fine, tmp_path / "x.json", 300)
    assert not gpu.run([*fine, Step("failed", 20, python("pass"), lambda *_: {"status": "failed"})], tmp_path / "x.json", 300)


def test_steps_share_the_time(tmp_path):
    """A step gets what it may take, but leaves later ones their least, save those for spare time."""
    given = {}

    def step(name, seconds, least=15.0, spare=False):
        def command(folder, allowed):
            given[name] = round(allowed)
            return [sys.executable, "-c", "pass"]

        return Step(name, seconds, command, says, least, spare)

    steps = [step("short", 5, 5), step("greedy", 1000), step("later", 1000, 50), step("too long", 1000, 500, spare=True)]
    gpu.run(steps, tmp_path / "x.json", 200 + gpu.GRACE)
    assert given == {"short": 5, "greedy": pytest.approx(150, abs=10), "later": pytest.approx(200, abs=15)}
    too_long = json.loads((tmp_path / "x.json").read_text())["steps"]["too long"]
    assert too_long["status"] == "out of time"
    assert "it needs 500" in too_long["why"]


def interrupted(monkeypatch, command: list[str], marker: Path) -> Ended:
    """How a command ends whose time is over when it has made the marker."""
    honest = gpu._waited

    def waited(process, seconds):
        if seconds == gpu.GRACE:
            return honest(process, seconds)
        for _ in range(600):
            if marker.exists():
                return None
            time.sleep(0.1)
        pytest.fail("the command never began to hang")

    monkeypatch.setattr(gpu, "_waited", waited)
    return execute(command, 60, {})


def test_what_runs_out_of_time_may_first_say_what_it_has(tmp_path, monkeypatch):
    marker = tmp_path / "hanging"
    code = f"import time, pathlib\ntry:\n    pathlib.Path({str(marker)!r}).touch(); time.sleep(60)\n"
    code += "except KeyboardInterrupt:\n    print('so far 3')"
    ended = interrupted(monkeypatch, [sys.executable, "-c", code], marker)
    assert ended.status is None
    assert ended.output.strip() == "so far 3"


def test_what_does_not_stop_is_killed_with_its_children(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "GRACE", 0.5)
    marker = tmp_path / "hanging"
    deaf = "import signal, time, pathlib; signal.signal(signal.SIGINT, signal.SIG_IGN); {} time.sleep(60)"
    child = deaf.format(f"pathlib.Path({str(marker)!r}).touch();")
    parent = deaf.format(f"import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', {child!r}]); print(p.pid, flush=True);")
    start = time.monotonic()
    ended = interrupted(monkeypatch, [sys.executable, "-c", parent], marker)
    assert ended.status is None
    assert time.monotonic() - start < 50
    assert _dead(int(ended.output))


def test_an_interrupted_script_leaves_no_process_behind(monkeypatch):
    started = []
    monkeypatch.setattr(gpu, "_waited", lambda process, seconds: started.append(process) or (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        execute([sys.executable, "-c", "import time; time.sleep(60)"], 50, {})
    assert _dead(started[0].pid)


def _dead(pid: int) -> bool:
    """Gone, or a zombie that nobody has waited for yet."""
    for _ in range(50):
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.1)
    return False


def test_output_is_cut_to_its_end():
    ended = execute([sys.executable, "-c", "print('x' * 10**6); print('the end')"], 30, {})
    assert ended.output.endswith("the end\n")
    assert len(ended.output) <= 20_000


# ---- the table -------------------------------------------------------------------------------------------------------


def test_the_table_of_steps():
    steps = gpu.steps()
    names = [step.name for step in steps]
    assert len(set(names)) == len(names)
    assert names[: len(contracts.CONTRACTS)] == [f"contract/{name}" for name in contracts.CONTRACTS]
    assert names.index("tests") < names.index("sanitize") < names.index("memcheck") < names.index("benchmarks")
    assert all(step.least <= step.seconds for step in steps)
    assert sum(step.least for step in steps if not step.spare) <= 9 * 60 - gpu.GRACE, "each has its least within nine minutes"


def test_every_step_runs_something_that_exists(tmp_path, monkeypatch):
    (tmp_path / "compute-sanitizer").touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    for step in gpu.steps():
        command = step.command(tmp_path, 60)
        assert command[0] in (sys.executable, str(tmp_path / "compute-sanitizer"))
        for module in (command[i + 1] for i, word in enumerate(command) if word == "-m" and i < 8):
            if module.startswith("kdfast."):
                assert (ROOT / "benchmarks" / "maintain" / f"{module.rpartition('.')[2]}.py").is_file(), module
    for name in gpu.TESTS:
        assert (ROOT / "tests" / f"{name}.py").is_file(), name


def test_without_the_sanitizer_its_steps_are_not_available(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu.shutil, "which", lambda *_, **__: None)
    steps = [step for step in gpu.steps() if step.name in ("memcheck", "racecheck", "initcheck", "synccheck")]
    assert gpu.run(steps, tmp_path / "x.json", 300)
    results = json.loads((tmp_path / "x.json").read_text())["steps"]
    assert [result["status"] for result in results.values()] == ["not available"] * 4


def test_the_loaders_step_measures_every_loader(tmp_path):
    command = list(gpu._loaders(tmp_path, 60))
    for on_a_gpu, here in (("images=2000, epochs=3, batch_size=128, device='cuda'", "images=16, epochs=1, batch_size=8, device='cpu'"),):
        assert on_a_gpu in command[-1]
        command[-1] = command[-1].replace(on_a_gpu, here)
    command[-1] = command[-1].replace("; run(", "; import kdfast.benchmarks.loaders as loaders; loaders.GENERATED = 16; run(")
    result = gpu.read_loaders(tmp_path, execute(command, 120, {"OMP_NUM_THREADS": "1"}))
    assert result["status"] == "passed"
    assert {"torchvision", "resident"} <= {case["loader"] for case in result["cases"]}
    assert gpu.read_loaders(tmp_path / "nowhere", gpu.Ended(1, "no images")) == {"status": "failed", "why": "exit status 1: no images"}


def test_the_training_step_measures_what_it_says(tmp_path, monkeypatch):
    """On the CPU and with small networks, through the very command and reader."""
    command = list(gpu._training("off")(tmp_path, 60))
    small = "student='resnet8', teacher='resnet14', classes=7, image_size=16, batch_size=6, device='cpu', seconds=0.2"
    command[-1] = command[-1].replace("seconds=15", small)
    result = gpu.read_training(tmp_path, execute(command, 120, {"OMP_NUM_THREADS": "1"}))
    assert result["status"] == "passed", result
    assert result["kdfast"]["images_per_s"] > 0
    assert result["compile"] == "off"


def test_without_a_gpu_there_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu", "--out", str(tmp_path / "x.json")])
    with pytest.raises(SystemExit, match="sees no CUDA GPU") as stopped:
        gpu.main()
    assert stopped.value.code != 0
    assert not (tmp_path / "x.json").exists()


def test_what_nvidia_smi_says(tmp_path, monkeypatch):
    fake = tmp_path / "nvidia-smi"
    fake.write_text("#!/bin/sh\necho 'NVIDIA H200, 580.159, 143771, 345, 1980, 3201, 3201, 75.20, 700.00, 31'\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    (gpu_facts,) = machine.gpus()
    assert gpu_facts["name"] == "NVIDIA H200"
    assert (gpu_facts["driver_version"], gpu_facts["clocks.max.sm"], gpu_facts["temperature.gpu"]) == ("580.159", "1980", "31")
    fake.write_text("#!/bin/sh\nexit 9\n")
    assert machine.gpus() == []


# ---- readers ---------------------------------------------------------------------------------------------------------

SUITE = """
import time, pytest
def test_good(): pass
def test_bad(): assert 1 == 2, "one is not two"
@pytest.fixture
def broken(): raise RuntimeError("no fixture")
def test_error(broken): pass
def test_skipped(): pytest.skip("not here")
"""


def pytest_command(folder: Path, code: str) -> list[str]:
    (folder / "test_x.py").write_text(code)
    options = [f"--junitxml={folder / 'tests.xml'}", "-p", "no:cacheprovider", "--rootdir", str(folder)]
    return [sys.executable, "-m", "pytest", str(folder / "test_x.py"), *options]


def test_results_of_pytest(tmp_path):
    result = gpu.read_tests(tmp_path, execute(pytest_command(tmp_path, SUITE), 60, {}))
    assert {key: result[key] for key in ("status", "tests", "failures", "errors", "skipped")} == {
        "status": "failed",
        "tests": 4,
        "failures": 1,
        "errors": 1,
        "skipped": 1,
    }
    assert [case["test"].rpartition("::")[2] for case in result["failed"]] == ["test_bad", "test_error"]
    assert "one is not two" in result["failed"][0]["why"]
    assert "no fixture" in result["failed"][1]["why"]
    good = gpu.read_tests(tmp_path, execute(pytest_command(tmp_path, "def test_good(): pass"), 60, {}))
    assert (good["status"], good["tests"], good["failed"]) == ("passed", 1, [])
    nothing = gpu.read_tests(tmp_path, execute(pytest_command(tmp_path, ""), 60, {}))
    assert nothing["status"] == "failed", "no test at all is no success"


def test_tests_that_run_out_of_time_have_failed_but_are_counted(tmp_path, monkeypatch):
    marker = tmp_path / "hanging"
    code = f"import time, pathlib\ndef test_good(): pass\ndef test_hangs():\n    pathlib.Path({str(marker)!r}).touch(); time.sleep(60)"
    result = gpu.read_tests(tmp_path, interrupted(monkeypatch, pytest_command(tmp_path, code), marker))
    assert (result["status"], result["why"]) == ("failed", "out of time")
    assert result["tests"] >= 1


def test_tests_that_crash_have_failed(tmp_path):
    result = gpu.read_tests(tmp_path, execute(pytest_command(tmp_path, "import os\ndef test_x(): os.abort()"), 60, {}))
    assert result["status"] == "failed"
    assert "exit status" in result["why"]


@pytest.mark.parametrize("stopped", [False, True])
def test_benchmarks_are_kept_without_every_timing_also_when_stopped(tmp_path, monkeypatch, stopped):
    pytest.importorskip("pytest_benchmark")
    marker = tmp_path / "hanging"
    code = "import time, pathlib\n"
    code += "def test_fast(benchmark):\n    benchmark.extra_info['case'] = '8 x 10'\n    benchmark.pedantic(list, rounds=9)\n"
    if stopped:
        code += f"def test_hangs(benchmark):\n    pathlib.Path({str(marker)!r}).touch(); time.sleep(60)\n"
    command = [*pytest_command(tmp_path, code), f"--benchmark-json={tmp_path / 'benchmarks.json'}"]
    result = gpu.read_benchmarks(tmp_path, interrupted(monkeypatch, command, marker) if stopped else execute(command, 60, {}))
    assert result["status"] == ("out of time" if stopped else "passed")
    assert (result["cases"], result["benchmarks"]) == (1, [{"extra_info": {"case": "8 x 10"}}])


def test_the_report_reads_the_result(tmp_path):
    measured = {"operator": "kd_loss (kd)", "case": "8 x 10", "variants": {"kdfast": {"call_ms": 1.0}}}
    (tmp_path / "benchmarks.json").write_text(json.dumps({"benchmarks": [{"extra_info": measured, "stats": {"data": [1.0] * 1000}}]}))
    code = f"import shutil, sys; shutil.copy({str(tmp_path / 'benchmarks.json')!r}, sys.argv[1])"
    copying = Step("benchmarks", 20, lambda folder, s: python(code, str(folder / "benchmarks.json"))(folder, s), gpu.read_benchmarks)
    assert gpu.run([copying], tmp_path / "gpu-x.json", 300)
    results = report.read(tmp_path / "gpu-x.json")
    assert results.cases == [measured]
    assert f"PyTorch {torch.__version__}" in results.measured


def test_benchmarks_without_a_result(tmp_path):
    assert gpu.read_benchmarks(tmp_path, Ended(None, "compiling"))["status"] == "out of time"
    assert gpu.read_benchmarks(tmp_path, Ended(2, "ERROR: no module")) == {"status": "failed", "why": "exit status 2: ERROR: no module"}


CLEAN = "========= COMPUTE-SANITIZER\ndistill_kl: 24 runs\n========= ERROR SUMMARY: 0 errors\n"
INVALID = """========= COMPUTE-SANITIZER
========= Invalid __global__ read of size 4 bytes
=========     at _resident+0x3a0
=========     Address 0x7f1 is out of bounds
=========
========= ERROR SUMMARY: 2 errors
"""
RACES = """========= COMPUTE-SANITIZER
========= Error: Race reported between Write access at _resident+0x1a0
========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)
"""
REFUSED = """========= COMPUTE-SANITIZER
========= Error: Device not supported. Please refer to the "Supported Devices" section of the sanitizer documentation
=========
========= ERROR SUMMARY: 1 error
"""


@pytest.mark.parametrize(
    ("ended", "status", "errors"),
    [
        (Ended(0, CLEAN), "passed", 0),
        (Ended(0, CLEAN.replace("ERROR SUMMARY: 0 errors", "RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)")), "passed", 0),
        (Ended(0, INVALID), "failed", 2),
        (Ended(0, RACES), "failed", 1),
        (Ended(1, CLEAN), "failed", 0),
        (Ended(0, REFUSED), "not available", None),
        (Ended(255, "========= COMPUTE-SANITIZER\n========= Error: Target application terminated early"), "not available", None),
        (Ended(127, "compute-sanitizer: cannot execute"), "not available", None),
        (Ended(None, "========= COMPUTE-SANITIZER\n"), "out of time", None),
    ],
)
def test_what_the_sanitizer_says(ended, status, errors):
    result = read_sanitizer(Path(), ended)
    assert (result["status"], result.get("errors")) == (status, errors)
    if status != "passed":
        assert result["why"]
    if errors:
        assert any("_resident" in line for line in result["said"])


def test_results_of_a_contract():
    assert gpu.read_contract(Path(), Ended(0, 'a warning\n{"status": "passed", "kept_by": ["x"]}\n')) == {
        "status": "passed",
        "kept_by": ["x"],
    }
    for ended in (Ended(-6, "Fatal Python error: Aborted"), Ended(None, ""), Ended(0, "no json")):
        assert gpu.read_contract(Path(), ended)["status"] == "failed"


def test_the_sanitizers_own_run():
    assert gpu.read_plain(Path(), Ended(0, "distill_kl: 24 runs\n")) == {"status": "passed", "what": "distill_kl: 24 runs"}
    assert gpu.read_plain(Path(), Ended(1, "RuntimeError: no"))["status"] == "failed"


# ---- contracts -------------------------------------------------------------------------------------------------------


def test_every_loss_is_under_contract():
    covered = {name.split(" ")[0].rstrip(",") for name in contracts.works(CPU)}
    public = {name for name, f in vars(functional).items() if getattr(f, "__module__", "") == functional.__name__ and name[0] != "_"}
    assert covered == public


def test_works_run_and_their_inputs_matter():
    for name, work in contracts.works(CPU).items():
        before = work.run()
        contracts.refill(work)
        for a, b in zip(before, work.run(), strict=True):
            assert a.isfinite().all(), name
            assert not torch.equal(a, b), f"{name} does not depend on its inputs"


@pytest.mark.parametrize("name", ["same_bits", "compiled"])
def test_promises_that_a_cpu_keeps_too(name, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda f, fullgraph: f)  # Inductor's C++ would take half a minute
    assert verdict(contracts.CONTRACTS[name], CPU)["status"] == "passed"


def test_a_loss_that_changes_from_run_to_run_breaks_the_promise(monkeypatch):
    honest = functional.kd_loss
    runs = iter(range(10**6))
    monkeypatch.setattr(functional, "kd_loss", lambda *a, **k: honest(*a, **k) * (1 + 1e-6 * next(runs)))
    result = verdict(contracts.same_bits, CPU)
    assert result["status"] == "failed"
    assert "kd_loss 300 x 32003: two runs on the same inputs differ" in result["why"], "all that break it are named"


def stand_in_graph(work, device):
    """As a CUDA graph: tensors, and what fills them anew."""
    results = work.run()

    def replay():
        for result, new in zip(results, work.run()):
            result.copy_(new)

    return results, replay


def test_a_replay_must_follow_its_inputs(monkeypatch):
    monkeypatch.setattr(contracts, "captured", stand_in_graph)
    assert verdict(contracts.cuda_graph, CPU)["status"] == "passed"
    monkeypatch.setattr(contracts, "captured", lambda work, device: (work.run(), lambda: None))
    result = verdict(contracts.cuda_graph, CPU)
    assert result["status"] == "failed"
    assert "supcon_loss: the replay and eager mode differ" in result["why"]


@pytest.fixture
def cuda(monkeypatch):
    """torch.cuda's calls as far as the contracts use them, doing nothing; `cuda.mode` is the mode of the watch over waiting."""
    state = SimpleNamespace(mode="default", slept=0)
    stream = SimpleNamespace(wait_stream=lambda other: None)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device=None: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: stream)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: setattr(state, "slept", state.slept + 1))
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda mode: setattr(state, "mode", mode))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=lambda: None))
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, stream: contextlib.nullcontext())
    return state


def test_the_capture_runs_the_loss_and_hands_over_the_replay(cuda):
    work = contracts.works(CPU)["hint_loss"]
    results, replay = contracts.captured(work, CPU)
    contracts.close(results, work.run(), "captured and eager")
    replay()


def test_waiting_is_found_and_the_watch_ends(cuda, monkeypatch):
    assert verdict(contracts.no_waiting, CPU)["status"] == "passed"
    assert cuda.mode == "default"

    def waits(*args, **kwargs):
        if cuda.mode == "error":
            raise RuntimeError("called a synchronizing CUDA operation")
        return honest(*args, **kwargs)

    honest = functional.hint_loss
    monkeypatch.setattr(functional, "hint_loss", waits)
    result = verdict(contracts.no_waiting, CPU)
    assert result["status"] == "failed"
    assert result["why"] == "Broken: hint_loss: called a synchronizing CUDA operation"
    assert cuda.mode == "default"


def test_streams(cuda, monkeypatch):
    monkeypatch.setattr(contracts, "REPEATS", 2)
    assert verdict(contracts.other_streams, CPU)["status"] == "passed"
    assert cuda.slept == len(contracts.works(CPU))
    # a kernel on the wrong stream computes with what the inputs were when the queued copies had not run
    x = torch.randn(3)
    seen = [x.clone()]
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: seen.append(x.clone()))
    monkeypatch.setattr(contracts, "works", lambda device: {"early": Work([x], lambda: [seen[-1]])})
    assert "another stream and the default one differ" in verdict(contracts.other_streams, CPU)["why"]


def test_one_gpu_cannot_show_the_guard_of_another():
    assert verdict(contracts.other_device, CPU) == {"status": "not available", "why": "there is one GPU only"}


def test_launches_are_counted_without_copies():
    events = [
        SimpleNamespace(name=name, device_type=kind)
        for name, kind in [
            ("_resident", DeviceType.CUDA),
            ("_rescale", DeviceType.CUDA),
            ("_resident", DeviceType.CUDA),
            ("Memset (Device)", DeviceType.CUDA),
            ("Memcpy DtoD (Device -> Device)", DeviceType.CUDA),
            ("cudaLaunchKernel", DeviceType.CPU),
        ]
    ]
    assert timing.kernels(events) == {"_resident": 2, "_rescale": 1}


def test_more_than_two_launches_or_none_break_the_promise():
    contracts.judge_launches({"a": {"_resident": 1.0, "_rescale": 1.0}, "b": {"_resident": 1.0}})
    for seen, message in (
        ({"a": {"_resident": 1.0, "softmax": 1.5}}, "more than 2 launches"),
        ({"a": {"_resident": 1.0}, "b": {}}, "no kernels of b"),
        ({}, "no kernels of any loss"),
    ):
        with pytest.raises(Broken, match=message):
            contracts.judge_launches(seen)


def test_a_contract_is_one_process_and_one_line_of_json():
    done = subprocess.run(
        [sys.executable, "-m", "kdfast.benchmarks.maintain.contracts", "other_device"], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert gpu.read_contract(Path(), Ended(0, done.stdout))["status"] == "not available"


# ---- the kernels, interpreted ----------------------------------------------------------------------------------------

INTERPRETED = """
import warnings
warnings.simplefilter("ignore")
from kdfast.benchmarks.maintain import sanitize
from kdfast.kernels import distill_kl
plan, seen = distill_kl.plan, set()

def recorded(C, heavy):
    chosen = plan(C, heavy)
    kind = ("several rows" if chosen.rows > 1 else "one row") if chosen.resident(C) else f"walked, heavy={heavy}"
    seen.add((kind, "aligned" if C % 4 == 0 else "odd"))
    return chosen

distill_kl.plan = recorded
sanitize.main()
assert len(seen) == 8, seen
"""


def test_every_kernel_has_a_run_for_the_sanitizer_in_every_regime():
    pytest.importorskip("triton")
    assert set(sanitize.KERNELS) == {path.stem for path in (ROOT / "kernels").glob("*.py")} - {"__init__", "lion_cpu"}
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", INTERPRETED], capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "distill_kl: 23 runs" in done.stdout
