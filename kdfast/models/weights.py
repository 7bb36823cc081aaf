"""Weights on disk: reading others' files, loading strictly by name, writing so that a crash never leaves half a file.

A pickle is a program; this module never runs one. PyTorch's restricted unpickler builds tensors, containers and numbers,
and what else a file asks for is refused in one sentence.
"""

import argparse
import os
import pickle
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kdfast import files
from kdfast.models import cifar_resnet
from kdfast.models.heads import find_head
from kdfast.models.zoo import NETWORKS, ModelSpec, Option, create

NESTINGS = ("state_dict", "model_state_dict", "model", "net")
SHOWN = 10
# left in front of every name by DistributedDataParallel and torch.compile
PREFIXES = ("module.", "_orig_mod.")
# training scripts put their arguments and a best accuracy beside the weights; building these runs no code
HARMLESS: list[Any] = [
    argparse.Namespace,
    np.dtype,
    *(type(np.dtype(name)) for name in ("float64", "float32", "int64", "int32")),
    *((np.float64(0).__reduce__()[0], f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
]


def read_weights(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The state dict in a file, and what the file says beside it.

    A state dict under "state_dict", "model_state_dict", "model" or "net" is found there. Of every name one leading
    "module." and one "_orig_mod." are taken away where all names have it.

    Args:
        path: .safetensors, or what torch.save wrote (.pt, .pth, .th, ...).

    Returns:
        Tensors by name, on the CPU; the metadata of a safetensors file, or the text and numbers beside a torch state dict.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is empty, truncated, no weights file, or would execute code.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"read_weights: there is no file {path}")
    if path.stat().st_size == 0:
        raise ValueError(f"read_weights: {path} is empty")
    state, metadata = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    return dict(zip(_plain_names(state), state.values())), metadata


def load_weights(model: nn.Module, path_or_state: str | os.PathLike[str] | Mapping[str, Tensor]) -> dict[str, str]:
    """Loads weights strictly, by name: all is checked before anything is written.

    Leading "module." and "_orig_mod." are tolerated on both sides, absent num_batches_tracked (files older than PyTorch
    0.4.1, which forward passes do not read) counts as zero, and the CIFAR ResNets also know their layers by RepDistiller's
    names (downsample, fc).

    Args:
        model: changed in place; keeps its dtypes and devices.
        path_or_state: a file that `read_weights` reads, or a state dict.

    Returns:
        The file's metadata; empty for a state dict.

    Raises:
        ValueError: names or shapes differ: the message lists the missing, the unexpected and the wrong-shaped ones.
            Also what `read_weights` refuses.
    """
    metadata: dict[str, str] = {}
    if isinstance(path_or_state, Mapping):
        source = "the state dict"
        state = dict(zip(_plain_names(path_or_state), path_or_state.values()))
    else:
        source = str(path_or_state)
        state, metadata = read_weights(path_or_state)
    own = model.state_dict()
    full_names = dict(zip(_plain_names(own), own))
    state = _known_names(state, full_names.keys(), model)

    optional = {name for name in full_names if name.endswith("num_batches_tracked")}
    missing = [name for name in full_names if name not in state and name not in optional]
    unexpected = [name for name in state if name not in full_names]
    misshapen = [
        f"{name} {list(tensor.shape)} instead of {list(own[full_names[name]].shape)}"
        for name, tensor in state.items()
        if name in full_names and tensor.shape != own[full_names[name]].shape
    ]
    if missing or unexpected or misshapen:
        groups = _listed("missing", missing), _listed("unexpected", unexpected), _listed("wrong shape", misshapen)
        raise ValueError(f"load_weights: {source} does not fit {type(model).__name__}: {'; '.join(group for group in groups if group)}")
    for name in optional - state.keys():
        state[name] = torch.zeros_like(own[full_names[name]])
    model.load_state_dict({full_names[name]: tensor for name, tensor in state.items()}, strict=True)
    return metadata


def save_weights(
    model_or_state: nn.Module | Mapping[str, Tensor],
    path: str | os.PathLike[str],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes a safetensors file, or leaves what was there: the file appears complete or not at all.

    Tensors that share memory are written one by one and share it again in a model that ties them.

    Args:
        model_or_state: a module or its state dict, on any device.
        path: where to; its folder is made.
        metadata: text by name, for instance {"model": spec.to_json()}.

    Raises:
        TypeError: metadata that is not text.
    """
    from safetensors.torch import save

    metadata = dict(metadata or {})
    for name, text in metadata.items():
        if not isinstance(name, str) or not isinstance(text, str):
            raise TypeError(f"save_weights: metadata must be text by name, got {name!r}: {text!r}")
    state = model_or_state.state_dict() if isinstance(model_or_state, nn.Module) else model_or_state
    tensors: dict[str, Tensor] = {}
    memories: set[int] = set()
    for name, tensor in zip(_plain_names(state), state.values()):
        tensors[name] = tensor.detach().cpu().contiguous()
        if tensors[name].untyped_storage().data_ptr() in memories:
            tensors[name] = tensors[name].clone()
        memories.add(tensors[name].untyped_storage().data_ptr())
    files.write_bytes(Path(path), save(tensors, metadata))


def recognize(state: Mapping[str, Tensor], name: str) -> tuple[ModelSpec, str | None]:
    """What a bare state dict tells of the network it belongs to. Trust a file's own metadata first.

    Args:
        state: as `read_weights` returns it.
        name: of the network: one of `names()`, or "package.module:function".

    Returns:
        The spec: classes from the classifier's shape, shortcuts of the CIFAR ResNets "A" where none have parameters,
        in_channels of the papers' networks from the first convolution. And the normalization of images that such weights
        expect by custom: "imagenet" for option-A CIFAR ResNets and for torchvision's 1000 classes, else None.

    Raises:
        ValueError: the state has no classifier where that network has it.
    """
    options: dict[str, Option] = {}
    # our networks compute nothing while they are built, so they need no memory; others' may
    with torch.device("meta" if name in NETWORKS else "cpu"), torch.random.fork_rng(devices=[]):
        model = create(name, 10)
    state = _known_names(dict(state), model.state_dict().keys(), model)
    if name in cifar_resnet.NETWORKS and not any(".shortcut." in key for key in state):
        options["shortcut"] = "A"
    if name in NETWORKS:
        first = next(path for path, module in model.named_modules() if isinstance(module, nn.Conv2d))
        channels = state[f"{first}.weight"].shape[1] if f"{first}.weight" in state else 3
        if channels != 3:
            options["in_channels"] = channels
    path, _ = find_head(model)
    for head, classifier in (("linear", f"{path}.weight"), ("mlp", f"{path}.4.weight")):
        if classifier in state:
            spec = ModelSpec(name, state[classifier].shape[0], head, options)
            break
    else:
        raise ValueError(f"recognize: {name!r} has its classifier at {path!r}, and the weights have none there")
    by_custom = options.get("shortcut") == "A" or (name not in NETWORKS and ":" not in name and spec.num_classes == 1000)
    return spec, "imagenet" if by_custom else None


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"read_weights: {path} is truncated or not a safetensors file: {error}") from error


def _read_torch(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with torch.serialization.safe_globals(HARMLESS):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError, IndexError, AttributeError) as error:
        refused = re.search(r"GLOBAL ([\w.]+)", str(error))
        if refused:
            raise ValueError(
                f"read_weights: {path} asks to run {refused[1]} while it is read, and weights files are never executed; "
                f"whoever trusts it can save its state dict alone"
            ) from None
        raise ValueError(f"read_weights: {path} is truncated or not a weights file") from error
    state = _state_dict(content)
    if state is None:
        seen = f"the entries {', '.join(map(str, list(content)[:SHOWN]))}" if isinstance(content, Mapping) else type(content).__name__
        raise ValueError(f"read_weights: {path} has no state dict, at its top or under {', '.join(NESTINGS)}; it holds {seen}")
    beside = content.items() if state is not content else ()
    return state, {str(name): str(value) for name, value in beside if isinstance(value, str | int | float | np.number)}


def _state_dict(content: Any) -> dict[str, Tensor] | None:
    """The dictionary of tensors by name: `content` itself, or one under a usual name in it."""
    if not isinstance(content, Mapping) or not content:
        return None
    if all(isinstance(name, str) and isinstance(value, Tensor) for name, value in content.items()):
        return dict(content)
    nested = (_state_dict(content[name]) for name in NESTINGS if name in content)
    return next((state for state in nested if state is not None), None)


def _plain_names(names: Iterable[str]) -> list[str]:
    """The names without one leading "module." and one "_orig_mod.", in either order, where all have it."""
    plain = list(names)
    left = list(PREFIXES)
    while plain and (prefix := next((p for p in left if all(name.startswith(p) for name in plain)), None)):
        plain = [name.removeprefix(prefix) for name in plain]
        left.remove(prefix)
    return plain


def _known_names(state: dict[str, Tensor], known: Iterable[str], model: nn.Module) -> dict[str, Tensor]:
    """The state under the names the model knows, where it lists synonyms for what it does not know."""
    known = set(known)
    renamed: dict[str, Tensor] = {}
    for name, tensor in state.items():
        ours = name
        for theirs, own in getattr(model, "synonyms", ()) if name not in known else ():
            ours = ours.replace(theirs, own)
        renamed[ours if ours not in state else name] = tensor
    return renamed


def _listed(what: str, names: list[str]) -> str:
    more = f", and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"{len(names)} {what}: {', '.join(names[:SHOWN])}{more}" if names else ""
