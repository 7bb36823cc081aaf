"""attention_transfer_loss: the PyTorch form in the fast tier; the kernels in the interpreter and on a GPU."""

from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

import kdfast
from kdfast import functional, reference
from kdfast.functional import attention_transfer_loss
from kdfast.ops import attention_map as operator
from tests.numeric import DEVICE, KERNELS, error, value_and_gradients
from tests.ops.contracts import compare, make_fuzz, record_launches

pytestmark = pytest.mark.kernels
kernels = pytest.mark.skipif(not KERNELS, reason="the kernels need a GPU or TRITON_INTERPRET=1")
if KERNELS:
    from kdfast.kernels import attention_map as kernel

fp32, bf16, fp16, fp64 = torch.float32, torch.bfloat16, torch.float16, torch.float64


def contiguous(x):
    return x.contiguous()


def channels_last(x):
    return x.contiguous(memory_format=torch.channels_last)


def padded(x, *sides, layout=contiguous):
    """Copies x into the middle of a larger tensor of NaN; `sides` as of torch.nn.functional.pad."""
    outer = layout(torch.nn.functional.pad(x, sides, value=float("nan")))
    at = [slice(a, n - b) for a, b, n in zip(sides[-2::-2], sides[-1::-2], outer.shape[-len(sides) // 2 :])]
    return outer[(..., *at)]


LAYOUTS = {
    "contiguous": contiguous,
    "channels_last": channels_last,
    "some channels": lambda x: padded(x, 0, 0, 0, 0, 1, 2),
    "some channels, channels_last": lambda x: padded(x, 0, 0, 0, 0, 8, 8, layout=channels_last),
    "some images": lambda x: padded(x, 0, 0, 0, 0, 0, 0, 1, 1, layout=channels_last),
    "a part of every image": lambda x: padded(x, 1, 2, 1, 0),
    "a part of every image, channels_last": lambda x: padded(x, 1, 2, 1, 0, layout=channels_last),
    "turned": lambda x: x.mT.contiguous().mT,
    "one image, again and again": lambda x: x[:1].expand_as(x),
}
TWO_LAYOUTS = ["contiguous", "channels_last"]


def maps(*shape, dtype=fp32, layout="contiguous"):
    return LAYOUTS[layout](torch.randn(shape).to(dtype))


def bind(p=2, module=functional):
    """The loss as a function of the students' maps and then as many teachers'."""
    return lambda *x: module.attention_transfer_loss(list(x[: len(x) // 2]), list(x[len(x) // 2 :]), p=p)


def check(students, teachers, p=2, upstream=0.7, **options):
    compare(bind(p), bind(p, reference), [*students, *teachers], torch.tensor(upstream), **options)


# ---- values and gradients --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", TWO_LAYOUTS)
@pytest.mark.parametrize("case", ["at_n4_16x8_64x8", "at_n1_32x16_32x8", "at_n2_8x7_24x14"])
def test_values_are_the_originals(oracles, case, layout):
    student, teacher = (LAYOUTS[layout](torch.tensor(oracles[f"{case}/{name}"])) for name in ("student", "teacher"))
    loss, gradient, _ = value_and_gradients(attention_transfer_loss, [student.double(), teacher.double()])
    assert error(loss, torch.tensor(oracles[f"{case}/loss"])) < 1e-12
    assert error(gradient, torch.tensor(oracles[f"{case}/grad"])) < 1e-12


SHAPES = [(2, 16, 8, 8), (3, 17, 9, 7), (1, 1, 1, 2), (5, 3, 2, 1), (2, 300, 3, 5), (2, 2048, 2, 1), (2, 64, 16, 12), (65, 5, 2, 1)]


@pytest.mark.parametrize("layout", TWO_LAYOUTS)
@pytest.mark.parametrize("dtype", [fp32, bf16, fp16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes_match_float64(shape, dtype, layout):
    """Several steps over the channels and over the pixels, and parts of a tile; the teacher has other channels."""
    B, C, H, W = shape
    check([maps(*shape, dtype=dtype, layout=layout)], [maps(B, C % 7 + 2, H, W, dtype=dtype, layout=layout)])


@pytest.mark.parametrize("layout", TWO_LAYOUTS)
def test_more_pixels_than_a_step_compares(layout):
    check([maps(1, 2, 70, 61, layout=layout)], [maps(1, 3, 70, 61, layout=layout)])


@pytest.mark.parametrize("dtype", [fp32, bf16, fp16], ids=str)
@pytest.mark.parametrize("p", [1, 2, 3.5])
@pytest.mark.parametrize("layout", TWO_LAYOUTS)
def test_maps_of_other_sizes_are_pooled_first(layout, p, dtype):
    check([maps(3, 5, 9, 7, dtype=dtype, layout=layout)], [maps(3, 2, 4, 14, dtype=dtype, layout=layout)], p)


@pytest.mark.parametrize("layout", TWO_LAYOUTS)
@pytest.mark.parametrize("p", [1, 2, 3, 3.5, 4, 0.5, 1.5, 2.7, 11, pytest.param(30.5, marks=kernels)])
def test_powers_match_float64(p, layout):
    check([maps(2, 20, 6, 5, layout=layout)], [maps(2, 33, 6, 5, layout=layout)], p)


@pytest.mark.parametrize("p", [130, 1000.5])
def test_powers_beyond_products(p):
    student, teacher = 0.9 + 0.1 * torch.rand(2, 2, 5, 3, 4)
    check([student], [teacher], p, allowance=2e-4)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("other", TWO_LAYOUTS)
def test_layouts_match_float64_and_surroundings_are_not_read(layout, other):
    check([maps(4, 8, 6, 10, layout=layout)], [maps(4, 24, 6, 10, layout=other)])


# ---- extreme values --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [1, 2, 3])
@pytest.mark.parametrize("zero_teachers", [0, 2])
def test_images_of_zeros(p, zero_teachers):
    student, teacher = maps(3, 4, 5, 5), maps(3, 4, 5, 5)
    student[0], teacher[:zero_teachers] = 0, 0
    check([student], [teacher], p)


@kernels
@pytest.mark.parametrize(("scale", "p"), [(1e4, 4), (1e9, 2), (1e-3, 2), (1e-5, 2), (3e-7, 2), (1e-6, 1), (1e-16, 1), (1e18, 2)])
def test_huge_and_tiny_features(scale, p):
    """The square of an energy may overflow; below a norm of 1e-12 maps no longer have unit length."""
    check([scale * maps(2, 6, 5, 4)], [scale * maps(2, 3, 5, 4)], p, slack=0.0)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("p", [0.5, 1, 2, 3, 2.5])
@pytest.mark.parametrize("layout", TWO_LAYOUTS)
def test_nan_and_inf_propagate_as_in_the_reference(value, p, layout):
    student, teacher = maps(3, 3, 4, 4, layout=layout), maps(3, 3, 4, 4, layout=layout)
    for x in (student, teacher):
        x[1, 2, 0, 0] = value
        check([student], [teacher], p)
        x[1, 2, 0, 0] = 0.5


@pytest.mark.parametrize("p", [0.5, 1, 1.5, 2, 3])
def test_zeros_among_the_features_have_the_references_slope(p):
    student, teacher = maps(2, 4, 5, 5), maps(2, 4, 5, 5)
    student[:, 1] = 0
    check([student], [teacher], p)
    student[1], teacher[0] = 0, 0  # a map of nothing
    gradients = value_and_gradients(bind(p), [student, teacher])[1:]
    assert all(g.isfinite().all() for g in gradients)
    assert not gradients[0][1].any()


@kernels
def test_small_float16_gradients_keep_their_digits_under_a_loss_scale():
    student, teacher = maps(16, 64, 8, 8, dtype=fp16), maps(16, 64, 8, 8, dtype=fp16)
    scale = torch.tensor(2.0**16)
    got = value_and_gradients(bind(), [student, teacher], scale)[1]
    exact = value_and_gradients(bind(2, reference), [student.double(), teacher.double()], scale)[1]
    assert error((exact * 2.0**-16).half() * 2.0**16, exact) > 4e-3, "else float16 could hold them as they are"
    assert error(got, exact) < 1e-3


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 0, 4, 4)], ids=str)
@pytest.mark.parametrize("choice", ["auto", pytest.param("triton", marks=kernels)])
def test_pytorch_form_runs_without_images_or_channels(shape, choice):
    student, teacher = maps(*shape), maps(shape[0], 5, 4, 4)
    with kdfast.backend("torch"):
        want = value_and_gradients(attention_transfer_loss, [student, teacher])
    with kdfast.backend(choice):
        got = value_and_gradients(attention_transfer_loss, [student, teacher])
    assert want[0].isfinite()
    assert all(torch.allclose(a, b) and a.shape == b.shape for a, b in zip(got, want))


@pytest.mark.parametrize(
    ("student", "teacher", "p", "kind", "message"),
    [
        (torch.ones(2, 3, 4), torch.ones(2, 3, 4, 4), 2, ValueError, r"student_maps\[0\] must be \[B, C, H, W\], got shape \(2, 3, 4\)"),
        (torch.ones(2, 3, 4, 4), torch.ones(2, 3, 4, 4).int(), 2, TypeError, r"teacher_maps\[0\] must be floating, got torch.int32"),
        (torch.ones(2, 3, 4, 4), torch.ones(1, 3, 4, 4), 2, ValueError, r"teacher_maps\[0\] must hold the student's batch of 2, got 1"),
        (torch.ones(2, 3, 4, 4), [], 2, ValueError, "must be equally many, at least one, got 1 and 0"),
        ([], [], 2, ValueError, "at least one"),
        (torch.ones(2, 3, 4, 4), torch.ones(2, 3, 4, 4), 0, ValueError, "p must be positive, got 0"),
        (torch.ones(2, 3, 4, 4), torch.ones(2, 3, 4, 4, device="meta"), 2, ValueError, "must be on the student's cpu, got meta"),
    ],
)
def test_bad_maps_are_named(student, teacher, p, kind, message):
    with pytest.raises(kind, match=message):
        attention_transfer_loss(student, teacher, p=p)


# ---- autograd --------------------------------------------------------------------------------------------------------


def test_an_images_gradient_does_not_depend_on_other_images():
    student, teacher = maps(4, 6, 5, 5), maps(4, 6, 5, 5)
    before = value_and_gradients(bind(), [student, teacher])[1]
    student[1:] *= 3
    assert torch.equal(value_and_gradients(bind(), [student, teacher])[1][0], before[0])


def test_features_overwritten_after_forward_are_noticed():
    student = maps(2, 6, 4, 4).requires_grad_()
    loss = attention_transfer_loss(student, maps(2, 5, 4, 4))
    with torch.no_grad():
        student.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("layout", TWO_LAYOUTS)
def test_gradient_keeps_the_features_layout(layout):
    student = maps(2, 8, 4, 4, layout=layout).requires_grad_()
    attention_transfer_loss(student, maps(2, 3, 4, 4)).backward()
    assert student.grad is not None
    assert student.grad.stride() == student.stride()


def test_loss_compiles_by_inductor():
    torch._dynamo.reset()
    inputs = [maps(2, 6, 4, 4), maps(2, 7, 3, 3), maps(2, 3, 8, 8, layout="channels_last"), maps(2, 4, 3, 3)]
    compiled = torch.compile(bind(), fullgraph=True)
    for got, want in zip(value_and_gradients(compiled, inputs), value_and_gradients(bind(), inputs)):
        assert error(got, want.double()) < 1e-6
        assert got.dtype == want.dtype


# ---- the PyTorch form ------------------------------------------------------------------------------------------------


def test_no_temporary_is_as_large_as_the_features():
    student = maps(64, 64, 16, 16)
    largest = 0

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor) and out._base is None:
                largest = max(largest, out.numel())
            return out

    with kdfast.backend("torch"), Sizes():
        attention_transfer_loss(student, student)
    assert largest <= max(operator._BLOCK, student.numel() // 64)


def check_random_blocks(data):
    draw = data.draw
    n, *sizes = (draw(st.integers(1, 7)) for _ in range(7))
    student, teacher = (maps(n, *shape, dtype=fp64, layout=draw(st.sampled_from(TWO_LAYOUTS))) for shape in (sizes[:3], sizes[3:]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(operator, "_BLOCK", draw(st.integers(1, 300)))
        check([student], [teacher], draw(st.sampled_from([1, 2, 3])), floor=1e-12)


test_random_blocks = make_fuzz(check_random_blocks, 60, 60)


# ---- the kernels -----------------------------------------------------------------------------------------------------


@kernels
@pytest.mark.parametrize("layout", LAYOUTS)
def test_only_maps_without_two_strides_are_copied(layout):
    x = maps(4, 8, 6, 10, layout=layout)
    rows = kernel._rows(x, kernel._channels_last(x))
    shared = rows.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
    assert shared == ("part" not in layout and layout != "turned")
    assert rows.stride(2) == 1
    assert rows.shape == ((4, 60, 8) if "channels_last" in layout or layout == "some images" else (4, 8, 60))


@pytest.fixture
def launches(monkeypatch):
    return record_launches(monkeypatch, kernel, "_energies", "_compare", "_gradients")


@kernels
def test_a_compiled_graph_follows_the_backend(launches):
    torch._dynamo.reset()
    student, teacher = maps(2, 6, 4, 4), maps(2, 5, 4, 4)
    compiled = torch.compile(bind(), fullgraph=True, backend="aot_eager")
    value_and_gradients(compiled, [student, teacher])
    assert launches
    launches.clear()
    with kdfast.backend("torch"):
        value_and_gradients(compiled, [student, teacher])
    value_and_gradients(compiled, [student.double(), teacher])
    assert not launches


@kernels
def test_a_stage_is_three_launches_forward_and_one_backward(launches):
    student = maps(3, 70, 9, 9).requires_grad_()
    loss = attention_transfer_loss([student, student], [maps(3, 6, 9, 9)] * 2)
    assert launches == ["_energies", "_energies", "_compare"] * 2
    loss.backward()
    assert launches[6:] == ["_gradients"] * 2


@kernels
@pytest.mark.parametrize(
    ("shape", "strides"),
    [
        pytest.param((2, 3, 2, 2), (2**31 + 64, 4, 2, 1), id="images"),
        pytest.param((1, 3, 2, 2), (1, 2**30 + 64, 2, 1), id="channels"),
        pytest.param((1, 8, 3, 1), (1, 1, 2**30 + 64, 1), id="pixels"),
    ],
)
def test_offsets_may_pass_32_bits(shape, strides):
    # virtual memory only: nothing touches the memory between the elements
    student = torch.empty(2**31 + 256, dtype=fp16, device=DEVICE).as_strided(shape, strides)
    student.copy_(torch.randn(shape))
    assert kernel._rows(student, kernel._channels_last(student)).data_ptr() == student.data_ptr()
    check([student], [maps(*shape)])


def check_random_case(data):
    draw = data.draw
    torch.manual_seed(draw(st.integers(0, 10**6)))
    B, p, scale = draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 2, 3, 4, 0.5, 1.5, 2.7])), draw(st.sampled_from([0.01, 1.0, 100.0]))
    upstream, stages = draw(st.sampled_from([1.0, -0.3, 1024.0])), ([], [])
    for _ in range(draw(st.integers(1, 2))):
        size, dtypes = (
            draw(st.tuples(*2 * [st.integers(1, 8)])),
            draw(st.sampled_from([(fp32, fp32), (fp32, bf16), (bf16, bf16), (fp16, fp16)])),
        )
        for side, dtype in zip(stages, dtypes):
            side.append(scale * maps(B, draw(st.integers(1, 40)), *size, dtype=dtype, layout=draw(st.sampled_from(list(LAYOUTS)))))
    alike = 0.0  # of the gradient's terms, which cancel if the maps are alike
    for x in (*stages[0], *stages[1]):
        energy = x.double().abs().pow(p).mean(1, keepdim=True)
        slope = p / x.shape[1] * x.double().abs().pow(p - 1) / energy.square().sum((2, 3), keepdim=True).sqrt()
        alike = max(alike, abs(upstream) * 2 / energy.numel() * slope.max().item())
    dtypes = {x.dtype for side in stages for x in side}
    # eager PyTorch in float32 also for 16-bit features: what remains is the gradient's own rounding
    check(
        *stages, p, upstream, floor=1e-13, gradient_floor=1e-6 * alike + 2**-24 * (fp16 in dtypes), slack=3.0,
        allowance=2**-8 * (dtypes != {fp32}), eager_dtype=fp32,
    )  # fmt: skip


test_random_cases = make_fuzz(check_random_case, 40, 100)
test_many_random_cases = pytest.mark.slow(make_fuzz(check_random_case, 320, 320))
