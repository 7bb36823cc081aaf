"""kd_loss and linear_kd_loss under autograd and torch.compile: the contracts that do not depend on the values."""

from contextlib import nullcontext

import pytest
import torch

from kdfast.functional import kd_loss, linear_kd_loss
from kdfast.ops.distill_kl.options import KDOptions
from tests.numeric import KERNELS, value_and_gradients
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


def test_float16_gradients_do_not_underflow_before_the_scale():
    scale = {"upstream": torch.tensor(2.0**16), "temperature": 1.0, "kd_weight": 1e-4}
    agree(kd, [make_logits(64, 1000, dtype=torch.float16), make_logits(64, 1000)], **scale)
    agree(linear, make_layers(64, 1000, 16, 16, torch.float16), chunks=(None, 16), **scale)


# ---- torch.compile ---------------------------------------------------------------------------------------------------


def compile_whole(function):
    torch._dynamo.reset()  # the cases share the function's code, which may be compiled only eight times
    return torch.compile(function, fullgraph=True, backend="aot_eager")


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


def test_options_are_frozen_and_hold_python_numbers():
    fixed = {"standardize": True, "eps": 1e-7, "kd_weight": 1.0, "ce_weight": 0.3, "label_smoothing": 0.1, "ignore_index": -100}
    options, same = (
        KDOptions(temperature=temperature, teacher_weights=weights, divergence="js", reduction="none", **fixed)
        for temperature, weights in ((torch.tensor(2.0), torch.tensor([1.0, 0.5])), (2.0, (1.0, 0.5)))
    )
    assert options == same == KDOptions.decode(*options.encode())
    assert type(options.temperature) is float
    with pytest.raises(AttributeError):
        options.temperature = 3.0
