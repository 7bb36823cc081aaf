"""The compiled Lion step of CPUs: PyTorch's bits for every dtype, size and number of threads, and the cases that it does not take."""

import ctypes
import itertools
import mmap
import os
import sys
from array import array
from functools import cache
from unittest import mock

import pytest
import torch
from torch import nn

import kdfast
from kdfast.kernels import lion_cpu
from kdfast.ops.lion.rows import Options, Row
from kdfast.optim import Lion
from tests.lion import bits_equal, momenta, run_steps
from tests.numeric import INTERPRETED

OPTIONS = Options(0.1, 0.9, 0.99, 0.3)
FP32, BF16 = torch.float32, torch.bfloat16
EVERY_DTYPE = list(itertools.product([FP32, BF16], repeat=3))  # of parameter, gradient, momentum


def rows_of(sizes, dtypes=(FP32, FP32, FP32), before=0):
    """Rows of random values; `before` elements lie between the beginning of their memory and theirs."""

    def tensor(size, dtype):
        return (torch.randn(size + before + 9) * 10 ** (4 * torch.rand(size + before + 9) - 2)).to(dtype)[before : before + size]

    return [Row(*[tensor(size, dtype) for dtype in dtypes]) for size in sizes]


def assert_stepped(rows, options=OPTIONS, grad_factor=1.0):
    """Steps the rows, and compares with the formula in PyTorch's operations, rounded as the kernels do."""
    before = [Row(*[t.clone() for t in row[:3]]) for row in rows]
    lion_cpu.step(lion_cpu.make_table(rows), options, torch.tensor(grad_factor), None)
    ascent = -1 if options.maximize else 1
    for row, old in zip(rows, before):
        p, g, m = (t.float() for t in old[:3])
        g = g * grad_factor
        update = (m * options.beta1).add(g, alpha=ascent * (1 - options.beta1)).sign()
        p = (p * (1 - options.lr * options.weight_decay)).add(update, alpha=-options.lr)
        m = (m * options.beta2).add(g, alpha=ascent * (1 - options.beta2))
        assert torch.equal(row.param, p.to(row.param.dtype))
        assert torch.equal(row.momentum, m.to(row.momentum.dtype))
        assert torch.equal(row.grad, old.grad)


@pytest.fixture
def threads():
    """Sets their number for a test."""
    number = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(number)


def test_the_library_was_built_where_this_runs():
    """Without it all other tests of Lion would pass by PyTorch's operations."""
    assert lion_cpu.takes(rows_of([3])[0], OPTIONS)


@pytest.mark.parametrize("dtypes", EVERY_DTYPE, ids=str)
@pytest.mark.parametrize("maximize", [False, True])
def test_every_dtype_has_pytorchs_bits(dtypes, maximize):
    assert_stepped(rows_of([*range(40), 1000, 4097], dtypes), OPTIONS._replace(maximize=maximize), 0.3)


@pytest.mark.parametrize("number", [1, 2, 3, 5, 64])
@pytest.mark.parametrize("sizes", [[100_003], [5, 70_000, 0, 1, 33_333, 16], [50] * 700], ids=["one", "mixed", "many"])
def test_the_number_of_threads_changes_no_bit(number, sizes, threads):
    threads(number)
    assert_stepped(rows_of(sizes))


@pytest.mark.parametrize("dtypes", [(FP32, FP32, FP32), (BF16, BF16, BF16)], ids=str)
@pytest.mark.parametrize("before", [1, 3, 7])
def test_nothing_beyond_the_ends_is_touched_wherever_tensors_begin(before, dtypes, threads):
    threads(2)
    memory = [[torch.full((size + 20,), 7.0, dtype=dtype) for dtype in dtypes] for size in (40_000, 1, 17)]
    rows = [Row(*[t[before : len(t) - 20 + before] for t in of]) for of in memory]
    for row in rows:
        row.grad.neg_()
    lion_cpu.step(lion_cpu.make_table(rows), OPTIONS, None, None)
    for param, _, momentum in memory:
        for t in (param, momentum):
            assert (t[:before] == 7).all()
            assert (t[before - 20 :] == 7).all()
            assert (t[before : before - 20] != 7).all()


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_special_numbers_have_their_signs_and_ties_go_to_the_even(dtype):
    nan, inf = float("nan"), float("inf")
    grad = torch.tensor([0.0, -0.0, nan, inf, -inf, 1e-38, -1e-38, 2e-44, 1 + 2**-8, 1 + 3 * 2**-8, -(1 + 2**-8), 3.3895e38, 1e-40])
    odd_nans = torch.tensor([0x7FC00000, 0x7FFFFFFF, 0x7F800001, -1], dtype=torch.int32).view(FP32)
    grad = torch.cat([grad, odd_nans])
    row = Row(torch.zeros(17, dtype=dtype), grad, torch.zeros(17, dtype=dtype))
    row.param[1] = -0.0
    lion_cpu.step(lion_cpu.make_table([row]), Options(0.5, 0.9, 0.0, 0.0), None, None)  # the momentum becomes the gradient
    assert str(row.param[:8].tolist()) == "[0.0, -0.0, nan, -0.5, 0.5, -0.5, 0.5, -0.5]"
    assert row.param[-4:].isnan().all()
    assert torch.equal(row.momentum[:13].nan_to_num(7), grad[:13].to(dtype).nan_to_num(7))
    assert row.momentum.isnan().nonzero().view(-1).tolist() == [2, 13, 14, 15, 16]


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
        table = lion_cpu.Table(*[array("q", [x]) for x in (*addresses, count)], [True] * 3)
        lion_cpu.step(table, Options(0.5, 0.9, 0.99, 0.0), None, None)
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
    assert lion_cpu.takes(row, OPTIONS._replace(rounding="kahan"))  # which float32 ignores
    assert not lion_cpu.takes(row, OPTIONS._replace(cautious=True))
    assert not lion_cpu.takes(row._replace(param=row.param.bfloat16()), OPTIONS._replace(rounding="kahan"))
    for name, tensor in itertools.product(["param", "grad", "momentum"], [row.grad.double(), row.grad.half(), row.grad.to("meta")]):
        assert not lion_cpu.takes(row._replace(**{name: tensor}), OPTIONS)


@pytest.mark.skipif(INTERPRETED, reason="Triton's interpreter takes the step first")
@pytest.mark.parametrize("foreach", [None, True, False])
@pytest.mark.parametrize("fused", [None, True, False])
@pytest.mark.parametrize("name", ["auto", "torch"])
def test_options_and_backend_choose_the_library_or_pytorch(name, fused, foreach, monkeypatch):
    if fused and (foreach or name == "torch"):
        return  # an error
    param = nn.Parameter(torch.ones(3))
    param.grad = torch.ones(3)
    optimizer = Lion([param], lr=0.25)
    optimizer.step()  # makes a plan
    taken = []
    monkeypatch.setattr(lion_cpu, "step", lambda *args: taken.append(args))
    optimizer.param_groups[0].update(fused=fused, foreach=foreach)
    with kdfast.backend(name):
        optimizer.step()
    is_taken = name == "auto" and (fused or (fused is None and foreach is not False))
    assert (len(taken), param[0].item()) == ((1, 0.75) if is_taken else (0, 0.5))  # by the library, or by PyTorch


@pytest.mark.skipif(INTERPRETED, reason="Triton's interpreter takes the step first")
@pytest.mark.parametrize("lack", ["library", "function", "fused multiply-add", "linked library"])
def test_without_it_pytorch_takes_the_step_with_the_same_bits(lack, monkeypatch):
    results = []
    for lacking in (False, True):
        if lacking:
            if lack == "library":
                monkeypatch.setattr(lion_cpu.importlib.util, "find_spec", lambda name: None)
            elif lack == "function":  # of another version
                monkeypatch.setattr(lion_cpu.ctypes, "CDLL", lambda path: object())
            elif lack == "linked library":
                monkeypatch.setattr(lion_cpu.ctypes, "CDLL", mock.Mock(side_effect=OSError("libgomp.so.1: not found")))
            else:
                monkeypatch.setattr(lion_cpu.platform, "machine", lambda: "x86_64")
                monkeypatch.setattr(lion_cpu.torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
            monkeypatch.setattr(lion_cpu, "_function", cache(lion_cpu._function.__wrapped__))  # searches again
        params, optimizer = run_steps(4, [(5,), (3000,)])
        results.append([*params, *momenta(optimizer, params)])
    assert bits_equal(*results)
    with pytest.raises(RuntimeError, match="fused=True needs the Triton kernel or, on a CPU, the compiled step"):
        Lion([params[0]], fused=True).step()
