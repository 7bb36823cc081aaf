"""What recipes share that look into networks: where stages end, and the terms of a stage's own classifier."""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kdfast.models import Taps, find_head, tap_shapes

Shape = tuple[int, ...]


class FeatureMaps(nn.Module):
    """A network and its feature maps: what the modules at the ends of its stages put out.

    Args:
        network: images -> logits; one inside another, as `model`, is looked for there.
        named: module paths; none: the network's own `stages`.
        option: the option that names them, for messages.
        image_size: pixels of the images it will see.

    Attributes:
        paths, full: the modules, as paths from the innermost network and from this one.
        shapes: (channels, height, width) of each.

    Raises:
        ValueError: the network does not say where its stages are and none is named, a path names no module, or what a module puts
            out is no feature map.
    """

    def __init__(self, network: nn.Module, named: Sequence[str], option: str, image_size: int) -> None:
        super().__init__()
        prefix = innermost(network)[1]
        self.paths = tuple(named) or stage_paths(network, option)
        self.full = tuple(prefix + path for path in self.paths)
        self.shapes: tuple[Shape, ...] = tap_shapes(network, self.full, (3, image_size, image_size))
        for path, shape in zip(self.paths, self.shapes):
            if len(shape) != 3:
                raise ValueError(f"{option}: {path} must put out a feature map [B, C, H, W], got [B, {', '.join(map(str, shape))}]")
        self._tapped = Taps(network, self.full)

    def forward(self, images: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Images [B, 3, H, W] -> logits [B, C], and one feature map a stage."""
        return self._tapped(images)


def stage_paths(network: nn.Module, option: str) -> tuple[str, ...]:
    """The modules at the ends of a network's stages, as paths from the innermost network.

    Raises:
        ValueError: it does not say where they are, so that `option` has to.
    """
    inner, _ = innermost(network)
    paths = tuple(getattr(inner, "stages", ()))
    if not paths:
        raise ValueError(f"{option} must be named: {type(inner).__name__} does not say where its stages are")
    return paths


def innermost(network: nn.Module) -> tuple[nn.Module, str]:
    """The network inside wrappers that hold it as `model`, and the path to it: "" or "model." and so on."""
    prefix = ""
    while not hasattr(network, "stages") and isinstance(inner := getattr(network, "model", None), nn.Module):
        network, prefix = inner, f"{prefix}model."
    return network, prefix


def head_input(network: nn.Module) -> tuple[str, int]:
    """The tap of what the network's last linear layer reads, and how many numbers that are for an image."""
    inner, prefix = innermost(network)
    path, layer = find_head(inner)
    return f"{prefix}{path}:input", layer.in_features


def check_as_many(student: Sequence[str], teacher: Sequence[str]) -> None:
    """Stages, given by their paths, are compared one by one.

    Raises:
        ValueError: student and teacher have different numbers of them.
    """
    if len(student) != len(teacher):
        ours, theirs = (f"{len(paths)} ({', '.join(paths)})" for paths in (student, teacher))
        raise ValueError(f"student and teacher must have equally many stages, got {ours} and {theirs}: name them")


def fingerprint(network: nn.Module) -> str:
    """Tells a network's weights from any others: the SHA-256 of its parameters and buffers, hexadecimal."""
    digest = hashlib.sha256()
    for name, tensor in sorted(innermost(network)[0].state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    return digest.hexdigest()
