"""Shared parts of the networks for small images: convolution blocks, the last pooling, initial weights."""

import torch.nn.functional as F
from torch import Tensor, nn


def conv_bn(inputs: int, outputs: int, kernel: int = 3, *, stride: int = 1, groups: int = 1, bias: bool = False) -> list[nn.Module]:
    """Convolution (padded so that stride 1 keeps the size) and BatchNorm."""
    convolution = nn.Conv2d(inputs, outputs, kernel, stride=stride, padding=kernel // 2, groups=groups, bias=bias)
    return [convolution, nn.BatchNorm2d(outputs)]


def average_pool(x: Tensor) -> Tensor:
    """The mean of each channel: [B, C, H, W] -> [B, C]."""
    return F.adaptive_avg_pool2d(x, 1).flatten(1)


def initialize(network: nn.Module, *, linear_std: float | None = None) -> None:
    """Draws every convolution's weights from N(0, 2 / (out_channels k²)) and sets its bias to zero.

    This is the initialization of He et al. 2015 (arXiv:1502.01852) that preserves the variance of the gradients. BatchNorm keeps PyTorch's
    scale 1 and shift 0.

    Args:
        network: changed in place.
        linear_std: linear layers get weights from N(0, linear_std²) and zero biases; None keeps PyTorch's initialization.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Linear) and linear_std is not None:
            nn.init.normal_(module.weight, std=linear_std)
            nn.init.zeros_(module.bias)
