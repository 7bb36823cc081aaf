"""SupConLoss, SupContrastiveLoss and ConKDLoss against the classes they replace."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kdfast import reference
from kdfast.losses import ConKDLoss, SupConLoss, SupContrastiveLoss
from tests.numeric import FLOAT32_ERROR, error, value_and_gradients


def test_supcon_and_its_defaults() -> None:
    loss = SupConLoss()
    assert (loss.temperature, loss.contrast_mode, loss.base_temperature) == (0.07, "all", 0.07)
    features, labels = F.normalize(torch.randn(7, 2, 3, 4, dtype=torch.float64), dim=-1), torch.tensor([0, 1, 0, 2, 1, 1, 5])
    ours = value_and_gradients(lambda x: loss(x, labels), [features])
    exact = value_and_gradients(lambda x: reference.supcon_loss(x, labels), [features])
    assert all(error(a, b) < 1e-12 for a, b in zip(ours, exact))
    assert error(SupConLoss(0.5)(features, labels), 0.5 / 0.07 * reference.supcon_loss(features, labels, temperature=0.5)) < 1e-12


def test_supcon_takes_labels_or_a_mask_or_neither() -> None:
    features, labels = F.normalize(torch.randn(6, 2, 8), dim=-1), torch.tensor([0, 1, 0, 1, 2, 2])
    loss = SupConLoss(0.1, "all", 0.1)
    assert torch.allclose(loss(features, labels), loss(features, mask=(labels[:, None] == labels).float()))
    assert torch.allclose(loss(features), loss(features, torch.arange(6)))
    assert torch.allclose(loss(features), loss(features, None, torch.eye(6)))
    one = SupConLoss(contrast_mode="one")(features, labels)
    assert one.isfinite()
    assert not torch.allclose(one, SupConLoss()(features, labels))
    with pytest.raises(ValueError, match=r"\[B, V, \.\.\.\]"):
        loss(features[:, 0], labels)
    with pytest.raises(ValueError, match="got both"):
        loss(features, labels, torch.eye(6))
    with pytest.raises(ValueError, match="contrast_mode"):
        SupConLoss(contrast_mode="two")(features, labels)


def test_supcontrastive_is_the_readmes_formula() -> None:
    features, labels = torch.randn(9, 4), torch.arange(9) % 3
    want = reference.supcon_loss(features.double(), labels, self_positive=True, normalize=True)
    assert error(SupContrastiveLoss()(features, labels), want) < FLOAT32_ERROR


@pytest.mark.parametrize("variant", ["readme", "notebook"])
def test_conkd_is_distillation_plus_alpha_contrast(variant: str) -> None:
    teacher, student = torch.randn(2, 9, 10, dtype=torch.float64)
    features, labels = F.normalize(torch.randn(9, 16, dtype=torch.float64), dim=1), torch.randint(0, 3, (9,))
    loss = ConKDLoss(0.3, 3.0, 0.1, variant=variant)

    def expected(student: Tensor, features: Tensor) -> Tensor:
        if variant == "notebook":
            contrastive = reference.supcon_loss(torch.stack([features, features], 1), labels, temperature=0.1)
        else:
            contrastive = SupContrastiveLoss(0.1)(features, labels)
        return reference.kd_loss(student, teacher, temperature=3.0, standardize=True) + 0.3 * contrastive

    ours = value_and_gradients(lambda s, x: loss(teacher, s, x, labels), [student, features])
    exact = value_and_gradients(expected, [student, features])
    assert all(error(a, b) < 1e-10 for a, b in zip(ours, exact))
    assert all(b.abs().max() > 1e-3 for b in exact)


def test_conkd_defaults_and_bad_input() -> None:
    loss = ConKDLoss()
    assert (loss.alpha, loss.temperature, loss.contrast_temperature, loss.variant) == (0.15, 2.0, 0.07, "readme")
    assert "alpha=0.15" in repr(loss)
    assert "temperature=0.07" in repr(SupConLoss())
    assert "0.07" in repr(SupContrastiveLoss())
    logits, features, labels = torch.randn(4, 10), torch.randn(4, 8), torch.zeros(4, dtype=torch.int64)
    with pytest.raises(ValueError, match="variant must be"):
        ConKDLoss(variant="paper")
    loss_classes: list[tuple[Any, dict[str, Any], str]] = [
        (SupConLoss, {"temperature": -1.0}, "temperature must be positive, got -1.0"),
        (SupConLoss, {"temperature": "x"}, "temperature must be a number, got 'x'"),
        (SupConLoss, {"contrast_mode": "al"}, "contrast_mode must be 'all' or 'one', got 'al'"),
        (SupContrastiveLoss, {"temperature": 0.0}, "temperature must be positive, got 0.0"),
        (ConKDLoss, {"temperature": 0.0}, "temperature must be positive, got 0.0"),
        (ConKDLoss, {"contrast_temperature": 0.0}, "temperature must be positive, got 0.0"),
    ]
    for loss_class, options, message in loss_classes:
        with pytest.raises((ValueError, TypeError), match=message):
            loss_class(**options)
    with pytest.raises(ValueError, match=r"features must be \[B, D\]"):
        loss(logits, logits, features[:, None], labels)
    with pytest.raises(ValueError, match="swapped"):
        loss(logits.clone().requires_grad_(), logits, features, labels)
