"""linear_kd_loss against its reference in float64: the contracts of KERNELS.md section 5 that apply to it."""

import os
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from kdfast import reference
from kdfast.benchmarks.linear_kd import case
from kdfast.benchmarks.timing import interleaved, peak_memory
from kdfast.functional import kd_loss, linear_kd_loss
from kdfast.ops.distill_kl import linear as linear_kd
from kdfast.ops.distill_kl.options import KDOptions
from tests.numeric import ALLOWANCE, DEVICE, FLOAT32_ERROR, INTERPRETED, KERNELS, error, value_and_gradients

pytestmark = pytest.mark.kernels

SHAPES = [(1, 2, 3, 5), (3, 7, 4, 4), (33, 1001, 16, 24), (130, 100, 64, 32), (2, 32003, 128, 160)]  # N, C, D_s, D_t
CHUNKS = [None, 1, 5, 1000]
FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.fixture(autouse=True)
def _few_programs(monkeypatch):
    """The interpreter takes its time for every program, and chunks make many of few rows: test_distill_kl_kernel.py has all plans."""
    if INTERPRETED:
        from kdfast.kernels import distill_kl as kernel

        plan = kernel.plan
        monkeypatch.setattr(kernel, "plan", lambda C, heavy: plan(C, heavy)._replace(rows=32 * plan(C, heavy).rows))


def layers(N, C, D_s, D_t, dtype=torch.float32, teacher_dtype=None):
    """Hidden, weight and bias of student and teacher; logits have a standard deviation of about 3."""
    tensors = []
    for D, kind in ((D_s, dtype), (D_t, teacher_dtype or dtype)):
        tensors += [x.to(kind) for x in (torch.randn(N, D), 3 * torch.randn(C, D) / D**0.5, torch.randn(C))]
    return tensors


def called(function, labels=None, **options):
    """The loss as a function of the six tensors alone."""

    def call(student_hidden, student_weight, student_bias, teacher_hidden, teacher_weight, teacher_bias):
        return function(
            student_hidden, student_weight, teacher_hidden, teacher_weight, labels,
            student_bias=student_bias, teacher_bias=teacher_bias, **options,
        )  # fmt: skip

    return call


def agree(tensors, labels=None, chunks=(None,), upstream=None, floor=0.0, slack=1.0, **options):
    """Value and all six gradients against float64, in chunks of each size; and a zero and a permuted gradient that must not pass.

    floor: absolute error that passes, for gradients that are small differences of nearly equal probabilities.
    slack: by what eager PyTorch's own error may be exceeded where it is more than 1e-5.
    """
    exact = value_and_gradients(called(reference.linear_kd_loss, labels, **options), [x.double() for x in tensors], upstream)
    peer = value_and_gradients(called(reference.linear_kd_loss, labels, **options), tensors, upstream)
    allowance = max(ALLOWANCE[x.dtype] for x in tensors)
    for chunk_rows in chunks:
        ours = value_and_gradients(called(linear_kd_loss, labels, chunk_rows=chunk_rows, **options), tensors, upstream)
        for index, (got, eager, want) in enumerate(zip(ours, peer, exact)):
            size = want.abs().max().item() if want.numel() else 0.0
            allowed = max(FLOAT32_ERROR, slack * error(eager, want), floor / max(size, 1e-300)) + allowance
            assert error(got, want) <= allowed, (chunk_rows, index, error(got, want), allowed)
            if index and size > 1e3 * floor and want.shape[-1] > 2:
                assert error(torch.zeros_like(got), want) > allowed, "a zero gradient would pass"
                assert error(got.roll(1, -1), want) > allowed, "a permuted gradient would pass"


# ---- values and gradients --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("standardize", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_value_and_gradients_match_float64(shape, standardize):
    labels = torch.randint(shape[1], shape[:1])
    chunks = CHUNKS if shape[1] < 10000 else CHUNKS[:2]
    if INTERPRETED and shape[0] > 100:  # it takes its time for every launch
        chunks = [None, 25, 1000]
    floor = 3e-5 if standardize and shape[1] == 2 else 0.0  # two classes standardize to +-0.7 whatever the logits: a gradient of 0
    agree(layers(*shape), chunks=chunks, temperature=2.0, standardize=standardize, floor=floor)
    agree(layers(*shape), labels, chunks=chunks, kd_weight=0.9, ce_weight=0.1, standardize=standardize, floor=floor)


@pytest.mark.parametrize("teacher_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_dtypes_in_many_chunks(dtype, teacher_dtype):
    # 300 addends of a weight's gradient: summed in bfloat16 they would miss by far more than eager's one rounding
    tensors = layers(300, 50, 16, 24, dtype, teacher_dtype)
    labels = torch.randint(50, (300,))

    def call(function, **chunks):
        return called(function, labels, ce_weight=0.5, **chunks)

    # eager PyTorch's logits are rounded to each dtype too, so the reference of mixed dtypes takes them one by one
    exact = value_and_gradients(call(reference.linear_kd_loss), [x.double() for x in tensors])
    eager = value_and_gradients(call(reference.linear_kd_loss), tensors)
    for chunk_rows in (25, 300) if INTERPRETED else (1, 7, 300):
        ours = value_and_gradients(call(linear_kd_loss, chunk_rows=chunk_rows), tensors)
        for got, peer, want, x in zip(ours[1:], eager[1:], exact[1:], tensors):
            assert got.dtype == x.dtype
            allowed = max(FLOAT32_ERROR, error(peer, want)) + max(ALLOWANCE[dtype], ALLOWANCE[teacher_dtype])
            assert error(got, want) <= allowed, (chunk_rows, got.shape)
            assert error(torch.zeros_like(got), want) > allowed
            assert error(got.roll(1, -1), want) > allowed
        assert ours[0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("standardize", [False, True])
@pytest.mark.parametrize("divergence", ["forward", "reverse", "js"])
def test_options_match_float64(divergence, standardize, reduction):
    agree(
        layers(9, 33, 8, 6),
        torch.tensor([0, 5, -100, 32, 1, 2, 3, -100, 4]),
        chunks=(1, 4, 9),
        upstream=torch.rand(9) + 0.5 if reduction == "none" else torch.tensor(1.7),
        temperature=3.0,
        standardize=standardize,
        divergence=divergence,
        kd_weight=1.3,
        ce_weight=0.7,
        label_smoothing=0.1,
        reduction=reduction,
    )


def test_is_kd_loss_of_two_linear_layers():
    h, w, b, ht, wt, bt = layers(12, 30, 8, 5)
    labels = torch.randint(30, (12,))
    got = linear_kd_loss(h, w, ht, wt, labels, student_bias=b, teacher_bias=bt, ce_weight=0.2, chunk_rows=5, reduction="none")
    torch.testing.assert_close(got, kd_loss(F.linear(h, w, b), F.linear(ht, wt, bt), labels, ce_weight=0.2, reduction="none"))
    torch.testing.assert_close(linear_kd_loss(h, w, ht, wt, chunk_rows=5), kd_loss(F.linear(h, w), F.linear(ht, wt)))


def test_leading_dimensions_and_strides():
    labels = torch.randint(20, (3, 7))
    shape = [(3, 7, 8), (20, 8), (20,), (3, 7, 6), (20, 6), (20,)]
    tensors = [torch.randn(s) for s in shape]
    agree(tensors, labels, chunks=(None, 4), ce_weight=0.3)
    strided = [torch.randn(*s[:-1], 2 * s[-1])[..., ::2] if len(s) > 1 else torch.randn(2 * s[0])[::2] for s in shape]
    agree(strided, labels, chunks=(None, 4), ce_weight=0.3)
    transposed = [x.mT.contiguous().mT if x.dim() > 1 else x for x in tensors]
    agree(transposed, labels.t().contiguous().t(), chunks=(None, 4), ce_weight=0.3)
    assert called(linear_kd_loss, reduction="none")(*tensors).shape == (3, 7)
    agree([x[0, 0] if x.dim() == 3 else x for x in tensors], torch.tensor(3), ce_weight=0.3)


def test_only_what_requires_grad_gets_a_gradient():
    tensors = layers(10, 15, 4, 4)
    everything = value_and_gradients(called(linear_kd_loss, chunk_rows=3), tensors)[1:]
    for chosen in range(6):
        leaves = [x.clone().requires_grad_(i == chosen) for i, x in enumerate(tensors)]
        called(linear_kd_loss, chunk_rows=3)(*leaves).backward()
        assert torch.equal(leaves[chosen].grad, everything[chosen])
        assert all(x.grad is None for i, x in enumerate(leaves) if i != chosen)
    assert not called(linear_kd_loss)(*tensors).requires_grad


def test_without_kd_weight_the_teacher_is_not_read():
    h, w, b, ht, wt, bt = layers(10, 15, 4, 4)
    labels = torch.randint(15, (10,))
    function = called(linear_kd_loss, labels, kd_weight=0.0, ce_weight=1.0, chunk_rows=4)
    ours = value_and_gradients(function, [h, w, b, ht * torch.nan, wt, bt])
    exact = value_and_gradients(lambda h, w, b: F.cross_entropy(F.linear(h, w, b), labels), [h.double(), w.double(), b.double()])
    assert max(error(got, want) for got, want in zip(ours, exact)) <= FLOAT32_ERROR
    assert not any(x.any() for x in ours[4:])


@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("hidden_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_multiplies_in_its_dtype_as_two_linear_layers_do(cast, hidden_dtype):
    def under_autocast(function, **options):
        def call(*inputs):
            with torch.autocast(inputs[0].device.type, cast):
                return called(function, **options)(*inputs)

        return call

    # the mean of a few draws: eager rounds a weight's gradient to 16 bits, which now and then happens to undo another rounding
    errors = {"eager": [0.0] * 7, "whole": [0.0] * 7, "chunks": [0.0] * 7}
    draws = 5
    for _ in range(draws):
        tensors = layers(400, 100, 16, 24)
        tensors[0], tensors[3] = tensors[0].to(hidden_dtype), tensors[3].to(hidden_dtype)
        exact = value_and_gradients(called(reference.linear_kd_loss), [x.double() for x in tensors])
        for name, function in (
            ("eager", under_autocast(reference.linear_kd_loss)),
            ("whole", under_autocast(linear_kd_loss)),
            ("chunks", under_autocast(linear_kd_loss, chunk_rows=150 if INTERPRETED else 37)),
        ):
            got = value_and_gradients(function, tensors)
            assert all(x.dtype == y.dtype for x, y in zip(got[1:], tensors))
            errors[name] = [total + error(x, want) / draws for total, x, want in zip(errors[name], got, exact)]
    for name in ("whole", "chunks"):
        assert all(ours <= eager + ALLOWANCE[cast] for ours, eager in zip(errors[name], errors["eager"])), errors
        assert min(errors[name][1:]) > 1e-5, "the products were in float32"


def test_float64_is_not_cast_by_autocast():
    tensors = [x.double() for x in layers(4, 6, 3, 3)]
    with torch.autocast(tensors[0].device.type, torch.bfloat16):
        assert error(called(linear_kd_loss)(*tensors), called(reference.linear_kd_loss)(*tensors)) < 1e-12


def test_float16_gradients_do_not_underflow_before_the_scale():
    tensors = layers(64, 1000, 16, 16, torch.float16)
    agree(tensors, chunks=(None, 16), upstream=torch.tensor(2.0**16), temperature=1.0, kd_weight=1e-4)


@settings(max_examples=300, deadline=None, derandomize=bool(os.environ.get("CI")), database=None)
@given(
    N=st.integers(1, 9),
    C=st.integers(3, 40),
    D_s=st.integers(3, 12),
    D_t=st.integers(3, 12),
    chunk_rows=st.one_of(st.none(), st.integers(1, 10)),
    temperature=st.floats(0.5, 8),
    standardize=st.booleans(),
    divergence=st.sampled_from(["forward", "reverse", "js"]),
    reduction=st.sampled_from(["mean", "sum", "none"]),
    smoothing=st.sampled_from([0.0, 0.1]),
    ce_weight=st.sampled_from([0.0, 0.5]),
    ignored=st.booleans(),
    dtype=st.sampled_from(FLOATS),
    seed=st.integers(0, 2**20),
)
def test_fuzz(
    N, C, D_s, D_t, chunk_rows, temperature, standardize, divergence, reduction, smoothing, ce_weight, ignored, dtype, seed
):  # fmt: skip
    torch.manual_seed(seed)
    labels = torch.randint(C, (N,))
    if ignored:
        labels[torch.randint(N, ())] = -100
    agree(
        layers(N, C, D_s, D_t, dtype), labels, chunks=(chunk_rows,), temperature=temperature, standardize=standardize,
        divergence=divergence, reduction=reduction, label_smoothing=smoothing, ce_weight=ce_weight, floor=3e-5,
        slack=2.0,  # of badly conditioned rows two evaluations are off by as much, not by the same
    )  # fmt: skip


# ---- rows that do not count, and those that are broken ---------------------------------------------------------------


def test_ignored_rows_add_nothing():
    h, w, b, ht, wt, bt = layers(8, 9, 4, 4)
    labels = torch.tensor([1, -100, 2, 8, -100, -100, 0, 3])
    keep = labels != -100
    want = value_and_gradients(called(linear_kd_loss, labels[keep], ce_weight=0.5), [h[keep], w, b, ht[keep], wt, bt])
    for chunk_rows in (1, 3, None):  # a chunk of one may hold nothing that counts
        got = value_and_gradients(called(linear_kd_loss, labels, ce_weight=0.5, chunk_rows=chunk_rows), [h, w, b, ht, wt, bt])
        for index, (x, y) in enumerate(zip(got, want)):
            torch.testing.assert_close(x[keep] if index in (1, 4) else x, y)
        assert not got[1][~keep].any()
        assert not got[4][~keep].any()
    nothing = value_and_gradients(called(linear_kd_loss, torch.full((8,), -100), chunk_rows=3), [h, w, b, ht, wt, bt])
    assert not any(x.any() for x in nothing)
    assert called(linear_kd_loss, torch.arange(8), ignore_index=3, reduction="none")(h, w, b, ht, wt, bt)[3] == 0


def test_nan_stays_in_its_row():
    tensors = layers(7, 9, 4, 4)
    tensors[0][4, 1] = torch.nan
    value, *gradients = value_and_gradients(called(linear_kd_loss, reduction="none", chunk_rows=3), tensors)
    for x in (value, gradients[0].sum(1), gradients[3].sum(1)):
        assert x.isnan().tolist() == [False] * 4 + [True] + [False] * 2


def test_impossible_classes_count_as_nothing():
    tensors = layers(5, 12, 4, 4)
    tensors[5][3] = -torch.inf  # in the teacher's bias: a masked class
    agree(tensors[:5] + [tensors[5]], chunks=(None, 2))
    tensors[2][3] = -torch.inf
    value, *gradients = value_and_gradients(called(linear_kd_loss, chunk_rows=2), tensors)
    assert value.isfinite()
    assert all(x.isfinite().all() for x in gradients)


@pytest.mark.parametrize("shape", [(0,), (4, 0)], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_empty_batch(shape, reduction):
    tensors = [torch.randn(*shape, 4), torch.randn(9, 4), torch.randn(9), torch.randn(*shape, 3), torch.randn(9, 3), torch.randn(9)]
    labels = torch.zeros(shape, dtype=torch.int64)
    value, *gradients = value_and_gradients(called(linear_kd_loss, labels, ce_weight=1.0, reduction=reduction), tensors)
    assert value.shape == (shape if reduction == "none" else ())
    assert not value.any()
    for gradient, x in zip(gradients, tensors):
        assert gradient.shape == x.shape
        assert not gradient.any()


@pytest.mark.parametrize("label", [9, -1])
def test_a_label_out_of_range(label):
    tensors, labels = layers(8, 9, 4, 4), torch.tensor([1, 0, 2, 8, 0, label, 0, 3])
    if DEVICE == "cpu":
        with pytest.raises(ValueError, match=rf"linear_kd_loss: labels must be in \[0, 9\).*got {label}"):
            called(linear_kd_loss, labels, chunk_rows=4)(*tensors)
    else:
        value = called(linear_kd_loss, labels, chunk_rows=4, reduction="none")(*tensors)
        assert value.isnan().tolist() == [False] * 5 + [True] + [False] * 2


# ---- autograd, torch.compile -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_backward_twice_and_no_second_derivative(dtype, reduction):
    leaves = [x.requires_grad_() for x in layers(6, 9, 4, 4, dtype)]
    loss = called(linear_kd_loss, standardize=True, chunk_rows=4, reduction=reduction)(*leaves).sum()
    allowed = 5e-3 if dtype == torch.float16 else FLOAT32_ERROR
    first = torch.autograd.grad(3 * loss, leaves, retain_graph=True)
    second = torch.autograd.grad(3 * loss, leaves, retain_graph=True)
    third = torch.autograd.grad(loss, leaves)
    for a, b, c in zip(first, second, third):
        assert error(b, a) <= allowed
        assert error(3 * c, a) <= allowed
    with pytest.raises(RuntimeError, match="linear_kd_loss has no second derivative"):
        torch.autograd.grad(called(linear_kd_loss, reduction=reduction)(*leaves).sum(), leaves, create_graph=True)


def test_inputs_are_never_written():
    tensors, labels = layers(10, 30, 8, 8), torch.zeros(10, dtype=torch.int64)
    before = [x.clone() for x in tensors]
    for options in ({}, {"temperature": 1.0}, {"standardize": True}, {"divergence": "js"}, {"reduction": "none"}):
        leaves = [x.requires_grad_() for x in tensors]
        loss = called(linear_kd_loss, labels, ce_weight=1.0, chunk_rows=4, **options)(*leaves)
        (2 * loss.sum()).backward()
        assert all(torch.equal(a, b) for a, b in zip(tensors, before))


def test_bitwise_reproducible():
    tensors, labels = layers(50, 1001, 16, 16), torch.randint(1001, (50,))
    first, second = (value_and_gradients(called(linear_kd_loss, labels, ce_weight=0.3, chunk_rows=16), tensors) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_compiles_without_a_break_and_equals_eager(dtype, reduction):
    tensors, labels = layers(6, 12, 4, 5, dtype), torch.tensor([0, 5, -100, 11, 2, 1])
    loss = called(linear_kd_loss, labels, ce_weight=0.4, chunk_rows=4, reduction=reduction)

    def scaled(*inputs):
        return 2 * loss(inputs[0] * 1, *inputs[1:])

    eager = value_and_gradients(scaled, tensors)
    compiled = value_and_gradients(torch.compile(scaled, fullgraph=True, backend="aot_eager"), tensors)
    for got, want in zip(compiled, eager):
        torch.testing.assert_close(got, want, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_an_eager_loss_in_a_compiled_backward(dtype):
    tensors = layers(6, 12, 4, 5, dtype)

    def gradients(compiled):
        leaves = [x.clone().requires_grad_() for x in tensors]
        loss = 2 * called(linear_kd_loss, chunk_rows=4)(*leaves)
        with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager")) if compiled else nullcontext():
            loss.backward()
        return [x.grad for x in leaves]

    for got, want in zip(gradients(True), gradients(False)):
        torch.testing.assert_close(got, want)


def test_a_graph_takes_a_weight_that_both_share():
    hidden, teacher, weight = torch.randn(6, 4), torch.randn(6, 4), torch.randn(12, 4)

    def loss(hidden, weight):
        return linear_kd_loss(hidden, weight, teacher, weight)

    compiled = value_and_gradients(torch.compile(loss, fullgraph=True, backend="aot_eager"), [hidden, weight])
    assert all(torch.equal(got, want) for got, want in zip(compiled, value_and_gradients(loss, [hidden, weight])))


def test_the_meta_device_gives_shapes():
    hidden, weight = torch.empty(6, 4, device="meta"), torch.empty(12, 4, device="meta")
    assert linear_kd_loss(hidden, weight, hidden, weight, reduction="none").shape == (6,)


def test_compiles_under_autocast():
    tensors = layers(6, 12, 4, 5)
    tensors[0] = tensors[0].bfloat16()

    def loss(*inputs):
        with torch.autocast(inputs[0].device.type, torch.bfloat16):
            return called(linear_kd_loss, chunk_rows=4)(*inputs)

    eager = value_and_gradients(loss, tensors)
    compiled = value_and_gradients(torch.compile(loss, fullgraph=True, backend="aot_eager"), tensors)
    assert all(torch.equal(got, want) and got.dtype == want.dtype for got, want in zip(compiled, eager))


def test_registered_operator():
    tensors, labels = layers(3, 5, 4, 6), torch.tensor([1, 2, -100])
    tensors[3:] = [x.bfloat16() for x in tensors[3:]]
    for wanted, cast, reduction in (
        ([True] * 6, None, "mean"),
        ([True, False, True, False, True, False], torch.bfloat16, "sum"),
        ([False] * 6, None, "none"),
    ):
        options = KDOptions(
            temperature=2.0, standardize=True, eps=1e-7, kd_weight=1.0, ce_weight=0.3,
            label_smoothing=0.1, ignore_index=-100, divergence="js", reduction=reduction,
        ).encode()  # fmt: skip
        torch.library.opcheck(linear_kd._op, (tensors, labels, None, wanted, 2, cast, *options))
        without_bias, wanted = [*tensors[:2], None, *tensors[3:5], None], wanted[:2] + [False] * 4
        torch.library.opcheck(linear_kd._op, (without_bias, labels, None, wanted, None, cast, *options))


# ---- memory ----------------------------------------------------------------------------------------------------------


def step(leaves, labels, **options):
    """One forward and backward pass into fresh gradients, with an upstream gradient that is not 1."""

    def run():
        for x in leaves:
            x.grad = None
        (0.7 * called(linear_kd_loss, labels, **options)(*leaves)).backward()

    return run


# of a chunk's logits. The interpreter's argument lists keep the gradients of the part before until the garbage collector comes
HELD = 1.5 if INTERPRETED else 1.25
MEMORY = [
    {"standardize": True, "ce_weight": 0.5, "label_smoothing": 0.1},
    {},
    {"divergence": "js", "standardize": True, "ce_weight": 0.5},
]
MEMORY_DTYPES = [(torch.float32, torch.bfloat16), (torch.float32,) * 2, (torch.bfloat16,) * 2]
if INTERPRETED:  # which takes its time for every row
    MEMORY, MEMORY_DTYPES = MEMORY[:1], MEMORY_DTYPES[:1]


@pytest.mark.parametrize("options", MEMORY, ids=str)
@pytest.mark.parametrize("teacher_learns", [False, True])
@pytest.mark.parametrize("dtypes", MEMORY_DTYPES, ids=str)
def test_memory_is_bounded_by_the_chunks(dtypes, teacher_learns, options):
    N, C, D, chunk_rows = (34, 16000, 64, 16) if INTERPRETED else (130, 16000, 64, 64)
    device = torch.device(DEVICE)
    leaves, labels = layers(N, C, D, D, *dtypes), torch.randint(C, (N,))
    learns = [x.requires_grad_() for x in leaves[: 6 if teacher_learns else 3]]
    run = step(leaves, labels, chunk_rows=chunk_rows, **options)
    run()
    for x in leaves:
        x.grad = None
    held = peak_memory(run, device) - sum(x.nbytes for x in learns)
    chunks = chunk_rows * C * sum(x.itemsize for x in dtypes)
    # the sum of a 16-bit weight's gradient is float32: documented to come on top
    sums = sum(4 * x.numel() for x in learns if x.shape[0] == C and x.dtype == torch.bfloat16)
    assert 0.9 * chunks < held <= HELD * chunks + sums


def test_memory_is_bounded_with_more_features_than_classes():
    leaves = [x.requires_grad_() for x in layers(256, 500, 1000, 1000)]
    run = step(leaves, None, chunk_rows=64)
    run()
    for x in leaves:
        x.grad = None
    held = peak_memory(run, torch.device(DEVICE)) - sum(x.nbytes for x in leaves)
    assert held <= HELD * 64 * 500 * 8


def test_memory_without_gradients():
    N, C, D, chunk_rows = (40, 16000, 128, 16) if INTERPRETED else (256, 16000, 128, 32)
    leaves = [x.requires_grad_() for x in layers(N, C, D, D)]
    chunks = chunk_rows * C * 8
    assert leaves[1].nbytes > HELD * chunks, "a gradient would be seen"
    with torch.no_grad():
        called(linear_kd_loss, chunk_rows=chunk_rows)(*leaves)  # a GPU's libraries take their workspaces
        held = peak_memory(lambda: called(linear_kd_loss, chunk_rows=chunk_rows)(*leaves), torch.device(DEVICE))
    assert 0.9 * chunks < held <= HELD * chunks


def test_gradients_become_grad_without_a_copy():
    leaves = [x.requires_grad_() for x in layers(64, 2000, 256, 256)]
    loss = called(linear_kd_loss, chunk_rows=16)(*leaves)
    assert peak_memory(loss.backward, torch.device(DEVICE)) < 2000


@pytest.mark.parametrize(
    ("N", "C", "dtype", "weight_learns", "rows"),
    [
        (10000, 131072, torch.float32, True, 128 if DEVICE == "cpu" else 1024),
        (10000, 10**7, torch.float32, True, linear_kd.LEAST_ROWS),
        (10000, 131072, torch.bfloat16, True, 128 if DEVICE == "cpu" else 1024),
        (400, 10**7, torch.bfloat16, True, linear_kd.LEAST_ROWS),
        (300, 10**7, torch.bfloat16, True, 300),  # 64 + D = 320 rows take no more than a float32 sum of the weight's gradient
        (300, 10**7, torch.bfloat16, False, linear_kd.LEAST_ROWS),
    ],
)
def test_default_rows(N, C, dtype, weight_learns, rows):
    hidden, weight = torch.empty(N, 256, dtype=dtype), torch.empty((), dtype=dtype).expand(C, 256)
    layer = linear_kd.Layer(hidden, weight, None)
    assert linear_kd.default_rows(layer, layer, (True, weight_learns) + 4 * (False,), None) == rows


# ---- bad input -------------------------------------------------------------------------------------------------------

H, W, B = torch.ones(2, 4), torch.ones(3, 4), torch.ones(3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"student_hidden": H.long()}, "student_hidden must be floating, got torch.int64"),
        ({"teacher_hidden": H.long()}, "teacher_hidden must be floating"),
        ({"student_hidden": torch.ones(())}, r"student_hidden must be \[..., D\]"),
        ({"student_hidden": H[:, :0]}, r"student_hidden must be \[..., D\] with at least one feature"),
        ({"teacher_hidden": H[:1]}, r"teacher_hidden must have student_hidden's rows \(2,\), got \(1,\)"),
        ({"student_weight": W[:, :3]}, r"student_weight must be \[C, 4\] to fit student_hidden.*got shape \(3, 3\)"),
        ({"student_weight": W[0]}, r"student_weight must be \[C, 4\]"),
        ({"student_weight": W[:0], "teacher_weight": W[:0]}, "at least one class"),
        ({"teacher_weight": W[:2]}, "teacher_weight must have student_weight's 3 classes, got 2"),
        ({"student_bias": B[:2]}, r"student_bias must be \[3\], got shape \(2,\)"),
        ({"teacher_bias": torch.ones(3, 1)}, r"teacher_bias must be \[3\]"),
        ({"student_weight": W.double()}, "student_weight must have student_hidden's dtype torch.float32, got torch.float64"),
        ({"teacher_bias": B.long()}, "teacher_bias must have teacher_hidden's dtype"),
        ({"teacher_hidden": H.to("meta")}, "teacher_hidden must be on student_hidden's"),
        ({"student_weight": W.to("meta")}, "student_weight must be on student_hidden's"),
        ({"chunk_rows": 0}, "chunk_rows must be a positive integer or None, got 0"),
        ({"chunk_rows": 2.5}, "chunk_rows must be a positive integer or None, got 2.5"),
        ({"chunk_rows": True}, "chunk_rows must be a positive integer or None, got True"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"temperature": "2"}, "temperature must be a number, got '2'"),
        ({"student_weight": None}, "student_weight must be a tensor, got NoneType"),
        ({"ce_weight": 0.1}, "labels must be given"),
        ({"labels": torch.tensor([0, 1], dtype=torch.int32)}, "labels must be int64"),
        ({"labels": torch.tensor([0])}, r"labels must have shape \(2,\)"),
        ({"labels": torch.zeros(2, dtype=torch.int64, device="meta")}, "labels must be on"),
        ({"label_smoothing": 1.5}, "label_smoothing must be in"),
        ({"divergence": "kl"}, "divergence must be one of"),
        ({"reduction": "batchmean"}, "reduction must be one of"),
        ({"eps": -1.0, "standardize": True}, "eps must not be negative"),
        ({"standardize": True, "student_weight": W[:1], "teacher_weight": W[:1]}, "at least two classes"),
    ],
)
def test_bad_input_is_named(changes, message):
    arguments = {"student_hidden": H, "student_weight": W, "teacher_hidden": H, "teacher_weight": W, **changes}
    with pytest.raises((ValueError, TypeError), match=f"^linear_kd_loss: .*{message}"):
        linear_kd_loss(**arguments)


# ---- speed -----------------------------------------------------------------------------------------------------------


@pytest.mark.speed
@pytest.mark.skipif(KERNELS, reason="the promise is about CPUs")
@pytest.mark.parametrize("shape", [(512, 256, 1000), (2048, 512, 1000), (512, 256, 32000)], ids=str)
def test_not_slower_than_eager_and_never_more_memory(shape):
    ours, theirs = (case(*shape).step(variant).run for variant in ("kdfast", "eager"))
    assert peak_memory(ours) <= peak_memory(theirs)
    best = 0.0
    for _ in range(5):
        best = max(best, interleaved(ours, theirs, pairs=20)["speedup"])
        if best >= 0.95:
            return
    pytest.fail(f"slower than eager: {best}")
