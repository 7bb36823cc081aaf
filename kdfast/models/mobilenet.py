"""MobileNetV2 for images of 32 or 64 pixels (Sandler et al. 2018, arXiv:1801.04381), as RepDistiller's tables have it.

Seven groups of inverted residual blocks (1x1 expansion, 3x3 depthwise, 1x1 linear projection), expansion 6, half the published width, and
the strides of 32-pixel images: the second group does not stride. ReLU, not ReLU6.

    mobilenetv2_cifar         width 0.5
    mobilenetv2_cifar_tiny    width 0.25

Modules are named as in RepDistiller's weights. No ReLU works in place, so every module can be tapped.
"""

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn

from kdfast.models.blocks import average_pool, conv_bn, initialize

EXPANSION = 6
LAST_CHANNELS = 1280
# channels at width 1, blocks, stride of the first block
GROUPS = ((16, 1, 1), (24, 2, 1), (32, 3, 2), (64, 4, 2), (96, 3, 1), (160, 3, 2), (320, 1, 1))


class InvertedResidual(nn.Module):
    """Expands the channels, filters each, projects; adds the input where the shapes agree."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, expansion: int):
        super().__init__()
        wide = in_channels * expansion
        self.adds_input = stride == 1 and in_channels == out_channels
        self.conv = nn.Sequential(
            *(*conv_bn(in_channels, wide, 1), nn.ReLU()),
            *(*conv_bn(wide, wide, stride=stride, groups=wide), nn.ReLU()),
            *conv_bn(wide, out_channels, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        """[B, in_channels, H, W] -> [B, out_channels, H / stride, W / stride]."""
        return x + self.conv(x) if self.adds_input else self.conv(x)


class MobileNetV2(nn.Module):
    """MobileNetV2 whose groups of blocks are blocks.0 ... blocks.6.

    Args:
        width: factor on the published numbers of channels.
        num_classes: outputs of the classifier.
        in_channels: channels of the images.
    """

    stages = ("blocks.1", "blocks.2", "blocks.4", "blocks.6")

    def __init__(self, width: float, num_classes: int, *, in_channels: int = 3):
        super().__init__()
        channels = int(32 * width)
        self.conv1 = nn.Sequential(*conv_bn(in_channels, channels, stride=2), nn.ReLU())
        self.blocks = nn.Sequential()
        for number, (published, count, stride) in enumerate(GROUPS):
            group = nn.Sequential()
            for index in range(count):
                expansion = 1 if number == 0 else EXPANSION
                group.append(InvertedResidual(channels, int(published * width), stride if index == 0 else 1, expansion))
                channels = int(published * width)
            self.blocks.append(group)
        self.conv2 = nn.Sequential(*conv_bn(channels, LAST_CHANNELS, 1), nn.ReLU())
        self.classifier = nn.Sequential(nn.Linear(LAST_CHANNELS, num_classes))
        initialize(self, linear_std=0.01)

    def forward(self, x: Tensor) -> Tensor:
        """[B, in_channels, H, W] -> logits [B, num_classes]."""
        return self.classifier(average_pool(self.conv2(self.blocks(self.conv1(x)))))


NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "mobilenetv2_cifar": partial(MobileNetV2, 0.5),
    "mobilenetv2_cifar_tiny": partial(MobileNetV2, 0.25),
}
