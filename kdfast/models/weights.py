"""Weights on disk: reading others' files, loading strictly by name, and writing so that a crash never leaves half a file.

A pickle is a program; this module never runs one. PyTorch's restricted unpickler builds tensors, containers and numbers; anything else that
a file asks for is refused in one sentence.
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
SHOWN = 10  # names in a message
PREFIXES = ("module.", "_orig_mod.")  # of DistributedDataParallel and torch.compile
# training scripts put their arguments and a best accuracy beside the weights; building these runs no code
HARMLESS: list[Any] = [
    argparse.Namespace,
    np.dtype,
    *(type(np.dtype(name)) for name in ("float64", "float32", "int64", "int32")),
    *((np.float64(0).__reduce__()[0], f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
]


def read_weights(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Reads the state dict in a file, and the text beside it.

    The state dict may stand under "state_dict", "model_state_dict", "model" or "net". One leading "module." and one "_orig_mod." are
    removed where all names have it.

    Args:
        path: .safetensors, or a file that torch.save wrote (.pt, .pth, .th, ...).

    Returns:
        Tensors by name, on the CPU; the metadata of a safetensors file, or the text and numbers beside a torch state dict.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is empty, truncated, not a weights file, or would execute code.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     torch.save({"state_dict": {"module.w": torch.ones(2)}, "epoch": 3}, f"{folder}/others.pth")
        ...     kdfast.models.read_weights(f"{folder}/others.pth")
        ({'w': tensor([1., 1.])}, {'epoch': '3'})
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"read_weights: there is no file {path}")
    state, metadata = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    return _strip_prefixes(state), metadata


def load_weights(model: nn.Module, path_or_state: str | os.PathLike[str] | Mapping[str, Tensor]) -> dict[str, str]:
    """Loads weights strictly, by name: everything is checked before anything is written.

    Leading "module." and "_orig_mod." are tolerated on both sides. Absent num_batches_tracked counts as zero: files older than PyTorch
    0.4.1 lack it, and forward passes do not read it. The CIFAR ResNets also know their layers by RepDistiller's names (downsample, fc).

    Args:
        model: changed in place; keeps its dtypes and devices.
        path_or_state: a file that `read_weights` reads, or a state dict.

    Returns:
        The file's metadata; empty for a state dict.

    Raises:
        ValueError: names or shapes differ: the message lists the missing, the unexpected and the wrong-shaped ones. Also every file that
            `read_weights` refuses.

    Example:
        >>> model = torch.nn.Linear(2, 1)
        >>> kdfast.models.load_weights(model, {"module.weight": torch.ones(1, 2), "module.bias": torch.zeros(1)})
        {}
        >>> kdfast.models.load_weights(model, {"weight": torch.ones(1, 3)})
        Traceback (most recent call last):
        ValueError: load_weights: the state dict does not fit Linear: 1 missing: bias; 1 wrong shape: weight [1, 3] instead of [1, 2]
    """
    metadata: dict[str, str] = {}
    if isinstance(path_or_state, Mapping):
        source, state = "the state dict", _strip_prefixes(path_or_state)
    else:
        source, (state, metadata) = str(path_or_state), read_weights(path_or_state)
    full_names = model.state_dict()
    own = _strip_prefixes(full_names)
    state = _translate_names(state, own.keys(), model)

    optional = {name for name in own if name.endswith("num_batches_tracked")}
    missing = [name for name in own if name not in state and name not in optional]
    unexpected = [name for name in state if name not in own]
    misshapen = [
        f"{name} {list(tensor.shape)} instead of {list(own[name].shape)}"
        for name, tensor in state.items()
        if name in own and tensor.shape != own[name].shape
    ]
    groups = (("missing", missing), ("unexpected", unexpected), ("wrong shape", misshapen))
    if faults := [_list_names(what, names) for what, names in groups if names]:
        raise ValueError(f"load_weights: {source} does not fit {type(model).__name__}: {'; '.join(faults)}")
    state |= {name: torch.zeros_like(own[name]) for name in optional - state.keys()}
    model.load_state_dict({full: state[name] for full, name in zip(full_names, own)}, strict=True)
    return metadata


def save_weights(
    model_or_state: nn.Module | Mapping[str, Tensor],
    path: str | os.PathLike[str],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes a safetensors file. On failure the old file stays: the new one appears complete or not at all.

    Tensors that share memory are written one by one; a model that ties them shares them again after loading.

    Args:
        model_or_state: a module or its state dict, on any device.
        path: of the file; its folder is made.
        metadata: text by name, for instance {"model": spec.to_json()}.

    Raises:
        TypeError: metadata that is not text.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     kdfast.models.save_weights({"w": torch.ones(2)}, f"{folder}/w.safetensors", {"note": "ones"})
        ...     kdfast.models.read_weights(f"{folder}/w.safetensors")
        ({'w': tensor([1., 1.])}, {'note': 'ones'})
    """
    from safetensors.torch import save

    state = model_or_state.state_dict() if isinstance(model_or_state, nn.Module) else model_or_state
    tensors = {name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in _strip_prefixes(state).items()}
    files.write_bytes(Path(path), save(tensors, dict(metadata or {})))


def recognize(state: Mapping[str, Tensor], name: str) -> tuple[ModelSpec, str | None]:
    """Finds the spec of a network from its bare state dict. Trust a file's own metadata first.

    Args:
        state: as `read_weights` returns it.
        name: of the network: one of `names()`, or "package.module:function".

    Returns:
        The spec: classes from the classifier's shape, shortcuts of the CIFAR ResNets "A" where none have parameters. And the normalization
        of images that such weights expect by custom: "imagenet" for option-A CIFAR ResNets and for torchvision's 1000 classes, else None.

    Raises:
        ValueError: the state has no classifier where that network has it.

    Example:
        >>> state = kdfast.models.create("resnet8", num_classes=7, shortcut="A").state_dict()
        >>> kdfast.models.recognize(state, "resnet8")
        (ModelSpec(name='resnet8', num_classes=7, head='linear', options={'shortcut': 'A'}), 'imagenet')
    """
    options: dict[str, Option] = {}
    # our networks compute nothing while they are built, so they need no memory; others' may
    with torch.device("meta" if name in NETWORKS else "cpu"), torch.random.fork_rng(devices=[]):
        model = create(name, 10)
    state = _translate_names(dict(state), model.state_dict().keys(), model)
    if name in cifar_resnet.NETWORKS and not any(".shortcut." in key for key in state):
        options["shortcut"] = "A"
    path, _ = find_head(model)
    if f"{path}.weight" not in state:
        raise ValueError(f"recognize: {name!r} has its classifier at {path!r}, and the weights have none there")
    spec = ModelSpec(name, state[f"{path}.weight"].shape[0], options=options)
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
    state = _find_state_dict(content)
    if state is None:
        seen = f"the entries {', '.join(map(str, list(content)[:SHOWN]))}" if isinstance(content, Mapping) else type(content).__name__
        raise ValueError(f"read_weights: {path} has no state dict, at its top or under {', '.join(NESTINGS)}; it holds {seen}")
    beside = content.items() if state is not content else ()
    return state, {str(name): str(value) for name, value in beside if isinstance(value, str | int | float | np.number)}


def _find_state_dict(content: Any) -> dict[str, Tensor] | None:
    """The dictionary of tensors by name: `content` itself, or one under a usual name in it."""
    if not isinstance(content, Mapping) or not content:
        return None
    if all(isinstance(name, str) and isinstance(value, Tensor) for name, value in content.items()):
        return dict(content)
    nested = (_find_state_dict(content[name]) for name in NESTINGS if name in content)
    return next((state for state in nested if state is not None), None)


def _strip_prefixes(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state without one leading "module." and one "_orig_mod.", in either order, where all names have it."""
    names, prefixes = list(state), list(PREFIXES)
    while names and (prefix := next((p for p in prefixes if all(name.startswith(p) for name in names)), None)):
        names = [name.removeprefix(prefix) for name in names]
        prefixes.remove(prefix)
    return dict(zip(names, state.values()))


def _translate_names(state: dict[str, Tensor], known: Iterable[str], model: nn.Module) -> dict[str, Tensor]:
    """The state under the names that the model knows; names it does not know are looked for among its synonyms."""
    known = set(known)
    renamed: dict[str, Tensor] = {}
    for name, tensor in state.items():
        ours = name
        for theirs, own in getattr(model, "synonyms", ()) if name not in known else ():
            ours = ours.replace(theirs, own)
        renamed[ours if ours not in state else name] = tensor
    return renamed


def _list_names(what: str, names: list[str]) -> str:
    """'12 missing: a, b, ..., and 2 more'."""
    more = f", and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"{len(names)} {what}: {', '.join(names[:SHOWN])}{more}"
