"""The benchmark harness: floors, checks of every variant, timing, the report, and `kdfast bench`."""

import functools
import json
import math
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils._pytree import tree_leaves

from kdfast import cli
from kdfast.benchmarks import attention_map, distill_kl, harness, linear_kd, lion, operators, report, supcon, timing
from kdfast.benchmarks.harness import COMPILED, EAGER, OURS, Variant, loss_step, measure
from kdfast.benchmarks.maintain import documents

ROOT = Path(__file__).parents[2]
SMALL = [
    *(distill_kl.case(loss, 5, 7) for loss in distill_kl.LOSSES),
    supcon.case(32, 8),
    lion.case("three", [torch.Size([3, 4]), torch.Size([5]), torch.Size([])]),
    linear_kd.case(5, 3, 7),
    attention_map.case((2, 3, 4, 4), (2, 5, 4, 4), channels_last=True),
]


@pytest.fixture
def ceilings(monkeypatch):
    """What this machine copies and multiplies takes a second to measure."""
    monkeypatch.setattr(timing, "copy_bandwidth", lambda device: 2e10)
    monkeypatch.setattr(timing, "dense_rate", lambda device, dtype: 1e11)
    monkeypatch.setattr(timing, "peak_memory", lambda run, device: 1000)
    monkeypatch.setattr(harness.gc, "collect", lambda: None)


# ---- cases -----------------------------------------------------------------------------------------------------------


def test_floors_count_what_any_version_must_move(ceilings):
    distillation, contrast, lions = distill_kl.case("kd", 64, 100), supcon.case(256, 128), lion.case("ResNet-18", lion.shapes("ResNet-18"))
    assert distillation.bytes == 3 * 25_600, "student and teacher read, gradient written, 64 x 100 x 4 bytes each"
    assert distill_kl.case("lskd+ce", 64, 100, torch.bfloat16).bytes == 38_400
    assert (contrast.bytes, contrast.operations) == (262_144, 50_331_648)
    assert (lions.shape["N"], lions.shape["tensors"], lions.bytes) == (11_689_512, 62, 20 * 11_689_512)
    assert lion.shapes("256 MB")[0].numel() * 4 == 256 * 2**20
    # 64 x 16 x 32 x 32 x 4 bytes = 4 MB; the student's maps twice and their gradient, the teacher's once
    assert attention_map.case((64, 16, 32, 32), (64, 16, 32, 32), False).bytes == 16 * 2**20
    assert harness.floor_seconds(distillation) == pytest.approx(76_800 / 2e10), "the longer of two times: bytes"
    assert harness.floor_seconds(contrast) == pytest.approx(50_331_648 / 1e11), "and operations"


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_case_names_differ_and_tiers_grow(device):
    tiers = [operators.cases(torch.device(device), torch.float32, tier=tier) for tier in harness.TIERS]
    names = [[str(case) for case in cases] for cases in tiers]
    assert all(len(set(found)) == len(found) for found in names)
    assert names[1][: len(names[0])] == names[0]
    assert names[2][: len(names[1])] == names[1]
    assert {case.operator.split()[0] for case in tiers[0]} == set(operators.OPERATORS)


@pytest.mark.usefixtures("ceilings")
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_ours_and_the_originals_agree(case):
    found = measure(case, only=(EAGER, "lion-pytorch foreach", OURS), rounds=2)
    rows = found["variants"]
    assert {EAGER, OURS} <= rows.keys()
    for row in rows.values():
        assert max(row["value_error"], row["gradient_error"]) < 1e-5
        assert min(row["call_ms"], row["speedup"]) > 0
        assert row["floor_share"] == pytest.approx(found["floor_ms"] / row["call_ms"], rel=1e-2)
    assert rows[OURS]["speedup"] == 1


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_inputs_are_fresh_random_and_repeatable(case):
    flat = [torch.cat([x.detach().flatten().float() for x in tree_leaves(case.inputs(seed)) if x is not None]) for seed in (0, 0, 1)]
    assert torch.equal(flat[0], flat[1])
    assert not torch.equal(flat[0], flat[2])


# ---- checks ----------------------------------------------------------------------------------------------------------


def with_peer(peer: Variant, name: str = "peer"):
    case = distill_kl.case("kd", 5, 7)
    return replace(case, variants={OURS: case.variants[OURS]} | {name: peer})


class Rolled(torch.autograd.Function):
    """The right value, and a gradient that is not its own."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient.roll(1, -1)


def spoil(what, student, teacher, labels):
    """kd_loss with one fault."""
    s = {"gradient": Rolled.apply, "no gradient": torch.Tensor.detach}.get(what, torch.clone)(student)
    loss = distill_kl.original(s, teacher, labels, temperature=4.0) + 0 * student.sum()
    return {"value": loss + 0.01, "shape": loss.expand(1), "nan": loss * torch.nan}.get(what, loss)


@pytest.mark.usefixtures("ceilings")
@pytest.mark.parametrize("what", ["value", "gradient", "no gradient", "shape", "nan"])
def test_a_wrong_variant_is_caught(what):
    variant = Variant(lambda: loss_step(functools.partial(spoil, what)))
    row = measure(with_peer(variant), rounds=1)["variants"]["peer"]
    assert set(row) == {"skipped"}
    assert "computes something else" in row["skipped"]
    with pytest.raises(AssertionError, match=r"kd_loss \(kd\) 5 x 7 float32: kdfast computes something else"):
        measure(with_peer(variant, OURS), rounds=1)


class Spoils(torch.optim.SGD):
    """Takes gradients for scratch, as torch-optimi does with those of 16 bits."""

    def step(self):
        super().step()
        for p in self.param_groups[0]["params"]:
            p.grad.zero_()


@pytest.mark.usefixtures("ceilings")
def test_a_wrong_optimizer_is_caught_and_spoils_nobodys_inputs():
    case = lion.case("one", [torch.Size([40])], torch.bfloat16)
    wrong = Variant(lambda: functools.partial(lion.optimizer_step, functools.partial(Spoils, lr=0.0, momentum=0.9)))
    rows = measure(replace(case, variants={"wrong": wrong, OURS: case.variants[OURS]}), rounds=1)["variants"]
    assert "computes something else" in rows["wrong"]["skipped"]
    assert rows[OURS]["value_error"] < 0.01


@pytest.mark.usefixtures("ceilings")
def test_another_optimizer_is_timed_and_not_called_wrong():
    case = lion.case("two", [torch.Size([3, 4]), torch.Size([5])])
    found = measure(case, only=("AdamW (fused)", OURS), rounds=1)
    row = found["variants"]["AdamW (fused)"]
    assert set(row) == {"call_ms", "speedup", "memory"}
    assert min(row["call_ms"], row["speedup"]) > 0
    assert f"| Lion | AdamW (fused) | 1 | {row['speedup']:.2f} |" in report.summary([report.Results("a CPU", "", [found])])
    compared = replace(case.variants["AdamW (fused)"], other=False)
    row = measure(replace(case, variants={"peer": compared, OURS: case.variants[OURS]}), rounds=1)["variants"]["peer"]
    assert "computes something else" in row["skipped"], "what is not compared must be something else"


@pytest.mark.usefixtures("ceilings")
def test_a_peer_that_cannot_run_says_why_and_ours_fails():
    def missing():
        import no_such_package_at_all

        return no_such_package_at_all

    def broken():
        raise RuntimeError("out of luck\nand more")

    for prepare, why in ((missing, "no_such_package_at_all is not installed"), (broken, "RuntimeError: out of luck")):
        assert measure(with_peer(Variant(prepare)), rounds=1)["variants"]["peer"] == {"skipped": why}
    assert measure(with_peer(Variant(broken, gpu=True)), rounds=1)["variants"]["peer"] == {"skipped": "needs a GPU"}
    with pytest.raises(RuntimeError, match="out of luck"):
        measure(with_peer(Variant(broken), OURS), rounds=1)


# ---- timing ----------------------------------------------------------------------------------------------------------


def test_variants_run_in_turn():
    order = []
    seconds = timing.in_turn({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, rounds=5, at_least=1e-9)
    assert "".join(order[-10:]) == "ababababab"
    assert [len(values) for values in seconds.values()] == [5, 5]
    assert timing.speedup([1.0, 2.0, 1.0], [3.0, 2.0, 2.0]) == 2


def test_peak_memory_counts_bytes_alive_at_once():
    def one_after_the_other():
        torch.ones(2**20).sum()
        torch.ones(2**20).sum()

    def together():
        return torch.ones(2**20) + torch.ones(2**20)

    assert timing.peak_memory(one_after_the_other) == pytest.approx(4 * 2**20, rel=0.01)
    assert timing.peak_memory(together) == pytest.approx(12 * 2**20, rel=0.01)


def test_device_times_or_the_reason_why_not(monkeypatch):
    case = distill_kl.case("kd", 5, 7)  # 420 bytes
    seen = []
    monkeypatch.setattr(timing, "cache_bytes", lambda: 1000)
    monkeypatch.setattr(timing, "device_seconds", lambda runs, rounds: seen.append(len(runs)) or 1e-3)
    monkeypatch.setattr(timing, "cold_seconds", lambda run, rounds: 2e-3)
    monkeypatch.setattr(timing, "launches", lambda run: Counter(_forward=1, _backward=1))
    assert harness.time_on_device(case, case.variants[OURS], 5) == {"device_ms": 1.0, "cold_ms": 2.0, "launches": 2}
    assert seen == [8], "sets of buffers, together three times the cache"

    def refuse(run):
        raise RuntimeError("operation not permitted when stream is capturing\nand so on")

    monkeypatch.setattr(timing, "launches", refuse)
    reason = {"device_skipped": "operation not permitted when stream is capturing"}
    assert harness.time_on_device(case, case.variants[OURS], 5) == reason


# ---- report ----------------------------------------------------------------------------------------------------------


def result(speedup: float, **more) -> dict:
    ours = {"call_ms": 2.0, "speedup": 1.0, "memory": 1_000_000, "value_error": 1e-7, "gradient_error": 2e-7, "floor_share": 0.5}
    eager = ours | {"call_ms": 2.0 * speedup, "speedup": speedup, "memory": 3_000_000}
    return {
        "operator": "kd_loss (lskd)",
        "case": "64 x 100",
        "shape": {"N": 64, "C": 100},
        "dtype": "float32",
        "bytes": 76_800,
        "operations": 179_200,
        "floor_ms": 0.004,
        "copy_bytes_per_s": 2e10,
        "dense_operations_per_s": 1e11,
        "variants": {EAGER: eager, COMPILED: {"skipped": "no compiler"}, "liger-kernel": {"skipped": "needs a GPU"}, OURS: ours},
    } | more


MACHINE = {"cpu": "a CPU", "threads": 1, "torch": "2.15", "python": "3.12", "packages": {"triton": "3.9"}}


def write(path: Path, *cases: dict) -> Path:
    path.write_text(json.dumps({"machine": MACHINE, "date": "2026-01-02", "cases": cases}))
    return path


def test_report_of_a_small_result(tmp_path, capsys):
    path = write(tmp_path / "x.json", result(3.0), result(0.5, case="8 x 10"))
    assert cli.main(["bench", "report", str(path), "--out", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "out" / "report.md")
    text = (tmp_path / "out" / "report.md").read_text()
    assert "| kd_loss (lskd) | eager | 2 | 0.50 | 1.75 | 3.00 | 1 |" in text
    assert "| kd_loss (lskd) | 64 x 100 | 2 | 3.00 | 50 % | 1 | 3 | 2e-07 |" in text
    assert "| kd_loss (lskd) | 8 x 10 | 2 | 0.50 |" in text, "a lost case is printed like the others"
    assert "torch.compile: no compiler (2 of 2 cases); liger-kernel: needs a GPU (2 of 2 cases)" in text
    assert text.count("a CPU, 1 thread, PyTorch 2.15, Python 3.12, 2026-01-02.\n") == 2
    assert text.count("With triton 3.9.") == 1
    results = [report.read(path)]
    for name, svg in report.figures(results).items():
        assert f"![{name}]({name}.svg)" in text
        assert (tmp_path / "out" / f"{name}.svg").read_text() == svg, "the same text every time, so without a date"
        assert "kd_loss (lskd)" in svg
        assert report.digest(results) in svg
    assert report.digest(results) != report.digest([report.read(write(tmp_path / "y.json", result(2.9)))])


def test_device_times_have_their_own_columns(tmp_path):
    case = result(3.0)
    for name, device_ms in ((EAGER, 8.0), (OURS, 1.0)):
        case["variants"][name] |= {"device_ms": device_ms, "cold_ms": device_ms + 0.25, "launches": 2}
    case["variants"]["torch.compile max-autotune"] = {"call_ms": 3.0, "speedup": 1.5}
    results = [report.read(write(tmp_path / "x.json", case))]
    assert "| 64 x 100 | 2 | 1 | 1.25 | 2 | 3.00 / 8.00 | 1.50 |" in report.table(results)
    assert "| kd_loss (lskd) | eager, device time | 1 | 8.00 |" in report.summary(results)


def test_results_are_read_from_every_program_that_writes_them(tmp_path):
    plain = report.read(write(tmp_path / "x.json", result(3.0)))
    benchmarks = [{"extra_info": result(3.0), "stats": {}}]
    pytest_file, gpu_file = tmp_path / "pytest.json", tmp_path / "gpu.json"
    pytest_file.write_text(json.dumps({"machine_info": MACHINE, "datetime": "2026-01-02T03:04:05", "benchmarks": benchmarks}))
    lines = [{"machine": MACHINE, "date": "2026-01-02"}, {"step": "tests", "status": "passed"}, result(3.0)]
    gpu_file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert report.read(pytest_file) == report.read(gpu_file) == plain


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"cases": [{"images": 3}]}', '{"benchmarks": [{}]}'])
def test_a_file_without_results_is_one_sentence(tmp_path, content, capsys):
    (tmp_path / "x.json").write_text(content)
    assert cli.main(["bench", "report", str(tmp_path / "x.json"), "--out", str(tmp_path / "out")]) == 1
    assert "x.json must hold results of" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_markers_are_filled_and_nothing_else():
    text = "a <!-- end -->\n<!-- table: cpu-summary -->\nold\n<!-- end -->\nb <!-- table: cpu -->\nold\n<!-- end -->"
    made = documents.fill_tables(text)
    assert "old" not in made
    assert made.startswith("a <!-- end -->\n<!-- table: cpu-summary -->\n| operator |")
    assert made.count("<!-- end -->") == 3
    assert documents.fill_tables(made) == made


# ---- commands --------------------------------------------------------------------------------------------------------


def test_bench_kernels(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(distill_kl, "SHAPES", {"cpu": {"quick": [(8, 10)], "usual": [(9, 10)]}})
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    out = tmp_path / "out.json"
    assert cli.main(["bench", "kernels", "--operators", "kd_loss", "--device", "cpu", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "kd_loss" in printed
    assert str(out) in printed.replace("\n", "")
    document = json.loads(out.read_text())
    assert {"torch", "cpu", "threads", "gpus", "packages"} <= document["machine"].keys()
    assert [case["operator"] for case in document["cases"]] == ["kd_loss (kd)", "kd_loss (lskd)"]
    for case in document["cases"]:
        assert set(case["variants"]) == {EAGER, COMPILED, OURS}
        assert not any(isinstance(x, float) and math.isnan(x) for row in case["variants"].values() for x in row.values())
    assert report.read(out).cases == document["cases"]


@pytest.mark.slow
def test_pytest_benchmarks_carries_everything(tmp_path):
    """The real thing on one small case: pytest, its plugin, torch.compile."""
    out = tmp_path / "out.json"
    command = [sys.executable, "-m", "pytest", "benchmarks", "--quick", "-k", "lskd and 64", f"--benchmark-json={out}"]
    command += ["-p", "no:cacheprovider", "-p", "no:xdist"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    document = json.loads(out.read_text())
    assert "node" not in document["machine_info"], "no host's name"
    (benchmark,) = document["benchmarks"]
    rows = benchmark["extra_info"]["variants"]
    assert set(rows) == {EAGER, COMPILED, "torch.compile max-autotune", OURS}
    assert rows[COMPILED].get("skipped") or rows[COMPILED]["call_ms"] > 0
    assert report.read(out).cases == [benchmark["extra_info"]]
