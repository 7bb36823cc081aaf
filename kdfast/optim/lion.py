"""Lion, the optimizer of "Symbolic Discovery of Optimization Algorithms" (Chen et al., 2023, arXiv:2302.06675).

    p <- p (1 - lr weight_decay);   p <- p - lr sign(beta1 m + (1 - beta1) g);   m <- beta2 m + (1 - beta2) g

Every parameter moves by lr in every step, whatever the size of its gradient: take a learning rate 3 to 10 times below AdamW's
and a weight decay as many times above. kdfast/ops/lion holds the arithmetic.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from numbers import Real  # NumPy's numbers too
from typing import Any, get_args

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from kdfast.ops import backend
from kdfast.ops.lion.eager import grad_norm
from kdfast.ops.lion.op import is_watched, lion_step
from kdfast.ops.lion.plan import Launch, LaunchPlan
from kdfast.ops.lion.rows import LOW_PRECISION, Options, Rounding, Row, take_shards
from kdfast.optim.checkpoints import adopt_group, check_state_dict, load_momentum, name_dtype, new_momentum

__all__ = ["Lion"]

_CAPTURABLE = ("cuda", "xpu", "hpu", "mtia")


class Lion(Optimizer):
    """Lion, a drop-in for lion_pytorch.Lion: the same arguments, state (exp_avg) and, in float32, the same bits.

    Its values deviate once, on purpose: where a gradient or momentum is NaN the parameter becomes NaN. torch.sign maps NaN to 0,
    and the original silently keeps such a parameter as it is.

    bfloat16 and float16 parameters are stepped in float32 and rounded once (the original rounds after every operation;
    1 - lr weight_decay alone rounds to 1 in bfloat16).

    On a GPU, one launch steps all parameters of one device, dtypes and options; on a CPU, one call of compiled code steps those of
    float32 and bfloat16 (kdfast compiles it when it is installed beside a C compiler). PyTorch operations step the others: on a CPU
    cautious steps, other roundings than "nearest" and 8-bit momenta; anywhere parameters whose memory has gaps or is shared, tensor
    subclasses, and everything under a mode that sees PyTorch's operations. Sharded parameters (FSDP2's DTensors) are stepped shard
    by shard. A gradient whose dimensions lie in another order than its parameter's (channels_last and contiguous) is copied first.

    Checkpoints of lion_pytorch, google's, timm's and optimi's Lion load with load_state_dict.

    Example:
        >>> import torch
        >>> from kdfast.optim import Lion
        >>> weight = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        >>> optimizer = Lion([weight], lr=0.25, weight_decay=0.5)
        >>> (3.0 * weight.square().sum()).backward()
        >>> optimizer.step()
        >>> weight.tolist()  # decayed by 1 - 0.25 * 0.5, then moved by 0.25 against the gradient's sign
        [0.625, -1.5]

    Args:
        params: parameters, (name, parameter) pairs, or dicts of a group's parameters and options.
        lr: learning rate, > 0; a float or a one-element tensor (schedulers change it in place, without recompiling).
        betas: beta1 weighs momentum against gradient in the update, beta2 in the momentum; each in [0, 1].
        weight_decay: decoupled from the gradient, multiplied by the current lr; finite and not negative (lion_pytorch takes any number).
        use_triton: accepted for compatibility, ignored.
        decoupled_weight_decay: divides weight_decay by the lr given here, so that the decay of the first steps does not depend on lr.
        cautious: moves only elements whose update agrees with the gradient's sign, each tensor's others scaled up to keep
            its mean step (arXiv:2411.16085; lion_pytorch.cautious_lion with a factor of 0).
        maximize: ascends.
        capturable: the step may be captured in a CUDA graph; parameters must be on a GPU. Take a step before the capture. A rate
            that changes between replays must be a tensor on the GPU: a number is captured as it is.
        fused: True: a kernel, Triton's on a GPU and a compiled one on a CPU, or an error where there is none (parameters whose
            memory has gaps take PyTorch all the same). None: a kernel wherever one runs. False: PyTorch.
        foreach: many tensors at once (the default), with True without Triton; or with False one after the other, in PyTorch.
        rounding: of bfloat16 and float16 parameters. "nearest"; "stochastic": up or down so that the expectation is exact,
            the same way on all ranks; "kahan": a second tensor of the same dtype (state kahan_comp) keeps the rounding error
            and adds it in the next step.
        momentum_dtype: of exp_avg, floating; None: the parameter's. Take float32 for bfloat16 parameters: a momentum that is rounded to
            bfloat16 in every step stops within about 20 % of a constant gradient, whatever `rounding` says. torch.int8: 8 bits an
            element, with a scale (state exp_avg_scale) for 256 of them, and rounded up or down at random so that the mean is exact;
            tensors of fewer than 4,096 elements keep float32. A gradient that is NaN or infinite makes all parameters of its 256
            NaN. The group holds the dtype's name as text.
        max_grad_norm: scales the gradients of all groups that have this option down to this L2 norm within the step, as
            clip_grad_norm_ does, but without writing them.

    Raises:
        ValueError, TypeError: an option out of range, or of the wrong type.
        RuntimeError: in step(): sparse or complex gradients; fused=True without a kernel; capturable=True on a CPU.
        TypeError: in step(): momentum_dtype=torch.int8 with float64 or sharded (DTensor) parameters.
    """

    _plan: LaunchPlan | None = None
    _step_supports_amp_scaling = True  # GradScaler hands over grad_scale and found_inf instead of reading them

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
        rounding: Rounding = "nearest",
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
            "init_lr": float(lr),  # divides a decoupled weight decay
            "cautious": cautious,
            "maximize": maximize,
            "capturable": capturable,
            "fused": fused,
            "foreach": foreach,
            "rounding": rounding,
            "momentum_dtype": name_dtype(momentum_dtype),
            "max_grad_norm": max_grad_norm,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds parameters with options of their own; the optimizer's defaults fill in the others.

        Args:
            param_group: "params", and any option of the constructor.

        Raises:
            ValueError, TypeError: an option out of range, or of the wrong type.
        """
        if "momentum_dtype" in param_group:
            param_group = {**param_group, "momentum_dtype": name_dtype(param_group["momentum_dtype"])}
        _check_options({**self.defaults, **param_group})
        super().add_param_group(param_group)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._plan = None
        self.defaults.pop("differentiable", None)  # torch puts it there, and would into groups; no group of a Lion has it
        for group in self.param_groups:
            adopt_group(group)
            for option, value in self.defaults.items():
                group.setdefault(option, value)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what state_dict() of this or another Lion returned.

        Args:
            state_dict: groups and state; a momentum keeps the precision of momentum_dtype.

        Raises:
            ValueError: another optimizer's state, bitsandbytes' Lion included; groups or parameters differ in number, a momentum in
                shape; an int8 momentum lacks its exp_avg_scale; an option of another library's Lion that is another formula.
        """
        final: list[dict[str, Any]] = []  # the state that is loaded: hooks may have replaced the one given

        def check(_: Optimizer, saved: dict[str, Any]) -> None:
            check_state_dict(saved)
            final.append(saved)

        def load_momenta(_: Optimizer) -> None:
            for group, saved in zip(self.param_groups, final[0]["param_groups"]):
                for param, name in zip(group["params"], saved["params"]):
                    theirs = final[0]["state"].get(name, {})
                    if isinstance(theirs.get("exp_avg"), Tensor):
                        load_momentum(param, self.state[param], theirs, group["momentum_dtype"])

        # the last of the hooks before, and the first of those after, which may change momenta in their turn
        hooks = self.register_load_state_dict_pre_hook(check), self.register_load_state_dict_post_hook(load_momenta, prepend=True)
        try:
            super().load_state_dict(state_dict)
        finally:
            for hook in hooks:
                hook.remove()

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
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
        plan = self._plan
        if plan is None or not plan.is_on_cpu:
            self._accelerator_graph_capture_health_check()  # raises where a CUDA graph is captured without capturable=True
        # GradScaler's, sums over devices: 0-dim or of one element
        grad_scale: Tensor | None = getattr(self, "grad_scale", None)
        found_inf: Tensor | None = getattr(self, "found_inf", None)
        unscale = None if grad_scale is None else grad_scale.reshape(()).reciprocal()
        found_inf = None if found_inf is None else found_inf.reshape(())
        groups = self.param_groups
        options = [Options.from_group(group) for group in groups]
        leaders = [0] if len(options) == 1 else _find_leaders(options)
        key = backend.current(), leaders, [(each[6:], len(group["params"])) for each, group in zip(options, groups)]
        tensors = None if plan is None or is_watched() else plan.find(key, groups, self.state)
        if plan is None or tensors is None:
            self._step_without_plan(key, options, unscale, found_inf)
        else:
            plan.repeat(tensors, options, self._grad_factors(options, unscale), found_inf)
        return loss

    @torch.no_grad()
    def _step_without_plan(self, key: tuple[Any, ...], options: list[Options], unscale: Tensor | None, found_inf: Tensor | None) -> None:
        rows = self._collect_rows(options)  # refuses gradients that have no norm
        factors = self._grad_factors(options, unscale)
        tables = {} if self._plan is None else self._plan.tables
        launches: list[tuple[int, Launch]] = []
        can_repeat, leaders = True, key[1]
        for leader in sorted(set(leaders)):
            together = [row for place, some in zip(leaders, rows) if place == leader for row in some]
            made, fits = lion_step(together, options[leader], factors[leader], found_inf, tables)
            launches += [(leader, launch) for launch in made]
            can_repeat = can_repeat and fits
        if not torch.compiler.is_compiling():  # PyTorch 2.11's compiler cannot set an optimizer's attribute
            self._plan = LaunchPlan(key, self.param_groups, self.state, launches, can_repeat)

    def _collect_rows(self, options: list[Options]) -> list[list[Row]]:
        """For each group, the parameters with gradients, numbered through all groups, and their state, made when first needed."""
        rows: list[list[Row]] = []
        number = -1
        for group, own in zip(self.param_groups, options):
            rows.append([])
            for param in group["params"]:
                number += 1
                grad = param.grad
                if grad is None:
                    continue
                _check_gradient(param, grad, own.capturable)
                state = self.state[param]
                if "exp_avg" not in state:
                    state.update(new_momentum(param, group["momentum_dtype"]))
                elif state["exp_avg"].device != param.device:  # the model was moved
                    state.update({key: t.to(param.device) for key, t in state.items() if isinstance(t, Tensor)})
                rounding = own.rounding if param.dtype in LOW_PRECISION else "nearest"
                compensation, scale, step = None, state.get("exp_avg_scale"), None
                if rounding == "kahan":
                    compensation = state.get("kahan_comp")
                    if compensation is None or compensation.dtype != param.dtype:
                        state["kahan_comp"] = compensation = torch.zeros_like(param)
                if rounding == "stochastic" or scale is not None:
                    # the count of steps seeds random rounding; float32 on the parameter's device, as torch's own optimizers have it
                    state["step"] = step = torch.as_tensor(state.get("step", 0.0), dtype=torch.float32, device=param.device)
                rows[-1].append(take_shards(Row(param, grad, state["exp_avg"], scale, compensation, step, number)))
        return rows

    def _grad_factors(self, options: list[Options], unscale: Tensor | None) -> list[Tensor | None]:
        """For each group, the factor of its gradients: 1 / loss scale, and the clipping of all groups that clip to their common norm."""
        clipped = [group for group, own in zip(self.param_groups, options) if own.max_grad_norm is not None]
        grads = [param.grad for group in clipped for param in group["params"] if param.grad is not None]
        if not grads:
            return [unscale] * len(options)
        with torch.no_grad():
            norm = grad_norm(grads)
            scale = norm.new_ones(()) if unscale is None else unscale.to(norm.device)
            bound = norm * scale + 1e-6  # as clip_grad_norm_'s
            limits = [own.max_grad_norm for own in options]
            return [unscale if limit is None else scale * (limit / bound).clamp(max=1.0) for limit in limits]


def _find_leaders(options: list[Options]) -> list[int]:
    """For each group, the place of the first group with the same options: one launch steps both."""
    keys = [each._replace(lr=id(each.lr)) if isinstance(each.lr, Tensor) else each for each in options]
    return [keys.index(key) for key in keys]


def _check_gradient(param: Tensor, grad: Tensor, capturable: bool) -> None:
    if grad.layout != torch.strided or grad.is_complex():
        kind = "complex" if grad.is_complex() else f"sparse ({grad.layout})"
        raise RuntimeError(f"Lion: gradients must be dense and real, got a {kind} one of shape {tuple(grad.shape)}")
    if capturable and param.device.type not in _CAPTURABLE and not torch.compiler.is_compiling():
        raise RuntimeError(f"Lion: capturable=True needs parameters on {' or '.join(_CAPTURABLE)}, got one on {param.device.type}")


def _check_number(name: str, value: Any) -> None:
    if not isinstance(value, (Real, Tensor)):
        raise TypeError(f"Lion: {name} must be a number, got {value!r}")
    if isinstance(value, Tensor) and value.numel() != 1:
        raise ValueError(f"Lion: {name} must be a number or a tensor of one element, got shape {tuple(value.shape)}")


def _check_options(options: dict[str, Any]) -> None:
    """Raises ValueError or TypeError for a group's options, with the name of the one at fault."""
    betas = options["betas"]
    is_pair = isinstance(betas, Sequence) and len(betas) == 2 and all(isinstance(beta, (Real, Tensor)) for beta in betas)
    if not is_pair or not all(0.0 <= beta <= 1.0 for beta in betas):
        raise ValueError(f"Lion: betas must be two numbers in [0, 1], got {betas}")
    for name in ("lr", "weight_decay"):
        _check_number(name, options[name])
        if not 0 <= options[name] < math.inf:
            raise ValueError(f"Lion: {name} must be finite and not negative, got {float(options[name])}")
    if options["rounding"] not in get_args(Rounding):
        raise ValueError(f"Lion: rounding must be one of {', '.join(get_args(Rounding))}, got {options['rounding']!r}")
    name = options["momentum_dtype"]
    dtype = getattr(torch, name, None) if isinstance(name, str) else name
    if name is not None and not (isinstance(dtype, torch.dtype) and (dtype.is_floating_point or dtype == torch.int8)):
        raise TypeError(f"Lion: momentum_dtype must be a floating torch.dtype, torch.int8 or None, got {name}")
    for name in ("fused", "foreach"):
        if options[name] not in (None, True, False):
            raise TypeError(f"Lion: {name} must be True, False or None, got {options[name]!r}")
    if options["max_grad_norm"] is not None:
        _check_number("max_grad_norm", options["max_grad_norm"])
        if not options["max_grad_norm"] > 0:
            raise ValueError(f"Lion: max_grad_norm must be positive or None, got {options['max_grad_norm']}")
    if options["fused"] and options["foreach"]:
        raise ValueError("Lion: fused and foreach cannot both be True")
