"""Networks by name: the papers' for small images, torchvision's, and "package.module:function" of the user's own."""

import difflib
import inspect
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn

from kdfast import imports
from kdfast.models import cifar_resnet, mobilenet, vgg, wide_resnet
from kdfast.models.heads import NAMES as HEADS
from kdfast.models.heads import feature_size, replace_head, set_head

NETWORKS = {**cifar_resnet.NETWORKS, **wide_resnet.NETWORKS, **vgg.NETWORKS, **mobilenet.NETWORKS}
# torchvision's that do not end in one linear layer, or return more than logits in training
_OTHER_ENDINGS = {"googlenet", "inception_v3", "squeezenet1_0", "squeezenet1_1"}

Option = str | int | float | bool


@dataclass(frozen=True)
class ModelSpec:
    """All it takes to build a network again, weights apart.

    Args:
        name: one of `names()`, or "package.module:function".
        num_classes: outputs of the classifier, at least 1.
        head: "linear", "mlp" or "none"; see `kdfast.models.heads`.
        options: keyword arguments of the network, for instance {"shortcut": "A"}.

    Raises:
        ValueError: num_classes below 1, or a head of another name.
        TypeError: an option that JSON could not carry.
    """

    name: str
    num_classes: int
    head: str = "linear"
    options: Mapping[str, Option] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        if not isinstance(self.num_classes, int) or self.num_classes < 1:
            raise ValueError(f"ModelSpec: num_classes must be a positive integer, got {self.num_classes!r}")
        if self.head not in HEADS:
            raise ValueError(f"ModelSpec: head must be one of {', '.join(HEADS)}, got {self.head!r}")
        for name, value in self.options.items():
            if not isinstance(value, Option):
                raise TypeError(f"ModelSpec: option {name!r} must be str, int, float or bool, got {type(value).__name__}")

    def to_json(self) -> str:
        """One line of JSON, the same for equal specs."""
        return json.dumps(asdict(self), sort_keys=True)

    @staticmethod
    def from_json(text: str) -> "ModelSpec":
        """Reads what `to_json` wrote.

        Raises:
            ValueError: the text is not such JSON.
        """
        try:
            return ModelSpec(**json.loads(text))
        except (TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"ModelSpec.from_json: expected name, num_classes, head and options, got {text!r}") from error


def names() -> list[str]:
    """The names `create` knows: the papers' networks, then torchvision's classifiers, each part sorted."""
    return sorted(NETWORKS) + [name for name in _torchvision_names() if name not in NETWORKS]


def build(spec: ModelSpec) -> nn.Module:
    """The network of a spec, with random weights; see `create`."""
    return _create(spec, pretrained=False)


def create(name: str, num_classes: int, *, head: str = "linear", pretrained: bool = False, **options: Option) -> nn.Module:
    """A network by name.

    The papers' networks and torchvision's ResNets carry `stages`, the module paths of their stages, for Taps.

    Args:
        name: one of `names()`, or "package.module:function": that function is called with num_classes and the options and
            returns an nn.Module; the current folder is importable.
        num_classes: outputs of the classifier, at least 1.
        head: "linear", "mlp" or "none"; see `kdfast.models.heads`.
        pretrained: ImageNet weights, for torchvision's networks; the classifier is a new one unless num_classes is 1000.
        options: keyword arguments of the network: shortcut ("conv", "A") of the CIFAR ResNets, in_channels of all the
            papers' networks, torchvision's own.

    Returns:
        The network in training mode, images [B, C, H, W] -> logits [B, num_classes] (features with head "none").

    Raises:
        ValueError: an unknown name (the message lists the nearest), an option that the network does not take.
        OSError: the pretrained weights cannot be fetched.
    """
    return _create(ModelSpec(name, num_classes, head, options), pretrained)


def parameter_count(model: nn.Module) -> int:
    """Numbers that training may change, shared ones counted once; buffers are not parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


def _create(spec: ModelSpec, pretrained: bool) -> nn.Module:
    name = spec.name
    if ":" in name:
        make, source = _user_function(name), "user"
    elif name in NETWORKS:
        make, source = NETWORKS[name], "kdfast"
    elif name in _torchvision_names():
        make, source = _torchvision_builder(name, pretrained), "torchvision"
    else:
        near = difflib.get_close_matches(name, names(), n=5, cutoff=0.5)
        hint = f"; the nearest names are {', '.join(near)}" if near else ""
        raise ValueError(f"create: there is no network {name!r}{hint} (or give package.module:function)")
    if pretrained and source != "torchvision":
        raise ValueError(f"create: there are no pretrained weights for {name!r}; build it and load a file with load_weights")
    _check_options(name, make, spec.options)
    model = make(num_classes=spec.num_classes, **spec.options)
    if not isinstance(model, nn.Module):
        raise ValueError(f"create: {name!r} must return a torch.nn.Module, got {type(model).__name__}")
    return set_head(model, spec.head, spec.num_classes)


def _check_options(name: str, make: Callable[..., Any], options: Mapping[str, Option]) -> None:
    parameters = inspect.signature(make).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return
    unknown = sorted(set(options) - set(parameters))
    if unknown:
        takes = ", ".join(p for p in parameters if p != "num_classes") or "none"
        raise ValueError(f"create: {name!r} has no option {unknown[0]!r}; its options: {takes}")


def _user_function(name: str) -> Callable[..., Any]:
    try:
        function = imports.import_object(name)
    except ValueError as error:
        raise ValueError(f"create: {name!r} must name an importable package.module:function: {error}") from error
    if not callable(function):
        raise ValueError(f"create: {name!r} must name a function, got a {type(function).__name__}")
    return function


def _torchvision_names() -> list[str]:
    import torchvision

    return [name for name in torchvision.models.list_models(module=torchvision.models) if name not in _OTHER_ENDINGS]


def _torchvision_builder(name: str, pretrained: bool) -> Callable[..., nn.Module]:
    import torchvision

    def make(num_classes: int, **options: Any) -> nn.Module:
        try:
            if pretrained:
                model = _pretrained(name, num_classes, options)
            else:
                model = torchvision.models.get_model(name, weights=None, num_classes=num_classes, **options)
        except TypeError as error:
            raise ValueError(f"create: torchvision's {name!r} does not take these options: {error}") from error
        if isinstance(model, torchvision.models.ResNet):
            model.stages = ("layer1", "layer2", "layer3", "layer4")
        return model

    return make


def _pretrained(name: str, num_classes: int, options: Mapping[str, Any]) -> nn.Module:
    import torchvision

    weights = torchvision.models.get_model_weights(name).DEFAULT
    try:
        model = torchvision.models.get_model(name, weights=weights, **options)
    except (OSError, RuntimeError) as error:  # no network (URLError is an OSError), or a file with another checksum
        folder = os.path.join(torch.hub.get_dir(), "checkpoints")
        raise OSError(
            f"create: the ImageNet weights of {name!r} could not be fetched ({error}): put {weights.url} into {folder}, "
            f"or build without pretrained and load a file with load_weights"
        ) from error
    if num_classes != 1000:
        replace_head(model, nn.Linear(feature_size(model), num_classes))
    return model
