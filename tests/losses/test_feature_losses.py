"""Attention transfer, hints, self-distillation, soft cross-entropy: against the originals' values and the float64 reference."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import kdfast
from kdfast import functional, losses, reference
from kdfast.ops import attention_map
from tests.numeric import ALLOWANCE, FLOAT32_ERROR, KERNELS, error, value_and_gradients

pytestmark = pytest.mark.kernels

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def features(*shape, dtype=torch.float32, layout="contiguous"):
    return torch.randn(shape).to(dtype).to(memory_format=LAYOUTS[layout])


def reference_loss(p=2):
    return lambda student, teacher: reference.attention_transfer_loss([student], [teacher], p)


# ---- attention transfer ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", ["at_n4_16x8_64x8", "at_n1_32x16_32x8", "at_n2_8x7_24x14"])
def test_original_values_and_gradients(oracles, case, layout):
    student, teacher = (torch.tensor(oracles[f"{case}/{name}"]).to(memory_format=LAYOUTS[layout]) for name in ("student", "teacher"))
    loss, gradient, _ = value_and_gradients(functional.attention_transfer_loss, [student.double(), teacher.double()])
    assert error(loss, torch.tensor(oracles[f"{case}/loss"])) < 1e-12
    assert error(gradient, torch.tensor(oracles[f"{case}/grad"])) < 1e-12


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("p", [1, 2, 3.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shapes", [((4, 16, 8, 8), (4, 64, 8, 8)), ((3, 5, 9, 7), (3, 2, 4, 14)), ((1, 1, 1, 2), (1, 3, 1, 2))], ids=str)
def test_values_and_gradients_match_float64(shapes, dtype, p, layout):
    student, teacher = (features(*shape, dtype=dtype, layout=layout) for shape in shapes)
    exact = value_and_gradients(reference_loss(p), [student.double(), teacher.double()])
    eager = value_and_gradients(reference_loss(p), [student, teacher])
    ours = value_and_gradients(lambda s, t: functional.attention_transfer_loss(s, t, p=p), [student, teacher])
    assert ours[0].dtype == torch.float32
    assert ours[1].dtype == dtype
    for got, peer, want in zip(ours, eager, exact):
        allowed = max(FLOAT32_ERROR, error(peer, want)) + ALLOWANCE[dtype]
        assert error(got, want) <= allowed
        assert error(torch.zeros_like(got), want) > allowed, "the check would let a zero pass"
        if got.numel() > 20:
            assert error(got.flip(1, 2, 3), want) > allowed, "the check would let a permuted gradient pass"


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 5),
    c=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    sizes=st.lists(st.integers(1, 7), min_size=4, max_size=4),
    p=st.sampled_from([1, 2, 3]),
    layouts=st.tuples(st.sampled_from(list(LAYOUTS)), st.sampled_from(list(LAYOUTS))),
    block=st.integers(1, 300),
)
def test_any_shapes_layouts_and_blocks_follow_the_reference(n, c, sizes, p, layouts, block):
    student = features(n, c[0], sizes[0], sizes[1], dtype=torch.float64, layout=layouts[0])
    teacher = features(n, c[1], sizes[2], sizes[3], dtype=torch.float64, layout=layouts[1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_map, "_BLOCK", block)
        ours = value_and_gradients(lambda s, t: functional.attention_transfer_loss(s, t, p=p), [student, teacher])
    exact = value_and_gradients(reference_loss(p), [student, teacher])
    for got, want in zip(ours, exact):
        assert (got - want).abs().max() <= 1e-12 * max(1, want.abs().max())


def test_stages_add_up_and_one_tensor_is_one_stage():
    students, teachers = [features(2, 3, 4, 4), features(2, 5, 2, 2)], [features(2, 4, 4, 4), features(2, 6, 2, 2)]
    both = functional.attention_transfer_loss(students, teachers)
    apart = [functional.attention_transfer_loss(s, t) for s, t in zip(students, teachers)]
    assert torch.allclose(both, sum(apart))


def test_a_teacher_without_gradient_gets_none_and_one_with_gets_it():
    student, teacher = features(2, 3, 4, 4).requires_grad_(), features(2, 3, 4, 4)
    functional.attention_transfer_loss(student, teacher).backward()
    assert student.grad is not None
    assert teacher.grad is None
    teacher.requires_grad_()
    functional.attention_transfer_loss(student, teacher).backward()
    assert teacher.grad is not None


def test_equal_maps_give_zero_loss_and_gradient():
    x = features(2, 3, 4, 4)
    loss, gradient, _ = value_and_gradients(functional.attention_transfer_loss, [x, 5 * x])
    assert loss < 1e-14
    assert gradient.abs().max() < 1e-8


def test_an_image_of_zeros_gives_what_the_reference_gives():
    student, teacher = features(2, 3, 4, 4), features(2, 3, 4, 4)
    student[0] = 0
    ours = value_and_gradients(functional.attention_transfer_loss, [student, teacher])
    exact = value_and_gradients(reference_loss(), [student.double(), teacher.double()])
    assert all(error(a, b) <= FLOAT32_ERROR for a, b in zip(ours, exact))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_inf_propagate_as_in_the_reference(value):
    student, teacher = features(3, 3, 4, 4), features(3, 3, 4, 4)
    student[1, 2, 0, 0] = value
    ours = value_and_gradients(functional.attention_transfer_loss, [student, teacher])
    exact = value_and_gradients(reference_loss(), [student.double(), teacher.double()])
    for got, want in zip(ours, exact):
        assert torch.equal(got.isnan(), want.isnan())


def test_inputs_are_not_written_and_backward_may_run_twice():
    student, teacher = features(2, 3, 4, 4).requires_grad_(), features(2, 3, 4, 4)
    copies = student.detach().clone(), teacher.clone()
    loss = functional.attention_transfer_loss(student, teacher)
    loss.backward(retain_graph=True)
    once = student.grad.clone()
    loss.backward()
    assert torch.equal(student.grad, 2 * once)
    assert torch.equal(student, copies[0])
    assert torch.equal(teacher, copies[1])


def test_a_second_derivative_is_refused_in_words():
    student = features(2, 3, 4, 4).requires_grad_()
    loss = functional.attention_transfer_loss(student, features(2, 3, 4, 4))

    def differentiate_twice():
        (gradient,) = torch.autograd.grad(loss, student, create_graph=True)
        gradient.sum().backward()

    with pytest.raises(RuntimeError, match="no second derivative" if KERNELS else "twice"):  # the kernel says so at once
        differentiate_twice()


def test_gradients_keep_the_features_layout():
    for layout in LAYOUTS:
        student = features(2, 8, 4, 4, layout=layout).requires_grad_()
        functional.attention_transfer_loss(student, features(2, 3, 4, 4)).backward()
        assert student.grad.stride() == student.stride()


def test_it_compiles_without_a_graph_break():
    torch._dynamo.reset()
    student, teacher = features(2, 6, 4, 4), features(2, 3, 8, 8)
    compiled = torch.compile(functional.attention_transfer_loss, fullgraph=True)
    ours = value_and_gradients(compiled, [student, teacher])
    exact = value_and_gradients(reference_loss(), [student.double(), teacher.double()])
    assert all(error(a, b) <= FLOAT32_ERROR for a, b in zip(ours, exact))


def test_no_temporary_is_as_large_as_the_features():
    student = features(64, 64, 16, 16)
    largest = 0

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out._base is None:
                largest = max(largest, out.numel())
            return out

    with kdfast.backend("torch"), Sizes():
        functional.attention_transfer_loss(student, student)
    assert largest <= max(attention_map._BLOCK, student.numel() // 64)


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
        functional.attention_transfer_loss(student, teacher, p=p)


def test_the_attention_module_refuses_swapped_arguments():
    student, teacher = features(2, 3, 4, 4).requires_grad_(), features(2, 5, 4, 4)
    module = losses.AttentionTransferLoss(p=2)
    assert torch.equal(module([student], [teacher]), functional.attention_transfer_loss(student, teacher))
    with pytest.raises(ValueError, match="swapped"):
        module(teacher, student)
    assert "p=2" in repr(module)


# ---- hints -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("student_shape", "teacher_shape", "kind", "kernel"),
    [
        ((4, 8, 8), (6, 4, 4), nn.Conv2d, (3, 3)),
        ((4, 4, 4), (6, 8, 8), nn.ConvTranspose2d, (4, 4)),
        ((4, 8, 8), (6, 8, 8), nn.Conv2d, (1, 1)),
        ((4, 8, 7), (6, 6, 6), nn.Conv2d, (3, 2)),
    ],
)
def test_the_regressor_fits_the_sizes_and_learns(student_shape, teacher_shape, kind, kernel):
    hint = losses.HintLoss(student_shape, teacher_shape)
    assert isinstance(hint.regressor[0], kind)
    assert hint.regressor[0].kernel_size == kernel
    student, teacher = features(5, *student_shape).requires_grad_(), features(5, *teacher_shape)
    loss = hint(student, teacher)
    assert torch.allclose(loss, F.mse_loss(hint.regressor(student), teacher))
    loss.backward()
    assert student.grad.abs().sum() > 0
    assert all(p.grad is not None for p in hint.parameters())


def test_without_a_regressor_it_is_the_mean_squared_error():
    student, teacher = features(2, 3, 4, 4).requires_grad_(), features(2, 3, 4, 4)
    hint = losses.HintLoss((3, 4, 4), (3, 4, 4), regressor=False)
    assert not list(hint.parameters())
    assert torch.equal(hint(student, teacher), F.mse_loss(student, teacher))
    with pytest.raises(ValueError, match="swapped"):
        hint(teacher, student)


def test_hints_in_low_precision_are_summed_in_float32():
    student, teacher = features(4, 3, 8, 8, dtype=torch.bfloat16), features(4, 3, 8, 8)
    assert error(functional.hint_loss(student, teacher), F.mse_loss(student.double(), teacher.double())) < FLOAT32_ERROR


@pytest.mark.parametrize(
    ("student", "teacher", "regressor", "message"),
    [
        ((3, 4, 4), (3, 5, 5), True, "half the teacher's size 5x5, or at least as large, got 4x4"),
        ((3, 4, 4), (6, 4, 4), False, r"teacher_shape must be student_shape \(3, 4, 4\), got \(6, 4, 4\)"),
        ((3, 4), (3, 4, 4), True, r"shapes must be \(C, H, W\)"),
        (16, 32, True, r"shapes must be \(C, H, W\), got 16 and 32"),
    ],
)
def test_bad_hint_shapes_are_named(student, teacher, regressor, message):
    with pytest.raises(ValueError, match=message):
        losses.HintLoss(student, teacher, regressor=regressor)


def test_task_oriented_features_are_as_many_as_maps_and_keep_float64():
    loss, made = losses.TOFDLoss((4, 4), (5, 5)).double(), torch.ones(2, 10, dtype=torch.float64)
    ours, theirs, logits = [torch.rand_like(made)[:, :4]] * 2, [torch.rand_like(made)[:, :5]] * 2, [made, made]
    assert {term.dtype for term in loss(ours, theirs, logits, logits).values()} == {torch.float64}
    with pytest.raises(ValueError, match="student_features must be 2, got 1"):
        loss(ours[:1], theirs, logits, logits)
    with pytest.raises(ValueError, match=r"must be 2 features and logits of student and teacher, got \[2, 2, 1, 2\]"):
        loss(ours, theirs, logits[:1], logits)


def test_attention_transfer_names_a_bad_power_when_it_is_made():
    with pytest.raises(ValueError, match="p must be positive, got 0"):
        losses.AttentionTransferLoss(0)


def test_hint_loss_names_shapes_that_differ():
    with pytest.raises(ValueError, match=r"teacher must have the student's shape \(2, 3\), got \(3, 2\)"):
        functional.hint_loss(torch.ones(2, 3), torch.ones(3, 2))


# ---- self-distillation -----------------------------------------------------------------------------------------------


def self_distillation(**options):
    module = losses.SelfDistillationLoss(0.3, 4, 6, **options)
    logits, labels = torch.randn(5, 3).requires_grad_(), torch.randint(0, 3, (5,))
    return module, logits, labels, features(5, 4, 8, 8).requires_grad_(), features(5, 6, 3, 3).requires_grad_()


def test_self_distillation_is_the_tutorials_formula():
    module, logits, labels, early, late = self_distillation()
    small = F.interpolate(early, size=(3, 3), mode="bilinear", align_corners=False)
    late_projected = torch.einsum("bchw,kc->bkhw", late, module.projection.weight[:, :, 0, 0]) + module.projection.bias[:, None, None]
    want = 0.3 * (small - late_projected).square().mean() + 0.7 * F.cross_entropy(logits, labels)
    assert torch.allclose(module(logits, labels, early, late), want)
    defaults = losses.SelfDistillationLoss()
    assert (defaults.alpha, defaults.projection.in_channels, defaults.projection.out_channels) == (0.5, 512, 128)


@pytest.mark.parametrize("detach_teacher", [False, True])
def test_the_late_features_receive_a_gradient_unless_detached(detach_teacher):
    module, logits, labels, early, late = self_distillation(detach_teacher=detach_teacher)
    module(logits, labels, early, late).backward()
    assert (late.grad is None) == detach_teacher
    assert early.grad is not None
    assert logits.grad is not None
    assert module.projection.weight.grad is not None  # whether it is trained is the caller's choice


def test_self_distillation_takes_bfloat16_features():
    module, logits, labels, early, late = self_distillation()
    exact = module(logits, labels, early, late)
    low = module(*(x if x is labels else x.detach().bfloat16() for x in (logits, labels, early, late)))
    assert low.dtype == torch.float32
    assert error(low, exact) < 2**-7


def test_bad_self_distillation_inputs_are_named():
    module, logits, labels, early, late = self_distillation()
    with pytest.raises(ValueError, match=r"student_intermediate must be \[B, 4, H, W\], got shape \(5, 6, 3, 3\)"):
        module(logits, labels, late, early)
    with pytest.raises(ValueError, match=r"teacher_intermediate must be \[B, 6, H, W\]"):
        module(logits, labels, early, early)
    with pytest.raises(ValueError, match=r"alpha must be in \[0, 1\], got 2"):
        losses.SelfDistillationLoss(2)


# ---- soft cross-entropy ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(5, 7), (1, 2), (3, 4, 10)], ids=str)
def test_soft_cross_entropy_matches_float64(shape, dtype):
    inputs = [4 * torch.randn(shape).to(dtype) for _ in range(2)]
    exact = value_and_gradients(lambda s, t: reference.soft_cross_entropy(s, t, 3.0), [x.double() for x in inputs])
    ours = value_and_gradients(lambda s, t: functional.soft_cross_entropy(s, t, 3.0), inputs)
    for got, want in zip(ours, exact):
        assert error(got, want) <= (FLOAT32_ERROR if dtype == torch.float32 or got.ndim == 0 else 2**-8)
        assert error(torch.zeros_like(got), want) > 0.5


def test_soft_cross_entropy_is_torchs_for_probabilities_and_has_no_factor_of_t_squared():
    student, teacher = torch.randn(6, 5), torch.randn(6, 5)
    want = F.cross_entropy(student / 4, (teacher / 4).softmax(-1))
    assert torch.allclose(functional.soft_cross_entropy(student, teacher, 4.0), want)


@pytest.mark.parametrize(
    ("student", "teacher", "temperature", "message"),
    [
        (torch.ones(2, 3), torch.ones(2, 4), 1.0, r"teacher must have the student's shape \(2, 3\), got \(2, 4\)"),
        (torch.ones(2, 3), torch.ones(2, 3), 0.0, "temperature must be positive, got 0"),
    ],
)
def test_bad_soft_cross_entropy_inputs_are_named(student, teacher, temperature, message):
    with pytest.raises(ValueError, match=message):
        functional.soft_cross_entropy(student, teacher, temperature)
