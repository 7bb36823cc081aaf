"""attention_transfer_loss: the PyTorch form in the fast tier; the kernels in the interpreter and on a GPU."""

import os
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import kdfast
from kdfast import reference
from kdfast.functional import attention_transfer_loss
from kdfast.ops import attention_map as operator
from tests.numeric import ALLOWANCE, DEVICE, FLOAT32_ERROR, INTERPRETED, KERNELS, error, value_and_gradients

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


def run(loss, students, teachers, upstream=0.7):
    """Returns [loss, gradients of students, gradients of teachers] of tensors in their own layouts."""
    leaves = [x.detach().requires_grad_() for x in (*students, *teachers)]
    value = loss(leaves[: len(students)], leaves[len(students) :])
    return [value.detach(), *torch.autograd.grad(value, leaves, torch.tensor(upstream, dtype=value.dtype))]


def of_reference(p):
    return lambda students, teachers: reference.attention_transfer_loss(students, teachers, p)


def ours(p):
    return lambda students, teachers: attention_transfer_loss(students, teachers, p=p)


def both(students, teachers, p=2, upstream=0.7):
    """Pairs of our results and the reference's in float64."""
    exact = run(of_reference(p), [x.double() for x in students], [x.double() for x in teachers], upstream)
    return zip(run(ours(p), students, teachers, upstream), exact)


def check_float64(students, teachers, p=2, pooled=fp32):
    """Contract 1; shows that a zero and a permuted gradient would be seen. `pooled`: the dtype that pooling rounds features to."""
    eager = run(of_reference(p), students, teachers)
    for (got, want), peer, features in zip(both(students, teachers, p), eager, [None, *students, *teachers]):
        dtype = fp32 if features is None else features.dtype
        assert got.dtype == dtype
        allowed = max(FLOAT32_ERROR, error(peer, want)) + ALLOWANCE[pooled if features is None else dtype]
        assert error(got, want) <= allowed
        assert error(torch.zeros_like(got), want) > allowed, "the check would let a zero pass"
        if got.numel() > 20:
            assert error(got.flip(1, 2, 3), want) > allowed, "the check would let a permuted gradient pass"


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
    check_float64([maps(*shape, dtype=dtype, layout=layout)], [maps(B, C % 7 + 2, H, W, dtype=dtype, layout=layout)])


@pytest.mark.parametrize("layout", TWO_LAYOUTS)
def test_more_pixels_than_a_step_compares(layout):
    check_float64([maps(1, 2, 70, 61, layout=layout)], [maps(1, 3, 70, 61, layout=layout)])


@pytest.mark.parametrize("dtype", [fp32, bf16, fp16], ids=str)
@pytest.mark.parametrize("p", [1, 2, 3.5])
@pytest.mark.parametrize("layout", TWO_LAYOUTS)
def test_maps_of_other_sizes_are_pooled_first(layout, p, dtype):
    check_float64([maps(3, 5, 9, 7, dtype=dtype, layout=layout)], [maps(3, 2, 4, 14, dtype=dtype, layout=layout)], p, pooled=dtype)


@pytest.mark.parametrize("layout", TWO_LAYOUTS)
@pytest.mark.parametrize("p", [1, 2, 3, 3.5, 4, 0.5, 1.5, 2.7, 11, pytest.param(30.5, marks=kernels)])
def test_powers_match_float64(p, layout):
    check_float64([maps(2, 20, 6, 5, layout=layout)], [maps(2, 33, 6, 5, layout=layout)], p)


@pytest.mark.parametrize("p", [130, 1000.5])
def test_powers_beyond_products(p):
    student, teacher = 0.9 + 0.1 * torch.rand(2, 2, 5, 3, 4)
    assert all(error(got, want) < 2e-4 for got, want in both([student], [teacher], p))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("other", TWO_LAYOUTS)
def test_layouts_match_float64_and_surroundings_are_not_read(layout, other):
    check_float64([maps(4, 8, 6, 10, layout=layout)], [maps(4, 24, 6, 10, layout=other)])


def test_stages_of_all_dtypes_add_up():
    shapes = [(3, 6, 8, 8), (3, 10, 4, 4), (2, 12, 1, 3)]
    students = [maps(*shape, dtype=dtype) for shape, dtype in zip(shapes, (fp32, bf16, fp16))]
    teachers = [maps(*shape, dtype=dtype) for shape, dtype in zip(shapes, (bf16, fp32, fp32))]
    for got, want in both(students, teachers):
        assert error(got, want) <= FLOAT32_ERROR + (0 if got.dtype == fp32 else 2**-8)
        assert not got.dim() or error(got.flip(1), want) > 0.1
    apart = sum(attention_transfer_loss(s, t) for s, t in zip(students, teachers))
    assert error(attention_transfer_loss(students, teachers), apart.double()) < 1e-6


def test_only_maps_that_require_grad_get_one():
    student, teacher = maps(2, 6, 4, 4), maps(2, 5, 4, 4)
    gradients = run(ours(2), [student], [teacher], 1.0)
    for index, x in enumerate((student, teacher)):
        x.requires_grad_()
        (alone,) = torch.autograd.grad(attention_transfer_loss(student, teacher), x)
        x.requires_grad_(False)
        assert torch.equal(alone, gradients[1 + index])
    assert not attention_transfer_loss(student, teacher).requires_grad


# ---- extreme values --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [1, 2, 3])
@pytest.mark.parametrize("zero_teachers", [0, 2])
def test_images_of_zeros(p, zero_teachers):
    student, teacher = maps(3, 4, 5, 5), maps(3, 4, 5, 5)
    student[0], teacher[:zero_teachers] = 0, 0
    assert all(error(got, want) <= FLOAT32_ERROR for got, want in both([student], [teacher], p))


@kernels
@pytest.mark.parametrize(("scale", "p"), [(1e4, 4), (1e9, 2), (1e-3, 2), (1e-5, 2), (3e-7, 2), (1e-6, 1), (1e-16, 1), (1e18, 2)])
def test_huge_and_tiny_features(scale, p):
    """The square of an energy may overflow; below a norm of 1e-12 maps no longer have unit length."""
    for got, want in both([scale * maps(2, 6, 5, 4)], [scale * maps(2, 3, 5, 4)], p):
        assert error(got, want) <= FLOAT32_ERROR
        assert not got.dim() or error(got.flip(1, 2, 3), want) > 0.1


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("p", [0.5, 1, 2, 3, 2.5])
@pytest.mark.parametrize("layout", TWO_LAYOUTS)
def test_nan_and_inf_propagate_as_in_the_reference(value, p, layout):
    student, teacher = maps(3, 3, 4, 4, layout=layout), maps(3, 3, 4, 4, layout=layout)
    for x in (student, teacher):
        x[1, 2, 0, 0] = value
        for got, want in both([student], [teacher], p):
            assert torch.equal(got.isnan(), want.isnan())
            assert error(got, want) <= FLOAT32_ERROR
        x[1, 2, 0, 0] = 0.5


@pytest.mark.parametrize("p", [0.5, 1, 1.5, 2, 3])
def test_zeros_among_the_features_have_the_references_slope(p):
    student, teacher = maps(2, 4, 5, 5), maps(2, 4, 5, 5)
    student[:, 1] = 0
    assert all(error(got, want) <= FLOAT32_ERROR for got, want in both([student], [teacher], p))


@kernels
def test_small_float16_gradients_keep_their_digits_under_a_loss_scale():
    student, teacher = maps(16, 64, 8, 8, dtype=fp16), maps(16, 64, 8, 8, dtype=fp16)
    _, (got, exact), _ = both([student], [teacher], upstream=2.0**16)
    assert error((exact * 2.0**-16).half() * 2.0**16, exact) > 4e-3, "else float16 could hold them as they are"
    assert error(got, exact) < 1e-3


def test_equal_maps_give_zero():
    student = maps(2, 5, 6, 6)
    loss, gradient, _ = run(ours(2), [student], [3 * student])
    assert loss < 1e-14
    assert gradient.abs().max() < 1e-7


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 0, 4, 4)], ids=str)
@pytest.mark.parametrize("choice", ["auto", pytest.param("triton", marks=kernels)])
def test_pytorch_form_runs_without_images_or_channels(shape, choice):
    student, teacher = maps(*shape), maps(shape[0], 5, 4, 4)
    with kdfast.backend("torch"):
        want = value_and_gradients(attention_transfer_loss, [student, teacher])
    with kdfast.backend(choice):
        got = value_and_gradients(attention_transfer_loss, [student, teacher])
    assert want[0].isnan()
    assert all(torch.equal(a.isnan(), b.isnan()) and a.shape == b.shape for a, b in zip(got, want))


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


def test_equal_inputs_give_equal_bits():
    student, teacher = maps(3, 70, 9, 9), maps(3, 40, 9, 9, layout="channels_last")
    first = run(ours(2.5), [student], [teacher])
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(run(ours(2.5), [student], [teacher]), first))


def test_an_images_gradient_does_not_depend_on_other_images():
    student, teacher = maps(4, 6, 5, 5), maps(4, 6, 5, 5)
    before = run(ours(2), [student], [teacher])[1]
    student[1:] *= 3
    assert torch.equal(run(ours(2), [student], [teacher])[1][0], before[0])


def test_backward_may_run_twice_and_inputs_are_not_written():
    student, teacher = maps(2, 6, 4, 4).requires_grad_(), maps(2, 5, 4, 4)
    copies = student.detach().clone(), teacher.clone()
    loss = attention_transfer_loss(student, teacher)
    once, again, threefold = (
        torch.autograd.grad(loss, student, torch.tensor(upstream), retain_graph=True)[0] for upstream in (1.0, 1.0, 3.0)
    )
    assert torch.equal(once, again)
    assert error(threefold, 3 * once.double()) < 1e-6
    assert torch.equal(student, copies[0])
    assert torch.equal(teacher, copies[1])


def test_second_derivative_raises_one_sentence():
    student = maps(2, 6, 4, 4).requires_grad_()
    loss = attention_transfer_loss(student, maps(2, 5, 4, 4))
    with pytest.raises(RuntimeError, match="no second derivative" if KERNELS else "twice"):  # the kernel raises at once
        torch.autograd.grad(loss, student, create_graph=True)[0].sum().backward()


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


def test_autocast_and_the_default_dtype_change_nothing():
    student, teacher = maps(2, 6, 4, 4), maps(2, 5, 4, 4)
    plain = run(ours(2), [student], [teacher])
    with torch.autocast(DEVICE.split(":")[0], bf16):
        assert all(torch.equal(a, b) for a, b in zip(run(ours(2), [student], [teacher]), plain))
    torch.set_default_dtype(fp64)
    try:
        assert all(torch.equal(a, b) for a, b in zip(run(ours(2), [student], [teacher]), plain))
    finally:
        torch.set_default_dtype(fp32)


@pytest.mark.parametrize("layout", [*TWO_LAYOUTS, "turned"])
@pytest.mark.parametrize("mode", ["aot_eager", "inductor"])
def test_loss_compiles_without_graph_break(mode, layout):
    if mode == "inductor" and layout != "contiguous" and not KERNELS:
        pytest.skip("one layout shows that Inductor compiles the PyTorch form")
    torch._dynamo.reset()
    students = [maps(2, 6, 4, 4, layout=layout), maps(2, 7, 3, 3)]
    teachers = [maps(2, 3, 8, 8, layout=layout), maps(2, 4, 3, 3)]
    compiled = torch.compile(ours(2), fullgraph=True, backend=mode)
    for got, want in zip(run(compiled, students, teachers), run(ours(2), students, teachers)):
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


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 5),
    c=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    sizes=st.lists(st.integers(1, 7), min_size=4, max_size=4),
    p=st.sampled_from([1, 2, 3]),
    layouts=st.tuples(st.sampled_from(TWO_LAYOUTS), st.sampled_from(TWO_LAYOUTS)),
    block=st.integers(1, 300),
)
def test_fuzz_of_blocks(n: int, c: Any, sizes: list[int], p: float, layouts: Any, block: int) -> None:
    student = maps(n, c[0], sizes[0], sizes[1], dtype=fp64, layout=layouts[0])
    teacher = maps(n, c[1], sizes[2], sizes[3], dtype=fp64, layout=layouts[1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(operator, "_BLOCK", block)
        pairs = list(both([student], [teacher], p))
    assert all((got - want).abs().max() <= 1e-12 * max(1, want.abs().max()) for got, want in pairs)


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


@kernels
@pytest.mark.parametrize("wanted", [[True, False, True, True], [False] * 4])
def test_registered_operators_pass_opcheck(wanted):
    students, teachers = [maps(2, 6, 4, 4), maps(3, 5, 2, 2, layout="channels_last")], [maps(2, 3, 4, 4), maps(3, 5, 2, 2, dtype=bf16)]
    torch.library.opcheck(torch.ops.kdfast.attention_transfer.default, (students, teachers, 2.0, wanted))
    slopes = operator._loss_and_slopes(students, teachers, 2.0, wanted)[1:]
    features = [x for x, need in zip((*students, *teachers), wanted) if need]
    torch.library.opcheck(torch.ops.kdfast.attention_transfer_backward.default, (features, slopes, torch.tensor(0.5), 2.0))


@pytest.fixture
def launches(monkeypatch):
    """The names of the kernels launched."""
    launched = []

    class Watched:
        def __init__(self, name):
            self.name, self.function = name, getattr(kernel, name)

        def __getitem__(self, grid):
            launched.append(self.name)
            return self.function[grid]

    for name in ("_energies", "_compare", "_gradients"):
        monkeypatch.setattr(kernel, name, Watched(name))
    return launched


@kernels
def test_a_compiled_graph_follows_the_backend(launches):
    torch._dynamo.reset()
    student, teacher = maps(2, 6, 4, 4), maps(2, 5, 4, 4)
    compiled = torch.compile(ours(2), fullgraph=True, backend="aot_eager")
    run(compiled, [student], [teacher])
    assert launches
    launches.clear()
    with kdfast.backend("torch"):
        run(compiled, [student], [teacher])
    run(compiled, [student.double()], [teacher])
    assert not launches


@kernels
def test_a_stage_is_three_launches_forward_and_one_backward(launches):
    student = maps(3, 70, 9, 9).requires_grad_()
    loss = attention_transfer_loss([student, student], [maps(3, 6, 9, 9)] * 2)
    assert launches == ["_energies", "_energies", "_compare"] * 2
    loss.backward()
    assert launches[6:] == ["_gradients"] * 2


@kernels
def test_launches_go_to_the_device_of_the_tensors(monkeypatch):
    guarded = []
    guard = torch.cuda.device_of
    monkeypatch.setattr(torch.cuda, "device_of", lambda x: guarded.append(x) or guard(x))
    student = maps(2, 6, 4, 4).requires_grad_()
    attention_transfer_loss(student, maps(2, 5, 4, 4)).backward()
    assert len(guarded) == 4, "two energies, their comparison, one gradient"
    assert all(x.device == student.device for x in guarded)


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
    for got, want in both([student], [maps(*shape)]):
        assert error(got, want) <= FLOAT32_ERROR + (0 if got.dtype == fp32 else 2**-11)


@pytest.mark.skipif(not INTERPRETED, reason="KDFAST_BACKEND=torch is the same everywhere else")
def test_backend_chooses_the_form(launches):
    student, teacher = maps(2, 6, 4, 4), maps(2, 5, 4, 4)
    with kdfast.backend("torch"):
        plain = attention_transfer_loss(student, teacher)
    assert not launches
    assert error(attention_transfer_loss(student, teacher), plain.double()) < FLOAT32_ERROR
    assert launches
    with pytest.raises(RuntimeError, match="needs float32, bfloat16 or float16"), kdfast.backend("triton"):
        attention_transfer_loss(student.double(), teacher)


@st.composite
def stages(draw):
    """B, then the student's and the teacher's channels, height, width, layouts and dtypes."""
    sizes = st.integers(1, 40), st.integers(1, 40), st.integers(1, 8), st.integers(1, 8)
    layouts = [draw(st.sampled_from(list(LAYOUTS))) for _ in range(2)]
    return (*map(draw, sizes), *layouts, draw(st.sampled_from([(fp32, fp32), (fp32, bf16), (bf16, bf16), (fp16, fp16)])))


PROBLEMS = given(
    B=st.integers(1, 3),
    drawn=st.lists(stages(), min_size=1, max_size=2),
    p=st.sampled_from([1, 2, 2, 3, 4, 0.5, 1.5, 2.7]),
    scale=st.sampled_from([1e-2, 1.0, 1.0, 100.0]),
    upstream=st.sampled_from([1.0, -0.3, 1024.0]),
    seed=st.integers(0, 10**6),
)


@kernels
@settings(max_examples=100, deadline=None, derandomize=bool(os.environ.get("CI")), database=None)
@PROBLEMS
def test_fuzz(B: int, drawn: Any, p: float, scale: float, upstream: float, seed: int) -> None:
    _check_problem(B, drawn, p, scale, upstream, seed)


@kernels
@pytest.mark.slow
@settings(max_examples=320, deadline=None, derandomize=bool(os.environ.get("CI")), database=None)
@PROBLEMS
def test_fuzz_longer(B: int, drawn: Any, p: float, scale: float, upstream: float, seed: int) -> None:
    _check_problem(B, drawn, p, scale, upstream, seed)


def _check_problem(B: int, drawn: Any, p: float, scale: float, upstream: float, seed: int) -> None:
    torch.manual_seed(seed)
    students = [scale * maps(B, C, H, W, dtype=dtypes[0], layout=layout) for C, _, H, W, layout, _, dtypes in drawn]
    teachers = [maps(B, C, H, W, dtype=dtypes[1], layout=layout) for _, C, H, W, _, layout, dtypes in drawn]
    # in float32 also for 16-bit features: what remains is the gradient's own rounding
    eager = run(of_reference(p), [x.float() for x in students], [x.float() for x in teachers], upstream)
    for (got, want), peer, features in zip(both(students, teachers, p, upstream), eager, [None, *students, *teachers]):
        size = want.abs().max().item()
        allowed = max(FLOAT32_ERROR * size, 3 * (peer - want).abs().max().item())
        if features is None:  # of maps of length 1, which float32 holds to 1e-7
            allowed += 1e-13
        else:
            a = features.double().abs().pow(p).mean(1, keepdim=True)
            slope = p / features.shape[1] * features.double().abs().pow(p - 1) / a.square().sum((2, 3), keepdim=True).sqrt()
            alike = abs(upstream) * 2 / (B * a[0].numel()) * slope.max().item()  # the gradient's terms cancel if the maps are alike
            allowed += 1e-6 * alike + {fp32: 0.0, bf16: 2**-8, fp16: 2**-11}[got.dtype] * size + (2**-24 if got.dtype == fp16 else 0.0)
        assert got.shape == want.shape
        assert (got - want).abs().max() <= allowed
