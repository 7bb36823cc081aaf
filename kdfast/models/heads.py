"""The last layer of a network: finding it, measuring its input, and the modules that may replace it.

    linear    the network's own linear classifier
    mlp       Linear - BatchNorm - ReLU - Dropout - Linear, as ConKD-Lion puts on its frozen encoder
    none      nothing: the network returns its features

The projection to the unit sphere, Linear - ReLU - Linear - L2 norm, is the one on which ConKD-Lion takes its contrastive loss.
"""

from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch.nn.functional as F
from torch import Tensor, nn

from kdfast.ops import checks

Head = Literal["linear", "mlp", "none"]
NAMES: tuple[str, ...] = get_args(Head)
# usual names of the classifier, tried in this order before the last linear layer of the whole network
_USUAL_NAMES = ("fc", "linear", "classifier", "head", "heads")
# attribute for the place that replace_head() used: (path, features); it is part of the model, so copies have it too
_PLACE = "_kdfast_head_place"


class ProjectionHead(nn.Module):
    """Linear(features, hidden) - ReLU - Linear(hidden, out) - L2 norm; see `projection_head`."""

    def __init__(self, features: int, out: int, hidden: int):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(features, hidden), nn.ReLU(), nn.Linear(hidden, out))

    def forward(self, x: Tensor) -> Tensor:
        """[B, features] -> [B, out], rows of length 1."""
        return F.normalize(self.layers(x), dim=1)


class FindLogits:
    """A forward hook that takes the logits out of what a network returns: a tuple, a list, a dictionary or an object.

    Args:
        outputs: number of logits; None: any.
    """

    def __init__(self, outputs: int | None) -> None:
        self.outputs = outputs

    def __call__(self, module: Any, args: tuple[Any, ...], returned: Any) -> Tensor:
        """Returns the tensor [B, outputs] that is called logits, or is the only one of its shape.

        Raises:
            ValueError: there is no such tensor, or several.
        """
        if isinstance(returned, Tensor):
            return returned
        named = dict(returned) if isinstance(returned, Mapping) else getattr(returned, "__dict__", {})
        called = named.get("logits", getattr(returned, "logits", None))
        values = [called] if isinstance(called, Tensor) else returned if isinstance(returned, tuple | list) else list(named.values())
        fitting = [v for v in values if isinstance(v, Tensor) and v.ndim == 2 and self.outputs in (None, v.shape[1])]
        if len(fitting) != 1:
            kind, wanted = type(returned).__name__, self.outputs or "..."
            found = ", ".join(str(list(v.shape)) if isinstance(v, Tensor) else type(v).__name__ for v in values) or "nothing"
            raise ValueError(f"{type(module).__name__} must return logits [B, {wanted}], alone or called logits, got {kind} of {found}")
        return fitting[0]


def classifier_head(features: int, num_classes: int, *, hidden: int = 128, dropout: float = 0.4) -> nn.Module:
    """The classifier that ConKD-Lion's notebook trains on the frozen encoder.

    Args:
        features: numbers that the encoder returns for an image.
        num_classes: outputs.
        hidden: width of the hidden layer.
        dropout: probability of the dropout before the last layer.

    Returns:
        A module, [B, features] -> logits [B, num_classes].

    Example:
        >>> kdfast.models.classifier_head(64, num_classes=10)(torch.randn(2, 64)).shape
        torch.Size([2, 10])
    """
    checks.are_counts(features=features, num_classes=num_classes, hidden=hidden)
    checks.number_within("dropout", dropout, 0, 1)
    return nn.Sequential(
        nn.Linear(features, hidden),
        nn.BatchNorm1d(hidden),
        nn.ReLU(),
        nn.Dropout(dropout),
        nn.Linear(hidden, num_classes),
    )


def projection_head(features: int, out: int = 128, *, hidden: int | None = None) -> nn.Module:
    """The projection on which ConKD-Lion's notebook takes its contrastive loss.

    Args:
        features: numbers that the encoder returns for an image.
        out: numbers of the embedding.
        hidden: width of the hidden layer; None: as many as features.

    Returns:
        A module, [B, features] -> [B, out], rows of length 1.

    Example:
        >>> z = kdfast.models.projection_head(64)(torch.randn(2, 64))
        >>> z.shape, z.norm(dim=1).allclose(torch.ones(2))
        (torch.Size([2, 128]), True)
    """
    checks.are_counts(features=features, out=out, hidden=features if hidden is None else hidden)
    return ProjectionHead(features, out, features if hidden is None else hidden)


def find_head(model: nn.Module) -> tuple[str, nn.Linear]:
    """The final linear classifier: fc, linear, classifier, classifier.1, heads.head, ..., else the last linear layer.

    Args:
        model: any network.

    Returns:
        The module path and the layer; in a head with several linear layers, the last one.

    Raises:
        ValueError: the model has no linear layer, or `replace_head` took the only one away.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3))
        >>> kdfast.models.find_head(model)
        ('1', Linear(in_features=12, out_features=3, bias=True))
    """
    path, head, _ = _locate_head(model)
    linears = _list_linears(head, path)
    if not linears:
        raise ValueError(f"find_head: {type(model).__name__} has no linear classifier: its head {path!r} is a {type(head).__name__}")
    return linears[-1]


def feature_size(model: nn.Module) -> int:
    """How many numbers the model's head reads for an image; `replace_head` does not change it.

    Args:
        model: any network with a linear classifier, or whose head was replaced by `replace_head`.

    Raises:
        ValueError: the model has no head.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3))
        >>> kdfast.models.feature_size(model)
        12
    """
    return _locate_head(model)[2]


def replace_head(model: nn.Module, module: nn.Module) -> nn.Module:
    """Puts `module` in the place of the model's head, and remembers the place, so any module there can be replaced again.

    Args:
        model: changed in place.
        module: reads [B, feature_size(model)]; nn.Identity() makes the model return its features.

    Returns:
        The model.

    Raises:
        ValueError: the model has no head.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3))
        >>> encoder = kdfast.models.replace_head(model, torch.nn.Identity())
        >>> encoder(torch.randn(2, 3, 2, 2)).shape
        torch.Size([2, 12])
    """
    checks.is_a("module", module, nn.Module)
    path, _, features = _locate_head(model)
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)
    model.__dict__[_PLACE] = path, features
    return model


def set_head(model: nn.Module, head: Head, num_classes: int) -> nn.Module:
    """Gives a network with a linear classifier the head of that name.

    Args:
        model: changed in place.
        head: "linear", "mlp" or "none".
        num_classes: outputs of "mlp".

    Returns:
        The model.
    """
    if head == "linear":
        return model
    return replace_head(model, classifier_head(feature_size(model), num_classes) if head == "mlp" else nn.Identity())


def _locate_head(model: nn.Module) -> tuple[str, nn.Module, int]:
    """Path of the head, the module there, and how many features it reads."""
    checks.is_a("model", model, nn.Module)
    if _PLACE in model.__dict__:
        path, features = model.__dict__[_PLACE]
        return path, model.get_submodule(path), features
    for name in (*_USUAL_NAMES, ""):
        part = getattr(model, name, None) if name else model
        linears = _list_linears(part, name) if isinstance(part, nn.Module) else []
        if linears and linears[-1][0]:
            path, linear = linears[-1]
            return path, linear, linear.in_features
    raise ValueError(f"find_head: {type(model).__name__} has no linear layer that could be its classifier")


def _list_linears(module: nn.Module, path: str) -> list[tuple[str, nn.Linear]]:
    return [(name, part) for name, part in module.named_modules(prefix=path) if isinstance(part, nn.Linear)]
