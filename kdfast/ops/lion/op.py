"""The Lion step over lists of tensors: choice of backend, and the PyTorch form.

    p <- p (1 - lr wd);   u = sign(b1 m + (1 - b1) g);   p <- p - lr u;   m <- b2 m + (1 - b2) g

Floor: five passes over memory (read p, g, m; write p, m), 20 bytes a float32 parameter, which two kernels keep to: Triton's on a GPU,
and on a CPU C that was compiled when kdfast was installed. Either takes all tensors at once. Of small ones the host's sorting costs
more than the work: a step like the last (Again) is not sorted anew.

In PyTorch seven elementwise operations in turn would make fifteen passes and more. So on a CPU the PyTorch form walks the parameters in
blocks that fit the cache: large tensors are cut, small ones are taken together, and every operation after the first finds its block in
the cache. Elsewhere, and under torch.compile (which fuses by itself), it is torch._foreach_* over whole lists.

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

from kdfast.kernels import lion_cpu
from kdfast.ops import backend
from kdfast.ops.precision import arithmetic

LOW_PRECISION = (torch.bfloat16, torch.float16)
ROUNDINGS = ("nearest", "stochastic", "kahan")
GROUP = 256  # elements of an 8-bit momentum that share a scale
LEVELS = 127  # of its magnitude, above 0
_SHARE = 131072  # elements of a block on a CPU that are a thread's
_SMALL = 16384  # elements of a tensor whose work there is below that of its calls, and
_FEW = 1  # of how many such each has calls of its own


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
        foreach: False: PyTorch, one tensor after the other. None or True: many at once.
        fused: True: a kernel or an error. False: PyTorch. None: a kernel where there is one, but Triton's only if foreach is None.
            Under torch.compile it is PyTorch always: the compiler makes fused kernels of its own.
        capturable: a later step may be captured in a CUDA graph.
        tables: the caller's, to be handed over in every step: where the kernel found the tensors last time.

    Returns:
        How the next step may be taken where nothing but values has changed. None: by this function alone.

    Raises:
        RuntimeError: fused is True and there is no kernel for these tensors.
    """
    ways: list[Again] | None = []
    way: Again | None
    for key, bucket in _buckets(rows).items():
        kernel = _kernel(bucket[0], options, foreach, fused)
        if kernel is lion_cpu and _is_expanded(bucket[0].grad):
            kernel = None  # PyTorch rounds twice in some of the elements: to have its bits is to ask it, about the whole
        if kernel is not None and all(_has_own_memory(t) for row in bucket for t in row[:3]):
            way, bucket = _kernel_step(kernel, bucket, options, grad_factor, found_inf, capturable, {} if tables is None else tables, key)
            ways = None if ways is None or way is None else [*ways, way]
        if bucket:
            _torch_step(bucket, options, grad_factor, found_inf, foreach is not False)
            ways = None
    return ways


def _kernel(like: Row, options: Options, foreach: bool | None, fused: bool | None) -> ModuleType | None:
    """What steps rows like this one but for PyTorch's operations, if anything does."""
    if fused is False or (foreach is False and not fused) or is_watched():
        return None
    kernel = backend.kernel("lion", like.param, like.grad, like.momentum) if fused or foreach is None else None
    if kernel is None and backend.current() == "auto" and lion_cpu.takes(like, rounding=options.rounding, cautious=options.cautious):
        kernel = lion_cpu
    if fused and kernel is None:
        raise RuntimeError(
            f"Lion: fused=True needs the Triton kernel or, on a CPU, the compiled step, which do not run here for {like.param.dtype} "
            f"parameters on {like.param.device.type} (backend {backend.current()!r}); leave fused=None"
        )
    return kernel


def is_watched() -> bool:
    """Whether the compiler, a TorchDispatchMode or a transform of torch.func sees operations, or puts others in their place."""
    if torch.compiler.is_compiling():
        return True
    return torch._C._len_torch_dispatch_stack() > 0 or torch._C._functorch.peek_interpreter_stack() is not None


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
    """Rows of one device and the same dtypes together, those apart whose gradient is the same numbers over and over."""
    buckets: dict[Hashable, list[Row]] = {}
    for row in rows:
        key = row.param.device, row.param.dtype, row.grad.dtype, row.momentum.dtype, _is_expanded(row.grad)
        buckets.setdefault(key, []).append(row)
    return buckets


def _is_expanded(grad: Tensor) -> bool:
    return grad.is_cpu and not torch.compiler.is_compiling() and 0 in grad.stride()


# ---- the kernels -----------------------------------------------------------------------------------------------------


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
    """One bucket in one call; returns how it may be taken again, and the rows that the kernel cannot take."""
    device = rows[0].param.device
    key = kernel.__name__, bucket, rows[0].number, options.cautious, capturable
    kept = _lie([t for column in _KEPT for t in map(column, rows) if t is not None])
    given = _lie([row.grad for row in rows])
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
            again = Again(kernel, rows, known.table, stream)
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
    """Raises where the kernel would walk beyond a tensor's end, and PyTorch would fail halfway or broadcast."""
    for name, tensor in (("the gradient", row.grad), ("exp_avg", row.momentum), ("kahan_comp", row.compensation)):
        if tensor is not None and tensor.shape != row.param.shape:
            shapes = f"{tuple(row.param.shape)}, got {tuple(tensor.shape)}"
            raise RuntimeError(f"Lion: {name} of parameter {row.number} must have the parameter's shape {shapes}")


def _has_flat_view(row: Row) -> bool:
    """Whether all but the gradient fill their memory without gaps, as they are, in the same order of dimensions."""
    order = _order(row.param)
    kept = [t for t in (row.param, row.momentum, row.compensation) if t is not None]
    return _is_dense(row.param) and not any(t.is_neg() for t in kept) and all(_order(t) == order for t in kept)


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


class Columns(NamedTuple):
    """The tensors of many parameters that have no more than these."""

    params: list[Tensor]
    momenta: list[Any]  # None where there is none
    grads: list[Tensor]

    def of(self, places: list[int] | None) -> "Columns":
        """These places alone; None: all."""
        return self if places is None else Columns(*[[column[place] for place in places] for column in self])

    def row(self, place: int) -> Row:
        """One parameter."""
        return Row(self.params[place], self.grads[place], self.momenta[place])


class Again:
    """A bucket whose tensors lie where they lay in an earlier step (gradients may lie elsewhere), and so need not be sorted anew.

    No tensor of the caller's is kept: whoever drops a gradient or a momentum has its memory back.
    """

    def __init__(self, kernel: ModuleType, rows: list[Row], table: Any, stream: int | None) -> None:
        self.numbers = [row.number for row in rows]  # in whose order the methods below are given the columns
        self._kernel, self._table, self._stream = kernel, table, stream
        self._gradients = _addresses([row.grad for row in rows])

    def follows(self, columns: Columns) -> bool:
        """Whether the step may be taken here and now, with gradients where they are by now."""
        param, gradients = columns.params[0], _addresses(columns.grads)
        have_moved = gradients != self._gradients
        if param.is_cuda and (_stream(param.device) != self._stream or (have_moved and torch.cuda.is_current_stream_capturing())):
            return False  # a captured step takes a table which the graph fills
        if have_moved:
            if 0 in gradients and not all(map(_has_own_memory, columns.grads)):
                return False
            self._table, self._gradients = self._kernel.moved(self._table, gradients), gradients
        return True

    def step(self, columns: Columns, options: Options, grad_factor: Tensor | None, found_inf: Tensor | None) -> None:
        """lion_step of these tensors, after follows(), with the options of the earlier step but for their numbers."""
        _launch(self._kernel, columns.row(0), self._table, columns.params + columns.momenta, options, grad_factor, found_inf)


def facts(columns: Columns) -> list[Any] | None:
    """All that Again depends on, to be compared; None: of momenta that are not there, or tensors that have no memory of their own."""
    params, momenta, grads = columns
    kept = params + momenta
    try:
        return [list(map(type, kept)), list(map(_DTYPE, kept + grads)), _lie(kept), _layouts(grads)]
    except (AttributeError, TypeError, RuntimeError):
        return None


def _lie(tensors: list[Tensor]) -> list[Any]:
    """Where tensors lie, and how."""
    return [_addresses(tensors), *_layouts(tensors)]


def _layouts(tensors: list[Tensor]) -> list[Any]:
    return [list(map(_SHAPE, tensors)), list(map(Tensor.stride, tensors)), list(map(Tensor.is_neg, tensors))]


_DTYPE: Callable[[Tensor], torch.dtype] = attrgetter("dtype")
_SHAPE: Callable[[Tensor], torch.Size] = attrgetter("shape")


def _addresses(tensors: list[Tensor]) -> list[int]:
    return list(map(Tensor.data_ptr, tensors))


def _address(tensor: Tensor) -> int:
    """Where its first element lies; 0: nowhere, as of a subclass, in a transform of PyTorch, and of the zeros that autograd makes."""
    if type(tensor) not in PLAIN:
        return 0
    try:
        return tensor.data_ptr()
    except RuntimeError:
        return 0


def _has_own_memory(tensor: Tensor) -> bool:
    return type(tensor) in PLAIN and (_address(tensor) != 0 or tensor.numel() == 0)


def _is_plain(row: Row) -> bool:
    """Whether it can be stepped where it lies, by a call for many: these refuse tensors that are stored negated."""
    return all(map(_has_own_memory, row[:3])) and not row.param.is_neg() and not row.momentum.is_neg()


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

    if not torch.compiler.is_compiling():
        for row in rows:
            _check_shapes(row)
    if not foreach or (on_host and options.cautious):  # a cautious step needs a mean over each whole tensor
        alone: list[Row] = rows
    elif on_host:
        apart = {i for i, row in enumerate(rows) if not _is_plain(row) or _is_expanded(row.grad)}
        apart |= _sharing_memory(rows) if apart else set()  # these keep their order
        alone = [rows[i] for i in sorted(apart)]
        walked = [row for i, row in enumerate(rows) if i not in apart] if apart else rows
        if walked:
            large, batches = _by_size(walked)
            factors = _Factors.of(options, arithmetic(rows[0].param))
            in_order, in_batches = [walked[i] for i in large], [[walked[i] for i in batch] for batch in batches]
            _walk(in_order, in_batches, options, factors, grad_factor)
    else:
        alone, together = _apart(rows)
        if together:
            _update(together, options, grad_factor, found_inf)
    for row in alone:
        _update([row], options, grad_factor, found_inf)


def _by_size(rows: list[Row]) -> tuple[list[int], list[list[int]]]:
    """Of a CPU's bucket, the rows to be taken one after the other, and small ones by the batch, which is at most a block."""
    all_of_them = list(range(len(rows)))
    if len(rows) <= _FEW:
        return all_of_them, []
    shared = _sharing_memory(rows)  # these keep their order
    small = [i for i, row in enumerate(rows) if row.param.numel() <= _SMALL and i not in shared]
    if len(small) <= _FEW:
        return all_of_them, []
    batches: list[list[int]] = []
    room = -1
    for i in small:
        if rows[i].param.numel() > room:
            batches.append([])
            room = _block_size()
        batches[-1].append(i)
        room -= rows[i].param.numel()
    return sorted(set(all_of_them).difference(small)), batches


def _walk(rows: list[Row], batches: list[list[Row]], options: Options, factors: "_Factors", grad_factor: Tensor | None) -> None:
    """Steps rows on a CPU in blocks that fit the cache, and batches at once."""
    like = rows[0] if rows else batches[0][0]
    plain = grad_factor is None and _is_exact(like)  # as all of a bucket, or none
    size = _block_size()
    scratch: Tensor | None = None
    if plain and sum([row.param.numel() for row in rows]) > size:  # one piece of memory: the next block finds it in the cache
        scratch = torch.empty(size, dtype=like.param.dtype, device="cpu")
    for row in rows:
        p, g, m = row.param, row.grad, row.momentum
        if plain and (p.numel() <= _SMALL or (p.numel() <= size and p.stride() == g.stride() == m.stride() and _is_dense(p))):
            _lion_block(p, g, m, factors, scratch)  # as it is, without views
        elif plain and _has_flat_view(row):
            for p, g, m in zip(*_blocks(row)):
                _lion_block(p, g, m, factors, scratch)
        else:
            for block, offset in _cut(row):
                _update([block], options, grad_factor, None, offset, factors)
    for batch in batches:
        if plain:
            _lion([row.param for row in batch], [row.grad for row in batch], [row.momentum for row in batch], options, factors, [])
        else:
            _update(batch, options, grad_factor, None, 0, factors)


def _apart(rows: list[Row]) -> tuple[list[Row], list[Row]]:
    """The rows to be stepped one after the other, and those that can be stepped at once."""
    if torch.compiler.is_compiling() or isinstance(rows[0].param if rows else None, FakeTensor):
        return [], rows
    apart = _sharing_memory(rows).union(i for i, row in enumerate(rows) if row.param.is_neg() or row.momentum.is_neg())
    if not apart:
        return [], rows
    return [rows[i] for i in sorted(apart)], [row for i, row in enumerate(rows) if i not in apart]


def _sharing_memory(rows: list[Row]) -> set[int]:
    """The rows whose parameter or momentum shares memory with another: of weights tied by their .data, each counts as a step of its own."""
    written = [(_address(t), t, i) for i, row in enumerate(rows) for t in (row.param, row.momentum)]
    spans = sorted((start, start + _extent(t), i) for start, t, i in written if start)
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
    ps = [p.resolve_neg().to(dtype, copy=keep) for p in params]
    ms = [decoded(row.momentum, row.scale) if row.scale is not None else row.momentum.resolve_neg().to(dtype, copy=keep) for row in rows]
    gs = [row.grad.to(dtype) for row in rows]
    if grad_factor is not None:
        gs = list(torch._foreach_mul(gs, grad_factor.to(dtype)))
    compensations = [row.compensation for row in rows if row.compensation is not None]
    if compensations:
        ps = [p + c.to(dtype) for p, c in zip(ps, compensations)]

    if factors is not None and len(rows) == 1:
        _lion_block(ps[0], gs[0], ms[0], factors)
    else:
        _lion(ps, gs, ms, options, factors or _Factors.of(options), [row.whole for row in rows])

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


def _lion(ps: list[Tensor], gs: list[Tensor], ms: list[Tensor], options: Options, factors: "_Factors", wholes: list[Any]) -> None:
    """The formula of this file's docstring, in place on ps and ms; operation by operation what lion-pytorch computes."""
    updates = list(torch._foreach_mul(ms, factors.beta1))
    torch._foreach_add_(updates, gs, alpha=factors.grad_in_update)
    updates = _signs(updates)
    if options.cautious:
        ascent = -1.0 if options.maximize else 1.0
        updates = [_aligned(u, ascent * g, whole) for u, g, whole in zip(updates, gs, wholes)]
    if factors.decay is not None:
        torch._foreach_mul_(ps, factors.decay)
    if isinstance(factors.lr, Tensor):
        torch._foreach_sub_(ps, torch._foreach_mul(updates, factors.lr))
    else:
        torch._foreach_add_(ps, updates, alpha=-factors.lr)
    torch._foreach_mul_(ms, factors.beta2)
    torch._foreach_add_(ms, gs, alpha=factors.grad_in_momentum)


class _Factors(NamedTuple):
    """What the formula multiplies by."""

    beta1: float | Tensor
    grad_in_update: float
    beta2: float | Tensor
    grad_in_momentum: float
    decay: float | Tensor | None
    lr: Any  # a number, or a tensor that cannot be read

    @classmethod
    def of(cls, options: Options, dtype: torch.dtype | None = None) -> "_Factors":
        """Numbers; with a dtype, for a CPU, tensors of no dimension: a call with a number makes one of it, and takes twice as long."""
        lr, beta1, beta2, weight_decay, _, maximize, _ = options
        ascent = -1.0 if maximize else 1.0
        decay = 1.0 - lr * weight_decay if weight_decay else None
        factors = cls(beta1, ascent * (1.0 - beta1), beta2, ascent * (1.0 - beta2), decay, lr)
        if dtype is None:
            return factors
        made = functools.partial(torch.tensor, dtype=dtype, device="cpu")
        return factors._replace(beta1=made(beta1), beta2=made(beta2), decay=None if decay is None else made(decay))


def _lion_block(p: Tensor, g: Tensor, m: Tensor, factors: _Factors, scratch: Tensor | None = None) -> None:
    """_lion of one block that lies in a CPU's cache, where every call and read more would be felt.

    A p that is not small is dense where there is scratch, which is written to; a small block does better without.
    """
    update = _advance(m, g, factors, None if scratch is None or p.numel() <= _SMALL else scratch.as_strided(p.shape, p.stride()))
    if factors.decay is not None:
        p.mul_(factors.decay)
    p.add_(update, alpha=-factors.lr)


def _advance(m: Tensor, g: Tensor, factors: _Factors, out: Tensor | None) -> Tensor:
    """Takes the momentum to its next value; returns the sign by which the parameter is moved, in out if there is one."""
    update = m.mul(factors.beta1) if out is None else torch.mul(m, factors.beta1, out=out)
    update.add_(g, alpha=factors.grad_in_update)
    m.mul_(factors.beta2).add_(g, alpha=factors.grad_in_momentum)  # now: both are in the nearest cache
    return update.copy_(_sign_or_nan(update)) if _may_have_nan(update) else update.sign_()


def _signs(xs: list[Tensor]) -> list[Tensor]:
    """sign(x) in place of x, and NaN where x is NaN."""
    if _readable(xs[0]) and not any(map(_may_have_nan, xs)):
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
    if len(values) == 1:  # it may be stored negated
        destinations[0].copy_(values[0])
    else:
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
