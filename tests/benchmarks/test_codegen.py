"""Code generation without a GPU: problems of machine code are found, and the kernels' launch plans have none."""

import json
import math
from itertools import product
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
from kdfast.ops.backend import INTERPRETED  # noqa: E402
from kdfast.ops.supcon.op import Setting  # noqa: E402

Maps = attention_maps.Maps
FP32, BF16 = torch.float32, torch.bfloat16
PRODUCTS = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA", "gfx942": "v_mfma"}  # tensor-core instructions
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


def code(target, function, *arguments, **options):
    """The recorded launch and what it compiles to."""
    with binaries.record_launches() as launches:
        function[(1,)](*arguments, enable_fp_fusion=True, **options)
    (made,) = binaries.compile_launches(launches, target)
    return launches[0], made


# ---- the harness -----------------------------------------------------------------------------------------------------


@compiles
@pytest.mark.parametrize(
    ("C", "stride", "V", "dtype", "first", "widths"),
    [
        # V = 1 hides nothing: what the compiler knows here, it knows from the values of the arguments
        pytest.param(1024, 1024, 1, FP32, 0, {"x": 128, "y": 128}, id="aligned"),
        pytest.param(1024, 1024, 1, FP32, 1, {"x": 32, "y": 128}, id="x begins between"),
        pytest.param(10, 10, 2, FP32, 0, {"x": 64, "y": 64}, id="narrow"),
        pytest.param(1001, 1001, 1, FP32, 0, {"x": 32, "y": 32}, id="odd"),
        pytest.param(1001, 1001, 1, BF16, 0, {"x": 16, "y": 16}, id="odd, bfloat16"),
    ],
)
def test_accesses_are_as_wide_as_the_arguments_allow(C, stride, V, dtype, first, widths):
    x, y = torch.zeros(2, 4096, dtype=dtype)
    launch, made = code("sm_90", _copy, x[first:], y, C, stride, V=V, BLOCK=1024)
    assert made.widths == widths
    assert ({*made.loads}, {*made.stores}) == ({widths["x"]}, {widths["y"]})
    assert binaries.find_problems(launch, made, "sm_90") == []


ROWS = {"C": 1000, "stride": 1000, "BLOCK": 1024}
SHORT = {"BLOCK": 2**10, "num_warps": 4}
FAULTS = {  # a kernel, the shape of its tensors, options with the fault and without it, a part of the sentence
    "pieces": (_copy, (3, 1000), ROWS | {"V": 1}, ROWS | {"V": 4}, "x is accessed 32 bits at a time, its rows allow 128"),
    "few registers": (_softmax, (2**12,), {"BLOCK": 2**12, "num_warps": 4, "maxnreg": 24}, SHORT, "spills"),
    "long rows": (_softmax, (2**17,), {"BLOCK": 2**17, "num_warps": 16}, SHORT, "spills"),
    "memory": (_turn, (512 * 512,), {"BLOCK": 512, "num_warps": 32}, {"BLOCK": 64}, "bytes of shared memory"),
}
SLOW_FAULTS = [(target, fault) for target in ("sm_80", "sm_100") for fault in ("pieces", "few registers", "memory")]


@compiles
@pytest.mark.parametrize(
    ("target", "fault"),
    [
        ("sm_90", "pieces"),
        ("sm_90", "few registers"),
        ("gfx942", "memory"),
        *(pytest.param(*row, marks=pytest.mark.slow) for row in [*SLOW_FAULTS, ("gfx942", "long rows")]),
    ],
)
def test_a_fault_is_found_where_it_is(target, fault):
    function, shape, bad, good, problem = FAULTS[fault]
    x, y = torch.zeros(2, *shape)
    assert any(problem in sentence for sentence in binaries.find_problems(*code(target, function, x, y, **bad), target))
    assert not binaries.find_problems(*code(target, function, x, y, **good), target)


@compiles
def test_fusion_must_be_stated():
    x = torch.zeros(64)
    launch, made = code("sm_90", _copy, x, x.clone(), 64, 64, V=4, BLOCK=64)
    del launch.options["enable_fp_fusion"]
    assert binaries.find_problems(launch, made, "sm_90") == ["does not state enable_fp_fusion, whose default differs between releases"]


@compiles
@pytest.mark.parametrize("target", ["sm_90", "gfx942", *FAR])
def test_tensor_cores_are_seen(target):
    x = torch.zeros(64 * 64, dtype=torch.bfloat16)
    _, made = code(target, _product, x, x.float(), 5, BLOCK=64)
    assert set(made.products) == {PRODUCTS[target]}
    assert set(made.loads) == {128}, "loads that go to shared memory at once count as well"
    assert made.widths in ({"x": 128, "y": 128}, {})
    assert not code(target, _turn, x, x.clone(), BLOCK=64)[1].products


@compiles
def test_the_wrong_kind_of_process_is_refused(monkeypatch):
    with pytest.raises(RuntimeError, match="counted_traffic needs a process started with TRITON_INTERPRET=1"), counted_traffic():
        pass
    monkeypatch.setattr(binaries.knobs.runtime, "interpret", True)
    with pytest.raises(RuntimeError, match="it cannot in a process started with TRITON_INTERPRET=1: unset it"):
        codegen.measure([distillation.rescale_launch(1000, FP32)], "sm_90")


# ---- bytes -----------------------------------------------------------------------------------------------------------


def count_traffic(function, *arguments):
    with counted_traffic() as traffic:
        function(*arguments)
    return traffic


@interprets
@pytest.mark.parametrize("C", [10, 1000, 9000])
def test_distillation_moves_the_predicted_bytes(C):
    launches = [distillation.launch(C, request, FP32, FP32) for request in distillation.REQUESTS]
    launches += [distillation.launch(C, "lskd+ce", FP32, BF16), distillation.rescale_launch(C, BF16)]
    beside = 32 * distillation.ROWS  # labels, losses and other single numbers of a row
    for launch in launches:
        traffic = count_traffic(launch.call)
        # on long rows the cross-entropy loads the student's step again, which the compiler makes one load with the first
        merged = 4 * distillation.ROWS * C if C > 8192 and launch.variant.startswith("lskd+ce") else 0
        assert 0 <= traffic.read + traffic.written - launch.moved - merged <= beside, launch.variant


@interprets
@pytest.mark.parametrize(
    "maps", [Maps(16, 9, 7), Maps(70, 8, 8, True, BF16), Maps(300, 3, 5, False, torch.float16, 2.5), Maps(2, 70, 61, True)], ids=str
)
def test_attention_maps_move_the_predicted_bytes(maps):
    energies, gradients, compared = attention_maps.stage_launches(maps, ("_energies", "_gradients", "_compare"))
    traffic = count_traffic(energies.call)  # of a whole training step
    predicted = 2 * energies.moved + compared.moved + gradients.moved
    beside = 4 * attention_maps.IMAGES + 4 * 1000  # the losses of images; the upstream gradient, which every program reads
    assert predicted <= traffic.read + traffic.written <= predicted + beside
    assert 2 * energies.floor + gradients.floor < predicted


def step_of_supcon(N, D, dtype, setting):
    """Its features, and the step that launches the kernels of supcon_loss."""
    features, others, names = torch.randn(N, D).to(dtype), torch.zeros(0, D, dtype=dtype), torch.arange(N) % 3

    def step():
        kept = supcon.forward(features, others, names, None, setting)[1]
        return supcon.backward(torch.ones(N), features, others, names, None, kept, setting, False)

    return features, step


@interprets
@pytest.mark.parametrize(("D", "most"), [(64, 6), (128, 6), (256, 8)])
def test_contrastive_loss_makes_the_predicted_operations(D, most):
    """D = 256 in float32 is made in two slices."""
    _, step = step_of_supcon(192, D, FP32, Setting(0.5, 1.0, 1, False, False))
    predicted = sum(supcon.operations(192, D, supcon.plans(192, D, FP32, "ieee", False).slice))
    assert count_traffic(step).operations == predicted == most * 192**2 * D


@interprets
@pytest.mark.parametrize(
    ("B", "K", "D", "with_gradient", "bank_dtype"),
    [(3, 300, 16, True, FP32), (3, 300, 100, False, FP32), (2, 40, 300, True, FP32), (2, 40, 16, True, BF16)],
)
def test_noise_contrast_reads_every_gathered_row_once(B, K, D, with_gradient, bank_dtype):
    anchors, bank, indices = torch.zeros(B, D), torch.zeros(50, D, dtype=bank_dtype), torch.zeros(B, 1 + K, dtype=torch.int64)
    traffic = count_traffic(nce.loss_and_gradient, anchors, bank, indices, torch.ones(()), 0.07, 0.0, 0.0, with_gradient)
    split, _ = nce.parts(B, 1 + K, nce.plan(D)[0])
    # the launch that adds up reads what the walk wrote, and writes loss and gradient
    sums = 4 * B * split * (1 + D * with_gradient) + 4 + 4 * B * D * with_gradient
    assert traffic.read + traffic.written == noise_contrast.bytes_of_walk(B, K, D, FP32, bank_dtype, with_gradient) + sums


@interprets
def test_a_settled_constant_costs_no_walk():
    arguments = torch.zeros(3, 16), torch.zeros(50, 16), torch.zeros(3, 301, dtype=torch.int64)
    unknown, settled = (count_traffic(nce.normalizer, *arguments, torch.tensor(known), 0.07).read for known in (-1.0, 5.0))
    assert unknown > noise_contrast.bytes_of_rows(3, 300, 16, FP32) > 50 * settled


# ---- kernels ---------------------------------------------------------------------------------------------------------

REPRESENTATIVE = {  # what has been seen to spill, or to load in small pieces; all launches of an operator that is not listed
    "kd_loss": [
        distillation.launch(1000, "lskd+ce, 5 teachers", FP32, FP32),
        distillation.launch(8192, "mutual js", BF16, BF16),
        distillation.rescale_launch(1000, FP32),
    ],
    "supcon_loss": [*contrastive.step_launches("sm_90", 8192, 128, "labels", BF16)],
    "crd_loss": [noise_contrast.launch(128, FP32, FP32, "_losses"), noise_contrast.launch(101, BF16, BF16, "_losses")],
    "Lion": [*lion_steps.step_launches("sm_90", "cautious", FP32, FP32, FP32)],
    "attention_transfer_loss": [*attention_maps.stage_launches(Maps(64, 56, 56, True, BF16), ("_energies", "_gradients"))],
    "linear_kd_loss": [],
}


@compiles
@pytest.mark.parametrize("name", operators.OPERATORS)
def test_representative_launches_hold_the_bars(name):
    launches = REPRESENTATIVE[name] if name in REPRESENTATIVE else list(operators.OPERATORS[name].module.launches("sm_90"))
    for entry in codegen.measure(launches, "sm_90"):
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
    recent = entry["target"] in ("sm_90", "sm_100")  # sm_80 has too little shared memory for a slice of 256 features
    problems = entry["problems"] if recent else []
    assert not problems, f"{name}: {'; '.join(problems)}"
    walks = entry["kernel"] == "supcon" and function in ("_denominators", "_gradients")
    exact = entry["dtypes"] == "fp32" and "tf32" not in entry["variant"]
    assert set(entry["products"]) == ({PRODUCTS[entry["target"]]} if walks and not exact else set()), name
    if walks and entry["dtypes"] == "bf16" and "mask" not in entry["variant"] and entry["C"] <= 256 and recent:
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


def list_plans(name, *fields):
    """The plans of all launches of an operator that have the last of these fields; the others are 1 where they are missing."""
    plans = [made.plan for made in codegen.record(list(operators.OPERATORS[name].module.launches("sm_90")))]
    return {tuple(plan.get(field, 1) for field in (*fields, "warps")) for plan in plans if fields[-1] in plan}


@compiles
def test_every_plan_is_listed():
    assert list_plans("kd_loss", "ROWS", "BLOCK") == {distill_kl.plan(C, heavy) for C in range(1, 2**18) for heavy in (False, True)}
    assert list_plans("crd_loss", "WIDTH", "ROWS") == {
        (width, rows, warps) for rows, width, warps in map(nce.plan, range(4, nce.WIDEST + 1))
    }
    tiles = list_plans("attention_transfer_loss", "PIXELS", "CHANNELS")
    for channels_last, C, P, itemsize in product((False, True), range(16, 2049), (33, 49, 196, 256, 3136, 12544), (2, 4)):
        assert attention_map.plan(C, P, channels_last, itemsize, math.gcd(8, C if channels_last else P)) in tiles
    compared = list_plans("attention_transfer_loss", "BLOCK")
    assert compared >= {attention_map.compare_plan(P) for P in (1, 49, 64, 196, 784, 1024, 3136, 12544)}


@compiles
@pytest.mark.parametrize(("C", "requests"), [(1000, ("kd", "lskd+ce")), (32000, ("mutual js",))])
def test_instructions_ask_for_the_predicted_bytes(C, requests):
    for entry in codegen.measure([distillation.launch(C, request, FP32, FP32) for request in requests], "sm_90"):
        plan = entry["plan"]
        wide = entry["loads"][128] + entry["stores"].get(128, 0)  # numbers of a row are narrower
        step = wide * 16 * 32 * plan["warps"]  # bytes
        odd = 2 * 3 * plan["BLOCK"] * 4 if "ROWS" not in plan else 0  # walks of rows with masked classes, which others do not take
        assert (step - odd) * entry["N"] * C == entry["bytes_moved"] * plan.get("ROWS", 1) * plan["BLOCK"], entry["variant"]


@compiles
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("N", [8192, 32768])
def test_contrastive_loss_takes_little_memory(N, normalize, monkeypatch):
    """Its launchers allocate less than 4 N D b + 64 N bytes beyond the features and their gradient."""
    monkeypatch.setattr(triton.JITFunction, "run", lambda *_, **__: None)
    features, step = step_of_supcon(N, 128, BF16, Setting(0.07, 1.0, 1, False, normalize))
    assert 0 < peak_memory(step) - features.nbytes < 4 * features.nbytes + 64 * N


@compiles
def test_noise_contrast_takes_little_memory(monkeypatch):
    """Its launcher allocates less than 1 MB, where the gathered rows are 537 MB."""
    (B, K, n), D = noise_contrast.SHAPE, 128
    monkeypatch.setattr(triton.JITFunction, "run", lambda *_, **__: None)
    arguments = torch.zeros(B, D), torch.empty(n, D), torch.zeros(B, 1 + K, dtype=torch.int64), torch.ones(()), 0.07, 0.0, 0.0, True
    assert 0 < peak_memory(lambda: nce.loss_and_gradient(*arguments)) < 2**20


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
