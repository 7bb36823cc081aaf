"""What only the Triton kernel of nce_loss has to show; test_crd.py holds the rest, in the interpreter and on a GPU too."""

import math
import os
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kdfast
from kdfast import reference
from kdfast.ops import nce
from tests.losses.test_crd import compare, problem, unit
from tests.numeric import DEVICE, FLOAT32_ERROR, KERNELS, error, value_and_gradients

pytestmark = [pytest.mark.kernels, pytest.mark.skipif(not KERNELS, reason="the kernels need a GPU or TRITON_INTERPRET=1")]
if KERNELS:
    from kdfast.kernels import nce as kernel


def run(anchors, bank, indices, Z, with_gradient=True):
    """The kernel itself, past the operator's checks."""
    log_b = math.log((indices.shape[1] - 1) / len(bank) + nce.EPS)
    return kernel.loss_and_gradient(anchors, bank, indices, torch.tensor(Z), 0.07, log_b, 0.0, with_gradient)


@pytest.mark.parametrize("D", [1, 4, 8, 10, 64, 100, 101, 128, 256, 300, 513, 2000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_width_matches_float64(D, dtype):
    compare(*problem(3, 60, 90 if D < 300 else 9, D, dtype), temperature=0.3)


@pytest.mark.parametrize("columns", [1, 2, 31, 32, 33, 128, 129, 511, 700])
def test_every_number_of_columns_matches_float64(columns):
    compare(*problem(2, 90, columns - 1, 24))


def test_few_programs_walk_long_parts(monkeypatch):
    monkeypatch.setattr(kernel, "PROGRAMS", 2)
    compare(*problem(3, 90, 700, 24))


@pytest.mark.parametrize("B", [1, 3, 64, 5000])
@pytest.mark.parametrize("columns", [1, 100, 16385])
@pytest.mark.parametrize("rows", [1, 32, 128])
def test_parts_cover_all_columns_and_none_is_empty(B, columns, rows):
    split, tiles = kernel.parts(B, columns, rows)
    assert split * tiles * rows >= columns
    assert (split - 1) * tiles * rows < columns
    assert split == 1 or split * B < 2 * kernel.PROGRAMS + B


def test_wider_rows_run_in_pytorch(monkeypatch):
    monkeypatch.setattr(kernel, "WIDEST", 16)
    monkeypatch.setattr(kernel, "loss_and_gradient", None)
    monkeypatch.setattr(kernel, "normalizer", None)
    compare(*problem(3, 60, 40, 17))


@pytest.mark.parametrize("bad", [-1, 60, 2**40, -(2**40)])
def test_an_index_of_no_row_is_nan_and_reads_nothing(bad, monkeypatch):
    anchors, bank, indices = problem(3, 60, 90, 16)
    for column in (0, 7, 90):
        wrong = indices.clone()
        wrong[1, column] = bad
        loss, gradient = run(anchors, bank, wrong, 70.0)
        assert loss.isnan()
        assert gradient.isnan().all(1).tolist() == [False, True, False]
        assert kernel.normalizer(anchors, bank, wrong, torch.tensor(-1.0), 0.07).isnan()
    monkeypatch.setattr(nce, "DENSE", 0)
    with kdfast.backend("torch"):  # what a GPU without the kernel computes; on a CPU such indices are refused before
        loss, gradient = nce.loss_and_gradient(anchors, bank, wrong, torch.tensor(70.0), 0.07, 0.0, 0.0, True)
    assert loss.isnan()
    assert gradient.isnan().all(1).tolist() == [False, True, False]


def test_rows_may_lie_further_apart_than_32_bits_count():
    # virtual memory only: what lies between the rows is never touched
    stride = 2**31 + 64
    bank = torch.empty(2 * stride + 16, dtype=torch.float16, device=DEVICE).as_strided((3, 16), (stride, 1))
    bank.copy_(unit(3, 16))
    compare(unit(2, 16), bank, torch.tensor([[0, 1, 2], [2, 0, 1]]), 0.3)


def test_a_launch_goes_to_the_device_of_its_tensors(monkeypatch):
    guarded = []
    guard = torch.cuda.device_of
    monkeypatch.setattr(torch.cuda, "device_of", lambda x: guarded.append(x) or guard(x))
    anchors, bank, indices = problem(3, 60, 90, 16)
    Z = nce.normalizer(anchors, bank, indices, 0.07)
    nce.nce_loss(anchors.requires_grad_(), bank, indices, Z, 0.07).backward()
    assert len(guarded) == 2, "the normalizer's launches, and the loss's"
    assert all(x.device == anchors.device for x in guarded)


def test_no_gradient_is_made_where_none_is_wanted():
    anchors, bank, indices = problem(3, 60, 90, 16)
    loss, gradient = run(anchors, bank, indices, 70.0)
    alone, none = run(anchors, bank, indices, 70.0, with_gradient=False)
    assert torch.equal(alone, loss)
    assert none.shape == (0, 16)
    assert gradient.dtype == torch.float32


def test_a_settled_constant_reads_no_rows():
    anchors, bank, indices = problem(3, 60, 90, 16)
    poison = torch.full_like(bank, math.nan)
    assert kernel.normalizer(anchors, poison, indices, torch.tensor(5.0), 0.07) == 5
    assert kernel.normalizer(anchors, poison, indices, torch.tensor(-5.0), 0.07).isnan()


def test_small_terms_keep_their_digits():
    """Thousands of negatives that each add some 1e-5: log(1 + e) in float32 would be wrong by a hundredth."""
    anchors, bank, indices = problem(2, 50, 3000, 8)
    Z = torch.tensor(1e9)
    want = reference.crd_loss(anchors.double(), bank.double(), indices, Z=Z.double())
    terms = want - reference.crd_loss(anchors.double(), bank.double(), indices[:, :1], Z=Z.double())
    assert terms.isfinite()
    assert error(nce.nce_loss(anchors, bank, indices, Z, 0.07), want) < 1e-6


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16], ids=str)
def test_the_default_dtype_changes_nothing(default):
    anchors, bank, indices = problem(3, 60, 90, 16)
    plain = value_and_gradients(lambda v: nce.nce_loss(v, bank, indices, torch.tensor(70.0, dtype=torch.float32), 0.07), [anchors])
    torch.set_default_dtype(default)
    try:
        Z = torch.tensor(70.0, dtype=torch.float32)
        again = value_and_gradients(lambda v: nce.nce_loss(v, bank, indices, Z, 0.07), [anchors])
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(again, plain))


PROBLEMS = given(
    B=st.integers(1, 5),
    n=st.integers(1, 60),
    K=st.integers(0, 120),
    D=st.integers(1, 70),
    temperature=st.floats(0.05, 5),
    length=st.floats(0.1, 1.5),
    log_Z=st.floats(-12, 12),
    dtype=st.sampled_from([torch.float32, torch.float32, torch.bfloat16, torch.float16]),
    bank_dtype=st.sampled_from([torch.float32, torch.float32, torch.bfloat16]),
    programs=st.sampled_from([1, 7, 1056]),
    seed=st.integers(0, 10**6),
)


@settings(max_examples=100, deadline=None, derandomize=bool(os.environ.get("CI")), database=None)
@PROBLEMS
def test_fuzz(**case: Any) -> None:
    _check_problem(**case)


@pytest.mark.slow
@settings(max_examples=320, deadline=None, derandomize=bool(os.environ.get("CI")), database=None)
@PROBLEMS
def test_fuzz_longer(**case: Any) -> None:
    _check_problem(**case)


def _check_problem(**case: Any) -> None:
    torch.manual_seed(case["seed"])
    anchors, bank, indices = problem(case["B"], case["n"], case["K"], case["D"], case["dtype"], case["bank_dtype"])
    anchors *= case["length"]
    temperature, Z = case["temperature"], torch.tensor(math.exp(case["log_Z"]))

    def original(dtype):
        fixed = {"bank": bank.to(dtype), "indices": indices, "Z": Z.to(dtype), "temperature": temperature}
        return value_and_gradients(lambda v: reference.crd_loss(v, **fixed), [anchors.to(dtype)])

    exact, eager = original(torch.float64), original(torch.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel, "PROGRAMS", case["programs"])
        ours = value_and_gradients(lambda v: nce.nce_loss(v, bank, indices, Z, temperature), [anchors])
    rounding = {torch.float32: 0.0, torch.bfloat16: 2**-8, torch.float16: 2**-11}[case["dtype"]]
    t = torch.einsum("bkd,bd->bk", bank.double()[indices], anchors.double()) / temperature
    t -= math.log(Z.item() * (case["K"] / case["n"] + nce.EPS))
    t[:, 0] *= -1
    mass = t.sigmoid().sum(1).max().item() / (case["B"] * temperature)  # of the gradient's terms, which may cancel
    for index, (got, peer, want) in enumerate(zip(ours, eager, exact)):
        size, peers = want.abs().max().item(), 3 * (peer - want).abs().max().item()
        least = max(FLOAT32_ERROR * max(size, mass if index else 0.0), peers if math.isfinite(peers) else 0.0)
        assert (got - want).abs().max() <= least + (rounding * size + 2**-25 if index else 0.0)
