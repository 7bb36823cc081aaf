"""The Lion step of many tensors in one launch.

    p <- p (1 - lr wd);   u = sign(b1 m + (1 - b1) g), sign(0) = 0;   p <- p - lr u;   m <- b2 m + (1 - b2) g

Floor: five passes (read p, g, m; write p, m), 20 bytes a float32 parameter, and they are what is made. A program updates BLOCK
elements of one tensor, which it looks up: `chunks` says which block of which row it is, and a row of `addresses` says where the tensors
lie. The compiler knows no alignment of an address that was loaded, so it is told: blocks that are whole, of tensors that begin at
multiples of 16 bytes, are accessed 128 bits at a time; a tensor's last block, and tensors that begin elsewhere, element by element.

Rounding is PyTorch's: round(b1 m), then a fused multiply-add with g. Everything is float32 until it is stored.

A momentum of 8 bits is a sign and the root of its share of the largest in its 256 elements, k = sqrt(|m| / scale) 127: small momenta keep
their sign and a few bits. It is rounded up or down at random so that the mean is exact: with b2 = 0.99 a step changes a momentum by less
than a step of the code, and rounding to the nearest would leave it where it is.

The cautious update needs the share of elements that move, tensor by tensor, before any does: a launch before that counts them (two
more passes). Counts are integers, which add up to the same in any order.
"""

from array import array
from collections.abc import Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 2048  # elements a program
ELEMENTS_A_THREAD = 8  # 128 bits of 16-bit elements
SPARES = 8  # captured steps that one step in eager mode prepares for
GROUP = tl.constexpr(256)  # elements of an 8-bit momentum that share a scale
LEVELS = tl.constexpr(127)  # of its magnitude, above 0

# columns of `addresses`, 64 bits each
PARAM, GRAD, MOMENTUM, SCALE, COMPENSATION, STEP, SIZE, FLAGS = (tl.constexpr(i) for i in range(8))
COLUMNS = tl.constexpr(8)


def warps(warp_size: int) -> int:
    """Of a program, on a device whose warps have so many threads."""
    return BLOCK // (ELEMENTS_A_THREAD * warp_size)


WARPS = warps(64 if torch.version.hip else 32)
_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.int8: tl.int8}


# ---- an element's mathematics ----------------------------------------------------------------------------------------


@triton.jit
def _sign(x):
    """-1, 0 or 1; NaN where x is NaN. Never -0, which would turn a parameter of -0 into 0."""
    return tl.where(x > 0, 1.0, tl.where(x < 0, -1.0, tl.where(x == 0, 0.0, x)))


@triton.jit
def _hash(x):
    """32 well-mixed bits of an int32; kdfast.ops.lion makes the same."""
    x = x ^ ((x >> 16) & 0xFFFF)
    x = _wrapping(x, 0x7FEB352D)
    x = x ^ ((x >> 15) & 0x1FFFF)
    x = _wrapping(x, -0x7B935975)  # 0x846ca68b as a signed number
    return x ^ ((x >> 16) & 0xFFFF)


@triton.jit
def _wrapping(x, factor):
    """The lowest 32 bits of a product, which TRITON_DEBUG=1 would call an overflow."""
    return tl.mul(x, factor, sanitize_overflow=False)


@triton.jit
def _round_at_random(x, noise, DTYPE: tl.constexpr):
    """float32 x to bfloat16 or float16, up or down by the lowest bits of `noise` so that the mean is x."""
    bits = x.to(tl.int32, bitcast=True)
    if tl.bfloat16 == DTYPE:
        rounded = ((bits + (noise & 0xFFFF)) & -0x10000).to(tl.float32, bitcast=True)
    else:
        noise = noise & 0x1FFF
        rounded = ((bits + noise) & -0x2000).to(tl.float32, bitcast=True)
        # below 2^-14 its last bit is always 2^-24
        small = tl.floor(x * 16777216.0 + noise.to(tl.float32) * 0.0001220703125) * 5.9604644775390625e-08
        rounded = tl.where(tl.abs(x) < 6.103515625e-05, small, rounded)
    return tl.where((bits & 0x7F800000) == 0x7F800000, x, rounded).to(DTYPE)  # infinities and NaN as they are


# ---- memory ----------------------------------------------------------------------------------------------------------


@triton.jit
def _pointer(entry, column, start, DTYPE: tl.constexpr, WHOLE: tl.constexpr):
    """To the block's first element: offsets from there fit in 32 bits, and in half the registers."""
    pointer = tl.load(entry + column).to(tl.pointer_type(DTYPE)) + start
    if WHOLE:
        pointer = tl.multiple_of(pointer, 16)  # here, where the pointer is made: elsewhere the compiler does not heed it
    return pointer


@triton.jit
def _load(pointer, at, n, WHOLE: tl.constexpr):
    if WHOLE:
        x = tl.load(pointer + at)
    else:
        x = tl.load(pointer + at, mask=at < n, other=0)
    return x


@triton.jit
def _store(pointer, at, x, n, WHOLE: tl.constexpr):
    if WHOLE:
        tl.store(pointer + at, x)
    else:
        tl.store(pointer + at, x, mask=at < n)


@triton.jit
def _offsets(M: tl.constexpr, BLOCK: tl.constexpr):
    """Of a block's elements from its first; with 8-bit momenta a row of them for every scale."""
    if tl.int8 == M:
        at = tl.arange(0, BLOCK // GROUP)[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    else:
        at = tl.arange(0, BLOCK)
    return at


@triton.jit
def _scales(entry, start, n, BLOCK: tl.constexpr):
    """Pointers to the scales of a block's 8-bit momenta, and which of these there are."""
    group = tl.arange(0, BLOCK // GROUP)[:, None]
    return _pointer(entry, SCALE, start // GROUP, tl.float32, False) + group, group * GROUP < n


@triton.jit
def _load_momentum(momenta, entry, start, at, n, WHOLE: tl.constexpr, BLOCK: tl.constexpr):
    m = _load(momenta, at, n, WHOLE).to(tl.float32)
    if momenta.dtype.element_ty == tl.int8:
        pointers, present = _scales(entry, start, n, BLOCK)
        m = m * tl.abs(m) * (tl.load(pointers, mask=present, other=0.0) * (1.0 / (LEVELS * LEVELS)))
    return m


@triton.jit
def _store_momentum(momenta, entry, start, at, m, noise, n, WHOLE: tl.constexpr, BLOCK: tl.constexpr):
    if momenta.dtype.element_ty == tl.int8:
        pointers, present = _scales(entry, start, n, BLOCK)
        size = tl.abs(m)
        size = tl.where(size < float("inf"), size, float("inf"))  # a maximum passes over NaN
        scale = tl.max(size, axis=1, keep_dims=True)
        tl.store(pointers, scale, mask=present)
        # too small to divide by, or infinite: all levels 0, which an infinite scale makes NaN
        squared = size * tl.where((scale > 1e-30) & (scale < float("inf")), (LEVELS * LEVELS) / scale, 0.0)
        squared = tl.where(scale < float("inf"), squared, 0.0)
        level = tl.floor(tl.sqrt(squared))
        up = (squared - level * level) * 65536.0 > (2.0 * level + 1.0) * ((noise >> 16) & 0xFFFF).to(tl.float32)
        level = tl.minimum(tl.where(up, level + 1.0, level), LEVELS)
        m = tl.where(m < 0, -level, level)
    _store(momenta, at, m.to(momenta.dtype.element_ty), n, WHOLE)


# ---- kernels ---------------------------------------------------------------------------------------------------------


@triton.jit
def _gradient(entry, start, at, n, factor, G: tl.constexpr, MAXIMIZE: tl.constexpr, WHOLE: tl.constexpr):
    g = _load(_pointer(entry, GRAD, start, G, WHOLE), at, n, WHOLE).to(tl.float32)
    if factor is not None:
        g *= tl.load(factor)
    if MAXIMIZE:
        g = -g
    return g


@triton.jit
def _update(
    entry, start, n, moving, factor, decay, rate, beta1, rest1, beta2, rest2,
    P: tl.constexpr, G: tl.constexpr, M: tl.constexpr, ROUNDING: tl.constexpr, MAXIMIZE: tl.constexpr,
    WHOLE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The step of one block, of which every element is there (WHOLE), or the first n."""
    at = _offsets(M, BLOCK)
    params = _pointer(entry, PARAM, start, P, WHOLE)
    p = _load(params, at, n, WHOLE).to(tl.float32)  # asked for before it is needed: three loads under way at once
    momenta = _pointer(entry, MOMENTUM, start, M, WHOLE)
    m = _load_momentum(momenta, entry, start, at, n, WHOLE, BLOCK)
    g = _gradient(entry, start, at, n, factor, G, MAXIMIZE, WHOLE)
    u = _sign(tl.fma(g, rest1, beta1 * m))
    if moving is not None:
        share = tl.div_rn(tl.load(moving).to(tl.float32), tl.load(entry + SIZE).to(tl.float32))
        u *= tl.where(u * g > 0, tl.div_rn(1.0, tl.maximum(share, 1e-5)), 0.0)

    noise = 0
    if ROUNDING == "stochastic" or tl.int8 == M:
        step = tl.load(_pointer(entry, STEP, 0, tl.float32, False)).to(tl.int32)
        index = (tl.load(entry + FLAGS) >> 1).to(tl.int32)
        place = tl.add(start.to(tl.int32), at, sanitize_overflow=False)
        seed = _hash(tl.add(_wrapping(step, 0x1E3779B1), index, sanitize_overflow=False))
        noise = _hash(_wrapping(place, 0x1E3779B1) ^ seed)

    if ROUNDING == "kahan":
        compensations = _pointer(entry, COMPENSATION, start, P, WHOLE)
        p = tl.fma(u, -rate, (p + _load(compensations, at, n, WHOLE).to(tl.float32)) * decay)
        _store(compensations, at, (p - p.to(P).to(tl.float32)).to(P), n, WHOLE)
    else:
        p = tl.fma(u, -rate, p * decay)
    _store(params, at, _round_at_random(p, noise, P) if ROUNDING == "stochastic" else p.to(P), n, WHOLE)
    _store_momentum(momenta, entry, start, at, tl.fma(g, rest2, beta2 * m), noise, n, WHOLE, BLOCK)


@triton.jit
def _place(addresses, chunks, found_inf, BLOCK: tl.constexpr):
    """This program's row, where its addresses are, the first element, how many to update, and whether those are BLOCK that lie well."""
    row = tl.load(chunks + 2 * tl.program_id(0)).to(tl.int64)
    start = tl.load(chunks + 2 * tl.program_id(0) + 1).to(tl.int64) * BLOCK  # a tensor may have more than 2^31 elements
    entry = addresses + row * COLUMNS
    n = tl.minimum(tl.load(entry + SIZE) - start, BLOCK).to(tl.int32)
    if found_inf is not None:
        n = tl.where(tl.load(found_inf) != 0, 0, n)
    whole = ((tl.load(entry + FLAGS) & 1) != 0) & (n == BLOCK)
    return row, entry, start, n, whole


@triton.jit
def _step(
    addresses, chunks, factor, found_inf, moving, lr, decay, rate, beta1, rest1, beta2, rest2,
    P: tl.constexpr, G: tl.constexpr, M: tl.constexpr, ROUNDING: tl.constexpr, MAXIMIZE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """All rows. With `lr`, a pointer, it is the rate, and `decay` is the weight decay that it multiplies."""
    row, entry, start, n, whole = _place(addresses, chunks, found_inf, BLOCK)
    if lr is not None:
        rate = tl.load(lr).to(tl.float32)
        decay = 1.0 - rate * decay
    if moving is not None:
        moving += row
    if whole:
        _update(
            entry, start, n, moving, factor, decay, rate, beta1, rest1, beta2, rest2, P, G, M, ROUNDING, MAXIMIZE, True, BLOCK
        )  # fmt: skip
    else:
        _update(
            entry, start, n, moving, factor, decay, rate, beta1, rest1, beta2, rest2, P, G, M, ROUNDING, MAXIMIZE, False, BLOCK
        )  # fmt: skip


@triton.jit
def _count_moving(
    addresses, chunks, factor, found_inf, moving, beta1, rest1,
    G: tl.constexpr, M: tl.constexpr, MAXIMIZE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Adds to moving[row] the elements whose update agrees with their gradient."""
    row, entry, start, n, whole = _place(addresses, chunks, found_inf, BLOCK)
    if whole:
        count = _moving(entry, start, n, factor, beta1, rest1, G, M, MAXIMIZE, True, BLOCK)
    else:
        count = _moving(entry, start, n, factor, beta1, rest1, G, M, MAXIMIZE, False, BLOCK)
    tl.atomic_add(moving + row, count.to(tl.int64), sem="relaxed")


@triton.jit
def _moving(
    entry, start, n, factor, beta1, rest1,
    G: tl.constexpr, M: tl.constexpr, MAXIMIZE: tl.constexpr, WHOLE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = _offsets(M, BLOCK)
    m = _load_momentum(_pointer(entry, MOMENTUM, start, M, WHOLE), entry, start, at, n, WHOLE, BLOCK)
    g = _gradient(entry, start, at, n, factor, G, MAXIMIZE, WHOLE)
    agree = _sign(tl.fma(g, rest1, beta1 * m)) * g > 0  # where nothing is there g is 0
    return tl.sum(tl.ravel(agree.to(tl.int32)), 0)


# ---- launches --------------------------------------------------------------------------------------------------------


class Table(NamedTuple):
    """Where the tensors of a launch lie, in their device's memory: good as long as they lie there."""

    addresses: Tensor  # int64 [rows, COLUMNS], and
    on_host: Tensor  # the same, on the CPU
    chunks: Tensor  # int32 [programs, 2]: row, and block within it
    sizes: tuple[int, ...]  # of the rows: chunks depend on nothing else
    spares: list[Tensor]  # pinned memory for the addresses that CUDA graphs will find, taken one by one
    captured: bool = False  # filled by a graph's own copy, anew in every replay

    @property
    def programs(self) -> int:
        """How many a launch needs."""
        return len(self.chunks)


def table(rows: Sequence[Any], before: Table | None = None, *, capturable: bool = False) -> Table:
    """The table of these rows (kdfast.ops.lion.op.Row).

    Args:
        rows: of one device and the same dtypes; the tensors of a row fill memory without gaps, all in the same order of dimensions.
        before: a table of the same optimizer; where sizes are the same its chunks are kept.
        capturable: a step with other gradients may be captured in a CUDA graph later.

    Raises:
        RuntimeError: a CUDA graph is being captured, and there was no step before that could have prepared for it.
    """
    device = rows[0].param.device
    sizes = tuple(row.param.numel() for row in rows)
    addresses = _addresses(rows, sizes)
    if device.type != "cuda":
        return Table(addresses, addresses, _chunks(sizes), sizes, [])
    if before is not None and before.sizes != sizes:
        before = None
    if torch.cuda.is_current_stream_capturing():
        if before is None or not before.spares:
            raise RuntimeError(
                "Lion: gradients have other addresses in this CUDA graph than in the steps before; a step with capturable=True, these "
                f"parameters and their gradients prepares for {SPARES} such captured steps: take one before the capture"
            )
        # the graph copies from here whenever it is replayed, so this memory is never written again
        pinned = _in_graphs(before.spares.pop().copy_(addresses))
        return Table(pinned.to(device, non_blocking=True), addresses, before.chunks, sizes, [], captured=True)
    return Table(
        _sent(addresses, device),
        addresses,
        before.chunks if before is not None else _chunks(sizes).pin_memory().to(device, non_blocking=True),
        sizes,
        list(torch.empty(SPARES, *addresses.shape, dtype=torch.int64, device="cpu", pin_memory=True)) if capturable else [],
    )


def moved(before: Table, gradients: Sequence[int]) -> Table:
    """The table of the same rows with gradients at other addresses; not while a CUDA graph is captured."""
    addresses = before.on_host.clone()
    addresses[:, GRAD.value] = torch.frombuffer(array("q", gradients), dtype=torch.int64)
    _flag_whole(addresses.T)
    return before._replace(addresses=_sent(addresses, before.chunks.device), on_host=addresses)


def _sent(addresses: Tensor, device: torch.device) -> Tensor:
    if device.type != "cuda":
        return addresses
    return addresses.pin_memory().to(device, non_blocking=True)  # PyTorch does not hand it out again before the copy has ended


def _flag_whole(table: Tensor) -> None:
    """Sets the lowest bit of FLAGS [COLUMNS, rows] where all tensors begin at multiples of 16 bytes, as 128-bit accesses need."""
    table[FLAGS.value] &= ~1
    table[FLAGS.value] |= (table[: STEP.value] % 16 == 0).all(0)


def _addresses(rows: Sequence[Any], sizes: Sequence[int]) -> Tensor:
    """int64 [rows, COLUMNS]."""
    columns = [
        [0 if tensor is None else tensor.data_ptr() for tensor in column]
        for column in zip(*((row.param, row.grad, row.momentum, row.scale, row.compensation, row.step) for row in rows))
    ]
    numbers = array("q", chain(*columns, sizes, [row.number << 1 for row in rows]))  # torch.tensor takes ten times as long for these
    table = torch.frombuffer(numbers, dtype=torch.int64).view(COLUMNS.value, len(rows))
    _flag_whole(table)
    return table.T.contiguous()


def _chunks(sizes: Sequence[int]) -> Tensor:
    """int32 [programs, 2]: every block of every row."""
    with torch.device("cpu"):  # whatever the default
        blocks = torch.tensor([-(-size // BLOCK) for size in sizes], dtype=torch.int64)
        rows = torch.repeat_interleave(torch.arange(len(sizes)), blocks)
        first = torch.cumsum(blocks, 0) - blocks
        return torch.stack([rows, torch.arange(len(rows)) - first[rows]], dim=1).to(torch.int32)


_graphs: dict[int, Tensor] = {}


def _in_graphs(tensor: Tensor) -> Tensor:
    """Keeps for good what a CUDA graph holds the address of: nobody can tell when that is destroyed."""
    _graphs[id(tensor)] = tensor
    return tensor


def step(
    like: Any,
    table: Table,
    written: Sequence[Tensor],
    *,
    lr: float | Tensor,
    betas: tuple[float, float],
    weight_decay: float,
    rounding: str,
    cautious: bool,
    maximize: bool,
    grad_factor: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    """Updates the rows in place.

    Args:
        like: one of the rows of which the table was made, for device and dtypes.
        table: where the rows are.
        written: their parameters and state.
        lr: a number, or 0-dim on the device.
        betas: b1 and b2.
        weight_decay: what lr multiplies.
        rounding: of stored parameters: "nearest", "stochastic" (every row has a step) or "kahan" (every row has a compensation).
        cautious: moves only elements whose update agrees with their gradient, by lr over the share of these.
        maximize: ascends.
        grad_factor: 0-dim float32, multiplies the gradients.
        found_inf: 0-dim float32; where it is not 0 nothing changes.
    """
    param, grad, momentum = like.param, like.grad, like.momentum
    if param.is_cuda and torch.cuda.is_current_stream_capturing():
        _in_graphs(table.chunks)
        if not table.captured:  # a captured one is memory of the graph itself
            _in_graphs(table.addresses)
    beta1, beta2 = betas
    grid = (table.programs,)
    gradient = {"G": _TYPES[grad.dtype], "M": _TYPES[momentum.dtype], "MAXIMIZE": maximize, "BLOCK": BLOCK}
    with torch.cuda.device_of(param):
        moving = None
        if cautious:
            moving = torch.zeros(len(table.sizes), dtype=torch.int64, device=param.device)
            _count_moving[grid](
                table.addresses, table.chunks, grad_factor, found_inf, moving, beta1, 1.0 - beta1,
                **gradient, num_warps=WARPS, enable_fp_fusion=True,
            )  # fmt: skip
        on_device = isinstance(lr, Tensor)
        _step[grid](
            table.addresses, table.chunks, grad_factor, found_inf, moving, lr if on_device else None,
            weight_decay if on_device else 1.0 - lr * weight_decay, 0.0 if on_device else lr, beta1, 1.0 - beta1, beta2, 1.0 - beta2,
            P=_TYPES[param.dtype], ROUNDING=rounding if param.dtype != torch.float32 else "nearest",
            **gradient, num_warps=WARPS, enable_fp_fusion=True,
        )  # fmt: skip
    torch.autograd.graph.increment_version(written)  # a backward pass that needs what was there is to say so
