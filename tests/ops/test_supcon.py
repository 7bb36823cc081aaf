"""supcon_loss against the originals and against its reference in float64: the contracts of every operator."""

import itertools
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from kdfast import reference
from kdfast.benchmarks.timing import peak_memory
from kdfast.functional import supcon_loss
from kdfast.ops.supcon import eager
from tests.numeric import FLOAT32_ERROR, INTERPRETED, KERNELS, error, value_and_gradients
from tests.ops.contracts import compare, make_fuzz, unit

pytestmark = pytest.mark.kernels

# [B, D], [B, V, D] and more; beyond TILE = 512 rows the tiled form runs, up to there the matrix form
SHAPES = [(3, 7), (257, 8), (65, 512), (20, 2, 10), (9, 3, 4, 5), (513, 10), (257, 2, 128), (600, 128), (40, 2048)]
MANY, QUEUED = 600, 520
if INTERPRETED:  # which takes its time for every tile; its tiles have 64 rows
    SHAPES = [(3, 7), (65, 8), (33, 300), (20, 2, 10), (9, 3, 4, 5), (67, 2, 128)]
    MANY, QUEUED = 140, 70
torch_form = pytest.mark.skipif(KERNELS, reason="tests the PyTorch form, and the kernel runs here")
VARIANTS: dict[str, dict[str, Any]] = {
    "supcon": {"base_temperature": 0.1},
    "simclr": {"labels": False},
    "one": {"contrast_mode": "one"},
    "readme": {"self_positive": True, "normalize": True},
    "notebook": {"duplicates": 2},
    "triple": {"duplicates": 3, "reduction": "sum", "self_positive": True},
    "mask": {"mask": True, "reduction": "none"},
    "mask, one": {"mask": True, "contrast_mode": "one"},
    "queue": {"contrast": 31, "normalize": True},
    "labelled queue": {"contrast": QUEUED, "contrast_labels": True, "reduction": "none"},
    "mask, queue": {"mask": True, "contrast": 5, "contrast_mode": "one", "reduction": "sum"},
}


def problem(shape: tuple[int, ...], variant: dict[str, Any], dtype: torch.dtype, **more: Any) -> tuple[Callable, list[Tensor]]:
    """call(function, *inputs) for one variant, and its inputs: features and maybe a queue."""
    options = dict(variant) | more
    if len(shape) > 2:
        options.pop("duplicates", None)
    B, D = shape[0], math.prod(shape[2:]) if len(shape) > 2 else shape[1]
    inputs = [unit(*shape, dtype=dtype) if len(shape) < 4 else torch.randn(shape).div(3).to(dtype)]
    labels = torch.randint(0, 5, (B,)) if options.pop("labels", True) and "mask" not in options else None
    if options.pop("mask", False):
        options["mask"] = torch.rand(B, B) * (torch.rand(B, B) < 0.3)
    queued = options.pop("contrast", 0)
    if queued:
        inputs.append(unit(queued, D, dtype=dtype))
    if options.pop("contrast_labels", False):
        options["contrast_labels"] = torch.randint(0, 6, (queued,))

    def call(function: Callable, features: Tensor, contrast: Tensor | None = None) -> Tensor:
        return function(features, labels, contrast=contrast, **options)

    return call, inputs


def check(call: Callable, inputs: list[Tensor], **options: Any) -> None:
    shape = call(supcon_loss, *inputs).shape
    upstream = torch.randn(shape) if shape else None
    # floor: a loss near 0 is log(1 + x), and 1 + x rounds
    compare(partial(call, supcon_loss), partial(call, reference.supcon_loss), inputs, upstream, **{"floor": 2**-21} | options)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_value_and_gradient_match_float64(shape: tuple[int, ...], variant: str) -> None:
    check(*problem(shape, VARIANTS[variant], torch.float32))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(33, 2, 16), (MANY - 80, 16)], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_other_dtypes_match_float64(shape: tuple[int, ...], variant: str, dtype: torch.dtype) -> None:
    call, inputs = problem(shape, VARIANTS[variant], dtype, temperature=0.2)
    check(call, inputs)
    value, *gradients = value_and_gradients(lambda *x: call(supcon_loss, *x), inputs)
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert all(gradient.dtype == dtype for gradient in gradients)


def test_values_are_the_originals(oracles: Any) -> None:
    cases = {name.split("/")[0] for name in oracles.files if name.startswith(("supcon_", "simclr_", "supcontrastive_seed_"))}
    assert len(cases) == 10
    for case, dtype in itertools.product(sorted(cases), (torch.float64, torch.float32)):
        stored = {name.split("/")[1]: oracles[name] for name in oracles.files if name.startswith(case + "/")}
        seed = case.startswith("supcontrastive_seed_")
        features = torch.tensor(stored["features"]).to(dtype).requires_grad_()
        loss = supcon_loss(
            features,
            torch.tensor(stored["labels"]) if "labels" in stored else None,
            temperature=stored["temperature"].item(),
            base_temperature=None if seed else stored["base_temperature"].item() if "base_temperature" in stored else 0.07,
            contrast_mode=str(stored.get("contrast_mode", "all")),
            self_positive=seed,
            normalize=seed,
        )
        loss.backward()
        assert features.grad is not None
        allowed = 1e-12 if dtype == torch.float64 else FLOAT32_ERROR
        assert error(loss, torch.tensor(stored["loss"])) < allowed, case
        assert error(features.grad, torch.tensor(stored["grad"])) < allowed, case


def check_random_case(data: st.DataObject) -> None:
    draw = data.draw
    torch.manual_seed(draw(st.integers(0, 10**6)))
    B, V, D, queue = draw(st.integers(1, 40)), draw(st.integers(0, 4)), draw(st.integers(1, 40)), draw(st.integers(0, 30))
    dtype = draw(st.sampled_from([torch.float32, torch.float32, torch.bfloat16, torch.float16] if KERNELS else [torch.float64]))
    temperature, positives = draw(st.floats(0.01 if KERNELS else 0.004, 5)), draw(st.sampled_from(["labels", "mask", "simclr"]))
    options = {
        "temperature": temperature,
        "contrast_mode": draw(st.sampled_from(["all", "one"])),
        "reduction": draw(st.sampled_from(["mean", "sum", "none"])),
        "duplicates": 1 if V else draw(st.integers(1, 3)),
        "self_positive": draw(st.booleans()),
        "normalize": draw(st.booleans()),
    }
    classes = draw(st.integers(1, 12))
    if positives == "labels":
        options["labels"] = torch.randint(0, classes, (B,))
    elif positives == "mask":
        options["mask"] = torch.randint(0, 3, (B, B))
    inputs = [torch.randn((B, V, D) if V else (B, D)).to(dtype)]
    if queue:
        inputs.append(torch.randn(queue, D).to(dtype))
        if positives == "labels" and draw(st.booleans()):
            options["contrast_labels"] = torch.randint(0, classes, (queue,))

    def call(function: Callable, features: Tensor, contrast: Tensor | None = None) -> Tensor:
        return function(features, contrast=contrast, **options)

    # terms of this size cancel; eager PyTorch in float32 also for 16-bit rows, whose products are exact there
    size = 1.0 if options["normalize"] else max(x.double().square().sum(-1).max().item() for x in inputs)
    floor = (1e-11 if dtype == torch.float64 else 2.5e-7) * size / temperature
    floors = {"floor": floor, "gradient_floor": floor * size**0.5 / temperature + 2**-24 * (dtype == torch.float16)}
    rounding = {torch.bfloat16: 2**-7, torch.float16: 2**-10}.get(dtype, 0.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(eager, "TILE", draw(st.sampled_from([512, 8, 13])))
        if KERNELS:
            patch.setattr("kdfast.kernels.supcon.MANY", draw(st.sampled_from([1, 4096])))
        check(call, inputs, slack=3.0, allowance=rounding, eager_dtype=None if dtype == torch.float64 else torch.float32, **floors)


test_random_cases = make_fuzz(check_random_case, 300, 50)
test_many_random_cases = pytest.mark.slow(make_fuzz(check_random_case, 1600, 400))


@pytest.mark.parametrize("B", [30, MANY])
@pytest.mark.parametrize("length", [1.0, 30.0])
def test_small_temperatures_and_long_rows_do_not_underflow(B: int, length: float) -> None:
    features, labels = length * unit(B, 32), torch.arange(B) // 3
    S = features @ features.T / 0.005
    original = (S - S.amax(1, keepdim=True)).exp().masked_fill(torch.eye(B, dtype=torch.bool), 0).sum(1).log()
    assert not original.isfinite().all(), "the maximum over the diagonal was meant to underflow here"
    check(lambda f, x: f(x, labels, temperature=0.005), [features])
    value, gradient = value_and_gradients(lambda x: supcon_loss(x, labels, temperature=0.005), [features])
    assert value.isfinite()
    assert gradient.isfinite().all()
    assert gradient.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("B", [40, MANY])
def test_huge_and_tiny_rows_normalize(B: int, dtype: torch.dtype) -> None:
    """Squares of the rows, products of two of them and the length itself leave the range of the arithmetic; contrast rows too."""
    features, contrast, labels = torch.randn(B, 16).clamp(-4, 4), torch.randn(9, 16).clamp(-4, 4), torch.arange(B) % 4
    sizes = torch.tensor([1e-25, 0.0, 1e-11, 1.0, 1e12, 1e16, 1e20, 1e30, 3e36, 8e37])
    features[: 2 * len(sizes)] *= sizes.repeat(2)[:, None]
    contrast *= sizes[1:, None]
    features, contrast = features.to(dtype), contrast.to(dtype)
    if dtype == torch.float64:
        features[4:10], contrast[3:] = 1e269 * features[4:10], 1e269 * contrast[3:]
    tops = [x.double().abs().amax(1, keepdim=True) for x in (features, contrast)]
    exact = [x.double() / torch.where(top > 1e-12, top, 1) for x, top in zip((features, contrast), tops)]

    def call(features: Tensor, contrast: Tensor) -> Tensor:
        return supcon_loss(features, labels, contrast=contrast, normalize=True)

    want = value_and_gradients(lambda f, g: reference.supcon_loss(f, labels, contrast=g, normalize=True), exact)
    got = value_and_gradients(call, [features, contrast])
    assert error(got[0], want[0]) < FLOAT32_ERROR
    for top, gradient, exact_gradient in zip(tops, got[1:], want[1:]):
        moved = ((top > 1e-12) & (top < 1e35)).squeeze(1)  # of a longer row the gradient is no normal number
        assert error((gradient * top)[moved], exact_gradient[moved]) < (1e-2 if dtype == torch.bfloat16 else FLOAT32_ERROR)
        assert gradient.isfinite().all()


@pytest.mark.parametrize("B", [40, MANY])
def test_an_anchor_alone_in_its_class_adds_nothing_and_counts_in_the_mean(B: int) -> None:
    features = unit(B, 16, dtype=torch.float64)
    labels = torch.randint(0, 4, (B,))
    labels[7] = 99
    each = supcon_loss(features, labels, reduction="none")[:, 0]
    assert (each > 0).tolist() == [i != 7 for i in range(B)]
    assert torch.allclose(supcon_loss(features, labels), each.sum() / B)
    check(lambda f, x: f(x, labels), [features])


@pytest.mark.parametrize("B", [40, MANY])
def test_a_long_row_among_short_ones_keeps_its_small_positives(B: int) -> None:
    """The long row's product with itself would drown its positives' in float32: it must never enter the sum."""
    features = unit(B, 16)
    features[0] *= 1e4
    check(lambda f, x: f(x, torch.arange(B) // 4, reduction="none", temperature=1.0), [features])


def test_one_row_and_no_row_give_zero() -> None:
    for shape in ((1, 5), (1, 1, 5), (0, 5), (0, 2, 5)):
        for self_positive in (False, True):
            value, gradient = value_and_gradients(
                lambda x, p=self_positive: supcon_loss(x, torch.zeros(len(x)), self_positive=p), [torch.randn(shape)]
            )
            assert value == 0
            assert not gradient.any()
    check(lambda f, x: f(x), [torch.randn(1, 2, 5)])
    check(lambda f, x, q: f(x, contrast=q, self_positive=True), [torch.randn(1, 5), torch.randn(3, 5)])


def test_masks_as_the_original_takes_them() -> None:
    features = unit(12, 2, 8, dtype=torch.float64)
    labels = torch.randint(0, 3, (12,))
    same = labels[:, None] == labels
    expected = supcon_loss(features, labels)
    for mask in (same, same.int(), same.float(), same.to(torch.bfloat16), same.to_sparse().to_dense()):
        assert torch.allclose(supcon_loss(features, mask=mask), expected)
    soft = torch.rand(12, 12) - 0.2  # asymmetric, negative weights, rows that sum to less than 1e-6
    soft[3] = -1
    for tile in (512, 5):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(eager, "TILE", tile)
            check(lambda f, x: f(x, mask=soft, reduction="none"), [features])


@pytest.mark.parametrize(
    "labels", [torch.tensor([0.5, -1, 0.5, 7]), torch.tensor([True, False, True, True]), torch.tensor([[3], [1], [3], [1]])]
)
def test_labels_of_any_dtype_and_shape(labels: Tensor) -> None:
    check(lambda f, x: f(x, labels), [unit(4, 2, 6)])


@pytest.mark.parametrize("B", [40, MANY])
def test_rows_may_be_strided_and_are_not_written(B: int) -> None:
    wide = torch.randn(B, 50)
    labels = torch.randint(0, 4, (B,))
    for features in (wide[:, 3:35], torch.randn(32, B).t(), wide[::2, ::3]):
        names, before = labels[: len(features)], features.clone()
        check(lambda f, x, names=names: f(x, names, temperature=4.0), [features])
        assert torch.equal(features, before)
    views = torch.randn(2, B, 32).transpose(0, 1)
    check(lambda f, x: f(x, labels, temperature=4.0), [views])


@pytest.mark.parametrize("B", [9, MANY])
def test_masks_of_any_strides(B: int) -> None:
    features = unit(B, 2, 16)
    weights = torch.rand(B, 2 * B)
    for mask in (torch.ones(1, 1).expand(B, B), (weights < 0.3)[:, ::2], torch._neg_view(-weights)[:, :B].t()):
        copied = mask.resolve_neg().contiguous()
        assert torch.equal(supcon_loss(features, mask=mask), supcon_loss(features, mask=copied))


@pytest.mark.parametrize("B", [4, MANY])
def test_labels_may_be_overwritten_before_backward(B: int) -> None:
    features, labels = unit(B, 6).requires_grad_(), torch.arange(B) % 2
    (want,) = torch.autograd.grad(supcon_loss(features, labels), features)
    loss = supcon_loss(features, labels)
    labels.zero_()
    assert torch.equal(torch.autograd.grad(loss, features)[0], want)


@torch_form
@pytest.mark.parametrize("N", [8192, pytest.param(32768, marks=pytest.mark.slow)])
def test_memory_is_linear_in_rows(N: int) -> None:
    """Forward and backward need less memory than 16 copies of the features; one N x N matrix is at least 64."""
    features, labels = unit(N // 2, 2, 128).requires_grad_(), torch.randint(0, 10, (N // 2,))
    supcon_loss(features[:400], labels[:400]).backward()  # loads what is loaded lazily
    assert peak_memory(lambda: supcon_loss(features, labels).backward()) < 16 * features.nbytes
    assert features.grad is not None
    assert features.grad.isfinite().all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"features": torch.ones(3)}, r"features must be \[B, V, D\] or \[B, D\]"),
        ({"features": torch.ones(3, 2, dtype=torch.int64)}, "features must be floating, got torch.int64"),
        ({"labels": torch.zeros(5)}, "labels must hold one label for each of the 4 samples"),
        ({"labels": torch.zeros(4), "mask": torch.ones(4, 4)}, "labels or mask, got both"),
        ({"mask": torch.ones(4, 5)}, r"mask must be \[4, 4\], got shape \(4, 5\)"),
        ({"mask": torch.ones(4, 4, requires_grad=True)}, "mask must be .* not require grad"),
        ({"temperature": 0.0}, "temperature must be positive, got 0.0"),
        ({"temperature": torch.ones((), requires_grad=True)}, "temperature must be a number.*requires grad"),
        ({"features": [1.0]}, "features must be a tensor, got list"),
        ({"features": torch.ones(4, 0, 6)}, r"features must be \[B, V, D\].*got shape \(4, 0, 6\)"),
        ({"contrast_mode": "both"}, "contrast_mode must be 'all' or 'one', got 'both'"),
        ({"reduction": "max"}, "reduction must be"),
        ({"duplicates": 0}, "duplicates must be a positive integer"),
        ({"duplicates": 2, "features": torch.ones(4, 2, 3)}, r"needs features \[B, D\]"),
        ({"contrast": torch.ones(3, 7)}, r"contrast must be \[M, 6\]"),
        ({"contrast_labels": torch.zeros(3), "labels": torch.zeros(4)}, "contrast_labels need labels and contrast"),
        ({"contrast": torch.ones(3, 6), "contrast_labels": torch.zeros(2), "labels": torch.zeros(4)}, "contrast_labels must hold"),
    ],
)
def test_bad_input_is_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        supcon_loss(**{"features": torch.ones(4, 6), **arguments})
