"""Code generation without a GPU: problems of machine code are found, and the kernels' launch plans have none."""

import json
import math
import os
from types import SimpleNamespace

import pytest
import torch

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402

from kdfast.benchmarks import attention_map as attention_maps  # noqa: E402
from kdfast.benchmarks import binaries, codegen, operators  # noqa: E402
from kdfast.benchmarks import distill_kl as distillation  # noqa: E402
from kdfast.benchmarks import lion as lion_steps  # noqa: E402
from kdfast.benchmarks import nce as noise_contrast  # noqa: E402
from kdfast.benchmarks import supcon as contrastive  # noqa: E402
from kdfast.benchmarks.harness import Launch  # noqa: E402
from kdfast.benchmarks.maintain.traffic import counted_traffic  # noqa: E402
from kdfast.benchmarks.timing import peak_memory  # noqa: E402
from kdfast.kernels import attention_map, distill_kl, nce, supcon  # noqa: E402
from kdfast.ops.supcon.op import Setting  # noqa: E402

FP32, BF16 = torch.float32, torch.bfloat16
PRODUCTS = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA", "gfx942": "v_mfma"}  # tensor-core instructions
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
compiles = pytest.mark.skipif(INTERPRETED, reason="TRITON_INTERPRET=1: kernels are not compiled")
FAR = [pytest.param(target, marks=pytest.mark.slow) for target in ("sm_80", "sm_100")]


def interprets(test):
    """A test that counts what interpreted kernels do."""
    return pytest.mark.kernels(pytest.mark.skipif(not INTERPRETED, reason="bytes are counted with TRITON_INTERPRET=1 only")(test))


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
    with binaries.record_launches() as launches:
        function[(1,)](*arguments, enable_fp_fusion=True, **options)
    (made,) = binaries.compile_launches(launches, target)
    return launches[0], made


# ---- the harness -----------------------------------------------------------------------------------------------------


@compiles
def test_launches_are_recorded_and_not_run():
    x, y = torch.ones(3, 8), torch.zeros(3, 8)
    with binaries.record_launches() as launches:
        _copy[(3,)](x, y, 8, 8, V=4, BLOCK=8, num_warps=2)
    assert not y.any()
    assert launches[0].grid == (3,)
    assert launches[0].options == {"V": 4, "BLOCK": 8, "num_warps": 2}
    assert launches[0].plan == {"V": 4, "BLOCK": 8, "warps": 2}
    assert [name for name, _ in launches[0].tensors()] == ["x", "y"]


@compiles
def test_launches_of_one_call_share_its_recording():
    calls = []

    def launch():
        x = torch.zeros(64)
        calls.append(_copy[(1,)](x, x, 64, 64, V=4, BLOCK=64))
        _softmax[(1,)](x, x, BLOCK=64)

    launches = [Launch("any", 1, 64, "fp32", "", launch, 1, 1, function) for function in ("_softmax", "_copy", None)]
    assert [made.function.__name__ for made in codegen.record(launches)] == ["_softmax", "_copy", "_copy"]
    assert len(calls) == 1


@compiles
def test_arguments_are_specialized_as_in_a_launch():
    x, y = torch.zeros(2, 2048)
    # V = 1 hides nothing: what the compiler knows here, it knows from the values of the arguments
    assert code("sm_90", _copy, x, y, 1024, 1024, V=1, BLOCK=1024)[1].widths == {"x": 128, "y": 128}
    assert code("sm_90", _copy, x, y, 1024, 1000, V=1, BLOCK=1024)[1].widths == {"x": 32, "y": 32}
    assert code("sm_90", _copy, x[1:], y, 1024, 1024, V=1, BLOCK=1024)[1].widths == {"x": 32, "y": 128}


@compiles
@pytest.mark.parametrize("target", ["sm_90", "gfx942", *FAR])
def test_arguments_of_all_kinds_compile(target):
    x, labels = torch.zeros(64), torch.zeros(64, dtype=torch.int64)
    launch, made = code(target, _of_many_kinds, x, (None, labels, (x, 1)), 1, 32, 2**40, True, 0.5, C=7)
    assert [name for name, _ in launch.tensors()] == ["x", "nested[1]", "nested[2][0]"]
    assert made.widths in ({"x": 32, "nested[1]": 64, "nested[2][0]": 32}, {})
    assert binaries.find_problems(launch, made, target) == []


@compiles
def test_fusion_must_be_stated():
    x = torch.zeros(64)
    with binaries.record_launches() as launches:
        _copy[(1,)](x, x.clone(), 64, 64, V=4, BLOCK=64)
    (made,) = binaries.compile_launches(launches, "sm_90")
    assert binaries.find_problems(launches[0], made, "sm_90") == ["does not state enable_fp_fusion, whose default differs between releases"]


@compiles
@pytest.mark.parametrize("target", ["sm_90", *FAR])
def test_rows_in_small_pieces_are_seen(target):
    x = torch.zeros(3, 1000)
    launch, made = code(target, _copy, x, x.clone(), 1000, 1000, V=1, BLOCK=1024)
    assert made.loads == {32: 8}
    assert made.stores == {32: 8}
    assert made.widths == {"x": 32, "y": 32}
    assert binaries.find_problems(launch, made, target) == [f"{name} is accessed 32 bits at a time, its rows allow 128" for name in "xy"]
    launch, made = code(target, _copy, x, x.clone(), 1000, 1000, V=4, BLOCK=1024)
    assert made.loads == made.stores == {128: 2}
    assert binaries.find_problems(launch, made, target) == []


@compiles
@pytest.mark.parametrize(("C", "dtype", "bits"), [(10, torch.float32, 64), (1001, torch.float32, 32), (1001, torch.bfloat16, 16)])
def test_narrow_rows_are_no_problem(C, dtype, bits):
    x = torch.zeros(3, C, dtype=dtype)
    launch, made = code("sm_90", _copy, x, x.clone(), C, C, V=2 - C % 2, BLOCK=2048)
    assert made.widths == {"x": bits, "y": bits}
    assert binaries.find_problems(launch, made, "sm_90") == []


@compiles
@pytest.mark.parametrize(
    ("target", "block", "options"),
    [
        pytest.param("sm_90", 2**12, {"num_warps": 4, "maxnreg": 24}, id="sm_90, few registers"),
        *(pytest.param(target, 2**17, {"num_warps": 16}, marks=pytest.mark.slow, id=target) for target in binaries.TARGETS),
    ],
)
def test_spills_are_seen(target, block, options):
    x, y = torch.zeros(2, block)
    launch, made = code(target, _softmax, x, y, BLOCK=block, **options)
    assert made.spilled > 24
    assert binaries.find_problems(launch, made, target) == [f"spills {made.spilled} bytes a thread"]
    launch, made = code(target, _softmax, x, y, BLOCK=2**10, num_warps=4)
    assert made.spilled == 0
    assert made.registers < 64
    assert binaries.find_problems(launch, made, target) == []


@compiles
@pytest.mark.parametrize("target", ["gfx942", pytest.param("sm_90", marks=pytest.mark.slow), *FAR])
def test_too_much_shared_memory_is_seen(target):
    x, y = torch.zeros(2, 512 * 512)
    launch, made = code(target, _turn, x, y, BLOCK=512, num_warps=32)
    assert made.shared > binaries.SHARED_LIMIT[target]
    assert any("bytes of shared memory" in problem for problem in binaries.find_problems(launch, made, target))
    launch, made = code(target, _turn, x, y, BLOCK=64)
    assert 64 * 64 <= made.shared <= binaries.SHARED_LIMIT[target]
    assert binaries.find_problems(launch, made, target) == []


@compiles
@pytest.mark.parametrize("target", ["sm_90", "gfx942", *FAR])
def test_tensor_cores_are_seen(target):
    x = torch.zeros(64 * 64, dtype=torch.bfloat16)
    _, made = code(target, _product, x, x.float(), 5, BLOCK=64)
    assert set(made.products) == {PRODUCTS[target]}
    assert set(made.loads) == {128}, "loads that go to shared memory at once count as well"
    assert made.widths in ({"x": 128, "y": 128}, {})
    assert not code(target, _turn, x, x.clone(), BLOCK=64)[1].products


def test_an_interpreting_process_is_refused(monkeypatch):
    monkeypatch.setattr(binaries.knobs.runtime, "interpret", True)
    with pytest.raises(RuntimeError, match="it cannot in a process started with TRITON_INTERPRET=1: unset it"):
        codegen.measure([], "sm_90")


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
    """The bytes that distill_kl's launches ask for, one by one, and the predicted bytes."""
    for C in (10, 1000, 9000):
        launches = [distillation.launch(C, request, torch.float32, torch.float32) for request in distillation.REQUESTS]
        launches += [distillation.launch(C, "lskd+ce", torch.float32, torch.bfloat16), distillation.rescale_launch(C, torch.bfloat16)]
        for launch in launches:
            with counted_traffic() as traffic:
                launch.call()
            yield C, launch.variant, traffic.read + traffic.written, launch.moved


@interprets
def test_a_copy_moves_every_element_twice():
    assert (copied(3, 1000, torch.float32), copied(5, 7, torch.bfloat16)) == ((12000, 12000), (70, 70))


@compiles
def test_bytes_cannot_be_counted_in_compiled_kernels():
    with pytest.raises(RuntimeError, match="counted_traffic needs a process started with TRITON_INTERPRET=1"), counted_traffic():
        pass


@interprets
def test_distillation_moves_the_predicted_bytes():
    beside = 32 * distillation.ROWS  # labels, losses and other single numbers of a row
    for C, variant, measured, predicted in moved():
        # on long rows the cross-entropy loads the student's step again, which the compiler makes one load with the first
        merged = 4 * distillation.ROWS * C if C > 8192 and variant.startswith("lskd+ce") else 0
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
        attention_maps.Maps(16, 9, 7),
        attention_maps.Maps(70, 8, 8, True, torch.bfloat16),
        attention_maps.Maps(300, 3, 5, False, torch.float16, 2.5),
        attention_maps.Maps(2, 70, 61, True),
    ):
        energies, gradients, compared = attention_maps.stage_launches(maps, ("_energies", "_gradients", "_compare"))
        with counted_traffic() as traffic:
            energies.call()
        made = traffic.read + traffic.written
        yield made, 2 * energies.moved + compared.moved + gradients.moved, 2 * energies.floor + gradients.floor


@interprets
def test_attention_maps_move_the_predicted_bytes():
    for measured, predicted, least in moved_by_attention():
        beside = 4 * attention_maps.IMAGES + 4 * 1000  # the losses of images; the upstream gradient, which every program reads
        assert predicted <= measured <= predicted + beside
        assert least < predicted


@interprets
@pytest.mark.parametrize(("D", "most"), [(64, 6), (128, 6), (256, 8)])
def test_contrastive_loss_makes_the_predicted_operations(D, most):
    """D = 256 in float32 is made in two slices."""
    made, predicted = multiplied(192, D)
    assert made == predicted == most * 192**2 * D


def gathered(B, K, D, with_gradient, dtype=torch.float32, bank_dtype=torch.float32):
    """Bytes that a walk over K negatives and its sums ask for, and those predicted."""
    anchors, bank, indices = torch.zeros(B, D, dtype=dtype), torch.zeros(50, D, dtype=bank_dtype), torch.zeros(B, 1 + K, dtype=torch.int64)
    with counted_traffic() as traffic:
        nce.loss_and_gradient(anchors, bank, indices, torch.ones(()), 0.07, 0.0, 0.0, with_gradient)
    split, _ = nce.parts(B, 1 + K, nce.plan(D)[0])
    # the launch that adds up reads what the walk wrote, and writes loss and gradient
    sums = 4 * B * split * (1 + D * with_gradient) + 4 + 4 * B * D * with_gradient
    return traffic.read + traffic.written, noise_contrast.bytes_of_walk(B, K, D, dtype, bank_dtype, with_gradient) + sums


@interprets
@pytest.mark.parametrize(
    "arguments", [(3, 300, 16, True), (3, 300, 100, False), (2, 40, 300, True), (2, 40, 16, True, FP32, BF16)], ids=str
)
def test_noise_contrast_reads_every_gathered_row_once(arguments):
    made, predicted = gathered(*arguments)
    assert made == predicted


def asked_for_a_constant(known):
    """Bytes that the normalizer reads where it is given this constant, of the floor of a walk."""
    anchors, bank, indices = torch.zeros(3, 16), torch.zeros(50, 16), torch.zeros(3, 301, dtype=torch.int64)
    with counted_traffic() as traffic:
        nce.normalizer(anchors, bank, indices, torch.tensor(known), 0.07)
    return traffic.read / noise_contrast.bytes_of_rows(3, 300, 16, torch.float32)


@interprets
def test_a_settled_constant_costs_no_walk():
    assert asked_for_a_constant(-1.0) > 1
    assert asked_for_a_constant(5.0) < 0.02


# ---- kernels ---------------------------------------------------------------------------------------------------------

both = ("_energies", "_gradients")
REPRESENTATIVE = {  # what has been seen to spill, or to load in small pieces
    "kd_loss": [
        distillation.launch(1000, "lskd+ce, 5 teachers", FP32, FP32),
        distillation.launch(8192, "mutual js", BF16, BF16),
        distillation.rescale_launch(1000, FP32),
    ],
    "supcon_loss": [*contrastive.step_launches("sm_90", 8192, 128, "labels", BF16)],
    "crd_loss": [noise_contrast.launch(128, FP32, FP32, "_losses"), noise_contrast.launch(101, BF16, BF16, "_losses")],
    "Lion": [*lion_steps.step_launches("sm_90", "cautious", FP32, FP32, FP32)],
    "attention_transfer_loss": [*attention_maps.stage_launches(attention_maps.Maps(64, 56, 56, True, BF16), both)],
    "linear_kd_loss": [],
}


@compiles
@pytest.mark.parametrize("name", operators.OPERATORS)
def test_representative_launches_hold_the_bars(name):
    for entry in codegen.measure(REPRESENTATIVE[name], "sm_90"):
        judge(entry)


@compiles
@pytest.mark.slow
@pytest.mark.parametrize("part", range(4))
@pytest.mark.parametrize("target", binaries.TARGETS)
@pytest.mark.parametrize("name", operators.OPERATORS)
def test_every_launch_holds_the_bars(name, target, part):
    for entry in codegen.measure(list(operators.OPERATORS[name].module.launches(target))[part::4], target):
        judge(entry)


def judge(entry):
    """No spills, wide accesses, tensor cores where there are products, and the predicted bytes near the floor."""
    name = f"{entry['kernel']}{entry['function']} {entry['C']} {entry['dtypes']}, {entry['variant']}, {entry['plan']}, {entry['target']}"
    nvidia, function = entry["target"] != "gfx942", entry["function"]
    problems = entry["problems"] if entry["target"] in ("sm_90", "sm_100") else []
    assert not problems, f"{name}: {'; '.join(problems)}"
    walks = entry["kernel"] == "supcon" and function in ("_denominators", "_gradients")
    exact = entry["dtypes"] == "fp32" and "tf32" not in entry["variant"]
    assert set(entry["products"]) == ({PRODUCTS[entry["target"]]} if walks and not exact else set()), name
    if walks and entry["dtypes"] == "bf16" and "mask" not in entry["variant"] and entry["C"] <= 256 and nvidia:
        assert entry["bytes_moved"] == entry["bytes_floor"], f"{name}: more than 6 N^2 D operations"
    if function in ("_losses", "_exponentials") and entry["kernel"] == "nce":
        assert entry["bytes_moved"] < 1.005 * entry["bytes_floor"], name
        if nvidia and entry["C"] > 8:  # the address of so few elements is handed on in shared memory
            size = 2 if entry["dtypes"].endswith("bf16") else 4
            assert entry["widths"]["bank"] == 8 * math.gcd(16, entry["C"] * size), name
    if entry["kernel"] == "attention_map" and nvidia:
        assert entry["spilled"] == 0, name
        if entry["variant"].startswith("56 x 56") and entry["C"] % 8 == 0:
            assert entry["widths"].get("features", 128) == entry["widths"].get("gradients", 128) == 128, name


def recorded_plans(name):
    """The plans of all launches of an operator."""
    return [made.plan for made in codegen.record(list(operators.OPERATORS[name].module.launches("sm_90")))]


@compiles
def test_every_plan_of_distillation_is_listed():
    listed = {(plan.get("ROWS", 1), plan["BLOCK"], plan["warps"]) for plan in recorded_plans("kd_loss")}
    assert listed == {distill_kl.plan(C, heavy) for C in range(1, 2**18) for heavy in (False, True)}


@compiles
def test_every_plan_of_noise_contrast_is_listed():
    listed = {(plan["ROWS"], plan["WIDTH"], plan["warps"]) for plan in recorded_plans("crd_loss") if "ROWS" in plan}
    assert listed == {nce.plan(D) for D in range(4, nce.WIDEST + 1)}


@compiles
def test_every_plan_of_attention_maps_is_listed():
    plans = recorded_plans("attention_transfer_loss")
    tiles = {(p["PIXELS"], p["CHANNELS"], p["warps"]) for p in plans if "PIXELS" in p}
    for channels_last in (False, True):
        for C in range(16, 2049):
            for P in (33, 49, 196, 256, 3136, 12544):
                for itemsize in (2, 4):
                    assert attention_map.plan(C, P, channels_last, itemsize, math.gcd(8, C if channels_last else P)) in tiles
    compared = {(p["BLOCK"], p["warps"]) for p in plans if "BLOCK" in p}
    assert compared >= {attention_map.compare_plan(P) for P in (1, 49, 64, 196, 784, 1024, 3136, 12544)}


@compiles
@pytest.mark.parametrize(("C", "requests"), [(1000, ("kd", "lskd+ce")), (32000, ("mutual js",))])
def test_instructions_ask_for_the_predicted_bytes(C, requests):
    for entry in codegen.measure([distillation.launch(C, request, FP32, FP32) for request in requests], "sm_90"):
        plan = entry["plan"]
        wide = entry["loads"][128] + entry["stores"].get(128, 0)  # numbers of a row are narrower
        step = wide * 16 * 32 * plan["warps"]  # bytes
        assert step * entry["N"] * C == entry["bytes_moved"] * plan.get("ROWS", 1) * plan["BLOCK"], entry["variant"]


@compiles
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("N", [8192, 32768])
def test_contrastive_loss_takes_little_memory(N, normalize, monkeypatch):
    """What the launchers allocate beyond the features and their gradient is below 4 N D b + 64 N bytes."""
    D, dtype = 128, torch.bfloat16
    features, others, names = torch.zeros(N, D, dtype=dtype), torch.zeros(0, D, dtype=dtype), torch.zeros(N, dtype=torch.int64)
    setting, upstream = Setting(0.07, 1.0, 1, False, normalize), torch.ones(N)
    monkeypatch.setattr(triton.JITFunction, "run", lambda *_, **__: None)

    def step():
        kept = supcon.forward(features, others, names, None, setting)[1]
        return supcon.backward(upstream, features, others, names, None, kept, setting, False)

    assert 0 < peak_memory(step) - features.nbytes < 4 * features.nbytes + 64 * N


@compiles
def test_noise_contrast_takes_little_memory(monkeypatch):
    """What the launcher allocates, where the gathered rows are 537 MB."""
    (B, K, n), D = noise_contrast.SHAPE, 128
    anchors, bank, indices = torch.zeros(B, D), torch.empty(n, D), torch.zeros(B, 1 + K, dtype=torch.int64)
    monkeypatch.setattr(triton.JITFunction, "run", lambda *_, **__: None)
    split, _ = nce.parts(B, 1 + K, nce.plan(D)[0])
    Z = torch.ones(())
    memory = peak_memory(lambda: nce.loss_and_gradient(anchors, bank, indices, Z, 0.07, 0.0, 0.0, True))
    assert 0 < memory <= 4 * (B * split * (D + 1) + B * D + 1) < 2**20


@compiles
def test_lion_has_wide_accesses_and_keeps_subnormal_numbers(monkeypatch):
    """Too few wide accesses are seen, and no instruction of the step flushes numbers to 0 (.ftz)."""
    (launch,) = lion_steps.step_launches("sm_90", "plain", FP32, FP32, FP32)
    texts, honest = [], binaries._nvidia
    monkeypatch.setattr(binaries, "_nvidia", lambda kernel: texts.append(kernel.asm["ptx"]) or honest(kernel))
    (entry,) = codegen.measure([launch._replace(wide=(7, 5))], "sm_90")
    assert entry["problems"] == ["has 6 loads of 128 bits, a whole block needs 7", "has 4 stores of 128 bits, a whole block needs 5"]
    assert "fma.rn.f32" in texts[0]
    assert ".ftz" not in texts[0]


@compiles
def test_table_and_json_show_numbers_and_problems(tmp_path, monkeypatch, capsys):
    def copy():
        _copy[(5,)](*torch.zeros(2, 5, 1000), 1000, 1000, V=1, BLOCK=1024, enable_fp_fusion=True)

    launches = [distillation.launch(1000, "kd", FP32, BF16), Launch("copy", 5, 1000, "fp32", "unhinted", copy, 40000, 40000)]
    monkeypatch.setattr(codegen, "OPERATORS", {"any": SimpleNamespace(module=SimpleNamespace(launches=lambda target: launches))})
    codegen.run(codegen.Codegen(targets=("sm_90",), out=tmp_path / "codegen.json"))
    printed = capsys.readouterr().out
    assert "1000 fp32 bf16, kd" in printed
    assert "sm_90, C 1000 fp32, unhinted: x is accessed 32 bits at a time, its rows allow 128; y is" in printed
    assert "2 kernels compiled, 1 with a problem" in printed
    written = json.loads((tmp_path / "codegen.json").read_text())
    assert written["machine"]["triton"] == triton.__version__
    assert written["cases"][0]["bytes_floor"] == distillation.ROWS * 1000 * (4 + 2 + 4)
    assert written["cases"][0]["loads"]["128"] > 0
