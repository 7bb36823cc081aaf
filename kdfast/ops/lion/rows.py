"""The tensors and options of a Lion step, and how the tensors lie in memory."""

from itertools import pairwise
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

LOW_PRECISION = (torch.bfloat16, torch.float16)
Rounding = Literal["nearest", "stochastic", "kahan"]


class Options(NamedTuple):
    """The options of a parameter group."""

    lr: float | Tensor
    beta1: float
    beta2: float
    weight_decay: float  # multiplied by lr: a decoupled decay is already divided by its own
    maximize: bool = False
    max_grad_norm: float | None = None
    # those from here on decide which code steps a parameter, and with which state: a plan depends on them
    cautious: bool = False
    rounding: Rounding = "nearest"  # for bfloat16 and float16 parameters
    capturable: bool = False
    fused: bool | None = None
    foreach: bool | None = None

    @classmethod
    def from_group(cls, group: dict[str, Any]) -> "Options":
        """The options of a group of Lion's param_groups."""
        return cls(
            group["lr"] if isinstance(group["lr"], Tensor) else float(group["lr"]),
            float(group["betas"][0]),
            float(group["betas"][1]),
            float(group["weight_decay"] / group["init_lr"] if group["decoupled_weight_decay"] else group["weight_decay"]),
            *map(group.__getitem__, _SAME_NAMES),
        )

    def lr_on(self, device: torch.device) -> float | Tensor:
        """The rate as a number where it can be read without waiting for a device, else 0-dim on this device."""
        if not isinstance(self.lr, Tensor):
            return self.lr
        return self.lr.item() if is_readable(self.lr) else self.lr.reshape(()).to(device)


_SAME_NAMES = Options._fields[4:]  # options that a group has under the same names


class Row(NamedTuple):
    """One parameter with its gradient and state."""

    param: Tensor
    grad: Tensor
    momentum: Tensor
    scale: Tensor | None = None  # of an int8 momentum: float32, one for each GROUP elements of its memory
    compensation: Tensor | None = None  # what rounding took from the parameter ("kahan")
    step: Tensor | None = None  # number of steps taken, 0-dim float32; with `number` the seed of random rounding
    number: int = 0  # the parameter's place in the optimizer
    whole: Any = None  # the DTensor whose local shard param is


def take_shards(row: Row) -> Row:
    """Replaces DTensors by this process's shards; other rows stay as they are."""
    param: Any = row.param
    grad: Any = row.grad
    if not hasattr(param, "to_local"):
        return row
    if getattr(grad, "placements", param.placements) != param.placements:
        grad = grad.redistribute(placements=param.placements)
    shard = 0  # its place among the others: each rounds with its own noise, and replicas alike
    for dimension, placement in enumerate(param.placements):
        if is_sharded(placement):
            shard = shard * param.device_mesh.size(dimension) + param.device_mesh.get_local_rank(dimension)
    local = {name: t.to_local() for name, t in row._replace(grad=grad)._asdict().items() if hasattr(t, "to_local")}
    return row._replace(**local, number=row.number + (shard << 16), whole=param)


def is_sharded(placement: Any) -> bool:
    """Whether a DTensor's placement splits it; is_shard() is false for the strided shards that FSDP2 makes of tensor-parallel ones."""
    return not (placement.is_replicate() or placement.is_partial())


def check_shapes(row: Row) -> None:
    """Raises RuntimeError where a kernel would walk beyond a tensor's end, and PyTorch would fail halfway or broadcast."""
    for name, tensor in (("the gradient", row.grad), ("exp_avg", row.momentum), ("kahan_comp", row.compensation)):
        if tensor is not None and tensor.shape != row.param.shape:
            shapes = f"{tuple(row.param.shape)}, got {tuple(tensor.shape)}"
            raise RuntimeError(f"Lion: {name} of parameter {row.number} must have the parameter's shape {shapes}")


def count_steps(steps: list[Tensor], found_inf: Tensor | None) -> None:
    """Adds 1 to the counters, or 0 where found_inf is not 0, which their device decides."""
    if steps and found_inf is None:
        torch._foreach_add_(steps, 1.0)
    elif steps and found_inf is not None:
        taken = {device: (found_inf.to(device) == 0).to(torch.float32) for device in {step.device for step in steps}}
        # a list, since of a single tensor the CPU would read the value
        torch._foreach_add_(steps, [taken[step.device] for step in steps])


def is_readable(tensor: Tensor) -> bool:
    """Whether values can be read without waiting for a device or breaking a graph; a fake tensor has none."""
    return tensor.is_cpu and not torch.compiler.is_compiling() and not isinstance(tensor, FakeTensor)


# ---- memory layout ---------------------------------------------------------------------------------------------------


def is_plain(row: Row) -> bool:
    """Whether a kernel, or one call for many tensors, can step the row.

    All tensors own their memory and hold their values as they are. Parameter and state fill their memory without gaps, in the same
    order of dimensions. The gradient's order may differ (see `in_order`), but each of its elements has a place of its own.
    """
    state = [t for t in (row.param, row.momentum, row.compensation) if t is not None]
    if not all(_owns_memory(t) and not t.is_neg() for t in (*state, row.grad)) or 0 in row.grad.stride():
        return False
    # empty_like keeps the strides of a tensor that fills a stretch of memory, and of no other
    is_dense = row.param.is_contiguous() or torch.empty_like(row.param, device="meta").stride() == row.param.stride()
    return is_dense and all(_same_order(t, row.param) for t in state)


def _owns_memory(tensor: Tensor) -> bool:
    """False for subclasses, tensors in a transform of torch.func, meta tensors, and the zeros without memory that autograd makes."""
    if type(tensor) not in (Tensor, torch.nn.Parameter):
        return False
    try:
        return tensor.data_ptr() != 0 or tensor.numel() == 0
    except RuntimeError:
        return False


def _same_order(a: Tensor, b: Tensor) -> bool:
    """Whether the elements of two tensors of one shape follow each other alike in memory."""
    return a.stride() == b.stride() or all(i == j or size == 1 for i, j, size in zip(a.stride(), b.stride(), b.shape))


def in_order(row: Row) -> Row:
    """The row, with a copy of a gradient that does not lie in memory as the parameter does."""
    if _same_order(row.grad, row.param):
        return row
    return row._replace(grad=torch.empty_like(row.param, dtype=row.grad.dtype).copy_(row.grad))


def share_memory(rows: list[Row]) -> bool:
    """Whether two parameters or momenta of plain rows overlap in memory, as weights tied by their .data do."""
    spans = sorted((t.data_ptr(), t.nbytes) for row in rows for t in (row.param, row.momentum))
    return any(start + size > following for (start, size), (following, _) in pairwise(spans))
