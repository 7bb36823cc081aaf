"""The Lion step of many tensors in one launch.

    p <- p (1 - lr wd);   u = sign(b1 m + (1 - b1) g), sign(0) = 0;   p <- p - lr u;   m <- b2 m + (1 - b2) g

The kernel makes five passes over memory, which is the floor (read p, g, m; write p, m; 20 bytes a float32 parameter). A program updates
BLOCK elements of one tensor: `chunks` tells it which block of which row, and a row of `addresses` where the tensors are. The compiler
cannot know the alignment of a loaded address, so it is told: whole blocks of tensors that begin at multiples of 16 bytes are accessed
128 bits at a time; a tensor's last block, and tensors that begin elsewhere, element by element.

Rounding is PyTorch's: round(b1 m), then a fused multiply-add with g. Everything is float32 until it is stored.

A momentum of 8 bits is a sign and the root of its share of the largest in its 256 elements, k = sqrt(|m| / scale) 127: small momenta keep
their sign and a few bits. It is rounded up or down at random so that the mean is exact: with b2 = 0.99 a step changes a momentum by less
than a step of the code, and rounding to the nearest would leave it where it is.

The cautious update needs the share of elements that move, tensor by tensor, before any does: a launch before that counts them (two
more passes). Counts are integers, which add up to the same in any order.
"""

from array import array
from collections.abc import Sequence
from functools import reduce
from operator import or_
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kdfast.kernels import lion_constants as constants

BLOCK = 2048  # elements a program
ELEMENTS_A_THREAD = 8  # 128 bits of 16-bit elements
SPARES = 8  # captured steps that one step in eager mode prepares for
GROUP, LEVELS = tl.constexpr(constants.GROUP), tl.constexpr(constants.LEVELS)
HASH_INDEX = tl.constexpr(constants.HASH_INDEX)
HASH_FIRST, HASH_SECOND = tl.constexpr(constants.HASH_FIRST), tl.constexpr(constants.HASH_SECOND)

# columns of `addresses`, 64 bits each
PARAM, GRAD, MOMENTUM, SCALE, COMPENSATION, STEP, SIZE, FLAGS = (tl.constexpr(i) for i in range(8))
COLUMNS = tl.constexpr(8)


def count_warps(warp_size: int) -> int:
    """The warps of a program, on a device whose warps have `warp_size` threads."""
    return BLOCK // (ELEMENTS_A_THREAD * warp_size)


WARPS = count_warps(64 if torch.version.hip else 32)
_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.int8: tl.int8}


# ---- an element's mathematics ----------------------------------------------------------------------------------------


@triton.jit
def _sign(x):
    """-1, 0 or 1; NaN where x is NaN. Never -0, which would turn a parameter of -0 into 0."""
    return tl.where(x > 0, 1.0, tl.where(x < 0, -1.0, tl.where(x == 0, 0.0, x)))


@triton.jit
def _hash(x):
    """32 well-mixed bits of an int32; kdfast.ops.lion.eager makes the same."""
    x = x ^ ((x >> 16) & 0xFFFF)
    x = _wrapping(x, HASH_FIRST)
    x = x ^ ((x >> 15) & 0x1FFFF)
    x = _wrapping(x, HASH_SECOND)
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
    """The pointer to the block's first element: offsets from there fit in 32 bits, and in half the registers."""
    pointer = tl.load(entry + column).to(tl.pointer_type(DTYPE)) + start
    if WHOLE:
        pointer = tl.multiple_of(pointer, 16)  # the compiler uses this only where the pointer is made
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
    """Offsets of a block's elements from its first; with 8-bit momenta one row for each scale."""
    if tl.int8 == M:
        at = tl.arange(0, BLOCK // GROUP)[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    else:
        at = tl.arange(0, BLOCK)
    return at


@triton.jit
def _scales(entry, start, n, BLOCK: tl.constexpr):
    """Pointers to the scales of a block's 8-bit momenta, and a mask of those that exist."""
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
    """The step of one block: of all its elements (WHOLE), or of the first n."""
    at = _offsets(M, BLOCK)
    params = _pointer(entry, PARAM, start, P, WHOLE)
    p = _load(params, at, n, WHOLE).to(tl.float32)  # loaded early: three loads are under way at once
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
        seed = _hash(tl.add(_wrapping(step, HASH_INDEX), index, sanitize_overflow=False))
        noise = _hash(_wrapping(place, HASH_INDEX) ^ seed)

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
    """This program's row, its entry in `addresses`, first element, number of elements, and whether these are BLOCK and aligned."""
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
    """Steps all rows. If there is `lr`, a pointer, it replaces `rate`, and `decay` is the weight decay that it multiplies."""
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
    agree = _sign(tl.fma(g, rest1, beta1 * m)) * g > 0  # beyond the end g is 0
    return tl.sum(tl.ravel(agree.to(tl.int32)), 0)


# ---- launches --------------------------------------------------------------------------------------------------------

_kept_for_graphs: list[Tensor] = []  # memory whose address a CUDA graph holds, for good: there is no sign of when the graph is destroyed


class Table(NamedTuple):
    """Tells a launch where its tensors are, as long as they stay there."""

    addresses: Tensor  # int64 [rows, COLUMNS]
    numbers: "array[int]"  # the same on the CPU, row after row
    flags: "array[int]"  # the column FLAGS, if all gradients are aligned
    chunks: Tensor  # int32 [programs, 2]: row, and block within it
    sizes: tuple[int, ...]  # elements of the rows; chunks depend on nothing else
    dtypes: tuple[torch.dtype, ...]  # of parameters, gradients and momenta
    spares: list[Tensor]  # pinned memory for the addresses of later captured steps, one for each


def make_table(rows: Sequence[Any], before: Table | None = None, *, capturable: bool = False) -> Table:
    """The table of these rows (kdfast.ops.lion.rows.Row).

    Args:
        rows: of one device and the same dtypes; the tensors of a row fill memory without gaps, all in the same order of dimensions.
        before: a table of the same optimizer; where sizes are the same its chunks are kept.
        capturable: a step with other gradients may be captured in a CUDA graph later.

    Raises:
        RuntimeError: a CUDA graph is being captured, and there was no step before that could have prepared for it.
    """
    device = rows[0].param.device
    sizes = tuple(row.param.numel() for row in rows)
    dtypes = rows[0].param.dtype, rows[0].grad.dtype, rows[0].momentum.dtype
    numbers, flags = _describe(rows, sizes)
    on_host = _as_tensor(numbers)
    if device.type != "cuda":
        return Table(on_host, numbers, flags, _chunks(sizes), sizes, dtypes, [])
    if before is not None and before.sizes != sizes:
        before = None
    if torch.cuda.is_current_stream_capturing():
        if before is None or not before.spares:
            raise RuntimeError(
                f"Lion: a step that a CUDA graph captures needs a step before the capture, with capturable=True and these parameters, "
                f"which prepares for {SPARES} captured steps"
            )
        # the graph copies from here whenever it is replayed, so this memory is never written again
        pinned = before.spares.pop().copy_(on_host)
        _kept_for_graphs.extend((pinned, before.chunks))
        return Table(pinned.to(device, non_blocking=True), numbers, flags, before.chunks, sizes, dtypes, before.spares)
    # PyTorch does not hand out pinned memory again before the copy has ended
    addresses = on_host.pin_memory().to(device, non_blocking=True)
    chunks = before.chunks if before is not None else _chunks(sizes).pin_memory().to(device, non_blocking=True)
    count = SPARES if capturable else 0
    spares = torch.empty(count, *on_host.shape, dtype=torch.int64, device="cpu", pin_memory=True)
    return Table(addresses, numbers, flags, chunks, sizes, dtypes, list(spares))


def move_gradients(table: Table, addresses: Sequence[int]) -> None:
    """Writes other addresses of the gradients into the table; not while a CUDA graph is captured."""
    _set_gradients(table.numbers, table.flags, addresses)
    if table.addresses.is_cuda:  # on a CPU it is the memory of `numbers`
        table.addresses.copy_(_as_tensor(table.numbers).pin_memory(), non_blocking=True)


def _describe(rows: Sequence[Any], sizes: Sequence[int]) -> "tuple[array[int], array[int]]":
    """The numbers and flags of a table."""
    numbers, flags = array("q"), array("q")
    for row, size in zip(rows, sizes):
        tensors = row.param, None, row.momentum, row.scale, row.compensation, row.step
        addresses = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
        aligned = not any(address % 16 for address in addresses[: STEP.value])
        flags.append(row.number << 1 | aligned)
        numbers.extend([*addresses, size, 0])
    _set_gradients(numbers, flags, [row.grad.data_ptr() for row in rows])
    return numbers, flags


def _set_gradients(numbers: "array[int]", flags: "array[int]", addresses: Sequence[int]) -> None:
    """Writes the gradients' addresses, and flags whose lowest bit says that all tensors of a row begin at multiples of 16 bytes."""
    if reduce(or_, addresses) % 16:
        flags = array("q", [flag if address % 16 == 0 else flag & ~1 for flag, address in zip(flags, addresses)])
    numbers[GRAD.value :: COLUMNS.value] = array("q", addresses)
    numbers[FLAGS.value :: COLUMNS.value] = flags


def _as_tensor(numbers: "array[int]") -> Tensor:
    return torch.frombuffer(numbers, dtype=torch.int64).view(-1, COLUMNS.value)  # torch.tensor takes ten times as long


def _chunks(sizes: Sequence[int]) -> Tensor:
    """int32 [programs, 2]: every block of every row."""
    with torch.device("cpu"):  # whatever the default
        blocks = torch.tensor([-(-size // BLOCK) for size in sizes], dtype=torch.int64)
        rows = torch.repeat_interleave(torch.arange(len(sizes)), blocks)
        first = torch.cumsum(blocks, 0) - blocks
        return torch.stack([rows, torch.arange(len(rows)) - first[rows]], dim=1).to(torch.int32)


def step(table: Table, options: Any, grad_factor: Tensor | None, found_inf: Tensor | None) -> None:
    """Updates the rows in place.

    Args:
        table: where the rows are.
        options: kdfast.ops.lion.rows.Options. With rounding "stochastic" or int8 momenta every row has a step, with "kahan" a compensation.
        grad_factor: 0-dim, multiplies the gradients.
        found_inf: 0-dim; where it is not 0 nothing changes.
    """
    param_dtype, grad_dtype, momentum_dtype = table.dtypes
    device, beta1, beta2, decay = table.chunks.device, options.beta1, options.beta2, options.weight_decay
    lr = options.lr_on(device)
    grad_factor = None if grad_factor is None else grad_factor.to(device, torch.float32)
    found_inf = None if found_inf is None else found_inf.to(device, torch.float32)
    grid = (table.chunks.size(0),)
    gradient = {"G": _TYPES[grad_dtype], "M": _TYPES[momentum_dtype], "MAXIMIZE": options.maximize, "BLOCK": BLOCK}
    with torch.cuda.device_of(table.chunks):
        moving = None
        if options.cautious:
            moving = torch.zeros(len(table.sizes), dtype=torch.int64, device=device)
            _count_moving[grid](
                table.addresses, table.chunks, grad_factor, found_inf, moving, beta1, 1.0 - beta1,
                **gradient, num_warps=WARPS, enable_fp_fusion=True,
            )  # fmt: skip
        on_device = isinstance(lr, Tensor)
        _step[grid](
            table.addresses, table.chunks, grad_factor, found_inf, moving, lr if on_device else None,
            decay if on_device else 1.0 - lr * decay, 0.0 if on_device else lr, beta1, 1.0 - beta1, beta2, 1.0 - beta2,
            P=_TYPES[param_dtype], ROUNDING=options.rounding if param_dtype != torch.float32 else "nearest",
            **gradient, num_warps=WARPS, enable_fp_fusion=True,
        )  # fmt: skip
