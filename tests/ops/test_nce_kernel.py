"""What only the Triton kernel of nce_loss has to show; test_crd.py holds the rest, in the interpreter and on a GPU too."""

import math

import pytest
import torch
from hypothesis import strategies as st

import kdfast
from kdfast import reference
from kdfast.ops import nce
from tests.losses.test_crd import check, problem
from tests.numeric import FLOAT32_ERROR, KERNELS, error
from tests.ops.contracts import FLOATS, make_fuzz, place_far_apart, unit

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
    check(*problem(3, 60, 90 if D < 300 else 9, D, dtype), temperature=0.3)


@pytest.mark.parametrize("columns", [1, 2, 31, 32, 33, 128, 129, 511, 700])
def test_every_number_of_columns_matches_float64(columns):
    check(*problem(2, 90, columns - 1, 24))


def test_few_programs_walk_long_parts(monkeypatch):
    monkeypatch.setattr(kernel, "PROGRAMS", 2)
    check(*problem(3, 90, 700, 24))


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
    check(*problem(3, 60, 40, 17))


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


def test_rows_may_be_further_apart_than_32_bits_count():
    check(unit(2, 16), place_far_apart(unit(3, 16)), torch.tensor([[0, 1, 2], [2, 0, 1]]), 0.3)


def check_random_case(data):
    draw = data.draw
    torch.manual_seed(draw(st.integers(0, 10**6)))
    B, n, K, D = (draw(st.integers(*limits)) for limits in ((1, 5), (1, 60), (0, 120), (1, 70)))
    dtype, bank_dtype = (
        draw(st.sampled_from(FLOATS[:1] + FLOATS[:3])),
        draw(st.sampled_from([torch.float32, torch.float32, torch.bfloat16])),
    )
    anchors, bank, indices = problem(B, n, K, D, dtype, bank_dtype)
    anchors *= draw(st.floats(0.1, 1.5))
    temperature, Z = draw(st.floats(0.05, 5)), torch.tensor(math.exp(draw(st.floats(-12, 12))))
    t = torch.einsum("bkd,bd->bk", bank.double()[indices], anchors.double()) / temperature
    t -= math.log(Z.item() * (K / n + nce.EPS))
    t[:, 0] *= -1
    mass = t.sigmoid().sum(1).max().item() / (B * temperature)  # of the gradient's terms, which may cancel
    floors = {"gradient_floor": 2 * FLOAT32_ERROR * mass + 2**-24 * (dtype == torch.float16), "slack": 3.0, "eager_dtype": torch.float32}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel, "PROGRAMS", draw(st.sampled_from([1, 7, 1056])))
        check(anchors, bank, indices, temperature, Z, allowance=2**-8 * (dtype != torch.float32), **floors)


test_random_cases = make_fuzz(check_random_case, 100, 100)
test_many_random_cases = pytest.mark.slow(make_fuzz(check_random_case, 320, 320))
