"""Logit distillation that never holds all logits: checks, autograd, registration, and the loop. reference.linear_kd_loss defines its value.

With h [N, D], W [C, D] and b [C] of the student and of the teacher, R = chunk_rows rows at a time:

    x = h W' + b        both networks' logits, [R, C]
    G = dL/dx           by kernels/distill_kl.py or ops/distill_kl/eager.py, written over x
    dh = G W,   dW = sum over the chunks of G' h,   db the same with h = 1

Products: 2 N C D operations for the logits of each network and 4 N C D for the gradients, as many as with whole logits, because the
forward pass computes the gradients while G exists. Memory: the two chunks of logits, R C elements each, and what the loss needs for a
small part of the rows. Eager PyTorch keeps N x C logits and about five more tensors of that size.

dW is summed in float32: in bfloat16 four chunks nearly double its error, and hundreds make it ten times as large. A 16-bit weight
therefore needs a float32 [C, D] beside its gradient while the loss is computed. A single chunk does not need it, nor does a float32
weight under autocast, whose gradient is the sum.

The first backward pass hands the gradients over, a further one (retain_graph) computes them again. The backward pass does all the work
where gradients need the upstream gradient first: with reduction "none", which weighs rows one by one, and for float16 logits, whose
gradients underflow without a GradScaler's factor.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kdfast.ops import checks
from kdfast.ops.backend import kernel
from kdfast.ops.distill_kl import eager
from kdfast.ops.distill_kl.op import KDCall, check_tensors, choose_form, empty_results
from kdfast.ops.distill_kl.options import KDOptions
from kdfast.ops.precision import arithmetic

# elements of a chunk's logits unless the caller chooses
DEFAULT_CHUNK = 2**24  # 64 MB of float32
DEFAULT_CHUNK_CUDA = 2**27  # 256 MB of bfloat16
LEAST_ROWS = 64  # with fewer rows, the matrix products read the weights more than they compute


class Layer(NamedTuple):
    """A network's last layer as torch.nn.Linear has it: logits = hidden @ weight.T + bias."""

    hidden: Tensor  # [..., D]
    weight: Tensor  # [C, D]
    bias: Tensor | None  # [C]


def linear_kd_loss(student: Layer, teacher: Layer, labels: Tensor | None, chunk_rows: int | None, options: KDOptions) -> Tensor:
    """functional.linear_kd_loss, its options in one value."""
    checks.is_tensor("linear_kd_loss: student_hidden", student.hidden)
    labels = None if labels is None else checks.class_labels("linear_kd_loss: labels", labels)
    device = student.hidden.device.type
    # the meta device has no autocast, and raises when asked for it
    cast = torch.get_autocast_dtype(device) if device != "meta" and torch.is_autocast_enabled(device) else None
    _check_layers(student, teacher, cast)
    if chunk_rows is not None and (not isinstance(chunk_rows, int) or isinstance(chunk_rows, bool) or chunk_rows < 1):
        raise ValueError(f"linear_kd_loss: chunk_rows must be a positive integer or None, got {chunk_rows!r}")
    logits = student.hidden.new_empty(()).expand(*student.hidden.shape[:-1], student.weight.shape[0])  # takes no memory
    check_tensors(logits, (logits,), labels, options)
    call = _LinearKDCall(options, choose_form(student.hidden, teacher.hidden), chunk_rows, cast)
    return call.differentiate(labels, *student, *teacher)


def _check_layers(student: Layer, teacher: Layer, cast: torch.dtype | None) -> None:
    """Raises one sentence that names the argument."""
    for name, (hidden, weight, bias) in (("student", student), ("teacher", teacher)):
        checks.is_tensor(f"linear_kd_loss: {name}_hidden", hidden)
        checks.is_tensor(f"linear_kd_loss: {name}_weight", weight)
        checks.is_floating(f"linear_kd_loss: {name}_hidden", hidden)
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
        if bias is not None:
            checks.is_tensor(f"linear_kd_loss: {name}_bias", bias)
        if bias is not None and bias.shape != weight.shape[:1]:
            raise ValueError(f"linear_kd_loss: {name}_bias must be [{weight.shape[0]}], got shape {tuple(bias.shape)}")
        for part, x in (("hidden", hidden), ("weight", weight), ("bias", bias)):
            if x is None:
                continue
            checks.is_on(f"linear_kd_loss: {name}_{part}", x, "student_hidden's", student.hidden.device)
            if _logit_dtype(x, cast) != _logit_dtype(hidden, cast):
                raise TypeError(f"linear_kd_loss: {name}_{part} must have {name}_hidden's dtype {hidden.dtype}, got {x.dtype}")


def _logit_dtype(x: Tensor, cast: torch.dtype | None) -> torch.dtype:
    """The dtype in which x is multiplied; as in F.linear, autocast does not change float64 and integers."""
    return x.dtype if cast is None or x.dtype == torch.float64 or not x.is_floating_point() else cast


@dataclass(frozen=True)
class _LinearKDCall(KDCall):
    """A call of linear_kd_loss; its tensors are the student's hidden, weight and bias, then the teacher's."""

    chunk_rows: int | None  # None: a default number of elements
    cast: torch.dtype | None  # dtype of the logits and of the products' operands; None: the inputs' own

    def defers(self, learning: Sequence[Tensor]) -> bool:
        """See the head of this module."""
        return self.options.reduction == "none" or torch.float16 in [_logit_dtype(x, self.cast) for x in learning]

    def evaluate(
        self, labels: Tensor | None, tensors: Sequence[Any], wanted: Sequence[bool], upstream: Tensor | None
    ) -> tuple[Tensor, list[Tensor], None]:
        if torch.compiler.is_compiling():
            loss, *gradients = _op(list(tensors), labels, upstream, list(wanted), self.chunk_rows, self.cast, *self.options.encode())
            return loss, gradients, None
        return *self.compute(labels, tensors, wanted, upstream), None

    def compute(
        self, labels: Tensor | None, tensors: Sequence[Any], wanted: Sequence[bool], upstream: Tensor | None
    ) -> tuple[Tensor, list[Tensor]]:
        """The loss and the wanted gradients, times `upstream` where given; waits for nothing on a GPU.

        Call it where autograd records nothing. The loss is [] or [...] for reduction "none", float32 (float64 if an input is); the
        gradients are contiguous, in their inputs' shapes and dtypes.
        """
        student, teacher = Layer(*tensors[:3]), Layer(*tensors[3:])
        shape, C, device = student.hidden.shape[:-1], student.weight.shape[0], student.hidden.device
        if labels is not None and labels.is_cpu:  # elsewhere reading them would wait for the device: the kernel answers with NaN
            eager.check_labels(labels, C, self.options)
        dtype, N = arithmetic(student.hidden, teacher.hidden), shape.numel()
        weight = torch.ones((), dtype=dtype, device=device) if upstream is None else upstream.to(dtype)
        if self.options.reduction == "mean":
            weight = weight / (max(N, 1) if labels is None else (labels != self.options.ignore_index).sum().clamp_min(1))
        default = max(LEAST_ROWS, (DEFAULT_CHUNK_CUDA if student.hidden.is_cuda else DEFAULT_CHUNK) // C)
        R = max(1, min(N, self.chunk_rows or default))
        networks = [_Network(layer, needs, self.cast, R) for layer, needs in ((student, wanted[:3]), (teacher, wanted[3:]))]
        losses = self._compute_chunks(networks, None if labels is None else labels.reshape(-1), weight.expand(shape).reshape(-1), R)
        loss = losses.view(shape) if self.options.reduction == "none" else losses.sum()
        return loss, [gradient for network in networks for gradient in network.gradients()]

    def _compute_chunks(self, networks: Sequence["_Network"], labels: Tensor | None, weights: Tensor, R: int) -> Tensor:
        """The losses of all rows times `weights`, [N]; the networks sum up their gradients."""
        losses, N = torch.empty_like(weights), weights.shape[0]
        if self.options.kd_weight == 0:  # the teacher is not read: the student's logits take the place of the teacher's
            networks = networks[:1]
        buffers = [network.weight.new_empty(R, network.weight.shape[0]) for network in networks]
        wanted = [network.learns for network in networks] + [False] * (2 - len(networks))
        for start in range(0, N, R):
            rows = slice(start, min(start + R, N))
            logits = [network.compute_logits(rows, buffer) for network, buffer in zip(networks, buffers)]
            losses[rows] = self._compute_rows(logits[0], logits[-1], None if labels is None else labels[rows], wanted, weights[rows])
            for network, d_logits in zip(networks, logits):
                network.add_gradients(rows, d_logits)
        return losses

    def _compute_rows(self, student: Tensor, teacher: Tensor, labels: Tensor | None, wanted: Sequence[bool], weights: Tensor) -> Tensor:
        """The losses [R] of a chunk's logits [R, C] times `weights`; wanted gradients overwrite the logits, some of the rows at a time."""
        options, form = replace(self.options, reduction="none"), self.form
        assert form is not None
        if form is not eager:  # the kernel needs memory for the gradients alone
            parts = 8
        else:  # PyTorch needs up to ten tensors of the part's size in its arithmetic's dtype, five for plain distillation of the student
            plain = options.divergence == "forward" and not (options.standardize or options.ce_weight or wanted[-1])
            parts = (12 if plain else 22) * (1 if student.dtype == teacher.dtype == weights.dtype else 2)
        step = max(1, student.shape[0] // parts)
        losses = torch.empty_like(weights)
        learning = [logits for logits, need in zip((student, teacher), wanted) if need]
        for start in range(0, student.shape[0], step):
            part = slice(start, start + step)
            losses[part], gradients, _ = form.loss_and_gradients(
                student[part], (teacher[part],), None if labels is None else labels[part], options, wanted, weights[part]
            )
            for logits in learning:
                logits[part] = gradients.pop(0)  # freed before the next part's are made
        return losses


class _Network:
    """A layer, and the sums of its gradients over the chunks so far."""

    def __init__(self, layer: Layer, wanted: Sequence[bool], cast: torch.dtype | None, R: int) -> None:
        hidden, weight, bias = layer
        self.layer = layer
        self.hidden = hidden.reshape(-1, hidden.shape[-1])
        self.dtype = _logit_dtype(hidden, cast)
        self.weight, self.bias = weight.to(self.dtype), None if bias is None else bias.to(self.dtype)
        self.learns = any(wanted)
        several = self.hidden.shape[0] > R
        # zeros, because with kd_weight 0 the teacher's is never written
        self.d_hidden = torch.zeros(self.hidden.shape, dtype=hidden.dtype, device=hidden.device) if wanted[0] else None
        self.d_weight = _zeros(weight, several) if wanted[1] else None
        self.d_bias = _zeros(bias, several) if wanted[2] and bias is not None else None

    def compute_logits(self, rows: slice, buffer: Tensor) -> Tensor:
        """The logits of the rows, in the buffer [R, C]."""
        hidden = self.hidden[rows].to(self.dtype)
        out = buffer[: hidden.shape[0]]
        if self.bias is None:
            return torch.mm(hidden, self.weight.t(), out=out)
        return torch.addmm(self.bias, hidden, self.weight.t(), out=out)

    def add_gradients(self, rows: slice, d_logits: Tensor) -> None:
        """Adds to the gradients of hidden, weight and bias, from the gradient of the rows' logits."""
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
        """The wanted gradients, in their inputs' shapes and dtypes."""
        sums = zip((self.d_hidden, self.d_weight, self.d_bias), self.layer)
        return [gradient.view(x.shape).to(x.dtype) for gradient, x in sums if gradient is not None and x is not None]


def _zeros(x: Tensor, several: bool) -> Tensor:
    """The start of a sum of x's gradients: float32 for a 16-bit x and several addends, see the head of this module."""
    return torch.zeros(x.shape, dtype=arithmetic(x) if several else x.dtype, device=x.device)


def _add_product(total: Tensor, d_logits: Tensor, hidden: Tensor) -> None:
    """Adds d_logits.T [C, R] @ hidden [R, D] to total [C, D], whose dtype may be wider."""
    if total.dtype == d_logits.dtype:
        total.addmm_(d_logits.t(), hidden)
    elif total.is_cuda and torch.version.hip is None:
        torch.addmm(total, d_logits.t(), hidden, out_dtype=total.dtype, out=total)
    else:
        # only cuBLAS writes a wider product: a second one adds what the first lost in rounding, twice as fast as float32 operands
        for block, d_block in zip(total.chunk(16), d_logits.chunk(16, dim=1)):
            product = d_block.t() @ hidden
            block.add_(product).add_(torch.addmm(product, d_block.t(), hidden, beta=-1))


# ---- what torch.compile sees -----------------------------------------------------------------------------------------


@torch.library.custom_op("kdfast::linear_kd", mutates_args=())
def _op(
    tensors: list[Tensor | None],
    labels: Tensor | None,
    upstream: Tensor | None,
    wanted: list[bool],
    chunk_rows: int | None,
    cast: torch.dtype | None,
    numbers: list[float],
    ignore_index: int,
    choices: str,
) -> list[Tensor]:
    hidden = [x for x in (tensors[0], tensors[3]) if x is not None]
    options = replace(KDOptions.decode(numbers, ignore_index, choices), operator="linear_kd_loss")
    call = _LinearKDCall(options, kernel("distill_kl", *hidden) or eager, chunk_rows, cast)
    loss, gradients = call.compute(labels, tensors, wanted, upstream)
    return [loss, *gradients]


@_op.register_fake
def _(tensors: list[Tensor | None], labels: Tensor | None, upstream: Tensor | None, wanted: list[bool], *rest: Any) -> list[Tensor]:
    return empty_results(tensors, wanted, KDOptions.decode(*rest[2:]))
