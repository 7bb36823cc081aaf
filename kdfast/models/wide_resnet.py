"""Wide residual networks (Zagoruyko and Komodakis 2016, arXiv:1605.07146): wrn_D_k has depth D and width factor k.

A 3x3 convolution to 16, stages of 16k, 32k and 64k channels with (D - 4) / 6 pre-activation blocks each, BatchNorm, ReLU, average pool,
linear layer. Where a block changes the number of channels, its shortcut is a 1x1 convolution of the activated input. A stage's output is
the sum before the next BatchNorm. Modules are named as in RepDistiller's weights.
"""

from collections import OrderedDict
from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from kdfast.models.blocks import average_pool, initialize


class PreActivationBlock(nn.Module):
    """x + conv3x3(relu(bn(conv3x3(relu(bn(x)))))); when the width changes both paths start from relu(bn(x))."""

    def __init__(self, in_channels: int, width: int, stride: int):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, width, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        same = in_channels == width
        self.convShortcut = None if same else nn.Conv2d(in_channels, width, 1, stride=stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, in_channels, H, W] -> [B, width, H / stride, W / stride]."""
        activated = F.relu(self.bn1(x))
        residual = self.conv2(F.relu(self.bn2(self.conv1(activated))))
        return residual + (x if self.convShortcut is None else self.convShortcut(activated))


def _make_stage(blocks: int, in_channels: int, width: int, stride: int) -> nn.Module:
    """Blocks in a row, the first of which may stride, under the name "layer" that the weights use."""
    others = (PreActivationBlock(width, width, 1) for _ in range(blocks - 1))
    return nn.Sequential(OrderedDict(layer=nn.Sequential(PreActivationBlock(in_channels, width, stride), *others)))


class WideResNet(nn.Module):
    """A wide ResNet for small images.

    Args:
        depth: 6 n + 4.
        factor: width over that of a ResNet of the same depth.
        num_classes: outputs of the classifier.
        in_channels: channels of the images.
    """

    stages = ("block1", "block2", "block3")

    def __init__(self, depth: int, factor: int, num_classes: int, *, in_channels: int = 3):
        super().__init__()
        blocks = (depth - 4) // 6
        widths = (16 * factor, 32 * factor, 64 * factor)
        self.conv1 = nn.Conv2d(in_channels, 16, 3, padding=1, bias=False)
        self.block1 = _make_stage(blocks, 16, widths[0], stride=1)
        self.block2 = _make_stage(blocks, widths[0], widths[1], stride=2)
        self.block3 = _make_stage(blocks, widths[1], widths[2], stride=2)
        self.bn1 = nn.BatchNorm2d(widths[2])
        self.fc = nn.Linear(widths[2], num_classes)
        initialize(self)
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: Tensor) -> Tensor:
        """[B, in_channels, H, W] -> logits [B, num_classes]."""
        x = self.block3(self.block2(self.block1(self.conv1(x))))
        return self.fc(average_pool(F.relu(self.bn1(x))))


NETWORKS: dict[str, Callable[..., nn.Module]] = {
    f"wrn_{depth}_{factor}": partial(WideResNet, depth, factor) for depth, factor in ((16, 2), (28, 2), (40, 1), (40, 2))
}
