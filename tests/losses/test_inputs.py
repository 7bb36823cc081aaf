"""What all losses take alike: empty batches, ignored labels, labels of any integer dtype, NumPy numbers, dicts in the wrong place."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from kdfast import functional, losses, reference
from kdfast.recipes.recipe import separate_hidden
from tests.numeric import DEVICE

C, IGNORED = 5, -100
MAPS, LATE = (3, 4, 4), (6, 2, 2)


def linear_kd(hidden, labels, **options):
    weight = torch.linspace(-1, 1, 4 * C, device=DEVICE, dtype=hidden.dtype).view(C, 4)
    return functional.linear_kd_loss(hidden[:, :4], weight, hidden[:, 1:], weight, labels, **options)


def crd(x, _labels):
    bank = F.normalize(torch.linspace(-1, 2, 20 * x.shape[1], device=DEVICE).view(20, -1), dim=1)
    return functional.crd_loss(x, x.flip(1), bank, bank, torch.arange(len(x) * 4, device=DEVICE).view(-1, 4) % 20)


def crd_module(x, _labels):
    return losses.CRDLoss(C, C, 20, nce_k=3).to(DEVICE)(x, x.flip(1), torch.arange(len(x), device=DEVICE))


def self_distillation(x, labels):
    return losses.SelfDistillationLoss(0.5, 3, 6).to(DEVICE)(x.flatten(1)[:, :C], labels, x, F.avg_pool2d(x, 2).repeat(1, 2, 1, 1))


def tofd(x, _labels):
    return torch.stack(list(losses.TOFDLoss([C], [C]).to(DEVICE)([x], [x.flip(1)], [x], [x.flip(1)]).values()))[:2]


# a loss of one tensor and labels, and the shape of the tensor's rows; these ignore labels of -100
LABELLED = [
    pytest.param(lambda x, y: functional.kd_loss(x, x.flip(1), y, ce_weight=0.5), (C,), id="kd_loss"),
    pytest.param(
        lambda x, y: functional.kd_loss(x, [x, x.flip(1)], y, standardize=True, divergence="js"), (C,), id="kd_loss, standardized"
    ),
    pytest.param(lambda x, y: functional.kd_loss(x, x.flip(1), y, ce_weight=1.0, reduction="none").sum(), (C,), id="kd_loss, rows"),
    pytest.param(lambda x, y: linear_kd(x, y, ce_weight=0.5), (C,), id="linear_kd_loss"),
    pytest.param(lambda x, y: linear_kd(x, y, reduction="sum", chunk_rows=2), (C,), id="linear_kd_loss, chunks"),
    pytest.param(functional.supcon_loss, (C,), id="supcon_loss"),
    pytest.param(
        lambda x, y: functional.supcon_loss(x, y, self_positive=True, duplicates=2, normalize=True), (C,), id="supcon_loss, itself"
    ),
    pytest.param(lambda x, y: functional.supcon_loss(x, y, contrast_mode="one"), (2, C), id="supcon_loss, one"),
    pytest.param(lambda x, y: functional.supcon_loss(x, y, reduction="none").sum(), (2, C), id="supcon_loss, rows"),
    pytest.param(lambda x, y: losses.KDLoss()(x, x.flip(1), y), (C,), id="KDLoss"),
    pytest.param(lambda x, y: losses.ConKDLoss()(x.flip(1), x, x, y), (C,), id="ConKDLoss"),
    pytest.param(lambda x, y: losses.ConKDLoss(variant="notebook")(x.flip(1), x, x, y), (C,), id="ConKDLoss, notebook"),
    pytest.param(lambda x, y: losses.SupConLoss()(x, y), (2, C), id="SupConLoss"),
    pytest.param(lambda x, y: losses.SupContrastiveLoss()(x, y), (C,), id="SupContrastiveLoss"),
    pytest.param(self_distillation, MAPS, id="SelfDistillationLoss"),
]
UNLABELLED = [
    pytest.param(lambda x, _: functional.attention_transfer_loss(x, F.avg_pool2d(x, 2)), MAPS, id="attention_transfer_loss"),
    pytest.param(lambda x, _: functional.attention_transfer_loss(x, x.square(), p=1), MAPS, id="attention_transfer_loss, p=1"),
    pytest.param(lambda x, _: functional.hint_loss(x, x.flip(1)), MAPS, id="hint_loss"),
    pytest.param(lambda x, _: functional.soft_cross_entropy(x, x.flip(1), 2.0), (C,), id="soft_cross_entropy"),
    pytest.param(crd, (C,), id="crd_loss"),
    pytest.param(crd_module, (C,), id="CRDLoss"),
    pytest.param(lambda x, _: losses.LogitStandardizationLoss()(x.flip(1), x), (C,), id="LogitStandardizationLoss"),
    pytest.param(lambda x, _: losses.AttentionTransferLoss()([x, x], [x.square(), x]), MAPS, id="AttentionTransferLoss"),
    pytest.param(lambda x, _: losses.HintLoss(MAPS, LATE).to(DEVICE)(x, F.avg_pool2d(x, 2).repeat(1, 2, 1, 1)), MAPS, id="HintLoss"),
    pytest.param(tofd, (C,), id="TOFDLoss"),
]


def test_every_public_loss_is_in_a_table():
    tested = {row.id.split(",")[0] for row in LABELLED + UNLABELLED}
    assert tested == {*functional.__all__, *losses.__all__}


def evaluate(loss, x, labels):
    torch.manual_seed(0)  # for modules with parameters
    x = x.clone().requires_grad_()
    value = loss(x, labels)
    value.sum().backward()
    return value.detach(), x.grad


def make(n, *shape):
    x = torch.randn(n, *shape, device=DEVICE)
    return x, torch.arange(n, device=DEVICE) % 2


@pytest.mark.parametrize(("loss", "shape"), LABELLED + UNLABELLED)
def test_an_empty_batch_is_0_with_a_gradient(loss, shape):
    value, gradient = evaluate(loss, *make(0, *shape))
    assert not value.any()
    assert gradient is not None


@pytest.mark.parametrize(("loss", "shape"), LABELLED)
def test_a_batch_of_ignored_labels_is_0_with_gradient_0(loss, shape):
    x, labels = make(4, *shape)
    assert evaluate(loss, x, labels)[1].any()
    for dtype in (torch.int64, torch.int8):
        value, gradient = evaluate(loss, x, torch.full_like(labels, IGNORED).to(dtype))
        assert not value.any()
        assert not gradient.any()


@pytest.mark.parametrize(("loss", "shape"), LABELLED)
def test_ignored_rows_count_for_nothing(loss, shape, request):
    x, labels = make(6, *shape)
    labels[4:] = IGNORED
    value, gradient = evaluate(loss, x, labels)
    if "sup" in request.node.callspec.id.lower() or "ConKD" in request.node.callspec.id:
        return  # they remain contrasts: see below
    alone, of_alone = evaluate(loss, x[:4], labels[:4])
    torch.testing.assert_close(value, alone)
    torch.testing.assert_close(gradient[:4], of_alone)
    assert not gradient[4:].any()


@pytest.mark.parametrize("options", [{}, {"self_positive": True}, {"contrast_mode": "one"}, {"reduction": "none"}, {"reduction": "sum"}])
def test_ignored_rows_are_no_anchors_and_no_positives_but_contrasts(options):
    x, labels = make(6, 2, C)
    labels[4:] = IGNORED
    names = torch.tensor([0, 1, 0, 1, 2, 3], device=DEVICE)  # no positives but their own views
    rows = functional.supcon_loss(x, names, **options | {"reduction": "none"})
    want = {"none": torch.cat([rows[:4], 0 * rows[4:]]), "sum": rows[:4].sum()}.get(options.get("reduction"), rows[:4].mean())
    torch.testing.assert_close(functional.supcon_loss(x, labels, **options), want)
    torch.testing.assert_close(reference.supcon_loss(x, labels, **options), want)


def test_hidden_labels_of_recipes_are_no_ignored_ones():
    index = torch.arange(300)
    names = separate_hidden(torch.where(index % 2 == 0, IGNORED, index), index)
    assert len(names.unique()) == 300
    assert IGNORED not in names


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.uint16])
@pytest.mark.parametrize(("loss", "shape"), LABELLED)
def test_labels_of_every_integer_dtype_are_taken(loss, shape, dtype):
    x, labels = make(4, *shape)
    for ours, want in zip(evaluate(loss, x, labels.to(dtype)), evaluate(loss, x, labels)):
        assert torch.equal(ours, want)


def test_large_unsigned_labels_are_not_taken_for_ignored_ones():
    x, _ = make(4, 300)
    labels = torch.tensor([156, 156, 3, 3], dtype=torch.uint8, device=DEVICE)  # 156 is -100 in 8 bits
    assert torch.equal(functional.supcon_loss(x, labels), functional.supcon_loss(x, labels.long()))
    assert torch.equal(functional.kd_loss(x, -x, labels, ce_weight=1.0), functional.kd_loss(x, -x, labels.long(), ce_weight=1.0))
    assert torch.equal(functional.kd_loss(x, -x, labels, ignore_index=156), functional.kd_loss(x[2:], -x[2:]))


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
@pytest.mark.parametrize("loss", [functional.kd_loss, lambda x, t, y: linear_kd(x, y)], ids=["kd_loss", "linear_kd_loss"])
def test_labels_that_are_no_integers_are_named(loss, dtype):
    x, labels = make(4, C)
    with pytest.raises(TypeError, match=f"labels must be integers, got {dtype}"):
        loss(x, x, labels.to(dtype))


# ---- NumPy, and dicts ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [np.array([1.0, 0.5]), np.array([2, 1], dtype=np.int32) / 2, torch.tensor([1.0, 0.5])])
def test_arrays_are_taken_as_weights(weights):
    x, labels = make(4, C)
    want = functional.kd_loss(x, [x.flip(1), -x], labels, temperature=2.0, teacher_weights=[1.0, 0.5])
    ours = functional.kd_loss(x, [x.flip(1), -x], labels, temperature=np.array(2.0), teacher_weights=weights)
    assert torch.equal(ours, want)
    assert torch.equal(losses.KDLoss(np.float32(2.0), kd_weight=1, ce_weight=0, teacher_weights=weights)(x, [x.flip(1), -x]), want)
    assert torch.equal(functional.soft_cross_entropy(x, -x, np.array(2)), functional.soft_cross_entropy(x, -x, 2))


ROWS, ITEM, LABELS = torch.zeros(2, C), torch.zeros(2, *MAPS), torch.tensor([0, 1])
AS_A_DICT = [
    pytest.param(lambda: functional.attention_transfer_loss({"a": ITEM}, [ITEM]), "student_maps", id="attention_transfer_loss, student"),
    pytest.param(lambda: functional.attention_transfer_loss([ITEM], {"a": ITEM}), "teacher_maps", id="attention_transfer_loss, teacher"),
    pytest.param(lambda: functional.attention_transfer_loss([ITEM], [{}]), r"teacher_maps\[0\]", id="attention_transfer_loss, a stage"),
    pytest.param(lambda: losses.AttentionTransferLoss()({"a": ITEM}, [ITEM]), "student_maps", id="AttentionTransferLoss, student"),
    pytest.param(lambda: losses.AttentionTransferLoss()([ITEM], {"a": ITEM}), "teacher_maps", id="AttentionTransferLoss, teacher"),
    pytest.param(lambda: functional.hint_loss({"a": ITEM}, ITEM), "student", id="hint_loss, student"),
    pytest.param(lambda: functional.hint_loss(ITEM, {"a": ITEM}), "teacher", id="hint_loss, teacher"),
    pytest.param(lambda: losses.HintLoss(MAPS, MAPS)(ITEM, {"a": ITEM}), "teacher", id="HintLoss"),
    pytest.param(lambda: functional.soft_cross_entropy(ROWS, {"a": ROWS}), "teacher", id="soft_cross_entropy"),
    pytest.param(lambda: functional.kd_loss(ROWS, {"a": ROWS}), "teacher", id="kd_loss"),
    pytest.param(lambda: losses.KDLoss()(ROWS, {"a": ROWS}, LABELS), "teacher", id="KDLoss"),
    pytest.param(lambda: functional.linear_kd_loss(ROWS, ROWS, {"a": ROWS}, ROWS), "teacher_hidden", id="linear_kd_loss"),
    pytest.param(lambda: functional.supcon_loss({"a": ROWS}), "features", id="supcon_loss"),
    pytest.param(lambda: losses.SupContrastiveLoss()({"a": ROWS}, LABELS), "features", id="SupContrastiveLoss"),
    pytest.param(lambda: losses.SupConLoss()({"a": ROWS}, LABELS), "features", id="SupConLoss"),
    pytest.param(lambda: losses.ConKDLoss()(ROWS, ROWS, {"a": ROWS}, LABELS), "features", id="ConKDLoss, features"),
    pytest.param(lambda: losses.ConKDLoss()(ROWS, ROWS, ROWS, {"a": LABELS}), "labels", id="ConKDLoss, labels"),
    pytest.param(lambda: losses.LogitStandardizationLoss()({"a": ROWS}, ROWS), "teacher", id="LogitStandardizationLoss"),
    pytest.param(
        lambda: losses.SelfDistillationLoss(0.5, 3, 3)({}, LABELS, ITEM, ITEM), "student_logits", id="SelfDistillationLoss, logits"
    ),
    pytest.param(lambda: losses.SelfDistillationLoss(0.5, 3, 3)(ROWS, LABELS, {}, ITEM), "student_intermediate", id="SelfDistillationLoss"),
    pytest.param(lambda: functional.crd_loss({"a": ROWS}, ROWS, ROWS, ROWS, LABELS), "student", id="crd_loss"),
    pytest.param(lambda: losses.CRDLoss(C, C, 9)(ROWS, {"a": ROWS}, LABELS), "teacher", id="CRDLoss"),
    pytest.param(lambda: losses.TOFDLoss([C], [C])({"a": ROWS}, [ROWS], [ROWS], [ROWS]), "student_features", id="TOFDLoss, student"),
    pytest.param(lambda: losses.TOFDLoss([C], [C])([ROWS], [ROWS], [ROWS], {"a": ROWS}), "teacher_logits", id="TOFDLoss, teacher"),
]


@pytest.mark.parametrize(("call", "argument"), AS_A_DICT)
def test_a_dict_where_tensors_belong_is_named(call, argument):
    with pytest.raises(TypeError, match=f"{argument} must be a tensor.*, got dict"):
        call()


def test_maps_may_come_from_a_generator():
    x = torch.rand(2, *MAPS)
    want = functional.attention_transfer_loss([x, x], [-x.square(), x.exp()])
    assert torch.equal(losses.AttentionTransferLoss()((y for y in (x, x)), iter([-x.square(), x.exp()])), want)


def test_a_crd_batch_of_no_images_settles_no_constant():
    crd = losses.CRDLoss(C, C, 20, nce_k=3)
    assert crd(torch.zeros(0, C), torch.zeros(0, C), torch.zeros(0, dtype=torch.int64)) == 0
    assert crd.Z_v1 == crd.Z_v2 == -1


# ---- default dtypes, and a second backward pass ----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_constants_are_float32_at_least_under_any_default_dtype(dtype):
    torch.set_default_dtype(dtype)
    try:
        crd = losses.CRDLoss(C, C, 20, nce_k=3)
        loss = crd(torch.rand(4, C), torch.rand(4, C), torch.arange(4))
    finally:
        torch.set_default_dtype(torch.float32)
    assert {crd.memory_v1.dtype, crd.memory_v2.dtype} == {dtype}
    assert {crd.Z_v1.dtype, crd.Z_v2.dtype, loss.dtype} == {torch.promote_types(dtype, torch.float32)}
    assert loss.isfinite()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("loss", "shape"), [row for row in LABELLED if row.values[1] == (C,)])
def test_a_second_backward_pass_gives_the_same_bits(loss, shape, dtype):
    x, labels = (
        (make(6, *shape)[0] * 3).to(dtype).requires_grad_(),
        make(6, *shape)[1].index_fill(0, torch.tensor([5], device=DEVICE), IGNORED),
    )
    value = loss(x, labels)
    upstream = torch.full_like(value, 0.37)
    first, second = (torch.autograd.grad(value, x, upstream, retain_graph=True)[0] for _ in range(2))
    assert first.any()
    assert torch.equal(first, second)
