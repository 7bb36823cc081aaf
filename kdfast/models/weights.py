"""Weights on disk: reading others' files, loading strictly by name, and writing so that a crash never leaves half a file.

A pickle is a program; this module never runs one. PyTorch's restricted unpickler builds tensors, containers and numbers. An object of any
other class becomes a dictionary of its attributes, without its class; a function that a file wants to call is refused in one sentence.
"""

import hashlib
import json
import os
import pickle
import re
import struct
import warnings
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Iterable, Mapping
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kdfast import files
from kdfast.models import cifar_resnet
from kdfast.models.heads import find_head
from kdfast.models.zoo import NETWORKS, ModelSpec, Option, outline
from kdfast.ops import checks

EMA = ("state_dict_ema", "model_ema", "ema_state_dict", "params_ema", "ema")  # moving averages of the weights
NESTINGS = ("state_dict", "model_state_dict", "model", "net", "network", "model_state", "module", "weights", "params", *EMA)
SHOWN = 10  # names in a message
SEAL = "kdfast.sha256"  # metadata of the files that save_weights writes: the checksum of the file without it
PREFIXES = ("module.", "_orig_mod.")  # of DistributedDataParallel and torch.compile
WRAPPERS = re.compile(r"_orig_mod\.|_fsdp_wrapped_module\.|_checkpoint_wrapped_module\.")  # of parts of a network, anywhere in a name
SHARDED = "read_weights: {} holds one process's part of distributed weights (DTensor): save the full state dict"
OLD_NAMES = (  # in torchvision's published DenseNets and vision transformers
    (re.compile(r"(denselayer\d+\.(?:norm|conv))\.(?=[12]\.)"), r"\1"),
    (re.compile(r"\bmlp\.linear_1\."), "mlp.0."),
    (re.compile(r"\bmlp\.linear_2\."), "mlp.3."),
)
FOREIGN = {  # beginnings of files that are no weights
    b"version https://git-lfs": "a Git LFS pointer (git lfs pull fetches the file itself)",
    b"<": "an HTML or XML page",
    b"{": "text (JSON)",
    b"\x1f\x8b": "a gzip archive",
    b"BZh": "a bzip2 archive",
    b"\xfd7zXZ": "an xz archive",
    b"\x28\xb5\x2f\xfd": "a zstd archive",
    b"7z\xbc\xaf": "a 7z archive",
    b"\x93NUMPY": "a NumPy array",
    b"\x89HDF": "an HDF5 file",
    b"\x89PNG": "an image",
    b"\xff\xd8\xff": "an image",
}


class _NoCalls(type):
    """The type of classes that cannot be called."""

    def __call__(cls, *args: object) -> Any:
        raise pickle.UnpicklingError(f"GLOBAL {cls.__name__} must not be called")


def _stand_in(name: str) -> tuple[Any, str]:
    """A class in place of the one that a file names: its objects are dictionaries, with their attributes as the dictionary's."""
    return _NoCalls(name, (), {"__new__": staticmethod(lambda cls, *args: OrderedDict())}), name


class _Unread:
    """An object whose content is of no use here."""

    def __init__(self, *args: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


class _Dtype:
    """Code and byte order of a NumPy dtype. NumPy's own would believe whatever else a file says about it."""

    def __init__(self, code: object, *args: object) -> None:
        self.name = str(code)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.name = f"{state[1]}{self.name}"

    def read(self, data: object) -> Any:
        """Returns the array of these bytes; None for objects."""
        return np.frombuffer(data, self.name) if isinstance(data, bytes) and data else None


class _Array:
    """A NumPy array, read from its bytes."""

    def __init__(self, *args: object) -> None:
        self.values: Any = None

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, by_columns, data = state
        flat = dtype.read(data)
        self.values = None if flat is None else flat.reshape(shape, order="F" if by_columns else "C")


def _read_scalar(dtype: _Dtype, data: object = None) -> Any:
    found = dtype.read(data)
    return None if found is None else found[0]


# training scripts put these beside the weights, and pickle builds them by calls; with a stand-in, these calls run nothing of a file's
UNREAD = re.compile(
    r"(pathlib(\._local)?|datetime|decimal|fractions|numpy\.random\.\w+)\.\w+|functools\.partial|builtins\.(range|slice|frozenset)"
)
HARMLESS: list[Any] = [
    *((lambda *args: OrderedDict(), name) for name in ("collections.defaultdict", "types.SimpleNamespace")),
    (lambda *args: [], "collections.deque"),
    (lambda *args: b"", "builtins.bytes"),  # empty ones; others are encoded text
    (_Dtype, "numpy.dtype"),
    *((_Array, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")),
    *((_read_scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
]


def read_weights(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Reads the state dict in a file, and the text beside it.

    The state dict may stand under a usual name ("state_dict", "model", ...), as a moving average ("model_ema", ...) or inside a whole
    pickled network. If a file holds both plain weights and their moving average, the plain ones are read and a warning says so. One
    leading "module." and one "_orig_mod." are removed where all names have it.

    Args:
        path: a safetensors file, or one that torch.save wrote (.pt, .pth, .th, .ckpt, ...).

    Returns:
        Tensors by name, on the CPU; the metadata of a safetensors file, or the text and numbers beside a torch state dict.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is empty, truncated, not a weights file (a Git LFS pointer, an HTML page, an archive: the message names it),
            or would execute code; or it is not as `save_weights` wrote it.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     torch.save({"state_dict": {"module.w": torch.ones(2)}, "epoch": 3}, f"{folder}/others.pth")
        ...     kdfast.models.read_weights(f"{folder}/others.pth")
        ({'w': tensor([1., 1.])}, {'epoch': '3'})
    """
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"read_weights: path must be a path or a state dict, got {type(path).__name__}")
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"read_weights: there is no file {path}")
    with path.open("rb") as file:
        head = file.read(512)
    if wrong := _name_content(path, head):
        raise ValueError(f"read_weights: {path} is {wrong}, not a weights file")
    state, metadata = _read_safetensors(path) if path.suffix == ".safetensors" or head[8:10] == b'{"' else _read_torch(path)
    return _strip_prefixes(state), metadata


def load_weights(model: nn.Module, path_or_state: str | os.PathLike[str] | Mapping[str, Tensor]) -> dict[str, str]:
    """Loads weights strictly, by name: everything is checked before anything is written.

    Leading "module." and "_orig_mod." are tolerated on both sides. If the names do not fit, but all those under one prefix do ("model.",
    "student.", "backbone.", ...), these are loaded, and a warning names the tensors left out. Absent num_batches_tracked counts as zero:
    files older than PyTorch 0.4.1 lack it, and forward passes do not read it. The CIFAR ResNets also know their layers by RepDistiller's
    names (downsample, fc), and torchvision's networks by those in its older files.

    Args:
        model: changed in place; keeps its dtypes and devices.
        path_or_state: a file that `read_weights` reads, or a state dict.

    Returns:
        The file's metadata; empty for a state dict.

    Raises:
        ValueError: names or shapes differ, or numbers are quantized: the message lists the missing, the unexpected and the wrong ones.
            Several prefixes fit equally. Also every file that `read_weights` refuses.

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
    checks.is_a("model", model, nn.Module)
    full_names = model.state_dict()
    own = _strip_prefixes({WRAPPERS.sub("", name): tensor for name, tensor in full_names.items()})
    optional = {name for name in own if name.endswith("num_batches_tracked")}
    state = _select(state, own, model, source)
    missing = [name for name in own if name not in state and name not in optional]
    unexpected = [name for name in state if name not in own]
    known = {name: tensor for name, tensor in state.items() if name in own}
    misshapen = [f"{n} {list(t.shape)} instead of {list(own[n].shape)}" for n, t in known.items() if t.shape != own[n].shape]
    quantized = [f"{n} {t.dtype}" for n, t in known.items() if own[n].is_floating_point() and not t.is_floating_point()]
    groups = (("missing", missing), ("unexpected", unexpected), ("wrong shape", misshapen), ("quantized", quantized))
    if faults := [_list_names(what, names) for what, names in groups if names]:
        raise ValueError(f"load_weights: {source} does not fit {type(model).__name__}: {'; '.join(faults)}")
    state |= {name: torch.zeros_like(own[name]) for name in optional - state.keys()}
    ordered = OrderedDict((full, state[name]) for full, name in zip(full_names, own))
    ordered._metadata = getattr(full_names, "_metadata", {})  # type: ignore[attr-defined]  # MNASNet loads nothing without its version
    model.load_state_dict(ordered, strict=True)
    return metadata


def save_weights(
    model_or_state: nn.Module | Mapping[str, Tensor],
    path: str | os.PathLike[str],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes a safetensors file. On failure the old file stays: the new one appears complete or not at all.

    The same weights and metadata are the same bytes. The metadata gets a checksum, by which `read_weights` finds damage.

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

    if not isinstance(path, str | os.PathLike) or Path(path).is_dir():
        raise ValueError(f"save_weights: path must be a file, got {path!r}")
    state = model_or_state.state_dict() if isinstance(model_or_state, nn.Module) else model_or_state
    if not isinstance(state, Mapping) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise TypeError(f"save_weights: model_or_state must be a torch.nn.Module or a dict of tensors, got {type(model_or_state).__name__}")
    if not all(isinstance(text, str) for pair in getattr(metadata or {}, "items", lambda: [(None,)])() for text in pair):
        raise TypeError(f"save_weights: metadata must be texts by name, got {metadata!r}")
    tensors = {name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in _strip_prefixes(state).items()}
    metadata, content = dict(metadata or {}), save(tensors, {SEAL: ""})
    files.write_bytes(Path(path), *_with_metadata(content, metadata | {SEAL: _checksum(content, metadata)}))


def _with_metadata(content: bytes, metadata: Mapping[str, str]) -> tuple[bytes, memoryview]:
    """A safetensors file's header with other metadata, sorted (the package writes entries in random order), and the file's tensors."""
    end = 8 + int.from_bytes(content[:8], "little")
    table = json.loads(content[8:end]) | {"__metadata__": dict(sorted(metadata.items()))}
    header = json.dumps(table, ensure_ascii=False, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header, memoryview(content)[end:]


def _checksum(content: bytes, metadata: Mapping[str, str]) -> str:
    digest = hashlib.sha256()
    for part in _with_metadata(content, metadata):
        digest.update(part)
    return digest.hexdigest()


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
    checks.is_a("state", state, Mapping)
    model = outline(ModelSpec(name, 10))
    state = _select(state, model.state_dict(), model, "the state dict", shapes=False)
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
            state, metadata = {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"read_weights: {path} is truncated or not a safetensors file: {error}") from error
    seal = metadata.pop(SEAL, None)
    if seal is not None and seal != _checksum(path.read_bytes(), metadata):
        raise ValueError(f"read_weights: {path} is damaged: it is not as it was written")
    return state, metadata


def _name_content(path: Path, head: bytes) -> str | None:
    """A name for the content of a file that begins with `head` and cannot be weights."""
    if not head or head[8:10] == b'{"':  # a safetensors file may begin with any byte
        return None if head else "empty"
    for start, name in FOREIGN.items():
        if head.lstrip().startswith(start):
            return name
    if head[257:262] == b"ustar":
        return "a tar archive"
    if head.startswith(b"PK") and zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
        if any(name.endswith("constants.pkl") for name in names):
            return "a TorchScript program (torch.jit.load reads it; save its state_dict())"
        if not any(name.endswith("data.pkl") for name in names):
            return f"a zip archive of {', '.join(names[:3]) or 'nothing'}"
    return None


def _unpickle(path: Path) -> Any:
    """The content of a file that torch.save wrote, with stand-ins for the objects whose classes PyTorch does not know to be safe."""
    known = list(HARMLESS)
    while True:
        try:
            with torch.serialization.safe_globals(known):
                return torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            unknown = re.search(r"GLOBAL (\S+) was not an allowed", str(error))
            if unknown is None or len(known) > 200:  # a network has some tens of classes
                raise
            name = unknown[1] if "." in unknown[1] else f"builtins.{unknown[1]}"  # PyTorch leaves "builtins." out of the message
            known.append((_Unread, name) if UNREAD.fullmatch(name) else _stand_in(name))


def _read_torch(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    damage = (struct.error, RuntimeError, EOFError, OSError, ValueError, KeyError, IndexError, AttributeError, TypeError, MemoryError)
    try:
        content = _unpickle(path)
        state = _find_state_dict(content, path)
    except (pickle.UnpicklingError, *damage) as error:
        refused = re.search(r"GLOBAL (\S+) (?:must not|whose module)", str(error))
        if refused:
            raise ValueError(
                f"read_weights: {path} asks to run {refused[1]} while it is read, and weights files are never executed; "
                f"whoever trusts it can save its state dict alone"
            ) from None
        if "persistent_load of storage" in str(error):
            raise ValueError(
                f"read_weights: {path} holds a whole network in PyTorch's old format, and that needs its code: save its state_dict()"
            ) from None
        if "DTensor" in str(error):
            raise ValueError(SHARDED.format(path)) from None
        reason = re.search(r"WeightsUnpickler error:\s*(.+)", str(error))
        more = f" that can be read without running code ({reason[1]})" if reason else ""
        raise ValueError(f"read_weights: {path} is truncated or not a weights file{more}") from error
    if state is None:
        seen = f"the entries {', '.join(map(str, list(content)[:SHOWN]))}" if isinstance(content, Mapping) else type(content).__name__
        raise ValueError(f"read_weights: {path} has no state dict, at its top or under {', '.join(NESTINGS)}; it holds {seen}")
    if any(hasattr(tensor, "full_tensor") for tensor in state.values()):
        raise ValueError(SHARDED.format(path))
    beside = content.items() if isinstance(content, Mapping) else ()
    return state, {str(name): str(value) for name, value in beside if isinstance(value, str | int | float | np.number)}


def _find_state_dict(content: Any, path: Path) -> dict[str, Tensor] | None:
    """The dictionary of tensors by name: `content` itself, one under a usual name in it, or that of a whole pickled network."""
    if "_modules" in getattr(content, "__dict__", ()):
        return _network_state(vars(content))
    if not isinstance(content, Mapping):
        return None
    tensors = {name: tensor for name, value in content.items() if isinstance(name, str) and (tensor := _as_tensor(value)) is not None}
    if tensors and len(tensors) == len(content):
        return tensors
    found = {name: state for name in NESTINGS if name in content and (state := _find_state_dict(content[name], path)) is not None}
    if len(found) > 1 and any(name in EMA for name in found):
        first, *others = found
        warnings.warn(f"{path} holds weights under {first} and under {', '.join(others)}: {first} is read", stacklevel=2)
    return next(iter(found.values()), tensors or None)


def _network_state(attributes: Mapping[str, Any]) -> dict[str, Tensor]:
    """The state dict of a pickled nn.Module, from its attributes."""
    passing = attributes.get("_non_persistent_buffers_set", ())
    own = {**attributes["_parameters"], **{name: b for name, b in attributes["_buffers"].items() if name not in passing}}
    state = {name: tensor for name, tensor in own.items() if isinstance(tensor, Tensor)}
    for part, module in attributes["_modules"].items():
        if module is not None:
            state |= {f"{part}.{name}": tensor for name, tensor in _network_state(vars(module)).items()}
    return state


def _as_tensor(value: object) -> Tensor | None:
    if isinstance(value, _Array) and value.values is not None and value.values.dtype.kind in "fiub":
        return torch.from_numpy(value.values.astype(value.values.dtype.newbyteorder("=")))
    return value if isinstance(value, Tensor) else None


def _strip_prefixes(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state without one leading "module." and one "_orig_mod.", in either order, where all names have it."""
    names, prefixes = list(state), list(PREFIXES)
    while names and (prefix := next((p for p in prefixes if all(name.startswith(p) for name in names)), None)):
        names = [name.removeprefix(prefix) for name in names]
        prefixes.remove(prefix)
    return dict(zip(names, state.values()))


def _select(
    state: Mapping[str, Tensor], own: Mapping[str, Tensor], model: nn.Module, source: str, *, shapes: bool = True
) -> dict[str, Tensor]:
    """The part of the state that is the model's, under the model's names; all of it if no part fits."""
    state = {WRAPPERS.sub("", name): tensor for name, tensor in state.items()}
    required = {name for name in own if not name.endswith("num_batches_tracked")}
    beginnings = Counter(start for name in state for start in accumulate(part + "." for part in name.split(".")[:-1]))
    fits: dict[str, dict[str, Tensor]] = {}
    for prefix in ("", *(start for start, n in beginnings.items() if n >= len(required))):
        under = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
        under = _translate_names(under, own.keys(), model)
        if required <= under.keys() <= own.keys():
            fits[prefix] = under
    if shapes and len(fits) > 1:
        fits = {p: under for p, under in fits.items() if all(under[name].shape == own[name].shape for name in under)} or fits
    if not fits:
        return _translate_names(state, own.keys(), model)
    if shapes and len(fits) > 1:
        raise ValueError(f"load_weights: {source} holds this network under each of {', '.join(fits)}: save the one that is meant")
    prefix, found = next(iter(fits.items()))
    others = [name for name in state if not name.startswith(prefix) and name != "n_averaged"]  # torch.optim.swa_utils counts in it
    if shapes and others:
        warnings.warn(f"{source}: {_list_names('tensors left out beside the network', others)}", stacklevel=3)
    return found


def _translate_names(state: dict[str, Tensor], known: Iterable[str], model: nn.Module) -> dict[str, Tensor]:
    """The state under the names that the model knows; names it does not know are looked for among its synonyms."""
    known = set(known)
    renamed: dict[str, Tensor] = {}
    for name, tensor in state.items():
        ours = name
        for theirs, own in getattr(model, "synonyms", ()) if name not in known else ():
            ours = ours.replace(theirs, own)
        for old, new in OLD_NAMES if name not in known else ():
            ours = old.sub(new, ours)
        renamed[ours if ours not in state else name] = tensor
    return renamed


def _list_names(what: str, names: list[str]) -> str:
    """'12 missing: a, b, ..., and 2 more'."""
    more = f", and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"{len(names)} {what}: {', '.join(names[:SHOWN])}{more}"
