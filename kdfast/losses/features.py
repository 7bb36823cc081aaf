"""Modules for feature maps: attention transfer, hints, self-distillation."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from kdfast import functional
from kdfast.losses.checks import check_not_swapped
from kdfast.ops import checks
from kdfast.ops.precision import at_least_float32

__all__ = ["AttentionTransferLoss", "HintLoss", "SelfDistillationLoss"]


class AttentionTransferLoss(nn.Module):
    """Attention transfer ("Paying More Attention to Attention", ICLR 2017): see functional.attention_transfer_loss.

    Args:
        p: power of the activations, > 0. RepDistiller weighs the loss for p=2 by 1000.

    Example:
        >>> import torch
        >>> from kdfast.losses import AttentionTransferLoss
        >>> student, teacher = torch.rand(2, 16, 8, 8), torch.rand(2, 64, 8, 8)
        >>> AttentionTransferLoss()([student], [teacher]).shape
        torch.Size([])
    """

    def __init__(self, p: float = 2) -> None:
        super().__init__()
        checks.positive_number("AttentionTransferLoss: p", p)
        self.p = p

    def forward(self, student_maps: Tensor | Sequence[Tensor], teacher_maps: Tensor | Sequence[Tensor]) -> Tensor:
        """Returns the loss of the student's and the teacher's feature maps [B, C, H, W], one a stage; 0-dim.

        Raises:
            ValueError, TypeError: as functional.attention_transfer_loss; or the teacher requires grad and the student does not.
        """
        students = checks.as_list("AttentionTransferLoss: student_maps", student_maps)
        teachers = checks.as_list("AttentionTransferLoss: teacher_maps", teacher_maps)
        for student, teacher in zip(students, teachers):
            check_not_swapped(student, teacher)
        return functional.attention_transfer_loss(students, teachers, p=self.p)

    def extra_repr(self) -> str:
        """Describes the options for print(module)."""
        return f"p={self.p}"


class HintLoss(nn.Module):
    """FitNets' hint (ICLR 2015): the mean squared difference of a regressed student feature map and the teacher's.

    The regressor (convolution, batch norm, ReLU) is RepDistiller's and is trained with the student: give its parameters to the
    optimizer. A student map of twice the teacher's size gets a 3x3 convolution of stride 2, one of half its size a transposed 4x4
    convolution, and any other that is at least as large an unpadded convolution that shrinks it (1x1 for equal sizes).

    Args:
        student_shape, teacher_shape: (C, H, W).
        regressor: False compares the maps as they are; shapes must be equal.

    Raises:
        ValueError: no such regressor fits the sizes, or regressor=False and the shapes differ.

    Example:
        >>> import torch
        >>> from kdfast.losses import HintLoss
        >>> hint = HintLoss(student_shape=(16, 8, 8), teacher_shape=(64, 4, 4))
        >>> loss = hint(torch.rand(2, 16, 8, 8), torch.rand(2, 64, 4, 4))
        >>> print(hint.regressor[0].kernel_size, loss.shape)
        (3, 3) torch.Size([])
    """

    def __init__(self, student_shape: tuple[int, int, int], teacher_shape: tuple[int, int, int], *, regressor: bool = True) -> None:
        super().__init__()
        for shape in (student_shape, teacher_shape):
            if not isinstance(shape, Sequence) or len(shape) != 3 or not all(isinstance(n, int) and n > 0 for n in shape):
                raise ValueError(f"HintLoss: shapes must be (C, H, W), got {student_shape} and {teacher_shape} for student and teacher")
        self.regressor: nn.Module
        self.student_channels = student_shape[0]
        if regressor:
            channels = teacher_shape[0]
            convolution = _resizing_convolution(tuple(student_shape), tuple(teacher_shape))
            self.regressor = nn.Sequential(convolution, nn.BatchNorm2d(channels), nn.ReLU(inplace=True))
        elif tuple(student_shape) != tuple(teacher_shape):
            raise ValueError(
                f"HintLoss: without a regressor teacher_shape must be student_shape {tuple(student_shape)}, got {tuple(teacher_shape)}"
            )
        else:
            self.regressor = nn.Identity()

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Returns the loss of student and teacher features [B, C, H, W], of the constructor's shapes; 0-dim.

        Raises:
            ValueError: the student has other channels, shapes differ after the regressor, or the teacher requires grad and the student
                does not.
        """
        check_not_swapped(student, teacher)
        checks.is_tensor("HintLoss: student", student)
        if student.ndim != 4 or student.shape[1] != self.student_channels:
            raise ValueError(f"HintLoss: student must be [B, {self.student_channels}, H, W], got shape {tuple(student.shape)}")
        return functional.hint_loss(self.regressor(student), teacher)


def _resizing_convolution(student_shape: tuple[int, ...], teacher_shape: tuple[int, ...]) -> nn.Module:
    """Returns a convolution from (C, H, W) to (C', H', W')."""
    (c, h, w), (channels, height, width) = student_shape, teacher_shape
    if (h, w) == (2 * height, 2 * width):
        return nn.Conv2d(c, channels, 3, stride=2, padding=1)
    if (2 * h, 2 * w) == (height, width):
        return nn.ConvTranspose2d(c, channels, 4, stride=2, padding=1)
    if h >= height and w >= width:
        return nn.Conv2d(c, channels, (1 + h - height, 1 + w - width))
    raise ValueError(f"HintLoss: student maps must be half the teacher's size {height}x{width}, or at least as large, got {h}x{w}")


class SelfDistillationLoss(nn.Module):
    """Self-distillation: an early feature map learns from a late one of the same network, beside the cross-entropy.

    alpha * MSE(bilinear(student_intermediate -> teacher's size), conv1x1(teacher_intermediate)) + (1 - alpha) * CE

    The 1x1 convolution maps the teacher's channels to the student's. The original tutorial leaves it at its random initialization;
    to train it, give the module's parameters to the optimizer.

    Args:
        alpha: weight of the feature term, in [0, 1].
        student_channels, teacher_channels: of the two feature maps.
        detach_teacher: keeps the feature term's gradient out of the late layers (the tutorial lets it through).

    Raises:
        ValueError: alpha is outside [0, 1].

    Example:
        >>> import torch
        >>> from kdfast.losses import SelfDistillationLoss
        >>> criterion = SelfDistillationLoss(alpha=0.5, student_channels=8, teacher_channels=16)
        >>> logits, labels = torch.zeros(2, 10), torch.tensor([3, 7])
        >>> criterion(logits, labels, torch.rand(2, 8, 16, 16), torch.rand(2, 16, 4, 4)).shape
        torch.Size([])
    """

    def __init__(
        self, alpha: float = 0.5, student_channels: int = 128, teacher_channels: int = 512, *, detach_teacher: bool = False
    ) -> None:
        super().__init__()
        self.alpha = checks.number_within("SelfDistillationLoss: alpha", alpha, 0, 1)
        checks.are_counts(student_channels=student_channels, teacher_channels=teacher_channels)
        self.detach_teacher = detach_teacher
        self.projection = nn.Conv2d(teacher_channels, student_channels, kernel_size=1)

    def forward(self, student_logits: Tensor, labels: Tensor, student_intermediate: Tensor, teacher_intermediate: Tensor) -> Tensor:
        """Returns the loss of logits [B, K], labels [B], early features [B, C_s, H, W] and late features [B, C_t, H', W']; 0-dim.

        An image labelled -100 adds nothing to either term.

        Raises:
            ValueError: the feature maps' channels are not those given to the constructor.
            TypeError: an argument is no tensor.
        """
        checks.is_tensor("SelfDistillationLoss: student_logits", student_logits)
        checks.is_tensor("SelfDistillationLoss: labels", labels)
        logits, counts = at_least_float32(student_logits), None
        if labels.is_floating_point():  # probabilities of classes, which cross_entropy takes too
            ce = F.cross_entropy(logits, checks.savable(labels))
        else:
            labels = checks.savable(checks.class_labels("SelfDistillationLoss: labels", labels))
            counts = labels != checks.IGNORED
            ce = F.cross_entropy(logits, labels, reduction="sum") / counts.sum().clamp(min=1)
        return self.alpha * self.feature_term(student_intermediate, teacher_intermediate, counts) + (1 - self.alpha) * ce

    def feature_term(self, student_intermediate: Tensor, teacher_intermediate: Tensor, counts: Tensor | None = None) -> Tensor:
        """Returns the first term without its weight, for loops that report each term.

        counts: bool [B], False for images that add nothing; None: all count.

        Raises:
            ValueError: the feature maps' channels are not those given to the constructor.
        """
        for name, features, channels in (
            ("student_intermediate", student_intermediate, self.projection.out_channels),
            ("teacher_intermediate", teacher_intermediate, self.projection.in_channels),
        ):
            checks.is_tensor(f"SelfDistillationLoss: {name}", features)
            if features.ndim != 4 or features.shape[1] != channels:
                raise ValueError(f"SelfDistillationLoss: {name} must be [B, {channels}, H, W], got shape {tuple(features.shape)}")
        rows = None if counts is None else counts.view(-1, 1, 1, 1)
        teacher = checks.savable(teacher_intermediate.detach() if self.detach_teacher else teacher_intermediate)
        teacher = teacher if rows is None else teacher.where(rows, 0)  # the projection's gradient contains 0 times these
        teacher = self.projection(teacher.to(self.projection.weight.dtype))
        student = student_intermediate.to(teacher.dtype)
        student = F.interpolate(student, size=teacher.shape[2:], mode="bilinear", align_corners=False)
        if rows is None:
            return functional.hint_loss(student, teacher)
        mean = functional.hint_loss(student.where(rows, 0), teacher.where(rows, 0))
        return mean * (len(rows) / rows.sum().clamp(min=1))

    def extra_repr(self) -> str:
        """Describes the options for print(module)."""
        return f"alpha={self.alpha}, detach_teacher={self.detach_teacher}"
