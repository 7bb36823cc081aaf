"""Modules for feature maps, and soft cross-entropy: against the papers' formulas and the float64 reference."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kdfast import functional, losses, reference
from tests.numeric import FLOAT32_ERROR, error, value_and_gradients


def features(*shape, dtype=torch.float32):
    return torch.randn(shape).to(dtype)


# ---- attention transfer ----------------------------------------------------------------------------------------------


def test_the_attention_module_refuses_swapped_arguments():
    student, teacher = features(2, 3, 4, 4).requires_grad_(), features(2, 5, 4, 4)
    module = losses.AttentionTransferLoss(p=2)
    assert torch.equal(module([student], [teacher]), functional.attention_transfer_loss(student, teacher))
    with pytest.raises(ValueError, match="swapped"):
        module(teacher, student)
    assert "p=2" in repr(module)
    with pytest.raises(ValueError, match="p must be positive, got 0"):
        losses.AttentionTransferLoss(0)


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


def test_soft_cross_entropy_is_torchs_and_names_bad_inputs():
    student, teacher = torch.randn(6, 5), torch.randn(6, 5)
    want = F.cross_entropy(student / 4, (teacher / 4).softmax(-1))  # without a factor of T^2
    assert torch.allclose(functional.soft_cross_entropy(student, teacher, 4.0), want)
    with pytest.raises(ValueError, match=r"teacher must have the student's shape \(6, 5\), got \(6, 4\)"):
        functional.soft_cross_entropy(student, teacher[:, 1:])
    with pytest.raises(ValueError, match="temperature must be positive, got 0"):
        functional.soft_cross_entropy(student, teacher, 0.0)
