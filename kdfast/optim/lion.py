"""Lion, the optimizer of "Symbolic Discovery of Optimization Algorithms" (Chen et al., 2023, arXiv:2302.06675).

    p <- p (1 - lr weight_decay);   p <- p - lr sign(beta1 m + (1 - beta1) g);   m <- beta2 m + (1 - beta2) g

Every parameter moves by lr in every step, whatever the size of its gradient: take a learning rate 3 to 10 times below AdamW's
and a weight decay as many times above. The arithmetic, and how few passes over memory it takes, is in kdfast/ops/lion.py.
"""

from collections.abc import Callable, Hashable, Iterable, Sequence
from itertools import chain, compress
from numbers import Real  # NumPy's numbers too
from operator import attrgetter, itemgetter
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from kdfast.ops import backend
from kdfast.ops.lion.op import (
    LOW_PRECISION,
    PLAIN,
    ROUNDINGS,
    Again,
    Columns,
    Options,
    Row,
    decoded,
    encoded,
    facts,
    grad_norm,
    is_sharded,
    is_watched,
    lion_step,
    scales_of,
)

_CAPTURABLE = ("cuda", "xpu", "hpu", "mtia")
_LEAST_8BIT = 4096  # elements: biases and normalizations are no memory to save, and the most sensitive
_LATER_OPTIONS = {  # what a pickle of an older version may lack
    "cautious": False,
    "maximize": False,
    "capturable": False,
    "fused": None,
    "foreach": None,
    "rounding": "nearest",
    "momentum_dtype": None,
    "max_grad_norm": None,
}


_FOREIGN = {"amsgrad": "Adam's or AdamW's", "dampening": "SGD's", "momentum_decay": "NAdam's", "centered": "RMSprop's"}


class Lion(Optimizer):
    """Lion, a drop-in for lion_pytorch.Lion: the same arguments, state (exp_avg) and, in float32, the same bits.

    One deviation of its values is deliberate: where a gradient or momentum is NaN the parameter becomes NaN. torch.sign maps NaN to 0,
    and the original would leave such a parameter unchanged for ever without a word.

    bfloat16 and float16 parameters are stepped in float32 and rounded once (the original rounds after every operation;
    1 - lr weight_decay alone rounds to 1 in bfloat16).

    Args:
        params: parameters, (name, parameter) pairs, or dicts of a group's parameters and options.
        lr: learning rate, > 0; a float or a one-element tensor (changed in place by schedulers, without recompiling).
        betas: beta1 weighs momentum against gradient in the update, beta2 in the momentum; each in [0, 1].
        weight_decay: decoupled from the gradient, multiplied by the current lr.
        use_triton: accepted for compatibility, ignored.
        decoupled_weight_decay: weight_decay is divided by the lr given here, so that the decay of the first steps does not
            depend on lr.
        cautious: moves only elements whose update agrees with the gradient's sign, each tensor's others scaled up to keep
            its mean step (arXiv:2411.16085; lion_pytorch.cautious_lion with a factor of 0).
        maximize: ascends.
        capturable: the step may be captured in a CUDA graph; parameters must be on a GPU. Take a step before the capture. A rate
            that is to change between replays must be a tensor on the GPU: a number is captured as it is.
        fused: True: a kernel, Triton's on a GPU and a compiled one on a CPU, or an error where there is none (parameters whose
            memory has gaps take PyTorch all the same). None: a kernel wherever one runs. False: PyTorch.
        foreach: many tensors at once (the default), with True without Triton; or with False one after the other, in PyTorch.
        rounding: of bfloat16 and float16 parameters. "nearest"; "stochastic": up or down so that the expectation is exact,
            the same way on all ranks; "kahan": what rounding loses is kept in a second tensor of the same dtype
            (state kahan_comp) and added next time.
        momentum_dtype: of exp_avg, floating; None: the parameter's. torch.int8: 8 bits an element, with a scale (state
            exp_avg_scale) for 256 of them, and rounded up or down at random so that the mean is exact; tensors of fewer
            than 4,096 elements keep float32. A gradient that is NaN or infinite makes all parameters of its 256 NaN.
        max_grad_norm: gradients of all groups that have this option are scaled down to this L2 norm within the step, as
            clip_grad_norm_ does, but without writing them.

    Raises:
        ValueError, TypeError: an option out of range, or of the wrong type.
        RuntimeError: in step(): sparse or complex gradients; fused=True without a kernel; capturable=True on a CPU.
        TypeError: in step(): momentum_dtype=torch.int8 with float64 or sharded (DTensor) parameters.

    On a GPU parameters of one device, dtypes and hyper-parameters are stepped in one launch, and on a CPU those of float32 and
    bfloat16 in one call of compiled code, which is made where kdfast is installed beside a C compiler. A gradient whose
    dimensions lie in another order than its parameter's (channels_last and contiguous) is copied first; parameters whose
    memory has gaps take the PyTorch form, and so do, on a CPU, cautious steps, other roundings than "nearest" and 8-bit
    momenta; and everything under a mode that is to see PyTorch's operations. Sharded parameters (FSDP2's DTensors) are
    stepped shard by shard.

    Checkpoints of lion_pytorch, google's, timm's and optimi's Lion load with load_state_dict.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        use_triton: bool = False,
        decoupled_weight_decay: bool = False,
        *,
        cautious: bool = False,
        maximize: bool = False,
        capturable: bool = False,
        fused: bool | None = None,
        foreach: bool | None = None,
        rounding: str = "nearest",
        momentum_dtype: torch.dtype | None = None,
        max_grad_norm: float | None = None,
    ) -> None:
        _check_number("lr", lr)
        if not lr > 0:
            raise ValueError(f"Lion: lr must be positive, got {float(lr)}")
        defaults = {
            "lr": lr,
            "betas": betas,
            "weight_decay": weight_decay,
            "decoupled_weight_decay": decoupled_weight_decay,
            "init_lr": float(lr),  # what decoupled weight decay is divided by
            "cautious": cautious,
            "maximize": maximize,
            "capturable": capturable,
            "fused": fused,
            "foreach": foreach,
            "rounding": rounding,
            "momentum_dtype": momentum_dtype,
            "max_grad_norm": max_grad_norm,
        }
        _check(defaults)
        super().__init__(params, defaults)
        self._tables: dict[Hashable, Any] = {}  # where the kernel found the tensors
        self._last: _Step | None = None
        self._step_supports_amp_scaling = True  # GradScaler hands over grad_scale and found_inf instead of reading them

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds parameters with options of their own; the others are the optimizer's.

        Args:
            param_group: "params", and any option of the constructor.

        Raises:
            ValueError, TypeError: an option out of range, or of the wrong type.
        """
        if isinstance(param_group, dict):
            _check({**self.defaults, **param_group})
        super().add_param_group(param_group)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._tables, self._last = {}, None
        self._step_supports_amp_scaling = True
        self.defaults = _LATER_OPTIONS | self.defaults
        for group in self.param_groups:
            if "beta1" in group and "betas" not in group:  # optimi
                group["betas"] = group["beta1"], group["beta2"]
                group["foreach"] = None  # its own choice of implementation
                if group.get("kahan_sum"):
                    group["rounding"] = "kahan"
                if group.get("decouple_lr"):
                    group["decoupled_weight_decay"], group["init_lr"] = True, group.get("max_lr") or group["lr"]
            if "caution" in group and "cautious" not in group:  # timm
                group["cautious"] = group["caution"]
            for option, value in self.defaults.items():
                group.setdefault(option, value)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what state_dict() of this or another Lion returned.

        Args:
            state_dict: groups and state; a momentum keeps the precision of momentum_dtype.

        Raises:
            ValueError: another optimizer's state; groups or parameters differ in number, a momentum in shape; an int8 momentum
                lacks its exp_avg_scale; timm's corrected_weight_decay, which is another formula.
        """
        final: list[dict[str, Any]] = []  # what is loaded: hooks may have put another dict in place of the one given

        def before(_: Optimizer, saved: dict[str, Any]) -> None:
            _check_saved(saved)
            final.append(saved)

        def after(_: Optimizer) -> None:
            # torch casts all state to the parameter's dtype: momenta are fetched again in theirs, and in the parameter's layout
            for group, saved in zip(self.param_groups, final[0]["param_groups"]):
                for param, name in zip(group["params"], saved["params"]):
                    theirs = final[0]["state"].get(name, {})
                    if isinstance(theirs.get("exp_avg"), Tensor):
                        self._load_momentum(param, theirs, group["momentum_dtype"])

        # the last of the hooks before, and the first of those after, which may change momenta in their turn
        hooks = self.register_load_state_dict_pre_hook(before), self.register_load_state_dict_post_hook(after, prepend=True)
        try:
            super().load_state_dict(state_dict)
        finally:
            for hook in hooks:
                hook.remove()

    def _load_momentum(self, param: Tensor, theirs: dict[str, Tensor], momentum_dtype: torch.dtype | None) -> None:
        state = self.state[param]
        momentum = theirs["exp_avg"]
        if momentum.shape != param.shape:
            raise ValueError(f"Lion: exp_avg must have its parameter's shape {tuple(param.shape)}, got {tuple(momentum.shape)}")
        if "exp_avg_scale" in theirs:
            momentum = decoded(momentum, theirs["exp_avg_scale"])
        state.pop("exp_avg_scale", None)
        if isinstance(state.get("kahan_comp"), Tensor):
            state["kahan_comp"] = torch.zeros_like(param, memory_format=torch.preserve_format).copy_(state["kahan_comp"])
        state.update(_new_momentum(param, momentum_dtype))
        if "exp_avg_scale" not in state:
            state["exp_avg"].copy_(momentum)
        elif "exp_avg_scale" in theirs and theirs["exp_avg"].stride() == param.stride():
            state["exp_avg"].copy_(theirs["exp_avg"])
            state["exp_avg_scale"].copy_(theirs["exp_avg_scale"])
        else:
            copy = torch.empty_like(state["exp_avg"], dtype=torch.float32).copy_(momentum)
            state["exp_avg"], state["exp_avg_scale"] = encoded(copy, None)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One update of all parameters that have a gradient.

        Args:
            closure: computes the loss and its gradients again.

        Returns:
            The closure's loss, or None.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # GradScaler's, sums over devices: 0-dim or of one element
        grad_scale: Tensor | None = getattr(self, "grad_scale", None)
        found_inf: Tensor | None = getattr(self, "found_inf", None)
        unscale = None if grad_scale is None else grad_scale.reshape(()).reciprocal()
        found_inf = None if found_inf is None else found_inf.reshape(())
        bundles = self._bundles()
        if not self._step_again(bundles, unscale, found_inf):
            self._step_anew(bundles, unscale, found_inf)
        return loss

    def _step_again(self, bundles: list[list[int]], unscale: Tensor | None, found_inf: Tensor | None) -> bool:
        """Takes the step in the ways of the last, if these are good still; whether they are."""
        last = self._last
        if last is None or is_watched():
            return False
        if not last.is_on_cpu:
            self._accelerator_graph_capture_health_check()
        columns = last.find(self, bundles)
        if columns is None:
            return False
        norm = self._grad_norm(unscale)
        for place, way, places in last.ways:
            group = self.param_groups[place]
            factor = _product(unscale, _clip_factor(norm, group["max_grad_norm"]))
            way.step(columns.of(places), _options(group), factor, found_inf)
        return True

    @torch.no_grad()
    def _step_anew(self, bundles: list[list[int]], unscale: Tensor | None, found_inf: Tensor | None) -> None:
        if not all(param.is_cpu for group in self.param_groups for param in group["params"]):
            self._accelerator_graph_capture_health_check()  # raises where a CUDA graph is captured without capturable=True
        ways: list[tuple[int, list[Again]]] | None = []
        rows_of_bundles = self._rows_of(bundles, found_inf)  # refuses gradients that have no norm
        norm = self._grad_norm(unscale)
        for places, rows in zip(bundles, rows_of_bundles):
            if not rows:
                continue
            group = self.param_groups[places[0]]
            again = lion_step(
                rows,
                _options(group),
                grad_factor=_product(unscale, _clip_factor(norm, group["max_grad_norm"])),
                found_inf=found_inf,
                foreach=group["foreach"],
                fused=group["fused"],
                capturable=group["capturable"],
                tables=self._tables,
            )
            ways = None if ways is None or again is None else [*ways, (places[0], again)]
        if not torch.compiler.is_compiling():  # PyTorch 2.11's compiler cannot set an optimizer's attribute
            self._last = None if ways is None else _Step(self, bundles, ways, self._last)

    def _bundles(self) -> list[list[int]]:
        """Groups whose options are the same, by their places."""
        if len(self.param_groups) == 1:
            return [[0]]
        found: list[tuple[list[Any], list[int]]] = []
        for place, group in enumerate(self.param_groups):
            settings = [id(value) if isinstance(value, Tensor) else value for value in map(group.__getitem__, self.defaults)]
            for others, places in found:
                if others == settings:
                    places.append(place)
                    break
            else:
                found.append((settings, [place]))
        return [places for _, places in found]

    def _rows_of(self, bundles: list[list[int]], found_inf: Tensor | None) -> list[list[Row]]:
        """Of each bundle, the parameters with gradients, numbered through all groups."""
        rows, first = [], 0
        for group in self.param_groups:
            rows.append(self._rows(group, first, found_inf))
            first += len(group["params"])
        return [[row for place in places for row in rows[place]] for places in bundles]

    def _rows(self, group: dict[str, Any], first: int, found_inf: Tensor | None) -> list[Row]:
        """Parameters with gradients and their state, which is made when first needed."""
        rows = []
        capturable, rounding = group["capturable"], group["rounding"]
        for number, param in enumerate(group["params"], first):
            grad = param.grad
            if grad is None:
                continue
            if grad.layout != torch.strided or grad.is_complex():
                kind = "complex" if grad.is_complex() else f"sparse ({grad.layout})"
                raise RuntimeError(f"Lion: gradients must be dense and real, got a {kind} one of shape {tuple(grad.shape)}")
            if capturable and param.device.type not in _CAPTURABLE and not torch.compiler.is_compiling():
                raise RuntimeError(f"Lion: capturable=True needs parameters on {' or '.join(_CAPTURABLE)}, got one on {param.device.type}")
            state = self.state[param]
            if "exp_avg" not in state:
                state.update(_new_momentum(param, group["momentum_dtype"]))
            elif state["exp_avg"].device != param.device:  # the model was moved
                state.update({key: t.to(param.device) for key, t in state.items() if isinstance(t, Tensor)})
            scale = state.get("exp_avg_scale")
            rounds = rounding != "nearest" and param.dtype in LOW_PRECISION
            compensation = _compensation(state, param) if rounds and rounding == "kahan" else None
            step = _step_counter(state, param.device) if scale is not None or (rounds and rounding == "stochastic") else None
            row = Row(param, grad, state["exp_avg"], scale, compensation, step, number)
            rows.append(row if type(param) in PLAIN else _shard(row))
        steps = [row.step for row in rows if row.step is not None]
        for device in {step.device for step in steps}:  # counted are the steps that are taken, on the device
            here = [step for step in steps if step.device == device]
            taken = None if found_inf is None else (found_inf.to(device) == 0).to(torch.float32)
            # a list, since of a single tensor the CPU would read the value
            torch._foreach_add_(here, 1.0 if taken is None else [taken] * len(here))
        return rows

    def _grad_norm(self, unscale: Tensor | None) -> Tensor | None:
        """The norm of the (unscaled) gradients of all groups that clip; None where none does."""
        clipped = [group for group in self.param_groups if group["max_grad_norm"] is not None]
        grads = [param.grad for group in clipped for param in group["params"] if param.grad is not None]
        if not grads:
            return None
        with torch.no_grad():
            norm = grad_norm(grads)
        return norm if unscale is None else norm * unscale.to(norm.device)


class _Step:
    """A step after which the next may be the same but for values and the places of gradients: nothing is sorted then.

    Sorting takes twice the time of looking, for a network of 300 tensors longer than a GPU's work, for one of ten longer than a CPU's.
    How tensors lie is kept from the second step of a kind on, since kinds may alternate.
    """

    def __init__(self, optimizer: Lion, bundles: list[list[int]], ways: list[tuple[int, list[Again]]], before: "_Step | None") -> None:
        self._kind, columns = _look(optimizer, bundles)
        self.is_on_cpu = all(param.is_cpu for param in columns.params)
        self._facts: list[Any] | None = None
        self.ways: list[tuple[int, Again, list[int] | None]] = []  # with the place of a group, and those of the way's columns
        if before is not None and before._kind == self._kind:
            self._facts = facts(columns)
            numbers = [number for number, type_of_grad in enumerate(self._kind[0]) if type_of_grad is not type(None)]
            place_of = dict(zip(numbers, range(len(numbers))))
            for group, buckets in ways:
                for way in buckets:
                    places = None if way.numbers == numbers else [place_of[number] for number in way.numbers]
                    self.ways.append((group, way, places))

    def find(self, optimizer: Lion, bundles: list[list[int]]) -> Columns | None:
        """What is to be stepped in the ways of this step; None where these are not good any more."""
        if self._facts is None:
            return None
        kind, columns = _look(optimizer, bundles)
        if kind != self._kind or facts(columns) != self._facts:
            return None
        return columns if all(way.follows(columns.of(places)) for _, way, places in self.ways) else None


def _look(optimizer: Lion, bundles: list[list[int]]) -> tuple[list[Any], Columns]:
    """What decides how an optimizer's parameters are stepped but for how they lie; and those with gradients, and what is theirs."""
    groups, state = optimizer.param_groups, optimizer.state
    params: list[Any] = groups[0]["params"] if len(groups) == 1 else list(chain.from_iterable(map(_PARAMS, groups)))
    grads = list(map(_GRAD, params))
    kind = [list(map(type, grads)), list(map(_WAY, groups)), bundles, backend.current()]
    if type(None) in kind[0]:
        used = [grad is not None for grad in grads]
        params, grads = list(compress(params, used)), list(compress(grads, used))
    momenta = [(state.get(param) or {}).get("exp_avg") for param in params]
    if len(groups) > 1:
        kind.append([len(group["params"]) for group in groups])
    return kind, Columns(params, momenta, grads)


_PARAMS, _GRAD = itemgetter("params"), attrgetter("grad")
_WAY = itemgetter("cautious", "maximize", "capturable", "fused", "foreach", "rounding", "momentum_dtype")


def _options(group: dict[str, Any]) -> Options:
    return Options(
        group["lr"].reshape(()) if isinstance(group["lr"], Tensor) else float(group["lr"]),
        float(group["betas"][0]),
        float(group["betas"][1]),
        float(group["weight_decay"] / group["init_lr"] if group["decoupled_weight_decay"] else group["weight_decay"]),
        group["cautious"],
        group["maximize"],
        group["rounding"],
    )


def _new_momentum(param: Tensor, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """The state of a parameter that was never stepped."""
    if dtype != torch.int8:
        return {"exp_avg": torch.zeros_like(param, dtype=dtype, memory_format=torch.preserve_format)}
    if param.dtype == torch.float64 or hasattr(param, "to_local"):
        kind = "a sharded one" if hasattr(param, "to_local") else "float64"
        raise TypeError(f"Lion: momentum_dtype=torch.int8 needs unsharded float32, bfloat16 or float16 parameters, got {kind}")
    if param.numel() < _LEAST_8BIT:
        return {"exp_avg": torch.zeros_like(param, dtype=torch.float32, memory_format=torch.preserve_format)}
    return {
        "exp_avg": torch.zeros_like(param, dtype=torch.int8, memory_format=torch.preserve_format),
        "exp_avg_scale": torch.zeros(scales_of(param.numel()), dtype=torch.float32, device=param.device),
    }


def _compensation(state: dict[str, Any], param: Tensor) -> Tensor:
    """What the stored parameter lacks, in its dtype."""
    if state.get("kahan_comp") is None:
        state["kahan_comp"] = torch.zeros_like(param, memory_format=torch.preserve_format)
    elif state["kahan_comp"].dtype != param.dtype:
        state["kahan_comp"] = state["kahan_comp"].to(param.dtype)
    compensation: Tensor = state["kahan_comp"]
    return compensation


def _step_counter(state: dict[str, Any], device: torch.device) -> Tensor:
    """How often the parameter was stepped, for the noise of rounding: float32 on its device, as torch's own optimizers."""
    step = state.get("step", 0.0)
    if not isinstance(step, Tensor) or step.dtype != torch.float32 or step.device != device or step.dim():
        state["step"] = step = torch.as_tensor(step, dtype=torch.float32, device=device).reshape(()).clone()
    return step


def _shard(row: Row) -> Row:
    """This process's part of DTensors (and the row as it is, of other subclasses of Tensor)."""
    param: Any = row.param
    grad: Any = row.grad
    if not hasattr(param, "to_local"):
        return row
    if getattr(grad, "placements", param.placements) != param.placements:
        grad = grad.redistribute(placements=param.placements)
    shard = 0  # its number among the others, for noise of its own; replicas have the same
    for dimension, placement in enumerate(param.placements):
        if is_sharded(placement):
            shard = shard * param.device_mesh.size(dimension) + param.device_mesh.get_local_rank(dimension)
    local = {name: t.to_local() for name, t in row._replace(grad=grad)._asdict().items() if hasattr(t, "to_local")}
    return row._replace(**local, number=row.number + (shard << 16), whole=param)


def _clip_factor(norm: Tensor | None, max_norm: float | None) -> Tensor | None:
    """min(1, max_norm / norm), with clip_grad_norm_'s 1e-6 in the denominator."""
    if norm is None or max_norm is None:
        return None
    return (max_norm / (norm + 1e-6)).clamp(max=1.0)


def _product(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return b if a is None else a
    return a.to(b.device) * b


def _check_saved(saved: dict[str, Any]) -> None:
    """Raises ValueError for what another Lion may have saved and this one would take for something else."""
    for group in saved["param_groups"]:
        for key, whose in _FOREIGN.items():
            if key in group:
                raise ValueError(f"Lion: the state must be a Lion's, got {whose} (a group has {key!r})")
        if group.get("corrected_weight_decay"):
            raise ValueError("Lion: corrected_weight_decay (timm) decays by lr^2 / max_lr, which this Lion does not: load without it")
    for name, state in saved["state"].items():
        momentum = state.get("exp_avg")
        if isinstance(momentum, Tensor) and not momentum.is_floating_point() and "exp_avg_scale" not in state:
            raise ValueError(f"Lion: exp_avg of parameter {name} is {momentum.dtype}, for which its exp_avg_scale is needed: there is none")


def _check_number(name: str, value: Any) -> None:
    if not isinstance(value, (Real, Tensor)):
        raise TypeError(f"Lion: {name} must be a number, got {value!r}")
    if isinstance(value, Tensor) and value.numel() != 1:
        raise ValueError(f"Lion: {name} must be a number or a tensor of one element, got shape {tuple(value.shape)}")


def _check(options: dict[str, Any]) -> None:
    """Raises ValueError or TypeError for a group's options, naming the one at fault."""
    betas = options["betas"]
    are_two = isinstance(betas, Sequence) and len(betas) == 2 and all(isinstance(beta, (Real, Tensor)) for beta in betas)
    if not are_two or not all(0.0 <= beta <= 1.0 for beta in betas):
        raise ValueError(f"Lion: betas must be two numbers in [0, 1], got {betas}")
    for name in ("lr", "weight_decay"):
        _check_number(name, options[name])
    if not options["lr"] >= 0:
        raise ValueError(f"Lion: lr must not be negative, got {float(options['lr'])}")
    if options["rounding"] not in ROUNDINGS:
        raise ValueError(f"Lion: rounding must be one of {', '.join(ROUNDINGS)}, got {options['rounding']!r}")
    dtype = options["momentum_dtype"]
    if dtype is not None and not (isinstance(dtype, torch.dtype) and (dtype.is_floating_point or dtype == torch.int8)):
        raise TypeError(f"Lion: momentum_dtype must be a floating torch.dtype, torch.int8 or None, got {dtype}")
    if options["max_grad_norm"] is not None and not options["max_grad_norm"] > 0:
        raise ValueError(f"Lion: max_grad_norm must be positive or None, got {options['max_grad_norm']}")
    if options["fused"] and options["foreach"]:
        raise ValueError("Lion: fused and foreach cannot both be True")
