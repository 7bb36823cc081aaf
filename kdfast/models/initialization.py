"""How the networks for small images start: He et al. 2015 (arXiv:1502.01852), preserving the variance of the gradients."""

from torch import nn


def initialize(network: nn.Module, *, linear_std: float | None = None) -> None:
    """Draws every convolution's weights from N(0, 2 / (out_channels k²)) and sets its bias to zero.

    BatchNorm keeps PyTorch's scale 1 and shift 0.

    Args:
        network: changed in place.
        linear_std: linear layers get weights from N(0, linear_std²) and zero biases; None leaves them PyTorch's.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Linear) and linear_std is not None:
            nn.init.normal_(module.weight, std=linear_std)
            nn.init.zeros_(module.bias)
