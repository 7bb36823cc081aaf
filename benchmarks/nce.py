"""Contrastive representation distillation, forward and backward, for the harness, against its original, which gathers the [B, 1 + K, D]
rows of both banks: CRD's numbers on CIFAR (50,000 images, and the 10,000 of one of its files), fewer negatives, and ImageNet's images.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kdfast import reference
from kdfast.benchmarks.harness import Case, loss_variants
from kdfast.benchmarks.timing import CPU
from kdfast.functional import crd_loss

TEMPERATURE = 0.07
EPS = 1e-7
FEATURES = 128
AT_ONCE = 8  # anchors whose rows are gathered in float64
BATCHES = {  # B, K, n
    "quick": [(16, 1024, 10_000)],
    "usual": [(64, 16384, 10_000), (64, 16384, 50_000), (64, 4096, 50_000)],
    "long": [(64, 16384, 1_281_167)],
}


def cases(device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    """Every batch and bank."""
    for tier, batches in BATCHES.items():
        for B, K, n in batches:
            yield case(B, K, n, dtype, device, tier)


def case(B: int, K: int, n: int, dtype: torch.dtype = torch.float32, device: torch.device = CPU, tier: Any = "usual") -> Case:
    """Unit embeddings of B samples, two float32 banks of n unit rows, K negatives for each sample, constants that are set."""

    def inputs(seed: int) -> tuple[Tensor, ...]:
        random = torch.Generator(device).manual_seed(seed)

        def rows(count: int) -> Tensor:
            return F.normalize(torch.randn(count, FEATURES, generator=random, device=device), dim=1)

        student, teacher = (rows(B).to(dtype).requires_grad_() for _ in range(2))
        indices = torch.randint(n, (B, 1 + K), generator=random, device=device)
        Z = torch.full((), n * 1.5, device=device)
        return student, teacher, rows(n), rows(n), indices, Z, Z.clone()

    def exact(*inputs: Tensor) -> tuple[Tensor, ...]:
        student, teacher, student_bank, teacher_bank, indices, *constants = inputs
        total, gradients = torch.zeros((), dtype=torch.float64, device=device), []
        for v, bank, Z in ((student, teacher_bank, constants[0]), (teacher, student_bank, constants[1])):
            gradient, bank = [], bank.double()
            for anchors, index in zip(v.detach().double().split(AT_ONCE), indices.split(AT_ONCE)):
                anchors.requires_grad_()
                value = reference.crd_loss(anchors, bank, index, Z=Z.double(), temperature=TEMPERATURE) * (len(index) / B)
                total += value.detach()
                gradient.append(torch.autograd.grad(value, anchors)[0])
            gradients.append(torch.cat(gradient))
        return total, *gradients

    read = min(B * (1 + K), n) * FEATURES * 4 + B * (1 + K) * 8  # each row that is asked for, and every index
    return Case(
        operator="crd_loss",
        name=f"B {B}, K {K:,}, {n:,} rows of {FEATURES}",
        shape={"B": B, "K": K, "n": n},
        dtype=dtype,
        device=device,
        bytes=2 * read,
        operations=2 * B * (1 + K) * 4 * FEATURES,  # both directions: the products, and the weighted sum of rows
        inputs=inputs,
        exact=exact,
        variants=loss_variants(gathered, ours),
        tier=tier,
    )


def ours(student: Tensor, teacher: Tensor, student_bank: Tensor, teacher_bank: Tensor, indices: Tensor, *Zs: Tensor) -> Tensor:
    """kdfast.functional.crd_loss."""
    return crd_loss(student, teacher, student_bank, teacher_bank, indices, *Zs, temperature=TEMPERATURE)


def gathered(student: Tensor, teacher: Tensor, student_bank: Tensor, teacher_bank: Tensor, indices: Tensor, *Zs: Tensor) -> Tensor:
    """CRD's formula as published: rows are gathered, multiplied by bmm, and the terms are logarithms of quotients."""
    B, columns = indices.shape
    total = torch.zeros((), device=student.device)
    for v, bank, Z in ((student, teacher_bank, Zs[0]), (teacher, student_bank, Zs[1])):
        rows = bank.index_select(0, indices.view(-1)).view(B, columns, -1)
        scores = torch.bmm(rows, v.float()[:, :, None]).squeeze(2).div(TEMPERATURE).exp() / Z
        noise = (columns - 1) / len(bank)
        positive, negative = scores[:, 0], scores[:, 1:]
        total = total - ((positive / (positive + noise + EPS)).log().sum() + (noise / (negative + noise + EPS)).log().sum()) / B
    return total
