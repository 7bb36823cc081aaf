"""The last layer of a network: finding it, measuring what it reads, and what may stand in its place.

    linear    the network's own linear classifier
    mlp       Linear - BatchNorm - ReLU - Dropout - Linear, as ConKD-Lion puts on its frozen encoder
    none      nothing: the network returns its features

and ConKD-Lion's projection to the unit sphere, Linear - ReLU - Linear - L2 norm, on which its contrastive loss is taken.
"""

import torch.nn.functional as F
from torch import Tensor, nn

NAMES = ("linear", "mlp", "none")
# what networks call their classifier, looked for in this order before the last linear layer of all
_USUAL_NAMES = ("fc", "linear", "classifier", "head", "heads")
# where a model's head was put by replace_head: (path, features), kept in the model, so that copies know it too
_PLACE = "_kdfast_head_place"


class ProjectionHead(nn.Module):
    """Linear(features, hidden) - ReLU - Linear(hidden, out) - L2 norm; see `projection_head`."""

    def __init__(self, features: int, out: int, hidden: int):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(features, hidden), nn.ReLU(), nn.Linear(hidden, out))

    def forward(self, x: Tensor) -> Tensor:
        """[B, features] -> [B, out], rows of length 1."""
        return F.normalize(self.layers(x), dim=1)


def classifier_head(features: int, num_classes: int, *, hidden: int = 128, dropout: float = 0.4) -> nn.Module:
    """The classifier that ConKD-Lion's notebook trains on the frozen encoder.

    Args:
        features: numbers that the encoder returns for an image.
        num_classes: outputs.
        hidden: width of the hidden layer.
        dropout: probability of the dropout before the last layer.

    Returns:
        A module, [B, features] -> logits [B, num_classes].
    """
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
    """
    return ProjectionHead(features, out, features if hidden is None else hidden)


def find_head(model: nn.Module) -> tuple[str, nn.Linear]:
    """The final linear classifier: fc, linear, classifier, classifier.1, heads.head, ..., else the last linear layer.

    Args:
        model: any network.

    Returns:
        The module path and the layer; of a head with several linear layers the last one.

    Raises:
        ValueError: the model has no linear layer, or `replace_head` took the only one away.
    """
    path, head, _ = _slot(model)
    linears = _linears(head, path)
    if not linears:
        raise ValueError(f"find_head: {type(model).__name__} has no linear classifier: its head {path!r} is a {type(head).__name__}")
    return linears[-1]


def feature_size(model: nn.Module) -> int:
    """How many numbers the model's head reads for an image; after `replace_head` still those that the first one read.

    Args:
        model: any network with a linear classifier, or whose head was replaced here.

    Raises:
        ValueError: there is none.
    """
    return _slot(model)[2]


def replace_head(model: nn.Module, module: nn.Module) -> nn.Module:
    """Puts `module` in the place of the model's head, and remembers the place: any module there can be replaced again.

    Args:
        model: changed in place.
        module: reads [B, feature_size(model)]; nn.Identity() makes the model return its features.

    Returns:
        The model.

    Raises:
        ValueError: the model has no head.
    """
    path, _, features = _slot(model)
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)
    model.__dict__[_PLACE] = path, features
    return model


def set_head(model: nn.Module, head: str, num_classes: int) -> nn.Module:
    """Gives a network with a linear classifier the head of that name.

    Args:
        model: changed in place.
        head: "linear", "mlp" or "none".
        num_classes: outputs of "mlp".

    Returns:
        The model.

    Raises:
        ValueError: another name.
    """
    if head not in NAMES:
        raise ValueError(f"head must be one of {', '.join(NAMES)}, got {head!r}")
    if head == "linear":
        return model
    features = feature_size(model)
    return replace_head(model, classifier_head(features, num_classes) if head == "mlp" else nn.Identity())


def _slot(model: nn.Module) -> tuple[str, nn.Module, int]:
    """Path of the head, the module there, and how many features it reads."""
    if _PLACE in model.__dict__:
        path, features = model.__dict__[_PLACE]
        return path, model.get_submodule(path), features
    for name in (*_USUAL_NAMES, ""):
        part = getattr(model, name, None) if name else model
        linears = _linears(part, name) if isinstance(part, nn.Module) else []
        if linears and linears[-1][0]:
            path, linear = linears[-1]
            return path, linear, linear.in_features
    raise ValueError(f"find_head: {type(model).__name__} has no linear layer that could be its classifier")


def _linears(module: nn.Module, path: str) -> list[tuple[str, nn.Linear]]:
    return [(name, part) for name, part in module.named_modules(prefix=path) if isinstance(part, nn.Linear)]
