"""The Lion step in PyTorch operations: for one row, or for many through torch._foreach_*.

Rounding: round(b1 m), then one fused multiply-add with (1 - b1) g, as torch's mul and add(alpha=) do, in that order. Float32
results are lion-pytorch's bit for bit, except that sign(NaN) is NaN: torch.sign maps NaN to 0, and a parameter whose gradient
is NaN would silently keep its value. bfloat16 and float16 tensors are computed in float32 and rounded once, when stored.
"""

import math
from typing import Any

import torch
from torch import Tensor

from kdfast.kernels.lion_constants import HASH_FIRST, HASH_INDEX, HASH_SECOND
from kdfast.ops.lion.int8 import decode, encode, unflatten
from kdfast.ops.lion.rows import LOW_PRECISION, Options, Row, is_readable, is_sharded
from kdfast.ops.precision import arithmetic


def grad_norm(grads: list[Tensor]) -> Tensor:
    """The L2 norm of all gradients together, 0-dim, on the first one's device; 16-bit gradients are summed in float32."""
    dtype = arithmetic(*grads)
    whole = [g for g in grads if not hasattr(g, "full_tensor")]
    sharded = [g.to(dtype) for g in grads if hasattr(g, "full_tensor")]  # DTensors, whose norm takes no dtype
    norms = list(torch._foreach_norm(whole, 2, dtype=dtype)) if whole else []
    parts: Any = torch._foreach_norm(sharded, 2) if sharded else ()
    norms += [part.full_tensor() for part in parts]
    return torch.linalg.vector_norm(torch.stack([n.to(grads[0].device) for n in norms]))


def update(rows: list[Row], options: Options, grad_factor: Tensor | None = None, found_inf: Tensor | None = None) -> None:
    """Steps rows that share device and dtypes, in place.

    Args:
        rows: at least one; if there are several, none shares memory with another or has its negative bit set.
        options: for all of them.
        grad_factor: 0-dim; multiplies the gradients.
        found_inf: 0-dim; where it is not 0 nothing changes.
    """
    params = [row.param for row in rows]
    dtype, device = arithmetic(params[0]), params[0].device
    found_inf = None if found_inf is None else found_inf.to(device)
    keep = found_inf is not None  # the old values are needed until it is known that they may go
    ps = [p.resolve_neg().to(dtype, copy=keep) for p in params]
    ms = [decode(row.momentum, row.scale) if row.scale is not None else row.momentum.resolve_neg().to(dtype, copy=keep) for row in rows]
    gs = [row.grad.to(dtype) for row in rows]
    if grad_factor is not None:
        gs = list(torch._foreach_mul(gs, grad_factor.to(device, dtype)))
    compensations = [row.compensation for row in rows if row.compensation is not None]
    if compensations:
        ps = [p + c.to(dtype) for p, c in zip(ps, compensations)]
    _compute(ps, gs, ms, options, [row.whole for row in rows])

    noises = [None if row.step is None else make_noise(row) for row in rows]
    if rows[0].scale is not None:
        codes, scales = zip(*(encode(m, noise) for m, noise in zip(ms, noises)))
        _store([row.scale for row in rows if row.scale is not None], list(scales), found_inf)
        ms = list(codes)
    _store([row.momentum for row in rows], ms, found_inf)
    if compensations:
        stored = [p.to(params[0].dtype) for p in ps]
        _store(compensations, [p - s.to(dtype) for p, s in zip(ps, stored)], found_inf)
        ps = stored
    elif options.rounding == "stochastic" and params[0].dtype in LOW_PRECISION:
        ps = [round_stochastically(p, params[0].dtype, noise) for p, noise in zip(ps, noises) if noise is not None]
    _store(params, ps, found_inf)


def _compute(ps: list[Tensor], gs: list[Tensor], ms: list[Tensor], options: Options, wholes: list[Any]) -> None:
    """The formula, in place on ps and ms; operation by operation what lion-pytorch computes."""
    _, beta1, beta2, weight_decay, maximize, _, cautious, *_ = options
    lr = options.lr_on(ps[0].device)
    ascent = -1.0 if maximize else 1.0
    updates = list(torch._foreach_mul(ms, beta1))
    torch._foreach_add_(updates, gs, alpha=ascent * (1.0 - beta1))
    updates = _signs(updates)
    if cautious:
        updates = [_align(u, ascent * g, whole) for u, g, whole in zip(updates, gs, wholes)]
    if weight_decay:
        torch._foreach_mul_(ps, 1.0 - lr * weight_decay)
    if isinstance(lr, Tensor):
        torch._foreach_sub_(ps, torch._foreach_mul(updates, lr))
    else:
        torch._foreach_add_(ps, updates, alpha=-lr)
    torch._foreach_mul_(ms, beta2)
    torch._foreach_add_(ms, gs, alpha=ascent * (1.0 - beta2))


def _signs(xs: list[Tensor]) -> list[Tensor]:
    """sign(x), and NaN where x is NaN; may write into xs."""
    # one read of a tensor costs less than the masks; an infinity may make a NaN in the sum, which only takes the longer way
    if is_readable(xs[0]) and all(math.isfinite(x.sum().item()) for x in xs):
        torch._foreach_sign_(xs)
        return xs
    return [torch.where(x.isnan(), x, x.sign()) for x in xs]


def _align(update: Tensor, grad: Tensor, whole: Any) -> Tensor:
    """The cautious update (arXiv:2411.16085): zero where it disagrees with the gradient, the rest scaled up to keep the mean step."""
    mask = (update * grad > 0).to(update.dtype)
    share = mask.mean() if whole is None else _sum_over_shards(mask.sum(), whole) / whole.numel()
    return update * (mask / share.clamp(min=1e-5))


def _sum_over_shards(local: Tensor, whole: Any) -> Tensor:
    """The sum of a number that every process has for its shard of a DTensor."""
    from torch.distributed.tensor import DTensor, Partial, Replicate

    partial = [Partial() if is_sharded(placement) else Replicate() for placement in whole.placements]
    return DTensor.from_local(local, whole.device_mesh, partial, run_check=False).full_tensor()


def _store(destinations: list[Tensor], values: list[Tensor], found_inf: Tensor | None) -> None:
    """Copies values, rounded to the nearest of the destinations' dtype, unless found_inf."""
    if values[0] is destinations[0]:
        return  # computed in place
    if found_inf is not None:
        values = [torch.where(found_inf != 0, d, v.to(d.dtype)) for d, v in zip(destinations, values)]
    if len(values) == 1:  # its negative bit may be set, which _foreach_copy_ refuses
        destinations[0].copy_(values[0])
    else:
        torch._foreach_copy_(destinations, values)


# ---- random rounding -------------------------------------------------------------------------------------------------


def make_noise(row: Row) -> Tensor:
    """32 random bits for each element, int32 [numel] in the order of the parameter's memory; rounding takes those it needs.

    They hash the step, the parameter's number and the element's place, and are no draw from torch's generator, whose state differs
    from rank to rank: replicas of a data-parallel run round alike and stay equal.
    """
    assert row.step is not None
    index = torch.arange(row.param.numel(), device=row.param.device).to(torch.int32)
    return _hash((index * HASH_INDEX) ^ _hash(row.step.to(torch.int32) * HASH_INDEX + row.number))


def _hash(x: Tensor) -> Tensor:
    """32 well-mixed bits of an int32 tensor, which wraps around (two rounds of xor-shift and multiply)."""
    x = x ^ ((x >> 16) & 0xFFFF)
    x = x * HASH_FIRST
    x = x ^ ((x >> 15) & 0x1FFFF)
    x = x * HASH_SECOND
    return x ^ ((x >> 16) & 0xFFFF)


def round_stochastically(x: Tensor, dtype: torch.dtype, noise: Tensor) -> Tensor:
    """Rounds float32 x to bfloat16 or float16, up or down with probabilities that make the expectation x.

    A random number below the last kept bit is added to the magnitude, then the dropped bits are cleared.
    """
    dropped = 16 if dtype == torch.bfloat16 else 13
    noise = unflatten(noise, x) & (2**dropped - 1)
    rounded = ((x.view(torch.int32) + noise) & -(2**dropped)).view(torch.float32)
    if dtype == torch.float16:  # below 2^-14 its last bit is always 2^-24
        rounded = torch.where(x.abs() < 2.0**-14, torch.floor(x * 2.0**24 + noise * 2.0**-13) * 2.0**-24, rounded)
    return torch.where(x.isfinite(), rounded, x).to(dtype)
