"""Contrastive representation distillation: the operator against its reference in float64, and the module against RepDistiller's values."""

import copy
import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

import kdfast
from kdfast import reference
from kdfast.benchmarks.timing import peak_memory
from kdfast.functional import crd_loss
from kdfast.losses import CRDLoss
from kdfast.losses import crd as crd_module
from kdfast.ops import nce
from tests.numeric import DEVICE, FLOAT32_ERROR, INTERPRETED, KERNELS, error, value_and_gradients
from tests.ops.contracts import FLOATS, compare, surround, unit
from tests.processes import in_processes

pytestmark = pytest.mark.kernels

# (B, n, K, D)
SHAPES = [(1, 9, 4, 3), (3, 7, 2, 10), (5, 33, 7, 7), (4, 500, 64, 32), (2, 50, 129, 100), (7, 300, 1000, 33), (3, 1001, 257, 128)]
SHAPES += [(2, 9, 40, 300), (2, 5, 0, 4)]
torch_form = pytest.mark.skipif(KERNELS, reason="tests the PyTorch form, and the kernel runs here")


def problem(
    B: int, n: int, K: int, D: int, dtype: torch.dtype = torch.float32, bank_dtype: torch.dtype | None = None
) -> tuple[Tensor, ...]:
    return unit(B, D, dtype=dtype), unit(n, D, dtype=bank_dtype or dtype), torch.randint(n, (B, 1 + K))


def check(anchors: Tensor, bank: Tensor, indices: Tensor, temperature: float = 0.07, Z: Tensor | None = None, **options: Any) -> None:
    Z = nce.normalizer(anchors, bank, indices, temperature) if Z is None else Z

    def exact(v: Tensor) -> Tensor:
        return reference.crd_loss(v, bank.to(v.dtype), indices, Z=Z.to(v.dtype), temperature=temperature)

    compare(lambda v: nce.nce_loss(v, bank, indices, Z, temperature), exact, [anchors], torch.tensor(-1.5), **options)


# ---- the operator: section 5's contracts -----------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_value_and_gradient_match_float64(shape: tuple[int, int, int, int]) -> None:
    check(*problem(*shape))


@pytest.mark.parametrize("bank_dtype", FLOATS, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_every_pair_of_dtypes_matches_float64(dtype: torch.dtype, bank_dtype: torch.dtype) -> None:
    check(*problem(3, 200, 130, 33, dtype, bank_dtype), temperature=0.2)
    check(*problem(2, 60, 70, 64, dtype, bank_dtype), temperature=0.3)


@pytest.mark.parametrize("dense", [0, 1000], ids=["gathered", "whole bank"])
@pytest.mark.parametrize("chunk", [1, 50, 1000])
def test_chunks_of_any_width_add_up(chunk: int, dense: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nce, "CHUNK", chunk)
    monkeypatch.setattr(nce, "DENSE", dense)
    with kdfast.backend("torch"):
        check(*problem(3, 50, 41, 8))
        check(*problem(3, 50, 41, 8, torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_normalizer_is_the_mean_score_times_n(dtype: torch.dtype) -> None:
    anchors, bank, indices = problem(5, 300, 333, 40, dtype)
    scores = (torch.einsum("bkd,bd->bk", bank.double()[indices], anchors.double()) / 0.07).exp()
    assert error(nce.normalizer(anchors, bank, indices, 0.07), 300 * scores.mean()) < FLOAT32_ERROR
    for known, kept in ((5.0, True), (-1.0, False), (0.0, False), (math.nan, False), (math.inf, False)):
        Z = torch.tensor(known)
        got = nce.normalizer(anchors, bank, indices, 0.07, Z)
        assert got.data_ptr() != Z.data_ptr()
        assert torch.equal(got, Z) if kept else error(got, 300 * scores.mean()) < FLOAT32_ERROR
    assert nce.normalizer(anchors[:0], bank, indices[:0], 0.07).isnan()


def test_no_exponential_overflows() -> None:
    """Where float32 scores are infinite, and where the noise is far below or above them."""
    anchors, bank, indices = problem(4, 30, 50, 16)
    for length, Z in itertools.product((0.0, 1e-3, 30.0, 1e3), (1e-20, 1.0, 1e20)):
        given = {"Z": torch.tensor(Z), "temperature": 2.0}
        exact = value_and_gradients(lambda v: reference.crd_loss(v, bank.double(), indices, **given), [length * anchors.double()])  # noqa: B023
        ours = value_and_gradients(lambda v: nce.nce_loss(v, bank, indices, **given), [length * anchors])  # noqa: B023
        assert all(error(a, b) < 1e-5 + 1e-7 * length for a, b in zip(ours, exact) if b.isfinite().all())
        assert all(x.isfinite().all() for x in ours)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nan_and_infinity_in_the_bank_are_not_hidden(bad: float) -> None:
    anchors, bank, indices = problem(4, 30, 50, 9)
    indices = indices.clamp(max=28)
    bank[29] = bad  # which nothing names
    assert nce.nce_loss(anchors, bank, indices, torch.tensor(20.0), 0.07).isfinite()
    assert nce.nce_loss(anchors, bank, indices, torch.tensor(-3.0), 0.07).isnan(), "a constant that is no score's"
    bank[indices[0, 3], 0] = bad
    value, gradient = value_and_gradients(lambda v: nce.nce_loss(v, bank, indices, torch.tensor(20.0), 0.07), [anchors])
    assert not value.isfinite()
    assert not gradient[0].isfinite().all()


def test_padding_never_leaks_and_inputs_are_not_written() -> None:
    """Strided rows, and poison between them."""
    for dtype in (torch.float32, torch.bfloat16):
        anchors, bank = surround(unit(5, 21, dtype=dtype)), surround(unit(70, 21, dtype=dtype))
        indices = torch.randint(70, (45, 5)).t()
        before = [x.clone() for x in (anchors, bank, indices)]
        check(anchors, bank, indices, 0.3)
        assert all(torch.equal(a, b) for a, b in zip((anchors, bank, indices), before))
    check(torch._neg_view(unit(5, 42))[:, ::2], unit(21, 70).t(), torch.randint(70, (5, 30)), 0.3)


def test_the_bank_may_be_overwritten_before_backward() -> None:
    anchors, bank, indices = problem(3, 40, 30, 8)
    want = value_and_gradients(lambda v: nce.nce_loss(v, bank, indices, torch.tensor(9.0), 0.07), [anchors])[1]
    leaf = anchors.clone().requires_grad_()
    value = nce.nce_loss(leaf, bank, indices, torch.tensor(9.0), 0.07)
    bank.zero_()
    value.backward()
    assert leaf.grad is not None
    assert torch.equal(leaf.grad, want)


def test_small_float16_gradients_keep_their_digits_under_a_loss_scale() -> None:
    """A large batch's mean has gradients below float16's least number, until a GradScaler's factor lifts them."""
    anchors, bank, indices = problem(400, 30, 4, 16, torch.float16)
    factor, Z = torch.tensor(2.0**14), torch.tensor(1e9)
    got = value_and_gradients(lambda v: nce.nce_loss(v, bank, indices, Z, 1.0) * 1e-4, [anchors], factor)[1]
    want = value_and_gradients(
        lambda v: reference.crd_loss(v, bank.double(), indices, Z=Z, temperature=1.0) * 1e-4, [anchors.double()], factor
    )
    assert error(got, want[1]) < 2e-3


def test_nothing_waits_for_the_device() -> None:
    """Tensors without values: whoever reads one raises."""
    loss = CRDLoss(6, 5, 40, labels=torch.arange(40) % 4, feat_dim=8, nce_k=30).to("meta")
    with kdfast.backend("torch"), torch.device("meta"):
        value = loss(torch.zeros(7, 6), torch.zeros(7, 5), torch.zeros(7, dtype=torch.int64))
        value.backward()
    assert loss.embed_s.linear.weight.grad.shape == (8, 6)


@torch_form
@pytest.mark.parametrize("dense", [0, 8], ids=["gathered", "whole bank"])
def test_gathered_rows_are_never_whole(dense: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward need less than 32 MB; the gathered rows of one direction are 134 MB."""
    monkeypatch.setattr(nce, "DENSE", dense)
    B, K, D, n = 64, 4096, 128, 20_000
    student, teacher, *banks = unit(B, D).requires_grad_(), unit(B, D).requires_grad_(), unit(n, D), unit(n, D)
    indices = torch.randint(n, (B, 1 + K))
    crd_loss(student, teacher, *banks, indices[:, :300]).backward()  # loads what is loaded lazily
    assert peak_memory(lambda: crd_loss(student, teacher, *banks, indices).backward()) < 2**25


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"anchors": torch.ones(4)}, r"anchors must be \[B, D\], got shape \(4,\)"),
        ({"anchors": torch.ones(4, 6, dtype=torch.int64)}, "anchors must be floating"),
        ({"bank": torch.ones(9, 5)}, r"bank must be \[n, 6\]"),
        ({"bank": torch.ones(0, 6)}, "at least one row"),
        ({"bank": torch.ones(9, 6, requires_grad=True)}, "bank must not require grad"),
        ({"bank": torch.ones(9, 6, device="meta")}, "bank must be on the anchors' device"),
        ({"indices": torch.zeros(4, 0, dtype=torch.int64)}, r"indices must be \[4, 1 \+ K\]"),
        ({"indices": torch.zeros(4, 5, dtype=torch.int32)}, "indices must be int64, got torch.int32"),
        ({"indices": torch.full((4, 5), 9)}, r"indices must be in \[0, 9\), rows of the bank, got 9"),
        ({"indices": torch.full((4, 5), -1)}, r"indices must be in \[0, 9\), rows of the bank, got -1"),
        ({"Z": torch.ones(1)}, "Z must be 0-dim"),
        ({"temperature": 0.0}, "temperature must be positive, got 0.0"),
    ],
)
def test_bad_input_is_named(arguments: dict[str, Any], message: str) -> None:
    if DEVICE != "cpu" and "in [0" in message.replace("\\", ""):
        pytest.skip("reading indices would wait for the device")
    usual = {
        "anchors": torch.ones(4, 6), "bank": torch.ones(9, 6), "indices": torch.zeros(4, 5, dtype=torch.int64),
        "Z": torch.tensor(1.0), "temperature": 0.07,
    }  # fmt: skip
    with pytest.raises((ValueError, TypeError), match=message):
        nce.nce_loss(**{**usual, **arguments})


# ---- the original ----------------------------------------------------------------------------------------------------


class AsItIs(crd_module._Embedding):
    """Features that are embeddings already."""

    def forward(self, x: Tensor) -> Tensor:
        return x


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_three_steps_of_the_original(oracles: Any, dtype: torch.dtype) -> None:
    def stored(name: str) -> Tensor:
        value = torch.tensor(oracles[f"crd/{name}"])
        return value.to(dtype) if value.is_floating_point() else value

    n, D = stored("memory_v1").shape
    loss = CRDLoss(D, D, n, feat_dim=D, nce_t=oracles["crd/temperature"].item(), nce_m=oracles["crd/momentum"].item()).to(dtype)
    loss.embed_s, loss.embed_t = AsItIs(D, D), AsItIs(D, D)
    loss.memory_v1.copy_(stored("memory_v1"))
    loss.memory_v2.copy_(stored("memory_v2"))
    allowed = 1e-12 if dtype == torch.float64 else FLOAT32_ERROR
    for step in range(3):
        f_s, f_t, idx, contrast_idx = (stored(f"step{step}/{name}") for name in ("f_s", "f_t", "idx", "contrast_idx"))
        ours = value_and_gradients(lambda s, t: loss(s, t, idx, contrast_idx), [f_s, f_t])  # noqa: B023
        for got, name in zip(ours, ("loss", "grad_s", "grad_t")):
            want = torch.tensor(oracles[f"crd/step{step}/{name}"])
            assert error(got, want) < allowed, name
            assert not want.ndim or min(error(got.roll(1, 0), want), error(0 * got, want)) > 0.5
    for name in ("memory_v1", "memory_v2", "Z_v1", "Z_v2"):
        key = f"crd/{name}_after" if name.startswith("memory") else f"crd/{name}"
        assert error(getattr(loss, name), torch.tensor(oracles[key])) < allowed, name


# ---- the module ------------------------------------------------------------------------------------------------------


def module(seed: int = 0, n: int = 40, labels: Tensor | None = None, **options: Any) -> CRDLoss:
    torch.manual_seed(seed)
    return CRDLoss(6, 5, n, labels=labels, **({"feat_dim": 8, "nce_k": 30} | options))


def batches(count: int, n: int = 40, B: int = 7, K: int = 30, seed: int = 1) -> list[tuple[Tensor, ...]]:
    torch.manual_seed(seed)
    made = []
    for _ in range(count):
        idx = torch.randint(n, (B,))
        made.append((torch.randn(B, 6), torch.randn(B, 5), idx, torch.cat([idx[:, None], torch.randint(n, (B, K))], 1)))
    return made


def test_embeddings_learn_and_the_last_of_equal_images_stays_in_the_banks() -> None:
    """Written out in float64, an image being in the batch three times."""
    loss = module(nce_m=0.3)
    f_s, f_t, idx, contrast_idx = batches(1)[0]
    idx[2] = idx[5] = contrast_idx[2, 0] = contrast_idx[5, 0] = idx[0]
    bank_s, bank_t = loss.memory_v1.double(), loss.memory_v2.double()
    exact = copy.deepcopy(loss).double()
    v_s, v_t = (F.normalize(embed.linear(f.double()), dim=1) for embed, f in ((exact.embed_s, f_s), (exact.embed_t, f_t)))
    want = reference.crd_loss(v_s, bank_t, contrast_idx) + reference.crd_loss(v_t, bank_s, contrast_idx)
    value = loss(f_s, f_t, idx, contrast_idx)
    for x in (value, want):
        x.backward()
    assert error(value, want) < FLOAT32_ERROR
    assert all(error(p.grad, q.grad) < FLOAT32_ERROR for p, q in zip(loss.parameters(), exact.parameters()))
    for v, before, after in ((v_s, bank_s, loss.memory_v1), (v_t, bank_t, loss.memory_v2)):
        rows = F.normalize(0.3 * before[idx] + 0.7 * v.detach(), dim=1)
        for i, row in zip(idx.tolist(), rows):
            before[i] = row
        assert error(after, before) < FLOAT32_ERROR


def test_initial_banks_and_names() -> None:
    loss = CRDLoss(6, 5, 1000)
    embeddings = [f"embed_{which}.linear.{part}" for which in "st" for part in ("weight", "bias")]
    assert list(loss.state_dict()) == ["memory_v1", "memory_v2", "Z_v1", "Z_v2", *embeddings]
    assert loss.memory_v1.shape == (1000, 128)
    for bank in (loss.memory_v1, -loss.memory_v2):
        assert bank.max() == pytest.approx(math.sqrt(3 / 128), rel=0.01)
    assert (loss.nce_k, loss.nce_t, loss.nce_m) == (16384, 0.07, 0.5)


def chi_squared_is_plausible(counts: Tensor) -> bool:
    expected = counts.double().mean()
    degrees = counts.numel() - 1
    return (((counts - expected) ** 2 / expected).sum() - degrees).abs() < 6 * math.sqrt(2 * degrees)


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, None], ids=str)
def test_negatives_are_uniform_over_other_classes_or_images(dtype: torch.dtype | None) -> None:
    classes = torch.tensor([7] * 3 + [2] * 11 + [9] * 16 + [4])[torch.randperm(31)] if dtype else torch.arange(31)
    loss = CRDLoss(2, 2, 31, labels=classes.to(dtype) if dtype else None, nce_k=20_000)
    drawn = loss._draw_negatives(torch.arange(31))
    assert drawn.shape == (31, 20_000)
    for i in range(31):
        counts = drawn[i].bincount(minlength=31)
        assert not counts[classes == classes[i]].any()
        assert chi_squared_is_plausible(counts[classes != classes[i]])
    assert not torch.equal(drawn[0], loss._draw_negatives(torch.arange(31))[0])


def test_draws_are_the_positive_and_its_negatives() -> None:
    f_s, f_t, idx, _ = batches(1)[0]
    labels = torch.arange(40) % 3
    drawn = module(labels=labels)._draw_negatives(idx)
    assert torch.equal(module(labels=labels)(f_s, f_t, idx), module(labels=labels)(f_s, f_t, idx, torch.cat([idx[:, None], drawn], 1)))


def test_constants_are_set_once_and_nothing_changes_in_eval_mode() -> None:
    loss, (first, second) = module().eval(), batches(2)
    before = {name: value.clone() for name, value in loss.state_dict().items()}
    value = loss(*first)
    assert all(torch.equal(value, before[name]) for name, value in loss.state_dict().items())
    loss.train()
    assert torch.equal(loss(*first), value)
    settled = loss.Z_v1.clone(), loss.Z_v2.clone()
    v_s = loss.embed_s(first[0])
    assert error(settled[0], nce.normalizer(v_s, before["memory_v2"], first[3], 0.07)) < FLOAT32_ERROR
    loss(*second)
    assert (loss.Z_v1, loss.Z_v2) == settled
    assert settled[0] != settled[1]


def test_an_embedding_that_overflowed_leaves_its_row_alone() -> None:
    """So that a step which a GradScaler skips has no consequences."""
    crd, index = module(), torch.arange(6)
    student, teacher = torch.randn(6, 6), torch.randn(6, 5)
    crd(student, teacher, index)
    before = crd.memory_v1.clone(), crd.memory_v2.clone()
    student[2] = math.inf
    crd(student, teacher, index)
    changed = [(bank != old).any(1) for bank, old in zip((crd.memory_v1, crd.memory_v2), before)]
    assert changed[0].nonzero().flatten().tolist() == [0, 1, 3, 4, 5]
    assert changed[1].nonzero().flatten().tolist() == [0, 1, 2, 3, 4, 5]
    assert crd(torch.randn(6, 6), teacher, index).isfinite()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_constants_of_a_16_bit_module_stay_float32(dtype: torch.dtype) -> None:
    crd = CRDLoss(6, 5, 50_000, nce_k=64).to(dtype)
    features = torch.randn(4, 6).to(dtype), torch.randn(4, 5).to(dtype), torch.arange(4)
    assert crd(*features).isfinite()
    assert crd(*features).isfinite()
    assert crd.memory_v1.dtype == dtype
    assert (crd.Z_v1.dtype, crd.double().Z_v1.dtype) == (torch.float32, torch.float64)
    assert crd.Z_v1 > torch.finfo(torch.float16).max, "the case misses what it is about"


def test_a_first_batch_that_overflowed_sets_nothing() -> None:
    loss, ((f_s, f_t, idx, contrast_idx), good) = module(), batches(2)
    assert not loss(f_s * math.nan, f_t, idx, contrast_idx).isfinite()
    loss.memory_v1.copy_(module().memory_v1)
    loss.memory_v2.copy_(module().memory_v2)
    assert loss(*good).isfinite()
    assert nce.is_settled(loss.Z_v1)


def test_a_checkpoint_resumes_with_the_same_numbers() -> None:
    labels, steps = torch.arange(40) % 3, [step[:3] for step in batches(5)]
    loss = module(labels=labels)
    for step in steps[:3]:
        loss(*step)
    state, random = copy.deepcopy(loss.state_dict()), torch.get_rng_state()
    want = [loss(*step) for step in steps[3:]]
    other = module(seed=5, labels=labels)
    other.load_state_dict(state)
    torch.set_rng_state(random)
    assert all(torch.equal(other(*step), value) for step, value in zip(steps[3:], want))
    assert all(torch.equal(value, loss.state_dict()[name]) for name, value in other.state_dict().items())


def test_the_module_compiles_to_the_same_bits() -> None:
    steps, eager, compiled = batches(3), module(), module()
    torch._dynamo.reset()
    step = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    for batch in steps:
        a, b = eager(*batch), step(*batch)
        assert torch.equal(a, b)
        for value in (a, b):
            value.backward()
    assert torch.equal(eager.embed_t.linear.weight.grad, compiled.embed_t.linear.weight.grad)
    assert all(torch.equal(value, eager.state_dict()[name]) for name, value in compiled.state_dict().items())
    labelled = torch.compile(module(labels=torch.arange(40) % 3), fullgraph=True, backend="aot_eager")
    assert labelled(*steps[0][:3]).isfinite()


def test_features_of_any_dtype_and_under_autocast() -> None:
    f_s, f_t, idx, contrast_idx = batches(1)[0]
    want = module()(f_s, f_t, idx, contrast_idx)
    assert torch.equal(module()(f_s.view(7, 3, 2, 1), f_t, idx, contrast_idx), want)
    with torch.autocast("cpu", torch.bfloat16):
        inside = module()(f_s, f_t, idx, contrast_idx)
    assert inside.dtype == torch.float32
    for got in (inside, module()(f_s.bfloat16(), f_t.bfloat16(), idx, contrast_idx), module().bfloat16()(f_s, f_t, idx, contrast_idx)):
        assert error(got, want) < 0.05


@pytest.mark.parametrize(
    ("options", "changes", "message"),
    [
        pytest.param({"n_data": 1}, {}, "n_data must be at least 2", id="n_data"),
        pytest.param({"nce_k": 0}, {}, "nce_k must be positive", id="nce_k"),
        pytest.param({"nce_t": 0.0}, {}, "nce_t must be positive", id="nce_t"),
        pytest.param({"nce_m": 1.5}, {}, r"nce_m must be in \[0, 1\]", id="nce_m"),
        pytest.param({"labels": [0] * 40}, {}, "labels must be a tensor, got list", id="labels, a list"),
        pytest.param({"labels": torch.zeros(8).long()}, {}, r"labels must be \[40\] integers", id="labels, too few"),
        pytest.param({"labels": torch.zeros(40)}, {}, r"labels must be \[40\] integers", id="labels, floating"),
        pytest.param({"labels": torch.zeros(40).long()}, {}, "at least two classes", id="labels, one class"),
        pytest.param({}, {"f_s": torch.ones(4, 7)}, r"f_s must be \[4, 6\]", id="f_s"),
        pytest.param({}, {"f_t": torch.ones(3, 5)}, r"f_t must be \[4, 5\]", id="f_t"),
        pytest.param({}, {"f_t": torch.ones(4, 5, requires_grad=True)}, "swapped", id="swapped"),
        pytest.param({}, {"idx": torch.arange(4).int()}, "idx must be int64", id="idx, dtype"),
        pytest.param({}, {"idx": torch.arange(3)}, r"idx must be \[4\]", id="idx, too few"),
        pytest.param({}, {"idx": torch.arange(4) + 37}, r"idx must be in \[0, 40\), got 40", id="idx, range"),
    ],
)
def test_module_names_bad_options_and_input(options: dict[str, Any], changes: dict[str, Tensor], message: str) -> None:
    inputs = {"f_s": torch.ones(4, 6), "f_t": torch.ones(4, 5), "idx": torch.arange(4)} | changes
    with pytest.raises((ValueError, TypeError), match=message):
        CRDLoss(6, 5, **({"n_data": 40} | options))(**inputs)


# ---- processes -------------------------------------------------------------------------------------------------------

WORLD, STEPS = 2, 3


def one_rank(rank: int, world: int) -> dict[str, Any]:
    """Its share of the joined batches: losses, gradients summed over steps, and the state."""
    loss = module()
    values = []
    for f_s, f_t, idx, contrast_idx in batches(STEPS, B=12):
        mine = slice(rank * 12 // world, (rank + 1) * 12 // world)
        value = loss(f_s[mine], f_t[mine], idx[mine], contrast_idx[mine])
        value.backward()
        values.append(value.detach())
    return {"values": torch.stack(values), "gradient": loss.embed_s.linear.weight.grad, "state": dict(loss.state_dict())}


@pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="this PyTorch has no gloo")
@pytest.mark.skipif(DEVICE != "cpu", reason="the processes talk through gloo, on the CPU")
@pytest.mark.skipif(INTERPRETED, reason="processes are as many, and the kernel is tested alone")
def test_processes_keep_equal_banks_and_do_what_one_does(tmp_path: Path) -> None:
    ranks, alone = in_processes(one_rank, WORLD, tmp_path), one_rank(0, 1)
    for name, value in ranks[0]["state"].items():
        assert torch.equal(value, ranks[1]["state"][name]), name
        assert error(value, alone["state"][name]) < FLOAT32_ERROR, name
    for name in ("values", "gradient"):
        mean = torch.stack([rank[name] for rank in ranks]).mean(0)
        assert error(mean, alone[name]) < FLOAT32_ERROR, name
    assert error(ranks[0]["values"], ranks[1]["values"]) > 1e-3, "each has its own part"
    fresh = module().state_dict()
    assert not torch.equal(alone["state"]["memory_v1"], fresh["memory_v1"])


def test_a_group_of_one_is_none() -> None:
    batch = batches(1)[0]
    want = module()(*batch)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        assert torch.equal(module()(*batch), want)
    finally:
        dist.destroy_process_group()
