"""Losses take tensors that were made in torch.inference_mode(), wherever no gradient is asked for: teachers, labels, masks, banks."""

import pytest
import torch

from kdfast import functional, losses
from tests.numeric import DEVICE

B, C, D = 6, 10, 8


def make(*shape):
    return torch.randn(*shape, generator=torch.Generator(DEVICE).manual_seed(1), device=DEVICE)


with torch.inference_mode():
    LOGITS, MAPS, ROWS, HIDDEN, WEIGHT = make(B, C), make(B, 4, 5, 5), make(B, D), make(B, 5), make(C, 5)
    LABELS, MASK, BANK = torch.arange(B, device=DEVICE) % 3, make(B, B).abs(), torch.nn.functional.normalize(make(50, D), dim=1)
    INDICES, Z, DEEP = torch.arange(B * 9, device=DEVICE).view(B, 9) % 50, torch.full((), 60.0, device=DEVICE), make(B, 16, 3, 3)
OWN = make(C, D)
DISTILLATION = {"temperature": 2.0, "ce_weight": 0.5}
KD, LSKD, AT = losses.KDLoss(2.0, ce_weight=0.5), losses.LogitStandardizationLoss(), losses.AttentionTransferLoss()
HINT = losses.HintLoss((4, 5, 5), (16, 3, 3)).to(DEVICE)
SELF = losses.SelfDistillationLoss(0.5, 4, 16).to(DEVICE)


def linear_kd(x):
    return functional.linear_kd_loss(x, OWN, HIDDEN, WEIGHT, LABELS, ce_weight=0.5)


def contrast_with_a_queue(x):
    return functional.supcon_loss(x, LABELS, contrast=ROWS, contrast_labels=LABELS)


FUNCTIONS = [
    pytest.param(lambda x: functional.kd_loss(x, LOGITS, temperature=2.0), (B, C), id="kd_loss"),
    pytest.param(lambda x: functional.kd_loss(x, [LOGITS, LOGITS], LABELS, standardize=True, **DISTILLATION), (B, C), id="kd_loss, labels"),
    pytest.param(lambda x: functional.kd_loss(x, LOGITS, LABELS, kd_weight=0.0, ce_weight=1.0), (B, C), id="kd_loss, labels alone"),
    pytest.param(linear_kd, (B, D), id="linear_kd_loss"),
    pytest.param(lambda x: functional.supcon_loss(x, LABELS), (B, D), id="supcon_loss, labels"),
    pytest.param(lambda x: functional.supcon_loss(x, mask=MASK), (B, D), id="supcon_loss, mask"),
    pytest.param(contrast_with_a_queue, (B, D), id="supcon_loss, queue"),
    pytest.param(lambda x: functional.crd_loss(x, ROWS, BANK, BANK, INDICES, Z, Z), (B, D), id="crd_loss"),
    pytest.param(lambda x: functional.attention_transfer_loss(x, MAPS), (B, 4, 5, 5), id="attention_transfer_loss"),
    pytest.param(lambda x: functional.hint_loss(x, MAPS), (B, 4, 5, 5), id="hint_loss"),
    pytest.param(lambda x: functional.soft_cross_entropy(x, LOGITS), (B, C), id="soft_cross_entropy"),
]
MODULES = [
    pytest.param(lambda x: KD(x, LOGITS, LABELS), (B, C), id="KDLoss"),
    pytest.param(lambda x: LSKD(LOGITS, x), (B, C), id="LogitStandardizationLoss"),
    pytest.param(lambda x: AT([x], [MAPS]), (B, 4, 5, 5), id="AttentionTransferLoss"),
    pytest.param(lambda x: HINT(x, DEEP), (B, 4, 5, 5), id="HintLoss"),
    pytest.param(lambda x: SELF(x.flatten(1)[:, :C], LABELS, x, DEEP), (B, 4, 5, 5), id="SelfDistillationLoss"),
]


def check(loss, shape):
    """Twice the same gradient, which is not 0."""
    x = (2 * make(*shape) + 1).flip(-1).requires_grad_()
    value = loss(x)
    value.sum().backward(retain_graph=True)
    once = x.grad.clone()
    value.sum().backward()
    assert once.any()
    assert torch.allclose(x.grad, 2 * once)


@pytest.mark.parametrize(("loss", "shape"), FUNCTIONS + MODULES)
def test_tensors_of_inference_mode_are_taken(loss, shape):
    check(loss, shape)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # of Dynamo's own, for inputs of inference mode
@pytest.mark.parametrize(
    ("loss", "shape"),
    [
        *(FUNCTIONS[i] for i in (1, 3, 5, 9)),
        pytest.param(lambda x: functional.kd_loss(x, LOGITS, LABELS, reduction="none", **DISTILLATION), (B, C), id="kd_loss, rows"),
    ],
)
def test_compiled_losses_take_tensors_of_inference_mode(loss, shape):
    check(torch.compile(loss, backend="aot_eager", fullgraph=True), shape)


def test_compiled_losses_that_save_their_inputs_say_that_they_need_a_clone():
    """With reduction "none" linear_kd_loss computes again in backward; copies of its weights would take the memory that it saves."""
    loss = torch.compile(lambda x, h: functional.linear_kd_loss(x, OWN, h, OWN, reduction="none"), backend="aot_eager", fullgraph=True)
    with pytest.raises(RuntimeError, match="make a clone"):
        loss(make(B, D).requires_grad_(), ROWS)
    check(lambda x: loss(x, ROWS.clone()), (B, D))
