"""VGG with BatchNorm for images of 32 or 64 pixels (Simonyan and Zisserman 2015, arXiv:1409.1556), one linear layer at the end.

    vgg8_cifar, vgg13_cifar     RepDistiller's: five blocks, average pool; the fourth max-pooling only where maps exceed 4x4
    vgg11_cifar                 DIH's: a max-pooling after each of five blocks, so 32 pixels end as one

The two families name their modules as the weights of their sources do. No ReLU works in place, so every module can be tapped.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from kdfast.models.blocks import average_pool, conv_bn, initialize

WIDTHS = (64, 128, 256, 512, 512)


def _convolutions(in_channels: int, width: int, count: int) -> list[nn.Module]:
    """`count` times 3x3 convolution, BatchNorm, ReLU."""
    layers: list[nn.Module] = []
    for index in range(count):
        layers += [*conv_bn(width if index else in_channels, width, bias=True), nn.ReLU()]
    return layers


class BlockVGG(nn.Module):
    """RepDistiller's VGG: the stages are the ReLU outputs of blocks 1 to 4, counted from 0.

    Args:
        convolutions: of each of the five blocks.
        num_classes: outputs of the classifier.
        in_channels: channels of the images.
    """

    stages = ("block1", "block2", "block3", "block4")

    def __init__(self, convolutions: Sequence[int], num_classes: int, *, in_channels: int = 3):
        super().__init__()
        inputs = (in_channels, *WIDTHS)
        for number, (count, width) in enumerate(zip(convolutions, WIDTHS)):
            self.add_module(f"block{number}", nn.Sequential(*_convolutions(inputs[number], width, count)))
        self.classifier = nn.Linear(WIDTHS[-1], num_classes)
        initialize(self, linear_std=0.01)

    def forward(self, x: Tensor) -> Tensor:
        """[B, in_channels, H, W], H and W at least 8 -> logits [B, num_classes]."""
        x = self.get_submodule("block0")(x)
        for stage in self.stages:
            # 32 pixels reach the last block as 4x4; another pooling would leave little to average
            if stage != "block4" or max(x.shape[-2:]) > 4:
                x = F.max_pool2d(x, 2)
            x = self.get_submodule(stage)(x)
        return self.classifier(average_pool(x))


class SequentialVGG(nn.Module):
    """DIH's VGG-11: the stages are pool 1, the ReLU of convolution 2, the ReLU of convolution 3 and the last pool.

    Args:
        convolutions: of each of the five blocks.
        num_classes: outputs of the classifier.
        in_channels: channels of the images.
    """

    stages = ("features.3", "features.6", "features.10", "features.28")

    def __init__(self, convolutions: Sequence[int], num_classes: int, *, in_channels: int = 3):
        super().__init__()
        self.features = nn.Sequential()
        for width, count in zip(WIDTHS, convolutions):
            self.features.extend([*_convolutions(in_channels, width, count), nn.MaxPool2d(2)])
            in_channels = width
        self.classifier = nn.Linear(WIDTHS[-1], num_classes)
        initialize(self, linear_std=0.01)

    def forward(self, x: Tensor) -> Tensor:
        """[B, in_channels, H, W], H and W at least 32 -> logits [B, num_classes].

        Raises:
            ValueError: smaller images; five poolings leave nothing of them.
        """
        if min(x.shape[-2:]) < 32:
            raise ValueError(f"vgg11_cifar: images must have at least 32x32 pixels, got {tuple(x.shape)}")
        return self.classifier(average_pool(self.features(x)))


NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "vgg8_cifar": partial(BlockVGG, (1, 1, 1, 1, 1)),
    "vgg11_cifar": partial(SequentialVGG, (1, 1, 2, 2, 2)),
    "vgg13_cifar": partial(BlockVGG, (2, 2, 2, 2, 2)),
}
