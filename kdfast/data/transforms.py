"""From a decoded image to the network's input, by name: augmentation or resizing on uint8, then normalization to float32.

A transform is a framing, which gives images one size, and steps that change a batch on any device, where every image has its own random
numbers. Normalization, (pixel / 255 - mean) / std, is done for a whole batch on its device, so images travel between processes and to the
GPU as bytes.

    training        none            squash only
                    digits          squash, shift by up to 1/8 of the side
                    cifar           squash, shift by up to 4 pixels with zeros at the border, flip
                    cifar-reflect   the same with the mirrored image at the border
                    cifar-cutout    as cifar, then a square of 16 pixels painted over
                    tiny            as cifar, for Tiny-ImageNet's 64x64
                    imagenet        random resized crop, flip: torchvision's defaults
                    conkd-teacher   squash, RandAugment(5, 14), shift by up to 16 pixels
                    conkd-student   the same, flip, rotation by up to 10 degrees, colour jitter 0.2
    evaluation      none            the image as it is
                    squash          squash only
                    center-crop     shorter side to 256/224 of image_size, middle image_size x image_size

Squash is resizing to image_size x image_size whatever the aspect ratio; an image of that size stays as it is.

To add one, add it to NORMALIZATIONS, TRAINING or EVALUATION and to the table above.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Integral

import torch
from torch import Tensor, nn

from kdfast.data.augment import ColorJitter, Cutout, Flip, RandAugment, Rotation, Shift, Step
from kdfast.data.framing import CenterCrop, Framing, ResizedCrop, Squash, cut
from kdfast.data.protocol import DataError
from kdfast.data.seeding import Draws

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
    """uint8 [..., 3, H, W] -> (x / 255 - mean) / std as x * scale + shift, in float32, then in `dtype`.

    Example:
        >>> normalize = kdfast.data.Normalize((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
        >>> normalize(torch.tensor([0, 255], dtype=torch.uint8).expand(3, 1, 2))[0]
        tensor([[-1.,  1.]])
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, mean: Channels, std: Channels, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.dtype = dtype
        m, s = torch.tensor(mean, dtype=torch.float64), torch.tensor(std, dtype=torch.float64)
        self.register_buffer("scale", (1 / (255 * s)).float().view(3, 1, 1), persistent=False)
        self.register_buffer("shift", (-m / s).float().view(3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Keeps the memory format."""
        return images.to(torch.float32).mul_(self.scale).add_(self.shift).to(self.dtype)


@dataclass(frozen=True, eq=False)
class Transform:
    """Augmentation or resizing, then normalization.

    Attributes:
        framing: makes images of one size; None: they stay as they are.
        steps: random changes, one after another.
        mean, std: of pixels scaled to 0..1.

    Example:
        >>> transform = kdfast.data.training_transform("cifar", 32, *kdfast.data.NORMALIZATIONS["cifar10"])
        >>> image = torch.zeros(3, 32, 32, dtype=torch.uint8)
        >>> transform(image).shape, transform(image).dtype, transform.random
        (torch.Size([3, 32, 32]), torch.float32, True)
    """

    framing: Framing | None
    steps: tuple[Step, ...]
    mean: Channels
    std: Channels

    @property
    def random(self) -> bool:
        """True if augment() draws random numbers."""
        return bool(self.steps) or (self.framing is not None and self.framing.random)

    def augment(self, image: Tensor) -> Tensor:
        """uint8 [3, H, W] -> uint8 [3, h, w], drawing from torch's default generator."""
        seed = int(torch.randint(2**63 - 1, ())) if self.random else 0
        return self.augment_all([image], Draws(seed, index=torch.zeros(1, dtype=torch.int64)))[0]

    def augment_all(self, images: Sequence[Tensor], draws: Draws) -> Tensor:
        """uint8 [3, H, W] of each image -> uint8 [B, 3, h, w].

        Raises:
            DataError: the images differ in size, and the transform does not resize.
        """
        sizes = torch.tensor([image.shape[-2:] for image in images])
        if self.framing is None:
            check_same_size(sizes)
        else:
            images = cut(images, self.framing.frames(sizes, draws))
        return self.change(torch.stack(list(images)), draws)

    def change(self, images: Tensor, draws: Draws) -> Tensor:
        """The steps after the framing: uint8 [B, 3, h, w] -> the same."""
        for step in self.steps:
            images = step.change(images, draws)
        return images

    def __call__(self, image: Tensor) -> Tensor:
        """uint8 [3, H, W] -> float32 [3, h, w]."""
        return Normalize(self.mean, self.std)(self.augment(image))


def check_same_size(sizes: Tensor) -> None:
    """Checks that images have one size, for a transform that does not resize.

    Args:
        sizes: int64 [n, 2], heights and widths.

    Raises:
        DataError: they differ.
    """
    different = sizes.unique(dim=0)
    if len(different) > 1:
        h, w = different[:2].unbind(1)
        raise DataError(f"images differ in size ({w[0]}x{h[0]} and {w[1]}x{h[1]}): choose a transform that resizes, such as squash")


def training_names() -> tuple[str, ...]:
    """The names that training_transform() takes.

    Example:
        >>> kdfast.data.training_names()[:3]
        ('none', 'digits', 'cifar')
    """
    return tuple(TRAINING)


def evaluation_names() -> tuple[str, ...]:
    """The names that evaluation_transform() takes.

    Example:
        >>> kdfast.data.evaluation_names()
        ('none', 'squash', 'center-crop')
    """
    return tuple(EVALUATION)


def training_transform(name: str, image_size: int, mean: Channels, std: Channels) -> Transform:
    """The training augmentation of this name; the result is image_size x image_size.

    Raises:
        DataError: no such name, or image_size is not positive.

    Example:
        >>> transform = kdfast.data.training_transform("imagenet", 64, *kdfast.data.NORMALIZATIONS["imagenet"])
        >>> transform(torch.zeros(3, 90, 120, dtype=torch.uint8)).shape
        torch.Size([3, 64, 64])
    """
    return _build("training", TRAINING, name, image_size, mean, std)


def evaluation_transform(name: str, image_size: int, mean: Channels, std: Channels) -> Transform:
    """The evaluation transform of this name; the result is image_size x image_size, except for "none".

    Raises:
        DataError: no such name, or image_size is not positive.

    Example:
        >>> transform = kdfast.data.evaluation_transform("center-crop", 64, *kdfast.data.NORMALIZATIONS["imagenet"])
        >>> transform(torch.zeros(3, 90, 120, dtype=torch.uint8)).shape
        torch.Size([3, 64, 64])
    """
    return _build("evaluation", EVALUATION, name, image_size, mean, std)


Builder = Callable[[int, Channels], "tuple[Framing | None, *tuple[Step, ...]]"]
"""(image_size, mean) -> framing and steps."""


def _cut_out(size: int, mean: Channels) -> tuple[Framing, *tuple[Step, ...]]:
    red, green, blue = (round(255 * m) for m in mean)
    return Squash(size), Shift(4), Flip(), Cutout(16, (red, green, blue))


TRAINING: dict[str, Builder] = {
    "none": lambda size, mean: (Squash(size),),
    "digits": lambda size, mean: (Squash(size), Shift(max(1, size // 8))),
    "cifar": lambda size, mean: (Squash(size), Shift(4), Flip()),
    "cifar-reflect": lambda size, mean: (Squash(size), Shift(4, reflect=True), Flip()),
    "cifar-cutout": _cut_out,
    "tiny": lambda size, mean: (Squash(size), Shift(4), Flip()),
    "imagenet": lambda size, mean: (ResizedCrop(size), Flip()),
    "conkd-teacher": lambda size, mean: (Squash(size), RandAugment(5, 14), Shift(16)),
    "conkd-student": lambda size, mean: (Squash(size), RandAugment(5, 14), Shift(16), Flip(), Rotation(10), ColorJitter(0.2)),
}

EVALUATION: dict[str, Builder] = {
    "none": lambda size, mean: (None,),
    "squash": lambda size, mean: (Squash(size),),
    "center-crop": lambda size, mean: (CenterCrop(size),),
}


def _build(purpose: str, builders: dict[str, Builder], name: str, image_size: int, mean: Channels, std: Channels) -> Transform:
    if name not in builders:
        raise DataError(f"{purpose} transform must be one of {', '.join(builders)}, got {name!r}")
    if not isinstance(image_size, Integral) or image_size < 1:
        raise DataError(f"image_size must be at least 1, got {image_size!r}")
    for channels, least in ((mean, -math.inf), (std, 0)):
        if not isinstance(channels, tuple | list) or len(channels) != 3 or not all(least < c < math.inf for c in channels):
            raise DataError(f"mean and std must be three finite numbers, and std positive, got {mean!r} and {std!r}")
    framing, *steps = builders[name](image_size, mean)
    return Transform(framing, tuple(steps), mean, std)
