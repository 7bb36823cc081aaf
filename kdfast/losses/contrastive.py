"""Modules for supervised contrastive losses, and ConKD."""

from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from kdfast import functional
from kdfast.losses.checks import check_not_swapped
from kdfast.losses.logits import KDLoss
from kdfast.ops import checks
from kdfast.ops.supcon import op as supcon

__all__ = ["ConKDLoss", "SupConLoss", "SupContrastiveLoss"]


class SupContrastiveLoss(nn.Module):
    """The class of ConKD-Lion's README: it normalizes the features, and an anchor counts among its own positives.

    L_i = logsumexp_{j != i} S_ij - mean_{j of i's class, i included} S_ij, S = F F' / temperature for unit rows F; the mean over i.

    Args:
        temperature: positive.
        group: contrasts with the rows of all its ranks, which call it together; see functional.supcon_loss.

    Example:
        >>> import torch
        >>> from kdfast.losses import SupContrastiveLoss
        >>> loss = SupContrastiveLoss(temperature=1.0)(torch.eye(4), torch.tensor([0, 0, 1, 1]))
        >>> print(f"{loss:.4f}")  # log 3 - 1/2: the mean over the anchor itself (1) and the other row of its class (0)
        0.5986
    """

    def __init__(self, temperature: float = 0.07, *, group: "dist.ProcessGroup | None" = None) -> None:
        super().__init__()
        supcon.Options(temperature=temperature)
        self.temperature = temperature
        self.group = group

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        """Returns the loss of features [B, D] of any length (embeddings, or logits as in the README) and labels [B].

        Raises:
            ValueError, TypeError: as functional.supcon_loss.
        """
        return functional.supcon_loss(features, labels, temperature=self.temperature, self_positive=True, normalize=True, group=self.group)

    def extra_repr(self) -> str:
        """Describes the options for print(module)."""
        return f"temperature={self.temperature}"


class SupConLoss(nn.Module):
    """SupContrast's class ("Supervised Contrastive Learning", Khosla et al., NeurIPS 2020); without labels SimCLR's loss.

    Signature, inputs and values are the original's. For small temperatures and features that are not normalized the original
    underflows; this class stays finite.

    Args:
        temperature: positive.
        contrast_mode: "all": every view is an anchor; "one": only the first view of each sample is.
        base_temperature: positive; the loss is multiplied by temperature / base_temperature.
        group: contrasts with the rows of all its ranks, which call it together; see functional.supcon_loss. Takes no mask.

    Example:
        >>> import torch
        >>> from kdfast.losses import SupConLoss
        >>> views = torch.eye(4).view(2, 2, 4)  # two views of two samples
        >>> loss = SupConLoss(temperature=1.0, base_temperature=1.0)(views, torch.tensor([0, 1]))
        >>> print(f"{loss:.4f}")  # log 3
        1.0986
    """

    def __init__(
        self,
        temperature: float = 0.07,
        contrast_mode: supcon.ContrastMode = "all",
        base_temperature: float = 0.07,
        *,
        group: "dist.ProcessGroup | None" = None,
    ) -> None:
        super().__init__()
        supcon.Options(temperature, base_temperature, contrast_mode)
        self.temperature = temperature
        self.contrast_mode = contrast_mode
        self.base_temperature = base_temperature
        self.group = group

    def forward(self, features: Tensor, labels: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Returns the loss of features [B, V, ...], normalized by the caller, and labels [B], a mask [B, B] or neither.

        Raises:
            ValueError, TypeError: as functional.supcon_loss; also if features have fewer than three dimensions.
        """
        checks.is_tensor("SupConLoss: features", features)
        if features.ndim < 3:
            raise ValueError(f"SupConLoss: features must be [B, V, ...] with a dimension of views, got shape {tuple(features.shape)}")
        return functional.supcon_loss(
            features,
            labels,
            mask=mask,
            temperature=self.temperature,
            base_temperature=self.base_temperature,
            contrast_mode=self.contrast_mode,
            group=self.group,
        )

    def extra_repr(self) -> str:
        """Describes the options for print(module)."""
        return f"temperature={self.temperature}, contrast_mode={self.contrast_mode!r}, base_temperature={self.base_temperature}"


class ConKDLoss(nn.Module):
    """ConKD-Lion's student loss: distillation of standardized logits plus alpha times a supervised contrastive term.

    The teacher comes FIRST, as in LogitStandardizationLoss.

    Args:
        alpha: weight of the contrastive term.
        temperature: of the distillation.
        contrast_temperature: of the contrastive term.
        variant: "readme": the contrastive term is SupContrastiveLoss. "notebook": it is SupConLoss of the features as two equal
            views; the caller normalizes the features, and `teacher` and `student` are embeddings in the place of logits.
        group: contrasts with the rows of all its ranks, which call it together; see functional.supcon_loss. The distillation term
            remains this rank's own, because gradients are averaged over ranks.

    Example:
        >>> import torch
        >>> from kdfast.losses import ConKDLoss
        >>> logits = torch.tensor([[2.0, 0.0], [0.0, 2.0]])  # equal logits leave the contrastive term: 0.15 * log 1
        >>> loss = ConKDLoss(contrast_temperature=1.0)(logits, logits, torch.eye(2), torch.tensor([0, 0]))
        >>> print(f"{loss:.4f}")  # minus 0.15 / 2: each row counts itself, with a similarity of 1, among its two positives
        -0.0750
    """

    def __init__(
        self,
        alpha: float = 0.15,
        temperature: float = 2.0,
        contrast_temperature: float = 0.07,
        *,
        variant: Literal["readme", "notebook"] = "readme",
        group: "dist.ProcessGroup | None" = None,
    ) -> None:
        super().__init__()
        checks.is_one_of("ConKDLoss: variant", variant, ("readme", "notebook"))
        KDLoss(temperature)
        supcon.Options(temperature=contrast_temperature)
        self.alpha = checks.number_within("ConKDLoss: alpha", alpha, 0)
        self.temperature = temperature
        self.contrast_temperature = contrast_temperature
        self.variant = variant
        self.group = group

    def forward(self, teacher: Tensor, student: Tensor, features: Tensor, labels: Tensor) -> Tensor:
        """Returns the loss of teacher and student logits [B, C], the student's features [B, D] and labels [B].

        A sample labelled -100 adds nothing to the distillation term and is no anchor of the contrastive one.

        Raises:
            ValueError, TypeError: as functional.kd_loss and functional.supcon_loss; also if features are not [B, D], or the
                teacher requires grad and the student does not.
        """
        check_not_swapped(student, teacher)
        checks.is_tensor("ConKDLoss: features", features)
        checks.is_tensor("ConKDLoss: labels", labels)
        if features.ndim != 2:
            raise ValueError(f"ConKDLoss: features must be [B, D], got shape {tuple(features.shape)}")
        readme = self.variant == "readme"
        # labels are not the logits' classes, which may be an embedding's features: they only say which rows count
        rows = torch.where(labels.double() == checks.IGNORED, checks.IGNORED, 0).reshape(-1)
        distillation = functional.kd_loss(student, teacher, rows, temperature=self.temperature, standardize=True)
        contrastive = functional.supcon_loss(
            features,
            labels,
            temperature=self.contrast_temperature,
            self_positive=readme,
            normalize=readme,
            duplicates=1 if readme else 2,
            group=self.group,
        )
        return distillation + self.alpha * contrastive

    def extra_repr(self) -> str:
        """Describes the options for print(module)."""
        return (
            f"alpha={self.alpha}, temperature={self.temperature}, contrast_temperature={self.contrast_temperature}, "
            f"variant={self.variant!r}"
        )
