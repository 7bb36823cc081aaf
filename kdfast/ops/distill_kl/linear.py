"""Logit distillation without the logits: checks, autograd, registration, and the walk. reference.linear_kd_loss is its meaning.

With h [N, D], W [C, D] and b [C] of the student and of the teacher, R = chunk_rows rows at a time:

    x = h W' + b        both networks' logits, [R, C]
    G = dL/dx           by the row operator of ops/distill_kl.py, kernel or PyTorch, written over x
    dh = G W,   dW = sum over the chunks of G' h,   db the same with h = 1

Products: 2 N C D operations for the logits of each network and 4 N C D for the gradients, as many as with whole logits, because the
forward pass takes the gradients while G is at hand. Memory: the two chunks of logits, R C elements each, and what the row operator
needs for a small part of the rows. Eager PyTorch keeps N x C logits and about five more tensors of that size.

dW is summed in float32: in bfloat16 four chunks nearly double its error, and hundreds make it ten times as large. A 16-bit weight
therefore needs a float32 [C, D] beside its gradient while the loss is computed (a single chunk does not, nor does a float32 weight
under autocast, whose gradient is the sum).

The first backward pass gives the gradients away, a further one (retain_graph) computes them again. Where they cannot be taken before
the upstream gradient is known, backward does all the work: with reduction "none", whose rows it weighs one by one, and for float16
logits, whose gradients underflow without a GradScaler's factor.
"""

from collections.abc import Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kdfast.ops import checks
from kdfast.ops.backend import kernel
from kdfast.ops.distill_kl import eager as distill_kl_torch
from kdfast.ops.distill_kl import op as distill_kl
from kdfast.ops.distill_kl.eager import Options
from kdfast.ops.precision import arithmetic

# elements of a chunk's logits where the caller does not say
DEFAULT_CHUNK = 2**24  # 64 MB of float32
DEFAULT_CHUNK_CUDA = 2**27  # 256 MB of bfloat16
LEAST_ROWS = 64  # below, the matrix products read the weights more than they compute


class Layer(NamedTuple):
    """A network's last layer as torch.nn.Linear has it: logits = hidden @ weight.T + bias."""

    hidden: Tensor  # [..., D]
    weight: Tensor  # [C, D]
    bias: Tensor | None  # [C]


def linear_kd_loss(student: Layer, teacher: Layer, labels: Tensor | None, chunk_rows: int | None, options: Options) -> Tensor:
    """functional.linear_kd_loss, its options in one value."""
    checks.is_tensor("linear_kd_loss: student_hidden", student.hidden)
    device = student.hidden.device.type
    # of the meta device, which has no autocast, not even to ask is allowed
    cast = torch.get_autocast_dtype(device) if device != "meta" and torch.is_autocast_enabled(device) else None
    _check_layers(student, teacher, cast)
    options = _checked(student, labels, chunk_rows, options)
    tensors = *student, *teacher
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors):
        return _LinearKD.apply(options, chunk_rows, cast, labels, *checks.distinct(*tensors))
    return _run(_form(student, teacher), student, teacher, labels, options, chunk_rows, cast, (False,) * 6, None)[0]


def _check_layers(student: Layer, teacher: Layer, cast: torch.dtype | None) -> None:
    """Raises one sentence that names the argument."""
    for name, (hidden, weight, bias) in (("student", student), ("teacher", teacher)):
        checks.is_tensor(f"linear_kd_loss: {name}_hidden", hidden)
        checks.is_tensor(f"linear_kd_loss: {name}_weight", weight)
        if not hidden.is_floating_point():
            raise TypeError(f"linear_kd_loss: {name}_hidden must be floating, got {hidden.dtype}")
        if hidden.dim() == 0 or hidden.shape[-1] == 0:
            raise ValueError(f"linear_kd_loss: {name}_hidden must be [..., D] with at least one feature, got shape {tuple(hidden.shape)}")
        if hidden.shape[:-1] != student.hidden.shape[:-1]:
            raise ValueError(
                f"linear_kd_loss: teacher_hidden must have student_hidden's rows {tuple(student.hidden.shape[:-1])}, "
                f"got {tuple(hidden.shape[:-1])}"
            )
        if weight.dim() != 2 or weight.shape[0] == 0 or weight.shape[1] != hidden.shape[-1]:
            raise ValueError(
                f"linear_kd_loss: {name}_weight must be [C, {hidden.shape[-1]}] to fit {name}_hidden, with at least one class, "
                f"got shape {tuple(weight.shape)}"
            )
        if weight.shape[0] != student.weight.shape[0]:
            raise ValueError(
                f"linear_kd_loss: teacher_weight must have student_weight's {student.weight.shape[0]} classes, got {weight.shape[0]}"
            )
        if bias is not None and bias.shape != weight.shape[:1]:
            raise ValueError(f"linear_kd_loss: {name}_bias must be [{weight.shape[0]}], got shape {tuple(bias.shape)}")
        for part, x in (("hidden", hidden), ("weight", weight), ("bias", bias)):
            if x is None:
                continue
            if x.device != student.hidden.device:
                raise ValueError(f"linear_kd_loss: {name}_{part} must be on student_hidden's {student.hidden.device}, got {x.device}")
            if _logit_dtype(x, cast) != _logit_dtype(hidden, cast):
                raise TypeError(f"linear_kd_loss: {name}_{part} must have {name}_hidden's dtype {hidden.dtype}, got {x.dtype}")


def _checked(student: Layer, labels: Tensor | None, chunk_rows: int | None, options: Options) -> Options:
    """The options, after kd_loss's own checks on a stand-in for logits that takes no memory; the range of labels is the walk's to check."""
    if chunk_rows is not None and (not isinstance(chunk_rows, int) or isinstance(chunk_rows, bool) or chunk_rows < 1):
        raise ValueError(f"linear_kd_loss: chunk_rows must be a positive integer or None, got {chunk_rows!r}")
    logits = student.hidden.new_empty(()).expand(*student.hidden.shape[:-1], student.weight.shape[0])
    try:
        options = distill_kl.plain(options)
        distill_kl._check(logits, (logits,), labels, options)
    except (TypeError, ValueError) as error:
        raise type(error)(f"linear_{error}") from None
    return options


def _logit_dtype(x: Tensor, cast: torch.dtype | None) -> torch.dtype:
    """What x is multiplied in; autocast leaves float64 and what is not floating alone, as it does for F.linear."""
    return x.dtype if cast is None or x.dtype == torch.float64 or not x.is_floating_point() else cast


# ---- autograd --------------------------------------------------------------------------------------------------------


class _LinearKD(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, options: Options, chunk_rows: int | None, cast: torch.dtype | None, labels: Tensor | None, *tensors: Any
    ) -> Tensor:
        student, teacher = Layer(*tensors[:3]), Layer(*tensors[3:])
        wanted, form = ctx.needs_input_grad[4:], _form(student, teacher)
        float16 = torch.float16 in [_logit_dtype(x, cast) for x, need in zip(tensors, wanted) if need]
        deferred = float16 or options.reduction == "none"
        now = (False,) * len(wanted) if deferred else wanted
        loss, gradients = _run(form, student, teacher, labels, options, chunk_rows, cast, now, None)
        ctx.form, ctx.wanted, ctx.deferred = form, wanted, deferred
        ctx.options, ctx.chunk_rows, ctx.cast = options, chunk_rows, cast
        if torch.compiler.is_compiling() and not deferred:
            ctx.save_for_backward(*gradients)
        else:
            ctx.save_for_backward(labels, *tensors)
            ctx.gradients = None if deferred else gradients
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        if torch.compiler.is_compiling():
            if ctx.form is None and not ctx.deferred:
                gradients = [_scaled(g, upstream) for g in ctx.saved_tensors]
            else:  # or the forward pass ran eagerly, and kept the inputs
                gradients = _again(ctx, None, upstream)
        elif torch.is_grad_enabled():
            raise RuntimeError("linear_kd_loss has no second derivative: call backward() or grad() without create_graph=True")
        else:
            gradients, ctx.gradients = ctx.gradients, None  # given away: whoever gets the buffer may keep it
            if gradients is None:
                gradients = _again(ctx, ctx.form, upstream)
            else:
                # in pieces, because a CPU multiplies a 16-bit tensor in a float32 copy
                pieces = [piece for g in gradients for piece in (g.chunk(16) if g.is_cpu else (g,))]
                ctx.form.rescale(pieces, upstream, None)
        in_order = iter(gradients)
        return None, None, None, None, *[next(in_order) if need else None for need in ctx.wanted]


def _again(ctx: Any, form: ModuleType | None, upstream: Tensor) -> list[Tensor]:
    """The gradients from the inputs, scaled by `upstream` before they are rounded to their dtype."""
    labels, *tensors = ctx.saved_tensors
    student, teacher = Layer(*tensors[:3]), Layer(*tensors[3:])
    return _run(form, student, teacher, labels, ctx.options, ctx.chunk_rows, ctx.cast, ctx.wanted, upstream)[1]


def _scaled(gradient: Tensor, upstream: Tensor) -> Tensor:
    return (gradient * upstream[None]).to(gradient.dtype)  # of one dimension: else it would be rounded to that dtype


def _form(student: Layer, teacher: Layer) -> ModuleType | None:
    """The row operator, fixed here for the backward pass too; None in a compiled graph, which asks when it runs."""
    if torch.compiler.is_compiling():
        return None
    return kernel("distill_kl", student.hidden, teacher.hidden) or distill_kl_torch


def _run(
    form: ModuleType | None,
    student: Layer,
    teacher: Layer,
    labels: Tensor | None,
    options: Options,
    chunk_rows: int | None,
    cast: torch.dtype | None,
    wanted: Sequence[bool],
    upstream: Tensor | None,
) -> tuple[Tensor, list[Tensor]]:
    if form is not None:
        return loss_and_gradients(form, student, teacher, labels, options, chunk_rows, cast, wanted, upstream)
    loss, *gradients = _op(*student, *teacher, labels, upstream, list(wanted), cast, chunk_rows, *options)
    return loss, gradients


# ---- what torch.compile sees -----------------------------------------------------------------------------------------


@torch.library.custom_op("kdfast::linear_kd", mutates_args=())
def _op(
    student_hidden: Tensor,
    student_weight: Tensor,
    student_bias: Tensor | None,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    teacher_bias: Tensor | None,
    labels: Tensor | None,
    upstream: Tensor | None,
    wanted: list[bool],
    cast: torch.dtype | None,
    chunk_rows: int | None,
    temperature: float,
    standardize: bool,
    eps: float,
    kd_weight: float,
    ce_weight: float,
    teacher_weights: list[float],
    label_smoothing: float,
    ignore_index: int,
    divergence: str,
    reduction: str,
) -> list[Tensor]:
    options = Options(
        temperature, standardize, eps, kd_weight, ce_weight, tuple(teacher_weights),
        label_smoothing, ignore_index, divergence, reduction,
    )  # fmt: skip
    student, teacher = Layer(student_hidden, student_weight, student_bias), Layer(teacher_hidden, teacher_weight, teacher_bias)
    form = kernel("distill_kl", student_hidden, teacher_hidden) or distill_kl_torch
    loss, gradients = loss_and_gradients(form, student, teacher, labels, options, chunk_rows, cast, wanted, upstream)
    return [loss, *gradients]


@_op.register_fake
def _(*arguments: Any) -> list[Tensor]:
    tensors, wanted, reduction = arguments[:6], arguments[8], arguments[-1]
    rows = tensors[0].shape[:-1] if reduction == "none" else ()
    loss = tensors[0].new_empty(rows, dtype=arithmetic(tensors[0], tensors[3]))
    return [loss, *[torch.empty_like(x, memory_format=torch.contiguous_format) for need, x in zip(wanted, tensors) if need]]


# ---- the walk --------------------------------------------------------------------------------------------------------


def loss_and_gradients(
    form: ModuleType,
    student: Layer,
    teacher: Layer,
    labels: Tensor | None,
    options: Options,
    chunk_rows: int | None,
    cast: torch.dtype | None,
    wanted: Sequence[bool],
    upstream: Tensor | None,
) -> tuple[Tensor, list[Tensor]]:
    """The loss and its gradients, times `upstream` where given; waits for nothing on a GPU. Call it where autograd records nothing.

    Args:
        form: kdfast.kernels.distill_kl or kdfast.ops.distill_kl.eager.
        student: hidden [..., D_s], weight [C, D_s], bias [C] or None.
        teacher: hidden [..., D_t], weight [C, D_t], bias [C] or None.
        labels: int64 [...], or None.
        options: see Options.
        chunk_rows: R; None: `default_rows`.
        cast: the dtype of the logits and of what is multiplied; None: the inputs' own.
        wanted: whose gradient is computed: the student's hidden, weight and bias, then the teacher's.
        upstream: the gradient of the loss, in the loss's shape.

    Returns:
        The loss, [] or [...] for reduction "none", float32 (float64 if an input is), and the wanted gradients in order, each
        contiguous in its input's shape and dtype.
    """
    shape, C = student.hidden.shape[:-1], student.weight.shape[0]
    _check_range(labels, C, options.ignore_index)
    N = shape.numel()
    R = max(1, min(N, chunk_rows or default_rows(student, teacher, wanted, cast)))
    networks = [_Network(layer, needs, cast, R) for layer, needs in ((student, wanted[:3]), (teacher, wanted[3:]))]
    weights = _row_weights(shape, labels, options, upstream, arithmetic(student.hidden, teacher.hidden), student.hidden.device)
    losses = _walk(form, networks, None if labels is None else labels.reshape(-1), options, R, weights)
    loss = losses.view(shape) if options.reduction == "none" else losses.sum()
    return loss, [gradient for network in networks for gradient in network.gradients()]


def default_rows(student: Layer, teacher: Layer, wanted: Sequence[bool], cast: torch.dtype | None) -> int:
    """How many rows make a chunk: of bounded memory, still worth a matrix product; or all, where chunks would save nothing."""
    N, C = student.hidden.shape[:-1].numel(), student.weight.shape[0]
    rows = max(LEAST_ROWS, (DEFAULT_CHUNK_CUDA if student.hidden.is_cuda else DEFAULT_CHUNK) // C)
    # a single chunk does without the float32 sums of 16-bit weights' gradients, whose bytes are those of so many more rows
    sums = sum(4 * x.weight.shape[1] for x, need in ((student, wanted[1]), (teacher, wanted[4])) if need and x.weight.itemsize == 2)
    logits = sum(_logit_dtype(x.hidden, cast).itemsize for x in (student, teacher))
    return N if rows + sums // logits >= N else rows


def _check_range(labels: Tensor | None, C: int, ignore_index: int) -> None:
    """On the CPU only: on a GPU reading labels would wait for the device, and the row operator answers with NaN."""
    if labels is not None and labels.is_cpu:
        broken = labels[((labels < 0) | (labels >= C)) & (labels != ignore_index)]
        if broken.numel():
            raise ValueError(f"linear_kd_loss: labels must be in [0, {C}) or equal to ignore_index {ignore_index}, got {broken[0].item()}")


def _row_weights(
    shape: torch.Size, labels: Tensor | None, options: Options, upstream: Tensor | None, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """By what each row's loss and gradients are multiplied, [N]: the reduction and the upstream gradient."""
    weight = torch.ones((), dtype=dtype, device=device) if upstream is None else upstream.to(dtype)
    if options.reduction == "mean":
        kept = max(shape.numel(), 1) if labels is None else (labels != options.ignore_index).sum().clamp_min(1)
        weight = weight / kept
    return weight.expand(shape).reshape(-1)


def _walk(form: ModuleType, networks: Sequence["_Network"], labels: Tensor | None, options: Options, R: int, weights: Tensor) -> Tensor:
    """The rows' losses [N], weighted; the gradients are left in the networks."""
    N = weights.shape[0]
    losses = torch.empty_like(weights)
    if options.kd_weight == 0:  # the teacher is not read: the student's logits stand in for its own
        networks = networks[:1]
    buffers = [network.weight.new_empty(R, network.weight.shape[0]) for network in networks]
    wanted = [network.descends for network in networks] + [False] * (2 - len(networks))
    for start in range(0, N, R):
        rows = slice(start, min(start + R, N))
        logits = [network.logits(rows, buffer) for network, buffer in zip(networks, buffers)]
        labels_here = None if labels is None else labels[rows]
        losses[rows] = _row_operator(form, logits[0], logits[-1], labels_here, options, wanted, weights[rows])
        for network, d_logits in zip(networks, logits):
            network.descend(rows, d_logits)
    return losses


def _row_operator(
    form: ModuleType,
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    options: Options,
    wanted: Sequence[bool],
    weights: Tensor,
) -> Tensor:
    """The losses [R] of a chunk's logits [R, C]; wanted gradients overwrite the logits, a part of the rows at a time."""
    if form is not distill_kl_torch:  # the kernel takes the gradients alone
        parts = 8
    else:  # PyTorch up to ten tensors of the part's size in the dtype of its arithmetic, five for plain distillation of the student
        plain = options.divergence == "forward" and not (options.standardize or options.ce_weight or wanted[-1])
        parts = 12 if plain else 22
        parts *= 1 if student.dtype == teacher.dtype == weights.dtype else 2
    step = max(1, student.shape[0] // parts)
    options = options._replace(reduction="none")
    losses = torch.empty_like(weights)
    written = [logits for logits, need in zip((student, teacher), wanted) if need]
    for start in range(0, student.shape[0], step):
        part = slice(start, start + step)
        losses[part], gradients, _ = form.loss_and_gradients(
            student[part], (teacher[part],), None if labels is None else labels[part], options, wanted, weights[part]
        )
        for logits in written:
            logits[part] = gradients.pop(0)  # gone before the next part's are made
    return losses


class _Network:
    """A layer on its way through the chunks, and its gradients as far as they have come."""

    def __init__(self, layer: Layer, wanted: Sequence[bool], cast: torch.dtype | None, R: int) -> None:
        hidden, weight, bias = layer
        self.layer = layer
        self.hidden = hidden.reshape(-1, hidden.shape[-1])
        self.dtype = _logit_dtype(hidden, cast)
        self.weight, self.bias = weight.to(self.dtype), None if bias is None else bias.to(self.dtype)
        self.descends = any(wanted)
        several = self.hidden.shape[0] > R
        # zeros, because with kd_weight 0 the teacher's is never written
        self.d_hidden = torch.zeros(self.hidden.shape, dtype=hidden.dtype, device=hidden.device) if wanted[0] else None
        self.d_weight = _zeros(weight, several) if wanted[1] else None
        self.d_bias = _zeros(bias, several) if wanted[2] and bias is not None else None

    def logits(self, rows: slice, buffer: Tensor) -> Tensor:
        """Of the rows, in the buffer [R, C]."""
        hidden = self.hidden[rows].to(self.dtype)
        out = buffer[: hidden.shape[0]]
        if self.bias is None:
            return torch.mm(hidden, self.weight.t(), out=out)
        return torch.addmm(self.bias, hidden, self.weight.t(), out=out)

    def descend(self, rows: slice, d_logits: Tensor) -> None:
        """From the gradient of the rows' logits to those of hidden, weight and bias."""
        if self.d_hidden is not None:
            if self.d_hidden.dtype == self.dtype:
                torch.mm(d_logits, self.weight, out=self.d_hidden[rows])
            else:
                self.d_hidden[rows] = d_logits @ self.weight
        if self.d_weight is not None:
            _add_product(self.d_weight, d_logits, self.hidden[rows].to(self.dtype))
        if self.d_bias is not None:  # the weight of a feature that is always 1
            _add_product(self.d_bias[:, None], d_logits, d_logits.new_ones(d_logits.shape[0], 1))

    def gradients(self) -> list[Tensor]:
        """Those that were wanted, in their inputs' shapes and dtypes."""
        made = zip((self.d_hidden, self.d_weight, self.d_bias), self.layer)
        return [gradient.view(x.shape).to(x.dtype) for gradient, x in made if gradient is not None and x is not None]


def _zeros(x: Tensor, several: bool) -> Tensor:
    """Where the gradient of x is summed: in float32 for a 16-bit x and several addends, see above."""
    return torch.zeros(x.shape, dtype=arithmetic(x) if several else x.dtype, device=x.device)


def _add_product(total: Tensor, d_logits: Tensor, hidden: Tensor) -> None:
    """Adds d_logits.T [C, R] @ hidden [R, D] to total [C, D], whose dtype may be wider."""
    if total.dtype == d_logits.dtype:
        total.addmm_(d_logits.t(), hidden)
    elif total.is_cuda and torch.version.hip is None:
        torch.addmm(total, d_logits.t(), hidden, out_dtype=total.dtype, out=total)
    else:
        # only cuBLAS writes a wider product: a second one brings what the first lost in rounding, twice as fast as float32 operands
        for block, d_block in zip(total.chunk(16), d_logits.chunk(16, dim=1)):
            product = d_block.t() @ hidden
            block.add_(product).add_(torch.addmm(product, d_block.t(), hidden, beta=-1))
