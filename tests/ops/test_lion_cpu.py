"""The compiled Lion step of CPUs: PyTorch's bits for every dtype, size and number of threads, and the cases that it does not take."""

import ctypes
import itertools
import mmap
import os
import sys
from array import array

import pytest
import torch
from torch import nn

import kdfast
from kdfast.kernels import lion_cpu
from kdfast.ops.lion.rows import Row
from kdfast.optim import Lion
from tests.numeric import INTERPRETED

OPTIONS = {"lr": 0.1, "betas": (0.9, 0.99), "weight_decay": 0.3, "rounding": "nearest", "cautious": False}
FP32, BF16 = torch.float32, torch.bfloat16
EVERY_DTYPE = list(itertools.product([FP32, BF16], repeat=3))  # of parameter, gradient, momentum


def rows_of(sizes, dtypes=(FP32, FP32, FP32), before=0):
    """Rows of random values; `before` elements lie between the beginning of their memory and theirs."""

    def tensor(size, dtype):
        return (torch.randn(size + before + 9) * 10 ** (4 * torch.rand(size + before + 9) - 2)).to(dtype)[before : before + size]

    return [Row(*[tensor(size, dtype) for dtype in dtypes]) for size in sizes]


def copy(rows):
    return [Row(*[t.clone() for t in row[:3]]) for row in rows]


def step(rows, *, maximize=False, grad_factor=None, found_inf=None, **options):
    table = lion_cpu.make_table(rows)
    written = [t for row in rows for t in (row.param, row.momentum)]
    options = {**OPTIONS, "maximize": maximize, **options}
    lion_cpu.step(rows[0], table, written, grad_factor=grad_factor, found_inf=found_inf, **options)


def compute_in_float32(row, maximize=False, grad_factor=1.0):
    """The formula, rounded as the kernels do, in PyTorch's operations."""
    lr, (beta1, beta2), ascent = OPTIONS["lr"], OPTIONS["betas"], -1 if maximize else 1
    p, g, m = (t.float() for t in row[:3])
    g = g * grad_factor
    update = (m * beta1).add(g, alpha=ascent * (1 - beta1)).sign()
    p = (p * (1 - lr * OPTIONS["weight_decay"])).add(update, alpha=-lr)
    return p.to(row.param.dtype), (m * beta2).add(g, alpha=ascent * (1 - beta2)).to(row.momentum.dtype)


def assert_stepped(rows, before, **options):
    for row, old in zip(rows, before):
        p, m = compute_in_float32(old, **options)
        assert torch.equal(row.param, p)
        assert torch.equal(row.momentum, m)
        assert torch.equal(row.grad, old.grad)


@pytest.fixture
def threads():
    """Sets their number for a test."""
    number = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(number)


def test_the_library_was_built_where_this_runs():
    """Without it all other tests of Lion would pass by PyTorch's operations."""
    assert lion_cpu.takes(rows_of([3])[0], rounding="nearest", cautious=False)


@pytest.mark.parametrize("dtypes", EVERY_DTYPE, ids=str)
@pytest.mark.parametrize("maximize", [False, True])
def test_every_dtype_has_pytorchs_bits(dtypes, maximize):
    rows = rows_of([*range(40), 1000, 4097], dtypes)
    before = copy(rows)
    step(rows, maximize=maximize, grad_factor=torch.tensor(0.3))
    assert_stepped(rows, before, maximize=maximize, grad_factor=torch.tensor(0.3))


@pytest.mark.parametrize("number", [1, 2, 3, 5, 64])
@pytest.mark.parametrize("sizes", [[100_003], [5, 70_000, 0, 1, 33_333, 16], [50] * 700], ids=["one", "mixed", "many"])
def test_the_number_of_threads_changes_no_bit(number, sizes, threads):
    threads(number)
    rows = rows_of(sizes)
    before = copy(rows)
    step(rows)
    assert_stepped(rows, before)


@pytest.mark.parametrize("dtypes", [(FP32, FP32, FP32), (BF16, BF16, BF16)], ids=str)
@pytest.mark.parametrize("before", [1, 3, 7])
def test_nothing_beyond_the_ends_is_touched_wherever_tensors_begin(before, dtypes, threads):
    threads(2)
    memory = [[torch.full((size + 20,), 7.0, dtype=dtype) for dtype in dtypes] for size in (40_000, 1, 17)]
    rows = [Row(*[t[before : len(t) - 20 + before] for t in of]) for of in memory]
    for row in rows:
        row.grad.copy_(torch.randn(row.grad.shape))
    step(rows)
    for param, _, momentum in memory:
        for t in (param, momentum):
            assert (t[:before] == 7).all()
            assert (t[before - 20 :] == 7).all()
            assert (t[before : before - 20] != 7).all()


@pytest.mark.parametrize("dtypes", [(FP32, FP32, FP32), (BF16, FP32, BF16)], ids=str)
def test_zeros_infinities_nan_and_subnormals_have_their_signs(dtypes):
    nan, inf = float("nan"), float("inf")
    grad = torch.tensor([0.0, -0.0, nan, inf, -inf, 1e-38, -1e-38, 2e-44])
    row = Row(torch.zeros(8, dtype=dtypes[0]), grad, torch.zeros(8, dtype=dtypes[2]))
    row.param[1] = -0.0
    step([row], weight_decay=0.0, lr=0.5)
    assert row.param.tolist()[:2] == [0.0, 0.0]
    assert row.param.signbit().tolist()[:2] == [False, True]  # sign(0) is 0 and no step is taken, nor is a sign lost
    assert row.param[2].isnan()
    assert row.param.tolist()[3:] == [-0.5, 0.5, -0.5, 0.5, -0.5]
    assert row.momentum[2].isnan()
    assert row.momentum.tolist()[3:5] == [inf, -inf]


def test_a_bfloat16_is_rounded_to_the_nearest_and_of_two_to_the_even():
    wide = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, -(1 + 2**-8), 3.3895e38, 1e-40])
    row = Row(torch.zeros(6, dtype=BF16), wide, torch.zeros(6, dtype=BF16))
    step([row], betas=(0.9, 0.0))  # the momentum is the gradient
    assert torch.equal(row.momentum, wide.to(BF16))


@pytest.mark.parametrize("bits", [0x7FC00000, 0x7FFFFFFF, 0x7F800001, -1])
def test_a_nan_of_any_bits_stays_one(bits):
    row = Row(torch.zeros(1, dtype=BF16), torch.tensor([bits], dtype=torch.int32).view(FP32), torch.zeros(1, dtype=BF16))
    step([row])
    assert row.param.isnan()
    assert row.momentum.isnan()


def test_an_overflow_skips_the_step():
    rows = rows_of([100])
    before, versions = copy(rows), [t._version for t in rows[0][:3]]
    step(rows, found_inf=torch.tensor(1.0))
    assert all(torch.equal(a, b) for a, b in zip(rows[0][:3], before[0][:3]))
    assert [t._version for t in rows[0][:3]] == versions
    step(rows, found_inf=torch.tensor(0.0))
    assert [now - then for now, then in zip([t._version for t in rows[0][:3]], versions)] == [1, 0, 1]


def test_moved_gradients_are_read_at_their_new_addresses():
    rows, grad = rows_of([1000, 7]), torch.randn(1000)
    table = lion_cpu.move_gradients(lion_cpu.make_table(rows), [grad.data_ptr(), rows[1].grad.data_ptr()])
    before = copy([rows[0]._replace(grad=grad), rows[1]])
    lion_cpu.step(rows[0], table, [], **OPTIONS, maximize=False, grad_factor=None, found_inf=None)
    assert_stepped([rows[0]._replace(grad=grad), rows[1]], before)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="maps memory as Linux does")
def test_elements_beyond_2_to_the_31_are_stepped():
    """The tensors have 4 GB of addresses: one MB of memory mapped again and again, and a page of its own at the end."""
    libc = ctypes.CDLL(None)
    libc.mmap.restype, libc.mmap.argtypes = ctypes.c_void_p, [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    shared, private, fixed, readable_and_writable = 0x01, 0x22, 0x10, 0x03
    piece, size, count = 2**20, 2 * 2**31 + mmap.PAGESIZE, 2**31 + 100
    addresses, files = [], []
    try:
        for _ in range(3):
            address = libc.mmap(None, size, readable_and_writable, private | 0x4000, -1, 0)  # none of it reserved
            assert address != ctypes.c_void_p(-1).value
            addresses.append(address)
            files.append(os.memfd_create("kdfast"))
            os.ftruncate(files[-1], piece)
            for start in range(0, 2 * 2**31, piece):
                assert libc.mmap(address + start, piece, readable_and_writable, shared | fixed, files[-1], 0) == address + start
        first, last, beyond = ([torch.frombuffer((ctypes.c_int16 * 1).from_address(a + 2 * i), dtype=BF16) for a in addresses]
                               for i in (0, 2**31 + 99, 2**31 + 100))  # fmt: skip
        for param, grad, _ in (last, beyond):
            param.fill_(1.0)
            grad.fill_(1.0)
        like = rows_of([1], (BF16, BF16, BF16))[0]
        table = lion_cpu.Table(*[array("q", [x]) for x in (*addresses, count)], [True] * 3)
        lion_cpu.step(like, table, [], **{**OPTIONS, "weight_decay": 0.0, "lr": 0.5}, maximize=False, grad_factor=None, found_inf=None)
        assert [t.item() for t in last] == [0.5, 1.0, torch.tensor(0.01).to(BF16)]
        assert [t.item() for t in beyond] == [1.0, 1.0, 0.0]
        assert [t.item() for t in first] == [0.0, 0.0, 0.0]
    finally:
        for address in addresses:
            libc.munmap(address, size)
        for file in files:
            os.close(file)


def test_dtypes_and_options_that_the_library_does_not_step_are_refused():
    row = rows_of([3])[0]
    assert lion_cpu.takes(row, rounding="kahan", cautious=False)  # which float32 ignores
    assert not lion_cpu.takes(row, rounding="nearest", cautious=True)
    assert not lion_cpu.takes(row._replace(param=row.param.bfloat16()), rounding="kahan", cautious=False)
    for name, tensor in itertools.product(["param", "grad", "momentum"], [row.grad.double(), row.grad.half(), row.grad.to("meta")]):
        assert not lion_cpu.takes(row._replace(**{name: tensor}), rounding="nearest", cautious=False)


@pytest.mark.skipif(INTERPRETED, reason="Triton's interpreter takes the step first")
@pytest.mark.parametrize(
    ("name", "options", "is_taken"),
    [
        ("auto", {}, True),
        ("auto", {"fused": True}, True),
        ("auto", {"foreach": True}, True),
        ("auto", {"fused": True, "foreach": False}, True),
        ("auto", {"foreach": False}, False),
        ("auto", {"fused": False}, False),
        ("auto", {"fused": False, "foreach": True}, False),
        ("torch", {}, False),
        ("torch", {"foreach": True}, False),
    ],
    ids=str,
)
def test_options_and_backend_choose_the_library_or_pytorch(name, options, is_taken, monkeypatch):
    taken = []
    monkeypatch.setattr(lion_cpu, "step", lambda *args, **kwargs: taken.append(args))
    param = nn.Parameter(torch.ones(3))
    param.grad = torch.ones(3)
    with kdfast.backend(name):
        Lion([param], lr=0.1, **options).step()
    assert len(taken) == is_taken
    assert (param == 1).all() == is_taken  # or PyTorch has


@pytest.fixture
def search_again():
    """Clears the cached search for the library."""
    lion_cpu._function.cache_clear()
    yield lion_cpu._function
    lion_cpu._function.cache_clear()


@pytest.mark.skipif(INTERPRETED, reason="Triton's interpreter takes the step first")
@pytest.mark.parametrize("lack", ["library", "function", "fused multiply-add", "linked library"])
def test_without_it_pytorch_takes_the_step_with_the_same_bits(lack, search_again, monkeypatch):
    results = []
    for lacking in (False, True):
        if lacking:
            if lack == "library":
                monkeypatch.setattr(lion_cpu.importlib.util, "find_spec", lambda name: None)
            elif lack == "function":  # of another version
                monkeypatch.setattr(lion_cpu.ctypes, "CDLL", lambda path: object())
            elif lack == "linked library":
                monkeypatch.setattr(lion_cpu.ctypes, "CDLL", lambda path: (_ for _ in ()).throw(OSError("libgomp.so.1: not found")))
            else:
                monkeypatch.setattr(lion_cpu.platform, "machine", lambda: "x86_64")
                monkeypatch.setattr(lion_cpu.torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
            search_again.cache_clear()
            assert search_again() is None
        torch.manual_seed(0)
        params = [nn.Parameter(torch.randn(size)) for size in (5, 3000)]
        optimizer = Lion(params, lr=0.1, weight_decay=0.1)
        for _ in range(4):
            for p in params:
                p.grad = torch.randn_like(p)
            optimizer.step()
        results.append([*params, *(optimizer.state[p]["exp_avg"] for p in params)])
    assert all(map(torch.equal, *results))
    with pytest.raises(RuntimeError, match="fused=True needs the Triton kernel or, on a CPU, the compiled step"):
        Lion([params[0]], fused=True).step()
