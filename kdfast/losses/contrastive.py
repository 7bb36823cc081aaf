"""Supervised contrastive modules, and ConKD."""

import torch.distributed as dist
from torch import Tensor, nn

from kdfast import functional
from kdfast.losses.checks import check_not_swapped
from kdfast.losses.logits import KDLoss
from kdfast.ops import checks
from kdfast.ops.supcon import op as supcon


class SupContrastiveLoss(nn.Module):
    """ConKD-Lion README's class: features are normalized inside, and an anchor counts among its own positives.

    L_i = logsumexp_{j != i} S_ij - mean_{j of i's class, i included} S_ij, S = F F' / temperature for unit rows F; the mean over i.

    Args:
        temperature: positive.
        group: contrasts with the rows of all its ranks, which call it together; see functional.supcon_loss.
    """

    def __init__(self, temperature: float = 0.07, *, group: "dist.ProcessGroup | None" = None) -> None:
        super().__init__()
        supcon.Options(temperature=temperature)
        self.temperature = temperature
        self.group = group

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        """The loss of features [B, D] of any length (embeddings, or logits as the README has it) and labels [B].

        Raises:
            ValueError, TypeError: as functional.supcon_loss.
        """
        return functional.supcon_loss(features, labels, temperature=self.temperature, self_positive=True, normalize=True, group=self.group)

    def extra_repr(self) -> str:
        """What print(module) shows."""
        return f"temperature={self.temperature}"


class SupConLoss(nn.Module):
    """SupContrast's class ("Supervised Contrastive Learning", Khosla et al., NeurIPS 2020), also SimCLR's loss without labels.

    The same signature, inputs and values, and finite where the original divides by an exponential that underflowed: small
    temperatures, features that are not normalized.

    Args:
        temperature: positive.
        contrast_mode: "all": every view is an anchor; "one": only the first view of each sample is.
        base_temperature: positive; the loss is multiplied by temperature / base_temperature.
        group: contrasts with the rows of all its ranks, which call it together; see functional.supcon_loss. Takes no mask.
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
        """The loss of features [B, V, ...], normalized by the caller, and labels [B] or a mask [B, B] or neither.

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
        """What print(module) shows."""
        return f"temperature={self.temperature}, contrast_mode={self.contrast_mode!r}, base_temperature={self.base_temperature}"


class ConKDLoss(nn.Module):
    """ConKD-Lion's student loss: distillation of standardized logits plus alpha times a supervised contrastive term.

    The teacher comes FIRST, as in LogitStandardizationLoss.

    Args:
        alpha: weight of the contrastive term.
        temperature: of the distillation.
        contrast_temperature: of the contrastive term.
        variant: "readme": the contrastive term is SupContrastiveLoss. "notebook": it is SupConLoss of the features given
            twice, as two equal views (computed as the quarter of that problem that it is); the caller normalizes the features,
            and `teacher` and `student` are the embeddings, taken for logits.
        group: contrasts with the rows of all its ranks, which call it together; see functional.supcon_loss. The distillation term
            stays this rank's own, as averaging gradients over ranks wants it.
    """

    def __init__(
        self,
        alpha: float = 0.15,
        temperature: float = 2.0,
        contrast_temperature: float = 0.07,
        *,
        variant: str = "readme",
        group: "dist.ProcessGroup | None" = None,
    ) -> None:
        super().__init__()
        if variant not in ("readme", "notebook"):
            raise ValueError(f"ConKDLoss: variant must be 'readme' or 'notebook', got {variant!r}")
        KDLoss(temperature)
        supcon.Options(temperature=contrast_temperature)
        self.alpha = alpha
        self.temperature = temperature
        self.contrast_temperature = contrast_temperature
        self.variant = variant
        self.group = group

    def forward(self, teacher: Tensor, student: Tensor, features: Tensor, labels: Tensor) -> Tensor:
        """The loss of teacher and student logits [B, C], the student's features [B, D] and labels [B].

        Raises:
            ValueError, TypeError: as functional.kd_loss and functional.supcon_loss; also if features are not [B, D], or the
                teacher requires grad and the student does not.
        """
        check_not_swapped(student, teacher)
        if features.ndim != 2:
            raise ValueError(f"ConKDLoss: features must be [B, D], got shape {tuple(features.shape)}")
        readme = self.variant == "readme"
        distillation = functional.kd_loss(student, teacher, temperature=self.temperature, standardize=True)
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
        """What print(module) shows."""
        return (
            f"alpha={self.alpha}, temperature={self.temperature}, contrast_temperature={self.contrast_temperature}, "
            f"variant={self.variant!r}"
        )
