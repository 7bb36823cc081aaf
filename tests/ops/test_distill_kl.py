"""kd_loss's values and gradients against its reference in float64, on every kind of input; `chunked` is linear_kd_loss."""

import statistics

import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from kdfast import functional, reference
from kdfast.benchmarks.timing import peak_memory
from kdfast.functional import kd_loss
from kdfast.losses import LogitStandardizationLoss
from kdfast.ops.distill_kl import eager
from tests.numeric import FLOAT32_ERROR, INTERPRETED, KERNELS, error, value_and_gradients
from tests.ops.contracts import FLOATS, make_fuzz
from tests.ops.distillation import OPTIONS, agree, chunked, kd, make_logits

pytestmark = pytest.mark.kernels

SHAPES = [(1, 2), (3, 7), (4097, 10), (3, 100), (3, 1000), (33, 1001), (1, 32003), (3, 32003)]
each_loss = pytest.mark.parametrize("bind", [kd, chunked])
eager_only = pytest.mark.skipif(KERNELS, reason="about the PyTorch form, and the kernel runs here")


# ---- values and gradients --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("standardize", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_value_and_gradients_match_float64(shape, standardize):
    # two classes standardize to +-0.7 whatever the logits: a gradient of 0
    floor = 1e-5 if standardize and shape[1] == 2 else 0.0
    inputs, labels = [make_logits(*shape), make_logits(*shape)], torch.randint(shape[1], shape[:1])
    agree(kd, inputs, temperature=2.0, standardize=standardize, floor=floor)
    agree(kd, inputs, labels, standardize=standardize, kd_weight=0.9, ce_weight=0.1, floor=floor)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("teacher_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dtypes_mix(dtype, teacher_dtype):
    for standardize in (False, True):
        inputs = [make_logits(33, 100, dtype=dtype), make_logits(33, 100, dtype=teacher_dtype)]
        agree(kd, inputs, torch.randint(100, (33,)), ce_weight=0.5, standardize=standardize)
    assert kd_loss(*inputs).dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_original_implementations_agree(oracles):
    names = {key.split("/")[0] for key in oracles if key.startswith("lskd_")}
    assert len(names) >= 7
    for name in names:
        case = {key: oracles[f"{name}/{key}"] for key in ("student", "teacher", "temperature", "standardize", "loss")}
        inputs = [torch.tensor(case["student"]), torch.tensor(case["teacher"])]
        want = [torch.tensor(case["loss"]), torch.tensor(oracles[f"{name}/grad_student"]), torch.tensor(oracles[f"{name}/grad_teacher"])]
        options = {"temperature": float(case["temperature"]), "standardize": bool(case["standardize"])}

        def measure(call, dtype):
            return max(error(a, b) for a, b in zip(value_and_gradients(call, [x.to(dtype) for x in inputs]), want))  # noqa: B023

        for module in (functional, reference):
            assert measure(kd(module=module, **options), torch.float64) <= 1e-12, name
            assert measure(kd(module=module, **options), torch.float32) <= FLOAT32_ERROR, name
        if case["standardize"]:
            module, temperature = LogitStandardizationLoss(), options["temperature"]
            assert measure(lambda s, t: module(t, s, temperature), torch.float64) <= 1e-12, name  # noqa: B023


def test_strided_rows_chunks_and_leading_dimensions(monkeypatch):
    monkeypatch.setattr(eager, "CHUNK", 256)
    labels = torch.randint(100, (21,))
    for make in (lambda: make_logits(21, 300)[:, 3:103], lambda: make_logits(100, 21).t(), lambda: make_logits(3, 7, 100).reshape(21, 100)):
        agree(kd, [make(), make(), make()], labels, ce_weight=0.3, standardize=True)
    agree(kd, [make_logits(3, 7, 100, dtype=torch.bfloat16), make_logits(3, 7, 100)], labels.view(3, 7), ce_weight=0.3)
    agree(kd, [make_logits(50), make_logits(50)], torch.tensor(3), ce_weight=0.3)
    stacked, student = make_logits(2, 4, 9), make_logits(4, 9)
    assert torch.equal(kd_loss(student, stacked), kd_loss(student, list(stacked)))
    assert kd_loss(make_logits(3, 7, 5), make_logits(3, 7, 5), reduction="none").shape == (3, 7)


@pytest.mark.parametrize("standardize", [False, True])
def test_extreme_logits(standardize):
    base = make_logits(6, 20)
    one_hot = 1e4 * F.one_hot(torch.arange(6), 20).float()
    constant = base.clone()
    constant[2], constant[4] = 0.1, -1e4
    for student in (base, base * 1e4 / 12, base + 1e4, base - 1e4, one_hot, constant):
        for teacher in (base.flip(0), one_hot.flip(0), constant.flip(0)):
            agree(kd, [student, teacher], standardize=standardize, temperature=2.0)
    ours = value_and_gradients(kd(standardize=standardize), [constant, constant.flip(0)])
    assert all(x.isfinite().all() for x in ours)


@pytest.mark.parametrize("divergence", ["forward", "js"])
def test_impossible_classes_add_nothing(divergence):
    student, teacher = make_logits(5, 12), make_logits(5, 12)
    teacher[:, 3] = -torch.inf
    agree(kd, [student, teacher], divergence=divergence)
    student[:, 3] = -torch.inf
    agree(kd, [student, teacher], divergence=divergence)
    assert kd_loss(student, teacher, divergence=divergence).isfinite()
    student[1, 4] = -torch.inf  # possible for the teacher
    value = kd_loss(student, teacher, divergence="forward", reduction="none")
    assert value[1] == torch.inf
    assert value[[0, 2, 3, 4]].isfinite().all()


@pytest.mark.parametrize("mask", [-torch.inf, -1e30, torch.finfo(torch.float32).min, -1e9], ids=["-inf", "-1e30", "finfo.min", "-1e9"])
@pytest.mark.parametrize("C", [12, pytest.param(1000, id="1000"), pytest.param(9001, id="walked")])
def test_masked_classes_are_no_part_of_standardized_rows(mask, C):
    student, teacher = make_logits(3, C), make_logits(3, C)
    masked = torch.rand(3, C) < 0.3
    masked[:, :3], masked[2] = False, False
    inputs = [student.masked_fill(masked, mask), teacher.masked_fill(masked, mask)]
    for divergence in ("forward", "reverse", "js"):
        options = {"standardize": True, "temperature": 2.0, "divergence": divergence}
        alone = [reference.kd_loss(s[~m], t[~m], **options) for s, t, m in zip(student.double(), teacher.double(), masked)]
        agree(kd, inputs, **options)
        value, *gradients = value_and_gradients(kd(reduction="none", **options), inputs)
        assert error(value, torch.stack(alone)) <= FLOAT32_ERROR
        assert all(g.isfinite().all() and not g[masked].any() and g[~masked].any() for g in gradients)
        alone_again = value_and_gradients(kd(reduction="none", **options), [x[2:] for x in inputs])[0]
        assert torch.equal(value[2:], alone_again)


@pytest.mark.parametrize("mask", [-torch.inf, -1e30])
def test_a_linear_layers_bias_masks_classes(mask):
    student, teacher, bias = make_logits(5, 9), make_logits(5, 9), torch.zeros(9).index_fill_(0, torch.tensor([0, 4]), mask)
    kept, eye, options = bias == 0, torch.eye(9), {"standardize": True, "temperature": 2.0}
    ours = functional.linear_kd_loss(student, eye, teacher, eye, student_bias=bias, teacher_bias=bias, chunk_rows=2, **options)
    assert error(ours, reference.kd_loss(student[:, kept].double(), teacher[:, kept].double(), **options)) <= FLOAT32_ERROR


@pytest.mark.parametrize("size", [1e12, 1e19, 1e25, 1e35])
@pytest.mark.parametrize("C", [10, 1000, pytest.param(9001, id="walked")])
def test_huge_standardized_logits_do_not_overflow(size, C):
    """Also beside small ones, whose gradients are 10^35 times as large: rows are compared one by one."""
    base, teacher = make_logits(2, C), make_logits(2, C)
    for divergence in ("forward", "js"):
        for inputs in ([base * size, teacher], [base, teacher * size], [base * size, teacher * size]):
            agree(kd, inputs, standardize=True, divergence=divergence)
    assert kd_loss(base * size, teacher, standardize=True) > 0.1


def test_a_row_with_one_class_left_has_no_distance():
    only = torch.full((2, 5), -torch.inf).index_fill_(1, torch.tensor([3]), 2.0)
    value, gradient, _ = value_and_gradients(kd(standardize=True), [only, only.clone()])
    assert value == 0
    assert not gradient.any()


@pytest.mark.parametrize("standardize", [False, True])
@pytest.mark.parametrize("divergence", ["forward", "reverse", "js"])
@pytest.mark.parametrize("C", [10, 1000])
def test_nearly_equal_rows_keep_their_digits(C, divergence, standardize):
    """Eager PyTorch is off by 0.5 to 2 in the value, and by 3e-4 to 2e-3 in the gradient."""
    student = make_logits(4, C)
    teacher = student + 1e-2 * torch.randn(4, C)
    options = {"temperature": 20.0, "divergence": divergence, "standardize": standardize}
    # the kernel's softmaxes of two rows are rounded apart, and its deviations
    of_value, of_gradient = (3e-4, 1e-3) if KERNELS else (1e-6, 1e-6)
    for bind in (kd, chunked):
        got = value_and_gradients(bind(**options), [student, teacher])
        value, *gradients = value_and_gradients(kd(None, reference, **options), [student.double(), teacher.double()])
        assert error(got[0], value) <= of_value
        assert max(error(ours, exact) for ours, exact in zip(got[1:], gradients)) <= of_gradient
    rows = torch.cat([teacher[:2], make_logits(2, C)])  # beside others they have the same bits
    beside = kd_loss(student, rows, reduction="none", **options)
    assert torch.equal(beside[:2], kd_loss(student[:2], rows[:2], reduction="none", **options))


@pytest.mark.parametrize("C", [10, 1000, pytest.param(9001, id="walked")])
@pytest.mark.parametrize("options", [{}, {"standardize": True}, {"divergence": "reverse"}, {"divergence": "js", "standardize": True}])
def test_equal_student_and_teacher_have_gradients_of_0(C, options):
    student = make_logits(3, C)
    value, *gradients = value_and_gradients(kd(temperature=3.0, **options), [student, student.clone()])
    assert value == 0
    assert not any(g.any() for g in gradients)


@each_loss
def test_nan_stays_in_its_row(bind):
    student, teacher = make_logits(4, 9), make_logits(4, 9)
    student[1, 2] = torch.nan
    value, gradient, _ = value_and_gradients(bind(standardize=True, reduction="none"), [student, teacher])
    assert value.isnan().tolist() == [False, True, False, False]
    assert gradient.isnan().any(1).tolist() == [False, True, False, False]


@each_loss
def test_ignored_rows_add_nothing_whatever_their_logits(bind):
    student, teacher, labels = make_logits(4, 9), make_logits(4, 9), torch.tensor([1, -100, 2, 8])
    counted = [0, 2, 3]
    want = value_and_gradients(bind(labels[counted], ce_weight=0.5), [student[counted], teacher[counted]])
    student[1], teacher[1] = torch.nan, torch.inf
    got = value_and_gradients(bind(labels, ce_weight=0.5), [student, teacher])
    torch.testing.assert_close(got[0], want[0])
    for gradient, expected in zip(got[1:], want[1:]):
        torch.testing.assert_close(gradient[counted], expected)
        assert not gradient[1].any()
    assert not any(x.any() for x in value_and_gradients(bind(torch.full((4,), -100)), [student, teacher]))
    assert bind(torch.tensor([0, 3, 0]), ignore_index=3, reduction="none")(student[counted], teacher[counted])[1] == 0


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@each_loss
def test_cross_entropy_is_pytorchs(bind, smoothing, reduction):
    x, labels = make_logits(7, 11).double(), torch.tensor([0, 10, 4, -100, 5, 5, 2])
    ones, options = torch.ones(7) if reduction == "none" else None, {"label_smoothing": smoothing, "reduction": reduction}
    want = value_and_gradients(lambda s: F.cross_entropy(s, labels, **options), [x], ones)
    for call in (bind(labels, kd_weight=0, ce_weight=1, **options), kd(labels, reference, kd_weight=0, ce_weight=1, **options)):
        got = value_and_gradients(lambda s: call(s, x), [x], ones)  # noqa: B023
        assert max(error(a, b) for a, b in zip(got, want)) < 1e-12


@pytest.mark.parametrize(("C", "N"), [(10, 4097), (100, 700), (1001, 131), (40000, 5)])
@pytest.mark.parametrize("threads", [1, 2])
def test_a_row_does_not_depend_on_the_others_bit_for_bit(C, N, threads):
    student, teacher, labels = make_logits(N, C), make_logits(N, C), torch.randint(C, (N,))

    def run(rows):
        call = kd(labels[rows], standardize=True, ce_weight=0.2, reduction="none")
        return value_and_gradients(lambda s: call(s, teacher[rows]), [student[rows]])

    torch.set_num_threads(threads)
    try:
        whole, again = run(slice(None)), run(slice(None))
        assert all(torch.equal(a, b) for a, b in zip(whole, again))
        for rows in (slice(0, 1), slice(N - 3, N), slice(1, 3)):
            assert all(torch.equal(a, b[rows]) for a, b in zip(run(rows), whole))
    finally:
        torch.set_num_threads(1)


def test_weights_and_temperature_may_be_tensors_and_are_read_at_every_call():
    student, teacher = make_logits(4, 10), make_logits(2, 4, 10)
    weights, temperature = torch.tensor([0.5, 0.25]), torch.tensor(4.0)
    for value in (4.0, 1.5):
        temperature.fill_(value)
        for _ in range(2):
            got = kd_loss(student, teacher, temperature=temperature, teacher_weights=weights, kd_weight=0.9)
            assert torch.equal(got, kd_loss(student, teacher, temperature=value, teacher_weights=[0.5, 0.25], kd_weight=0.9))
    assert weights.tolist() == [0.5, 0.25]


def test_negated_views():
    inputs = [make_logits(4, 10), make_logits(4, 10)]
    negated = [torch._neg_view(-x) for x in inputs]
    for got, want in zip(value_and_gradients(kd_loss, negated), value_and_gradients(kd_loss, inputs)):
        assert torch.equal(got, want)


@pytest.mark.parametrize("C", [2, 3, 10])
@pytest.mark.parametrize("temperature", [2.0, 20.0])
def test_gradients_of_few_standardized_classes_are_as_exact_as_eagers(C, temperature):
    """They add up to 0 but for rounding, which the division by a row's width enlarges: two classes have no other gradient."""
    options = {"temperature": temperature, "standardize": True, "kd_weight": 0.9, "ce_weight": 0.1}
    labels, errors = torch.zeros(64, dtype=torch.int64), {functional: [], reference: []}
    for seed in range(4 if INTERPRETED else 40):
        torch.manual_seed(seed)
        inputs = [make_logits(64, C), make_logits(64, C)]
        exact = value_and_gradients(kd(labels, reference, **options), [x.double() for x in inputs])[1]
        for module, found in errors.items():
            found.append(error(value_and_gradients(kd(labels, module, **options), inputs)[1], exact))
    assert statistics.median(errors[functional]) <= max(FLOAT32_ERROR, 1.1 * statistics.median(errors[reference]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tiny_logits_standardize_without_eps(dtype):
    inputs = [(make_logits(4, 10) * 1e-17).to(dtype), make_logits(4, 10).to(dtype)]
    got = value_and_gradients(kd(standardize=True, eps=0.0), inputs)[1]
    exact = value_and_gradients(kd(None, reference, standardize=True, eps=0.0), [x.double() for x in inputs])[1]
    assert error(got, exact) <= 1e-5


@pytest.mark.parametrize("divergence", ["forward", "reverse", "js"])
def test_the_value_at_a_high_temperature_does_not_cancel(divergence):
    allowed = FLOAT32_ERROR if KERNELS else 3e-6  # eager PyTorch is off by 1.6e-5 here
    options = {"temperature": 8.0, "standardize": True, "divergence": divergence}
    for seed in range(20):
        torch.manual_seed(seed)
        inputs = [make_logits(2, 30), make_logits(2, 30)]
        assert error(kd_loss(*inputs, **options), reference.kd_loss(*(x.double() for x in inputs), **options)) <= allowed


@eager_only
def test_fake_tensors_leave_no_constants_behind():
    inputs = [make_logits(3, 4), make_logits(3, 4)]
    eager._constant.cache_clear()
    with pytest.raises(RuntimeError, match="FakeTensor"), FakeTensorMode() as mode:
        kd_loss(*(mode.from_tensor(x) for x in inputs))
    assert kd_loss(*inputs).isfinite()


# ---- random cases ----------------------------------------------------------------------------------------------------


@st.composite
def rows_of_logits(draw, N, C):
    """[N, C] of any dtype, layout and size, with constant, one-hot or far-off rows among them."""
    dtype = draw(st.sampled_from(FLOATS[:3] if KERNELS else FLOATS))
    x = draw(st.sampled_from([0.01, 1.0, 3.0, 50.0])) * torch.randn(N, C)
    kind = draw(st.sampled_from(["plain"] * 4 + ["offset", "constant", "one-hot"]))
    row = draw(st.integers(0, N - 1))
    if kind == "offset":
        x = x + draw(st.sampled_from([-1e4, 300.0, 1e4]))
    elif kind == "constant":
        x[row] = draw(st.sampled_from([0.0, 0.1, -1e4]))
    elif kind == "one-hot":
        x[row] = 1e4 * F.one_hot(torch.tensor(draw(st.integers(0, C - 1))), C)
    x = x.to(dtype)
    layout = draw(st.sampled_from(["contiguous", "sliced", "shifted", "transposed"]))
    if layout == "transposed":
        return x.t().contiguous().t()
    if layout == "contiguous":
        return x
    first = int(layout == "shifted")  # rows begin at an odd address
    wide = torch.empty(N, C + draw(st.integers(1, 9)), dtype=dtype)  # rows with gaps between them
    wide[:, first : C + first] = x
    return wide[:, first : C + first]


def check_random_case(data):
    draw = data.draw
    torch.manual_seed(draw(st.integers(0, 2**20)))
    N, C = draw(st.integers(1, 5)), draw(st.sampled_from([3, 4, 5, 7, 8, 10, 16, 24, 33, 40]) | st.integers(3, 70))
    inputs, options = [draw(rows_of_logits(N, C)) for _ in range(1 + draw(st.integers(1, 4)))], draw(OPTIONS)
    labels = torch.randint(C, (N,)).masked_fill(torch.rand(N) < 0.2, -100) if draw(st.booleans()) else None
    temperature, weights = options["temperature"], [draw(st.floats(0.1, 3)) for _ in inputs[1:]]
    kd_weight, ce_weight = draw(st.sampled_from([(1.0, 0.0), (9.0, 0.0)] + [(0.0, 0.5), (0.9, 0.5)] * (labels is not None)))
    # contract 1 allows ten times as much where a gradient vanishes; a teacher's grows with log p - log q
    spread = max((x.amax(1) - x.amin(1)).max().item() for x in inputs) / temperature
    floor = 1e-6 * max(temperature * kd_weight * sum(weights), ce_weight) * max(1, spread)
    floor += 2**-24 * any(x.dtype == torch.float16 for x in inputs)  # a step of float16's smallest numbers
    if not options["standardize"]:  # far from 0 the rounding of x / T matters, for eager PyTorch too, but differently
        rounding = 2**-24 * max(x.abs().max().item() for x in inputs) / temperature
        floor += rounding * min(1, spread) * N * temperature**2 * kd_weight * sum(weights)
    options |= {"teacher_weights": weights, "kd_weight": kd_weight, "ce_weight": ce_weight}
    upstream = torch.rand((N,) if options["reduction"] == "none" else ()) + 0.5
    # slack: on badly conditioned rows two evaluations have errors of one size, not of one sign
    agree(kd, inputs, labels, upstream=upstream, floor=floor, slack=2.0, **options)


test_random_cases = make_fuzz(check_random_case, 200, 60)
test_many_random_cases = pytest.mark.slow(make_fuzz(check_random_case, 1500, 600))


# ---- bad input -------------------------------------------------------------------------------------------------------

X, LEARNS = torch.ones(2, 3), torch.ones((), requires_grad=True)
IMAGES, PIXELS = torch.ones(2, 3, 4, 4), torch.zeros(2, 4, 4, dtype=torch.int64)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        pytest.param((X, X), {"temperature": 0.0}, "temperature must be positive", id="temperature 0"),
        pytest.param((X, X), {"temperature": float("inf")}, "temperature must be positive", id="temperature inf"),
        pytest.param((X, X), {"temperature": "4"}, "temperature must be a number, got '4'", id="temperature no number"),
        pytest.param((X, X), {"teacher_weights": 1.0}, "teacher_weights must be a sequence of numbers, got 1.0", id="weights no sequence"),
        pytest.param((X, [X, X]), {"teacher_weights": [1.0]}, "teacher_weights must hold 2", id="too few weights"),
        pytest.param((X, X), {"teacher_weights": []}, "teacher_weights must hold 1", id="no weights"),
        pytest.param((X, X), {"divergence": "kl"}, "divergence must be one of", id="divergence"),
        pytest.param((X, X), {"reduction": "batchmean"}, "reduction must be one of", id="reduction"),
        pytest.param((X, X), {"eps": -1.0, "standardize": True}, "eps must not be negative", id="eps"),
        pytest.param((X[:, :1], X[:, :1]), {"standardize": True}, "at least two classes", id="one class"),
        pytest.param((X, X), {"ce_weight": 0.1}, "labels must be given", id="no labels"),
        pytest.param((X, X, [0, 1]), {"ce_weight": 0.1}, "labels must be a tensor, got list", id="labels no tensor"),
        pytest.param((X, X, torch.tensor([0.0, 1.0])), {}, "labels must be integers, got torch.float32", id="labels dtype"),
        pytest.param((X, X, torch.tensor([0])), {}, "labels must have shape", id="labels shape"),
        pytest.param((X, X, torch.zeros(2, dtype=torch.int64, device="meta")), {}, "labels must be on", id="labels device"),
        pytest.param((IMAGES, IMAGES, PIXELS), {}, r"got \(2, 4, 4\).*permute its classes to the end", id="images"),
        pytest.param((X, X, torch.tensor([0, 3])), {}, r"labels must be in \[0, 3\).*got 3", marks=eager_only, id="label too large"),
        pytest.param(([1.0, 2.0], X), {}, "student must be a tensor, got list", id="student no tensor"),
        pytest.param((X.long(), X), {}, "student must be floating", id="student dtype"),
        pytest.param((X, None), {}, "teacher must be a tensor or a sequence of tensors, got NoneType", id="no teacher"),
        pytest.param((X, []), {}, "at least one", id="teachers empty"),
        pytest.param((X, X[:1]), {}, "teacher must have student's shape", id="teacher shape"),
        pytest.param((X, X.to("meta")), {}, "teacher must be on student's device", id="teacher device"),
    ],
)
def test_bad_input_is_named(arguments, options, message):
    with pytest.raises((ValueError, TypeError), match=f"^kd_loss: .*{message}"):
        kd_loss(*arguments, **options)


# ---- memory and speed ------------------------------------------------------------------------------------------------


@eager_only
@pytest.mark.parametrize("shape", [(64, 1000), (68, 8000)], ids=str)
def test_never_more_memory_than_the_original(shape, monkeypatch):
    from kdfast.benchmarks.distill_kl import LOSSES, original

    monkeypatch.setattr(eager, "CHUNK", 2**13)  # as small beside the larger case as a chunk is beside usual logits
    student, teacher, labels = make_logits(*shape).requires_grad_(), make_logits(*shape), torch.randint(shape[1], shape[:1])

    def measure(loss, y, options):
        student.grad = None
        return peak_memory(lambda: loss(student, teacher, y, **options).backward())

    for name, options in LOSSES.items():
        ours, theirs = (measure(loss, labels if "ce_weight" in options else None, options) for loss in (kd_loss, original))
        assert theirs > 4 * student.nbytes, "the measure misses what eager PyTorch allocates"
        assert ours <= theirs + 8 * shape[0], f"{name}: more than eager and two numbers a row"
        if shape[0] > 64:
            assert ours <= 1.2 * student.nbytes, f"{name}: the gradient, and buffers of a chunk"
