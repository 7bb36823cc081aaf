"""What only the Triton kernels of supcon_loss have to show; test_supcon.py holds the rest, in the interpreter and on a GPU too."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import kdfast
from kdfast import reference
from kdfast.functional import supcon_loss
from kdfast.ops.supcon import eager
from kdfast.ops.supcon import op as operator
from tests.numeric import FLOAT32_ERROR, KERNELS, error, value_and_gradients
from tests.ops.contracts import place_far_apart, unit
from tests.ops.test_supcon import check

pytestmark = [pytest.mark.kernels, pytest.mark.skipif(not KERNELS, reason="the kernels need a GPU or TRITON_INTERPRET=1")]
if KERNELS:
    from kdfast.kernels import supcon as kernel


@pytest.fixture
def large_tiles(monkeypatch):
    """Plans, and the bound read from the device, that are otherwise for thousands of rows."""
    monkeypatch.setattr(kernel, "MANY", 1)


@pytest.mark.parametrize("D", [8, 10, 64, 100, 128, 256, 300])
@pytest.mark.parametrize("masked", [False, True])
def test_every_width_matches_float64(D, masked):
    labels, mask = torch.randint(0, 4, (75,)), torch.rand(75, 75)
    check(lambda f, x: f(x, mask=mask) if masked else f(x, labels), [unit(75, D)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("temperature", [0.2, 0.01])
@pytest.mark.parametrize("N", [129, 200])
def test_large_tiles_match_float64(N, temperature, dtype, large_tiles):
    """A temperature at which the bound is taken, and one at which the maximum is kept up; the last tile is not full."""
    labels = torch.randint(0, 4, (N,))
    check(lambda f, x: f(x, labels, temperature=temperature), [unit(N, 40, dtype=dtype)])


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("self_positive", [True, False])
@pytest.mark.parametrize("normalize", [True, False])
def test_rows_of_other_processes_count_as_often_as_at_home(normalize, self_positive, direct):
    anchors, others = unit(70, 12) * 1.5, unit(40, 12)
    names = torch.randint(0, 5, (70 + 35,))  # the last five have no positives
    setting = operator.Setting(0.3 if direct else 0.01, 1.7, 3, self_positive, normalize, copied=30)
    upstream = torch.rand(70)
    got, kept = kernel.forward(anchors, others, names, None, setting)
    gradients = kernel.backward(upstream, anchors, others, names, None, kept, setting, True)
    exact = [x.double() for x in (anchors, others)]
    want, kept = eager.forward(*exact, names, None, setting)
    exact_gradients = eager.backward(upstream.double(), *exact, names, None, kept, setting, True)
    assert error(got, want) < FLOAT32_ERROR
    for a, b in zip(gradients, exact_gradients):
        assert error(a, b) < FLOAT32_ERROR
        assert error(a.roll(1, 0), b) > 0.1
    unlike = eager.forward(*exact, names, None, setting._replace(copied=0))[0]
    assert error(got, unlike) > 1e-4, "the copies would not be missed"


@pytest.mark.parametrize("N", [10, 70, 128])
@pytest.mark.parametrize("labelled", [False, True])
def test_products_of_contrast_rows_may_overflow(N, labelled, large_tiles):
    """They are no part of the loss, but in tiles that hold anchors as well."""
    features, contrast, labels = 1e-20 * torch.randn(N, 8), 1e20 * torch.randn(150, 8), torch.arange(N) % 3
    options = {"temperature": 1.0, "contrast_labels": torch.arange(150) % 3 if labelled else None}
    exact, ours = (
        value_and_gradients(lambda x, y: f(x, labels, contrast=y, **options), inputs)  # noqa: B023
        for f, inputs in ((reference.supcon_loss, [features.double(), contrast.double()]), (supcon_loss, [features, contrast]))
    )
    for got, want in zip(ours, exact):
        assert error(got, want) < FLOAT32_ERROR
        assert not got.ndim or error(got.roll(1, 0), want) > FLOAT32_ERROR


@pytest.mark.parametrize(
    "names",
    [
        pytest.param(torch.tensor([7, 2**40, 7, -5, 2**40 + 2**32, 2**40]), id="long"),
        pytest.param(torch.tensor([0.5, -1.0, 0.5, 2.0, 0.25, -1.0]), id="floating"),
        pytest.param(torch.tensor([float("nan"), 1.0, float("nan"), 2.0, 3.0, 1.0]), id="nan"),
        pytest.param(torch.arange(300).flip(0).repeat(2) * 2**33, id="many"),
    ],
)
def test_names_are_shortened_exactly(names):
    short, sizes = kernel._short(names, None, len(names) + 3, len(names) // 2, 2)
    assert short.dtype == torch.int32
    equal = (names[:, None] == names) | torch.eye(len(names), dtype=torch.bool)
    assert (short[len(names) :] == -1).all()
    short = short[: len(names)]
    assert torch.equal(short[:, None] == short, equal)
    weight = 1 + (torch.arange(len(names)) < len(names) // 2).int()
    assert torch.equal(sizes[short.long()], (equal.int() * weight).sum(1, dtype=torch.int32))


def test_float16_keeps_small_gradients():
    features, labels = unit(200, 16, dtype=torch.float16), torch.randint(0, 3, (200,))
    upstream = torch.tensor(2.0**-3)  # shares of some 1e-6, which float16 holds to two bits
    exact = value_and_gradients(lambda x: reference.supcon_loss(x, labels), [features.double()], upstream)[1]
    assert error(value_and_gradients(lambda x: supcon_loss(x, labels), [features], upstream)[1], exact) < 2e-3


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float32, FLOAT32_ERROR), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)], ids=str)
def test_a_scaled_loss_over_a_small_denominator(dtype, allowed, normalize, large_tiles):
    """A GradScaler's factor, and an anchor that is opposite to all others at nearly the lowest temperature that needs no maximum."""
    features = torch.full((3, 1024), 1 / 32)
    features[1:] *= -1
    features[1, 1] *= -1
    features[2, 2] *= -1
    features, labels, upstream = features.to(dtype), torch.tensor([0, 0, 1]), torch.tensor([[32768.0], [0.0], [0.0]])
    options = {"temperature": 0.0251, "normalize": normalize, "reduction": "none"}
    exact, ours = (
        value_and_gradients(lambda x: f(x, labels, **options), [x], upstream)  # noqa: B023
        for f, x in ((reference.supcon_loss, features.double()), (supcon_loss, features))
    )
    assert error(ours[0], exact[0]) < FLOAT32_ERROR
    assert error(ours[1], exact[1]) < allowed
    assert error(ours[1].roll(1, 0), exact[1]) > allowed


@pytest.mark.parametrize("masked", [False, True])
def test_float16_shares_out_of_range(masked):
    """A length of 0, which G is divided by; weights that a sum of 1e-5 divides: neither may leave float16's range."""
    features, labels = 100 * torch.randn(130, 16).half(), torch.randint(0, 3, (130,))
    mask = 1e-5 * (labels[:, None] == labels) if masked else None
    features[7] = 0
    features, options = (features[:7], {"mask": mask[:7, :7]}) if masked else (features, {"labels": labels})
    exact, ours = (
        value_and_gradients(lambda x: f(x, temperature=0.2, normalize=True, **options), [x], torch.tensor(50.0))  # noqa: B023
        for f, x in ((reference.supcon_loss, features.double()), (supcon_loss, features))
    )
    rest = torch.arange(len(features)) != 7  # a row of length 0 has a gradient beyond float16
    assert error(ours[1][rest], exact[1][rest]) < 2e-3


@pytest.mark.parametrize(
    "labels", [torch.tensor([0, 1, 1, 0, 2], dtype=torch.int32), torch.tensor([0.5, 1, 1, 0.5, 2])], ids=["int32", "float"]
)
def test_an_operator_returns_nothing_that_it_was_given(labels):
    compiled = torch.compile(lambda x: supcon_loss(x, labels), fullgraph=True, backend="aot_eager")
    features = unit(5, 8)
    for a, b in zip(value_and_gradients(compiled, [features]), value_and_gradients(lambda x: supcon_loss(x, labels), [features])):
        assert torch.equal(a, b)


@pytest.mark.parametrize("B", [100, 46341])
def test_compiled_graphs_expect_the_names_that_come(B):
    """The square of 46,341 is the first beyond 2^31."""
    setting = operator.Setting(0.07, 1.0, 1, False, False)
    with FakeTensorMode():
        inputs = torch.empty(4, 8), torch.empty(0, 8), torch.arange(4), torch.empty(B, B, dtype=torch.bool)
        expected = torch.ops.kdfast.supcon_forward(*inputs, *setting)[1][-1]
    assert expected.dtype == kernel._short(torch.arange(4), torch.empty(1, dtype=torch.bool).expand(B, B), 4, 4, 1)[0].dtype


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("B", [20, 520])
@pytest.mark.parametrize(("forward", "backward"), [("torch", "auto"), ("auto", "torch")])
def test_backward_runs_where_forward_ran(forward, backward, B, compiled):
    def call(x):
        return supcon_loss(x, labels)

    features, labels = unit(B, 8).requires_grad_(), torch.arange(B) % 3
    with kdfast.backend(forward):
        plain = torch.autograd.grad(supcon_loss(features, labels), features)[0]
        value = (torch.compile(call, fullgraph=True, backend="aot_eager") if compiled else call)(features)
    with kdfast.backend(backward):
        assert torch.equal(torch.autograd.grad(value, features)[0], plain)
        other = torch.autograd.grad(supcon_loss(features, labels), features)[0]
    assert not torch.equal(other, plain), "the forms have the same bits: the test sees nothing"


def test_precision_may_be_said_in_the_newer_way(monkeypatch):
    def raising():
        raise RuntimeError("PyTorch is checking the matmul precision without a specific backend name")

    features, labels = unit(20, 8, dtype=torch.bfloat16), torch.arange(20) % 3
    before = supcon_loss(features, labels)
    monkeypatch.setattr(torch, "get_float32_matmul_precision", raising)
    assert torch.equal(supcon_loss(features, labels), before)
    assert kernel._is_highest() == (torch.backends.cuda.matmul.fp32_precision != "tf32")


@pytest.mark.parametrize("normalize", [False, True])
def test_no_features_at_all(normalize):
    assert error(supcon_loss(torch.zeros(6, 0), torch.arange(6) % 2, normalize=normalize), torch.tensor(5.0).log()) < 1e-6


@pytest.mark.parametrize("normalize", [False, True])
def test_rows_may_be_further_apart_than_32_bits_count(normalize):
    labels = torch.tensor([0, 0, 1])
    check(lambda f, x: f(x, labels, temperature=5.0, normalize=normalize), [place_far_apart(torch.randn(3, 16))])
