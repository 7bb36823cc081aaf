"""Task-oriented feature distillation."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kdfast import functional
from kdfast.losses.checks import check_not_swapped
from kdfast.ops import checks
from kdfast.ops.precision import at_least_float32

__all__ = ["TOFDLoss"]


class TOFDLoss(nn.Module):
    """Task-oriented feature distillation (Zhang et al., NeurIPS 2020): the terms of J classifiers and of the maps between their features.

    f are the features [B, D] that a classifier reads, z its logits, W_j is a trained linear map without bias, and |.| the norm of the
    whole matrix (neither squared nor averaged: as in the authors' code, it grows with the batch):

        feature      feature_weight * sum_j |W_j f_sj - f_tj|
        soft         sum_j soft_cross_entropy(z_sj, z_tj, T)
        orthogonal   orthogonal_weight * sum_j |W_j W_j' - I| + |W_j' W_j - I|

    Args:
        student_features, teacher_features: sizes D of the J features.
        feature_weight, orthogonal_weight: the authors' 0.05 and 0.03.

    Raises:
        ValueError: not equally many features.

    Example:
        >>> import torch
        >>> from kdfast.losses import TOFDLoss
        >>> criterion = TOFDLoss(student_features=[16], teacher_features=[32])
        >>> logits = torch.zeros(2, 10)
        >>> terms = criterion([torch.rand(2, 16)], [torch.rand(2, 32)], [logits], [logits])
        >>> print(sorted(terms), f"{terms['soft']:.4f}")  # log 10
        ['feature', 'orthogonal', 'soft'] 2.3026
    """

    def __init__(
        self,
        student_features: Sequence[int],
        teacher_features: Sequence[int],
        *,
        feature_weight: float = 0.05,
        orthogonal_weight: float = 0.03,
    ) -> None:
        super().__init__()
        for name, sizes in (("student_features", student_features), ("teacher_features", teacher_features)):
            if not isinstance(sizes, Sequence) or not sizes:
                raise TypeError(f"TOFDLoss: {name} must be a sequence of integers, got {sizes!r}")
            for size in sizes:
                checks.are_counts(**{name: size})
        if len(student_features) != len(teacher_features):
            raise ValueError(f"TOFDLoss: features must be equally many, got {len(student_features)} and {len(teacher_features)}")
        self.feature_weight = checks.number_within("TOFDLoss: feature_weight", feature_weight, 0)
        self.orthogonal_weight = checks.number_within("TOFDLoss: orthogonal_weight", orthogonal_weight, 0)
        self.maps = nn.ModuleList(nn.Linear(own, theirs, bias=False) for own, theirs in zip(student_features, teacher_features))

    def forward(
        self,
        student_features: Sequence[Tensor],
        teacher_features: Sequence[Tensor],
        student_logits: Sequence[Tensor],
        teacher_logits: Sequence[Tensor],
        *,
        temperature: float = 1.0,
    ) -> dict[str, Tensor]:
        """Returns the three terms by name, 0-dim each; the authors add the J cross-entropies with the labels.

        Raises:
            ValueError: as functional.soft_cross_entropy; also if there are not as many features or logits as maps, or a teacher's tensor
                requires grad and the student's does not.
        """
        if len(student_features) != len(self.maps):
            raise ValueError(f"TOFDLoss: student_features must be {len(self.maps)}, got {len(student_features)}")
        checks.as_list("TOFDLoss: student_features", student_features)
        mapped = [W(f) for W, f in zip(self.maps, student_features)]
        return self.terms(mapped, teacher_features, student_logits, teacher_logits, temperature=temperature)

    def terms(
        self,
        mapped: Sequence[Tensor],
        teacher_features: Sequence[Tensor],
        student_logits: Sequence[Tensor],
        teacher_logits: Sequence[Tensor],
        *,
        temperature: float = 1.0,
    ) -> dict[str, Tensor]:
        """Returns the same for features that `maps` have mapped already."""
        for name, x in (("teacher_features", teacher_features), ("student_logits", student_logits), ("teacher_logits", teacher_logits)):
            checks.as_list(f"TOFDLoss: {name}", x)
        lengths = [len(x) for x in (mapped, teacher_features, student_logits, teacher_logits)]
        if lengths != [len(self.maps)] * 4:
            raise ValueError(f"TOFDLoss: there must be {len(self.maps)} features and logits of student and teacher, got {lengths}")
        for student, teacher in (*zip(mapped, teacher_features), *zip(student_logits, teacher_logits)):
            check_not_swapped(student, teacher)
        gaps = [torch.linalg.vector_norm(at_least_float32(f) - at_least_float32(t)) for f, t in zip(mapped, teacher_features)]
        soft = [functional.soft_cross_entropy(s, t, temperature) for s, t in zip(student_logits, teacher_logits)]
        return {
            "feature": self.feature_weight * torch.stack(gaps).sum(),
            "soft": torch.stack(soft).sum(),
            "orthogonal": self.orthogonal_weight * self.skewness(),
        }

    def skewness(self) -> Tensor:
        """Returns the distance of the maps from orthogonal ones, without the weight: 0-dim."""
        weights = [W.weight for W in self.maps if isinstance(W, nn.Linear)]
        return torch.stack([_skewness(W) + _skewness(W.mT) for W in weights]).sum()

    def extra_repr(self) -> str:
        """Describes the options for print(module)."""
        return f"feature_weight={self.feature_weight}, orthogonal_weight={self.orthogonal_weight}"


def _skewness(W: Tensor) -> Tensor:
    """Returns |W W' - I| (Frobenius), in float32 at least."""
    W = at_least_float32(W)
    with torch.autocast(W.device.type, enabled=False):
        return torch.linalg.matrix_norm(W @ W.mT - torch.eye(len(W), dtype=W.dtype, device=W.device))
