"""Supervised contrastive loss, forward and backward.

Two views of N / 2 samples, 10 classes, unit rows, tau = 0.07. A training step counts 6 N^2 D operations in the N x N form (2 forward,
4 backward); rates are of those, whatever a variant really computes.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import kdfast
from kdfast import reference
from kdfast.benchmarks.harness import Case, Variant, loss_step, loss_variants
from kdfast.benchmarks.timing import CPU
from kdfast.losses import SupConLoss

SIZES = {
    "cpu": {
        "quick": [(256, 128)],
        "usual": [(64, 128), (1024, 128), (64, 512), (256, 512), (1024, 512)],
        "long": [(4096, 128), (8192, 128), (4096, 512), (8192, 512)],
    },
    "cuda": {
        "quick": [(1024, 128), (8192, 128)],
        "usual": [(4096, 128), (8192, 512), (16384, 128)],
        "long": [(32768, 128), (131072, 128)],
    },
}
TEMPERATURE = 0.07
LARGEST_MATRIX = 8192  # beyond this N, an N x N matrix in float64 is too much to check against


def cases(device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    """Every size."""
    for tier, sizes in SIZES[device.type].items():
        for N, D in sizes:
            yield case(N, D, dtype, device, tier)


def case(N: int, D: int, dtype: torch.dtype = torch.float32, device: torch.device = CPU, tier: Any = "usual") -> Case:
    """N rows of D features, and the loss's gradient in them."""

    def inputs(seed: int) -> tuple[Tensor, Tensor]:
        random = torch.Generator(device).manual_seed(seed)
        features = F.normalize(torch.randn(N // 2, 2, D, generator=random, device=device), dim=2).to(dtype)
        return features.requires_grad_(), torch.randint(10, (N // 2,), generator=random, device=device)

    def exact(features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        features = features.detach().double().requires_grad_()
        if N <= LARGEST_MATRIX:
            value = reference.supcon_loss(features, labels, temperature=TEMPERATURE)
        else:
            with kdfast.backend("torch"):  # in tiles; the tests hold it to the reference
                value = kdfast.functional.supcon_loss(features, labels, temperature=TEMPERATURE)
        return value.detach(), torch.autograd.grad(value, features)[0]

    peers = {"pytorch-metric-learning": Variant(lambda: loss_step(_metric_learning()), synchronizes=True)}
    return Case(
        operator="supcon_loss",
        name=f"N {N:,}, D {D}",
        shape={"N": N, "D": D},
        dtype=dtype,
        device=device,
        bytes=2 * N * D * dtype.itemsize,  # the features are read, their gradient is written
        operations=6 * N**2 * D,
        inputs=inputs,
        exact=exact,
        variants=loss_variants(eager, SupConLoss(TEMPERATURE), peers),
        tier=tier,
    )


def eager(features: Tensor, labels: Tensor) -> Tensor:
    """The loss as SupContrast states it: N x N matrices, the maximum over the diagonal too; features [B, V, D], labels [B]."""
    B, V = features.shape[:2]
    same = (labels[:, None] == labels).float().repeat(V, V)
    others = 1 - torch.eye(B * V, device=features.device)
    rows = torch.cat(features.unbind(1))
    S = rows @ rows.T / TEMPERATURE
    S = S - S.max(dim=1, keepdim=True).values.detach()
    log_probability = S - ((S.exp() * others).sum(1, keepdim=True)).log()
    positive = same * others
    count = positive.sum(1)
    count = torch.where(count < 1e-6, 1, count)
    return -((positive * log_probability).sum(1) / count).view(V, B).mean()


def _metric_learning() -> Callable[..., Tensor]:
    from pytorch_metric_learning.distances import DotProductSimilarity
    from pytorch_metric_learning.losses import SupConLoss as Peer

    peer = Peer(TEMPERATURE, distance=DotProductSimilarity(normalize_embeddings=False))

    def loss(features: Tensor, labels: Tensor) -> Tensor:
        return peer(torch.cat(features.unbind(1)), labels.repeat(features.shape[1]))

    return loss
