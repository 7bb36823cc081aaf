"""ResNets for images of 32 or 64 pixels (He et al. 2016, arXiv:1512.03385, section 4.2).

    resnet8 ... resnet110           3x3 convolution to 16, stages of 16, 32 and 64 channels, (depth - 2) / 6 basic blocks each
    resnet8x4, resnet32x4           the same with 32, then 64, 128 and 256 channels
    resnet18_cifar, resnet34_cifar, ImageNet's four stages behind a 3x3 convolution of stride 1 without max-pooling
    resnet50_cifar

Where a block changes the shape, the shortcut is a strided 1x1 convolution with BatchNorm ("conv"), or the paper's option A ("A"): every
other pixel, missing channels filled with zeros, no parameters.

Modules are named as in the widespread CIFAR weights (conv1, bn1, layer1.0.conv1, ..., linear), so these load by name. No ReLU works in
place, so the output of every module can be tapped.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal, get_args

import torch.nn.functional as F
from torch import Tensor, nn

from kdfast.models.blocks import average_pool, conv_bn, initialize

Shortcut = Literal["conv", "A"]


class ZeroPadShortcut(nn.Module):
    """Option A: takes every `stride`-th pixel and surrounds the channels with zeros, half before and half after."""

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        self.stride = stride
        self.before = (out_channels - in_channels) // 2
        self.after = out_channels - in_channels - self.before

    def forward(self, x: Tensor) -> Tensor:
        """[B, in_channels, H, W] -> [B, out_channels, ceil(H / stride), ceil(W / stride)]."""
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.before, self.after))


def _make_shortcut(kind: Shortcut, in_channels: int, out_channels: int, stride: int) -> nn.Module:
    if stride == 1 and in_channels == out_channels:
        return nn.Identity()
    if kind == "A":
        return ZeroPadShortcut(in_channels, out_channels, stride)
    return nn.Sequential(*conv_bn(in_channels, out_channels, 1, stride=stride))


class BasicBlock(nn.Module):
    """relu(shortcut(x) + bn(conv3x3(relu(bn(conv3x3(x))))))."""

    expansion = 1

    def __init__(self, in_channels: int, width: int, stride: int, shortcut: Shortcut):
        super().__init__()
        self.conv1, self.bn1 = conv_bn(in_channels, width, stride=stride)
        self.conv2, self.bn2 = conv_bn(width, width)
        self.shortcut = _make_shortcut(shortcut, in_channels, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        """[B, in_channels, H, W] -> [B, width, H / stride, W / stride]."""
        residual = F.relu(self.bn1(self.conv1(x)))
        residual = self.bn2(self.conv2(residual))
        return F.relu(residual + self.shortcut(x))


class Bottleneck(nn.Module):
    """relu(shortcut(x) + 1x1, 3x3 and 1x1 convolutions), the last one to 4 x width channels."""

    expansion = 4

    def __init__(self, in_channels: int, width: int, stride: int, shortcut: Shortcut):
        super().__init__()
        self.conv1, self.bn1 = conv_bn(in_channels, width, 1)
        self.conv2, self.bn2 = conv_bn(width, width, stride=stride)
        self.conv3, self.bn3 = conv_bn(width, 4 * width, 1)
        self.shortcut = _make_shortcut(shortcut, in_channels, 4 * width, stride)

    def forward(self, x: Tensor) -> Tensor:
        """[B, in_channels, H, W] -> [B, 4 width, H / stride, W / stride]."""
        residual = F.relu(self.bn1(self.conv1(x)))
        residual = F.relu(self.bn2(self.conv2(residual)))
        residual = self.bn3(self.conv3(residual))
        return F.relu(residual + self.shortcut(x))


class ResNet(nn.Module):
    """A ResNet whose first convolution keeps the resolution; every stage after the first halves it.

    Args:
        block: BasicBlock or Bottleneck.
        depths: blocks of each stage.
        stem: channels of the first convolution.
        widths: width of each stage.
        num_classes: outputs of the classifier.
        shortcut: "conv" or "A".
        in_channels: channels of the images.

    Raises:
        ValueError: another shortcut.
    """

    # the same layers as RepDistiller and DIH name them
    synonyms = (("downsample.", "shortcut."), ("fc.", "linear."))

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        depths: Sequence[int],
        stem: int,
        widths: Sequence[int],
        num_classes: int,
        *,
        shortcut: Shortcut = "conv",
        in_channels: int = 3,
    ):
        super().__init__()
        if shortcut not in get_args(Shortcut):
            raise ValueError(f"ResNet: shortcut must be 'conv' or 'A', got {shortcut!r}")
        self.stages = tuple(f"layer{number}" for number in range(1, len(depths) + 1))
        self.conv1, self.bn1 = conv_bn(in_channels, stem)
        channels = stem
        for stage, depth, width in zip(self.stages, depths, widths):
            blocks = nn.Sequential()
            for index in range(depth):
                stride = 2 if index == 0 and stage != "layer1" else 1
                blocks.append(block(channels, width, stride, shortcut))
                channels = width * block.expansion
            self.add_module(stage, blocks)
        self.linear = nn.Linear(channels, num_classes)
        initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        """[B, in_channels, H, W] -> logits [B, num_classes]."""
        x = F.relu(self.bn1(self.conv1(x)))
        for stage in self.stages:
            x = getattr(self, stage)(x)
        return self.linear(average_pool(x))


_WIDTHS = (64, 128, 256, 512)

NETWORKS: dict[str, Callable[..., nn.Module]] = {
    **{f"resnet{depth}": partial(ResNet, BasicBlock, [(depth - 2) // 6] * 3, 16, (16, 32, 64)) for depth in (8, 14, 20, 32, 44, 56, 110)},
    **{f"resnet{depth}x4": partial(ResNet, BasicBlock, [(depth - 2) // 6] * 3, 32, (64, 128, 256)) for depth in (8, 32)},
    "resnet18_cifar": partial(ResNet, BasicBlock, (2, 2, 2, 2), 64, _WIDTHS),
    "resnet34_cifar": partial(ResNet, BasicBlock, (3, 4, 6, 3), 64, _WIDTHS),
    "resnet50_cifar": partial(ResNet, Bottleneck, (3, 4, 6, 3), 64, _WIDTHS),
}
