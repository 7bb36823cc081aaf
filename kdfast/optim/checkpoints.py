"""States of other libraries' optimizers, and momenta of other dtypes and layouts, as Lion loads them."""

from typing import Any

import torch
from torch import Tensor

from kdfast.ops.lion.int8 import count_scales, decode, encode

_LEAST_8BIT = 4096  # elements: biases and normalizations save no memory, and are the most sensitive
_STATE = {"exp_avg", "exp_avg_scale", "kahan_comp", "step"}
_OTHER_OPTIMIZERS = ("eps", "momentum", "lambd", "etas")  # options that no Lion has
_OTHER_FORMULAS = {  # options of other libraries' Lions, with the value that leaves Lion's formula as it is
    "corrected_weight_decay": False,  # timm
    "weight_decouple": True,  # pytorch_optimizer, as the next three
    "fixed_decay": False,
    "use_gc": False,
    "adanorm": False,
    "cautious_wd": False,  # lion_pytorch's cautious Lion
}


def check_state_dict(state_dict: dict[str, Any]) -> None:
    """Raises ValueError for a state that Lion would take for something else: another optimizer's, or another formula's."""
    ours = False
    for group in state_dict["param_groups"]:
        ours = ours or "momentum_dtype" in group
        for option in _OTHER_OPTIMIZERS:
            if option in group:
                raise ValueError(f"Lion: the state must be a Lion's, got another optimizer's (a group has {option!r})")
        for option, value in _OTHER_FORMULAS.items():
            if group.get(option, value) not in (value, None):
                raise ValueError(f"Lion: a state with {option}={group[option]} is of another formula than this Lion's")
        if group.get("cautious_factor", 0) not in (0, 1) or ("weight_decouple" in group and group.get("cautious")):
            raise ValueError("Lion: the state is of another cautious formula than this Lion's")
    for name, state in state_dict["state"].items():
        if not isinstance(state, dict):  # of no parameter
            continue
        unknown = sorted(map(str, set(state) - _STATE))
        if unknown and not ours:
            raise ValueError(f"Lion: the state must be a Lion's, got {', '.join(unknown)} of parameter {name}")
        momentum = state.get("exp_avg")
        if isinstance(momentum, Tensor) and not momentum.is_floating_point() and "exp_avg_scale" not in state:
            raise ValueError(f"Lion: exp_avg of parameter {name} is {momentum.dtype}, for which its exp_avg_scale is needed: there is none")


def adopt_group(group: dict[str, Any]) -> None:
    """Translates the options of optimi's, timm's and lion_pytorch's cautious Lion, and what older versions wrote, in place."""
    if "beta1" in group and "betas" not in group:  # optimi
        group["betas"] = group["beta1"], group["beta2"]
        group["foreach"] = None  # its own choice of implementation
        if group.get("kahan_sum"):
            group["rounding"] = "kahan"
        if group.get("decouple_lr"):
            group["decoupled_weight_decay"], group["init_lr"] = True, group.get("max_lr") or group["lr"]
    if "caution" in group and "cautious" not in group:  # timm
        group["cautious"] = group["caution"]
    if "cautious_factor" in group and "cautious" not in group:  # lion_pytorch.cautious_lion
        group["cautious"] = group["cautious_factor"] == 0
    if "momentum_dtype" in group:
        group["momentum_dtype"] = name_dtype(group["momentum_dtype"])


def name_dtype(dtype: Any) -> Any:
    """torch.int8 -> "int8", others as they are: groups hold text, which torch.distributed.checkpoint can gather."""
    return str(dtype).removeprefix("torch.") if isinstance(dtype, torch.dtype) else dtype


def new_momentum(param: Tensor, dtype: str | None) -> dict[str, Tensor]:
    """The state of a parameter that was never stepped.

    Args:
        param: the parameter.
        dtype: the group's momentum_dtype.

    Raises:
        TypeError: an int8 momentum of a float64 or sharded parameter.
    """
    if dtype != "int8":
        return {"exp_avg": torch.zeros_like(param, dtype=getattr(torch, dtype) if dtype else None)}
    if param.dtype == torch.float64 or hasattr(param, "to_local"):
        kind = "a sharded one" if hasattr(param, "to_local") else "float64"
        raise TypeError(f"Lion: momentum_dtype=torch.int8 needs unsharded float32, bfloat16 or float16 parameters, got {kind}")
    if param.numel() < _LEAST_8BIT:
        return {"exp_avg": torch.zeros_like(param, dtype=torch.float32)}
    scale = torch.zeros(count_scales(param.numel()), dtype=torch.float32, device=param.device)
    return {"exp_avg": torch.zeros_like(param, dtype=torch.int8), "exp_avg_scale": scale}


def load_momentum(param: Tensor, state: dict[str, Any], saved: dict[str, Tensor], dtype: str | None) -> None:
    """Puts a saved momentum into a parameter's state, in the dtype of the momentum and the layout of the parameter.

    torch's load_state_dict has cast all of the state to the parameter's dtype.

    Args:
        param: the parameter.
        state: its state, changed in place.
        saved: its state in the checkpoint, with an exp_avg.
        dtype: the group's momentum_dtype.

    Raises:
        ValueError: the momentum has another shape than the parameter.
    """
    momentum = saved["exp_avg"]
    if momentum.shape != param.shape:
        raise ValueError(f"Lion: exp_avg must have its parameter's shape {tuple(param.shape)}, got {tuple(momentum.shape)}")
    if "exp_avg_scale" in saved:
        momentum = decode(momentum, saved["exp_avg_scale"])
    state.pop("exp_avg_scale", None)
    state.update(new_momentum(param, dtype))
    if "exp_avg_scale" not in state:
        state["exp_avg"].copy_(momentum)
    elif "exp_avg_scale" in saved and saved["exp_avg"].stride() == param.stride():
        state["exp_avg"].copy_(saved["exp_avg"])
        state["exp_avg_scale"].copy_(saved["exp_avg_scale"])
    else:
        copy = torch.empty_like(state["exp_avg"], dtype=torch.float32).copy_(momentum)
        state["exp_avg"], state["exp_avg_scale"] = encode(copy, None)
