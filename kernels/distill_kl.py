"""Logit distillation: a row's loss over K teachers, and its gradients in the same pass.

A row of C logits x, at temperature T; arithmetic is float32 for every input dtype:

    d        x - max x
    u        d / T, or with standardize d / width, width = T (sd + eps), sd unbiased: the mean cancels in the softmax. Masked classes
             (see kdfast.reference.masked) have no part in mean and sd; C is the number of the others there
    p, q     softmax(u_teacher), softmax(u_student)
    loss     sum_k w_k D(p_k, q) + ce_weight CE(x_student, label), w_k with kd_weight and T^2
    r        log p - log q
    D        forward    KL(p || q) = sum p r + q - p = sum p (r + exp(-r) - 1): q - p adds 0 and cancels rounding
             reverse    KL(q || p), likewise
             js         with h = log cosh(r / 2):  sum p (r/2 - h) / 2 - q (r/2 + h) / 2
    dD/du    a - s sum(a), s the softmax of the differentiated side and a its terms of D (forward in the student: q - p)
    dL/dx    g = w dD/du: g / T, or with standardize, c = d - mean:  [g - c sum(g c) / ((sd + eps) sd (C - 1))] / width
    CE       the same row at temperature 1

Floor, with 1 + K tensors of b bytes an element: (1 + K) N C b to read, and N C b for each gradient to write. Rows that fit in
registers are read once, and the traffic is the floor. Longer rows (C > 8192, or 4096 with many teachers) are read two to four times
(`reads`); device memory is read once if all rows in flight fit in the second-level cache.

The forward pass is one launch: the last program to finish adds up the others' losses, in a fixed order. The same launch writes the
gradients, for an upstream gradient of 1; the launch of the backward pass (`rescale`) returns at once if it is 1. A mean needs the number
of rows that are not ignored. For long rows and 16-bit gradients, which are to be rounded once, they are counted first. For short rows,
where launches dominate, the number is known at the end, and `rescale` also multiplies by `remaining` = N / number.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor


class Plan(NamedTuple):
    """How one launch covers [N, C]: `rows` rows a program, `block` columns at a time, `warps` warps."""

    rows: int
    block: int
    warps: int

    def resident(self, C: int) -> bool:
        """Whether a program holds its rows in registers; otherwise it loops over them."""
        return self.block >= C


def is_heavy(K: int, wanted: Sequence[bool]) -> bool:
    """Whether a program needs the registers of several teachers, or of a teacher's gradient."""
    return K > 1 or any(wanted[1:])


def plan(C: int, heavy: bool) -> Plan:
    """The launch plan for rows of C classes; none spills more than a few bytes of registers.

    Rows that fit in registers get 8 elements a thread (16 in the longest). Longer rows get one large program on each multiprocessor,
    because the second-level cache can keep only few rows between two reads.
    """
    longest = 4096 if heavy else 8192
    if longest < C:
        return Plan(1, 2048, 8) if heavy else Plan(1, 4096, 16)
    block = triton.next_power_of_2(C)
    return Plan(max(1, 1024 // block), block, max(4, min(16, block // 256)))


COUNTED = 65_536  # rows that one program counts faster than PyTorch's operators start
FEW_CLASSES = tl.constexpr(128)  # see _to_logits
MASKED = tl.constexpr(-(2.0**24))  # see kdfast.reference.masked
ORDINARY = tl.constexpr(1e7)  # the norm of a row in which a class is masked, or whose squares overflow, is larger, infinite or NaN


def is_general(divergence: str, wanted: Sequence[bool]) -> bool:
    """Whether a wanted gradient is not linear in the probabilities: only the student's gradient of forward KL is linear."""
    return (divergence != "forward" and any(wanted)) or any(wanted[1:])


def reads(C: int, K: int, wanted: Sequence[bool], *, standardize: bool, divergence: str) -> int:
    """How many times a tensor [N, C] is read by `loss_and_gradients`; 1 + K is the least. Walked rows with masked classes take 3 more."""
    if plan(C, is_heavy(K, wanted)).resident(C):
        return 1 + K
    loops = 2 + (standardize and K > 0)  # over the student and every teacher
    return loops * (1 + K) + 2 * K * is_general(divergence, wanted)  # the student beside each teacher


# ---- a row's mathematics ---------------------------------------------------------------------------------------------


@triton.jit
def _log_cosh(x):
    # near 0 the closed form is the difference of two nearly equal numbers
    s = x * x
    series = s * (0.5 - s * (1 / 12 - s * (1 / 45 - s * (17 / 2520 - s * (31 / 14175)))))
    x = tl.abs(x)
    return tl.where(x < 0.4, series, x + tl.log(1.0 + tl.exp(-2.0 * x)) - 0.6931471805599453)


@triton.jit
def _log_quotient(x, y):
    # near 1 (the rows are alike) the rounding of x / y costs its logarithm most digits
    s = (x - y) / (x + y)
    t = s * s
    series = 2.0 * s * (1.0 + t * (1 / 3 + t * (1 / 5 + t * (1 / 7 + t * (1 / 9)))))
    return tl.where(tl.abs(s) < 0.2, series, tl.log(x / y))


@triton.jit
def _kl(r, p, q):
    """Terms of KL(p || q), those without q - p, and q - p; r = log p - log q."""
    # a class of probability 0 adds 0, even if its logarithm is infinite
    a = p * tl.where(p == 0.0, 0.0, r)
    # r + exp(-r) - 1 by its series: its terms are small, so errors of r and of the sums of p and q cancel
    series = r * r * (1 / 2 - r * (1 / 6 - r * (1 / 24 - r * (1 / 120 - r * (1 / 720 - r * (1 / 5040 - r / 40320))))))
    near = tl.abs(r) < 0.5
    # not q - p: p and q are products, whose fused difference is not 0 where they are equal
    return tl.where(near, p * series, a + (q - p)), a, tl.where(near, p * series - a, q - p)


@triton.jit
def _divergence(r, p, q, DIVERGENCE: tl.constexpr):
    """Elementwise, with r = log p - log q: terms of the divergence, and a_p, a_q (see D above)."""
    if DIVERGENCE == "forward":
        terms, a_p, a_q = _kl(r, p, q)
    elif DIVERGENCE == "reverse":
        terms, a_q, a_p = _kl(-r, q, p)
    else:
        r = tl.where((p == 0.0) & (q == 0.0), 0.0, r)
        # beyond 80 the smaller probability is negligible; NaN passes both comparisons
        r = tl.where(r > 80.0, 80.0, tl.where(r < -80.0, -80.0, r))
        h = _log_cosh(0.5 * r)
        a_p = 0.5 * p * (0.5 * r - h)
        a_q = -0.5 * q * (0.5 * r + h)
        terms = a_p + a_q
    return terms, a_p, a_q


@triton.jit
def _label(labels, row, present, C, ignore_index, scale):
    """The row's label, whether the row is ignored, and its scale: NaN if the label is out of range."""
    label = tl.load(labels + row, mask=present, other=0)
    ignored = label == ignore_index
    return label, ignored, tl.where((label < 0) | (label >= C), float("nan"), scale)


@triton.jit
def _add_up(partial, counts, total, remaining, arrivals, N, loss, count, COUNT: tl.constexpr):
    """Stores this program's loss and number of rows; the last program to arrive adds up all, in the order of the rows."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    tl.store(partial + program, loss)
    if COUNT:
        tl.store(counts + program, count)
    tl.debug_barrier()
    if tl.atomic_add(arrivals, 1) == programs - 1:  # acquire and release: the others' stores are visible
        at = tl.arange(0, 1024)
        losses = tl.zeros([1024], tl.float32)
        count_sums = tl.zeros([1024], tl.int64)
        for start in range(0, programs, 1024):
            losses += tl.load(partial + start + at, mask=start + at < programs, other=0.0)
            if COUNT:
                count_sums += tl.load(counts + start + at, mask=start + at < programs, other=0)
        result = tl.sum(losses, 0)
        if COUNT:
            factor = 1.0 * N / tl.maximum(tl.sum(count_sums, 0), 1).to(tl.float32)
            tl.store(remaining, factor)
            result *= factor
        tl.store(total, result)
        tl.store(arrivals, 0)  # as the next launch expects it


# ---- rows in registers -----------------------------------------------------------------------------------------------


# The compiler computes equal expressions once and keeps the result, at a register an element. No two expressions below are equal.


@triton.jit
def _cut(top):
    """The largest x - top that is masked."""
    return tl.maximum(tl.abs(top), 1.0) * MASKED


@triton.jit
def _odd_moments(d, counts):
    """The mean and the norm of rows with masked classes, or whose squares overflow, and how many classes count."""
    n = tl.sum(counts.to(tl.float32), 1, keep_dims=True)
    d = tl.where(counts, d, 0.0)
    size = tl.maximum(tl.max(tl.abs(d), 1, keep_dims=True), 1.0)
    mean = tl.sum(d * (1.0 / size), 1, keep_dims=True) / n
    centred = tl.where(counts, d * (1.0 / size) - mean, 0.0)
    return mean * size, tl.sqrt(tl.sum(centred * centred, 1, keep_dims=True)) * size, n


@triton.jit
def _temper(d, real, top, C, T, eps, STANDARDIZE: tl.constexpr):
    """Of rows d = x - top [ROWS, BLOCK], 0 beyond C: what _to_logits needs, 1 / width, softmax, and its denominator.

    The first are the mean of d; (C - 1) sd, negative in odd rows, which have masked classes or squares that overflow; if there are such.
    """
    mean, spread, per_width, odd = T, T, 1.0 / T, False
    if STANDARDIZE:
        mean = tl.sum(d, 1, keep_dims=True) / C
        centred = tl.where(real, d - mean, 0.0)
        norm = tl.sqrt(tl.sum(centred * centred, 1, keep_dims=True))
        sd, spread = norm / tl.sqrt(C - 1.0), norm * tl.sqrt(C - 1.0)
        ordinary = norm < ORDINARY
        odd = tl.min(ordinary.to(tl.int32)) == 0
        if odd:
            odd_mean, odd_norm, n = _odd_moments(d, real & ~(d <= _cut(top)))  # NaN counts
            root = tl.sqrt(tl.maximum(n - 1.0, 1.0))
            mean, sd = tl.where(ordinary, mean, odd_mean), tl.where(ordinary, sd, odd_norm / root)
            spread = tl.where(ordinary, spread, -tl.maximum(odd_norm, 1e-37) * root)
        per_width = 1.0 / (T * (sd + eps))
    e = tl.where(real, tl.exp(d * per_width), 0.0)
    Z = tl.sum(e, 1, keep_dims=True)
    return (mean, spread, odd), per_width, e * (1.0 / Z), Z


@triton.jit
def _to_logits(g, d, real, top, moments, per_width, C, T, STANDARDIZE: tl.constexpr):
    """dL/dx from dL/du, which is 0 beyond C and adds up to 0."""
    if STANDARDIZE:
        mean, spread, odd = moments
        c = d - mean
        rounding = tl.zeros(d.shape, tl.float32)
        if d.shape[1] <= FEW_CLASSES:  # the rounding of the sum counts once it is divided by a row's width
            rounding = tl.where(real, tl.sum(g, 1, keep_dims=True) / C, 0.0)
        if odd:
            masked = (spread < 0) & (d <= _cut(top))
            c = tl.where(masked, 0.0, c)
            rounding = tl.where(masked, 0.0, rounding)
        g = g - rounding
        # 0 / 1e-37 in a constant row: it has no direction to grow in
        along = tl.sum(g * c, 1, keep_dims=True) / tl.maximum(tl.abs(spread), 1e-37) * (per_width * T)
        g = g - c * along
    return g * per_width


@triton.jit(do_not_specialize=["N", "C", "strides", "ignore_index"])  # V holds the divisibility that matters
def _resident(
    logits, gradients, labels, upstream, factor, losses, partial, counts, total, remaining, arrivals,
    N, C, strides, T, eps, weights, ce_weight, smoothing, ignore_index, scale,
    STANDARDIZE: tl.constexpr, DIVERGENCE: tl.constexpr, CE: tl.constexpr, ROWWISE: tl.constexpr,
    V: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # x // V * V changes no value; it tells the compiler the divisibility that wide accesses need
    C = C // V * V
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]  # int64: row * stride may pass 2^31
    col = tl.arange(0, BLOCK)[None, :]
    present, real = row < N, col < C
    inside = present & real

    scale = tl.zeros([ROWS, 1], tl.float32) + scale
    if upstream is not None:
        scale *= tl.load(upstream + (row if ROWWISE else 0 * row), mask=present, other=0.0)
    if factor is not None:
        scale *= tl.load(factor)
    if labels is not None:
        label, ignored, scale = _label(labels, row, present, C, ignore_index, scale)

    x = tl.load(logits[0] + row * (strides[0] // V * V) + col, mask=inside, other=0.0).to(tl.float32)
    top_q = tl.max(tl.where(real, x, float("-inf")), 1, keep_dims=True)
    d = tl.where(real, x - top_q, 0.0)
    loss = tl.zeros([ROWS, 1], tl.float32)
    g = tl.zeros([ROWS, BLOCK], tl.float32)

    if len(logits) > 1:
        moments_q, per_width_q, q, Z_q = _temper(d, real, top_q, C, T, eps, STANDARDIZE)
        for k in tl.static_range(1, len(logits)):
            t = tl.load(logits[k] + row * (strides[k] // V * V) + col, mask=inside, other=0.0).to(tl.float32)
            top_p = tl.max(tl.where(real, t, float("-inf")), 1, keep_dims=True)
            t = tl.where(real, t - top_p, 0.0)
            moments_p, per_width_p, p, Z_p = _temper(t, real, top_p, C, T, eps, STANDARDIZE)
            r = (t * (per_width_p / per_width_q) - d) * per_width_q - _log_quotient(Z_p, Z_q)
            terms, a_p, a_q = _divergence(r, p, q, DIVERGENCE)
            loss += weights[k - 1] * tl.sum(terms, 1, keep_dims=True)
            if gradients[0] is not None:
                if DIVERGENCE != "forward":
                    a_q -= q * tl.sum(a_q, 1, keep_dims=True)
                g += weights[k - 1] * a_q
            if gradients[k] is not None:
                if DIVERGENCE != "reverse":
                    a_p -= p * tl.sum(a_p, 1, keep_dims=True)
                a_p = weights[k - 1] * scale * _to_logits(a_p, t, real, top_p, moments_p, per_width_p, C, T, STANDARDIZE)
                if labels is not None:
                    a_p = tl.where(ignored, 0.0, a_p)
                tl.store(gradients[k] + row * C + col, a_p, mask=inside)
        if gradients[0] is not None:
            g = _to_logits(g, d, real, top_q, moments_q, per_width_q, C, T, STANDARDIZE)

    if CE:
        e = tl.where(real, tl.exp(d), 0.0)
        Z = tl.sum(e, 1, keep_dims=True)
        hit = col == label
        entropy = (1.0 - smoothing) * (tl.log(Z) - tl.sum(tl.where(hit, d, 0.0), 1, keep_dims=True))
        if smoothing != 0:
            entropy += smoothing * (tl.log(Z) - tl.sum(d, 1, keep_dims=True) / C)
        loss += ce_weight * entropy
        g += ce_weight * (e * (1.0 / Z) - smoothing / C - tl.where(hit, 1.0 - smoothing, 0.0))

    loss *= scale
    if gradients[0] is not None:
        g *= scale
        if labels is not None:
            g = tl.where(ignored, 0.0, g)
        tl.store(gradients[0] + row * C + col, g, mask=inside)
    if labels is not None:
        loss = tl.where(ignored, 0.0, loss)
    if losses is not None:
        tl.store(losses + row, loss, mask=present)
    if total is not None:
        count = 0
        if remaining is not None:
            count = tl.sum(tl.where(present & (label != ignore_index), 1, 0))
        _add_up(partial, counts, total, remaining, arrivals, N, tl.sum(tl.where(present, loss, 0.0)), count, remaining is not None)


# ---- rows too long for registers -------------------------------------------------------------------------------------


@triton.jit
def _load(x, start, C, BLOCK: tl.constexpr):
    """BLOCK elements of the row at x from start on, -inf beyond C."""
    col = start + tl.arange(0, BLOCK)
    return tl.load(x + col, mask=col < C, other=float("-inf")).to(tl.float32)


@triton.jit
def _moments(x, C, BLOCK: tl.constexpr):
    """The maximum, the mean and the norm of x - mean of the row at x: Welford in each lane, combined at the end (Chan)."""
    lane = tl.arange(0, BLOCK)
    top = tl.full([BLOCK], float("-inf"), tl.float32)
    mean = tl.zeros([BLOCK], tl.float32)
    squares = tl.zeros([BLOCK], tl.float32)
    seen = 0.0
    for start in range(0, C, BLOCK):
        real = start + lane < C
        t = _load(x, start, C, BLOCK)
        seen += 1.0
        top = tl.maximum(top, t)
        off = tl.where(real, t - mean, 0.0)
        mean += off / seen
        squares += off * tl.where(real, t - mean, 0.0)
    count = ((C - lane + BLOCK - 1) // BLOCK).to(tl.float32)
    whole = tl.sum(count * mean, 0) / C
    off = mean - whole
    return tl.max(top, 0), whole, tl.sqrt(tl.sum(squares + count * off * off, 0))


@triton.jit
def _odd_moments_of_row(x, top, C, BLOCK: tl.constexpr):
    """_odd_moments of the row at x, the mean of x itself; and the largest x that is masked."""
    cut = top + _cut(top)
    n = tl.zeros([BLOCK], tl.float32)
    size = tl.full([BLOCK], 1.0, tl.float32)
    for start in range(0, C, BLOCK):
        t = _load(x, start, C, BLOCK)
        n += tl.where(t <= cut, 0.0, 1.0)
        size = tl.maximum(size, tl.where(t <= cut, 0.0, tl.abs(t - top)))
    count, largest = tl.sum(n, 0), tl.max(size, 0)
    sums = tl.zeros([BLOCK], tl.float32)
    for start in range(0, C, BLOCK):
        t = _load(x, start, C, BLOCK)
        sums += tl.where(t <= cut, 0.0, (t - top) * (1.0 / largest))
    mean = tl.sum(sums, 0) / count
    squares = tl.zeros([BLOCK], tl.float32)
    for start in range(0, C, BLOCK):
        t = _load(x, start, C, BLOCK)
        off = tl.where(t <= cut, 0.0, (t - top) * (1.0 / largest) - mean)
        squares += off * off
    return mean * largest + top, tl.sqrt(tl.sum(squares, 0)) * largest, count, cut


@triton.jit
def _online(x, C, T, CE: tl.constexpr, BLOCK: tl.constexpr):
    """The maximum of the row at x, and its softmaxes' denominators at temperature T and (with CE) 1."""
    top = tl.full([], -3.4028235e38, tl.float32)  # finite: a block of only -inf must not make NaN
    Z = tl.zeros([BLOCK], tl.float32)
    Z1 = tl.zeros([BLOCK], tl.float32)
    for start in range(0, C, BLOCK):
        t = _load(x, start, C, BLOCK)
        new = tl.maximum(top, tl.max(t, 0))
        Z = Z * tl.exp((top - new) * (1.0 / T)) + tl.exp((t - new) * (1.0 / T))
        if CE:
            Z1 = Z1 * tl.exp(top - new) + tl.exp(t - new)
        top = new
    return top, tl.sum(Z, 0), tl.sum(Z1, 0)


@triton.jit
def _softmax(x, start, C, top, mean, width, cut, Z, BLOCK: tl.constexpr):
    """d, softmax and x - mean (0 beyond C and up to `cut`) of BLOCK elements of the row at x from start on."""
    t = _load(x, start, C, BLOCK)
    d = t - top
    return d, tl.exp(d * (1.0 / width)) * (1.0 / Z), tl.where(t <= cut, 0.0, t - mean)


@triton.jit
def _log_ratio(d_p, d_q, width_p, width_q, log_Z_ratio):
    """Returns log p - log q; exactly 0 for equal rows, whatever the compiler fuses."""
    return (d_p * (width_q / width_p) - d_q) * (1.0 / width_q) - log_Z_ratio


@triton.jit(do_not_specialize=["N", "C", "strides", "ignore_index"])  # V holds the divisibility that matters
@no_type_check  # mypy knows no tuples that grow
def _looped(
    logits, gradients, labels, upstream, factor, losses, partial, counts, total, remaining, arrivals,
    N, C, strides, T, eps, weights, ce_weight, smoothing, ignore_index, scale,
    STANDARDIZE: tl.constexpr, DIVERGENCE: tl.constexpr, CE: tl.constexpr, ROWWISE: tl.constexpr,
    GENERAL: tl.constexpr, V: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    C = C // V * V
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    scale = 1.0 * scale
    if upstream is not None:
        scale *= tl.load(upstream + (row if ROWWISE else 0))
    if factor is not None:
        scale *= tl.load(factor)
    if labels is not None:
        label, ignored, scale = _label(labels, row, True, C, ignore_index, scale)

    K: tl.constexpr = len(logits) - 1
    rows = ()
    for j in tl.static_range(1 + K):
        rows = rows + (logits[j] + row * (strides[j] // V * V),)

    # first loop: maximum and width of each row; without standardize the softmaxes' denominators too
    tops, means, norms, roots, widths, cuts, Zs = (), (), (), (), (), (), ()
    Z1 = 1.0
    for j in tl.static_range(1 + K):
        if STANDARDIZE:
            top, mean, norm = _moments(rows[j], C, BLOCK)
            n, cut = 1.0 * C, tl.full([], float("-inf"), tl.float32)
            if not norm < ORDINARY:
                mean, norm, n, cut = _odd_moments_of_row(rows[j], top, C, BLOCK)
            root = tl.sqrt(tl.maximum(n - 1.0, 1.0))
            width = T * (norm / root + eps)
        else:
            top, Z, Z_at_1 = _online(rows[j], C, T, CE and j == 0, BLOCK)
            mean, norm, root, width, cut, Zs = 0.0, T, T, T, float("-inf"), Zs + (Z,)
            if j == 0:
                Z1 = Z_at_1
        tops, means, norms, roots = tops + (top,), means + (mean,), norms + (norm,), roots + (root,)
        widths, cuts = widths + (width,), cuts + (cut,)

    # with standardize a second loop: the denominators, and for the gradient the mean of c under q and each p
    along = 0.0
    if STANDARDIZE:
        sums_e, sums_ec = (), ()
        for _j in tl.static_range(1 + K):
            sums_e, sums_ec = sums_e + (tl.zeros([BLOCK], tl.float32),), sums_ec + (tl.zeros([BLOCK], tl.float32),)
        sum_1 = tl.zeros([BLOCK], tl.float32)
        for start in range(0, C, BLOCK):
            next_e, next_ec = (), ()
            for j in tl.static_range(1 + K):
                t = _load(rows[j], start, C, BLOCK)
                e = tl.exp((t - tops[j]) * (1.0 / widths[j]))
                if j == 0:
                    c = tl.where(t <= cuts[0], 0.0, t - means[0])
                    if CE:
                        sum_1 += tl.exp(t - tops[0])
                next_e, next_ec = next_e + (sums_e[j] + e,), next_ec + (sums_ec[j] if GENERAL else sums_ec[j] + e * c,)
            sums_e, sums_ec = next_e, next_ec
        Z1 = tl.sum(sum_1, 0)
        for j in tl.static_range(1 + K):
            Z = tl.sum(sums_e[j], 0)
            Zs = Zs + (Z,)
            mean_c = tl.sum(sums_ec[j], 0) / Z
            if j == 0:
                mean_q = mean_c
            else:
                along += weights[j - 1] * (mean_q - mean_c)
    log_Z_ratios = ()
    for k in tl.static_range(1, 1 + K):
        log_Z_ratios = log_Z_ratios + (_log_quotient(Zs[k], Zs[0]),)

    # a loop for gradients that are not linear in the probabilities: the sums over the row that they need
    sums_p, sums_q, along_p = (), (), ()
    if GENERAL:
        for k in tl.static_range(1, 1 + K):
            a_ps = tl.zeros([BLOCK], tl.float32)
            a_qs = tl.zeros([BLOCK], tl.float32)
            a_pc = tl.zeros([BLOCK], tl.float32)
            a_qc = tl.zeros([BLOCK], tl.float32)
            pc = tl.zeros([BLOCK], tl.float32)
            qc = tl.zeros([BLOCK], tl.float32)
            for start in range(0, C, BLOCK):
                d_q, q, c_q = _softmax(rows[0], start, C, tops[0], means[0], widths[0], cuts[0], Zs[0], BLOCK)
                d_p, p, c_p = _softmax(rows[k], start, C, tops[k], means[k], widths[k], cuts[k], Zs[k], BLOCK)
                r = _log_ratio(d_p, d_q, widths[k], widths[0], log_Z_ratios[k - 1])
                _, a_p, a_q = _divergence(r, p, q, DIVERGENCE)
                a_ps += a_p
                a_qs += a_q
                if STANDARDIZE:
                    a_pc += a_p * c_p
                    a_qc += a_q * c_q
                    pc += p * c_p
                    qc += q * c_q
            sum_p = 0.0 if DIVERGENCE == "reverse" else tl.sum(a_ps, 0)
            sum_q = 0.0 if DIVERGENCE == "forward" else tl.sum(a_qs, 0)
            sums_p, sums_q = sums_p + (sum_p,), sums_q + (sum_q,)
            along_p = along_p + (tl.sum(a_pc, 0) - sum_p * tl.sum(pc, 0),)
            along += weights[k - 1] * (tl.sum(a_qc, 0) - sum_q * tl.sum(qc, 0))

    # last loop: the loss and the gradients
    losses_kd = tl.zeros([BLOCK], tl.float32)
    sum_d = tl.zeros([BLOCK], tl.float32)
    hit_d = tl.zeros([BLOCK], tl.float32)
    for start in range(0, C, BLOCK):
        col = start + lane
        g = tl.zeros([BLOCK], tl.float32)
        if K > 0:
            d_q, q, c_q = _softmax(rows[0], start, C, tops[0], means[0], widths[0], cuts[0], Zs[0], BLOCK)
            for k in tl.static_range(1, 1 + K):
                d_p, p, c_p = _softmax(rows[k], start, C, tops[k], means[k], widths[k], cuts[k], Zs[k], BLOCK)
                r = _log_ratio(d_p, d_q, widths[k], widths[0], log_Z_ratios[k - 1])
                terms, a_p, a_q = _divergence(r, p, q, DIVERGENCE)
                losses_kd += weights[k - 1] * terms
                if GENERAL:
                    a_q -= q * sums_q[k - 1]
                    a_p -= p * sums_p[k - 1]
                g += weights[k - 1] * a_q
                if gradients[k] is not None:
                    if STANDARDIZE:
                        a_p -= c_p * (along_p[k - 1] / tl.maximum(norms[k], 1e-37) * (T / roots[k] / widths[k]))
                    a_p *= weights[k - 1] * scale * (1.0 / widths[k])
                    if labels is not None:
                        a_p = tl.where(ignored, 0.0, a_p)
                    tl.store(gradients[k] + row * C + col, a_p, mask=col < C)
            if STANDARDIZE:
                g -= c_q * (along / tl.maximum(norms[0], 1e-37) * (T / roots[0] / widths[0]))
            g *= 1.0 / widths[0]
        if CE:
            d = _load(rows[0], start, C, BLOCK) - tops[0]
            hit = col == label
            sum_d += tl.where(col < C, d, 0.0)
            hit_d += tl.where(hit, d, 0.0)
            g += ce_weight * (tl.exp(d) * (1.0 / Z1) - smoothing / C - tl.where(hit, 1.0 - smoothing, 0.0))
        if gradients[0] is not None:
            g *= scale
            if labels is not None:
                g = tl.where(ignored, 0.0, g)
            tl.store(gradients[0] + row * C + col, g, mask=col < C)

    loss = tl.sum(losses_kd, 0)
    if CE:
        log_Z = tl.log(Z1)
        entropy = (1.0 - smoothing) * (log_Z - tl.sum(hit_d, 0))
        if smoothing != 0:
            entropy += smoothing * (log_Z - tl.sum(sum_d, 0) / C)
        loss += ce_weight * entropy
    loss *= scale
    if labels is not None:
        loss = tl.where(ignored, 0.0, loss)
    if losses is not None:
        tl.store(losses + row, loss)
    if total is not None:
        count = 0
        if remaining is not None:
            count = tl.where(label != ignore_index, 1, 0)
        _add_up(partial, counts, total, remaining, arrivals, N, loss, count, remaining is not None)


# ---- the number of rows, and the upstream gradient --------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["N", "ignore_index"])
def _count(labels, factor, N, ignore_index, BLOCK: tl.constexpr):
    """Stores N / (rows that are not ignored); one program."""
    counts = tl.zeros([BLOCK], tl.int32)
    for start in range(0, N, BLOCK):
        at = start + tl.arange(0, BLOCK)
        counts += tl.where(tl.load(labels + at, mask=at < N, other=ignore_index) != ignore_index, 1, 0)
    tl.store(factor, 1.0 * N / tl.maximum(tl.sum(counts, 0), 1).to(tl.float32))


@triton.jit(do_not_specialize=["N", "C"])
def _rescale(gradient, upstream, remaining, N, C, ROWWISE: tl.constexpr, V: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    C = C // V * V
    factor = 1.0
    if not ROWWISE:
        factor = tl.load(upstream)
    if remaining is not None:
        factor *= tl.load(remaining)
    if ROWWISE or factor != 1.0:
        for tile in range(tl.program_id(0), tl.cdiv(N, ROWS), tl.num_programs(0)):
            row = tl.cast(tile, tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
            weight = tl.zeros([ROWS, 1], tl.float32) + factor
            if ROWWISE:
                weight *= tl.load(upstream + row, mask=row < N, other=1.0)
            for start in range(0, C, BLOCK):
                col = start + tl.arange(0, BLOCK)[None, :]
                inside = (row < N) & (col < C)
                at = gradient + row * C + col
                tl.store(at, tl.load(at, mask=inside).to(tl.float32) * weight, mask=inside)


# ---- launches --------------------------------------------------------------------------------------------------------


def loss_and_gradients(
    student: Tensor,
    teachers: Sequence[Tensor],
    labels: Tensor | None,
    options: Any,
    wanted: Sequence[bool],
    upstream: Tensor | None,
    in_graph: bool = False,
) -> tuple[Tensor, list[Tensor], Tensor | None]:
    """The loss and its gradients, times `upstream` where given; never waits for the device.

    Args:
        student: [..., C], float32, bfloat16 or float16; aligned rows of unit inner stride are read in place, others copied.
        teachers: each [..., C]; dtypes may differ.
        labels: int64 [...], or None.
        options: kd_loss's options, attributes named as its arguments; weights(K) has a weight for each teacher.
        wanted: for the student and each teacher, whether its gradient is computed.
        upstream: the gradient of the loss, float32 in the loss's shape.
        in_graph: the call is part of a compiled graph, whose memory pool must not own tensors that outlive the call.

    Returns:
        The loss, float32, [] or [...] for reduction "none"; the wanted gradients in order, each contiguous in its input's shape and
        dtype; and the factor `remaining` that `rescale` must still apply ([], float32; None: none).
    """
    shape, C, device = student.shape, student.shape[-1], student.device
    rows = [_rows(x) for x in ((student, *teachers) if options.kd_weight != 0 else (student,))]
    N, K = rows[0].shape[0], len(rows) - 1
    buffers = [torch.empty(shape, dtype=x.dtype, device=device) if need else None for need, x in zip(wanted, (student, *teachers))]
    gradients = [g for g in buffers if g is not None]
    for unread in buffers[1 + K :]:
        if unread is not None:
            unread.zero_()
    rowwise = options.reduction == "none"
    float32: dict[str, Any] = {"dtype": torch.float32, "device": device}
    loss = torch.empty(shape[:-1] if rowwise else (), **float32)
    if N == 0:
        return loss.zero_(), gradients, None

    chosen = plan(C, is_heavy(K, wanted))
    if chosen.resident(C):
        kernel, regime = _resident, {"ROWS": chosen.rows}
    else:
        kernel, regime = _looped, {"GENERAL": is_general(options.divergence, wanted)}
    programs = triton.cdiv(N, chosen.rows)
    factor = counts = remaining = None
    labels = None if labels is None else labels.reshape(-1).contiguous()
    if labels is not None and options.reduction == "mean":
        if N <= COUNTED and any(g.element_size() == 2 for g in gradients):
            factor = torch.empty((), **float32)
            with torch.cuda.device_of(student):
                _count[(1,)](labels, factor, N, options.ignore_index, BLOCK=2048, num_warps=8, enable_fp_fusion=True)
        elif C > 1024 or in_graph or upstream is not None:
            factor = (labels != options.ignore_index).sum(dtype=torch.float32).clamp_(min=1).reciprocal_().mul_(N)
        else:
            counts, remaining = torch.empty(programs, dtype=torch.int32, device=device), torch.empty((), **float32)
    weight = options.kd_weight * options.temperature**2
    with torch.cuda.device_of(student):  # a launch goes to the current device, which may not be the tensors'
        kernel[(programs,)](
            logits=tuple(rows),
            gradients=tuple(buffers[: 1 + K]),
            labels=labels,
            upstream=None if upstream is None else upstream.resolve_neg().reshape(-1).contiguous(),
            factor=factor,
            losses=loss if rowwise else None,
            partial=None if rowwise else torch.empty(programs, **float32),
            counts=counts,
            total=None if rowwise else loss,
            remaining=remaining,
            arrivals=None if rowwise else _arrivals(device, in_graph),
            N=N,
            C=C,
            strides=tuple(x.stride(0) for x in rows),
            T=float(options.temperature),  # an integer would compile another kernel
            eps=float(options.eps),
            weights=tuple(float(weight * w) for w in options.weights(len(teachers))[:K]),
            ce_weight=float(options.ce_weight),
            smoothing=float(options.label_smoothing),
            ignore_index=options.ignore_index,
            scale=1 / N if options.reduction == "mean" else 1.0,
            STANDARDIZE=options.standardize and K > 0,
            DIVERGENCE=options.divergence,
            CE=labels is not None and options.ce_weight != 0,
            ROWWISE=rowwise,
            V=_vector(C),
            BLOCK=chosen.block,
            **regime,
            num_warps=chosen.warps,
            enable_fp_fusion=True,
        )
    return loss, gradients, remaining


def rescale(gradients: Sequence[Tensor], upstream: Tensor, remaining: Tensor | None) -> None:
    """Multiplies the gradients by `upstream` [] or [...] (one number a row), and by `remaining` [] if there is one, in place."""
    for gradient in gradients:
        C = gradient.shape[-1]
        N = gradient.numel() // C
        chosen = plan(C, heavy=False)
        with torch.cuda.device_of(gradient):
            _rescale[(max(1, min(triton.cdiv(N, chosen.rows), 2048)),)](  # enough for any device; more programs would only cost their start
                gradient, upstream.resolve_neg().reshape(-1).contiguous(), remaining, N, C,
                ROWWISE=upstream.dim() > 0, V=_vector(C), ROWS=chosen.rows, BLOCK=chosen.block,
                num_warps=chosen.warps, enable_fp_fusion=True,
            )  # fmt: skip


def _vector(C: int) -> int:
    """V, the largest of 8, 4, 2, 1 that divides C. It depends on C alone, because the order of a row's sums follows from it."""
    return math.gcd(C, 8)


def _rows(x: Tensor) -> Tensor:
    """[N, C] with a unit inner stride and rows aligned for _vector(C); copied unless it is so already."""
    x = x.reshape(-1, x.shape[-1]).resolve_neg()
    V = _vector(x.shape[1])
    if x.stride(1) == 1 and (V == 1 or (x.stride(0) % V == 0 and x.data_ptr() % 16 == 0)):
        return x
    return x.clone(memory_format=torch.contiguous_format)


_counters: dict[tuple[torch.device, int], Tensor] = {}


def _arrivals(device: torch.device, in_graph: bool) -> Tensor:
    """A counter that is 0 before and after every launch; one for each stream, whose launches run one after the other."""
    if device.type != "cuda":
        return torch.zeros((), dtype=torch.int32, device=device)
    if in_graph or torch.cuda.is_current_stream_capturing():  # a graph may be replayed on any stream
        return torch.zeros((), dtype=torch.int32, device=device)
    key = device, torch.cuda.current_stream(device).cuda_stream
    if key not in _counters:
        _counters[key] = torch.zeros((), dtype=torch.int32, device=device)
    return _counters[key]
