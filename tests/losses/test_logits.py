"""The loss modules for logits: KDLoss and LogitStandardizationLoss."""

import pytest
import torch

from kdfast.functional import kd_loss
from kdfast.losses import KDLoss, LogitStandardizationLoss
from tests.ops.distillation import make_logits

X = torch.ones(2, 3)


def test_kd_loss_module_passes_its_attributes_to_kd_loss():
    student, teacher, labels = make_logits(4, 9), make_logits(4, 9), torch.randint(9, (4,))
    module = KDLoss()
    assert torch.equal(module(student, teacher, labels), kd_loss(student, teacher, labels, kd_weight=0.9, ce_weight=0.1))
    changes = {"temperature": 2.0, "standardize": True, "label_smoothing": 0.1, "ignore_index": 3, "divergence": "js", "reduction": "none"}
    for name, value in changes.items():
        setattr(module, name, value)
    module.teacher_weights = [0.5]
    want = kd_loss(student, teacher, labels, kd_weight=0.9, ce_weight=0.1, teacher_weights=[0.5], **changes)
    assert torch.equal(module(student, teacher, labels), want)
    assert torch.equal(KDLoss(**changes, teacher_weights=[0.5])(student, teacher, labels), want)


def test_modules_refuse_swapped_arguments():
    student, teacher = make_logits(4, 9), make_logits(4, 9).requires_grad_()
    for call in (lambda: KDLoss(ce_weight=0.0)(student, teacher), lambda: LogitStandardizationLoss()(teacher, student)):
        with pytest.raises(ValueError, match="swapped"):
            call()
    LogitStandardizationLoss()(student, teacher).backward()  # the teacher comes first
    assert teacher.grad.any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param({"temperature": 0}, "temperature must be positive, got 0", id="temperature"),
        pytest.param({"temperature": "4"}, "temperature must be a number, got '4'", id="no number"),
        pytest.param({"reduction": "batchmean"}, "reduction must be one of", id="reduction"),
        pytest.param({"teacher_weights": 0.5}, "teacher_weights must be a sequence of numbers, got 0.5", id="teacher_weights"),
        pytest.param({"label_smoothing": 2.0}, "label_smoothing must be in", id="label_smoothing"),
    ],
)
def test_constructor_refuses_bad_options(options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        KDLoss(**options)


@pytest.mark.parametrize(
    ("student", "teacher", "message"),
    [
        pytest.param((X,), X, "student must be a tensor, got tuple", id="student"),
        pytest.param(X, None, "teacher must be a tensor or a sequence of tensors, got NoneType", id="teacher"),
    ],
)
def test_modules_refuse_arguments_that_are_no_tensors(student, teacher, message):
    with pytest.raises(TypeError, match=message):
        KDLoss(ce_weight=0.0)(student, teacher)
