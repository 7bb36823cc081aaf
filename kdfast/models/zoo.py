"""Networks by name: the papers' for small images, torchvision's, and the user's own as "package.module:function".

To add a network, add it to the NETWORKS of its family's module, or add a module with such a table to the list below. An entry is called
with num_classes and the options, returns an nn.Module that ends in a linear layer, and carries `stages`.
"""

import difflib
import inspect
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from kdfast import imports
from kdfast.models import cifar_resnet, mobilenet, vgg, wide_resnet
from kdfast.models.heads import NAMES as HEADS
from kdfast.models.heads import FindLogits, Head, feature_size, replace_head, set_head
from kdfast.ops import checks

NETWORKS = {**cifar_resnet.NETWORKS, **wide_resnet.NETWORKS, **vgg.NETWORKS, **mobilenet.NETWORKS}
# torchvision's networks that do not end in one linear layer, or return more than logits in training
_OTHER_ENDINGS = {"googlenet", "inception_v3", "squeezenet1_0", "squeezenet1_1"}

Option = str | int | float | bool


@dataclass(frozen=True)
class ModelSpec:
    """All that is needed to build a network again, except its weights.

    Args:
        name: one of `names()`, or "package.module:function".
        num_classes: outputs of the classifier, at least 1.
        head: "linear", "mlp" or "none"; see `kdfast.models.heads`.
        options: keyword arguments of the network, for instance {"shortcut": "A"}.

    Raises:
        ValueError: num_classes below 1, or a head of another name.

    Example:
        >>> spec = kdfast.models.ModelSpec("resnet20", num_classes=10, options={"shortcut": "A"})
        >>> spec.to_json()
        '{"head": "linear", "name": "resnet20", "num_classes": 10, "options": {"shortcut": "A"}}'
        >>> kdfast.models.ModelSpec.from_json(spec.to_json()) == spec
        True
    """

    name: str
    num_classes: int
    head: Head = "linear"
    options: Mapping[str, Option] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        checks.is_a("ModelSpec: name", self.name, str)
        if not self.name:
            raise ValueError("ModelSpec: name must not be empty")
        checks.is_a("ModelSpec: options", self.options, Mapping)
        if not isinstance(self.num_classes, int) or isinstance(self.num_classes, bool) or self.num_classes < 1:
            raise ValueError(f"ModelSpec: num_classes must be a positive integer, got {self.num_classes!r}")
        if self.head not in HEADS:
            raise ValueError(f"ModelSpec: head must be one of {', '.join(HEADS)}, got {self.head!r}")

    def to_json(self) -> str:
        """One line of JSON, the same for equal specs."""
        return json.dumps(asdict(self), sort_keys=True)

    @staticmethod
    def from_json(text: str) -> "ModelSpec":
        """Reads the text that `to_json` wrote.

        Raises:
            ValueError: the text is not such JSON.
        """
        try:
            return ModelSpec(**json.loads(text))
        except (TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"ModelSpec.from_json: expected name, num_classes, head and options, got {text!r}") from error


def names() -> list[str]:
    """The names that `create` knows: the papers' networks, then torchvision's classifiers where it is installed, each part sorted.

    Example:
        >>> kdfast.models.names()[:3]
        ['mobilenetv2_cifar', 'mobilenetv2_cifar_tiny', 'resnet110']
    """
    try:
        theirs = _list_torchvision()
    except ImportError:
        theirs = []
    return sorted(NETWORKS) + [name for name in theirs if name not in NETWORKS]


def build(spec: ModelSpec) -> nn.Module:
    """The network of a spec, with random weights; see `create`.

    Example:
        >>> spec = kdfast.models.ModelSpec("resnet8", num_classes=10)
        >>> kdfast.models.parameter_count(kdfast.models.build(spec))
        78042
    """
    checks.is_a("spec", spec, ModelSpec)
    return create(spec.name, spec.num_classes, head=spec.head, pretrained=False, **spec.options)


class _WithoutMemory(TorchFunctionMode):
    """Makes new tensors on the meta device, except those that hold values which networks compute with while they are built (RegNet)."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn) and kwargs.get("device") is None:
            kwargs = {**kwargs, "device": "meta"}
        return func(*args, **kwargs)


def outline(spec: ModelSpec) -> nn.Module:
    """The network of a spec on the meta device: shapes without memory. The random state does not change.

    Raises:
        ValueError: see `create`.

    Example:
        >>> kdfast.models.zoo.outline(kdfast.models.ModelSpec("resnet50", num_classes=10)).fc.weight.is_meta
        True
    """
    with _WithoutMemory(), torch.random.fork_rng(devices=[]):
        return build(spec).to("meta")


def create(name: str, num_classes: int, *, head: Head = "linear", pretrained: bool = False, **options: Option) -> nn.Module:
    """A network by name.

    The papers' networks and torchvision's ResNets carry `stages`, the module paths of their stages, for Taps.

    Args:
        name: one of `names()`, or "package.module:function": that function is called with num_classes and the options and returns an
            nn.Module; the current folder is importable.
        num_classes: outputs of the classifier, at least 1.
        head: "linear", "mlp" or "none"; see `kdfast.models.heads`.
        pretrained: ImageNet weights, for torchvision's networks; the classifier is a new one unless num_classes is 1000.
        options: keyword arguments of the network: shortcut ("conv", "A") of the CIFAR ResNets, in_channels of all the papers' networks,
            torchvision's own.

    Returns:
        The network in training mode, images [B, C, H, W] -> logits [B, num_classes] (features with head "none"). A network of another
        library may return a tuple, a list, a dictionary or an object: calls then give the tensor called logits, or the only one of
        that shape.

    Raises:
        ValueError: an unknown name (the message lists the nearest), or an option that the network does not take (the message lists its
            options, where they are known).
        OSError: the pretrained weights cannot be fetched.
        ImportError: torchvision is not installed, for one of its networks.

    Example:
        >>> model = kdfast.models.create("resnet20", num_classes=10)
        >>> model.stages
        ('layer1', 'layer2', 'layer3')
        >>> model(torch.randn(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """
    ModelSpec(name, num_classes, head, options)  # checks them
    own = ":" in name or name in NETWORKS
    if pretrained and own:
        raise ValueError(f"create: there are no pretrained weights for {name!r}; build it and load a file with load_weights")
    make: Callable[..., Any]
    if ":" in name:
        make = _import_function(name)
    elif own:
        make = NETWORKS[name]
    elif name in _list_torchvision():
        make = partial(_create_torchvision, name, pretrained)
    else:
        near = difflib.get_close_matches(name, names(), n=5, cutoff=0.5)
        if name in _OTHER_ENDINGS:
            raise ValueError(f"create: {name!r} does not end in one linear layer trained alone; torchvision.models:{name} builds it")
        hint = f"; the nearest names are {', '.join(near)}" if near else ""
        raise ValueError(f"create: there is no network {name!r}{hint} (or give package.module:function)")
    try:
        model = make(num_classes=num_classes, **options)
    except TypeError as error:
        takes = [p.name for p in inspect.signature(make).parameters.values() if p.name != "num_classes" and p.kind != p.VAR_KEYWORD]
        known = f"; its options: {', '.join(takes)}" if takes else ""
        raise ValueError(f"create: {name!r} does not take these options: {error}{known}") from error
    if not isinstance(model, nn.Module):
        raise ValueError(f"create: {name!r} must return a torch.nn.Module, got {type(model).__name__}")
    if not own or ":" in name:
        model.register_forward_hook(FindLogits(None if head == "none" else num_classes))
    return set_head(model, head, num_classes)


def parameter_count(model: nn.Module) -> int:
    """How many numbers training may change, shared ones counted once; buffers are not parameters.

    Example:
        >>> kdfast.models.parameter_count(torch.nn.Linear(3, 2))
        8
    """
    checks.is_a("model", model, nn.Module)
    return sum(parameter.numel() for parameter in model.parameters())


def _import_function(name: str) -> Callable[..., Any]:
    try:
        return imports.import_object(name)
    except ValueError as error:
        raise ValueError(f"create: {name!r} must name an importable package.module:function: {error}") from error


def _import_torchvision() -> Any:
    """torchvision.models, imported when one of its networks is asked for."""
    return imports.require("torchvision", extra="cli", what="kdfast.models").models


def _list_torchvision() -> list[str]:
    models = _import_torchvision()
    return [name for name in models.list_models(module=models) if name not in _OTHER_ENDINGS]


def _create_torchvision(name: str, pretrained: bool, num_classes: int, **options: Any) -> nn.Module:
    models = _import_torchvision()
    weights = models.get_model_weights(name).DEFAULT if pretrained else None
    try:
        model = models.get_model(name, weights=weights, num_classes=1000 if pretrained else num_classes, **options)
    except (OSError, RuntimeError) as error:  # no network (URLError is an OSError), or a file with another checksum
        if weights is None:
            raise
        folder = os.path.join(torch.hub.get_dir(), "checkpoints")
        raise OSError(
            f"create: the ImageNet weights of {name!r} could not be fetched ({error}): put {weights.url} into {folder}, "
            f"or build without pretrained and load a file with load_weights"
        ) from error
    if pretrained and num_classes != 1000:
        replace_head(model, nn.Linear(feature_size(model), num_classes))
    if isinstance(model, models.ResNet):
        model.stages = ("layer1", "layer2", "layer3", "layer4")
    return model
