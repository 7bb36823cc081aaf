"""The Triton kernel of kd_loss: plans, launches, layouts; the other tests run it too, in the interpreter and on a GPU."""

import pytest
import torch

from kdfast import functional, reference
from kdfast.functional import kd_loss
from kdfast.ops.distill_kl.options import KDOptions
from tests.numeric import DEVICE, FLOAT32_ERROR, KERNELS, error, value_and_gradients
from tests.ops.contracts import place_far_apart, record_launches, surround
from tests.ops.distillation import agree, kd, make_logits

pytestmark = [pytest.mark.kernels, pytest.mark.skipif(not KERNELS, reason="the kernel needs a GPU or TRITON_INTERPRET=1")]
if KERNELS:
    from kdfast.kernels import distill_kl as kernel


@pytest.mark.parametrize("C", [2, 3, 17, 128, 1000, 1024, 1025, 4096, 4100, 8192, 8193, 20000])
@pytest.mark.parametrize("divergence", ["forward", "reverse", "js"])
@pytest.mark.parametrize("K", [1, 3])
def test_every_plan_matches_float64(C, divergence, K):
    """All gradients are wanted, which reads rows most often; the last program has only some of its rows."""
    N = min(65, 2 * kernel.plan(C, heavy=True).rows + 1)
    labels = torch.randint(C, (N,)).masked_fill(torch.arange(N) == 1, -100)
    inputs, weights = [make_logits(N, C) for _ in range(1 + K)], [0.5 + k for k in range(K)]
    options = {"temperature": 3.0, "divergence": divergence, "ce_weight": 0.5, "label_smoothing": 0.1, "teacher_weights": weights}
    for standardize in (False, True):
        agree(kd, inputs, labels, floor=1e-5 if C == 2 else 0.0, standardize=standardize, **options)


@pytest.mark.parametrize("C", [10, 1000, 9000])
@pytest.mark.parametrize("standardize", [False, True])
def test_the_gradient_of_the_student_alone_matches_float64(C, standardize):
    """The usual training step, which reads a long row less often."""
    student, teacher, labels = make_logits(7, C), make_logits(7, C), torch.randint(C, (7,))
    for ce_weight in (0.0, 0.5):
        ours, exact = (kd(labels, module, standardize=standardize, ce_weight=ce_weight) for module in (functional, reference))
        got = value_and_gradients(lambda s: ours(s, teacher), [student])  # noqa: B023
        want = value_and_gradients(lambda s: exact(s, teacher.double()), [student.double()])  # noqa: B023
        assert max(error(a, b) for a, b in zip(got, want)) <= FLOAT32_ERROR
        assert error(torch.zeros_like(got[1]), want[1]) > 0.5
        assert error(got[1].roll(1, -1), want[1]) > FLOAT32_ERROR


@pytest.mark.parametrize("C", [10, 9000])
def test_a_label_out_of_range_makes_its_row_nan(C):
    student, teacher, labels = make_logits(5, C), make_logits(5, C), torch.tensor([0, C, -100, -1, C - 1])
    for options in ({"ce_weight": 0.5}, {}):
        value, gradient, of_teacher = value_and_gradients(kd(labels, reduction="none", **options), [student, teacher])
        assert value.isnan().tolist() == [False, True, False, True, False]
        for g in (gradient, of_teacher):
            assert g.isnan().all(1).tolist() == g.isnan().any(1).tolist() == [False, True, False, True, False]
    assert kd_loss(student, teacher, labels, ce_weight=0.5).isnan()


@pytest.mark.parametrize("C", [10, 1000, 2000])
@pytest.mark.parametrize("count", [0, 1, 2999, 3000])
def test_a_16_bit_mean_over_some_rows_is_rounded_once(C, count, monkeypatch):
    launches = record_launches(monkeypatch, kernel, "_count", "_resident", "_rescale")
    N = 3000 if C == 10 else 5
    count = min(count, N)
    student, teacher = make_logits(N, C).bfloat16(), make_logits(N, C)
    labels = torch.arange(N) % C
    labels[count:] = -100
    value, gradient = value_and_gradients(lambda s: kd_loss(s, teacher, labels), [student])
    assert launches == ["_count", "_resident", "_rescale"]
    options = KDOptions(temperature=4.0, standardize=False, eps=0.0, kd_weight=1.0, ce_weight=0.0, label_smoothing=0.0, ignore_index=-100,
                        divergence="forward", reduction="mean")  # fmt: skip
    assert kernel.loss_and_gradients(student, [teacher], labels, options, (True, False), None)[2] is None, "a factor remains"
    exact = value_and_gradients(lambda s: reference.kd_loss(s, teacher.double(), labels), [student.double()])
    assert error(value, exact[0]) <= FLOAT32_ERROR
    assert error(gradient, exact[1]) <= 2**-7  # the interpreter truncates


@pytest.mark.parametrize("C", [10, 1000, 9000])
def test_forward_and_backward_are_one_launch_each(C, monkeypatch):
    launches = record_launches(monkeypatch, kernel, "_resident", "_looped", "_rescale")
    student, labels = make_logits(70, C).requires_grad_(), torch.randint(C, (70,))
    kd_loss(student, make_logits(70, C), labels, standardize=True, ce_weight=0.1).backward()
    assert launches == ["_looped" if C == 9000 else "_resident", "_rescale"]


def test_the_mean_does_not_depend_on_the_last_program():
    """Losses add up in the order of rows, and the counter is 0 after every launch."""
    student, teacher, labels = make_logits(5000, 10), make_logits(5000, 10), torch.randint(10, (5000,))
    first = kd_loss(student, teacher, labels, ce_weight=1.0)
    assert all(torch.equal(first, kd_loss(student, teacher, labels, ce_weight=1.0)) for _ in range(3))
    rows = kd_loss(student.double(), teacher.double(), labels, ce_weight=1.0, reduction="none")
    assert error(first, rows.mean()) <= 1e-6


@pytest.mark.parametrize("count", [0, 1, 7])
def test_the_mean_is_over_rows_that_are_not_ignored(count):
    student, teacher = make_logits(70, 10), make_logits(70, 10)
    labels = torch.full((70,), -100)
    labels[:count] = torch.randint(10, (count,))
    agree(kd, [student, teacher], labels, upstream=torch.tensor(1.5), ce_weight=0.5, temperature=2.0)


@pytest.mark.parametrize("C", [10, 1000, 9000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rescale(C, dtype):
    x = make_logits(5, C, dtype=dtype)
    for upstream in (torch.tensor(1.0), torch.tensor(-2.0), torch.tensor([1.0, 0.5, -1.0, 4.0, 0.0])):
        for remaining in (None, torch.tensor(1.0), torch.tensor(2.0)):
            got = x.clone()
            kernel.rescale([got], upstream, remaining)
            want = x.double() * (upstream[:, None] if upstream.dim() else upstream) * (1 if remaining is None else remaining)
            assert torch.equal(got.double(), want), "powers of two lose nothing"


def test_rows_are_copied_only_where_they_cannot_be_read_as_wide_as_others():
    """So the order of a row's sums does not depend on its address."""

    def copied(C, dtype=torch.float32, stride=None, offset=0):
        x = torch.empty(4 * (stride or C) + 64, dtype=dtype)[offset:].as_strided((4, C), (stride or C, 1))
        return kernel._rows(x).data_ptr() != x.data_ptr()

    assert [kernel._vector(C) for C in (1000, 100, 10, 1001)] == [8, 4, 2, 1]
    assert not copied(1000)
    assert not copied(1000, torch.bfloat16, stride=1008)
    assert not copied(1001, stride=1003, offset=1)
    assert copied(1000, stride=1004)
    assert copied(1000, offset=1)
    assert copied(10, offset=10), "the second row of ten"


def test_a_graph_gets_a_counter_of_its_own():
    first, second = (kernel._arrivals(torch.device(DEVICE), in_graph=True) for _ in range(2))
    assert first.data_ptr() != second.data_ptr()
    assert first.item() == second.item() == 0


@pytest.mark.parametrize("C", [10, 9000])
def test_offsets_between_rows_may_exceed_32_bits(C):
    agree(kd, [place_far_apart(make_logits(2, C)), place_far_apart(make_logits(2, C))])


@pytest.mark.parametrize("C", [5, 1001, 8200])
def test_padding_never_leaks(C):
    agree(kd, [surround(make_logits(3, C)), surround(make_logits(3, C))], standardize=True)
