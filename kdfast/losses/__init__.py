"""Loss modules: drop-in replacements for the papers' own classes, with their signatures, defaults and values.

State-free unless the method has state (SelfDistillationLoss has a 1x1 convolution, HintLoss a regressor, CRDLoss embeddings and banks).
"""

from kdfast.losses.contrastive import ConKDLoss, SupConLoss, SupContrastiveLoss
from kdfast.losses.crd import CRDLoss
from kdfast.losses.features import AttentionTransferLoss, HintLoss, SelfDistillationLoss
from kdfast.losses.logits import KDLoss, LogitStandardizationLoss
from kdfast.losses.tofd import TOFDLoss

__all__ = [
    "AttentionTransferLoss",
    "CRDLoss",
    "ConKDLoss",
    "HintLoss",
    "KDLoss",
    "LogitStandardizationLoss",
    "SelfDistillationLoss",
    "SupConLoss",
    "SupContrastiveLoss",
    "TOFDLoss",
]
