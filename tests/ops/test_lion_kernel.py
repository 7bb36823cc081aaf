"""What only the Triton kernel of the Lion step has to show; test_lion.py holds the values, in the interpreter and on a GPU too."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import kdfast
from kdfast.ops.lion.rows import Options, Row
from kdfast.optim import Lion
from tests.lion import SETTINGS, bits_equal, give_gradients, parameters, run_steps, state_tensors, twins
from tests.numeric import DEVICE, INTERPRETED, KERNELS

pytestmark = [pytest.mark.kernels, pytest.mark.skipif(not KERNELS, reason="the kernel needs a GPU or TRITON_INTERPRET=1")]
if KERNELS:
    from kdfast.kernels import lion as kernel

FP32, BF16, FP16, INT8 = torch.float32, torch.bfloat16, torch.float16, torch.int8
SIZES = [(1,), (3,), (2047,), (2048,), (2049,), (3, 1366), (64, 3, 7, 7), (), (0, 3)]


@pytest.fixture
def launches(monkeypatch):
    """The names of the kernels launched."""
    names = []

    class Watched:
        def __init__(self, name):
            self.name, self.function = name, getattr(kernel, name)

        def __getitem__(self, grid):
            names.append(self.name)
            return self.function[grid]

    for name in ("_step", "_count_moving"):
        monkeypatch.setattr(kernel, name, Watched(name))
    return names


def assert_steps_equal_pytorch(ours, steps=3, before_step=None, **options):
    """Steps the parameters by the kernel, and copies of them by PyTorch; both must have the same bits, state included."""
    theirs = twins(ours)
    a, b = (Lion(params, **{**SETTINGS, **options}) for params in (ours, theirs))
    for step in range(steps):
        give_gradients(ours, theirs)
        if before_step is not None:
            before_step(step, ours)
            before_step(step, theirs)
        a.step()
        with kdfast.backend("torch"):
            b.step()
    assert bits_equal(ours, theirs)
    assert bits_equal(state_tensors(a), state_tensors(b))


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        pytest.param(FP32, {}, id="fp32"),
        pytest.param(FP32, {"cautious": True}, id="cautious"),
        pytest.param(FP32, {"maximize": True, "cautious": True}, id="maximize, cautious"),
        pytest.param(FP32, {"max_grad_norm": 0.5, "maximize": True}, id="clipped, maximize"),
        pytest.param(FP32, {"lr": torch.tensor(3e-4)}, id="tensor lr"),
        pytest.param(BF16, {}, id="bf16"),
        pytest.param(FP16, {}, id="fp16"),
        pytest.param(BF16, {"momentum_dtype": FP32}, id="bf16, fp32 momentum"),
        pytest.param(FP32, {"momentum_dtype": BF16}, id="fp32, bf16 momentum"),
        pytest.param(BF16, {"rounding": "stochastic"}, id="bf16 stochastic"),
        pytest.param(FP16, {"rounding": "stochastic", "momentum_dtype": FP32, "lr": 1e-5}, id="fp16 stochastic"),
        pytest.param(BF16, {"rounding": "kahan"}, id="bf16 kahan"),
        pytest.param(FP16, {"rounding": "kahan", "cautious": True, "momentum_dtype": FP32}, id="fp16 kahan, cautious"),
        pytest.param(FP32, {"momentum_dtype": INT8}, id="int8"),
        pytest.param(BF16, {"momentum_dtype": INT8, "rounding": "stochastic"}, id="bf16 stochastic, int8"),
        pytest.param(BF16, {"momentum_dtype": INT8, "rounding": "kahan", "cautious": True}, id="bf16 kahan, int8, cautious"),
    ],
)
def test_the_kernel_has_the_bits_of_the_pytorch_form(dtype, options):
    assert_steps_equal_pytorch(parameters([*SIZES, (41, 100)], dtype), **options)


# ---- launches --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [0, 1, 3])
def test_tensors_that_begin_anywhere_are_stepped_in_one_launch(offset, launches):
    """As views into a bucket of a data-parallel run do."""

    def shift(values):
        return torch.cat([values.new_zeros(offset), values])[offset:]

    def shift_gradients(step, params):
        for i in (0, 2):
            params[i].grad = shift(params[i].grad)

    assert_steps_equal_pytorch([nn.Parameter(shift(torch.randn(n))) for n in (5000, 7, 4096)], before_step=shift_gradients)
    assert launches == ["_step"] * 3


@pytest.mark.parametrize("p_format", [torch.contiguous_format, torch.channels_last])
def test_tensors_in_any_order_of_dimensions_are_stepped_in_one_launch(p_format, launches):
    def reorder_gradients(step, params):
        for p in params:
            p.grad = p.grad.contiguous(memory_format=torch.contiguous_format if step < 2 else torch.channels_last)

    params = [nn.Parameter(torch.randn(s).contiguous(memory_format=p_format)) for s in [(8, 5, 3, 3), (4, 1, 3, 3), (8, 5, 1, 1)]]
    assert_steps_equal_pytorch(params, steps=4, before_step=reorder_gradients)
    assert launches == ["_step"] * 4


def test_hundreds_of_tiny_tensors_are_stepped_in_one_launch(launches):
    assert_steps_equal_pytorch(parameters([(i % 7 + 1,) for i in range(300)]), steps=1)
    assert launches == ["_step"]


def test_groups_share_a_launch_while_their_options_are_the_same(launches):
    params = parameters([(50,)] * 3)
    optimizer = Lion([{"params": [p]} for p in params], lr=0.1)
    counts = []
    for lr in (0.1, 0.1, 0.2, 0.2, 0.1, 0.1):
        optimizer.param_groups[1]["lr"] = lr
        give_gradients(params)
        launches.clear()
        optimizer.step()
        counts.append(len(launches))
    assert counts == [1, 1, 2, 2, 1, 1]


def test_a_cautious_step_counts_first_and_both_launches_go_to_the_device_of_the_tensors(launches, monkeypatch):
    guarded = []
    guard = torch.cuda.device_of
    monkeypatch.setattr(torch.cuda, "device_of", lambda x: guarded.append(x.device) or guard(x))
    run_steps(1, [(5000,), (7,)], cautious=True)
    assert launches == ["_count_moving", "_step"]
    assert guarded == [torch.device(DEVICE, 0 if DEVICE == "cuda" else None)]


def test_parameters_that_the_kernel_cannot_take_leave_it_the_others(launches):
    """Memory with gaps, and subclasses of Tensor."""

    class Other(torch.Tensor):
        pass

    storage = torch.zeros(3000, 2)
    params = [storage[:, 0].requires_grad_(), nn.Parameter(torch.zeros(5)), torch.zeros(5).as_subclass(Other).requires_grad_()]
    for p in params:
        p.grad = torch.ones_like(p)
    Lion(params, lr=0.5).step()
    assert torch.equal(storage, torch.tensor([-0.5, 0.0]).expand(3000, 2))
    assert params[1].tolist() == params[2].tolist() == [-0.5] * 5
    assert launches == ["_step"]


@pytest.mark.skipif(not INTERPRETED, reason="traffic is counted in the interpreter")
@pytest.mark.parametrize(
    ("dtype", "options", "passes"),
    [
        (FP32, {}, 20),
        (BF16, {}, 10),
        (BF16, {"momentum_dtype": FP32}, 14),
        (BF16, {"rounding": "kahan"}, 14),
        (FP32, {"momentum_dtype": INT8}, 14 + 8 / 256),
        (FP32, {"cautious": True}, 28),
    ],
    ids=str,
)
def test_bytes_moved_are_those_of_five_passes(dtype, options, passes):
    from kdfast.benchmarks.maintain.traffic import counted_traffic

    N = 2 * 2048 * 8 + 100
    params = parameters([(N,)], dtype)
    optimizer = Lion(params, **SETTINGS, **options)
    give_gradients(params)
    with counted_traffic() as traffic:
        optimizer.step()
    programs = -(-N // kernel.BLOCK)
    table = 100 * programs * (1 + ("cautious" in options))  # a program's place, and the addresses
    assert N * passes <= traffic.read + traffic.written <= N * passes + table


# ---- the table of addresses ------------------------------------------------------------------------------------------


def test_a_table_with_moved_gradients_is_the_one_that_would_be_made():
    """With 128-bit accesses where all tensors begin at 16 bytes, and only there."""
    memory, flags = torch.zeros(60), kernel.FLAGS.value

    def rows(shift, momentum=0):
        (p, m), g = torch.zeros(2, 64), memory[shift : shift + 50]
        return [Row(p[:50], g, m[momentum : momentum + 50], number=1)]

    for before, now, momentum in itertools.product((0, 1, 4), (0, 1, 4), (0, 1)):
        some = rows(before, momentum)
        table = kernel.make_table(some)
        kernel.move_gradients(table, [memory[now:].data_ptr()])
        assert table.addresses[0, kernel.GRAD.value] == memory[now:].data_ptr()
        assert table.addresses[0, flags] == (2 if now == 1 or momentum else 3)
        assert table.addresses.flatten().tolist() == table.numbers.tolist()
        assert kernel.make_table([some[0]._replace(grad=memory[now : now + 50])]).numbers == table.numbers


def test_offsets_beyond_two_billion_elements():
    """A block far behind the start of its tensors, none of whose memory before it exists."""
    block = 2**31 // kernel.BLOCK + 5
    p, g, m = torch.zeros(kernel.BLOCK), torch.randn(kernel.BLOCK), torch.zeros(kernel.BLOCK)
    row = Row(p, g, m)
    table = kernel.make_table([row])
    table.addresses[0, :3] -= 4 * block * kernel.BLOCK
    table.addresses[0, kernel.SIZE.value] = (block + 1) * kernel.BLOCK - 3  # the last three are not its own
    table.chunks[0, 1] = block
    kernel.step(table, Options(0.5, 0.9, 0.0, 0.0), None, None)
    assert torch.equal(p[:-3], -0.5 * g[:-3].sign())
    assert torch.equal(m[:-3], g[:-3])
    assert p[-3:].tolist() == [0.0] * 3


def test_blocks_of_a_tensor_of_three_billion_elements():
    chunks = kernel._chunks([5, 3 * 2**30 + 1, 0, 7])
    assert len(chunks) == 1 + 3 * 2**30 // kernel.BLOCK + 1 + 1
    assert chunks[[0, 1, -2, -1]].tolist() == [[0, 0], [1, 0], [1, 3 * 2**30 // kernel.BLOCK], [3, 0]]


# ---- CUDA graphs -----------------------------------------------------------------------------------------------------


def gpu_rows(*sizes):
    """Rows that make_table takes for a GPU's."""
    tensors = [torch.zeros(size) for size in sizes]
    device = torch.device("cuda", 0)
    return [Row(SimpleNamespace(device=device, dtype=FP32, numel=x.numel, data_ptr=x.data_ptr), x, x) for x in tensors]


def test_addresses_that_a_graph_copies_are_never_written_again(monkeypatch):
    empty, is_capturing = torch.empty, [False]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: is_capturing[-1])
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: x.clone())
    monkeypatch.setattr(torch, "empty", lambda *shape, pin_memory=False, **k: empty(*shape, **k))
    monkeypatch.setattr(torch.Tensor, "to", lambda x, *a, **k: x.clone())
    monkeypatch.setattr(kernel, "_kept_for_graphs", [])
    warm, bare = (kernel.make_table(gpu_rows(5, 3000), capturable=capturable) for capturable in (True, False))
    spares = list(warm.spares)
    is_capturing.append(True)
    captured = [warm]
    for _ in range(kernel.SPARES):
        captured.append(kernel.make_table(gpu_rows(5, 3000), captured[-1], capturable=True))
    assert all(table.chunks is warm.chunks for table in captured)
    kept = {id(t) for t in kernel._kept_for_graphs}
    assert kept == {id(t) for t in (*spares, warm.chunks)}, "the pinned copies outlive the optimizer, each its own"
    assert torch.equal(spares[-1], captured[1].addresses)
    for before in (captured[-1], bare, None):
        with pytest.raises(RuntimeError, match="needs a step before the capture"):
            kernel.make_table(gpu_rows(5, 3000), before)
