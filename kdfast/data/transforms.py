"""From a decoded image to the network's input, by name: augmentation or resizing on uint8, then normalization to float32.

Augmentation works on single uint8 images and draws from torch's default generator, as torchvision's transforms do; loaders seed
that generator for every sample. Normalization is (pixel / 255 - mean) / std, done for a whole batch at once and on its device, so
that images travel between processes and to the GPU as bytes.

    training        none            squash only
                    digits          squash, shift by up to 1/8 of the side
                    cifar           squash, shift by up to 4 pixels, where zeros come in, flip
                    cifar-reflect   the same, but the mirrored image comes in
                    tiny            as cifar, for Tiny-ImageNet's 64x64
                    imagenet        random resized crop, flip: torchvision's defaults
                    conkd-teacher   squash, RandAugment(5, 14), shift by up to 16 pixels
                    conkd-student   the same, flip, rotation by up to 10 degrees, colour jitter 0.2
    evaluation      none            the image as it is
                    squash          squash only
                    center-crop     shorter side to 256/224 of image_size, middle image_size x image_size

Squash, here, is resizing to image_size x image_size whatever the aspect ratio; it costs nothing where the image has that size.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdfast.data.protocol import DataError

Channels = tuple[float, float, float]

NORMALIZATIONS: dict[str, tuple[Channels, Channels]] = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.247, 0.243, 0.261)),
    "cifar100": ((0.507, 0.487, 0.441), (0.267, 0.256, 0.276)),
    "repdistiller-cifar100": ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
    "digits": ((0.3053,) * 3, (0.3760,) * 3),
    "half": ((0.5,) * 3, (0.5,) * 3),
}
"""name -> (mean, std) of pixels scaled to 0..1."""


class Normalize(nn.Module):
    """uint8 [..., 3, H, W] -> (x / 255 - mean) / std, float32, as x * scale + shift."""

    scale: Tensor
    shift: Tensor

    def __init__(self, mean: Channels, std: Channels) -> None:
        super().__init__()
        m, s = torch.tensor(mean, dtype=torch.float64), torch.tensor(std, dtype=torch.float64)
        self.register_buffer("scale", (1 / (255 * s)).float().view(3, 1, 1), persistent=False)
        self.register_buffer("shift", (-m / s).float().view(3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Keeps the memory format."""
        return images.to(torch.float32).mul_(self.scale).add_(self.shift)


@dataclass(frozen=True, eq=False)
class Transform:
    """Augmentation or resizing, then normalization.

    Attributes:
        augment: uint8 [3, H, W] -> uint8 [3, h, w]; not random, it takes [B, 3, H, W] as well.
        random: whether `augment` draws random numbers.
        mean, std: of pixels scaled to 0..1.
    """

    augment: Callable[[Tensor], Tensor]
    random: bool
    mean: Channels
    std: Channels

    def __call__(self, image: Tensor) -> Tensor:
        """uint8 [3, H, W] -> float32 [3, h, w]."""
        return Normalize(self.mean, self.std)(self.augment(image))


def training_names() -> tuple[str, ...]:
    """The names that training_transform() takes."""
    return tuple(_TRAINING)


def evaluation_names() -> tuple[str, ...]:
    """The names that evaluation_transform() takes."""
    return tuple(_EVALUATION)


def training_transform(name: str, image_size: int, mean: Channels, std: Channels) -> Transform:
    """The training augmentation of this name; the result is image_size x image_size.

    Raises:
        DataError: no such name, or image_size is not positive.
    """
    return _build("training", _TRAINING, name, image_size, mean, std)


def evaluation_transform(name: str, image_size: int, mean: Channels, std: Channels) -> Transform:
    """The evaluation transform of this name; the result is image_size x image_size, but for "none".

    Raises:
        DataError: no such name, or image_size is not positive.
    """
    return _build("evaluation", _EVALUATION, name, image_size, mean, std)


class _Squash(nn.Module):
    """Resizes to size x size with antialiasing; leaves alone what has that size."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, image: Tensor) -> Tensor:
        size = [self.size, self.size]
        if list(image.shape[-2:]) == size:
            return image
        from torchvision.transforms.v2 import functional

        return functional.resize(image, size, antialias=True)


class _Shift(nn.Module):
    """A random crop, as large as the image, of the image padded by `padding` pixels.

    torchvision's RandomCrop does the same in ten times the time, which on an 8x8 or 32x32 image is most of the epoch.
    """

    def __init__(self, padding: int, *, reflect: bool = False) -> None:
        super().__init__()
        self.padding = padding
        self.reflect = reflect

    def forward(self, image: Tensor) -> Tensor:
        p, (H, W) = self.padding, image.shape[-2:]
        top, left = torch.randint(2 * p + 1, (2,)).tolist()
        if self.reflect:
            return image.index_select(-2, _mirrored(top - p, H)).index_select(-1, _mirrored(left - p, W))
        return F.pad(image, (p, p, p, p))[..., top : top + H, left : left + W]


def _mirrored(start: int, size: int) -> Tensor:
    """Start .. start + size - 1 as positions in 0 .. size - 1, mirrored at both ends without repeating the edge."""
    position = torch.arange(start, start + size).abs()
    return torch.where(position < size, position, 2 * (size - 1) - position)


class _Flip(nn.Module):
    """Left to right, half of the time."""

    def forward(self, image: Tensor) -> Tensor:
        return image.flip(-1) if torch.rand(()).item() < 0.5 else image


def _imagenet(size: int) -> list[nn.Module]:
    from torchvision.transforms import v2

    return [v2.RandomResizedCrop(size, antialias=True), _Flip()]


def _conkd_teacher(size: int) -> list[nn.Module]:
    from torchvision.transforms import v2

    return [_Squash(size), v2.RandAugment(num_ops=5, magnitude=14), _Shift(16)]


def _conkd_student(size: int) -> list[nn.Module]:
    from torchvision.transforms import v2

    jitter = v2.ColorJitter(brightness=0.2, contrast=0.2, saturation=0.2, hue=0.2)
    return [*_conkd_teacher(size), _Flip(), v2.RandomRotation(10), jitter]


def _center_crop(size: int) -> list[nn.Module]:
    from torchvision.transforms import v2

    return [v2.Resize(round(size * 256 / 224), antialias=True), v2.CenterCrop(size)]


_Builder = Callable[[int], list[nn.Module]]

_TRAINING: dict[str, _Builder] = {
    "none": lambda size: [_Squash(size)],
    "digits": lambda size: [_Squash(size), _Shift(max(1, size // 8))],
    "cifar": lambda size: [_Squash(size), _Shift(4), _Flip()],
    "cifar-reflect": lambda size: [_Squash(size), _Shift(4, reflect=True), _Flip()],
    "tiny": lambda size: [_Squash(size), _Shift(4), _Flip()],
    "imagenet": _imagenet,
    "conkd-teacher": _conkd_teacher,
    "conkd-student": _conkd_student,
}

_EVALUATION: dict[str, _Builder] = {
    "none": lambda size: [],
    "squash": lambda size: [_Squash(size)],
    "center-crop": _center_crop,
}


def _build(kind: str, builders: dict[str, _Builder], name: str, image_size: int, mean: Channels, std: Channels) -> Transform:
    if name not in builders:
        raise DataError(f"{kind} transform must be one of {', '.join(builders)}, got {name!r}")
    if image_size < 1:
        raise DataError(f"image_size must be at least 1, got {image_size}")
    random = kind == "training" and name != "none"
    return Transform(nn.Sequential(*builders[name](image_size)), random, mean, std)
