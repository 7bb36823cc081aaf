"""Access to a network's features for recipes: the ends of its stages, the input of its classifier, its weights' fingerprint."""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kdfast.models import Taps, find_head, tap_shapes

Shape = tuple[int, ...]


class FeatureMaps(nn.Module):
    """A network and its feature maps: the outputs of the modules at the ends of its stages.

    Args:
        network: images -> logits. If it wraps another network as `model`, the stages are that network's.
        named: module paths; none: the network's own `stages`.
        option: the option that names them, for messages.
        image_size: pixels of the images.

    Attributes:
        paths, full: the modules, as paths from the innermost network and from this one.
        shapes: (channels, height, width) of each.
        channels_last: true for each module that puts out [B, H, W, C].

    Raises:
        ValueError: none is named and the network does not say where its stages are, a path names no module, or a module's output is
            no feature map.
    """

    def __init__(self, network: nn.Module, named: Sequence[str], option: str, image_size: int) -> None:
        super().__init__()
        prefix = innermost(network)[1]
        self.paths = tuple(named) or stage_paths(network, option)
        self.full = tuple(prefix + path for path in self.paths)
        try:
            self.shapes: tuple[Shape, ...] = tap_shapes(network, self.full, (3, image_size, image_size))
        except (ValueError, TypeError, RuntimeError) as error:
            raise ValueError(f"{option}: {error}") from error
        for path, shape in zip(self.paths, self.shapes):
            if len(shape) != 3:
                got = f"[B, {', '.join(map(str, shape))}]{', tokens' if len(shape) == 2 else ''}"
                raise ValueError(f"{option}: {path} must put out a feature map [B, C, H, W] or [B, H, W, C], got {got}")
        self.channels_last = tuple(_is_channels_last(network, *found, option, image_size) for found in zip(self.full, self.shapes))
        self.shapes = tuple((s[2], s[0], s[1]) if last else s for s, last in zip(self.shapes, self.channels_last))
        self._tapped = Taps(network, self.full)

    def forward(self, images: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Images [B, 3, H, W] -> logits [B, C], and one feature map [B, C, H, W] a stage."""
        logits, features = self._tapped(images)
        return logits, move_channels(features, self.channels_last)


def move_channels(features: Sequence[Tensor], channels_last: Sequence[bool]) -> tuple[Tensor, ...]:
    """Returns the feature maps as [B, C, H, W]; those with `channels_last` are [B, H, W, C]."""
    return tuple(F.permute(0, 3, 1, 2) if last else F for F, last in zip(features, channels_last))


def _is_channels_last(network: nn.Module, path: str, shape: Shape, option: str, image_size: int) -> bool:
    """Returns whether a map is (H, W, C), as Swin's: images are square, so H equals W. If C does too, larger images tell which it is."""
    if (shape[0] == shape[1]) != (shape[1] == shape[2]):
        return shape[0] == shape[1]
    try:
        (larger,) = tap_shapes(network, (path,), (3, 2 * image_size, 2 * image_size))
    except Exception as error:  # a network may raise what it likes for images of another size
        raise ValueError(f"{option}: {path} puts out [B, {', '.join(map(str, shape))}], and it is not clear which are channels") from error
    return larger[0] != shape[0]


def pair_feature_maps(
    student: nn.Module, teacher: nn.Module, settings: object, image_size: int, *, drop_last: bool = False
) -> tuple[FeatureMaps, FeatureMaps]:
    """Returns the feature maps of both networks at settings.student_stages and settings.teacher_stages.

    Args:
        student: images -> logits.
        teacher: images -> logits.
        settings: a recipe's; an empty tuple stands for the network's own stages.
        image_size: pixels of the images.
        drop_last: leave out the last of a network's own stages.

    Raises:
        ValueError: as FeatureMaps, or the numbers of stages differ.
    """
    pair = []
    for network, option in ((student, "student_stages"), (teacher, "teacher_stages")):
        named = getattr(settings, option) or stage_paths(network, option)[: -1 if drop_last else None]
        pair.append(FeatureMaps(network, named, option, image_size))
    check_as_many(pair[0].paths, pair[1].paths)
    return pair[0], pair[1]


def stage_paths(network: nn.Module, option: str) -> tuple[str, ...]:
    """Returns the modules at the ends of a network's stages, as paths from the innermost network.

    Raises:
        ValueError: the network does not say where they are, so `option` has to.
    """
    inner, _ = innermost(network)
    stages = getattr(inner, "stages", ())
    # timm's networks hold the stages themselves there
    paths = tuple(f"stages.{name}" for name, _ in stages.named_children()) if isinstance(stages, nn.Module) else tuple(stages)
    if not paths or not all(isinstance(path, str) for path in paths):
        raise ValueError(f"{option} must be named: {type(inner).__name__} does not say where its stages are")
    return paths


def middle_stage(network: nn.Module, option: str) -> str:
    """Returns the path of the module at the end of a network's middle stage; errors as `stage_paths`."""
    paths = stage_paths(network, option)
    return paths[(len(paths) - 1) // 2]


def innermost(network: nn.Module) -> tuple[nn.Module, str]:
    """Returns the network inside wrappers that hold it as `model`, and the path to it: "", "model." and so on."""
    prefix = ""
    while not hasattr(network, "stages") and isinstance(inner := getattr(network, "model", None), nn.Module):
        network, prefix = inner, f"{prefix}model."
    return network, prefix


def head_input(network: nn.Module) -> tuple[str, int]:
    """Returns the tap of the input of the network's last linear layer, and its size for one image."""
    inner, prefix = innermost(network)
    path, layer = find_head(inner)
    return f"{prefix}{path}:input", layer.in_features


def check_as_many(student: Sequence[str], teacher: Sequence[str]) -> None:
    """Checks that student and teacher, given by the paths of their stages, have equally many.

    Raises:
        ValueError: the numbers differ.
    """
    if len(student) != len(teacher):
        counts = [f"{len(paths)} ({', '.join(paths)})" for paths in (student, teacher)]
        raise ValueError(f"student and teacher must have equally many stages, got {counts[0]} and {counts[1]}: name them")


def fingerprint(network: nn.Module) -> str:
    """Returns the SHA-256 of a network's parameters and buffers, hexadecimal."""
    digest = hashlib.sha256()
    for name, tensor in sorted(innermost(network)[0].state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    return digest.hexdigest()
