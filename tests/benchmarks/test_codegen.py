"""Code generation without a GPU: the harness sees what it should, and the kernels' launch plans hold its bars."""

import ast
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402

from kdfast.benchmarks import codegen  # noqa: E402
from kdfast.benchmarks.maintain.traffic import counted_traffic  # noqa: E402
from kdfast.benchmarks.timing import peak_memory  # noqa: E402
from kdfast.kernels import attention_map, distill_kl, nce, supcon  # noqa: E402
from kdfast.ops.supcon.op import Setting  # noqa: E402

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
compiles = pytest.mark.skipif(INTERPRETED, reason="TRITON_INTERPRET=1: kernels are not compiled")


@triton.jit
def _copy(x, y, C, stride, V: tl.constexpr, BLOCK: tl.constexpr):
    C, stride = C // V * V, stride // V * V
    at = tl.program_id(0) * stride + tl.arange(0, BLOCK)
    tl.store(y + at, tl.load(x + at, mask=tl.arange(0, BLOCK) < C), mask=tl.arange(0, BLOCK) < C)


@triton.jit
def _turn(x, y, BLOCK: tl.constexpr):
    across, down = tl.arange(0, BLOCK)[None, :], tl.arange(0, BLOCK)[:, None]
    tl.store(y + down * BLOCK + across, tl.trans(tl.load(x + down * BLOCK + across)))


@triton.jit
def _softmax(x, y, BLOCK: tl.constexpr):
    c = tl.arange(0, BLOCK)
    e = tl.load(x + c)
    e = tl.exp(e - tl.max(e, 0))
    tl.store(y + c, e / tl.sum(e, 0))


@triton.jit
def _product(x, y, steps, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    total = tl.zeros([BLOCK, BLOCK], tl.float32)
    for step in range(steps):
        tile = tl.load(x + step * BLOCK * BLOCK + at)
        total = tl.dot(tile, tl.trans(tile), total)
    tl.store(y + at, total)


@triton.jit
def _of_many_kinds(x, nested, one, sixteen, large, flag, number, C: tl.constexpr):
    if nested[0] is None:
        tl.store(x, tl.load(nested[1]) + tl.load(nested[2][0]) + nested[2][1] + one + sixteen + large + flag + number + C)


def code(target, function, *arguments, **options):
    """The recorded launch and what it compiles to."""
    with codegen.recorded() as launches:
        function[(1,)](*arguments, enable_fp_fusion=True, **options)
    (made,) = codegen.compiled(launches, target)
    return launches[0], made


def interpreted(expression):
    """What the expression prints in a process that interprets kernels; its names are those of this file."""
    program = f"from tests.benchmarks.test_codegen import *; print({expression})"
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", program], env=environment, cwd=root, capture_output=True, text=True)
    return (done.stdout or done.stderr).strip().splitlines()[-1]


# ---- the harness -----------------------------------------------------------------------------------------------------


@compiles
def test_launches_are_recorded_and_not_run():
    x, y = torch.ones(3, 8), torch.zeros(3, 8)
    with codegen.recorded() as launches:
        _copy[(3,)](x, y, 8, 8, V=4, BLOCK=8, num_warps=2)
    assert not y.any()
    assert launches[0].grid == (3,)
    assert launches[0].options == {"V": 4, "BLOCK": 8, "num_warps": 2}
    assert launches[0].plan == {"V": 4, "BLOCK": 8, "warps": 2}
    assert [name for name, _ in launches[0].tensors()] == ["x", "y"]


@compiles
def test_cases_of_one_call_share_its_recording():
    calls = []

    def launch():
        x = torch.zeros(64)
        calls.append(_copy[(1,)](x, x, 64, 64, V=4, BLOCK=64))
        _softmax[(1,)](x, x, BLOCK=64)

    cases = [codegen.Case("any", 1, 64, "fp32", "", launch, 1, 1, function) for function in ("_softmax", "_copy", None)]
    assert [made.function.__name__ for made in codegen._launches(cases)] == ["_softmax", "_copy", "_copy"]
    assert len(calls) == 1


@compiles
def test_arguments_are_specialized_as_in_a_launch():
    x, y = torch.zeros(2, 2048)
    # V = 1 hides nothing: what the compiler knows here, it knows from the values of the arguments
    assert code("sm_90", _copy, x, y, 1024, 1024, V=1, BLOCK=1024)[1].widths == {"x": 128, "y": 128}
    assert code("sm_90", _copy, x, y, 1024, 1000, V=1, BLOCK=1024)[1].widths == {"x": 32, "y": 32}
    assert code("sm_90", _copy, x[1:], y, 1024, 1024, V=1, BLOCK=1024)[1].widths == {"x": 32, "y": 128}


@compiles
@pytest.mark.parametrize("target", codegen.TARGETS)
def test_arguments_of_all_kinds_compile(target):
    x, labels = torch.zeros(64), torch.zeros(64, dtype=torch.int64)
    launch, made = code(target, _of_many_kinds, x, (None, labels, (x, 1)), 1, 32, 2**40, True, 0.5, C=7)
    assert [name for name, _ in launch.tensors()] == ["x", "nested[1]", "nested[2][0]"]
    assert made.widths in ({"x": 32, "nested[1]": 64, "nested[2][0]": 32}, {})
    assert codegen.problems(launch, made, target) == []


@compiles
def test_fusion_must_be_stated():
    x = torch.zeros(64)
    with codegen.recorded() as launches:
        _copy[(1,)](x, x.clone(), 64, 64, V=4, BLOCK=64)
    (made,) = codegen.compiled(launches, "sm_90")
    assert codegen.problems(launches[0], made, "sm_90") == ["does not state enable_fp_fusion, whose default differs between releases"]


@compiles
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
def test_rows_in_small_pieces_are_seen(target):
    x = torch.zeros(3, 1000)
    launch, made = code(target, _copy, x, x.clone(), 1000, 1000, V=1, BLOCK=1024)
    assert made.loads == {32: 8}
    assert made.stores == {32: 8}
    assert made.widths == {"x": 32, "y": 32}
    assert codegen.problems(launch, made, target) == [f"{name} is accessed 32 bits at a time, its rows allow 128" for name in "xy"]
    launch, made = code(target, _copy, x, x.clone(), 1000, 1000, V=4, BLOCK=1024)
    assert made.loads == made.stores == {128: 2}
    assert codegen.problems(launch, made, target) == []


@compiles
@pytest.mark.parametrize(("C", "dtype", "bits"), [(10, torch.float32, 64), (1001, torch.float32, 32), (1001, torch.bfloat16, 16)])
def test_rows_that_allow_no_more_are_in_order(C, dtype, bits):
    x = torch.zeros(3, C, dtype=dtype)
    launch, made = code("sm_90", _copy, x, x.clone(), C, C, V=2 - C % 2, BLOCK=2048)
    assert made.widths == {"x": bits, "y": bits}
    assert codegen.problems(launch, made, "sm_90") == []


@compiles
@pytest.mark.parametrize("target", codegen.TARGETS)
def test_spills_are_seen(target):
    x, y = torch.zeros(2, 2**17)
    launch, made = code(target, _softmax, x, y, BLOCK=2**17, num_warps=16)
    assert made.spilled > 100
    assert codegen.problems(launch, made, target) == [f"spills {made.spilled} bytes a thread"]
    launch, made = code(target, _softmax, x, y, BLOCK=2**10, num_warps=4)
    assert made.spilled == 0
    assert made.registers < 64
    assert codegen.problems(launch, made, target) == []


@compiles
@pytest.mark.parametrize("target", codegen.TARGETS)
def test_too_much_shared_memory_is_seen(target):
    x, y = torch.zeros(2, 512 * 512)
    launch, made = code(target, _turn, x, y, BLOCK=512, num_warps=32)
    assert made.shared > codegen.SHARED_LIMIT[target]
    assert any("bytes of shared memory" in problem for problem in codegen.problems(launch, made, target))
    launch, made = code(target, _turn, x, y, BLOCK=64)
    assert 64 * 64 <= made.shared <= codegen.SHARED_LIMIT[target]
    assert codegen.problems(launch, made, target) == []


@compiles
@pytest.mark.parametrize(("target", "name"), [("sm_80", "HMMA"), ("sm_90", "HGMMA"), ("sm_100", "UTCHMMA"), ("gfx942", "v_mfma")])
def test_tensor_cores_are_seen(target, name):
    x = torch.zeros(64 * 64, dtype=torch.bfloat16)
    _, made = code(target, _product, x, x.float(), 5, BLOCK=64)
    assert set(made.products) == {name}
    assert set(made.loads) == {128}, "loads that go to shared memory at once count as well"
    assert made.widths in ({"x": 128, "y": 128}, {})
    assert not code(target, _turn, x, x.clone(), BLOCK=64)[1].products


def test_an_interpreting_process_is_refused():
    assert interpreted("codegen.measure([], 'sm_90')").endswith("it cannot in a process started with TRITON_INTERPRET=1: unset it")


# ---- bytes -----------------------------------------------------------------------------------------------------------


def copied(N, C, dtype):
    """Bytes that a copy of N rows of C elements reads and writes."""
    x = torch.randn(N, C).to(dtype)
    y = torch.zeros_like(x)
    with counted_traffic() as traffic:
        _copy[(N,)](x, y, C, C, V=1, BLOCK=triton.next_power_of_2(C))
    assert torch.equal(x, y)
    return traffic.read, traffic.written


def moved():
    """The bytes that distill_kl's launches ask for, case by case, and those predicted."""
    for C in (10, 1000, 9000):
        cases = [codegen.distill_kl_case(C, variant, torch.float32, torch.float32) for variant in codegen.VARIANTS]
        cases += [codegen.distill_kl_case(C, "lskd+ce", torch.float32, torch.bfloat16), codegen.rescale_case(C, torch.bfloat16)]
        for case in cases:
            with counted_traffic() as traffic:
                case.launch()
            yield C, case.variant, traffic.read + traffic.written, case.moved


def test_a_copy_moves_every_element_twice():
    assert interpreted("copied(3, 1000, torch.float32), copied(5, 7, torch.bfloat16)") == "(12000, 12000) (70, 70)"


def test_bytes_cannot_be_counted_in_compiled_kernels():
    if INTERPRETED:
        pytest.skip("TRITON_INTERPRET=1: kernels are not compiled")
    with pytest.raises(RuntimeError, match="counted_traffic needs a process started with TRITON_INTERPRET=1"), counted_traffic():
        pass


def test_distillation_moves_the_predicted_bytes():
    beside = 32 * codegen.ROWS  # labels, losses and other single numbers of a row
    for C, variant, measured, predicted in ast.literal_eval(interpreted("list(moved())")):
        # on long rows the cross-entropy loads the student's step again, which the compiler makes one load with the first
        merged = 4 * codegen.ROWS * C if C > 8192 and variant.startswith("lskd+ce") else 0
        assert predicted + merged <= measured <= predicted + merged + beside, f"{C}, {variant}"


def multiplied(N, D):
    """The operations of the products that a step of supcon_loss makes on N rows of D features, and those predicted."""
    features, names, others = torch.randn(N, D), torch.arange(N) % 3, torch.zeros(0, D)
    setting = Setting(0.5, 1.0, 1, False, False)
    with counted_traffic() as traffic:
        kept = supcon.forward(features, others, names, None, setting)[1]
        supcon.backward(torch.ones(N), features, others, names, None, kept, setting, False)
    return traffic.operations, sum(supcon.operations(N, D, supcon.plans(N, D, features.dtype, "ieee", False).slice))


def moved_by_attention():
    """The bytes that the launches of a training step of attention maps ask for, stage by stage, and those predicted and the least."""
    for maps in (
        codegen.Maps(16, 9, 7),
        codegen.Maps(70, 8, 8, True, torch.bfloat16),
        codegen.Maps(300, 3, 5, False, torch.float16, 2.5),
        codegen.Maps(2, 70, 61, True),
    ):
        energies, gradients, compared = codegen.attention_map_stage(maps, ("_energies", "_gradients", "_compare"))
        with counted_traffic() as traffic:
            energies.launch()
        made = traffic.read + traffic.written
        yield made, 2 * energies.moved + compared.moved + gradients.moved, 2 * energies.floor + gradients.floor


def test_attention_maps_move_the_predicted_bytes():
    for measured, predicted, least in ast.literal_eval(interpreted("list(moved_by_attention())")):
        beside = 4 * codegen.IMAGES + 4 * 1000  # the losses of images; the upstream gradient, which every program reads
        assert predicted <= measured <= predicted + beside
        assert least < predicted


@pytest.mark.parametrize(("D", "most"), [(64, 6), (128, 6), (256, 8)])
def test_contrastive_loss_makes_the_predicted_operations(D, most):
    """D = 256 in float32 is made in two slices."""
    made, predicted = ast.literal_eval(interpreted(f"multiplied(192, {D})"))
    assert made == predicted == most * 192**2 * D


def gathered(B, K, D, with_gradient, dtype=torch.float32, bank_dtype=torch.float32):
    """Bytes that a walk over K negatives and its sums ask for, and those predicted."""
    anchors, bank, indices = torch.zeros(B, D, dtype=dtype), torch.zeros(50, D, dtype=bank_dtype), torch.zeros(B, 1 + K, dtype=torch.int64)
    with counted_traffic() as traffic:
        nce.loss_and_gradient(anchors, bank, indices, torch.ones(()), 0.07, 0.0, 0.0, with_gradient)
    split, _ = nce.parts(B, 1 + K, nce.plan(D)[0])
    # the launch that adds up reads what the walk wrote, and writes loss and gradient
    sums = 4 * B * split * (1 + D * with_gradient) + 4 + 4 * B * D * with_gradient
    return traffic.read + traffic.written, codegen.nce_bytes(B, K, D, dtype, bank_dtype, with_gradient) + sums


@pytest.mark.parametrize(
    "arguments", ["3, 300, 16, True", "3, 300, 100, False", "2, 40, 300, True", "2, 40, 16, True, torch.float32, torch.bfloat16"]
)
def test_noise_contrast_reads_every_gathered_row_once(arguments):
    made, predicted = ast.literal_eval(interpreted(f"gathered({arguments})"))
    assert made == predicted


def asked_for_a_constant(known):
    """Bytes that the normalizer reads where it is given this constant, of the floor of a walk."""
    anchors, bank, indices = torch.zeros(3, 16), torch.zeros(50, 16), torch.zeros(3, 301, dtype=torch.int64)
    with counted_traffic() as traffic:
        nce.normalizer(anchors, bank, indices, torch.tensor(known), 0.07)
    return traffic.read / codegen.nce_floor(3, 300, 16, torch.float32)


def test_a_settled_constant_costs_no_walk():
    assert float(interpreted("asked_for_a_constant(-1.0)")) > 1
    assert float(interpreted("asked_for_a_constant(5.0)")) < 0.02


# ---- kernels ---------------------------------------------------------------------------------------------------------


@compiles
def test_every_plan_of_distillation_has_a_case():
    with codegen.recorded() as launches:
        for case in codegen.distill_kl_cases():
            case.launch()
    launched = {(plan.get("ROWS", 1), plan["BLOCK"], plan["warps"]) for plan in (launch.plan for launch in launches)}
    assert launched == {distill_kl.plan(C, heavy) for C in range(1, 2**18) for heavy in (False, True)}


def of_interest(case):
    """What has been seen to spill or to load in small pieces, in every plan."""
    if case.dtypes != "fp32":
        return case.C in (8192, 32000) and case.variant in ("lskd+ce", "mutual js")
    if case.C in (1024, 131072):  # plans that 1000 and 32000 have too
        return False
    return case.variant in ("lskd+ce, 5 teachers", "rescale") or (case.C >= 1000 and case.variant == "mutual js")


CASES = [case for case in codegen.distill_kl_cases() if of_interest(case)]


@compiles
@pytest.mark.parametrize("target", ["sm_90", "sm_100"])
@pytest.mark.parametrize("C", sorted({case.C for case in CASES}))
def test_distillation_holds_the_bars(target, C):
    for entry in codegen.measure([case for case in CASES if case.C == C], target):
        assert not entry["problems"], f"{entry['dtypes']}, {entry['variant']}, {entry['plan']}: {'; '.join(entry['problems'])}"


@compiles
@pytest.mark.parametrize("C", [1000, 32000])
def test_instructions_ask_for_the_predicted_bytes(C):
    variants = ("kd", "lskd+ce", "lskd+ce, no gradient", "reverse", "mutual js")
    cases = [codegen.distill_kl_case(C, variant, torch.float32, torch.float32) for variant in variants]
    for entry in codegen.measure(cases, "sm_90"):
        plan = entry["plan"]
        wide = entry["loads"][128] + entry["stores"].get(128, 0)  # numbers of a row are narrower
        step = wide * 16 * 32 * plan["warps"]  # bytes
        assert step * entry["N"] * C == entry["bytes_moved"] * plan.get("ROWS", 1) * plan["BLOCK"], entry["variant"]


def supcon_of_interest(target):
    """Every plan once, in the variant that fills its registers most."""
    fp32, bf16 = torch.float32, torch.bfloat16
    for N, D, variant, dtype in [
        *((8192, D, "labels", bf16) for D in (64, 128, 256, 512, 2048)),
        *((1024, D, "normalize, 2 views", bf16) for D in (128, 256)),
        *((8192, D, "mask, queue", bf16) for D in (128, 512)),
        *((8192, D, "labels, tf32", fp32) for D in (128, 512)),
        (8192, 128, "labels", fp32),
    ]:
        yield from codegen.supcon_step(target, N, D, variant, dtype)
    yield from codegen.supcon_step(target, 8192, 128, "labels", bf16, ("_first_of_name", "_losses", "_shares"))
    yield from codegen.supcon_step(target, 8192, 128, "normalize, 2 views", bf16, ("_prepare", "_finish"))


@compiles
@pytest.mark.parametrize(("target", "product"), [("sm_90", "HGMMA"), ("sm_100", "UTCHMMA")])
@pytest.mark.parametrize("half", [0, 1])
def test_contrastive_loss_holds_the_bars(target, product, half):
    for entry in codegen.measure(list(supcon_of_interest(target))[half::2], target):
        name = f"{entry['function']}, D {entry['C']} {entry['dtypes']}, {entry['variant']}, {entry['plan']}"
        assert not entry["problems"], f"{name}: {'; '.join(entry['problems'])}"
        walks = entry["function"] in ("_denominators", "_gradients")
        exact = entry["dtypes"] == "fp32" and "tf32" not in entry["variant"]
        assert set(entry["products"]) == ({product} if walks and not exact else set()), name
        if entry["dtypes"] == "bf16" and "mask" not in entry["variant"] and entry["C"] <= 256:
            assert entry["bytes_moved"] == entry["bytes_floor"], f"{name}: more than 6 N^2 D operations"


@compiles
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("N", [8192, 32768])
def test_contrastive_loss_takes_little_memory(N, normalize, monkeypatch):
    """What the launchers allocate beyond the features and their gradient: KERNELS.md allows 4 N D b + 64 N bytes."""
    D, dtype = 128, torch.bfloat16
    features, others, names = torch.zeros(N, D, dtype=dtype), torch.zeros(0, D, dtype=dtype), torch.zeros(N, dtype=torch.int64)
    setting, upstream = Setting(0.07, 1.0, 1, False, normalize), torch.ones(N)
    monkeypatch.setattr(triton.JITFunction, "run", lambda *_, **__: None)

    def step():
        kept = supcon.forward(features, others, names, None, setting)[1]
        return supcon.backward(upstream, features, others, names, None, kept, setting, False)

    assert 0 < peak_memory(step) - features.nbytes < 4 * features.nbytes + 64 * N


@compiles
def test_every_plan_of_noise_contrast_has_a_case():
    with codegen.recorded() as launches:
        for case in codegen.nce_cases():
            case.launch()
    launched = {(plan["ROWS"], plan["WIDTH"], plan["warps"]) for plan in (x.plan for x in launches) if "ROWS" in plan}
    assert launched == {nce.plan(D) for D in range(4, nce.WIDEST + 1)}


@compiles
@pytest.mark.parametrize("target", ["sm_90", "sm_100"])
@pytest.mark.parametrize("part", range(4))
def test_noise_contrast_holds_the_bars(target, part):
    """No spills, and rows gathered 128 bits at a time wherever they allow it, which `problems` asks of every tensor of rows."""
    for entry in codegen.measure(list(codegen.nce_cases())[part::4], target):
        name = f"D {entry['C']} {entry['dtypes']}, {entry['variant']}, {entry['plan']}"
        assert not entry["problems"], f"{name}: {'; '.join(entry['problems'])}"
        assert not entry["products"], name
        if entry["function"] in ("_losses", "_exponentials") and entry["C"] > 8:  # of so few an address is handed on in shared memory
            size = 2 if entry["dtypes"].endswith("bf16") else 4
            assert entry["widths"]["bank"] == 8 * math.gcd(16, entry["C"] * size), name
            assert entry["bytes_moved"] < 1.005 * entry["bytes_floor"], name


@compiles
def test_noise_contrast_takes_little_memory(monkeypatch):
    """What the launcher allocates, where the gathered rows are 537 MB."""
    B, K, D = codegen.NCE_SHAPE[0], codegen.NCE_SHAPE[1], 128
    anchors, bank, indices = torch.zeros(B, D), torch.empty(50_000, D), torch.zeros(B, 1 + K, dtype=torch.int64)
    monkeypatch.setattr(triton.JITFunction, "run", lambda *_, **__: None)
    split, _ = nce.parts(B, 1 + K, nce.plan(D)[0])
    Z = torch.ones(())
    memory = peak_memory(lambda: nce.loss_and_gradient(anchors, bank, indices, Z, 0.07, 0.0, 0.0, True))
    assert 0 < memory <= 4 * (B * split * (D + 1) + B * D + 1) < 2**20


@compiles
@pytest.mark.parametrize("target", ["sm_90", "sm_100"])
@pytest.mark.parametrize("momentum", ["fp32", "bf16", "fp16", "int8"])
def test_the_lion_step_holds_the_bars(target, momentum):
    """No spills, and 128 bits at a time in whole blocks, in every dtype and rounding."""
    for entry in codegen.measure([case for case in codegen.lion_cases(target) if case.dtypes.endswith(momentum)], target):
        assert not entry["problems"], f"{entry['dtypes']}, {entry['variant']}, {entry['function']}: {'; '.join(entry['problems'])}"


@compiles
def test_every_plan_of_attention_maps_has_a_case():
    with codegen.recorded() as launches:
        for case in codegen.attention_map_cases():
            case.launch()
    made = [launch.plan for launch in launches]
    tiles = {(p["PIXELS"], p["CHANNELS"], p["warps"]) for p in made if "PIXELS" in p}
    for channels_last in (False, True):
        for C in range(16, 2049):
            for P in (33, 49, 196, 256, 3136, 12544):
                for itemsize in (2, 4):
                    assert attention_map.plan(C, P, channels_last, itemsize, math.gcd(8, C if channels_last else P)) in tiles
    compared = {(p["BLOCK"], p["warps"]) for p in made if "BLOCK" in p}
    assert compared >= {attention_map.compare_plan(P) for P in (1, 49, 64, 196, 784, 1024, 3136, 12544)}


def attention_of_interest(half):
    """Tiles of every kind, and a power that needs logarithms."""
    for C, H, W in ((16, 32, 32), (64, 56, 56), (1024, 14, 14), (2048, 7, 7), (17, 9, 7)):
        for dtype in (torch.float32, torch.bfloat16):
            yield from codegen.attention_map_stage(codegen.Maps(C, H, W, half, dtype), ("_energies", "_gradients"))
    yield from codegen.attention_map_stage(codegen.Maps(256, 28, 28, half, torch.float16, 2.5), ("_energies", "_gradients"))
    for side in (7, 14, 112):
        yield from codegen.attention_map_stage(codegen.Maps(16, side, side, half), ("_compare",))


@compiles
@pytest.mark.parametrize("target", ["sm_90", "sm_100"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_attention_maps_hold_the_bars(target, channels_last):
    """No spills, and 128 bits at a time where the maps allow it, of the features and of their gradients."""
    for entry in codegen.measure(list(attention_of_interest(channels_last)), target):
        name = f"{entry['function']}, {entry['C']} {entry['dtypes']}, {entry['variant']}, {entry['plan']}"
        assert not entry["problems"], f"{name}: {'; '.join(entry['problems'])}"
        assert entry["spilled"] == 0, name
        if entry["variant"].startswith("56 x 56"):
            assert entry["widths"]["features"] == entry["widths"].get("gradients", 128) == 128, name


@compiles
def test_too_few_wide_accesses_are_seen():
    (case,) = codegen.lion_launches("sm_90", "plain", torch.float32, torch.float32, torch.float32)
    (entry,) = codegen.measure([case._replace(wide=(7, 5))], "sm_90")
    assert entry["problems"] == ["has 6 loads of 128 bits, a whole block needs 7", "has 4 stores of 128 bits, a whole block needs 5"]


@compiles
def test_lion_keeps_numbers_too_small_for_a_normal_float(monkeypatch):
    """Nothing is flushed to 0: no instruction of the step says .ftz."""
    (case,) = codegen.lion_launches("sm_90", "plain", torch.float32, torch.float32, torch.float32)
    with codegen.recorded() as launches:
        case.launch()
    texts = []
    monkeypatch.setattr(codegen, "_nvidia", lambda kernel: texts.append(kernel.asm["ptx"]))
    codegen.compiled(launches, "sm_90")
    assert "fma.rn.f32" in texts[0]
    assert ".ftz" not in texts[0]


@compiles
@pytest.mark.parametrize("target", ["sm_80", "gfx942"])
def test_other_targets_compile(target):
    cases = [codegen.distill_kl_case(C, "lskd+ce", torch.float32, torch.float32) for C in (10, 1000, 32000)]
    for D, variant, dtype in ((128, "labels", torch.bfloat16), (512, "mask, queue", torch.bfloat16), (128, "labels, tf32", torch.float32)):
        cases += codegen.supcon_step(target, 8192, D, variant, dtype)
    for dtypes in ((torch.float32,) * 3, (torch.bfloat16,) * 3, (torch.bfloat16, torch.bfloat16, torch.int8)):
        cases += codegen.lion_launches(target, "plain", *dtypes)
    for maps in (codegen.Maps(64, 56, 56, True), codegen.Maps(256, 28, 28, False, torch.bfloat16, 2.5)):
        cases += codegen.attention_map_stage(maps, ("_energies", "_compare", "_gradients"))
    cases += [codegen.nce_case(D, torch.float32, torch.float32, "_losses") for D in (16, 101, 128, 512)]
    for entry in codegen.measure(cases, target):
        assert not entry["problems"], entry


@compiles
def test_the_table_and_the_json(tmp_path, monkeypatch, capsys):
    cases = [codegen.distill_kl_case(1000, "kd", torch.float32, torch.bfloat16), codegen.rescale_case(1000, torch.float32)]
    monkeypatch.setattr(codegen, "distill_kl_cases", lambda: iter(cases))
    monkeypatch.setattr(codegen, "supcon_cases", lambda target: iter(()))
    monkeypatch.setattr(codegen, "nce_cases", lambda: iter(()))
    monkeypatch.setattr(codegen, "lion_cases", lambda target: iter(()))
    monkeypatch.setattr(codegen, "attention_map_cases", lambda: iter(()))
    codegen.run(codegen.Codegen(targets=("sm_90",), out=tmp_path / "codegen.json"))
    printed = capsys.readouterr().out
    assert "1000 fp32 bf16, kd" in printed
    assert "2 kernels compiled, 0 with a problem" in printed
    written = json.loads((tmp_path / "codegen.json").read_text())
    assert written["machine"]["triton"] == triton.__version__
    kd, rescale = written["cases"]
    assert kd["bytes_floor"] == codegen.ROWS * 1000 * (4 + 2 + 4)
    assert rescale["bytes_moved"] == rescale["bytes_floor"] == codegen.ROWS * 1000 * 8
    assert kd["loads"]["128"] > 0


@compiles
def test_the_table_says_what_is_wrong(monkeypatch, capsys):
    def launch():
        _copy[(5,)](*torch.zeros(2, 5, 1000), 1000, 1000, V=1, BLOCK=1024, enable_fp_fusion=True)

    case = codegen.Case("copy", 5, 1000, "fp32", "unhinted", launch, 40000, 40000)
    monkeypatch.setattr(codegen, "distill_kl_cases", lambda: iter([case]))
    monkeypatch.setattr(codegen, "supcon_cases", lambda target: iter(()))
    monkeypatch.setattr(codegen, "nce_cases", lambda: iter(()))
    monkeypatch.setattr(codegen, "lion_cases", lambda target: iter(()))
    monkeypatch.setattr(codegen, "attention_map_cases", lambda: iter(()))
    codegen.run(codegen.Codegen(targets=("sm_90",)))
    printed = capsys.readouterr().out
    assert "sm_90, C 1000 fp32, unhinted: x is accessed 32 bits at a time, its rows allow 128; y is" in printed
    assert "1 kernels compiled, 1 with a problem" in printed
