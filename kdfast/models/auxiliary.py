"""Classifiers on feature maps in the middle of a network, as the methods that distil through them have them.

flatten_head      Flatten - Linear                                                           (DIH)
conv_head         two convolutions, global average pool, two linear layers                    (MHKD)
separable_head    separable convolutions in place of the stages that follow, pool, Linear    (TOFD)
"""

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn

from kdfast.models.blocks import average_pool, conv_bn
from kdfast.ops import checks


def flatten_head(shape: Sequence[int], num_classes: int) -> nn.Module:
    """One linear layer over all of a feature map (DIH).

    Args:
        shape: (channels, height, width).
        num_classes: outputs.

    Returns:
        A module, [B, *shape] -> [B, num_classes].

    Example:
        >>> head = kdfast.models.flatten_head((64, 8, 8), num_classes=10)
        >>> head(torch.randn(2, 64, 8, 8)).shape
        torch.Size([2, 10])
    """
    if not isinstance(shape, Sequence) or len(shape) != 3:
        raise ValueError(f"shape must be (channels, height, width), got {shape!r}")
    channels, height, width = shape
    checks.are_counts(channels=channels, height=height, width=width, num_classes=num_classes)
    return nn.Sequential(nn.Flatten(), nn.Linear(channels * height * width, num_classes))


def conv_head(channels: int, num_classes: int, *, width: int = 256, padding: int = 1) -> nn.Module:
    """Conv3x3 - BatchNorm - ReLU, twice; global average pool; Linear - ReLU - Linear (MHKD).

    Args:
        channels: of the feature map.
        num_classes: outputs.
        width: channels of the convolutions and of the hidden layer.
        padding: of the convolutions; the original's 0 needs maps of at least 5 pixels.

    Returns:
        A module, [B, channels, H, W] -> [B, num_classes].

    Example:
        >>> head = kdfast.models.conv_head(64, num_classes=10, width=32)
        >>> head(torch.randn(2, 64, 8, 8)).shape
        torch.Size([2, 10])
    """
    checks.are_counts(channels=channels, num_classes=num_classes, width=width)
    checks.are_counts(0, padding=padding)
    return nn.Sequential(
        *(nn.Conv2d(channels, width, 3, padding=padding, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)),
        *(nn.Conv2d(width, width, 3, padding=padding, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        *(nn.Linear(width, width), nn.ReLU(inplace=True), nn.Linear(width, num_classes)),
    )


class SeparableHead(nn.Module):
    """Separable convolutions, global average pool, Linear; see separable_head()."""

    def __init__(self, channels: Sequence[int], num_classes: int) -> None:
        super().__init__()
        self.convolutions = nn.Sequential(*(_separable(narrow, wide) for narrow, wide in pairwise(channels)))
        self.classifier = nn.Linear(channels[-1], num_classes)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[B, channels[0], H, W] -> features [B, channels[-1]] and logits [B, num_classes]."""
        features = average_pool(self.convolutions(x))
        return features, self.classifier(features)


def separable_head(channels: Sequence[int], num_classes: int) -> SeparableHead:
    """A classifier that goes on where a stage ends: a separable convolution of stride 2 for every stage that follows (TOFD).

    Args:
        channels: of the feature map, then of every stage that follows.
        num_classes: outputs.

    Returns:
        A module, [B, channels[0], H, W] -> features [B, channels[-1]] and logits [B, num_classes].

    Example:
        >>> head = kdfast.models.separable_head([16, 32, 64], num_classes=10)
        >>> features, logits = head(torch.randn(2, 16, 32, 32))
        >>> features.shape, logits.shape
        (torch.Size([2, 64]), torch.Size([2, 10]))
    """
    if not isinstance(channels, Sequence) or not channels:
        raise TypeError(f"channels must be a sequence of integers, got {channels!r}")
    for n in (*channels,):
        checks.are_counts(channels=n, num_classes=num_classes)
    return SeparableHead(channels, num_classes)


def _separable(narrow: int, wide: int) -> nn.Module:
    """Depthwise 3x3 of stride 2, pointwise, BatchNorm, ReLU; depthwise 3x3, pointwise to the width, BatchNorm, ReLU."""
    return nn.Sequential(
        nn.Conv2d(narrow, narrow, 3, stride=2, padding=1, groups=narrow, bias=False),
        *(*conv_bn(narrow, narrow, 1), nn.ReLU(inplace=True)),
        nn.Conv2d(narrow, narrow, 3, padding=1, groups=narrow, bias=False),
        *(*conv_bn(narrow, wide, 1), nn.ReLU(inplace=True)),
    )
