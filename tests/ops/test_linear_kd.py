"""linear_kd_loss's values, gradients, memory and errors; test_distill_kl_autograd.py has autograd and torch.compile."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st

from kdfast import reference
from kdfast.benchmarks.timing import peak_memory
from kdfast.functional import kd_loss, linear_kd_loss
from kdfast.ops.distill_kl import linear as operator
from tests.numeric import ALLOWANCE, DEVICE, FLOAT32_ERROR, INTERPRETED, error, value_and_gradients
from tests.ops.contracts import FLOATS, make_fuzz
from tests.ops.distillation import OPTIONS, agree, linear, make_layers

pytestmark = pytest.mark.kernels

SHAPES = [(1, 2, 3, 5), (3, 7, 4, 4), (33, 1001, 16, 24), (130, 100, 64, 32), (2, 32003, 128, 160)]  # N, C, D_s, D_t
CHUNKS = [None, 1, 5, 1000]
not_interpreted = pytest.mark.skipif(INTERPRETED, reason="the interpreter is slow for each row: one case is enough")


@pytest.fixture(autouse=True)
def _few_programs(monkeypatch):
    """The interpreter is slow for each program, and chunks make many of few rows: test_distill_kl_kernel.py has all plans."""
    if INTERPRETED:
        from kdfast.kernels import distill_kl as kernel

        plan = kernel.plan
        monkeypatch.setattr(kernel, "plan", lambda C, heavy: plan(C, heavy)._replace(rows=32 * plan(C, heavy).rows))


# ---- values and gradients --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("standardize", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_value_and_gradients_match_float64(shape, standardize):
    labels = torch.randint(shape[1], shape[:1])
    chunks = CHUNKS if shape[1] < 10000 else CHUNKS[1:2]
    if INTERPRETED and shape[0] > 100:  # slow for every launch
        chunks = [None, 25, 1000]
    floor = 3e-5 if standardize and shape[1] == 2 else 0.0  # two classes standardize to +-0.7 whatever the logits: a gradient of 0
    agree(linear, make_layers(*shape), chunks=chunks, temperature=2.0, standardize=standardize, floor=floor)
    agree(linear, make_layers(*shape), labels, chunks=chunks, kd_weight=0.9, ce_weight=0.1, standardize=standardize, floor=floor)


@pytest.mark.parametrize("teacher_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_dtypes_in_many_chunks(dtype, teacher_dtype):
    # 300 addends of a weight's gradient: summed in bfloat16 they would miss by far more than eager's one rounding
    tensors, labels = make_layers(300, 50, 16, 24, dtype, teacher_dtype), torch.randint(50, (300,))
    agree(linear, tensors, labels, chunks=(100, 300) if INTERPRETED else (1, 7, 300), ce_weight=0.5)
    value, *gradients = value_and_gradients(linear(labels, chunk_rows=100), tensors)
    assert [x.dtype for x in gradients] == [x.dtype for x in tensors]
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_biases_are_optional():
    h, w, _, h_t, w_t, _ = make_layers(12, 30, 8, 5)
    torch.testing.assert_close(linear_kd_loss(h, w, h_t, w_t, chunk_rows=5), kd_loss(F.linear(h, w), F.linear(h_t, w_t)))


def test_leading_dimensions_and_strides():
    labels = torch.randint(20, (3, 7))
    shape = [(3, 7, 8), (20, 8), (20,), (3, 7, 6), (20, 6), (20,)]
    tensors = [torch.randn(s) for s in shape]
    agree(linear, tensors, labels, chunks=(None, 4), ce_weight=0.3)
    strided = [torch.randn(*s[:-1], 2 * s[-1])[..., ::2] if len(s) > 1 else torch.randn(2 * s[0])[::2] for s in shape]
    agree(linear, strided, labels, chunks=(None, 4), ce_weight=0.3)
    transposed = [x.mT.contiguous().mT if x.dim() > 1 else x for x in tensors]
    agree(linear, transposed, labels.t().contiguous().t(), chunks=(None, 4), ce_weight=0.3)
    assert linear(reduction="none")(*tensors).shape == (3, 7)
    agree(linear, [x[0, 0] if x.dim() == 3 else x for x in tensors], torch.tensor(3), ce_weight=0.3)


def test_without_kd_weight_the_teacher_is_not_read():
    h, w, b, ht, wt, bt = make_layers(10, 15, 4, 4)
    labels = torch.randint(15, (10,))
    function = linear(labels, kd_weight=0.0, ce_weight=1.0, chunk_rows=4)
    ours = value_and_gradients(function, [h, w, b, ht * torch.nan, wt, bt])
    exact = value_and_gradients(lambda h, w, b: F.cross_entropy(F.linear(h, w, b), labels), [h.double(), w.double(), b.double()])
    assert max(error(got, want) for got, want in zip(ours, exact)) <= FLOAT32_ERROR
    assert not any(x.any() for x in ours[4:])


@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("hidden_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_multiplies_in_its_dtype_as_two_linear_layers_do(cast, hidden_dtype):
    variants = {
        "eager": linear(module=reference),
        "whole": linear(),
        "chunks": linear(chunk_rows=150 if INTERPRETED else 37),
    }
    # the mean of a few draws: eager's rounding of a weight's gradient to 16 bits can happen to undo another rounding
    errors, draws = {name: [0.0] * 7 for name in variants}, 5
    for _ in range(draws):
        tensors = make_layers(400, 100, 16, 24)
        tensors[0], tensors[3] = tensors[0].to(hidden_dtype), tensors[3].to(hidden_dtype)
        exact = value_and_gradients(variants["eager"], [x.double() for x in tensors])
        for name, call in variants.items():
            with torch.autocast(tensors[0].device.type, cast):
                got = value_and_gradients(call, tensors)
            assert all(x.dtype == y.dtype for x, y in zip(got[1:], tensors))
            errors[name] = [total + error(x, want) / draws for total, x, want in zip(errors[name], got, exact)]
    for name in ("whole", "chunks"):
        assert all(ours <= eager + ALLOWANCE[cast] for ours, eager in zip(errors[name], errors["eager"])), errors
        assert min(errors[name][1:]) > 1e-5, "the products were in float32"


def test_float64_is_not_cast_by_autocast():
    tensors = [x.double() for x in make_layers(4, 6, 3, 3)]
    with torch.autocast(tensors[0].device.type, torch.bfloat16):
        assert error(linear()(*tensors), linear(module=reference)(*tensors)) < 1e-12


def check_random_case(data):
    draw = data.draw
    torch.manual_seed(draw(st.integers(0, 2**20)))
    N, C, D_s, D_t = (draw(st.integers(*limits)) for limits in ((1, 9), (3, 40), (3, 12), (3, 12)))
    tensors, labels = make_layers(N, C, D_s, D_t, draw(st.sampled_from(FLOATS))), torch.randint(C, (N,))
    if draw(st.booleans()):
        labels[torch.randint(N, ())] = -100
    chunks, ce_weight = [draw(st.none() | st.integers(1, 10))], draw(st.sampled_from([0.0, 0.5]))
    # slack: on badly conditioned rows two evaluations have errors of one size, not of one sign
    agree(linear, tensors, labels, chunks=chunks, floor=3e-5, slack=2.0, ce_weight=ce_weight, **draw(OPTIONS))


test_random_cases = make_fuzz(check_random_case, 100, 20)
test_many_random_cases = pytest.mark.slow(make_fuzz(check_random_case, 1000, 300))


def test_impossible_classes_add_nothing():
    tensors = make_layers(5, 12, 4, 4)
    tensors[5][3] = -torch.inf  # in the teacher's bias: a masked class
    agree(linear, tensors, chunks=(None, 2))
    tensors[2][3] = -torch.inf
    value, *gradients = value_and_gradients(linear(chunk_rows=2), tensors)
    assert value.isfinite()
    assert all(x.isfinite().all() for x in gradients)


@pytest.mark.parametrize("label", [9, -1])
def test_a_label_out_of_range(label):
    tensors, labels = make_layers(8, 9, 4, 4), torch.tensor([1, 0, 2, 8, 0, label, 0, 3])
    if DEVICE == "cpu":
        with pytest.raises(ValueError, match=rf"linear_kd_loss: labels must be in \[0, 9\).*got {label}"):
            linear(labels, chunk_rows=4)(*tensors)
    else:
        value = linear(labels, chunk_rows=4, reduction="none")(*tensors)
        assert value.isnan().tolist() == [False] * 5 + [True] + [False] * 2


# ---- memory ----------------------------------------------------------------------------------------------------------

# of a chunk's logits. The interpreter's argument lists keep the gradients of the part before until the garbage collector comes
HELD = 1.5 if INTERPRETED else 1.25


def measure_peak(leaves, labels=None, **options):
    """Bytes that a forward and a backward pass hold beyond inputs and gradients; the upstream gradient is not 1."""

    def step():
        for x in leaves:
            x.grad = None
        (0.7 * linear(labels, **options)(*leaves)).backward()

    step()
    for x in leaves:
        x.grad = None
    return peak_memory(step, torch.device(DEVICE)) - sum(x.nbytes for x in leaves if x.requires_grad)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"standardize": True, "ce_weight": 0.5, "label_smoothing": 0.1}, id="lskd+ce"),
        pytest.param({}, id="kd", marks=not_interpreted),
        pytest.param({"divergence": "js", "standardize": True, "ce_weight": 0.5}, id="js", marks=not_interpreted),
    ],
)
@pytest.mark.parametrize("teacher_learns", [False, True])
@pytest.mark.parametrize(
    "dtypes",
    [
        pytest.param((torch.float32, torch.bfloat16), id="mixed"),
        pytest.param((torch.float32, torch.float32), id="float32", marks=not_interpreted),
        pytest.param((torch.bfloat16, torch.bfloat16), id="bfloat16", marks=not_interpreted),
    ],
)
def test_memory_is_bounded_by_the_chunks(dtypes, teacher_learns, options):
    N, C, D, chunk_rows = (34, 16000, 64, 16) if INTERPRETED else (70, 4000, 64, 64)
    leaves, labels = make_layers(N, C, D, D, *dtypes), torch.randint(C, (N,))
    learns = [x.requires_grad_() for x in leaves[: 6 if teacher_learns else 3]]
    held, chunks = measure_peak(leaves, labels, chunk_rows=chunk_rows, **options), chunk_rows * C * sum(x.itemsize for x in dtypes)
    # the sum of a 16-bit weight's gradient is float32: documented to come on top
    sums = sum(4 * x.numel() for x in learns if x.shape[0] == C and x.dtype == torch.bfloat16)
    assert 0.9 * chunks < held <= HELD * chunks + sums


def test_memory_is_bounded_with_more_features_than_classes_and_by_default(monkeypatch):
    leaves = [x.requires_grad_() for x in make_layers(256, 500, 1000, 1000)]
    monkeypatch.setattr(operator, "DEFAULT_CHUNK", 64 * 500)
    monkeypatch.setattr(operator, "DEFAULT_CHUNK_CUDA", 64 * 500)
    for chunk_rows in (64, None):
        assert measure_peak(leaves, chunk_rows=chunk_rows) <= HELD * 64 * 500 * 8


def test_memory_without_gradients():
    N, C, D, chunk_rows = (40, 16000, 128, 16) if INTERPRETED else (128, 4000, 128, 32)
    leaves = [x.requires_grad_() for x in make_layers(N, C, D, D)]
    chunks = chunk_rows * C * 8
    assert leaves[1].nbytes > HELD * chunks, "a gradient would be seen"
    with torch.no_grad():
        linear(chunk_rows=chunk_rows)(*leaves)  # a GPU's libraries take their workspaces
        held = peak_memory(lambda: linear(chunk_rows=chunk_rows)(*leaves), torch.device(DEVICE))
    assert 0.9 * chunks < held <= HELD * chunks


def test_gradients_become_grad_without_a_copy():
    leaves = [x.requires_grad_() for x in make_layers(64, 2000, 256, 256)]
    loss = linear(chunk_rows=16)(*leaves)
    assert peak_memory(loss.backward, torch.device(DEVICE)) < 2000


# ---- bad input -------------------------------------------------------------------------------------------------------

H, W, B = torch.ones(2, 4), torch.ones(3, 4), torch.ones(3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param({"student_hidden": H.long()}, "student_hidden must be floating, got torch.int64", id="student_hidden dtype"),
        pytest.param({"student_hidden": H[:, :0]}, r"student_hidden must be \[..., D\] with at least one feature", id="no features"),
        pytest.param({"teacher_hidden": H[:1]}, r"teacher_hidden must have student_hidden's rows \(2,\), got \(1,\)", id="teacher rows"),
        pytest.param(
            {"student_weight": W[:, :3]}, r"student_weight must be \[C, 4\] to fit student_hidden.*got shape \(3, 3\)", id="weight features"
        ),
        pytest.param({"student_weight": W[:0], "teacher_weight": W[:0]}, "at least one class", id="no classes"),
        pytest.param({"teacher_weight": W[:2]}, "teacher_weight must have student_weight's 3 classes, got 2", id="teacher classes"),
        pytest.param({"student_bias": B[:2]}, r"student_bias must be \[3\], got shape \(2,\)", id="student_bias"),
        pytest.param(
            {"student_weight": W.double()},
            "student_weight must have student_hidden's dtype torch.float32, got torch.float64",
            id="weight dtype",
        ),
        pytest.param({"teacher_hidden": H.to("meta")}, "teacher_hidden must be on student_hidden's", id="teacher_hidden device"),
        pytest.param({"student_weight": W.to("meta")}, "student_weight must be on student_hidden's", id="weight device"),
        pytest.param({"chunk_rows": 0}, "chunk_rows must be a positive integer or None, got 0", id="chunk_rows 0"),
        pytest.param({"chunk_rows": True}, "chunk_rows must be a positive integer or None, got True", id="chunk_rows True"),
        pytest.param({"temperature": 0.0}, "temperature must be positive", id="temperature"),
        pytest.param({"student_weight": None}, "student_weight must be a tensor, got NoneType", id="no weight"),
        pytest.param({"ce_weight": 0.1}, "labels must be given", id="no labels"),
        pytest.param({"standardize": True, "student_weight": W[:1], "teacher_weight": W[:1]}, "at least two classes", id="one class"),
    ],
)
def test_bad_input_is_named(changes, message):
    arguments = {"student_hidden": H, "student_weight": W, "teacher_hidden": H, "teacher_weight": W, **changes}
    with pytest.raises((ValueError, TypeError), match=f"^linear_kd_loss: .*{message}"):
        linear_kd_loss(**arguments)
