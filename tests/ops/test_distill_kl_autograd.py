"""kd_loss and linear_kd_loss under autograd and torch.compile: the contracts that do not depend on the values."""

from contextlib import nullcontext

import pytest
import torch

from kdfast.functional import kd_loss, linear_kd_loss
from kdfast.ops.distill_kl import linear as linear_op
from kdfast.ops.distill_kl import op
from kdfast.ops.distill_kl.options import KDOptions
from tests.numeric import FLOAT32_ERROR, KERNELS, error, value_and_gradients
from tests.ops.distillation import agree, kd, linear, make_layers, make_logits

pytestmark = pytest.mark.kernels
LABELS = torch.tensor([0, 5, -100, 11, 2, 1])
# compiled, the kernel counts the ignored rows before its launch, which rounds a mean otherwise
SAME_BITS = LABELS.clamp(min=0) if KERNELS else LABELS


def make_kd_inputs(dtype):
    return [make_logits(6, 12, dtype=dtype), make_logits(6, 12)]


def make_linear_inputs(dtype):
    return make_layers(6, 12, 4, 5, dtype)


def in_chunks(labels=None, **options):
    return linear(labels, chunk_rows=4, **options)


each_operator = pytest.mark.parametrize(
    ("bind", "make_inputs"),
    [pytest.param(kd, make_kd_inputs, id="kd_loss"), pytest.param(in_chunks, make_linear_inputs, id="linear_kd_loss")],
)
both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
both_reductions = pytest.mark.parametrize("reduction", ["mean", "none"])


@each_operator
@both_dtypes
@both_reductions
def test_backward_twice_and_no_second_derivative(bind, make_inputs, dtype, reduction):
    leaves = [x.requires_grad_() for x in make_inputs(dtype)]
    loss = bind(standardize=True, reduction=reduction)(*leaves).sum()
    allowed = 1e-2 if dtype == torch.float16 else FLOAT32_ERROR
    first = torch.autograd.grad(3 * loss, leaves, retain_graph=True)
    second = torch.autograd.grad(3 * loss, leaves, retain_graph=True)
    third = torch.autograd.grad(loss, leaves)
    for a, b, c in zip(first, second, third):
        assert error(b, a) <= allowed
        assert error(3 * c, a) <= allowed
    with pytest.raises(RuntimeError, match="kd_loss has no second derivative"):
        torch.autograd.grad(bind(reduction=reduction)(*leaves).sum(), leaves, create_graph=True)


def test_float16_gradients_do_not_underflow_before_the_scale():
    scale = {"upstream": torch.tensor(2.0**16), "temperature": 1.0, "kd_weight": 1e-4}
    agree(kd, [make_logits(64, 1000, dtype=torch.float16), make_logits(64, 1000)], **scale)
    agree(linear, make_layers(64, 1000, 16, 16, torch.float16), chunks=(None, 16), **scale)


@each_operator
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="default"),
        pytest.param({"temperature": 1.0}, id="temperature 1"),
        pytest.param({"standardize": True}, id="standardize"),
        pytest.param({"divergence": "reverse"}, id="reverse"),
        pytest.param({"divergence": "js"}, id="js"),
        pytest.param({"reduction": "none"}, id="none"),
    ],
)
def test_inputs_are_never_written(bind, make_inputs, options):
    leaves = [x.requires_grad_() for x in make_inputs(torch.float32)]
    before = [x.detach().clone() for x in leaves]
    (2 * bind(LABELS, ce_weight=1.0, **options)(*leaves).sum()).backward()
    bind(**options)(leaves[0], *[x.detach() for x in leaves[1:]]).sum().backward()  # the first alone learns
    assert all(torch.equal(a, b) for a, b in zip(leaves, before))


def test_backward_on_the_meta_device():
    student = torch.empty(4, 10, device="meta", requires_grad=True)
    kd_loss(student, torch.empty(4, 10, device="meta")).backward()
    assert student.grad.shape == (4, 10)
    hidden, weight = torch.empty(6, 4, device="meta"), torch.empty(12, 4, device="meta")
    assert linear_kd_loss(hidden, weight, hidden, weight, reduction="none").shape == (6,)


# ---- torch.compile ---------------------------------------------------------------------------------------------------


def compile_whole(function):
    torch._dynamo.reset()  # the cases share the function's code, which may be compiled only eight times
    return torch.compile(function, fullgraph=True, backend="aot_eager")


@each_operator
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@both_reductions
def test_compiles_without_a_break_and_equals_eager(bind, make_inputs, dtype, reduction):
    call = bind(SAME_BITS, standardize=True, ce_weight=0.4, reduction=reduction)

    def scale(*inputs):
        return 2 * call(inputs[0] * 1, *inputs[1:])

    inputs = make_inputs(dtype)
    compiled = value_and_gradients(compile_whole(scale), inputs)
    assert all(torch.equal(got, want) for got, want in zip(compiled, value_and_gradients(scale, inputs)))


def test_options_that_change_between_calls_of_a_compiled_loss():
    inputs = make_kd_inputs(torch.float32)

    @compile_whole
    def loss(student, teacher, temperature, weight, ignored):
        return kd_loss(student, teacher, SAME_BITS, temperature=temperature, teacher_weights=[weight], ignore_index=ignored, ce_weight=0.5)

    for temperature, weight, ignored in ((4.0, 0.5, -100), (3.0, 0.25, -100), (2, 1.0, -100), (1.5, 1.5, -100)):
        got = value_and_gradients(lambda s, t: loss(s, t, temperature, weight, ignored), inputs)  # noqa: B023
        options = {"temperature": temperature, "teacher_weights": [weight], "ignore_index": ignored, "ce_weight": 0.5}
        assert all(torch.equal(a, b) for a, b in zip(got, value_and_gradients(kd(SAME_BITS, **options), inputs)))


@each_operator
@both_dtypes
def test_an_eager_loss_in_a_compiled_backward(bind, make_inputs, dtype):
    inputs = make_inputs(dtype)

    def differentiate(compiled):
        leaves = [x.clone().requires_grad_() for x in inputs]
        loss = 2 * bind(LABELS, standardize=True, ce_weight=0.4)(*leaves)
        with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager")) if compiled else nullcontext():
            loss.backward()
        return [x.grad for x in leaves]

    for got, want in zip(differentiate(True), differentiate(False)):
        torch.testing.assert_close(got, want)


def test_a_graph_takes_a_tensor_in_two_places():
    teacher = torch.randn(6, 4)

    def distil_from_itself(student):
        return kd_loss(student, [student, student.detach()], teacher_weights=[0.3, 0.7])

    def share_a_weight(hidden, weight):
        return linear_kd_loss(hidden, weight, teacher, weight)

    for loss, inputs in ((distil_from_itself, [make_logits(4, 10)]), (share_a_weight, [torch.randn(6, 4), torch.randn(12, 4)])):
        compiled = value_and_gradients(compile_whole(loss), inputs)
        assert all(torch.equal(got, want) for got, want in zip(compiled, value_and_gradients(loss, inputs)))


def test_compiles_under_autocast():
    tensors = make_linear_inputs(torch.float32)
    tensors[0] = tensors[0].bfloat16()

    def loss(*inputs):
        with torch.autocast(inputs[0].device.type, torch.bfloat16):
            return in_chunks()(*inputs)

    compiled = value_and_gradients(compile_whole(loss), tensors)
    assert all(torch.equal(got, want) and got.dtype == want.dtype for got, want in zip(compiled, value_and_gradients(loss, tensors)))


# ---- the options and the registered operators ------------------------------------------------------------------------


def make_options(**changes):
    options = {
        "temperature": 2.0, "standardize": True, "eps": 1e-7, "kd_weight": 1.0, "ce_weight": 0.3, "teacher_weights": (1.0, 0.5),
        "label_smoothing": 0.1, "ignore_index": -100, "divergence": "js", "reduction": "none",
    }  # fmt: skip
    return KDOptions(**options | changes)


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, id="all"),
        pytest.param({"teacher_weights": None, "standardize": False}, id="defaults"),
        pytest.param({"temperature": 0.1, "eps": 5e-324, "kd_weight": float("inf"), "ignore_index": 2**63 - 1}, id="extremes"),
    ],
)
def test_options_survive_encoding(changes):
    options = make_options(**changes)
    assert KDOptions.decode(*options.encode()) == options


def test_options_are_frozen_and_hold_python_numbers():
    options = make_options(temperature=torch.tensor(2.0), teacher_weights=torch.tensor([1.0, 0.5]))
    assert options == make_options()
    assert type(options.temperature) is float
    with pytest.raises(AttributeError):
        options.temperature = 3.0


@pytest.mark.parametrize("wanted", [[True, False, True], [False] * 3], ids=str)
def test_registered_kd(wanted):
    teachers = [make_logits(3, 5), make_logits(3, 5, dtype=torch.bfloat16)]
    torch.library.opcheck(op._op, (make_logits(3, 5), teachers, torch.tensor([1, 2, -100]), None, wanted, *make_options().encode()))


@pytest.mark.parametrize(
    ("wanted", "cast", "reduction"),
    [
        pytest.param([True] * 6, None, "mean", id="mean"),
        pytest.param([True, False, True, False, True, False], torch.bfloat16, "sum", id="sum"),
        pytest.param([False] * 6, None, "none", id="none"),
    ],
)
def test_registered_linear_kd(wanted, cast, reduction):
    tensors, labels = make_layers(3, 5, 4, 6), torch.tensor([1, 2, -100])
    tensors[3:] = [x.bfloat16() for x in tensors[3:]]
    options = make_options(teacher_weights=None, reduction=reduction).encode()
    torch.library.opcheck(linear_op._op, (tensors, labels, None, wanted, 2, cast, *options))
    without_bias, wanted = [*tensors[:2], None, *tensors[3:5], None], wanted[:2] + [False] * 4
    torch.library.opcheck(linear_op._op, (without_bias, labels, None, wanted, None, cast, *options))
