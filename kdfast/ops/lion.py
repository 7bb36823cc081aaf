"""The Lion step over lists of tensors: choice of backend, and the PyTorch form.

    p <- p (1 - lr wd);   u = sign(b1 m + (1 - b1) g);   p <- p - lr u;   m <- b2 m + (1 - b2) g

Floor: five passes over memory (read p, g, m; write p, m), 20 bytes a float32 parameter. Seven elementwise operations in turn
would make fifteen and more. So on the CPU the PyTorch form walks the parameters in blocks that fit the cache: large tensors
are cut, small ones are gathered into one block, and every operation after the first finds its block in the cache. Elsewhere,
and under torch.compile (which fuses by itself), it is torch._foreach_* over whole lists.

Rounding: round(b1 m), then one fused multiply-add with (1 - b1) g, as torch's mul and add(alpha=) do, in that order. Float32
results are lion-pytorch's bit for bit, save that sign(NaN) is NaN: torch.sign maps NaN to 0, and a parameter whose gradient
is NaN would stand still in silence. bfloat16 and float16 tensors are computed in float32 and rounded once, when stored.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from kdfast.ops import backend

LOW_PRECISION = (torch.bfloat16, torch.float16)
ROUNDINGS = ("nearest", "stochastic", "kahan")


class Options(NamedTuple):
    """The hyper-parameters of one group; weight_decay is what lr multiplies (decoupled decay already divided by its lr)."""

    lr: float | Tensor
    beta1: float
    beta2: float
    weight_decay: float
    cautious: bool
    maximize: bool


class Row(NamedTuple):
    """One parameter, or one block of parameters: tensors of one shape."""

    param: Tensor
    grad: Tensor
    momentum: Tensor
    compensation: Tensor | None  # what the stored parameter lacks ("kahan")
    noise: Tensor | None  # the seed of this step's rounding noise ("stochastic"), 0-dim int32


def lion_step(
    rows: list[Row],
    options: Options,
    *,
    grad_factor: Tensor | None = None,
    found_inf: Tensor | None = None,
    foreach: bool | None = None,
    fused: bool | None = None,
) -> None:
    """Updates parameters, momenta and compensations in place.

    Args:
        rows: one entry a parameter; any mixture of devices, floating dtypes and strides.
        options: of the group.
        grad_factor: 0-dim; gradients are multiplied by it first (clipping, 1 / loss scale). They are not written.
        found_inf: 0-dim; where it is not 0 nothing changes, decided on the device.
        foreach: False: one tensor after the other. None or True: many at once.
        fused: True: the Triton kernel or an error. False: PyTorch. None: the kernel where the backend offers it and
            foreach is None.

    Raises:
        RuntimeError: fused is True and there is no kernel for these tensors.
    """
    for bucket in _buckets(rows):
        kernel = None
        if fused or (fused is None and foreach is None):
            kernel = backend.kernel("lion", bucket[0].param, bucket[0].grad, bucket[0].momentum)
        if kernel is not None:
            kernel.step(bucket, options, grad_factor=grad_factor, found_inf=found_inf)
        elif fused:
            param = bucket[0].param
            raise RuntimeError(
                f"Lion: fused=True needs the Triton kernel, which does not run here for {param.dtype} parameters on "
                f"{param.device.type} (backend {backend.current()!r}); leave fused=None"
            )
        else:
            _torch_step(bucket, options, grad_factor, found_inf, foreach is not False)


def grad_norm(grads: list[Tensor]) -> Tensor:
    """The L2 norm of all gradients together, 0-dim, on the first one's device; 16-bit gradients are summed in float32."""
    dtype = torch.float32 if any(g.dtype in LOW_PRECISION for g in grads) else None
    dtype = torch.float64 if any(g.dtype == torch.float64 for g in grads) else dtype
    norms = torch._foreach_norm(grads, 2, dtype=dtype)
    return torch.linalg.vector_norm(torch.stack([n.to(grads[0].device) for n in norms]))


def _buckets(rows: list[Row]) -> list[list[Row]]:
    """Rows of one device and the same dtypes together."""
    buckets: dict[tuple[torch.device, torch.dtype, torch.dtype, torch.dtype], list[Row]] = {}
    for row in rows:
        key = (row.param.device, row.param.dtype, row.grad.dtype, row.momentum.dtype)
        buckets.setdefault(key, []).append(row)
    return list(buckets.values())


# ---- the PyTorch form ------------------------------------------------------------------------------------------------


def _torch_step(rows: list[Row], options: Options, grad_factor: Tensor | None, found_inf: Tensor | None, foreach: bool) -> None:
    """One bucket. On the CPU decisions are taken by reading values, elsewhere on the device."""
    device = rows[0].param.device
    on_host = _readable(device)
    if found_inf is not None and on_host:
        if found_inf.item():
            return
        found_inf = None
    found_inf = None if found_inf is None else found_inf.to(device)
    grad_factor = None if grad_factor is None else grad_factor.to(device)
    if isinstance(options.lr, Tensor):
        options = options._replace(lr=options.lr.item() if _readable(options.lr.device) else options.lr.to(device))

    if not foreach or (on_host and options.cautious):  # a cautious step needs a mean over each whole tensor
        for row in rows:
            _update([row], options, grad_factor, found_inf)
    elif not on_host:
        _update(rows, options, grad_factor, found_inf)
    else:
        for block, offset in _cut([row for row in rows if _is_large(row)]):
            _update([block], options, grad_factor, None, offset)
        for batch in _batches([row for row in rows if not _is_large(row)]):
            if len(batch) == 1:
                _update(batch, options, grad_factor, None)
                continue
            block = _joined(batch)
            _update([block], options, grad_factor, None)
            _scatter(block, batch)


def _readable(device: torch.device) -> bool:
    """Whether values there can be read without waiting for a device or breaking a graph."""
    return device.type == "cpu" and not torch.compiler.is_compiling()


def _update(rows: list[Row], options: Options, grad_factor: Tensor | None, found_inf: Tensor | None, offset: int = 0) -> None:
    """One step of rows that share device and dtypes; `offset` is where these elements begin in their parameter."""
    params, momenta = [row.param for row in rows], [row.momentum for row in rows]
    arithmetic = torch.float64 if params[0].dtype == torch.float64 else torch.float32
    keep = found_inf is not None  # the old values are needed until it is known that they may go
    ps = [p.to(arithmetic, copy=keep) for p in params]
    ms = [m.to(arithmetic, copy=keep) for m in momenta]
    gs = [row.grad.to(arithmetic) for row in rows]
    if grad_factor is not None:
        gs = list(torch._foreach_mul(gs, grad_factor.to(arithmetic)))
    compensations = [row.compensation for row in rows if row.compensation is not None]
    if compensations:
        ps = [p + c.to(arithmetic) for p, c in zip(ps, compensations)]

    _lion(ps, gs, ms, options)

    _store(momenta, ms, found_inf)
    if compensations:
        stored = [p.to(params[0].dtype) for p in ps]
        _store(compensations, [p - s.to(arithmetic) for p, s in zip(ps, stored)], found_inf)
        ps = stored
    elif rows[0].noise is not None:
        ps = [_round_stochastically(p, row.param.dtype, row.noise, offset) for p, row in zip(ps, rows) if row.noise is not None]
    _store(params, ps, found_inf)


def _lion(ps: list[Tensor], gs: list[Tensor], ms: list[Tensor], options: Options) -> None:
    """The formula of this file's docstring, in place on ps and ms; operation by operation what lion-pytorch computes."""
    lr, beta1, beta2, weight_decay, cautious, maximize = options
    ascent = -1.0 if maximize else 1.0
    updates = list(torch._foreach_mul(ms, beta1))
    torch._foreach_add_(updates, gs, alpha=ascent * (1.0 - beta1))
    updates = _signs(updates)
    if cautious:
        updates = [_aligned(u, ascent * g) for u, g in zip(updates, gs)]
    if weight_decay:
        torch._foreach_mul_(ps, 1.0 - lr * weight_decay)
    if isinstance(lr, Tensor):
        torch._foreach_sub_(ps, torch._foreach_mul(updates, lr))
    else:
        torch._foreach_add_(ps, updates, alpha=-lr)
    torch._foreach_mul_(ms, beta2)
    torch._foreach_add_(ms, gs, alpha=ascent * (1.0 - beta2))


def _signs(xs: list[Tensor]) -> list[Tensor]:
    """sign(x) in place of x, and NaN where x is NaN."""
    if _readable(xs[0].device) and all(math.isfinite(x.sum().item()) for x in xs):  # a NaN would be in the sum; one cached read
        torch._foreach_sign_(xs)
        return xs
    return [torch.where(x.isnan(), x, x.sign()) for x in xs]


def _aligned(update: Tensor, grad: Tensor) -> Tensor:
    """The cautious update (arXiv:2411.16085): only where it agrees with the gradient, scaled up by what is left out."""
    mask = (update * grad > 0).to(update.dtype)
    return update * (mask / mask.mean().clamp(min=1e-5))


def _store(destinations: list[Tensor], values: list[Tensor], found_inf: Tensor | None) -> None:
    """Copies values, rounded to the nearest of the destinations' dtype, unless found_inf."""
    if values[0] is destinations[0]:
        return  # computed in place
    if found_inf is not None:
        values = [torch.where(found_inf != 0, d, v.to(d.dtype)) for d, v in zip(destinations, values)]
    torch._foreach_copy_(destinations, values)


# ---- blocks that fit the cache ---------------------------------------------------------------------------------------


def _block_size() -> int:
    """Elements of a block; a thread's share is 262,144, 1 MB of each p, g, m and u (measured: 2^15 to 2^19)."""
    return 262144 * torch.get_num_threads()


def _is_large(row: Row) -> bool:
    # joining copies, which pays where an operation's work is below its call; rounding noise counts from its tensor's start
    return row.param.numel() > 16384 or row.noise is not None


def _cut(rows: list[Row]) -> Iterator[tuple[Row, int]]:
    """Every row as flat blocks in the order of the parameter's memory, each with its offset."""
    for row in rows:
        param, grad = row.param, row.grad
        if grad.stride() != param.stride():
            grad = torch.empty_like(param, dtype=grad.dtype).copy_(grad)
        tensors = [t for t in (param, grad, row.momentum, row.compensation) if t is not None]
        if not _is_dense(param) or any(t.stride() != param.stride() for t in tensors):
            yield row, 0  # no common flat view: the whole tensor, by its indices
            continue
        size = _block_size()
        for i, block in enumerate(zip(*(t.as_strided((t.numel(),), (1,)).split(size) for t in tensors))):
            compensation = block[3] if len(block) > 3 else None
            yield Row(block[0], block[1], block[2], compensation, row.noise), i * size


def _is_dense(tensor: Tensor) -> bool:
    """Whether the tensor fills a stretch of memory, its dimensions in any order, without gaps or overlaps."""
    expected = 1
    for stride, size in sorted((stride, size) for stride, size in zip(tensor.stride(), tensor.shape) if size != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def _batches(rows: list[Row]) -> Iterator[list[Row]]:
    """Small rows in their order, together at most a block (or one row)."""
    batch: list[Row] = []
    room = _block_size()
    for row in rows:
        if batch and row.param.numel() > room:
            yield batch
            batch, room = [], _block_size()
        batch.append(row)
        room -= row.param.numel()
    if batch:
        yield batch


def _joined(rows: list[Row]) -> Row:
    """The rows as one flat row, element by element in the order of indices, whatever the strides."""
    compensations = [row.compensation for row in rows if row.compensation is not None]
    return Row(
        _flatten_dense_tensors([row.param for row in rows]),
        _flatten_dense_tensors([row.grad for row in rows]),
        _flatten_dense_tensors([row.momentum for row in rows]),
        _flatten_dense_tensors(compensations) if compensations else None,
        None,
    )


def _scatter(block: Row, rows: list[Row]) -> None:
    """Writes a joined and updated block back."""
    for flat, tensors in (
        (block.param, [row.param for row in rows]),
        (block.momentum, [row.momentum for row in rows]),
        (block.compensation, [row.compensation for row in rows if row.compensation is not None]),
    ):
        if flat is not None:
            torch._foreach_copy_(tensors, _unflatten_dense_tensors(flat, tensors))


# ---- stochastic rounding ---------------------------------------------------------------------------------------------


def noise_seed(step: Tensor, index: int) -> Tensor:
    """The seed of one parameter's rounding noise in one step, 0-dim int32 on step's device.

    Noise is a hash of step, parameter and element and not a draw from torch's generator, whose state differs from rank to
    rank: replicas of a data-parallel run round alike and stay equal.
    """
    return _hash(step.to(torch.int32) * 0x1E3779B1 + index)


def _hash(x: Tensor) -> Tensor:
    """32 well-mixed bits of an int32 tensor, which wraps around (two rounds of xor-shift and multiply)."""
    x = x ^ ((x >> 16) & 0xFFFF)
    x = x * 0x7FEB352D
    x = x ^ ((x >> 15) & 0x1FFFF)
    x = x * -0x7B935975  # 0x846ca68b as a signed number
    return x ^ ((x >> 16) & 0xFFFF)


def _round_stochastically(x: Tensor, dtype: torch.dtype, seed: Tensor, offset: int) -> Tensor:
    """float32 x to bfloat16 or float16, up or down with probabilities that make the expectation x.

    A random number below the last kept bit is added to the magnitude, then the dropped bits are cleared.
    """
    index = torch.arange(offset, offset + x.numel(), device=x.device).to(torch.int32).view(x.shape)
    dropped = 16 if dtype == torch.bfloat16 else 13
    noise = _hash((index * 0x1E3779B1) ^ seed) & (2**dropped - 1)
    rounded = ((x.view(torch.int32) + noise) & -(2**dropped)).view(torch.float32)
    if dtype == torch.float16:  # below 2^-14 its last bit is always 2^-24
        rounded = torch.where(x.abs() < 2.0**-14, torch.floor(x * 2.0**24 + noise * 2.0**-13) * 2.0**-24, rounded)
    return torch.where(x.isfinite(), rounded, x).to(dtype)
