"""The Lion step over lists of tensors: choice of backend, and the PyTorch form.

    p <- p (1 - lr wd);   u = sign(b1 m + (1 - b1) g);   p <- p - lr u;   m <- b2 m + (1 - b2) g

Floor: five passes over memory (read p, g, m; write p, m), 20 bytes a float32 parameter. Seven elementwise operations in turn
would make fifteen and more. So on the CPU the PyTorch form walks the parameters in blocks that fit the cache: large tensors
are cut, small ones are taken together, and every operation after the first finds its block in the cache. Elsewhere, and under
torch.compile (which fuses by itself), it is torch._foreach_* over whole lists.

Rounding: round(b1 m), then one fused multiply-add with (1 - b1) g, as torch's mul and add(alpha=) do, in that order. Float32
results are lion-pytorch's bit for bit, save that sign(NaN) is NaN: torch.sign maps NaN to 0, and a parameter whose gradient
is NaN would stand still in silence. bfloat16 and float16 tensors are computed in float32 and rounded once, when stored.
"""

import functools
import math
from collections.abc import Callable, Hashable, Iterator
from operator import attrgetter
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._utils import _flatten_dense_tensors

from kdfast.ops import backend
from kdfast.ops.precision import arithmetic

LOW_PRECISION = (torch.bfloat16, torch.float16)
ROUNDINGS = ("nearest", "stochastic", "kahan")
GROUP = 256  # elements of an 8-bit momentum that share a scale
LEVELS = 127  # of its magnitude, above 0
_SHARE = 131072  # elements of a block on a CPU that are a thread's
_SMALL = 16384  # elements of a tensor whose work there is below that of its calls, and
_FEW = 3  # of how many such each has calls of its own


class Options(NamedTuple):
    """The hyper-parameters of a step; weight_decay is what lr multiplies (decoupled decay already divided by its lr)."""

    lr: float | Tensor
    beta1: float
    beta2: float
    weight_decay: float
    cautious: bool
    maximize: bool
    rounding: str  # of bfloat16 and float16 parameters


class Row(NamedTuple):
    """One parameter, or one block of parameters: tensors of one shape."""

    param: Tensor
    grad: Tensor
    momentum: Tensor
    scale: Tensor | None = None  # of an int8 momentum: float32, one for GROUP elements of its memory
    compensation: Tensor | None = None  # what the stored parameter lacks ("kahan")
    step: Tensor | None = None  # how many steps were taken, 0-dim float32, and
    number: int = 0  # the parameter's number: together the seed of rounding noise
    whole: Any = None  # the DTensor whose shard this process has in param

    @property
    def walked(self) -> list[Tensor]:
        """Those that have an element for each of the parameter's."""
        return [t for t in (self.param, self.grad, self.momentum, self.compensation) if t is not None]


PLAIN = (Tensor, torch.nn.Parameter)  # memory of their own, which a subclass may not have
_KEPT: list[Callable[[Row], Tensor | None]] = [attrgetter(name) for name in ("param", "momentum", "scale", "compensation", "step")]


def lion_step(
    rows: list[Row],
    options: Options,
    *,
    grad_factor: Tensor | None = None,
    found_inf: Tensor | None = None,
    foreach: bool | None = None,
    fused: bool | None = None,
    capturable: bool = False,
    tables: dict[Hashable, Any] | None = None,
) -> "list[Again] | None":
    """Updates parameters, momenta and compensations in place.

    Args:
        rows: one entry a parameter; any mixture of devices, floating dtypes and strides.
        options: of all of them.
        grad_factor: 0-dim; gradients are multiplied by it first (clipping, 1 / loss scale). They are not written.
        found_inf: 0-dim; where it is not 0 nothing changes, decided on the device.
        foreach: False: one tensor after the other. None or True: many at once.
        fused: True: the Triton kernel or an error. False: PyTorch. None: the kernel where the backend offers it and
            foreach is None. Under torch.compile it is PyTorch always: the compiler makes fused kernels of its own.
        capturable: a later step may be captured in a CUDA graph.
        tables: the caller's, to be handed over in every step: where the kernel found the tensors last time.

    Returns:
        How the next step may be taken where nothing but values has changed: the kernel's launches. None: by this function alone.

    Raises:
        RuntimeError: fused is True and there is no kernel for these tensors.
    """
    ways: list[Again] | None = []
    for key, bucket in _buckets(rows).items():
        kernel = None
        if not torch.compiler.is_compiling() and (fused or (fused is None and foreach is None)):
            kernel = backend.kernel("lion", bucket[0].param, bucket[0].grad, bucket[0].momentum)
            if fused and kernel is None:
                param = bucket[0].param
                raise RuntimeError(
                    f"Lion: fused=True needs the Triton kernel, which does not run here for {param.dtype} parameters on "
                    f"{param.device.type} (backend {backend.current()!r}); leave fused=None"
                )
        if kernel is not None and all(map(_has_own_memory, bucket)):
            way, bucket = _kernel_step(kernel, bucket, options, grad_factor, found_inf, capturable, {} if tables is None else tables, key)
            ways = None if ways is None or way is None else [*ways, way]
        if bucket:
            _torch_step(bucket, options, grad_factor, found_inf, foreach is not False)
            ways = None
    return ways


def grad_norm(grads: list[Tensor]) -> Tensor:
    """The L2 norm of all gradients together, 0-dim, on the first one's device; 16-bit gradients are summed in float32."""
    dtype = torch.float32 if any(g.dtype in LOW_PRECISION for g in grads) else None
    dtype = torch.float64 if any(g.dtype == torch.float64 for g in grads) else dtype
    sharded = [g for g in grads if hasattr(g, "full_tensor")]  # DTensors: every process holds a part
    whole = [g for g in grads if not hasattr(g, "full_tensor")]
    norms = [n for some in (whole, sharded) if some for n in torch._foreach_norm(some, 2, dtype=dtype)]
    norms = [n.full_tensor() if hasattr(n, "full_tensor") else n for n in norms]
    return torch.linalg.vector_norm(torch.stack([n.to(grads[0].device) for n in norms]))


def _buckets(rows: list[Row]) -> dict[Hashable, list[Row]]:
    """Rows of one device and the same dtypes together."""
    buckets: dict[Hashable, list[Row]] = {}
    for row in rows:
        buckets.setdefault((row.param.device, row.param.dtype, row.grad.dtype, row.momentum.dtype), []).append(row)
    return buckets


# ---- the kernel ------------------------------------------------------------------------------------------------------


class _Known(NamedTuple):
    """What is known of a bucket since an earlier step, and what that depends on."""

    kept: list[Any]  # where parameters and state lie, and in which order of dimensions
    given: list[Any]  # the same of the gradients, which are new ones in every step, often at the old address
    taken: list[int]  # rows of the table
    rest: list[int]  # rows for PyTorch
    table: Any
    stream: int | None  # on which the table was made


def _kernel_step(
    kernel: ModuleType,
    rows: list[Row],
    options: Options,
    grad_factor: Tensor | None,
    found_inf: Tensor | None,
    capturable: bool,
    tables: dict[Hashable, Any],
    bucket: Hashable,
) -> "tuple[Again | None, list[Row]]":
    """One bucket in one launch; returns how it may be taken again, and the rows that the kernel cannot take."""
    device = rows[0].param.device
    key = bucket, rows[0].number, options.cautious, capturable
    kept: list[Any] = [[t.data_ptr() for t in map(column, rows) if t is not None] for column in _KEPT]
    kept += [[row.param.shape for row in rows], [row.param.stride() for row in rows], [row.momentum.stride() for row in rows]]
    kept += [[row.compensation.stride() for row in rows if row.compensation is not None]]
    kept += [[row.param.is_neg() for row in rows], [row.momentum.shape for row in rows]]
    grads = [row.grad for row in rows]
    given: list[Any] = [[g.data_ptr() for g in grads], [g.stride() for g in grads], [g.is_neg() for g in grads], [g.shape for g in grads]]
    stream = _stream(device)
    known: _Known | None = tables.get(key)
    if known is not None and known.stream != stream and stream is not None:
        known = None  # a table's memory may be used again, by its own stream, as soon as it is freed
    if known is not None and known.kept == kept and known.given == given:
        taken = rows if not known.rest else [rows[i] for i in known.taken]
    else:
        if known is not None and known.kept == kept:
            fits, rest = known.taken, known.rest
        else:
            # a cautious step of a shard needs what other processes count
            shared = _sharing_memory(rows)
            fits = [
                i
                for i, row in enumerate(rows)
                if i not in shared and _has_flat_view(row) and not (options.cautious and row.whole is not None)
            ]
            rest = sorted(set(range(len(rows))) - set(fits))
        for row in rows:
            _check_shapes(row)
        taken, copied = _in_order_of_params(rows if not rest else [rows[i] for i in fits])
        table = kernel.table(taken, None if known is None else known.table, capturable=capturable) if taken else None
        known = _Known(kept, [] if copied else given, fits, rest, table, stream)  # copies lie elsewhere in every step
        if table is None or not table.captured:  # a graph's own table is good within that graph alone
            tables[key] = known
    again = None
    if taken:
        written = [t for row in taken for t in (row.param, row.momentum, row.scale, row.compensation) if t is not None]
        _launch(kernel, taken[0], known.table, written, options, grad_factor, found_inf)
        if known.given and not known.rest and not known.table.captured and all(map(_is_bare, rows)):
            again = Again(kernel, rows, known.table)
    return again, [rows[i] for i in known.rest]


def _launch(
    kernel: ModuleType,
    like: Row,
    table: Any,
    written: list[Tensor],
    options: Options,
    grad_factor: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    device = like.param.device
    lr = options.lr
    if isinstance(lr, Tensor):
        lr = lr.item() if _readable(lr) else lr.to(device)
    kernel.step(
        like,
        table,
        written,
        lr=lr,
        betas=(options.beta1, options.beta2),
        weight_decay=options.weight_decay,
        rounding=options.rounding,
        cautious=options.cautious,
        maximize=options.maximize,
        grad_factor=None if grad_factor is None else grad_factor.to(device, torch.float32),
        found_inf=None if found_inf is None else found_inf.to(device, torch.float32),
    )


def _check_shapes(row: Row) -> None:
    """Raises where the kernel would walk beyond a tensor's end."""
    for name, tensor in (("the gradient", row.grad), ("exp_avg", row.momentum), ("kahan_comp", row.compensation)):
        if tensor is not None and tensor.shape != row.param.shape:
            shapes = f"{tuple(row.param.shape)}, got {tuple(tensor.shape)}"
            raise RuntimeError(f"Lion: {name} of parameter {row.number} must have the parameter's shape {shapes}")


def _has_flat_view(row: Row) -> bool:
    """Whether all but the gradient fill their memory without gaps, in the same order of dimensions."""
    order = _order(row.param)
    kept = (row.momentum, row.compensation)
    return _is_dense(row.param) and not row.param.is_neg() and all(t is None or _order(t) == order for t in kept)


def _in_order_of_params(rows: list[Row]) -> tuple[list[Row], bool]:
    """The rows, with copies of gradients whose order of dimensions is not their parameter's, or whose sign is to be turned; whether any."""

    def is_other(grad: Tensor, param: Tensor) -> bool:
        return grad.is_neg() or (grad.stride() != param.stride() and _order(grad) != _order(param))

    others = [i for i, row in enumerate(rows) if is_other(row.grad, row.param)]
    if not others:
        return rows, False
    copies = [torch.empty_like(rows[i].param, dtype=rows[i].grad.dtype) for i in others]
    torch._foreach_copy_(copies, [rows[i].grad for i in others])
    rows = list(rows)
    for i, copy in zip(others, copies):
        rows[i] = rows[i]._replace(grad=copy)
    return rows, True


def _order(tensor: Tensor) -> tuple[int, ...]:
    """Strides of the dimensions that have more than one element: where these agree, elements follow each other alike."""
    return tuple([stride for stride, size in zip(tensor.stride(), tensor.shape) if size != 1])


def _is_dense(tensor: Tensor) -> bool:
    """Whether the tensor fills a stretch of memory, its dimensions in any order, without gaps or overlaps."""
    if tensor.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted((stride, size) for stride, size in zip(tensor.stride(), tensor.shape) if size != 1):
        if stride != expected:
            return False
        expected *= size
    return True


class Again:
    """A launch whose tensors may lie where they lay in an earlier step, or gradients elsewhere: then it needs hardly more than numbers.

    To look takes half the time of sorting them anew, which for a network of 300 tensors is longer than a GPU's work. No tensor of the
    caller's is kept: whoever drops a gradient or a momentum has its memory back.
    """

    def __init__(self, kernel: ModuleType, rows: list[Row], table: Any) -> None:
        self._kernel, self._table = kernel, table
        self._numbers = [row.number for row in rows]
        grads = [row.grad for row in rows]
        self._facts = _facts([row.param for row in rows], [row.momentum for row in rows], grads)
        self._gradients = _addresses(grads)

    def find(self, params: list[Tensor], momenta: list[Tensor | None], grads: list[Tensor | None]) -> "Found | None":
        """What is to be stepped of an optimizer's parameters, numbered as the rows were; None where it does not lie as it lay."""
        own: list[list[Any]] = [[tensors[number] for number in self._numbers] for tensors in (params, momenta, grads)]
        try:
            gradients, facts = _addresses(own[2]), _facts(*own)
        except (TypeError, RuntimeError):  # there is none, or it has no memory of its own: sparse
            return None
        if facts != self._facts:
            return None
        if gradients != self._gradients and own[0][0].is_cuda and torch.cuda.is_current_stream_capturing():
            return None  # that takes a table which the graph fills
        return Found(Row(own[0][0], own[2][0], own[1][0]), own[0] + own[1], gradients)

    def step(self, found: "Found", options: Options, grad_factor: Tensor | None, found_inf: Tensor | None) -> None:
        """lion_step of what find() found, with the options that the table was made for but for their numbers."""
        if found.gradients != self._gradients:
            self._table, self._gradients = self._kernel.moved(self._table, found.gradients), found.gradients
        _launch(self._kernel, found.like, self._table, found.written, options, grad_factor, found_inf)


class Found(NamedTuple):
    """What a launch has to be told of its tensors."""

    like: Row  # one of them
    written: list[Tensor]
    gradients: list[int]  # addresses


def _facts(params: list[Tensor], momenta: list[Tensor], grads: list[Tensor]) -> list[Any]:
    """All that a launch's table and plan depend on, but where the gradients are."""
    tensors = [*params, *momenta, *grads]
    places = _addresses(params + momenta)
    return [places, *[list(map(fact, tensors)) for fact in _OF_EACH], _stream(params[0].device)]


_OF_EACH: list[Callable[[Tensor], Any]] = [type, attrgetter("dtype"), attrgetter("shape"), Tensor.stride, Tensor.is_neg]


def _addresses(tensors: list[Tensor]) -> list[int]:
    return list(map(Tensor.data_ptr, tensors))


def _has_own_memory(row: Row) -> bool:
    return type(row.param) in PLAIN and type(row.grad) in PLAIN and type(row.momentum) in PLAIN


def _is_bare(row: Row) -> bool:
    """Whether it has no more than parameter, gradient and momentum."""
    return row.scale is row.compensation is row.step is row.whole is None


def _stream(device: torch.device) -> int | None:
    """Where launches go; None on a CPU, and while a graph is captured, which keeps its tables and has a stream of its own."""
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return None
    return torch.cuda.current_stream(device).cuda_stream


# ---- the PyTorch form ------------------------------------------------------------------------------------------------


def _torch_step(rows: list[Row], options: Options, grad_factor: Tensor | None, found_inf: Tensor | None, foreach: bool) -> None:
    """One bucket. On the CPU decisions are taken by reading values, elsewhere on the device."""
    device = rows[0].param.device
    on_host = _readable(rows[0].param)
    if found_inf is not None and on_host:
        if found_inf.item():
            return
        found_inf = None
    found_inf = None if found_inf is None else found_inf.to(device)
    grad_factor = None if grad_factor is None else grad_factor.to(device)
    if isinstance(options.lr, Tensor):
        options = options._replace(lr=options.lr.item() if on_host or _readable(options.lr) else options.lr.to(device))

    if not foreach or (on_host and options.cautious):  # a cautious step needs a mean over each whole tensor
        alone: list[Row] = rows
    elif on_host:
        alone = [row for row in rows if not _has_own_memory(row)]
        walked = [row for row in rows if _has_own_memory(row)] if alone else rows
        if walked:
            _walk(walked, options, grad_factor)
    else:
        alone, together = _apart(rows)
        if together:
            _update(together, options, grad_factor, found_inf)
    for row in alone:
        _update([row], options, grad_factor, found_inf)


def _walk(rows: list[Row], options: Options, grad_factor: Tensor | None) -> None:
    """Steps a CPU's bucket in blocks that fit the cache."""
    factors = _Factors.of(options, arithmetic(rows[0].param))
    plain = grad_factor is None and _is_exact(rows[0])  # as all of a bucket, or none
    together: list[Row] = []
    if len(rows) > _FEW:
        shared = _sharing_memory(rows)  # these keep their order
        small = [i for i, row in enumerate(rows) if row.param.numel() <= _SMALL and i not in shared]
        if len(small) > _FEW:
            together = [rows[i] for i in small]
            rows = [rows[i] for i in sorted(set(range(len(rows))).difference(small))]
    size = _block_size()
    scratch: Tensor | None = None
    if plain and sum([row.param.numel() for row in rows]) > size:  # one piece of memory: the next block finds it in the cache
        scratch = torch.empty(size, dtype=factors.beta1.dtype, device="cpu")
    for row in rows:
        p, g, m = row.param, row.grad, row.momentum
        if plain and p.numel() <= size and p.stride() == g.stride() == m.stride() and _is_dense(p):
            _lion_block(p, g, m, factors, scratch)  # as it is, without views
        elif plain and _has_flat_view(row):
            for p, g, m in zip(*_blocks(row)):
                _lion_block(p, g, m, factors, scratch)
        else:
            for block, offset in _cut(row):
                _update([block], options, grad_factor, None, offset, factors)
    for batch in _batches(together):
        if plain:
            _lion_together([row.param for row in batch], [row.grad for row in batch], [row.momentum for row in batch], factors)
        else:
            _update(batch, options, grad_factor, None, 0, factors)


def _apart(rows: list[Row]) -> tuple[list[Row], list[Row]]:
    """The rows to be stepped one after the other, and those that can be stepped at once."""
    if torch.compiler.is_compiling() or isinstance(rows[0].param if rows else None, FakeTensor):
        return [], rows
    shared = _sharing_memory(rows)
    if not shared:
        return [], rows
    return [rows[i] for i in sorted(shared)], [row for i, row in enumerate(rows) if i not in shared]


def _sharing_memory(rows: list[Row]) -> set[int]:
    """The rows whose parameter shares memory with another's: of weights tied by their .data, each counts as a step of its own."""
    params = [row.param for row in rows]
    spans = sorted((p.data_ptr(), p.data_ptr() + _extent(p), i) for i, p in enumerate(params) if type(p) in PLAIN)
    shared: set[int] = set()
    reach, last = 0, -1  # how far the spans up to here go, and which one goes there
    for start, end, i in spans:
        if start < reach:
            shared |= {last, i}
        if end > reach:
            reach, last = end, i
    return shared


def _extent(tensor: Tensor) -> int:
    """Bytes from its first element to its last."""
    if tensor.is_contiguous() or not tensor.numel():
        return tensor.nbytes
    return (1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))) * tensor.element_size()


def _readable(tensor: Tensor) -> bool:
    """Whether its values can be read without waiting for a device or breaking a graph; a fake tensor has none."""
    return tensor.is_cpu and not torch.compiler.is_compiling() and not isinstance(tensor, FakeTensor)


def _update(
    rows: list[Row],
    options: Options,
    grad_factor: Tensor | None,
    found_inf: Tensor | None,
    offset: int = 0,
    factors: "_Factors | None" = None,
) -> None:
    """One step of rows that share device and dtypes.

    Args:
        rows: whole parameters, or one block.
        options: of the step.
        grad_factor: multiplies the gradients.
        found_inf: where it is not 0 nothing changes; None: everything does.
        offset: where the block's elements begin in their parameter.
        factors: what rows on a CPU are multiplied by, of these options.
    """
    params, momenta = [row.param for row in rows], [row.momentum for row in rows]
    dtype = arithmetic(params[0])
    keep = found_inf is not None  # the old values are needed until it is known that they may go
    ps = [p.to(dtype, copy=keep) for p in params]
    ms = [decoded(row.momentum, row.scale) if row.scale is not None else row.momentum.to(dtype, copy=keep) for row in rows]
    gs = [row.grad.to(dtype) for row in rows]
    if grad_factor is not None:
        gs = list(torch._foreach_mul(gs, grad_factor.to(dtype)))
    compensations = [row.compensation for row in rows if row.compensation is not None]
    if compensations:
        ps = [p + c.to(dtype) for p, c in zip(ps, compensations)]

    if factors is not None and len(rows) == 1:
        _lion_block(ps[0], gs[0], ms[0], factors)
    elif factors is not None:
        _lion_together(ps, gs, ms, factors)
    else:
        _lion(ps, gs, ms, options, [row.whole for row in rows])

    noises = [None if row.step is None else _noise(row, offset) for row in rows]
    if rows[0].scale is not None:
        codes, scales = zip(*(encoded(m, noise) for m, noise in zip(ms, noises)))
        _store([row.scale for row in rows if row.scale is not None], list(scales), found_inf)
        ms = list(codes)
    _store(momenta, ms, found_inf)
    if compensations:
        stored = [p.to(params[0].dtype) for p in ps]
        _store(compensations, [p - s.to(dtype) for p, s in zip(ps, stored)], found_inf)
        ps = stored
    elif options.rounding == "stochastic" and params[0].dtype in LOW_PRECISION:
        ps = [_round_stochastically(p, params[0].dtype, noise) for p, noise in zip(ps, noises) if noise is not None]
    _store(params, ps, found_inf)


def _lion(ps: list[Tensor], gs: list[Tensor], ms: list[Tensor], options: Options, wholes: list[Any]) -> None:
    """The formula of this file's docstring, in place on ps and ms; operation by operation what lion-pytorch computes."""
    lr, beta1, beta2, weight_decay, cautious, maximize, _ = options
    ascent = -1.0 if maximize else 1.0
    updates = list(torch._foreach_mul(ms, beta1))
    torch._foreach_add_(updates, gs, alpha=ascent * (1.0 - beta1))
    updates = _signs(updates)
    if cautious:
        updates = [_aligned(u, ascent * g, whole) for u, g, whole in zip(updates, gs, wholes)]
    if weight_decay:
        torch._foreach_mul_(ps, 1.0 - lr * weight_decay)
    if isinstance(lr, Tensor):
        torch._foreach_sub_(ps, torch._foreach_mul(updates, lr))
    else:
        torch._foreach_add_(ps, updates, alpha=-lr)
    torch._foreach_mul_(ms, beta2)
    torch._foreach_add_(ms, gs, alpha=ascent * (1.0 - beta2))


class _Factors(NamedTuple):
    """What _lion_block multiplies by. Tensors, of no dimension: a call with a number makes one of it, and takes twice as long."""

    beta1: Tensor
    grad_in_update: float
    beta2: Tensor
    grad_in_momentum: float
    decay: Tensor | None
    negative_lr: float

    @classmethod
    def of(cls, options: Options, dtype: torch.dtype) -> "_Factors":
        lr, beta1, beta2, weight_decay, _, maximize, _ = options
        assert not isinstance(lr, Tensor)  # it has been read before
        ascent = -1.0 if maximize else 1.0
        decay = _factor(1.0 - lr * weight_decay, dtype) if weight_decay else None
        return cls(_factor(beta1, dtype), ascent * (1.0 - beta1), _factor(beta2, dtype), ascent * (1.0 - beta2), decay, -lr)


_made: dict[tuple[float, torch.dtype], Tensor] = {}


def _factor(value: float, dtype: torch.dtype) -> Tensor:
    """A number as a tensor, kept for the next step: the betas stay, whatever the rate."""
    factor = _made.get((value, dtype))
    if factor is None:
        factor = torch.tensor(value, dtype=dtype, device="cpu")
        # one that was made under a mode or a transform of PyTorch is good there alone
        if type(factor) is Tensor and not torch._C._functorch.is_functorch_wrapped_tensor(factor) and not factor.is_inference():
            if len(_made) >= 256:
                _made.clear()
            _made[value, dtype] = factor
    return factor


def _lion_block(p: Tensor, g: Tensor, m: Tensor, factors: _Factors, scratch: Tensor | None = None) -> None:
    """_lion of one block that lies in a CPU's cache, where every call and read more would be felt.

    p is dense where there is scratch, which is written to; a small block does better without.
    """
    if scratch is None or p.numel() <= _SMALL:
        update = m.mul(factors.beta1)
    else:
        update = torch.mul(m, factors.beta1, out=scratch.as_strided(p.shape, p.stride()))
    update.add_(g, alpha=factors.grad_in_update)
    m.mul_(factors.beta2).add_(g, alpha=factors.grad_in_momentum)  # now: both are in the nearest cache
    if _may_have_nan(update):
        update = _sign_or_nan(update)
    else:
        update.sign_()
    if factors.decay is not None:
        p.mul_(factors.decay)
    p.add_(update, alpha=factors.negative_lr)


def _lion_together(ps: list[Tensor], gs: list[Tensor], ms: list[Tensor], factors: _Factors) -> None:
    """_lion_block of many that lie in the cache together."""
    updates = list(torch._foreach_mul(ms, factors.beta1))
    torch._foreach_add_(updates, gs, alpha=factors.grad_in_update)
    torch._foreach_mul_(ms, factors.beta2)
    torch._foreach_add_(ms, gs, alpha=factors.grad_in_momentum)
    updates = _signs(updates)
    if factors.decay is not None:
        torch._foreach_mul_(ps, factors.decay)
    torch._foreach_add_(ps, updates, alpha=factors.negative_lr)


def _signs(xs: list[Tensor]) -> list[Tensor]:
    """sign(x) in place of x, and NaN where x is NaN."""
    if _readable(xs[0]) and not _may_have_nan(_flatten_dense_tensors(xs)):
        torch._foreach_sign_(xs)
        return xs
    return [_sign_or_nan(x) for x in xs]


def _may_have_nan(x: Tensor) -> bool:
    """One read of a tensor in the cache; true of an infinity too, which changes nothing."""
    # of few elements max() is the quicker call, of many sum() the quicker walk
    return not math.isfinite((x.max() if 0 < x.numel() <= 4096 else x.sum()).item())


def _sign_or_nan(x: Tensor) -> Tensor:
    return torch.where(x.isnan(), x, x.sign())


def _aligned(update: Tensor, grad: Tensor, whole: Any) -> Tensor:
    """The cautious update (arXiv:2411.16085): only where it agrees with the gradient, scaled up by what is left out."""
    mask = (update * grad > 0).to(update.dtype)
    share = mask.mean() if whole is None else _sum_over_shards(mask.sum(), whole) / whole.numel()
    return update * (mask / share.clamp(min=1e-5))


def _sum_over_shards(local: Tensor, whole: Any) -> Tensor:
    """The sum of a number that every process has of its shard of a DTensor."""
    from torch.distributed.tensor import DTensor, Partial, Replicate

    partial = [Partial() if is_sharded(placement) else Replicate() for placement in whole.placements]
    return DTensor.from_local(local, whole.device_mesh, partial, run_check=False).full_tensor()


def is_sharded(placement: Any) -> bool:
    """Whether a DTensor's placement splits it; is_shard() is false of the strided shards that FSDP2 makes of tensor-parallel ones."""
    return not (placement.is_replicate() or placement.is_partial())


def _store(destinations: list[Tensor], values: list[Tensor], found_inf: Tensor | None) -> None:
    """Copies values, rounded to the nearest of the destinations' dtype, unless found_inf."""
    if values[0] is destinations[0]:
        return  # computed in place
    if found_inf is not None:
        values = [torch.where(found_inf != 0, d, v.to(d.dtype)) for d, v in zip(destinations, values)]
    torch._foreach_copy_(destinations, values)


# ---- blocks that fit the cache ---------------------------------------------------------------------------------------


def _block_size() -> int:
    """Elements of a block, a multiple of GROUP so that it begins where a scale does.

    A thread's share is 131,072, 512 KB of each p, g, m and u. Where its own cache does not hold these, a few threads take blocks
    as large as four would, since a block costs some 15 microseconds of calls however many share its work. (Measured with 2^14 to
    2^20 a thread, one and two threads, level 2 caches of 512 KB and 2 MB.)
    """
    threads = torch.get_num_threads()
    return _SHARE * (threads if _level_2_cache() >= 4 * 4 * _SHARE else max(4, threads))


@functools.cache
def _level_2_cache() -> int:
    """Bytes of a core's, 0 where they are not known."""
    return torch.cpu.get_capabilities().get("l2_cache_size", 0)


def _is_exact(row: Row) -> bool:
    """Whether it is updated where it lies: nothing to convert, to decode or to round."""
    return row.param.dtype == row.grad.dtype == row.momentum.dtype == arithmetic(row.param) and row.compensation is None


def _blocks(row: Row) -> list[tuple[Tensor, ...]]:
    """The walked tensors of a row with a flat view, each cut into flat blocks in the order of the parameter's memory."""
    ((row,), _) = _in_order_of_params([row])
    flats = [_flat(t) for t in row.walked]
    return [t.split(_block_size()) for t in flats] if row.param.numel() > _block_size() else [(t,) for t in flats]


def _cut(row: Row) -> Iterator[tuple[Row, int]]:
    """A row as flat blocks, each with its offset; or whole, where it must be walked by its indices."""
    if not _has_flat_view(row):
        yield row, 0
        return
    scales = iter(() if row.scale is None else row.scale.split(_block_size() // GROUP))
    offset = 0
    for param, grad, momentum, *compensation in zip(*_blocks(row)):
        compensated = compensation[0] if compensation else None
        yield row._replace(param=param, grad=grad, momentum=momentum, scale=next(scales, None), compensation=compensated), offset
        offset += param.numel()


def _flat(tensor: Tensor) -> Tensor:
    """A dense tensor's elements in the order of its memory."""
    return tensor.view(-1) if tensor.is_contiguous() else tensor.as_strided((tensor.numel(),), (1,))


def _laid_out(flat: Tensor, like: Tensor) -> Tensor:
    """The elements that _flat(like) has, in like's shape."""
    return flat.view(like.shape) if like.is_contiguous() else flat.as_strided(like.shape, like.stride())


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


# ---- random rounding -------------------------------------------------------------------------------------------------


def _noise(row: Row, offset: int) -> Tensor:
    """32 random bits an element, int32 [numel], of which rounding takes what it needs.

    They are a hash of step, parameter and element and not a draw from torch's generator, whose state differs from rank to
    rank: replicas of a data-parallel run round alike and stay equal.
    """
    assert row.step is not None
    index = torch.arange(offset, offset + row.param.numel(), device=row.param.device).to(torch.int32)
    return _hash((index * 0x1E3779B1) ^ _hash(row.step.to(torch.int32) * 0x1E3779B1 + row.number))


def _hash(x: Tensor) -> Tensor:
    """32 well-mixed bits of an int32 tensor, which wraps around (two rounds of xor-shift and multiply)."""
    x = x ^ ((x >> 16) & 0xFFFF)
    x = x * 0x7FEB352D
    x = x ^ ((x >> 15) & 0x1FFFF)
    x = x * -0x7B935975  # 0x846ca68b as a signed number
    return x ^ ((x >> 16) & 0xFFFF)


def _round_stochastically(x: Tensor, dtype: torch.dtype, noise: Tensor) -> Tensor:
    """float32 x to bfloat16 or float16, up or down with probabilities that make the expectation x.

    A random number below the last kept bit is added to the magnitude, then the dropped bits are cleared.
    """
    dropped = 16 if dtype == torch.bfloat16 else 13
    noise = noise.view(x.shape) & (2**dropped - 1)
    rounded = ((x.view(torch.int32) + noise) & -(2**dropped)).view(torch.float32)
    if dtype == torch.float16:  # below 2^-14 its last bit is always 2^-24
        rounded = torch.where(x.abs() < 2.0**-14, torch.floor(x * 2.0**24 + noise * 2.0**-13) * 2.0**-24, rounded)
    return torch.where(x.isfinite(), rounded, x).to(dtype)


# ---- momenta of 8 bits -----------------------------------------------------------------------------------------------
#
# A sign and the root of the share of the largest in GROUP elements: k = sqrt(|m| / scale) LEVELS, so that small momenta keep their
# sign and a few bits. k is rounded up or down at random, for the decoded momentum's expectation to be exact: with beta2 = 0.99 a step
# changes a momentum by less than a step of the code, and rounding to the nearest would leave it where it is.


def scales_of(numel: int) -> int:
    """How many scales a momentum of so many elements has."""
    return -(-numel // GROUP)


def decoded(code: Tensor, scale: Tensor) -> Tensor:
    """float32 momenta of an int8 code and its scales, with the code's strides; NaN where the scale is not finite."""
    values = _grouped(_flat(code).float())
    values = values * values.abs() * (scale * LEVELS**-2)[:, None]
    return _laid_out(values.view(-1)[: code.numel()], code)


def encoded(momentum: Tensor, noise: Tensor | None) -> tuple[Tensor, Tensor]:
    """The int8 code of a dense float32 momentum, with its strides, and its scales; None: round to the nearest."""
    values = _grouped(_flat(momentum))
    sizes = torch.where(values.isfinite(), values.abs(), float("inf"))
    scale = sizes.amax(dim=1, keepdim=True)
    # too small to divide by, or infinite: all levels 0, which an infinite scale makes NaN
    squared = torch.where((scale > 1e-30) & scale.isfinite(), sizes * (LEVELS**2 / scale), 0.0)
    level = squared.sqrt().floor()
    share = 0.5 if noise is None else _grouped(((noise >> 16) & 0xFFFF) * 2.0**-16)
    level = (level + (squared - level * level > (2.0 * level + 1.0) * share)).clamp(max=LEVELS)
    code = torch.where(values < 0, -level, level).to(torch.int8)
    return _laid_out(code.view(-1)[: momentum.numel()], momentum), scale.view(-1)


def _grouped(flat: Tensor) -> Tensor:
    """[groups, GROUP], zeros at the end.

    All is computed in this shape, element beside scale: the C++ that Inductor makes of a scale looked up by index // GROUP reads beyond
    its end in the last vector (seen with PyTorch 2.11 to 2.15).
    """
    return torch.cat([flat, flat.new_zeros(-flat.numel() % GROUP)]).view(-1, GROUP)
