"""What only the Triton kernel of the Lion step has to show; test_lion.py holds the values, in the interpreter and on a GPU too."""

import pytest
import torch
from torch import nn

import kdfast
from kdfast.ops.lion.rows import Row
from kdfast.optim import Lion
from tests.lion import SETTINGS, bits_equal, give_gradients, parameters, state_tensors, twins
from tests.numeric import INTERPRETED, KERNELS

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


def test_a_cautious_step_counts_first(launches):
    params = parameters([(5000,), (7,)])
    give_gradients(params)
    Lion(params, cautious=True).step()
    assert launches == ["_count_moving", "_step"]


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


def test_another_rounding_and_another_backend_are_taken_up(launches):
    params = parameters([(50,)], BF16)
    optimizer = Lion(params, lr=0.01)
    for rounding, key in (("nearest", "exp_avg"), ("kahan", "kahan_comp"), ("stochastic", "step"), ("stochastic", "step")):
        optimizer.param_groups[0]["rounding"] = rounding
        give_gradients(params)
        optimizer.step()
        assert key in optimizer.state[params[0]]
    optimizer.param_groups[0]["foreach"] = True
    optimizer.step()
    with kdfast.backend("torch"):
        optimizer.step()
    assert len(launches) == 4


def test_a_launch_goes_to_the_device_of_its_tensors(monkeypatch):
    guarded = []
    guard = torch.cuda.device_of
    monkeypatch.setattr(torch.cuda, "device_of", lambda x: guarded.append(x) or guard(x))
    params = parameters([(5,)])
    give_gradients(params)
    Lion(params).step()
    assert guarded
    assert guarded[0] is params[0]


@pytest.mark.parametrize("steps", [1, 2], ids=["a new plan", "a plan in use"])
def test_the_kernel_marks_what_it_wrote(steps):
    """A backward pass through the old values must fail, not use the new ones."""
    p = nn.Parameter(torch.ones(3))
    optimizer = Lion([p])
    for _ in range(steps):
        loss = (p * p).sum()
        p.grad = torch.ones(3)
        optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_zeros_keep_their_sign():
    def zero_gradients(step, params):
        params[0].grad = torch.tensor([-0.0, -0.0, 0.0])

    assert_steps_equal_pytorch([nn.Parameter(torch.tensor([-0.0, 0.0, -0.0]))], before_step=zero_gradients)


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


@pytest.mark.parametrize("options", [{}, {"rounding": "stochastic"}, {"rounding": "kahan"}, {"momentum_dtype": INT8}], ids=str)
def test_a_table_is_made_again_only_when_an_address_has_changed(options, monkeypatch):
    made = []
    for name in ("make_table", "move_gradients"):
        function = getattr(kernel, name)
        monkeypatch.setattr(kernel, name, lambda *a, name=name, function=function, **k: made.append(name) or function(*a, **k))
    params = parameters([(50,), (5000,)], BF16)
    optimizer = Lion(params[:1] if "momentum_dtype" in options else params, **SETTINGS, **options)
    give_gradients(params)
    for _ in range(3):
        optimizer.step()
    assert made == ["make_table"]
    old = [p.grad for p in params]
    give_gradients(params)
    assert all(p.grad.data_ptr() != g.data_ptr() for p, g in zip(params, old))
    optimizer.step()
    optimizer.step()
    assert made == ["make_table", "move_gradients"]
    chunks = next(iter(optimizer._plan.tables.values())).chunks
    params[0].data = params[0].data.clone()
    optimizer.step()
    assert made == ["make_table", "move_gradients", "make_table"]
    if not INTERPRETED:
        assert next(iter(optimizer._plan.tables.values())).chunks is chunks


def test_a_table_with_moved_gradients_is_the_one_that_would_be_made():
    """With 128-bit accesses where all tensors begin at 16 bytes, and only there."""

    def rows(shift):
        grads = [torch.zeros(60)[shift : shift + 50], torch.zeros(3000)]
        return [Row(p, g, m, number=i) for i, (p, g, m) in enumerate(zip(params, grads, momenta))]

    params, momenta = ([torch.zeros(50), torch.zeros(3000)] for _ in range(2))
    tables = [(some := rows(shift), kernel.make_table(some)) for shift in (0, 1, 4)]
    assert [table.addresses[0, kernel.FLAGS.value].item() & 1 for _, table in tables] == [1, 0, 1]
    assert [table.addresses[1, kernel.FLAGS.value].item() for _, table in tables] == [3, 3, 3]
    for _, before in tables:
        for some, made in tables:
            moved = kernel.move_gradients(before, [row.grad.data_ptr() for row in some])
            assert torch.equal(moved.addresses, made.addresses)
            assert moved.numbers == made.numbers


def test_a_momentum_off_16_bytes_is_never_flagged_as_aligned():
    g, m = torch.zeros(60), torch.zeros(60)[1:51]
    table = kernel.make_table([Row(torch.zeros(50), g[1:51], m)])
    for grad in (g[:50], g[4:54]):
        assert kernel.move_gradients(table, [grad.data_ptr()]).numbers[kernel.FLAGS.value] == 0


@pytest.mark.parametrize("change", ["shrunk", "grown", "transposed momentum", "another order"])
def test_changes_at_the_same_address_are_seen(change):
    p, memory = nn.Parameter(torch.zeros(60, 60)), torch.zeros(60, 60)
    p.data = memory[:30] if change == "grown" else memory
    optimizer = Lion([p], lr=0.5)
    p.grad = torch.ones(p.shape)
    optimizer.step()
    state = optimizer.state[p]
    if change == "shrunk":
        p.data, p.grad, state["exp_avg"] = memory[:50], p.grad[:50], state["exp_avg"][:50]
        optimizer.step()
        assert torch.equal(memory[:50], torch.full((50, 60), -1.0))
        assert torch.equal(memory[50:], torch.full((10, 60), -0.5))
    elif change == "grown":
        p.data, p.grad = memory, torch.ones(60, 60)
        with pytest.raises(RuntimeError, match=r"exp_avg of parameter 0 must have the parameter's shape \(60, 60\), got \(30, 60\)"):
            optimizer.step()
    elif change == "transposed momentum":
        state["exp_avg"] = state["exp_avg"].copy_(torch.arange(3600.0).view(60, 60)).t()
        want = 0.99 * state["exp_avg"] + 0.01
        optimizer.step()
        assert torch.allclose(state["exp_avg"], want)
    else:
        p.grad.data = p.grad.data.copy_(100 * torch.randn(60, 60)).t()
        want = p.detach() - 0.5 * (0.9 * state["exp_avg"] + 0.1 * p.grad).sign()
        optimizer.step()
        assert torch.equal(p.detach(), want)


def test_offsets_beyond_two_billion_elements():
    """A block far behind the start of its tensors, none of whose memory before it exists."""
    block = 2**31 // kernel.BLOCK + 5
    p, g, m = torch.zeros(kernel.BLOCK), torch.randn(kernel.BLOCK), torch.zeros(kernel.BLOCK)
    row = Row(p, g, m)
    table = kernel.make_table([row])
    table.addresses[0, :3] -= 4 * block * kernel.BLOCK
    table.addresses[0, kernel.SIZE.value] = (block + 1) * kernel.BLOCK - 3  # the last three are not its own
    table.chunks[0, 1] = block
    kernel.step(
        row, table, [p, m], lr=0.5, betas=(0.9, 0.0), weight_decay=0.0, rounding="nearest",
        cautious=False, maximize=False, grad_factor=None, found_inf=None,
    )  # fmt: skip
    assert torch.equal(p[:-3], -0.5 * g[:-3].sign())
    assert torch.equal(m[:-3], g[:-3])
    assert p[-3:].tolist() == [0.0] * 3


def test_blocks_of_a_tensor_of_three_billion_elements():
    chunks = kernel._chunks([5, 3 * 2**30 + 1, 0, 7])
    assert len(chunks) == 1 + 3 * 2**30 // kernel.BLOCK + 1 + 1
    assert chunks[[0, 1, -2, -1]].tolist() == [[0, 0], [1, 0], [1, 3 * 2**30 // kernel.BLOCK], [3, 0]]


# ---- CUDA graphs -----------------------------------------------------------------------------------------------------


class Gpu:
    """Stands in for a GPU where tables are made: what is pinned, and whether a graph is being captured."""

    def __init__(self, monkeypatch):
        self.capturing = False
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: self.capturing)
        monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: x.clone())
        empty = torch.empty
        monkeypatch.setattr(torch, "empty", lambda *shape, pin_memory=False, **k: empty(*shape, **k))
        monkeypatch.setattr(torch.Tensor, "to", lambda x, *a, **k: x.clone())
        monkeypatch.setattr(kernel, "_graphs", {})

    def row(self, n):
        class Parameter:
            device = torch.device("cuda", 0)

            def __init__(self, x):
                self.numel, self.data_ptr = x.numel, x.data_ptr

        x = torch.zeros(n)
        return Row(Parameter(x), x, x)


def test_addresses_that_a_graph_copies_are_never_written_again(monkeypatch):
    gpu = Gpu(monkeypatch)
    rows = [gpu.row(5), gpu.row(3000)]
    warm = kernel.make_table(rows, capturable=True)
    spares = list(warm.spares)
    gpu.capturing = True
    captured = [kernel.make_table([gpu.row(5), gpu.row(3000)], warm, capturable=True) for _ in range(kernel.SPARES)]
    assert all(table.captured and table.chunks is warm.chunks for table in captured)
    assert {id(t) for t in kernel._graphs.values()} == {id(t) for t in spares}, "the pinned copies outlive the optimizer, each its own"
    assert torch.equal(spares[-1], captured[0].addresses)
    with pytest.raises(RuntimeError, match="take one before the capture"):
        kernel.make_table([gpu.row(5), gpu.row(3000)], warm)
    with pytest.raises(RuntimeError, match="take one before the capture"):
        kernel.make_table([gpu.row(5)], kernel.make_table(rows)._replace(spares=[]))


def test_tensors_of_a_captured_launch_stay_alive(monkeypatch):
    monkeypatch.setattr(kernel, "_graphs", {})
    for tensor in (first := torch.zeros(3), first):
        kernel._keep_for_graphs(tensor)
    assert list(kernel._graphs.values()) == [first]
