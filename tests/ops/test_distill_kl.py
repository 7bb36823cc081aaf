"""kd_loss against its reference in float64: the contracts of KERNELS.md section 5 that apply to it."""

import os
import statistics
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.torch_version import TorchVersion

from kdfast import reference
from kdfast.benchmarks.timing import peak_memory
from kdfast.functional import kd_loss
from kdfast.losses import KDLoss, LogitStandardizationLoss
from kdfast.ops.distill_kl import eager as distill_kl_torch
from kdfast.ops.distill_kl import op as distill_kl
from kdfast.ops.distill_kl.options import KDOptions
from tests.numeric import ALLOWANCE, FLOAT32_ERROR, INTERPRETED, KERNELS, error, value_and_gradients

pytestmark = pytest.mark.kernels

SHAPES = [(1, 2), (3, 7), (4097, 10), (3, 100), (3, 1000), (33, 1001), (1, 32003), (3, 32003)]
FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
torch_form = pytest.mark.skipif(KERNELS, reason="about the PyTorch form, and the kernel runs here")
kernel = pytest.mark.skipif(not KERNELS, reason="about the kernel: needs a GPU or TRITON_INTERPRET=1")


def logits(*shape, dtype=torch.float32, spread=3.0):
    return (spread * torch.randn(shape)).to(dtype)


def agree(inputs, upstream=None, floor=0.0, slack=1.0, **options):
    """Value and gradients of kd_loss(*inputs) against float64, and a zero and a permuted gradient that must not pass.

    floor: absolute error that passes, for inputs whose value or gradient is a small difference of nearly equal probabilities.
    slack: by what eager PyTorch's own error may be exceeded where it is more than 1e-5.
    """

    def call(function):
        return lambda student, *teachers: function(student, list(teachers), **options)

    exact = value_and_gradients(call(reference.kd_loss), [x.double() for x in inputs], upstream)
    peer = value_and_gradients(call(reference.kd_loss), inputs, upstream)
    ours = value_and_gradients(call(kd_loss), inputs, upstream)
    allowance = max(ALLOWANCE[x.dtype] for x in inputs)
    if upstream is not None and allowance:  # a gradient that was rounded is scaled and rounded again
        allowance += 2**-7  # twice half a unit in bf16's last place
    for index, (got, eager, want) in enumerate(zip(ours, peer, exact)):
        size = want.abs().max().item() if want.isfinite().all() else 1.0
        allowed = max(FLOAT32_ERROR, slack * error(eager, want), floor / max(size, 1e-300)) + allowance
        assert error(got, want) <= allowed, (index, error(got, want), allowed)
        if index and size > 1e3 * floor and want.shape[-1] > 2 and allowed < 0.1:  # eager's own gradient may have underflowed
            assert error(torch.zeros_like(got), want) > allowed, "a zero gradient would pass"
            assert error(got.roll(1, -1), want) > allowed, "a permuted gradient would pass"


@pytest.mark.parametrize("standardize", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_value_and_gradients_match_float64(shape, standardize):
    labels = torch.randint(shape[1], shape[:1])
    # two classes standardize to +-0.7 whatever the logits: a gradient of 0
    floor = 1e-5 if standardize and shape[1] == 2 else 0.0
    agree([logits(*shape), logits(*shape)], temperature=2.0, standardize=standardize, floor=floor)
    agree(
        [logits(*shape), logits(*shape)], labels=labels, temperature=4.0, standardize=standardize, kd_weight=0.9, ce_weight=0.1, floor=floor
    )


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("teacher_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dtypes_mix(dtype, teacher_dtype):
    for standardize in (False, True):
        inputs = [logits(33, 100, dtype=dtype), logits(33, 100, dtype=teacher_dtype)]
        agree(inputs, labels=torch.randint(100, (33,)), ce_weight=0.5, standardize=standardize)
    assert kd_loss(*inputs).dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("divergence", ["forward", "reverse", "js"])
@pytest.mark.parametrize("teachers", [1, 3, 5])
@pytest.mark.parametrize("standardize", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_options_match_float64(divergence, teachers, standardize, reduction):
    N, C = 9, 33
    agree(
        [logits(N, C) for _ in range(1 + teachers)],
        upstream=torch.rand(N) + 0.5 if reduction == "none" else torch.tensor(1.7),
        labels=torch.tensor([0, 5, -100, 32, 1, 2, 3, -100, 4]),
        temperature=3.0,
        standardize=standardize,
        divergence=divergence,
        teacher_weights=[0.3 + k for k in range(teachers)],
        kd_weight=1.3,
        ce_weight=0.7,
        label_smoothing=0.1,
        reduction=reduction,
    )


def test_original_implementations(oracles):
    names = {key.split("/")[0] for key in oracles if key.startswith("lskd_")}
    assert len(names) >= 7
    for name in names:
        case = {key: oracles[f"{name}/{key}"] for key in ("student", "teacher", "temperature", "standardize", "loss")}
        student, teacher = torch.tensor(case["student"]), torch.tensor(case["teacher"])
        want = [torch.tensor(case["loss"]), torch.tensor(oracles[f"{name}/grad_student"]), torch.tensor(oracles[f"{name}/grad_teacher"])]
        options = {"temperature": float(case["temperature"]), "standardize": bool(case["standardize"])}
        for dtype, allowed in ((torch.float64, 1e-12), (torch.float32, FLOAT32_ERROR)):
            for function in (kd_loss, reference.kd_loss):
                got = value_and_gradients(lambda s, t: function(s, t, **options), [student.to(dtype), teacher.to(dtype)])  # noqa: B023
                assert max(error(a, b) for a, b in zip(got, want)) <= allowed, name
        if case["standardize"]:
            got = value_and_gradients(
                lambda s, t: LogitStandardizationLoss()(t, s, options["temperature"]),  # noqa: B023
                [student.double(), teacher.double()],
            )
            assert max(error(a, b) for a, b in zip(got, want)) <= 1e-12, name


def test_strided_rows_chunks_and_leading_dimensions(monkeypatch):
    monkeypatch.setattr(distill_kl_torch, "CHUNK", 256)
    labels = torch.randint(100, (21,))
    for make in (lambda: logits(21, 300)[:, 3:103], lambda: logits(100, 21).t(), lambda: logits(3, 7, 100).reshape(21, 100)):
        agree([make(), make(), make()], labels=labels, ce_weight=0.3, standardize=True)
    agree([logits(3, 7, 100, dtype=torch.bfloat16), logits(3, 7, 100)], labels=labels.view(3, 7), ce_weight=0.3)
    agree([logits(50), logits(50)], labels=torch.tensor(3), ce_weight=0.3)
    stacked = logits(2, 4, 9)
    student = logits(4, 9)
    assert torch.equal(kd_loss(student, stacked), kd_loss(student, list(stacked)))
    assert kd_loss(logits(3, 7, 5), logits(3, 7, 5), reduction="none").shape == (3, 7)


@pytest.mark.parametrize("standardize", [False, True])
def test_extreme_logits(standardize):
    base = logits(6, 20)
    one_hot = 1e4 * F.one_hot(torch.arange(6), 20).float()
    constant = base.clone()
    constant[2] = 0.1
    constant[4] = -1e4
    for student in (base, base * 1e4 / 12, base + 1e4, base - 1e4, one_hot, constant):
        for teacher in (base.flip(0), one_hot.flip(0), constant.flip(0)):
            agree([student, teacher], standardize=standardize, temperature=2.0)
    ours = value_and_gradients(lambda s, t: kd_loss(s, t, standardize=standardize), [constant, constant.flip(0)])
    assert all(x.isfinite().all() for x in ours)


@pytest.mark.parametrize("divergence", ["forward", "js"])
def test_impossible_classes_count_as_nothing(divergence):
    student, teacher = logits(5, 12), logits(5, 12)
    teacher[:, 3] = -torch.inf
    agree([student, teacher], divergence=divergence)
    student[:, 3] = -torch.inf
    agree([student, teacher], divergence=divergence)
    assert kd_loss(student, teacher, divergence=divergence).isfinite()
    student[1, 4] = -torch.inf  # the teacher still believes in it
    value = kd_loss(student, teacher, divergence="forward", reduction="none")
    assert value[1] == torch.inf
    assert value[[0, 2, 3, 4]].isfinite().all()


def test_nan_stays_in_its_row():
    student, teacher = logits(4, 9), logits(4, 9)
    student[1, 2] = torch.nan
    value, gradient, _ = value_and_gradients(lambda s, t: kd_loss(s, t, standardize=True, reduction="none"), [student, teacher])
    assert value.isnan().tolist() == [False, True, False, False]
    assert gradient.isnan().any(1).tolist() == [False, True, False, False]


def test_ignored_rows_add_nothing_whatever_their_logits():
    student, teacher = logits(4, 9), logits(4, 9)
    labels = torch.tensor([1, -100, 2, 8])
    keep = [0, 2, 3]
    want = value_and_gradients(lambda s, t: kd_loss(s, t, labels[keep], ce_weight=0.5), [student[keep], teacher[keep]])
    student[1], teacher[1] = torch.nan, torch.inf
    got = value_and_gradients(lambda s, t: kd_loss(s, t, labels, ce_weight=0.5), [student, teacher])
    torch.testing.assert_close(got[0], want[0])
    for gradient, expected in zip(got[1:], want[1:]):
        torch.testing.assert_close(gradient[keep], expected)
        assert not gradient[1].any()
    nothing = value_and_gradients(lambda s, t: kd_loss(s, t, torch.full((4,), -100)), [student, teacher])
    assert not any(x.any() for x in nothing)
    assert torch.equal(
        kd_loss(student[keep], teacher[keep], torch.tensor([0, 3, 0]), ignore_index=3, reduction="none")[1], torch.tensor(0.0)
    )


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_cross_entropy_is_pytorchs(smoothing, reduction):
    x, labels = logits(7, 11).double(), torch.tensor([0, 10, 4, -100, 5, 5, 2])
    ones = torch.ones(7) if reduction == "none" else None
    want = value_and_gradients(lambda s: F.cross_entropy(s, labels, label_smoothing=smoothing, reduction=reduction), [x], ones)
    for function in (kd_loss, reference.kd_loss):
        got = value_and_gradients(
            lambda s: function(s, x, labels, kd_weight=0, ce_weight=1, label_smoothing=smoothing, reduction=reduction),  # noqa: B023
            [x],
            ones,
        )
        assert max(error(a, b) for a, b in zip(got, want)) < 1e-12


def test_student_equal_to_teacher_has_no_gradient():
    x = logits(5, 100)
    value, gradient, _ = value_and_gradients(lambda s, t: kd_loss(s, t, standardize=True), [x, x])
    assert abs(value) < 1e-5
    assert gradient.abs().max() < 1e-6


@pytest.mark.parametrize("shape", [(0, 10), (4, 0, 10)])
def test_empty_batch(shape):
    labels = torch.zeros(shape[:-1], dtype=torch.int64)
    value, gradient, _ = value_and_gradients(lambda s, t: kd_loss(s, t, labels, ce_weight=1.0), [logits(*shape), logits(*shape)])
    assert value == 0
    assert gradient.shape == shape


def test_reference_gradients_are_right():
    student, teacher = logits(3, 5).double().requires_grad_(), logits(3, 5).double().requires_grad_()
    labels = torch.tensor([1, -100, 4])
    for divergence in ("forward", "reverse", "js"):
        for standardize in (False, True):
            options = {"divergence": divergence, "standardize": standardize, "ce_weight": 0.3, "label_smoothing": 0.2}
            assert torch.autograd.gradcheck(lambda s, t: reference.kd_loss(s, t, labels, **options), (student, teacher))  # noqa: B023


@pytest.mark.parametrize(("C", "N"), [(10, 4097), (100, 700), (1001, 131), (40000, 5)])
def test_a_row_does_not_depend_on_the_others_bit_for_bit(C, N):
    for threads in (1, 2):
        torch.set_num_threads(threads)
        try:
            student, teacher = logits(N, C), logits(N, C)
            labels = torch.randint(C, (N,))

            def run(rows):
                return value_and_gradients(
                    lambda s: kd_loss(s, teacher[rows], labels[rows], standardize=True, ce_weight=0.2, reduction="none"),  # noqa: B023
                    [student[rows]],  # noqa: B023
                )

            whole, again = run(slice(None)), run(slice(None))
            for rows in (slice(0, 1), slice(N - 3, N), slice(1, 3)):
                assert all(torch.equal(a, b[rows]) for a, b in zip(run(rows), whole))
            assert all(torch.equal(a, b) for a, b in zip(whole, again))
        finally:
            torch.set_num_threads(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_backward_twice_and_no_second_derivative(dtype):
    student, teacher = logits(6, 9, dtype=dtype).requires_grad_(), logits(6, 9)
    loss = kd_loss(student, teacher, standardize=True)
    (3 * loss).backward(retain_graph=True)
    first, student.grad = student.grad, None
    (3 * loss).backward(retain_graph=True)
    torch.testing.assert_close(student.grad, first, rtol=1e-2 if dtype == torch.float16 else 1e-6, atol=1e-7)
    loss.backward()
    torch.testing.assert_close(student.grad, first + first / 3, rtol=1e-2 if dtype == torch.float16 else 1e-6, atol=1e-6)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(kd_loss(student, teacher), student, create_graph=True)


def test_float16_gradients_do_not_underflow_before_the_scale():
    student, teacher = logits(64, 1000, dtype=torch.float16), logits(64, 1000)
    agree([student, teacher], upstream=torch.tensor(2.0**14), temperature=1.0)


def test_inputs_are_never_written():
    inputs = [logits(5, 30), logits(5, 30)]
    before = [x.clone() for x in inputs]
    labels = torch.zeros(5, dtype=torch.int64)
    for temperature in (1.0, 2.0):
        for divergence in ("forward", "reverse", "js"):
            options = {"temperature": temperature, "divergence": divergence}
            value_and_gradients(
                lambda s, t: kd_loss(s, t, labels, ce_weight=1.0, **options),  # noqa: B023
                inputs,
            )
            leaf = inputs[0].requires_grad_()
            kd_loss(leaf, inputs[1], **options).backward()
            inputs[0] = leaf.detach()
    assert all(torch.equal(a, b) for a, b in zip(inputs, before))


def test_weights_and_temperature_may_be_tensors_and_are_read_anew_and_not_written():
    student, teacher = logits(4, 10), logits(2, 4, 10)
    weights, temperature = torch.tensor([0.5, 0.25]), torch.tensor(4.0)
    for value in (4.0, 1.5):
        temperature.fill_(value)
        for _ in range(2):
            got = kd_loss(student, teacher, temperature=temperature, teacher_weights=weights, kd_weight=0.9)
            assert torch.equal(got, kd_loss(student, teacher, temperature=value, teacher_weights=[0.5, 0.25], kd_weight=0.9))
    assert weights.tolist() == [0.5, 0.25]


def test_negated_views_are_what_they_say():
    inputs = [logits(4, 10), logits(4, 10)]
    negated = [torch._neg_view(-x) for x in inputs]
    for got, want in zip(value_and_gradients(kd_loss, negated), value_and_gradients(kd_loss, inputs)):
        assert torch.equal(got, want)


@pytest.mark.parametrize("C", [2, 3, 10])
@pytest.mark.parametrize("temperature", [2.0, 20.0])
def test_gradients_of_few_standardized_classes_are_as_exact_as_eagers(C, temperature):
    """They add up to 0 but for rounding, which the division by a row's width would make large: two classes have no other gradient."""
    ours, eagers = [], []
    for seed in range(4 if INTERPRETED else 40):
        torch.manual_seed(seed)
        inputs = [logits(64, C), logits(64, C)]

        def of(function, inputs):
            labels = torch.zeros(64, dtype=torch.int64)
            options = {"temperature": temperature, "standardize": True, "kd_weight": 0.9, "ce_weight": 0.1}
            return value_and_gradients(lambda s, t: function(s, [t], labels, **options), inputs)[1]

        exact = of(reference.kd_loss, [x.double() for x in inputs])
        ours.append(error(of(kd_loss, inputs), exact))
        eagers.append(error(of(reference.kd_loss, inputs), exact))
    assert statistics.median(ours) <= max(FLOAT32_ERROR, 1.1 * statistics.median(eagers))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tiny_logits_standardize_without_eps(dtype):
    inputs = [(logits(4, 10) * 1e-17).to(dtype), logits(4, 10).to(dtype)]
    got, exact = (
        value_and_gradients(lambda s, t: function(s, [t], standardize=True, eps=0.0), x)[1]  # noqa: B023
        for function, x in ((kd_loss, inputs), (reference.kd_loss, [x.double() for x in inputs]))
    )
    assert error(got, exact) <= 1e-5


def test_backward_on_the_meta_device():
    student = torch.empty(4, 10, device="meta", requires_grad=True)
    kd_loss(student, torch.empty(4, 10, device="meta")).backward()
    assert student.grad.shape == (4, 10)


def test_the_value_at_a_high_temperature_does_not_cancel():
    allowed = FLOAT32_ERROR if KERNELS else 3e-6  # eager PyTorch is off by 1.6e-5 here
    for divergence in ("forward", "reverse", "js"):
        for seed in range(20):
            torch.manual_seed(seed)
            inputs = [logits(2, 30), logits(2, 30)]
            options = {"temperature": 8.0, "standardize": True, "divergence": divergence}
            assert error(kd_loss(*inputs, **options), reference.kd_loss(*(x.double() for x in inputs), **options)) <= allowed


@torch_form
def test_fake_tensors_leave_nothing_behind():
    inputs = [logits(3, 4), logits(3, 4)]
    distill_kl_torch._constant.cache_clear()
    with pytest.raises(RuntimeError, match="FakeTensor"), FakeTensorMode() as mode:
        kd_loss(*(mode.from_tensor(x) for x in inputs))
    assert kd_loss(*inputs).isfinite()


def peak_of(function, student):
    """Most bytes live at once, beyond the inputs, while function() and its backward pass run."""
    student.grad = None
    return peak_memory(lambda: function().backward())


@torch_form
@pytest.mark.parametrize("shape", [(64, 1000), (256, 32000)], ids=str)
def test_never_more_memory_than_the_original(shape):
    from kdfast.benchmarks.distill_kl import LOSSES, original

    student, teacher, labels = logits(*shape).requires_grad_(), logits(*shape), torch.randint(shape[1], shape[:1])
    for name, options in LOSSES.items():
        y = labels if "ce_weight" in options else None
        ours, theirs = (peak_of(lambda: loss(student, teacher, y, **options), student) for loss in (kd_loss, original))  # noqa: B023
        assert theirs > 4 * student.nbytes, "the measure misses what eager PyTorch allocates"
        assert ours <= theirs + 8 * shape[0], f"{name}: more than eager and two numbers a row"
        if shape[0] > 64:
            assert ours <= 1.1 * student.nbytes, f"{name}: the gradient, and buffers of a chunk"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_compiles_without_a_break_and_equals_eager(dtype):
    labels = torch.randint(12, (6,))

    def loss(student, teacher):
        return 2 * kd_loss(student * 1, teacher, labels, standardize=True, ce_weight=0.4)

    inputs = [logits(6, 12, dtype=dtype), logits(6, 12)]
    eager = value_and_gradients(loss, inputs)
    compiled = value_and_gradients(torch.compile(loss, fullgraph=True, backend="aot_eager"), inputs)
    for got, want in zip(compiled, eager):
        torch.testing.assert_close(got, want, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_an_eager_loss_in_a_compiled_backward(dtype):
    labels, inputs = torch.randint(12, (6,)), [logits(6, 12, dtype=dtype), logits(6, 12)]

    def gradients(compiled):
        leaves = [x.clone().requires_grad_() for x in inputs]
        loss = 2 * kd_loss(*leaves, labels, standardize=True, ce_weight=0.4)
        with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager")) if compiled else nullcontext():
            loss.backward()
        return [x.grad for x in leaves]

    for got, want in zip(gradients(True), gradients(False)):
        torch.testing.assert_close(got, want)


def test_a_graph_takes_a_tensor_in_two_places():
    x = logits(4, 10)

    def loss(student):
        return kd_loss(student, [student, student.detach()], teacher_weights=[0.3, 0.7])

    compiled = value_and_gradients(torch.compile(loss, fullgraph=True, backend="aot_eager"), [x])
    assert all(torch.equal(got, want) for got, want in zip(compiled, value_and_gradients(loss, [x])))


def test_registered_operator():
    options = KDOptions(
        temperature=2.0, standardize=True, eps=1e-7, kd_weight=1.0, ce_weight=0.3, teacher_weights=(1.0, 0.5),
        label_smoothing=0.1, ignore_index=-100, divergence="js", reduction="none",
    )  # fmt: skip
    labels = torch.tensor([1, 2, -100])
    for wanted in ([True, False, True], [False] * 3):
        args = (logits(3, 5), [logits(3, 5), logits(3, 5, dtype=torch.bfloat16)], labels, None, wanted, *options.encode())
        torch.library.opcheck(distill_kl._op, args)


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
    match draw(st.sampled_from(["contiguous", "sliced", "shifted", "transposed"])):
        case "sliced":  # rows lie apart
            wide = torch.empty(N, C + draw(st.integers(1, 9)), dtype=dtype)
            wide[:, :C] = x
            return wide[:, :C]
        case "shifted":  # and begin at an odd address
            wide = torch.empty(N, C + 8, dtype=dtype)
            wide[:, 1 : C + 1] = x
            return wide[:, 1 : C + 1]
        case "transposed":
            return x.t().contiguous().t()
    return x


@settings(max_examples=600 if KERNELS else 1500, deadline=None, derandomize=bool(os.environ.get("CI")), database=None)
@given(
    data=st.data(),
    N=st.integers(1, 5),
    C=st.sampled_from([3, 4, 5, 7, 8, 10, 16, 24, 33, 40]) | st.integers(3, 70),
    seed=st.integers(0, 2**20),
)
def test_fuzz(data, N, C, seed):
    torch.manual_seed(seed)
    draw, K = data.draw, data.draw(st.integers(1, 4))
    inputs = [draw(rows_of_logits(N, C)) for _ in range(1 + K)]
    labels = torch.randint(C, (N,)).masked_fill(torch.rand(N) < 0.2, -100) if draw(st.booleans()) else None
    reduction = draw(st.sampled_from(["mean", "sum", "none"]))
    temperature, teacher_weights = draw(st.floats(0.5, 8)), [draw(st.floats(0.1, 3)) for _ in range(K)]
    kd_weight, ce_weight = draw(st.sampled_from([(1.0, 0.0), (9.0, 0.0)] + [(0.0, 0.5), (0.9, 0.5)] * (labels is not None)))
    # contract 1 allows ten times as much where a gradient vanishes; a teacher's grows with log p - log q
    spread = max((x.amax(1) - x.amin(1)).max().item() for x in inputs) / temperature
    floor = 1e-6 * max(temperature * kd_weight * sum(teacher_weights), ce_weight) * max(1, spread)
    floor += 2**-24 * any(x.dtype == torch.float16 for x in inputs)  # a step of float16's smallest numbers
    standardize = draw(st.booleans())
    if not standardize:  # far from 0 what x / T is rounded by is felt, by eager PyTorch too but not alike
        rounding = 2**-24 * max(x.abs().max().item() for x in inputs) / temperature
        floor += rounding * min(1, spread) * N * temperature**2 * kd_weight * sum(teacher_weights)
    agree(
        inputs,
        upstream=torch.rand((N,) if reduction == "none" else ()) + 0.5,
        labels=labels,
        temperature=temperature,
        standardize=standardize,
        divergence=draw(st.sampled_from(["forward", "reverse", "js"])),
        reduction=reduction,
        teacher_weights=teacher_weights,
        kd_weight=kd_weight,
        ce_weight=ce_weight,
        label_smoothing=draw(st.sampled_from([0.0, 0.1])),
        floor=floor,
        slack=2.0,  # of badly conditioned rows two evaluations are off by as much, not by the same
    )


X = torch.ones(2, 3)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((X, X), {"temperature": 0.0}, "temperature must be positive"),
        ((X, X), {"temperature": float("nan")}, "temperature must be positive"),
        ((X, X), {"temperature": float("inf")}, "temperature must be positive"),
        ((X, X), {"temperature": "4"}, "temperature must be a number, got '4'"),
        ((X, X), {"temperature": torch.ones((), requires_grad=True)}, "temperature must be a number.*requires grad"),
        ((X, X), {"teacher_weights": 1.0}, "teacher_weights must be a sequence of numbers, got 1.0"),
        ((X, X), {"teacher_weights": ["a"]}, "teacher_weights must be a number, got 'a'"),
        ((X, None), {}, "teacher must be a tensor or a sequence of tensors, got NoneType"),
        ((X, [None]), {}, "teacher must be a tensor, got NoneType"),
        (([1.0, 2.0], X), {}, "student must be a tensor, got list"),
        ((X, X, [0, 1]), {"ce_weight": 0.1}, "labels must be a tensor, got list"),
        ((X[:, :1], X[:, :1]), {"standardize": True}, "at least two classes"),
        ((X, X), {"ce_weight": 0.1}, "labels must be given"),
        ((X, X[:1]), {}, "teacher must have student's shape"),
        ((X, []), {}, "at least one"),
        ((X.long(), X), {}, "student must be floating"),
        ((X, X.long()), {}, "teacher must be floating"),
        ((X, X.to("meta")), {}, "teacher must be on student's device"),
        ((X, [X, X]), {"teacher_weights": [1.0]}, "teacher_weights must hold 2"),
        ((X, X), {"teacher_weights": []}, "teacher_weights must hold 1"),
        pytest.param((X, X, torch.tensor([0, 3])), {}, r"labels must be in \[0, 3\).*got 3", marks=torch_form),
        pytest.param((X, X, torch.tensor([0, -1])), {}, "labels must be in.*got -1", marks=torch_form),
        ((X, X, torch.tensor([0, 1], dtype=torch.int32)), {}, "labels must be int64"),
        ((X, X, torch.tensor([0])), {}, "labels must have shape"),
        (
            (torch.ones(2, 3, 4, 4),) * 2 + (torch.zeros(2, 4, 4, dtype=torch.int64),),
            {},
            r"got \(2, 4, 4\).*permute its classes to the end",
        ),
        ((X, X), {"label_smoothing": 1.5}, "label_smoothing must be in"),
        ((X, X), {"divergence": "kl"}, "divergence must be one of"),
        ((X, X), {"reduction": "batchmean"}, "reduction must be one of"),
        ((X, X), {"eps": -1.0, "standardize": True}, "eps must not be negative"),
    ],
)
def test_bad_input_is_named(arguments, options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        kd_loss(*arguments, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0}, "temperature must be positive, got 0"),
        ({"temperature": "4"}, "temperature must be a number, got '4'"),
        ({"reduction": "batchmean"}, "reduction must be one of"),
        ({"teacher_weights": 0.5}, "teacher_weights must be a sequence of numbers, got 0.5"),
        ({"label_smoothing": 2.0}, "label_smoothing must be in"),
    ],
)
def test_a_module_names_a_bad_option_when_it_is_made(options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        KDLoss(**options)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(((X,), X), "student must be a tensor, got tuple"), ((X, None), "teacher must be a tensor or a sequence of tensors, got NoneType")],
)
def test_a_module_names_what_is_no_tensor(arguments, message):
    with pytest.raises(TypeError, match=message):
        KDLoss(ce_weight=0.0)(*arguments)


def test_modules():
    student, teacher, labels = logits(4, 9), logits(4, 9), torch.randint(9, (4,))
    assert torch.equal(KDLoss()(student, teacher, labels), kd_loss(student, teacher, labels, kd_weight=0.9, ce_weight=0.1))
    with pytest.raises(ValueError, match="swapped"):
        KDLoss()(student, teacher.clone().requires_grad_(), labels)
    with pytest.raises(ValueError, match="swapped"):
        LogitStandardizationLoss()(student.clone().requires_grad_(), teacher)
    LogitStandardizationLoss()(teacher, student.clone().requires_grad_()).backward()


@torch_form
@pytest.mark.speed
@pytest.mark.parametrize("shape", [(8, 10), (64, 100), (128, 100), (256, 1000), (1024, 1000)], ids=str)
def test_not_slower_than_the_original(shape):
    from kdfast.benchmarks.distill_kl import LOSSES, case
    from kdfast.benchmarks.timing import interleaved

    # a known shortfall: PyTorch 2.11 spends more on an autograd.Function, and a batch of 8 pays for it (measured there: 0.89 to 0.94)
    least = 0.85 if shape == (8, 10) and TorchVersion(torch.__version__) < "2.12" else 0.95
    best = dict.fromkeys(LOSSES, 0.0)
    for _ in range(5):
        for loss in LOSSES:
            ours, theirs = (case(loss, *shape).step(variant).run for variant in ("kdfast", "eager"))
            best[loss] = max(best[loss], interleaved(ours, theirs, pairs=20)["speedup"])
        if min(best.values()) >= least:
            return
    pytest.fail(f"slower than eager: {best}")
