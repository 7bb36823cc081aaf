"""Supervised contrastive loss: the logsumexp of a similarity matrix that is never stored, and the gradient of its rows.

Rows x_1 .. x_R: the first N are anchors, and all are columns. Column j counts c_j times: `duplicates` if j < `counted`, else once;
an anchor is in its own denominator `duplicates` - 1 times. With r_i = 1 / |x_i| (normalize; huge rows are scaled down first) or 1:

    S_ij     = r_i r_j x_i . x_j / tau
    Z_i      = sum_j c_j exp(S_ij - m_i)
    P_ij     = c_j if i and j have one name, or c_j mask[name_i, name_j]
    L_i      = scale (W_i (m_i + log Z_i) - sum_j P_ij S_ij) / d_i,   W_i = sum_j P_ij,  d_i = W_i, or 1 where W_i < 1e-6

With the upstream gradient v: h_i = v_i scale / d_i and s_i = W_i h_i / Z_i for anchors, 0 for other rows, and

    dL/dS_ij = s_i c_j exp(S_ij - m_i) - h_i P_ij =: G_ij
    dL/d(r_i x_i) = sum_j (G_ij + G_ji) r_j x_j / tau

A tile of S is computed once forward (2 N^2 D operations), and once backward, where it gives G_ij and, transposed, G_ji, and is multiplied
by the columns: 4 N^2 D. That is 6 N^2 D while a row's gradient fits in registers. Above, every slice of the gradient computes its tiles
again: (4 + 2 ceil(D / slice)) N^2 D. The slice is 256 features, and 128 for float32, for masks, and above D = 256 on Blackwell.

m_i is the running maximum of S_ij in the denominator (`online`), or 0 if exp(S) stays far inside float32's range (`direct`): |S| is at
most 1 / tau for rows of unit length, and max |x|^2 / tau for others, which a program reads from the device. Then G_ij and G_ji share
their exponential. For few rows, the columns are walked in `splits` parts, which launches of their own (`_losses`, `_finish`) add up in a
fixed order. Atomics add integers only: bits depend on the inputs alone. Names are shortened to indices of rows first, and W counted
there if there is no mask, so that a tile compares, and neither masks nor counts.

Floor: operations, see above; beyond the rows and their gradient the memory is `splits` float32 [N, D] backward and a few numbers a row.
"""

import math
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from kdfast.kernels.memory import flat

SAFE_EXPONENT = 40.0  # |S| up to here needs no maximum: sums of e^S and shares divided by them are normal float32 numbers
MANY = 4096  # anchors; from here on large tiles fill a GPU, and reading the rows' lengths first costs little beside the walk
LOG2_E = math.log2(math.e)
LOWEST = tl.constexpr(-3.4028234663852886e38)  # finite: the maximum of no entries must not make NaN
# rows with a squared length above LONG are multiplied by SHORTER, so that squares and products do not overflow; a power of two is exact
LONG, SHORTER = tl.constexpr(2.0**100), tl.constexpr(2.0**-80)


class Plan(NamedTuple):
    """How one launch walks S: tiles of `rows` x `columns`, `features` at a time, `warps` warps, `stages` loads in flight."""

    rows: int
    columns: int
    features: int
    warps: int
    stages: int

    def shared(self, D: int, size: int) -> int:
        """Returns an upper bound of a program's shared memory, in bytes, for elements of `size` bytes; compilers may need half."""
        held = self.rows if self.features >= D else 0
        moving = self.columns if self.features >= D else self.rows + self.columns
        return self.features * size * (held + 2 * self.stages * moving)


class Plans(NamedTuple):
    """The plans of both passes; `slice`: features of the gradient that a program of the backward pass computes."""

    forward: Plan
    backward: Plan
    slice: int


class Device(NamedTuple):
    """The properties of a device that plans depend on."""

    shared: int  # bytes a program may have
    tensor_memory: bool = False  # products have a memory of their own


H100 = Device(232_448)


def plans(N: int, D: int, dtype: torch.dtype, precision: str, masked: bool, device: Device = H100) -> Plans:
    """Returns the launch plans for N anchors of D features, a multiple of 8. None spills more than 24 bytes (`kdfast bench codegen`).

    Args:
        N: anchors.
        D: features.
        dtype: of the rows.
        precision: of products of float32 rows, "ieee" or "tf32".
        masked: with a mask, whose gathers need registers too.
        device: of the launch.
    """
    width = max(16, triton.next_power_of_2(D))
    if dtype == torch.float32 and precision == "ieee":
        # these products are unrolled in registers, so they must be short
        return Plans(Plan(64, 64, 16, 8, 1), Plan(64, 32, min(width, 32), 8, 1), min(width, 128))
    size = dtype.itemsize
    part = min(width, 128 // size)  # features at a time, of rows that are not held
    crowded = masked or size == 4 or device.shared < 200_000 or (device.tensor_memory and width > 256)
    limit = 128 if crowded else 256  # features of a gradient in registers
    columns = 32 if masked or device.tensor_memory else 64
    if N < MANY:
        forward = [Plan(64, 32, width, 8 if device.tensor_memory else 4, 2)]
        backward = [Plan(64, columns if width < 256 else 32, width, 4, 2), Plan(64, 32, width, 4, 2)]
    else:
        forward = [Plan(128, columns, width, 8, 2), Plan(128, 32, width, 8, 2)]
        backward = [Plan(128, 64, width, 8, 3), Plan(128, 64, width, 8, 2), Plan(128, 32, width, 8, 2)]
    if masked or size == 4:
        forward, backward = forward[-2:], backward[-1:]
    if size == 4 and device.shared < 200_000:
        backward = [Plan(64, 32, width, 8, 2)]
    if width > limit:
        narrow = Plan(64 if masked and size == 2 else 128, 32, part, 8, 2)
        forward, backward = [Plan(128, columns, part, 8, 2)], [narrow if crowded else Plan(64, 64, part, 8, 2)]
    if device.shared < 100_000:  # and 64 threads a warp
        forward, backward = [], []
    least = [Plan(64, 64, part, 4, 2), Plan(64, 32, part, 4, 2), Plan(32, 32, part, 4, 1)]
    first = [next(p for p in (*choice, *least) if p.shared(D, size) <= device.shared) for choice in (forward, backward)]
    return Plans(forward=first[0], backward=first[1], slice=min(width, limit))


def operations(N: int, D: int, slice: int) -> tuple[int, int]:
    """Counts multiplications and additions of both passes, if all rows are anchors: at least 6 N^2 D together."""
    return 2 * N**2 * D, (2 * math.ceil(D / slice) + 2) * N**2 * D


def splits(N: int, total: int, plan: Plan, slices: int, most: int) -> int:
    """Returns the number of parts for the columns, so that about 264 programs are at work: two for each multiprocessor of an H100."""
    programs = triton.cdiv(N, plan.rows) * slices
    return max(1, min(264 // max(1, programs), triton.cdiv(total, 4 * plan.columns), most))


# ---- tiles -----------------------------------------------------------------------------------------------------------


@triton.jit
def _load(x, row, inside, start, D, stride, WIDTH: tl.constexpr, INTERPRETED: tl.constexpr):
    """Loads features start .. start + WIDTH of rows of x, 0 outside."""
    feature = start + tl.arange(0, WIDTH)
    block = tl.load(x + row.to(tl.int64)[:, None] * stride + feature[None, :], mask=inside[:, None] & (feature < D)[None, :], other=0.0)
    return block.to(tl.float32) if INTERPRETED else block


@triton.jit
def _product(
    xi, xj, x, row, row_inside, col, col_inside, D, stride,
    WIDTH: tl.constexpr, WHOLE: tl.constexpr, INTERPRETED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Computes x_i . x_j of a tile; if the plan holds rows WHOLE, xi and xj are these rows."""
    if INTERPRETED:  # a GPU adds up i j and j i in one order, NumPy does not: in float64 that makes no difference
        exact = tl.zeros([row.shape[0], col.shape[0]], tl.float64)
        for start in range(0, D, WIDTH):
            a = _load(x, row, row_inside, start, D, stride, WIDTH, INTERPRETED).to(tl.float64)
            b = _load(x, col, col_inside, start, D, stride, WIDTH, INTERPRETED).to(tl.float64)
            exact = tl.dot(a, tl.trans(b), exact, out_dtype=tl.float64)
        product = exact.to(tl.float32)
    elif WHOLE:
        product = tl.dot(xi, tl.trans(xj), input_precision=PRECISION)
    else:
        product = tl.zeros([row.shape[0], col.shape[0]], tl.float32)
        for start in range(0, D, WIDTH):
            a = _load(x, row, row_inside, start, D, stride, WIDTH, INTERPRETED)
            b = _load(x, col, col_inside, start, D, stride, WIDTH, INTERPRETED)
            product = tl.dot(a, tl.trans(b), product, input_precision=PRECISION)
    return product


@triton.jit
def _rounded(S, real):
    """Returns S, if all columns are real: the choice keeps the compiler from fusing S - m into fma(product, factor, -m).

    m is the largest rounded S. A fused difference is off by up to half a unit in the last place of S: its power differs between
    passes, and overflows for a large S.
    """
    return tl.where(real[None, :], S, float("-inf"))


@triton.jit
def _bound(tops, blocks):
    """Returns the largest of `_prepare`'s bounds: an upper bound of all |S_ij|, in units of log 2."""
    most = tl.full([1024], 0.0, tl.float32)
    for start in range(0, blocks, 1024):
        at = start + tl.arange(0, 1024)
        most = tl.maximum(most, tl.load(tops + at, mask=at < blocks, other=0.0))
    return tl.max(most, 0)


@triton.jit
def _add_pairs(a, b, more_a, more_b):
    return a + more_a, b + more_b


@triton.jit
def _alike(mask, name_i, name_j, both, B):
    """Returns P without c of rows that are anchors: 1 for equal names, or the mask's weights where both rows have names."""
    if mask is None:
        P = tl.where(name_i[:, None] == name_j[None, :], 1.0, 0.0)
    else:
        at = name_i[:, None] * B + name_j[None, :]
        P = tl.load(mask + at, mask=both, other=0).to(tl.float32)
    return P


# A program walks the plain column tiles of first .. last, then the tiles that meet the diagonal or lack columns: two loops, and only the
# second (CAREFUL) compares every element's row and column.


@triton.jit
def _edges(first, last, total, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Returns the tiles at which plain ones end before the diagonal, begin again behind it, and end."""
    start = tl.program_id(0) * ROWS
    full = tl.maximum(first, tl.minimum(total // COLUMNS, last))
    meets = tl.maximum(first, tl.minimum(start // COLUMNS, full))
    passed = tl.maximum(meets, tl.minimum(tl.cdiv(start + ROWS, COLUMNS), last))
    return meets, passed, tl.maximum(full, passed)


@triton.jit
def _plain_steps(first, last, total, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    meets, passed, full = _edges(first, last, total, ROWS, COLUMNS)
    return meets - first + full - passed


@triton.jit
def _tile(step, first, last, total, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Returns the column tile of a step of the walk."""
    meets, passed, full = _edges(first, last, total, ROWS, COLUMNS)
    before, plain, diagonal = meets - first, meets - first + full - passed, passed - meets
    tile = tl.where(step < before, first + step, passed + step - before)
    return tl.where(step < plain, tile, tl.where(step < plain + diagonal, meets + step - plain, full + step - plain - diagonal))


# ---- forward ---------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["count", "counted"])
def _first_of_name(names, first, sizes, count, counted, DUPLICATES: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Stores the index of the first row of the same name, -1 from row `count` on: tiles have registers for 32 bits only.

    Adds up c_j of each name in `sizes`, at its first row.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    name = tl.load(names + row, mask=row < count, other=0)
    found = tl.where(row < count, 2147483647, 0)
    start = 0
    while (start < count) & (tl.max(found, 0) == 2147483647):
        at = start + tl.arange(0, BLOCK)
        other = tl.load(names + at, mask=at < count, other=0)
        same = (name[:, None] == other[None, :]) & (at < count)[None, :]
        found = tl.minimum(found, tl.min(tl.where(same, at[None, :], 2147483647), 1))
        start += BLOCK
    found = tl.minimum(found, row)  # NaN equals no name, so its row has no positives
    tl.store(first + row, tl.where(row < count, found, -1))
    tl.atomic_add(sizes + found, tl.where(row < counted, DUPLICATES, 1), mask=row < count, sem="relaxed")


@triton.jit
def _prepare(x, scaled, r, q, tops, rows, D, stride, to_log2, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """With normalize, stores q_i x_i, r_i = 1 / |q_i x_i| and q_i; else `tops`: these rows' largest |x|^2 / tau, in units of log 2."""
    D, stride = D // 8 * 8, stride // 8 * 8
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    squares = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(0, D, BLOCK):
        part = _load(x, row, row < rows, start, D, stride, BLOCK, True)
        squares += part * part
    size = tl.sum(squares, 1)
    if tops is not None:
        size *= to_log2
        tl.store(tops + tl.program_id(0), tl.max(tl.where(size == size, size, float("inf")), 0))
    else:
        scale = tl.where(size > LONG, SHORTER, 1.0)  # NaN stays
        squares = tl.zeros([ROWS, BLOCK], tl.float32)
        for start in range(0, D, BLOCK):
            part = _load(x, row, row < rows, start, D, stride, BLOCK, True) * scale[:, None]
            squares += part * part
            feature = start + tl.arange(0, BLOCK)
            at = scaled + row.to(tl.int64)[:, None] * D + feature[None, :]
            tl.store(at, part, mask=(row < rows)[:, None] & (feature < D)[None, :])
        length = tl.sqrt(tl.sum(squares, 1))
        tl.store(r + row, 1.0 / tl.where(length < 1e-12, 1e-12, length), mask=row < rows)
        tl.store(q + row, scale, mask=row < rows)


@triton.jit
def _sums(
    xi, x, names, mask, r, ri, name_i, row, first, last, origin,
    N, total, counted, B, D, stride, to_log2,
    DIRECT: tl.constexpr, DUPLICATES: tl.constexpr, SELF_POSITIVE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr, WHOLE: tl.constexpr,
    INTERPRETED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Returns m, Z, A = sum P S and, with a mask, W of a block of rows over column tiles first .. last, in units of log 2."""
    m = tl.full([ROWS], LOWEST, tl.float32)
    if DIRECT:
        m = tl.zeros([ROWS], tl.float32)
        if r is not None:
            m += origin  # 0; the compiler would need more registers if it knew
    Z = tl.zeros([ROWS], tl.float32)
    A = tl.zeros([ROWS], tl.float32)
    W = tl.zeros([ROWS], tl.float32)
    plain = _plain_steps(first, last, total, ROWS, COLUMNS)
    for CAREFUL in tl.static_range(2):
        for step in range(plain if CAREFUL else 0, last - first if CAREFUL else plain):
            col = _tile(step, first, last, total, ROWS, COLUMNS) * COLUMNS + tl.arange(0, COLUMNS)
            real = col < total if CAREFUL else col >= 0  # no constant, see _rounded
            xj = xi
            if WHOLE:
                xj = _load(x, col, real, 0, D, stride, WIDTH, INTERPRETED)
            S = _product(xi, xj, x, row, row < N, col, real, D, stride, WIDTH, WHOLE, INTERPRETED, PRECISION) * to_log2
            if r is not None:
                S = S * ri[:, None] * tl.load(r + col, mask=real, other=0.0)[None, :]
            name_j = tl.load(names + col)
            both = (name_i >= 0)[:, None] & (name_j >= 0)[None, :]
            itself = row[:, None] == col[None, :]
            c = tl.full([COLUMNS], 1.0, tl.float32)
            if DUPLICATES > 1:
                c = tl.where(col < counted, 1.0 * DUPLICATES, 1.0)
            P = _alike(mask, name_i, name_j, both, B)
            if DUPLICATES > 1:
                P = P * c[None, :]
            if CAREFUL and not SELF_POSITIVE:
                P = tl.where(itself, 0.0 if DUPLICATES == 1 else P * ((DUPLICATES - 1) / DUPLICATES), P)
            # infinite products of rows that are no positives count for nothing
            PS = P * S if mask is not None or DIRECT else tl.where(P != 0.0, P * S, 0.0)
            if mask is not None:
                W += tl.sum(P, 1)
            if CAREFUL:
                S = tl.where(real[None, :] & ((DUPLICATES > 1) | (row[:, None] != col[None, :])), S, float("-inf"))
            elif not DIRECT:
                S = _rounded(S, real)
            if not DIRECT:
                larger = tl.minimum(tl.maximum(m, tl.max(S, 1)), -LOWEST)  # infinities must not cancel
                Z = Z * tl.exp2(m - larger)
                m = larger
            e = tl.exp2(S - m[:, None])
            if DUPLICATES > 1:
                e = e * c[None, :]
                if CAREFUL:
                    e = tl.where(itself, e * ((DUPLICATES - 1) / DUPLICATES), e)
            if mask is None and not INTERPRETED:  # one reduction, as the second of two would be made in another layout
                more_Z, more_A = tl.reduce((e, PS), 1, _add_pairs)
                Z += more_Z
                A += more_A
            else:  # the interpreter calls _add_pairs for every element
                Z += tl.sum(e, 1)
                A += tl.sum(PS, 1)
    return m, Z, A, W


@triton.jit(do_not_specialize=["N", "total", "counted", "B", "blocks", "tiles"])
def _denominators(
    x, names, mask, r, tops, out,
    N, total, counted, B, D, stride, blocks, tiles, to_log2, limit, origin,
    DIRECT: tl.constexpr, DUPLICATES: tl.constexpr, SELF_POSITIVE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr, WHOLE: tl.constexpr,
    INTERPRETED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Stores m, Z, A and W of a block of anchors over a part of the columns, `tiles` tiles, in out [splits, 4, N]."""
    D, stride = D // 8 * 8, stride // 8 * 8
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < N
    name_i = tl.load(names + row)
    ri = tl.zeros([ROWS], tl.float32)
    if r is not None:
        ri = tl.load(r + row, mask=inside, other=0.0)
    first = tl.program_id(1) * tiles
    last = tl.minimum(first + tiles, tl.cdiv(total, COLUMNS))
    xi = row
    if WHOLE:
        xi = _load(x, row, inside, 0, D, stride, WIDTH, INTERPRETED)
    if DIRECT if tops is None else _bound(tops, blocks) <= limit:
        m, Z, A, W = _sums(
            xi, x, names, mask, r, ri, name_i, row, first, last, origin, N, total, counted, B, D, stride, to_log2,
            True, DUPLICATES, SELF_POSITIVE, ROWS, COLUMNS, WIDTH, WHOLE, INTERPRETED, PRECISION,
        )  # fmt: skip
    else:
        m, Z, A, W = _sums(
            xi, x, names, mask, r, ri, name_i, row, first, last, origin, N, total, counted, B, D, stride, to_log2,
            False, DUPLICATES, SELF_POSITIVE, ROWS, COLUMNS, WIDTH, WHOLE, INTERPRETED, PRECISION,
        )  # fmt: skip
    at = out + tl.program_id(1).to(tl.int64) * 4 * N + row
    tl.store(at, m, mask=inside)
    tl.store(at + N.to(tl.int64), Z, mask=inside)
    tl.store(at + 2 * N.to(tl.int64), A, mask=inside)
    tl.store(at + 3 * N.to(tl.int64), W, mask=inside)


@triton.jit(do_not_specialize=["N", "parts"])
def _losses(sums, names, sizes, m_out, Z_out, W_out, losses, N, parts, scale, SELF_POSITIVE: tl.constexpr, BLOCK: tl.constexpr):
    """Adds up the parts of the columns and stores the losses; with `sizes`, W is a name's size but for the anchor itself."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = row < N
    m = tl.full([BLOCK], LOWEST, tl.float32)
    for part in range(parts):
        m = tl.maximum(m, tl.load(sums + tl.cast(part, tl.int64) * 4 * N + row, mask=inside, other=LOWEST))
    Z = tl.zeros([BLOCK], tl.float32)
    A = tl.zeros([BLOCK], tl.float32)
    W = tl.zeros([BLOCK], tl.float32)
    for part in range(parts):
        at = sums + tl.cast(part, tl.int64) * 4 * N + row
        Z += tl.load(at + N, mask=inside, other=0.0) * tl.exp2(tl.load(at, mask=inside, other=LOWEST) - m)
        A += tl.load(at + 2 * N, mask=inside, other=0.0)
        W += tl.load(at + 3 * N, mask=inside, other=0.0)
    if sizes is not None:
        name = tl.load(names + row, mask=inside, other=0)
        W += (tl.load(sizes + name) - (0 if SELF_POSITIVE else 1)).to(tl.float32)
    per_log2 = 0.6931471805599453
    loss = scale * (W * (m * per_log2 + tl.log(Z)) - A * per_log2) / tl.where(W < 1e-6, 1.0, W)
    tl.store(m_out + row, m, mask=inside)
    tl.store(Z_out + row, Z, mask=inside)
    tl.store(W_out + row, W, mask=inside)
    tl.store(losses + row, loss, mask=inside)


# ---- backward --------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["N", "rows"])
def _shares(upstream, Z, W, s, h, tops, N, rows, scale, BLOCK: tl.constexpr):
    """Stores s and h, 0 from row N on; in tops, the largest of each block's |h| and |W h|."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = row < N
    w = tl.load(W + row, mask=inside, other=1.0)
    v = tl.load(upstream + row, mask=inside, other=0.0) * scale / tl.where(w < 1e-6, 1.0, w)
    tl.store(h + row, v, mask=row < rows)
    tl.store(s + row, w * v / tl.load(Z + row, mask=inside, other=1.0), mask=row < rows)
    if tops is not None:
        tl.store(tops + tl.program_id(0), tl.max(tl.abs(v) * tl.maximum(tl.abs(w), 1.0), 0))


@triton.jit
def _pulls(
    xi, x, names, mask, r, ri, name_i, mi, si, hi, ci, row, m, s, h, first, last, slice_start, per_top,
    N, rows, total, counted, B, D, stride, to_log2,
    DIRECT: tl.constexpr, DUPLICATES: tl.constexpr, SELF_POSITIVE: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, WIDTH: tl.constexpr, SLICE: tl.constexpr, WHOLE: tl.constexpr,
    INTERPRETED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Returns (G + G') r x of a block of rows over column tiles first .. last."""
    acc = tl.zeros([ROWS, SLICE], tl.float32)
    plain = _plain_steps(first, last, total, ROWS, COLUMNS)
    for CAREFUL in tl.static_range(2):
        for step in range(plain if CAREFUL else 0, last - first if CAREFUL else plain):
            col = _tile(step, first, last, total, ROWS, COLUMNS) * COLUMNS + tl.arange(0, COLUMNS)
            real = col < total
            xj = _load(x, col, real, slice_start, D, stride, SLICE, INTERPRETED)
            S = _product(xi, xj, x, row, row < rows, col, real, D, stride, WIDTH, WHOLE, INTERPRETED, PRECISION) * to_log2
            rj = tl.full([COLUMNS], 1.0, tl.float32)
            if r is not None:
                rj = tl.load(r + col, mask=real, other=0.0)
                S = S * ri[:, None] * rj[None, :]
            sj = tl.load(s + col, mask=col < N, other=0.0) * per_top
            hj = tl.load(h + col, mask=col < N, other=0.0) * per_top
            name_j = tl.load(names + col)
            both = (name_i >= 0)[:, None] & (name_j >= 0)[None, :]
            cj = tl.full([COLUMNS], 1.0, tl.float32)
            if DUPLICATES > 1:
                cj = tl.where(col < counted, 1.0 * DUPLICATES, 1.0)
            itself = row[:, None] == col[None, :]
            if CAREFUL:
                S = tl.where(real[None, :] & ((DUPLICATES > 1) | (row[:, None] != col[None, :])), S, float("-inf"))
            elif not DIRECT:
                S = _rounded(S, real)
            if DIRECT:
                G = tl.exp2(S) * (si[:, None] * cj[None, :] + ci[:, None] * sj[None, :])
            else:
                mj = tl.load(m + col, mask=col < N, other=float("inf"))
                G = tl.exp2(S - mi[:, None]) * (si[:, None] * cj[None, :]) + tl.exp2(S - mj[None, :]) * (ci[:, None] * sj[None, :])
            if mask is None:
                P = tl.where(name_i[:, None] == name_j[None, :], hi[:, None] * cj[None, :] + ci[:, None] * hj[None, :], 0.0)
            else:
                P = _alike(mask, name_i, name_j, both, B) * (hi[:, None] * cj[None, :])
                at = name_j[None, :] * B + name_i[:, None]
                P += tl.load(mask + at, mask=both, other=0).to(tl.float32) * (ci[:, None] * hj[None, :])
            if CAREFUL:
                if DUPLICATES > 1:
                    G = tl.where(itself, G * ((DUPLICATES - 1) / DUPLICATES), G)
                if not SELF_POSITIVE:
                    P = tl.where(itself, 0.0 if DUPLICATES == 1 else P * ((DUPLICATES - 1) / DUPLICATES), P)
            G = G - P
            if r is not None:
                G = G * rj[None, :]
            if INTERPRETED and x.dtype.element_ty == tl.float16:  # shows float16's range in the interpreter too
                G = G.to(tl.float16)
            acc = tl.dot(G.to(xj.dtype), xj, acc, input_precision=PRECISION)
    return acc


@triton.jit(do_not_specialize=["N", "rows", "total", "counted", "B", "blocks", "share_blocks", "tiles"])
def _gradients(
    x, names, mask, r, tops, m, s, h, share_tops, out,
    N, rows, total, counted, B, D, stride, blocks, share_blocks, tiles, to_log2, limit,
    DIRECT: tl.constexpr, DUPLICATES: tl.constexpr, SELF_POSITIVE: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, WIDTH: tl.constexpr, SLICE: tl.constexpr, WHOLE: tl.constexpr,
    INTERPRETED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Stores tau times the gradient of r x: a block of rows, a slice of features, a part of the columns, in out [splits, rows, D]."""
    D, stride = D // 8 * 8, stride // 8 * 8
    # a block holds anchors, or other rows, whose columns are only the anchors: products of other rows might be infinite
    block, of_anchors = tl.program_id(0), tl.cdiv(N, ROWS)
    begin, end, columns = block * ROWS, N, total
    if block >= of_anchors:  # the first of these blocks may begin among the anchors: rows from N on would cost registers
        begin, end, columns = (block - of_anchors + N // ROWS) * ROWS, rows, N
    row = begin + tl.arange(0, ROWS)
    anchor = row < N
    inside = (row < end) & (anchor == (block < of_anchors))
    slice_start = tl.program_id(2) * SLICE
    name_i = tl.load(names + row)
    top, per_top = 1.0, 1.0
    if share_tops is not None:  # relative to the largest share: float16 would lose small ones
        top = _bound(share_tops, share_blocks)
        top = tl.where(top > 0, top, 1.0)
        per_top = 1.0 / top
    si = tl.load(s + row, mask=anchor, other=0.0) * per_top
    hi = tl.load(h + row, mask=anchor, other=0.0) * per_top
    mi = tl.load(m + row, mask=anchor, other=float("inf"))
    ci = tl.full([ROWS], 1.0, tl.float32)
    if DUPLICATES > 1:
        ci = tl.where(row < counted, 1.0 * DUPLICATES, 1.0)
    ri = tl.zeros([ROWS], tl.float32)
    if r is not None:
        ri = tl.load(r + row, mask=inside, other=0.0)
    first = tl.program_id(1) * tiles
    last = tl.minimum(first + tiles, tl.cdiv(columns, COLUMNS))
    xi = row
    if WHOLE:
        xi = _load(x, row, inside, 0, D, stride, WIDTH, INTERPRETED)
    if DIRECT if tops is None else _bound(tops, blocks) <= limit:
        acc = _pulls(
            xi, x, names, mask, r, ri, name_i, mi, si, hi, ci, row, m, s, h, first, last, slice_start, per_top,
            N, end, columns, counted, B, D, stride, to_log2,
            True, DUPLICATES, SELF_POSITIVE, ROWS, COLUMNS, WIDTH, SLICE, WHOLE, INTERPRETED, PRECISION,
        )  # fmt: skip
    else:
        acc = _pulls(
            xi, x, names, mask, r, ri, name_i, mi, si, hi, ci, row, m, s, h, first, last, slice_start, per_top,
            N, end, columns, counted, B, D, stride, to_log2,
            False, DUPLICATES, SELF_POSITIVE, ROWS, COLUMNS, WIDTH, SLICE, WHOLE, INTERPRETED, PRECISION,
        )  # fmt: skip
    feature = slice_start + tl.arange(0, SLICE)
    at = (tl.program_id(1).to(tl.int64) * rows + row.to(tl.int64))[:, None] * D + feature[None, :]
    tl.store(out + at, acc * top, mask=inside[:, None] & (feature < D)[None, :])


@triton.jit(do_not_specialize=["begin", "end", "rows", "parts", "D_out"])
def _finish(
    sums, x, r, q, out, begin, end, rows, D, D_out, stride, parts, per_tau, V: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Stores the gradient of rows begin .. end of x: adds up the parts of the columns and differentiates the normalization."""
    D, stride, D_out = D // 8 * 8, stride // 8 * 8, D_out // V * V
    row = begin + tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < end
    ri = tl.full([ROWS], 1.0, tl.float32)
    qi = tl.full([ROWS], 1.0, tl.float32)
    along = tl.zeros([ROWS], tl.float32)
    if r is not None:
        ri = tl.load(r + row, mask=inside, other=0.0)
        qi = tl.load(q + row, mask=inside, other=1.0)
        product = tl.zeros([ROWS, BLOCK], tl.float32)
        for start in range(0, D, BLOCK):
            d = tl.zeros([ROWS, BLOCK], tl.float32)
            for part in range(parts):
                d += _load(sums, part * rows + row, inside, start, D, D, BLOCK, True)
            product += d * (_load(x, row, inside, start, D, stride, BLOCK, True) * qi[:, None])
        # a length that was clamped is constant
        along = tl.where(ri < 0.99999e12, tl.sum(product, 1) * ri * ri, 0.0)
    for start in range(0, D, BLOCK):
        d = tl.zeros([ROWS, BLOCK], tl.float32)
        for part in range(parts):
            d += _load(sums, part * rows + row, inside, start, D, D, BLOCK, True)
        if r is not None:
            x_i = _load(x, row, inside, start, D, stride, BLOCK, True) * qi[:, None]
            d = (d - x_i * along[:, None]) * ri[:, None] * qi[:, None]
        feature = start + tl.arange(0, BLOCK)
        tl.store(out + (row - begin)[:, None] * D_out + feature[None, :], d * per_tau, mask=inside[:, None] & (feature < D_out)[None, :])


# ---- launches --------------------------------------------------------------------------------------------------------


class _Call:
    """The arguments that forward and backward of one call share: the rows as the kernels read them, plans, and the bound."""

    def __init__(self, anchors: Tensor, others: Tensor, names: Tensor, mask: Tensor | None, setting: Any):
        self.N, self.total, self.features = len(anchors), len(anchors) + len(others), anchors.shape[1]
        self.rows = self.x = _readable(torch.cat([anchors, others]) if len(others) else anchors)
        self.D, self.device, self.setting = self.x.shape[1], anchors.device, setting
        self.to_log2 = LOG2_E / setting.temperature
        self.r: Tensor | None = None
        self.q: Tensor | None = None
        self.tops: Tensor | None = None
        float16 = self.x.dtype == torch.float16  # too narrow for shares divided by lengths or weights
        if setting.normalize:
            self.x = torch.empty(self.total, self.D, dtype=torch.float32 if float16 else self.x.dtype, device=self.device)
            self.r, self.q = (torch.empty(self.total, dtype=torch.float32, device=self.device) for _ in range(2))
        elif float16 and mask is not None:
            self.x = self.x.float()
        self._prepare()
        self.names, self.B = names, 0 if mask is None else len(mask)
        self.mask = None if mask is None else flat(mask.to(torch.uint8) if mask.dtype == torch.bool else mask)
        self.precision = "ieee" if anchors.dtype == torch.float32 and _is_highest() else "tf32"
        self.plans = plans(self.N, self.D, self.x.dtype, self.precision, mask is not None, _kind(self.device))
        self.direct = setting.normalize and 1 / setting.temperature <= SAFE_EXPONENT

    def _prepare(self) -> None:
        """Launches _prepare: with normalize for scaled rows and their lengths, without for bounds, if there are many rows."""
        if not self.setting.normalize and self.N < MANY:
            return
        block = min(1024, triton.next_power_of_2(self.D))
        height = 4096 // block
        blocks = triton.cdiv(self.total, height)
        if not self.setting.normalize:
            self.tops = torch.empty(blocks, dtype=torch.float32, device=self.device)
        with torch.cuda.device_of(self.rows):
            _prepare[(blocks,)](
                self.rows, self.x, self.r, self.q, self.tops, self.total, self.D, self.rows.stride(0), self.to_log2,
                ROWS=height, BLOCK=block, num_warps=4, enable_fp_fusion=True,
            )  # fmt: skip

    def launch(self, function: Any, grid: tuple[int, ...], plan: Plan, *tensors: Any, sizes: tuple[int, ...], more: dict[str, Any]) -> None:
        """Launches a walk of S."""
        setting = self.setting
        with torch.cuda.device_of(self.x):  # a launch goes to the current device, which need not be the tensors'
            function[grid](
                self.x, self.names, self.mask, self.r, self.tops, *tensors, *sizes, self.to_log2, SAFE_EXPONENT * LOG2_E,
                DIRECT=self.direct, DUPLICATES=setting.duplicates, SELF_POSITIVE=setting.self_positive,
                ROWS=plan.rows, COLUMNS=plan.columns, WIDTH=plan.features, WHOLE=plan.features >= self.D,
                INTERPRETED=knobs.runtime.interpret, PRECISION=self.precision,
                num_warps=plan.warps, num_stages=plan.stages, enable_fp_fusion=True, **more,
            )  # fmt: skip

    @property
    def shape(self) -> tuple[int, ...]:
        """Returns total, counted, B, D, stride, blocks: the kernels' arguments."""
        blocks = 0 if self.tops is None else len(self.tops)
        return self.total, self.N + self.setting.copied, self.B, self.D, self.x.stride(0), blocks


def forward(anchors: Tensor, others: Tensor, names: Tensor, mask: Tensor | None, setting: Any) -> tuple[Tensor, list[Tensor]]:
    """Returns the losses of the anchors; the host does not wait.

    Args:
        anchors: [N, D], float32, bfloat16 or float16.
        others: [M, D], rows that are columns only.
        names: [N + M'] of anchors and the first M' others: rows of one name are positives; with a mask their index in it.
        mask: [B, B] or None.
        setting: temperature, scale, duplicates, self_positive, normalize, copied.

    Returns:
        The losses [N], float32, and what backward needs: m, Z and W, [N] each, and the names, see saved_like.
    """
    short_names, sizes = _short(names, mask, len(anchors) + len(others), len(anchors) + setting.copied, setting.duplicates)
    call = _Call(anchors, others, short_names, mask, setting)
    N, plan = call.N, call.plans.forward
    parts = splits(N, call.total, plan, 1, 64)
    tiles = triton.cdiv(triton.cdiv(call.total, plan.columns), parts)
    sums = torch.empty(parts * 4 * N, dtype=torch.float32, device=call.device)
    call.launch(_denominators, (triton.cdiv(N, plan.rows), parts), plan, sums, sizes=(N, *call.shape, tiles), more={"origin": 0.0})
    losses, m, Z, W = (torch.empty(N, dtype=torch.float32, device=call.device) for _ in range(4))
    with torch.cuda.device_of(anchors):
        _losses[(triton.cdiv(N, 256),)](
            sums, short_names, sizes, m, Z, W, losses, N, parts, float(setting.scale),
            SELF_POSITIVE=setting.self_positive, BLOCK=256, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
    return losses, [m, Z, W, short_names]


def backward(
    upstream: Tensor,
    anchors: Tensor,
    others: Tensor,
    names: Tensor,
    mask: Tensor | None,
    kept: list[Tensor],
    setting: Any,
    for_others: bool,
) -> tuple[Tensor, Tensor]:
    """Returns the gradients of sum(upstream * losses) for the anchors [N, D] and the others, [M, D] or [0, D] unless for_others."""
    m, Z, W, short_names = kept
    call = _Call(anchors, others, short_names, mask, setting)
    N, plan = call.N, call.plans.backward
    float32: dict[str, Any] = {"dtype": torch.float32, "device": call.device}
    rows = call.total if for_others else N

    padded = len(short_names)
    s, h = torch.empty(padded, **float32), torch.empty(padded, **float32)
    share_blocks = triton.cdiv(padded, 256)
    share_tops = torch.empty(share_blocks, **float32) if call.x.dtype == torch.float16 else None
    with torch.cuda.device_of(anchors):
        _shares[(share_blocks,)](
            flat(upstream), Z, W, s, h, share_tops, N, padded, float(setting.scale), BLOCK=256, num_warps=4, enable_fp_fusion=True
        )

    slices = triton.cdiv(call.D, call.plans.slice)
    # the parts' gradients are this pass's memory: for many rows no more than four times the rows'
    parts = splits(rows, call.total, plan, slices, call.x.itemsize if N >= 8192 else 16)
    tiles = triton.cdiv(triton.cdiv(call.total, plan.columns), parts)
    sums = torch.empty(parts, rows, call.D, **float32)
    total, counted, B, D, stride, blocks = call.shape
    blocks_of_others = triton.cdiv(rows, plan.rows) - N // plan.rows if rows > N else 0
    grid = triton.cdiv(N, plan.rows) + blocks_of_others, parts, slices
    sizes = N, rows, total, counted, B, D, stride, blocks, share_blocks, tiles
    call.launch(_gradients, grid, plan, m, s, h, share_tops, sums, sizes=sizes, more={"SLICE": call.plans.slice})
    del call.x  # with normalize a copy, whose memory the gradient may use

    d_anchors = torch.empty(anchors.shape, dtype=anchors.dtype, device=call.device)
    d_others = torch.empty(len(others) if for_others else 0, others.shape[1], dtype=others.dtype, device=call.device)
    block = min(1024, triton.next_power_of_2(D))
    height = max(1, 2048 // block)
    for out, begin in ((d_anchors, 0), (d_others, N)):
        if len(out):
            with torch.cuda.device_of(anchors):
                _finish[(triton.cdiv(len(out), height),)](
                    sums, call.rows, call.r, call.q, out, begin, begin + len(out), rows, D, call.features, call.rows.stride(0), parts,
                    1 / setting.temperature, V=math.gcd(call.features, 8), ROWS=height, BLOCK=block, num_warps=4, enable_fp_fusion=True,
                )  # fmt: skip
    return d_anchors, d_others


def _is_highest() -> bool:
    """Tells if PyTorch multiplies float32 matrices in float32 here."""
    try:
        return torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:  # set by the newer API, and not for all devices alike
        return torch.backends.cuda.matmul.fp32_precision != "tf32"


def _readable(x: Tensor) -> Tensor:
    """Returns rows of a multiple of 8 elements that begin at multiples of 16 bytes, as 128-bit loads need: x itself or a copy."""
    x = x.resolve_neg()
    missing = max(8, -(-x.shape[1] // 8) * 8) - x.shape[1]
    if missing:
        return F.pad(x, (0, missing))
    if x.stride(1) == 1 and x.stride(0) % 8 == 0 and x.data_ptr() % 16 == 0:
        return x
    return x.clone(memory_format=torch.contiguous_format)


def saved_like(losses: Tensor, anchors: Tensor, others: Tensor, names: Tensor, mask: Tensor | None) -> list[Tensor]:
    """Makes empty tensors like those that forward returns beside the losses [N]."""
    rows = _whole_blocks(len(anchors) + len(others))
    return [*(torch.empty_like(losses) for _ in range(3)), names.new_empty(rows, dtype=_dtype_of_names(mask))]


def _whole_blocks(rows: int) -> int:
    """Rounds a number of rows up to whole blocks of every plan."""
    return (rows + 127) // 128 * 128


def _dtype_of_names(mask: Tensor | None) -> torch.dtype:
    """The dtype of the names that forward saves: 64-bit where offsets into the mask pass 2^31."""
    return torch.int32 if mask is None or mask.numel() < 2**31 else torch.int64


def _short(names: Tensor, mask: Tensor | None, rows: int, counted: int, duplicates: int) -> tuple[Tensor, Tensor | None]:
    """Returns names of 32 bits for whole blocks of rows, -1 for rows without, and the sum of c_j of each name, at its first row.

    They are indices into the mask, and then there are no sums, or the index of the first row of that name.
    """
    size = _whole_blocks(rows)
    if mask is not None:
        return F.pad(names.to(_dtype_of_names(mask)), (0, size - len(names)), value=-1), None
    first, sizes = torch.empty(size, dtype=torch.int32, device=names.device), torch.zeros(size, dtype=torch.int32, device=names.device)
    with torch.cuda.device_of(names):
        _first_of_name[(size // 64,)](
            names.contiguous(), first, sizes, len(names), counted,
            DUPLICATES=duplicates, ROWS=64, BLOCK=128, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
    return first, sizes


@cache
def _kind(device: torch.device) -> Device:
    """Returns the properties of the device that plans depend on; without a GPU, an H100's."""
    if device.type != "cuda":
        return H100
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        return Device(properties.shared_memory_per_block)
    return Device(getattr(properties, "shared_memory_per_block_optin"), properties.major == 10)  # noqa: B009  # unknown to mypy
