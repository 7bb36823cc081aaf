"""The contracts that every loss with a kernel keeps: a new operator adds its rows to OPERATORS."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.torch_version import TorchVersion
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

import kdfast
from kdfast import functional, reference
from kdfast.benchmarks import distill_kl, linear_kd, nce, supcon
from kdfast.benchmarks.timing import interleaved, peak_memory
from tests.numeric import DEVICE, FLOAT32_ERROR, INTERPRETED, KERNELS, error, value_and_gradients
from tests.ops.contracts import FLOATS, Loss, compare, surround, unit
from tests.ops.distillation import kd, linear, make_layers, make_logits

pytestmark = pytest.mark.kernels
kernels = pytest.mark.skipif(not KERNELS, reason="the kernels need a GPU or TRITON_INTERPRET=1")
MANY = 70 if INTERPRETED else 600  # rows that supcon_loss cuts into tiles


class Problem(NamedTuple):
    """A loss and its reference as functions of inputs that all get a gradient."""

    loss: Loss
    exact: Loss
    inputs: list[Tensor]


def make_kd(N: int, dtype: torch.dtype, **options: Any) -> Problem:
    labels = torch.arange(N) % 12
    loss, exact = (kd(labels, module, ce_weight=0.4, **options) for module in (functional, reference))
    return Problem(loss, exact, [make_logits(N, 12, dtype=dtype) for _ in range(3)])


def make_linear_kd(N: int, dtype: torch.dtype, **options: Any) -> Problem:
    labels = torch.arange(N) % 12
    exact = linear(labels, reference, ce_weight=0.4, **options)
    return Problem(linear(labels, chunk_rows=4, ce_weight=0.4, **options), exact, make_layers(N, 12, 4, 5, dtype))


def make_supcon(N: int, dtype: torch.dtype, masked: bool = False, queue: int = 0, **options: Any) -> Problem:
    if masked:
        options["mask"] = torch.rand(N, N)
    else:
        options["labels"] = torch.arange(N) % 5
    inputs = [torch.randn(N, 2, 16).to(dtype)]
    if queue:
        options["contrast_labels"] = torch.arange(queue) % 6
        inputs.append(torch.randn(queue, 16).to(dtype))

    def bind(function: Callable[..., Tensor]) -> Loss:
        return lambda features, contrast=None: function(features, contrast=contrast, temperature=4.0, **options)

    return Problem(bind(functional.supcon_loss), bind(reference.supcon_loss), inputs)


def make_crd(N: int, dtype: torch.dtype) -> Problem:
    student, teacher, *banks = (unit(n, 16) for n in (N, N, 60, 60))
    indices = torch.randint(60, (N, 71))

    def exact(student: Tensor, teacher: Tensor) -> Tensor:
        first, second = (bank.to(student.dtype) for bank in banks)
        return reference.crd_loss(student, second, indices) + reference.crd_loss(teacher, first, indices)

    return Problem(lambda s, t: functional.crd_loss(s, t, *banks, indices), exact, [student.to(dtype), teacher.to(dtype)])


def make_attention_transfer(N: int, dtype: torch.dtype) -> Problem:
    shapes = [(N, 6, 4, 4), (N, 5, 3, 2), (N, 3, 4, 4), (N, 7, 3, 2)]

    def bind(function: Callable[..., Tensor]) -> Loss:
        return lambda *maps: function(list(maps[:2]), list(maps[2:]), p=2)

    inputs = [torch.randn(shape).to(dtype) for shape in shapes]
    return Problem(bind(functional.attention_transfer_loss), bind(reference.attention_transfer_loss), inputs)


class Operator(NamedTuple):
    """A loss with some options: make(number of rows, dtype, **options) makes a problem."""

    make: Callable[..., Problem]
    rows: int
    guarded: int  # times that a forward and a backward pass choose the device of a launch
    options: dict[str, Any] = {}

    def problem(self, dtype: torch.dtype = torch.float32, rows: int | None = None) -> Problem:
        return self.make(self.rows if rows is None else rows, dtype, **self.options)


OPERATORS = {
    "kd_loss": Operator(make_kd, 6, 4, {"standardize": True}),
    "kd_loss, a row": Operator(make_kd, 6, 4, {"reduction": "none", "divergence": "js", "label_smoothing": 0.1}),
    "linear_kd_loss": Operator(make_linear_kd, 6, 12, {"standardize": True}),
    "linear_kd_loss, a row": Operator(make_linear_kd, 6, 12, {"reduction": "none"}),
    "supcon_loss": Operator(make_supcon, 20, 6),
    "supcon_loss, many rows": Operator(make_supcon, MANY, 9, {"normalize": True, "contrast_mode": "one"}),
    "supcon_loss, a mask": Operator(make_supcon, 20, 5, {"masked": True, "reduction": "none"}),
    "supcon_loss, a queue": Operator(make_supcon, 20, 7, {"queue": 30}),
    "crd_loss": Operator(make_crd, 5, 4),
    "attention_transfer_loss": Operator(make_attention_transfer, 3, 10),
}
each_operator = pytest.mark.parametrize("operator", OPERATORS.values(), ids=list(OPERATORS))


def run(loss: Loss, inputs: list[Tensor]) -> list[Tensor]:
    """The value and its gradients; the upstream gradient is not 1."""
    return value_and_gradients(lambda *x: 2 * loss(*x), inputs)


def same_bits(got: list[Tensor], want: list[Tensor]) -> bool:
    return all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(got, want, strict=True))


# ---- values and inputs -----------------------------------------------------------------------------------------------


@each_operator
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_values_and_gradients_match_float64(operator, dtype):
    loss, exact, inputs = operator.problem(dtype)
    compare(loss, exact, inputs, floor=1e-6)
    value, *gradients = run(loss, inputs)
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert {x.dtype for x in gradients} == {dtype}


@each_operator
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_surroundings_are_not_read_and_inputs_are_not_written(operator, dtype):
    loss, exact, inputs = operator.problem(dtype)
    inside = [surround(x) for x in inputs]
    before = [x._base.clone() for x in inside]
    compare(loss, exact, inside, floor=1e-6)
    run(lambda first: loss(first, *inside[1:]), inside[:1])  # the first alone learns
    assert all(torch.equal(x._base.nan_to_num(7), y.nan_to_num(7)) for x, y in zip(inside, before))
    assert all(torch.equal(x, y) for x, y in zip(inside, inputs))


@each_operator
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_inf_propagate_as_in_the_reference(operator, bad):
    loss, exact, inputs = operator.problem()
    for index, x in enumerate(inputs):
        poisoned = [y.clone() for y in inputs]
        poisoned[index].view(len(x), -1)[1, 0] = bad
        got, want = run(loss, poisoned), run(exact, [y.double() for y in poisoned])
        for ours, true in zip(got, want):
            assert torch.equal(ours.isfinite(), true.isfinite())


@each_operator
def test_a_batch_without_rows(operator):
    if operator.make is make_attention_transfer:
        pytest.skip("the mean over no image is NaN: test_attention_map.py")
    loss, _, inputs = operator.problem(rows=0)
    value, *gradients = value_and_gradients(loss, inputs)
    assert not value.any()
    assert [x.shape for x in gradients] == [x.shape for x in inputs]
    assert not any(x.any() for x in gradients)


@each_operator
def test_autocast_and_the_default_dtype_change_nothing(operator):
    loss, _, inputs = operator.problem()
    want = value_and_gradients(loss, inputs)
    if operator.make is not make_linear_kd:  # which multiplies in autocast's dtype
        with torch.autocast(DEVICE.split(":")[0], torch.bfloat16):
            assert same_bits(value_and_gradients(loss, inputs), want)
    torch.set_default_dtype(torch.float64)
    try:
        assert same_bits(value_and_gradients(loss, inputs), want)
    finally:
        torch.set_default_dtype(torch.float32)


# ---- autograd --------------------------------------------------------------------------------------------------------


@each_operator
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_backward_runs_twice_and_second_derivatives_are_refused(operator, dtype):
    loss, _, inputs = operator.problem(dtype)
    leaves = [x.requires_grad_() for x in inputs]
    value = loss(*leaves).sum()
    first, second = (torch.autograd.grad(3 * value, leaves, retain_graph=True) for _ in range(2))
    third = torch.autograd.grad(value, leaves)
    allowed = 1e-2 if dtype == torch.float16 else FLOAT32_ERROR
    for a, b, c in zip(first, second, third):
        assert error(b, a) <= allowed
        assert error(3 * c, a) <= allowed
    with pytest.raises(RuntimeError, match=r"no second derivative|twice"):
        torch.autograd.grad(loss(*leaves).sum(), leaves, create_graph=True)[0].sum().backward()


@each_operator
def test_only_inputs_that_require_grad_get_one(operator):
    loss, _, inputs = operator.problem()
    everything = run(loss, inputs)[1:]
    for chosen, want in enumerate(everything):
        leaves = [x.clone().requires_grad_(index == chosen) for index, x in enumerate(inputs)]
        (2 * loss(*leaves)).sum().backward()
        assert error(leaves[chosen].grad, want) <= FLOAT32_ERROR
        assert all(x.grad is None for index, x in enumerate(leaves) if index != chosen)
    assert not loss(*inputs).requires_grad


# ---- torch.compile and devices ---------------------------------------------------------------------------------------


@each_operator
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_loss_compiles_without_a_break_to_the_same_bits(operator, dtype):
    loss, _, inputs = operator.problem(dtype)
    torch._dynamo.reset()
    compiled = torch.compile(lambda first, *others: loss(first * 1, *others), fullgraph=True, backend="aot_eager")
    assert same_bits(run(compiled, inputs), run(loss, inputs))


class Calls(TorchDispatchMode):
    """Records the calls of operators that kdfast registers."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "kdfast":
            self.calls.append((function, args))
        return function(*args, **(kwargs or {}))


@each_operator
def test_registered_operators_pass_opcheck(operator, monkeypatch):
    if operator.make is make_attention_transfer and not KERNELS:
        pytest.skip("its PyTorch form is no registered operator")
    loss, _, inputs = operator.problem()
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    calls = Calls()
    with calls:
        run(loss, inputs)
        run(lambda first: loss(first, *inputs[1:]), inputs[:1])
        loss(*inputs)
    monkeypatch.undo()
    assert calls.calls
    for function, arguments in calls.calls:
        torch.library.opcheck(function, tree_map_only(Tensor, Tensor.detach, arguments))


@each_operator
def test_nothing_waits_for_the_device(operator):
    """Tensors without values: reading one raises."""
    with torch.device("meta"), kdfast.backend("torch"):
        loss, _, inputs = operator.problem()
        gradients = run(loss, inputs)[1:]
    assert [x.shape for x in gradients] == [x.shape for x in inputs]


@kernels
@each_operator
def test_launches_go_to_the_device_of_the_tensors(operator, monkeypatch):
    loss, _, inputs = operator.problem()
    guarded, guard = [], torch.cuda.device_of
    monkeypatch.setattr(torch.cuda, "device_of", lambda x: guarded.append(x) or guard(x))
    run(loss, inputs)
    assert len(guarded) == operator.guarded
    assert {x.device for x in guarded} == {inputs[0].device}


@pytest.mark.skipif(not INTERPRETED, reason="KDFAST_BACKEND=torch is the same everywhere else")
@each_operator
def test_backend_chooses_the_form_and_float64_has_no_kernel(operator):
    loss, _, inputs = operator.problem()
    with kdfast.backend("torch"):
        plain = run(loss, inputs)
    assert all(error(a, b) <= 2 * FLOAT32_ERROR for a, b in zip(run(loss, inputs), plain))
    with pytest.raises(RuntimeError, match="needs float32, bfloat16 or float16"), kdfast.backend("triton"):
        loss(*(x.double() for x in inputs))


# ---- speed on the CPU ------------------------------------------------------------------------------------------------


@pytest.mark.speed
@pytest.mark.skipif(KERNELS, reason="the promise is about the PyTorch form on CPUs")
@pytest.mark.parametrize(
    ("bench", "shape"),
    [
        *(
            pytest.param(distill_kl, (loss, *shape), id=f"kd_loss, {loss} {shape}")
            for shape in ((8, 10), (64, 100), (128, 100), (256, 1000), (1024, 1000))
            for loss in distill_kl.LOSSES
        ),
        pytest.param(linear_kd, (512, 256, 1000), id="linear_kd_loss"),
        pytest.param(linear_kd, (2048, 512, 1000), id="linear_kd_loss, many rows"),
        pytest.param(linear_kd, (512, 256, 32000), id="linear_kd_loss, many classes"),
        pytest.param(supcon, (256, 128), id="supcon_loss"),
        pytest.param(supcon, (1024, 128), id="supcon_loss, many rows"),
        pytest.param(nce, (32, 2048, 20_000), id="crd_loss, gathered"),
        pytest.param(nce, (32, 2048, 10_000), id="crd_loss, whole bank"),
    ],
)
def test_cpu_is_not_slower_than_the_original(bench, shape):
    # a known shortfall: PyTorch 2.11 spends more on an autograd.Function, and a batch of 8 pays for it (measured there: 0.89 to 0.94)
    least = 0.85 if shape[1:] == (8, 10) and TorchVersion(torch.__version__) < "2.12" else 0.95
    ours, theirs = (bench.case(*shape).step(variant).run for variant in ("kdfast", "eager"))
    if bench is linear_kd:
        assert peak_memory(ours) <= peak_memory(theirs)
    best = 0.0
    for _ in range(5):
        best = max(best, interleaved(ours, theirs, pairs=20))
        if best >= least:
            return
    pytest.fail(f"{best:.2f} of eager's speed")
