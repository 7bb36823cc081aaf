"""Loss modules for logits: Hinton's distillation and logit standardization."""

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from torch import Tensor, nn

from kdfast import functional
from kdfast.losses.checks import check_not_swapped
from kdfast.ops.distill_kl.options import Divergence, KDOptions, Reduction

__all__ = ["KDLoss", "LogitStandardizationLoss"]

_OPTIONS = tuple(field.name for field in fields(KDOptions) if field.name not in ("eps", "operator"))


class KDLoss(nn.Module):
    """Cross-entropy plus distillation: ce_weight * CE(student, labels) + kd_weight * T^2 * KL(p_teacher || p_student).

    `standardize` standardizes every row of logits first (LSKD, CVPR 2024). Divided by their standard deviation, the student's logits
    are no longer pulled towards the teacher's scale, and the distillation gradient is small: with KD's usual kd_weight of 0.9,
    accuracy drops below plain KD. The paper uses kd_weight=9, temperature=2 and ce_weight=0.1 on CIFAR-100, ce_weight=1 on ImageNet.

    Args:
        temperature: T > 0.
        standardize: see above.
        kd_weight, ce_weight: weights of the two terms.
        label_smoothing, ignore_index, divergence, teacher_weights, reduction: as in functional.kd_loss.

    Raises:
        ValueError, TypeError: an option is out of range, or is no number.

    Example:
        >>> import torch
        >>> from kdfast.losses import KDLoss
        >>> criterion = KDLoss(temperature=4.0, kd_weight=0.9, ce_weight=0.1)
        >>> student, teacher = torch.zeros(2, 10, requires_grad=True), torch.zeros(2, 10)
        >>> loss = criterion(student, teacher, torch.tensor([3, 7]))  # equal logits leave the cross-entropy: 0.1 * log 10
        >>> print(f"{loss:.4f}")
        0.2303
    """

    def __init__(
        self,
        temperature: float = 4.0,
        standardize: bool = False,
        kd_weight: float = 0.9,
        ce_weight: float = 0.1,
        *,
        label_smoothing: float = 0.0,
        ignore_index: int = -100,
        divergence: Divergence = "forward",
        teacher_weights: Sequence[float] | None = None,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__()
        self.temperature = temperature
        self.standardize = standardize
        self.kd_weight = kd_weight
        self.ce_weight = ce_weight
        self.label_smoothing = label_smoothing
        self.ignore_index = ignore_index
        self.divergence = divergence
        self.teacher_weights = teacher_weights
        self.reduction = reduction
        KDOptions(eps=0.0, **self._options())  # raises what is wrong now, not at the first step

    def _options(self) -> dict[str, Any]:
        """The options of kd_loss, from attributes, which may have been changed since."""
        return {name: getattr(self, name) for name in _OPTIONS}

    def forward(self, student: Tensor, teacher: Tensor | Sequence[Tensor], labels: Tensor | None = None) -> Tensor:
        """The loss of student logits [..., C], teacher logits (one tensor, K in a sequence, or [K, ..., C]) and labels [...].

        Raises:
            ValueError, TypeError: as functional.kd_loss; also if the teacher requires grad and the student does not.
        """
        check_not_swapped(student, teacher)
        return functional.kd_loss(student, teacher, labels, **self._options())

    def extra_repr(self) -> str:
        """What print(module) shows."""
        return f"temperature={self.temperature}, standardize={self.standardize}, kd_weight={self.kd_weight}, ce_weight={self.ce_weight}"


class LogitStandardizationLoss(nn.Module):
    """ConKD-Lion's class, its order of arguments: the teacher comes FIRST.

    T^2 * KL(p_teacher || p_student), the mean over rows, both rows of logits standardized (unbiased standard deviation plus 1e-7).

    Example:
        >>> import torch
        >>> from kdfast.losses import LogitStandardizationLoss
        >>> teacher, student = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[10.0, 20.0, 30.0]])
        >>> loss = LogitStandardizationLoss()(teacher, student, temperature=2)  # the same logits at another scale
        >>> print(f"{abs(loss):.4f}")
        0.0000
    """

    def forward(self, logits_teacher_in: Tensor, logits_student_in: Tensor, temperature: float = 2) -> Tensor:
        """The loss of teacher logits [N, C] and student logits [N, C]; gradients flow to both where they are required.

        Raises:
            ValueError, TypeError: as functional.kd_loss; also if the teacher requires grad and the student does not.
        """
        check_not_swapped(logits_student_in, logits_teacher_in)
        return functional.kd_loss(logits_student_in, logits_teacher_in, temperature=temperature, standardize=True)
