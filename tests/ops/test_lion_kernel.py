"""What only the Triton kernel of the Lion step has to show; test_lion.py holds the rest, in the interpreter and on a GPU too."""

import weakref

import pytest
import torch
from torch import nn

import kdfast
from kdfast.ops.lion import op as operator
from kdfast.optim import Lion
from tests.numeric import INTERPRETED, KERNELS
from tests.ops.test_lion import SETTINGS, bits_equal, give_gradients, twins

pytestmark = [pytest.mark.kernels, pytest.mark.skipif(not KERNELS, reason="the kernel needs a GPU or TRITON_INTERPRET=1")]
if KERNELS:
    from kdfast.kernels import lion as kernel

fp32, bf16, fp16, int8 = torch.float32, torch.bfloat16, torch.float16, torch.int8
SIZES = [(1,), (3,), (2047,), (2048,), (2049,), (3, 1366), (2, 2048), (64, 3, 7, 7), (), (0, 3)]


class Launches(list):
    """The names of the kernels launched."""

    def __init__(self, monkeypatch):
        super().__init__()
        for name in ("_step", "_count_moving"):
            monkeypatch.setattr(kernel, name, self.counted(getattr(kernel, name), name))

    def counted(self, function, name):
        launches = self

        class Watched:
            def __getitem__(self, grid):
                launches.append(name)
                return function[grid]

        return Watched()


@pytest.fixture
def launches(monkeypatch):
    return Launches(monkeypatch)


def parameters(shapes, dtype=fp32):
    return [nn.Parameter(torch.randn(shape).to(dtype)) for shape in shapes]


def state(optimizer):
    return [t for s in optimizer.state.values() for t in s.values()]


def assert_same(ours, theirs, a, b):
    assert bits_equal(ours, theirs)
    assert bits_equal(state(a), state(b))


CASES = {
    "fp32": (fp32, {}),
    "cautious": (fp32, {"cautious": True}),
    "maximize": (fp32, {"maximize": True}),
    "maximize, cautious": (fp32, {"maximize": True, "cautious": True}),
    "clipped": (fp32, {"max_grad_norm": 0.5}),
    "tensor lr": (fp32, {"lr": torch.tensor(3e-4)}),
    "bf16": (bf16, {}),
    "fp16": (fp16, {}),
    "bf16, fp32 momentum": (bf16, {"momentum_dtype": fp32}),
    "fp32, bf16 momentum": (fp32, {"momentum_dtype": bf16}),
    "bf16 stochastic": (bf16, {"rounding": "stochastic"}),
    "fp16 stochastic": (fp16, {"rounding": "stochastic", "momentum_dtype": fp32, "lr": 1e-5}),
    "bf16 kahan": (bf16, {"rounding": "kahan"}),
    "fp16 kahan, cautious": (fp16, {"rounding": "kahan", "cautious": True, "momentum_dtype": fp32}),
    "int8": (fp32, {"momentum_dtype": int8}),
    "bf16 stochastic, int8": (bf16, {"momentum_dtype": int8, "rounding": "stochastic"}),
    "bf16 kahan, int8, cautious": (bf16, {"momentum_dtype": int8, "rounding": "kahan", "cautious": True}),
}


@pytest.mark.parametrize("name", CASES)
def test_the_kernel_has_the_bits_of_the_pytorch_form(name):
    dtype, options = CASES[name]
    shapes = [*SIZES, (41, 100), (300, 40)]
    ours = parameters(shapes, dtype)
    theirs = twins(ours)
    a, b = Lion(ours, **{**SETTINGS, **options}), Lion(theirs, **{**SETTINGS, **options})
    for _ in range(4):
        give_gradients(ours, theirs)
        a.step()
        with kdfast.backend("torch"):
            b.step()
    assert_same(ours, theirs, a, b)


@pytest.mark.parametrize("offset", [0, 1, 3])
def test_tensors_that_begin_anywhere_are_stepped_in_one_launch(offset, launches):
    """As views into a bucket of a data-parallel run do."""

    def view(values):
        return torch.cat([values.new_zeros(offset), values])[offset:]

    ours = [nn.Parameter(view(torch.randn(n))) for n in (5000, 7, 4096)]
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    a, b = Lion(ours, **SETTINGS), Lion(theirs, **SETTINGS)
    for _ in range(3):
        give_gradients(ours, theirs)
        for i, p in enumerate(ours):
            p.grad = view(p.grad) if i != 1 else p.grad
        a.step()
        with kdfast.backend("torch"):
            b.step()
    assert_same(ours, theirs, a, b)
    assert launches == ["_step"] * 3


def test_a_thousand_tiny_tensors_are_stepped_in_one_launch(launches):
    ours = parameters([(i % 7 + 1,) for i in range(1000)])
    theirs = twins(ours)
    a, b = Lion(ours, **SETTINGS), Lion(theirs, **SETTINGS)
    give_gradients(ours, theirs)
    a.step()
    with kdfast.backend("torch"):
        b.step()
    assert_same(ours, theirs, a, b)
    assert launches == ["_step"]


def test_groups_of_equal_options_share_a_launch_and_others_have_their_own(launches):
    params = parameters([(5,)] * 4)
    optimizer = Lion([{"params": [p]} for p in params[:3]] + [{"params": params[3:], "weight_decay": 0.5}], **SETTINGS)
    give_gradients(params)
    optimizer.step()
    assert launches == ["_step"] * 2
    optimizer.param_groups[1]["lr"] = 1e-2
    optimizer.step()
    assert launches == ["_step"] * 5


def test_a_cautious_step_counts_first(launches):
    params = parameters([(5000,), (7,)])
    optimizer = Lion(params, cautious=True)
    give_gradients(params)
    optimizer.step()
    assert launches == ["_count_moving", "_step"]


# ---- layouts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p_format", [torch.contiguous_format, torch.channels_last])
def test_one_launch_whatever_the_order_of_dimensions(p_format, launches):
    params = [nn.Parameter(torch.randn(s).contiguous(memory_format=p_format)) for s in [(8, 5, 3, 3), (4, 1, 3, 3), (8, 5, 1, 1)]]
    theirs = twins(params)
    a, b = Lion(params, **SETTINGS), Lion(theirs, **SETTINGS)
    for grad_format in (torch.contiguous_format,) * 3 + (torch.channels_last,) * 3:
        give_gradients(params, theirs)
        for p in params:
            p.grad = p.grad.contiguous(memory_format=grad_format)
        a.step()
        with kdfast.backend("torch"):
            b.step()
    assert_same(params, theirs, a, b)
    assert launches == ["_step"] * 6


def test_a_gradient_of_another_order_at_the_same_address_is_seen():
    p = nn.Parameter(torch.randn(6, 6, 2, 2))
    memory = torch.empty(p.numel())
    optimizer = Lion([p], lr=0.5)
    for order in (torch.contiguous_format, torch.channels_last):
        g = torch.empty(p.shape).contiguous(memory_format=order)
        p.grad = memory.as_strided(g.shape, g.stride())
        p.grad.copy_(torch.randn(p.shape) * 100)
        before = p.detach().clone()
        update = (0.9 * optimizer.state[p].get("exp_avg", torch.zeros_like(p)) + 0.1 * p.grad).sign()
        optimizer.step()
        assert torch.allclose(p.detach(), before - 0.5 * update)


def test_a_parameter_with_gaps_takes_the_pytorch_form_and_the_others_the_kernel(launches):
    storage = torch.zeros(3000, 2)
    gaps, dense = storage[:, 0].requires_grad_(), nn.Parameter(torch.zeros(5))
    gaps.grad, dense.grad = torch.ones(3000), torch.ones(5)
    Lion([gaps, dense], lr=0.5).step()
    assert torch.equal(storage, torch.tensor([-0.5, 0.0]).expand(3000, 2))
    assert dense.tolist() == [-0.5] * 5
    assert launches == ["_step"]


def test_expanded_gradients_are_read_as_what_they_are():
    p = nn.Parameter(torch.zeros(40, 60))
    p.sum().backward()
    p.grad = torch.ones(()).expand(40, 60)
    Lion([p], lr=0.5).step()
    assert torch.equal(p.detach(), torch.full((40, 60), -0.5))


# ---- the table of addresses ------------------------------------------------------------------------------------------


def test_a_table_is_made_again_only_when_an_address_has_changed(monkeypatch):
    made = []
    for name in ("table", "moved"):
        function = getattr(kernel, name)
        monkeypatch.setattr(kernel, name, lambda *a, name=name, function=function, **k: made.append(name) or function(*a, **k))
    params = parameters([(50,), (3000,)])
    optimizer = Lion(params, **SETTINGS)
    give_gradients(params)
    for _ in range(3):
        optimizer.step()
    assert made == ["table"]
    chunks = next(iter(optimizer._tables.values())).table.chunks
    give_gradients(params)  # the old gradients still live: these lie elsewhere
    optimizer.step()
    optimizer.step()
    assert made == ["table", "moved"]
    params[0].data = params[0].data.clone()
    optimizer.step()
    assert made == ["table", "moved", "table"]
    if not INTERPRETED:
        assert next(iter(optimizer._tables.values())).table.chunks is chunks


def test_groups_share_a_launch_while_their_options_are_the_same(launches):
    params = parameters([(50,), (300,)])
    optimizer = Lion([{"params": [p]} for p in params], lr=0.1)
    counts = []
    for lr in (0.1, 0.1, 0.2, 0.2, 0.1, 0.1):
        optimizer.param_groups[1]["lr"] = lr
        give_gradients(params)
        launches.clear()
        optimizer.step()
        counts.append(len(launches))
    assert counts == [1, 1, 2, 2, 1, 1]


def test_no_tensor_is_kept_that_its_owner_drops():
    params = parameters([(50,), (300,)])
    optimizer = Lion(params)
    for _ in range(2):
        give_gradients(params)
        optimizer.step()
    state = optimizer.state[params[0]]
    gone = [weakref.ref(x) for x in (params[1], state["exp_avg"], optimizer.state[params[1]]["exp_avg"], *(p.grad for p in params))]
    optimizer.zero_grad()
    state["exp_avg"] = state["exp_avg"].clone()
    del optimizer.state[params[1]]
    del optimizer.param_groups[0]["params"][1]
    del params[1]
    assert [ref() for ref in gone] == [None] * 5


@pytest.mark.parametrize("of", ["a parameter", "a momentum"])
def test_a_dtype_that_changes_in_place_is_seen(of):
    """16 bits are read as what they are now, though another parameter of the same launch is what it was."""
    results = []
    for name in ("auto", "torch"):
        torch.manual_seed(0)
        params = parameters([(9,), (50,)], bf16)
        optimizer = Lion(params, lr=0.5, momentum_dtype=fp32 if of == "a parameter" else bf16)
        with kdfast.backend(name):
            for step in range(3):
                give_gradients(params)
                if step == 2 and of == "a parameter":
                    params[1].grad = None
                    params[1].data = params[1].data.view(fp16)
                    params[1].grad = torch.ones_like(params[1])
                elif step == 2:
                    momenta = optimizer.state[params[1]]["exp_avg"]
                    momenta.data = momenta.data.view(fp16)
                optimizer.step()
        results.append([*params, *state(optimizer)])
    assert bits_equal(*results)


def test_another_rounding_is_taken_up(launches):
    params = parameters([(50,)], bf16)
    optimizer = Lion(params, lr=0.01)
    for rounding, key in (("nearest", "exp_avg"), ("kahan", "kahan_comp"), ("stochastic", "step")):
        optimizer.param_groups[0]["rounding"] = rounding
        give_gradients(params)
        optimizer.step()
        assert key in optimizer.state[params[0]]
    optimizer.param_groups[0]["foreach"] = True
    optimizer.step()
    assert len(launches) == 3


def test_a_moved_table_is_the_one_that_would_be_made():
    """With 128-bit accesses where all tensors begin at 16 bytes, and only there."""

    def rows(shift):
        grads = [torch.zeros(60)[shift : shift + 50], torch.zeros(3000)]
        return [operator.Row(p, g, m, number=i) for i, (p, g, m) in enumerate(zip(params, grads, momenta))]

    params, momenta = ([torch.zeros(50), torch.zeros(3000)] for _ in range(2))
    tables = [(some := rows(shift), kernel.table(some)) for shift in (0, 1, 4)]
    flags = [table.on_host[0, kernel.FLAGS.value].item() & 1 for _, table in tables]
    assert flags == [1, 0, 1]
    for _, before in tables:
        for some, made in tables:
            moved = kernel.moved(before, [row.grad.data_ptr() for row in some])
            assert torch.equal(moved.on_host, made.on_host)
            assert torch.equal(moved.addresses, made.addresses)


def test_a_remembered_launch_is_left_for_another_backend(launches):
    params = parameters([(50,), (3000,), (9,)]) + parameters([(20,)], bf16)
    optimizer = Lion([{"params": params[:1]}, {"params": params[1:], "lr": 0.1}])
    for _ in range(4):
        give_gradients(params)
        optimizer.step()
    assert len(launches) == 4 * 3
    with kdfast.backend("torch"):
        optimizer.step()
    assert len(launches) == 4 * 3


def test_replaced_parameters_gradients_and_momenta_are_found():
    params = parameters([(50,), (3000,)])
    theirs = twins(params)
    a, b = Lion(params, **SETTINGS), Lion(theirs, **SETTINGS)
    for step in range(6):
        give_gradients(params, theirs)
        if step == 2:
            params[1].data = params[1].data.clone()
        if step == 3:
            a.load_state_dict(a.state_dict())
        if step == 4:
            params[0].grad = theirs[0].grad = None
        a.step()
        with kdfast.backend("torch"):
            b.step()
    assert_same(params, theirs, a, b)


def test_offsets_beyond_two_billion_elements(monkeypatch):
    """A block far behind the start of its tensors, none of whose memory before it exists."""
    block = 2**31 // kernel.BLOCK + 5
    shift = 4 * block * kernel.BLOCK
    p, g, m = torch.zeros(kernel.BLOCK), torch.randn(kernel.BLOCK), torch.zeros(kernel.BLOCK)
    row = operator.Row(p, g, m)
    table = kernel.table([row])
    table.addresses[0, :3] -= shift
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
    size = 3 * 2**30 + 1
    chunks = kernel._chunks([5, size, 0, 7])
    assert len(chunks) == 1 + 3 * 2**30 // kernel.BLOCK + 1 + 1
    assert chunks[0].tolist() == [0, 0]
    assert chunks[1].tolist() == [1, 0]
    assert chunks[-2].tolist() == [1, 3 * 2**30 // kernel.BLOCK]
    assert chunks[-1].tolist() == [3, 0]


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
                self.x = x

            def numel(self):
                return self.x.numel()

            def data_ptr(self):
                return self.x.data_ptr()

        x = torch.zeros(n)
        return operator.Row(Parameter(x), x, x)


def test_addresses_that_a_graph_copies_are_never_written_again(monkeypatch):
    gpu = Gpu(monkeypatch)
    rows = [gpu.row(5), gpu.row(3000)]
    warm = kernel.table(rows, capturable=True)
    spares = list(warm.spares)
    gpu.capturing = True
    captured = [kernel.table([gpu.row(5), gpu.row(3000)], warm, capturable=True) for _ in range(kernel.SPARES)]
    assert all(table.captured and table.chunks is warm.chunks for table in captured)
    assert {id(t) for t in kernel._graphs.values()} == {id(t) for t in spares}, "the pinned copies outlive the optimizer, each its own"
    assert torch.equal(spares[-1], captured[0].addresses)
    with pytest.raises(RuntimeError, match="take one before the capture"):
        kernel.table([gpu.row(5), gpu.row(3000)], warm)
    with pytest.raises(RuntimeError, match="take one before the capture"):
        kernel.table([gpu.row(5)], kernel.table(rows)._replace(spares=[]))


def test_what_a_graph_launches_with_stays_alive(monkeypatch):
    monkeypatch.setattr(kernel, "_graphs", {})
    kernel._in_graphs(first := torch.zeros(3))
    kernel._in_graphs(first)
    assert list(kernel._graphs.values()) == [first]


@pytest.mark.parametrize("change", ["shrunk", "grown", "transposed momentum"])
def test_what_changes_at_the_same_address_is_seen(change):
    p = nn.Parameter(torch.zeros(60, 60))
    memory = torch.zeros(60, 60)
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
    else:
        state["exp_avg"] = state["exp_avg"].copy_(torch.arange(3600.0).view(60, 60)).t()
        want = 0.99 * state["exp_avg"] + 0.01
        optimizer.step()
        assert torch.allclose(state["exp_avg"], want)


def test_subclasses_of_tensors_take_the_pytorch_form(launches):
    class Other(torch.Tensor):
        pass

    p = torch.zeros(5).as_subclass(Other).requires_grad_()
    p.grad = torch.ones(5).as_subclass(Other)
    Lion([p], lr=0.5).step()
    assert p.tolist() == [-0.5] * 5
    assert not launches


def test_the_kernel_marks_what_it_wrote():
    """A backward pass through the old values must fail, not use the new ones."""
    p = nn.Parameter(torch.ones(3))
    loss = (p * p).sum()
    p.grad = torch.ones(3)
    Lion([p]).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_zeros_keep_their_sign():
    p, theirs = nn.Parameter(torch.tensor([-0.0, 0.0, -0.0])), nn.Parameter(torch.tensor([-0.0, 0.0, -0.0]))
    a, b = Lion([p]), Lion([theirs])
    for x, optimizer in ((p, a), (theirs, b)):
        x.grad = torch.tensor([-0.0, -0.0, 0.0])
        optimizer.state[x]["exp_avg"] = torch.tensor([-0.0, -0.0, -0.0])
    a.step()
    with kdfast.backend("torch"):
        b.step()
    assert_same([p], [theirs], a, b)


def test_numbers_of_other_kinds_are_taken():
    import numpy as np

    results = []
    for lr, betas in (
        (0.5, (0.9, 0.99)),
        (np.float32(0.5), (torch.tensor(0.9, dtype=torch.float64), 0.99)),
        (torch.tensor([0.5]), [0.9, 0.99]),
    ):
        p = nn.Parameter(torch.ones(5))
        p.grad = torch.arange(5.0)
        optimizer = Lion([p], lr=lr, betas=betas, weight_decay=np.float64(0.1))
        optimizer.step()
        results.append([p, *state(optimizer)])
    assert bits_equal(results[0], results[1])
    assert bits_equal(results[0], results[2])


# ---- contracts -------------------------------------------------------------------------------------------------------


def test_a_launch_goes_to_the_device_of_its_tensors(monkeypatch):
    guarded = []
    guard = torch.cuda.device_of
    monkeypatch.setattr(torch.cuda, "device_of", lambda x: guarded.append(x) or guard(x))
    params = parameters([(5,)])
    give_gradients(params)
    Lion(params).step()
    assert guarded
    assert guarded[0] is params[0]


@pytest.mark.parametrize("options", [{}, {"cautious": True}, {"momentum_dtype": int8}], ids=str)
def test_steps_are_bitwise_reproducible(options):
    results = []
    for _ in range(2):
        torch.manual_seed(3)
        params = parameters([(9000,), (7, 5)])
        optimizer = Lion(params, **SETTINGS, **options)
        for _ in range(3):
            give_gradients(params)
            optimizer.step()
        results.append([*params, *state(optimizer)])
    assert bits_equal(*results)


@pytest.mark.skipif(not INTERPRETED, reason="traffic is counted in the interpreter")
@pytest.mark.parametrize(
    ("dtype", "options", "passes"),
    [
        (fp32, {}, 20),
        (bf16, {}, 10),
        (bf16, {"momentum_dtype": fp32}, 14),
        (bf16, {"rounding": "kahan"}, 14),
        (fp32, {"momentum_dtype": int8}, 14 + 8 / 256),
        (fp32, {"cautious": True}, 28),
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


# ---- momenta of 8 bits -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_gradient_shows_in_its_256_parameters_and_nowhere_else(bad):
    p = nn.Parameter(torch.zeros(8192))
    optimizer = Lion([p], momentum_dtype=int8)
    p.grad = torch.randn(8192)
    p.grad[300] = bad
    optimizer.step()
    p.grad = torch.randn(8192)
    optimizer.step()
    assert p.isnan().nonzero().view(-1).tolist() == list(range(256, 512))
