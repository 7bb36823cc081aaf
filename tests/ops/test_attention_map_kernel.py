"""What only the Triton kernels of attention_transfer_loss have to show; test_feature_losses.py holds the rest, in the interpreter too."""

import os
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kdfast
from kdfast import reference
from kdfast.functional import attention_transfer_loss
from kdfast.ops import attention_map as operator
from tests.numeric import ALLOWANCE, DEVICE, FLOAT32_ERROR, INTERPRETED, KERNELS, error, value_and_gradients

pytestmark = [pytest.mark.kernels, pytest.mark.skipif(not KERNELS, reason="the kernels need a GPU or TRITON_INTERPRET=1")]
if KERNELS:
    from kdfast.kernels import attention_map as kernel

fp32, bf16, fp16 = torch.float32, torch.bfloat16, torch.float16


def contiguous(x):
    return x.contiguous()


def channels_last(x):
    return x.contiguous(memory_format=torch.channels_last)


def padded(x, *sides, layout=contiguous):
    """A copy that is a part of a larger tensor that holds NaN around it; `sides` as of torch.nn.functional.pad."""
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


def maps(*shape, dtype=fp32, layout="contiguous"):
    return LAYOUTS[layout](torch.randn(shape).to(dtype))


def run(loss, students, teachers, upstream=0.7):
    """[loss, gradients of students, gradients of teachers], of tensors as they lie."""
    leaves = [x.detach().requires_grad_() for x in (*students, *teachers)]
    value = loss(leaves[: len(students)], leaves[len(students) :])
    return [value.detach(), *torch.autograd.grad(value, leaves, torch.tensor(upstream, dtype=value.dtype))]


def of_reference(p):
    return lambda students, teachers: reference.attention_transfer_loss(students, teachers, p)


def ours(p):
    return lambda students, teachers: attention_transfer_loss(students, teachers, p=p)


def agree(students, teachers, p=2):
    """Contract 1; shows that a zero and a permuted gradient would be seen."""
    exact = run(of_reference(p), [x.double() for x in students], [x.double() for x in teachers])
    eager = run(of_reference(p), students, teachers)
    for got, peer, want, features in zip(run(ours(p), students, teachers), eager, exact, [None, *students, *teachers]):
        dtype = fp32 if features is None else features.dtype
        assert got.dtype == dtype
        allowed = max(FLOAT32_ERROR, error(peer, want)) + ALLOWANCE[dtype]
        assert error(got, want) <= allowed
        assert error(torch.zeros_like(got), want) > allowed, "the check would let a zero pass"
        if got.numel() > 20:
            assert error(got.flip(1, 2, 3), want) > allowed, "the check would let a permuted gradient pass"


# ---- values and gradients --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [fp32, bf16, fp16], ids=str)
@pytest.mark.parametrize(
    "shape",
    [(2, 16, 8, 8), (3, 17, 9, 7), (1, 1, 1, 2), (5, 3, 2, 1), (2, 300, 3, 5), (2, 2048, 2, 1), (2, 64, 16, 12), (65, 5, 2, 1)],
    ids=str,
)
def test_every_plan_matches_float64(shape, dtype, layout):
    """Several steps over the channels and over the pixels, and parts of a tile; the teacher has other channels."""
    B, C, H, W = shape
    agree([maps(*shape, dtype=dtype, layout=layout)], [maps(B, C % 7 + 2, H, W, dtype=dtype, layout=layout)])


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_more_pixels_than_are_compared_at_a_time(layout):
    agree([maps(1, 2, 70, 61, layout=layout)], [maps(1, 3, 70, 61, layout=layout)])


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("p", [1, 2, 3, 4, 0.5, 1.5, 2.7, 11, 30.5])
def test_every_power_matches_float64(p, layout):
    agree([maps(2, 20, 6, 5, layout=layout)], [maps(2, 33, 6, 5, layout=layout)], p)


@pytest.mark.parametrize("p", [130, 1000.5])
def test_powers_beyond_those_of_products(p):
    students, teachers = [0.9 + 0.1 * torch.rand(2, 5, 3, 4)], [0.9 + 0.1 * torch.rand(2, 5, 3, 4)]
    exact = run(of_reference(p), [x.double() for x in students], [x.double() for x in teachers])
    assert all(error(a, b) < 2e-4 for a, b in zip(run(ours(p), students, teachers), exact))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("other", ["contiguous", "channels_last"])
def test_any_layout_matches_float64_and_what_lies_around_is_not_read(layout, other):
    agree([maps(4, 8, 6, 10, layout=layout)], [maps(4, 24, 6, 10, layout=other)])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_only_what_has_no_two_strides_is_copied(layout):
    x = maps(4, 8, 6, 10, layout=layout)
    rows = kernel._rows(x, kernel._channels_last(x))
    shared = rows.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
    assert shared == ("part" not in layout and layout != "turned")
    assert rows.stride(2) == 1
    assert rows.shape == ((4, 60, 8) if "channels_last" in layout or layout == "some images" else (4, 8, 60))


def test_stages_of_every_dtype_add_up():
    shapes = [(3, 6, 8, 8), (3, 10, 4, 4), (2, 12, 1, 3)]
    students = [maps(*shape, dtype=dtype) for shape, dtype in zip(shapes, (fp32, bf16, fp16))]
    teachers = [maps(*shape, dtype=dtype) for shape, dtype in zip(shapes, (bf16, fp32, fp32))]
    exact = run(of_reference(2), [x.double() for x in students], [x.double() for x in teachers])
    for got, want in zip(run(ours(2), students, teachers), exact):
        assert error(got, want) <= FLOAT32_ERROR + (0 if got.dtype == fp32 else 2**-8)
        assert not got.dim() or error(got.flip(1), want) > 0.1
    apart = sum(attention_transfer_loss(s, t) for s, t in zip(students, teachers))
    assert error(attention_transfer_loss(students, teachers), apart.double()) < 1e-6


def test_sizes_that_differ_are_pooled_first():
    agree([maps(2, 6, 8, 9)], [maps(2, 4, 4, 11, layout="channels_last")])


def test_a_gradient_only_for_what_requires_one():
    student, teacher = maps(2, 6, 4, 4), maps(2, 5, 4, 4)
    both = run(ours(2), [student], [teacher], 1.0)
    for index, x in enumerate((student, teacher)):
        x.requires_grad_()
        (alone,) = torch.autograd.grad(attention_transfer_loss(student, teacher), x)
        x.requires_grad_(False)
        assert torch.equal(alone, both[1 + index])
    assert not attention_transfer_loss(student, teacher).requires_grad


# ---- extreme values --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [1, 2, 3])
def test_images_of_zeros(p):
    for zeros_of_teacher in (False, True):
        student, teacher = maps(3, 4, 5, 5), maps(3, 4, 5, 5)
        student[0] = 0
        if zeros_of_teacher:
            teacher[:2] = 0
        exact = run(of_reference(p), [student.double()], [teacher.double()])
        assert all(error(a, b) <= FLOAT32_ERROR for a, b in zip(run(ours(p), [student], [teacher]), exact))


@pytest.mark.parametrize(("scale", "p"), [(1e4, 4), (1e9, 2), (1e-3, 2), (1e-5, 2), (3e-7, 2), (1e-6, 1), (1e-16, 1), (1e18, 2)])
def test_huge_and_tiny_features(scale, p):
    """The square of an energy may overflow; below a norm of 1e-12 maps are no longer of unit length."""
    student, teacher = scale * maps(2, 6, 5, 4), scale * maps(2, 3, 5, 4)
    exact = run(of_reference(p), [student.double()], [teacher.double()])
    for got, want in zip(run(ours(p), [student], [teacher]), exact):
        assert error(got, want) <= FLOAT32_ERROR
        assert not got.dim() or error(got.flip(1, 2, 3), want) > 0.1


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("p", [0.5, 1, 2, 3, 2.5])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_nan_and_inf_propagate_as_in_the_reference(value, p, layout):
    student, teacher = maps(3, 3, 4, 4, layout=layout), maps(3, 3, 4, 4, layout=layout)
    for x in (student, teacher):
        x[1, 2, 0, 0] = value
        exact = run(of_reference(p), [student.double()], [teacher.double()])
        for got, want in zip(run(ours(p), [student], [teacher]), exact):
            assert torch.equal(got.isnan(), want.isnan())
            assert error(got, want) <= FLOAT32_ERROR
        x[1, 2, 0, 0] = 0.5


def test_zeros_among_the_features_have_the_references_slope():
    student, teacher = maps(2, 4, 5, 5), maps(2, 4, 5, 5)
    student[:, 1] = 0
    for p in (0.5, 1, 1.5, 2, 3):
        exact = run(of_reference(p), [student.double()], [teacher.double()])
        assert all(error(a, b) <= FLOAT32_ERROR for a, b in zip(run(ours(p), [student], [teacher]), exact))


def test_small_gradients_of_float16_wait_for_the_loss_scale():
    student, teacher = maps(16, 64, 8, 8, dtype=fp16), maps(16, 64, 8, 8, dtype=fp16)
    exact = run(of_reference(2), [student.double()], [teacher.double()], 2.0**16)[1]
    assert error((exact * 2.0**-16).half() * 2.0**16, exact) > 4e-3, "else float16 could hold them as they are"
    assert error(run(ours(2), [student], [teacher], 2.0**16)[1], exact) < 1e-3


def test_equal_maps_give_nothing():
    student = maps(2, 5, 6, 6)
    loss, gradient, _ = run(ours(2), [student], [3 * student])
    assert loss < 1e-14
    assert gradient.abs().max() < 1e-7


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 0, 4, 4)], ids=str)
@pytest.mark.parametrize("choice", ["auto", "triton"])
def test_without_images_or_channels_the_pytorch_form_runs(shape, choice):
    student, teacher = maps(*shape), maps(shape[0], 5, 4, 4)
    with kdfast.backend("torch"):
        want = value_and_gradients(attention_transfer_loss, [student, teacher])
    with kdfast.backend(choice):
        got = value_and_gradients(attention_transfer_loss, [student, teacher])
    assert want[0].isnan()
    assert all(torch.equal(a.isnan(), b.isnan()) and a.shape == b.shape for a, b in zip(got, want))


# ---- autograd --------------------------------------------------------------------------------------------------------


def test_bits_are_the_same_in_every_run():
    student, teacher = maps(3, 70, 9, 9), maps(3, 40, 9, 9, layout="channels_last")
    first = run(ours(2.5), [student], [teacher])
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(run(ours(2.5), [student], [teacher]), first))


def test_an_images_gradient_does_not_depend_on_the_others():
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


def test_a_second_derivative_is_refused_in_words():
    student = maps(2, 6, 4, 4).requires_grad_()
    loss = attention_transfer_loss(student, maps(2, 5, 4, 4))
    with pytest.raises(RuntimeError, match="attention_transfer_loss has no second derivative: call"):
        torch.autograd.grad(loss, student, create_graph=True)


def test_features_written_after_forward_are_noticed():
    student = maps(2, 6, 4, 4)
    leaf = student.requires_grad_()
    loss = attention_transfer_loss(leaf, maps(2, 5, 4, 4))
    with torch.no_grad():
        leaf.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_autocast_and_the_default_dtype_change_nothing():
    student, teacher = maps(2, 6, 4, 4), maps(2, 5, 4, 4)
    plain = run(ours(2), [student], [teacher])
    with torch.autocast(DEVICE.split(":")[0], bf16):
        assert all(torch.equal(a, b) for a, b in zip(run(ours(2), [student], [teacher]), plain))
    torch.set_default_dtype(torch.float64)
    try:
        assert all(torch.equal(a, b) for a, b in zip(run(ours(2), [student], [teacher]), plain))
    finally:
        torch.set_default_dtype(torch.float32)


# ---- torch.compile ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "turned"])
@pytest.mark.parametrize("mode", ["aot_eager", "inductor"])
def test_it_compiles_without_a_graph_break_and_to_the_same_bits(mode, layout):
    torch._dynamo.reset()
    students = [maps(2, 6, 4, 4, layout=layout), maps(2, 7, 3, 3)]
    teachers = [maps(2, 3, 4, 4, layout=layout), maps(2, 4, 3, 3)]
    compiled = torch.compile(ours(2), fullgraph=True, backend=mode)
    for got, want in zip(run(compiled, students, teachers), run(ours(2), students, teachers)):
        assert error(got, want.double()) < 1e-6
        assert got.dtype == want.dtype


@pytest.mark.parametrize("wanted", [[True, False, True, True], [False] * 4])
def test_registered_operators_pass_opcheck(wanted):
    students, teachers = [maps(2, 6, 4, 4), maps(3, 5, 2, 2, layout="channels_last")], [maps(2, 3, 4, 4), maps(3, 5, 2, 2, dtype=bf16)]
    torch.library.opcheck(torch.ops.kdfast.attention_transfer.default, (students, teachers, 2.0, wanted))
    slopes = operator._loss_and_slopes(students, teachers, 2.0, wanted)[1:]
    features = [x for x, need in zip((*students, *teachers), wanted) if need]
    torch.library.opcheck(torch.ops.kdfast.attention_transfer_backward.default, (features, slopes, torch.tensor(0.5), 2.0))


def test_a_compiled_graph_follows_the_backend(monkeypatch):
    torch._dynamo.reset()
    launches = watch(monkeypatch)
    student, teacher = maps(2, 6, 4, 4), maps(2, 5, 4, 4)
    compiled = torch.compile(ours(2), fullgraph=True, backend="aot_eager")
    run(compiled, [student], [teacher])
    assert launches
    launches.clear()
    with kdfast.backend("torch"):
        run(compiled, [student], [teacher])
    run(compiled, [student.double()], [teacher])
    assert not launches


# ---- launches --------------------------------------------------------------------------------------------------------


def watch(monkeypatch):
    """The names of the kernels launched."""
    launches = []

    def watched(name, function):
        class Watched:
            def __getitem__(self, grid):
                launches.append(name)
                return function[grid]

        return Watched()

    for name in ("_energies", "_compare", "_gradients"):
        monkeypatch.setattr(kernel, name, watched(name, getattr(kernel, name)))
    return launches


def test_a_stage_is_three_launches_forward_and_one_backward(monkeypatch):
    launches = watch(monkeypatch)
    student = maps(3, 70, 9, 9).requires_grad_()
    loss = attention_transfer_loss([student, student], [maps(3, 6, 9, 9)] * 2)
    assert launches == ["_energies", "_energies", "_compare"] * 2
    loss.backward()
    assert launches[6:] == ["_gradients"] * 2


def test_a_launch_goes_to_the_device_of_its_tensors(monkeypatch):
    guarded = []
    guard = torch.cuda.device_of
    monkeypatch.setattr(torch.cuda, "device_of", lambda x: guarded.append(x) or guard(x))
    student = maps(2, 6, 4, 4).requires_grad_()
    attention_transfer_loss(student, maps(2, 5, 4, 4)).backward()
    assert len(guarded) == 4, "two energies, their comparison, one gradient"
    assert all(x.device == student.device for x in guarded)


@pytest.mark.parametrize(
    ("shape", "strides"),
    [
        ((2, 3, 2, 2), (2**31 + 64, 4, 2, 1)),  # images far apart
        ((1, 3, 2, 2), (1, 2**30 + 64, 2, 1)),  # channels
        ((1, 8, 3, 1), (1, 1, 2**30 + 64, 1)),  # pixels
    ],
    ids=str,
)
def test_elements_may_lie_further_apart_than_32_bits_count(shape, strides):
    # virtual memory only: what lies between the elements is never touched
    student = torch.empty(2**31 + 256, dtype=fp16, device=DEVICE).as_strided(shape, strides)
    student.copy_(torch.randn(shape))
    assert kernel._rows(student, kernel._channels_last(student)).data_ptr() == student.data_ptr()
    teacher = maps(*shape)
    exact = run(of_reference(2), [student.double()], [teacher.double()])
    for got, want in zip(run(ours(2), [student], [teacher]), exact):
        assert error(got, want) <= FLOAT32_ERROR + (0 if got.dtype == fp32 else 2**-11)


@pytest.mark.skipif(not INTERPRETED, reason="KDFAST_BACKEND=torch is the same everywhere else")
def test_the_backend_can_still_be_chosen(monkeypatch):
    launches = watch(monkeypatch)
    student, teacher = maps(2, 6, 4, 4), maps(2, 5, 4, 4)
    with kdfast.backend("torch"):
        plain = attention_transfer_loss(student, teacher)
    assert not launches
    assert error(attention_transfer_loss(student, teacher), plain.double()) < FLOAT32_ERROR
    assert launches
    with pytest.raises(RuntimeError, match="needs float32, bfloat16 or float16"), kdfast.backend("triton"):
        attention_transfer_loss(student.double(), teacher)


# ---- fuzz ------------------------------------------------------------------------------------------------------------


@st.composite
def stages(draw):
    """B, then the student's and the teacher's channels, height, width, layouts and dtypes."""
    sizes = st.integers(1, 40), st.integers(1, 40), st.integers(1, 8), st.integers(1, 8)
    return (*(draw(size) for size in sizes), *(draw(st.sampled_from(list(LAYOUTS))) for _ in range(2)), draw(
        st.sampled_from([(fp32, fp32), (fp32, bf16), (bf16, bf16), (fp16, fp16)])
    ))  # fmt: skip


@settings(max_examples=320, deadline=None, derandomize=bool(os.environ.get("CI")), database=None)
@given(
    B=st.integers(1, 3),
    drawn=st.lists(stages(), min_size=1, max_size=2),
    p=st.sampled_from([1, 2, 2, 3, 4, 0.5, 1.5, 2.7]),
    scale=st.sampled_from([1e-2, 1.0, 1.0, 100.0]),
    upstream=st.sampled_from([1.0, -0.3, 1024.0]),
    seed=st.integers(0, 10**6),
)
def test_fuzz(B: int, drawn: Any, p: float, scale: float, upstream: float, seed: int) -> None:
    torch.manual_seed(seed)
    students = [scale * maps(B, C, H, W, dtype=dtypes[0], layout=layout) for C, _, H, W, layout, _, dtypes in drawn]
    teachers = [maps(B, C, H, W, dtype=dtypes[1], layout=layout) for _, C, H, W, _, layout, dtypes in drawn]
    exact = run(of_reference(p), [x.double() for x in students], [x.double() for x in teachers], upstream)
    # in float32 also for 16-bit features: what remains is the gradient's own rounding
    eager = run(of_reference(p), [x.float() for x in students], [x.float() for x in teachers], upstream)
    for got, peer, want, features in zip(run(ours(p), students, teachers, upstream), eager, exact, [None, *students, *teachers]):
        size = want.abs().max().item()
        allowed = max(FLOAT32_ERROR * size, 3 * (peer - want).abs().max().item())
        if features is None:  # of maps of length 1, which float32 holds to 1e-7
            allowed += 1e-13
        else:
            a = features.double().abs().pow(p).mean(1, keepdim=True)
            slope = p / features.shape[1] * features.double().abs().pow(p - 1) / a.square().sum((2, 3), keepdim=True).sqrt()
            alike = abs(upstream) * 2 / (B * a[0].numel()) * slope.max().item()  # the gradient's terms, which cancel in maps that are alike
            allowed += 1e-6 * alike + {fp32: 0.0, bf16: 2**-8, fp16: 2**-11}[got.dtype] * size + (2**-24 if got.dtype == fp16 else 0.0)
        assert got.shape == want.shape
        assert (got - want).abs().max() <= allowed
