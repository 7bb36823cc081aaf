"""Contracts and checks of the GPU script, as far as a CPU can show them: stand-ins play torch.cuda's part."""

import contextlib
import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType

from kdfast import functional
from kdfast.benchmarks import harness, timing
from kdfast.benchmarks.maintain import checks, contracts
from kdfast.benchmarks.maintain.contracts import Broken, Work, judge
from kdfast.benchmarks.operators import OPERATORS
from tests.numeric import INTERPRETED, KERNELS

CPU = torch.device("cpu")


@pytest.fixture
def few(monkeypatch):
    """Two works instead of all, since the same check runs on each."""
    works = contracts.works(CPU)
    names = [next(name for name in works if name.startswith(start)) for start in ("kd_loss", "hint_loss", "Lion")]
    monkeypatch.setattr(contracts, "works", lambda device: {name: works[name] for name in names})
    monkeypatch.setattr(contracts, "REPEATS", 2)
    return works


def test_every_public_loss_is_under_contract():
    covered = {name.partition(":")[0] for name in contracts.works(CPU)}
    assert covered == {*functional.__all__, "Lion"}


@pytest.mark.parametrize("dtype", checks.DTYPES, ids=harness.dtype_name)
@pytest.mark.parametrize("name", OPERATORS)
def test_small_calls_agree_with_the_reference_and_depend_on_their_inputs(name, dtype):
    names = []
    for call in OPERATORS[name].module.calls(CPU, dtype):
        names.append(call.name)
        results, others = (call.step(*call.inputs(seed)).results() for seed in (0, 1))
        assert all(x.isfinite().all() for x in results), call.name
        assert not torch.equal(results[0], others[0]), f"{call.name} does not depend on its inputs"
        if call.exact is not None:
            errors = [harness.error(got, want) for got, want in zip(results, call.exact(*call.inputs(0)), strict=True)]
            assert max(errors) <= checks.TOLERANCE[dtype], call.name
    assert len(set(names)) == len(names)


@pytest.mark.kernels
@pytest.mark.slow
@pytest.mark.skipif(not KERNELS, reason="the kernels need a GPU or TRITON_INTERPRET=1")
def test_kernels_agree_with_the_reference(capsys):
    assert checks.check_values(CPU if INTERPRETED else torch.device("cuda")), capsys.readouterr().out


def test_wrong_kernel_is_reported(monkeypatch, capsys):
    honest = functional.kd_loss
    module = OPERATORS["kd_loss"].module
    monkeypatch.setattr(checks, "OPERATORS", {"kd_loss": OPERATORS["kd_loss"]})
    monkeypatch.setattr(checks, "DTYPES", (torch.float32,))
    assert checks.check_values(CPU)
    monkeypatch.setattr(module, "kd_loss", lambda *a, **k: honest(*a, **k) * 1.001)
    assert not checks.check_values(CPU)
    results = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert results[0]["problem"] == ""
    assert results[-1]["problem"] == "wrong"


def test_small_calls_of_distillation_reach_every_regime_of_its_kernel():
    kernel = pytest.importorskip("kdfast.kernels.distill_kl")
    seen = set()
    for call in OPERATORS["kd_loss"].module.calls(CPU, torch.float32):
        _, *logits = call.inputs(0)
        C, heavy = logits[0].shape[1], kernel.is_heavy(len(logits) - 1, [x.requires_grad for x in logits])
        plan = kernel.plan(C, heavy)
        kind = ("several rows" if plan.rows > 1 else "one row") if plan.resident(C) else f"walked, heavy={heavy}"
        seen.add((kind, "aligned" if C % 4 == 0 else "odd"))
    assert len(seen) == 8, seen


# ---- promises --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["same_bits", "compiled"])
def test_promises_that_a_cpu_keeps_too(name, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda f, fullgraph: f)  # Inductor's C++ would take half a minute
    monkeypatch.setattr(contracts, "REPEATS", 1)
    assert judge(contracts.CONTRACTS[name], CPU)["status"] == "passed"


def test_loss_that_changes_from_run_to_run_breaks_the_promise(few, monkeypatch):
    honest, runs = functional.kd_loss, iter(range(10**6))
    monkeypatch.setattr(OPERATORS["kd_loss"].module, "kd_loss", lambda *a, **k: honest(*a, **k) * (1 + 1e-6 * next(runs)))
    result = judge(contracts.same_bits, CPU)
    assert result["status"] == "failed"
    assert "two runs on the same inputs differ" in result["why"]
    assert "hint_loss" not in result["why"], "only the work that breaks it is named"


def capture_by_hand(run, device):
    """Like a CUDA graph: tensors, and a function that fills them again."""
    results = run()
    return results, lambda: [result.copy_(new) for result, new in zip(results, run())]


def test_replay_must_follow_its_inputs(few, monkeypatch):
    monkeypatch.setattr(contracts, "capture", capture_by_hand)
    assert judge(contracts.cuda_graph, CPU)["status"] == "passed"
    monkeypatch.setattr(contracts, "capture", lambda run, device: (run(), lambda: None))
    result = judge(contracts.cuda_graph, CPU)
    assert result["status"] == "failed"
    assert "hint_loss: the replay and eager mode differ" in result["why"]


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


def test_capture_runs_the_loss_and_returns_the_replay(cuda, few):
    work = few["hint_loss"]
    results, replay = contracts.capture(work.run, CPU)
    contracts.compare(results, work.run(), "captured and eager")
    replay()


def test_waiting_is_found_and_the_watch_ends(cuda, few, monkeypatch):
    assert judge(contracts.no_waiting, CPU)["status"] == "passed"

    def wait():
        if cuda.mode == "error":
            raise RuntimeError("called a synchronizing CUDA operation")

    monkeypatch.setattr(contracts, "works", lambda device: {"slow": Work(few["hint_loss"].call, [], wait)})
    assert judge(contracts.no_waiting, CPU) == {"status": "failed", "why": "Broken: slow: called a synchronizing CUDA operation"}
    assert cuda.mode == "default"


def test_kernel_on_a_wrong_stream_is_found(cuda, few, monkeypatch):
    assert judge(contracts.other_streams, CPU)["status"] == "passed"
    assert cuda.slept == 2, "once for each loss"
    # a kernel on the wrong stream computes with the inputs of before the queued copies
    x = torch.randn(3)
    seen = [x.clone()]
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: seen.append(x.clone()))
    monkeypatch.setattr(contracts, "works", lambda device: {"early": Work(few["hint_loss"].call, [x], lambda: [seen[-1]])})
    assert "another stream and the default one differ" in judge(contracts.other_streams, CPU)["why"]


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


def test_more_launches_than_promised_or_none_break_the_promise(few, monkeypatch):
    contracts.judge_launches({"a": (3, {"_resident": 1.0, "fill": 1.0, "_rescale": 1.0}), "b": (1, {"_step": 1.0})})
    for seen, message in (
        ({"a": (2, {"_resident": 1.0, "softmax": 1.5})}, "more launches than promised"),
        ({"a": (2, {"_resident": 1.0}), "b": (2, {})}, "no kernels of b"),
        ({}, "no kernels of any call"),
    ):
        with pytest.raises(Broken, match=message):
            contracts.judge_launches(seen)
    monkeypatch.setattr(contracts, "launches", lambda run, device, calls: {"_kernel": contracts.REPEATS})
    assert len(contracts.few_launches(CPU)["kernels"]) == 2, "kd_loss and Lion promise a number of launches"


def test_contract_is_one_process_and_one_line_of_json():
    done = subprocess.run([sys.executable, "-m", "kdfast.benchmarks.maintain.contracts", "other_device"], capture_output=True, text=True)
    assert json.loads(done.stdout) == {"status": "not available", "why": "there is one GPU only"}
    assert done.returncode == contracts.NOT_AVAILABLE
