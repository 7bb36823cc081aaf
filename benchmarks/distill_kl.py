"""Logit distillation, forward and backward, for the harness.

kd is the loss as RepDistiller writes it, lskd as the authors of logit standardization do; +ce adds F.cross_entropy, which both train
with; js is the Jensen-Shannon divergence in kd's place. Liger's losses start from probabilities: its path is two softmaxes and its kernel.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kdfast import reference
from kdfast.benchmarks.harness import TIERS, Case, Variant, loss_step, loss_variants
from kdfast.benchmarks.timing import CPU
from kdfast.functional import kd_loss

LOSSES: dict[str, dict[str, Any]] = {
    "kd": {"temperature": 4.0},
    "lskd": {"temperature": 2.0, "standardize": True},
    "kd+ce": {"temperature": 4.0, "kd_weight": 0.9, "ce_weight": 0.1},
    "lskd+ce": {"temperature": 2.0, "standardize": True, "kd_weight": 9.0, "ce_weight": 0.1},
    "js": {"temperature": 4.0, "divergence": "js"},
}
SHAPES = {
    "cpu": {
        "quick": [(64, 100), (256, 1000)],
        "usual": [(8, 10), (1024, 10), (128, 100), (1024, 1000), (64, 32000)],
        "long": [(64, 131072)],
    },
    "cuda": {
        "quick": [(128, 100), (1024, 1000), (2048, 32000)],
        "usual": [(128, 10), (256, 1000), (8192, 4096), (8192, 8192), (1024, 131072)],
        "long": [(1024, 10), (8192, 1000), (8192, 32000), (4096, 131072)],
    },
}
# what the other losses add is measured where there is more time
TIER_OF_OTHERS = {"cpu": "usual", "cuda": "long"}


def cases(device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    """Every loss at every shape."""
    for tier, shapes in SHAPES[device.type].items():
        for N, C in shapes:
            for loss in LOSSES:
                at_least = "quick" if loss in ("kd", "lskd") else TIER_OF_OTHERS[device.type]
                yield case(loss, N, C, dtype, device, max(tier, at_least, key=TIERS.index))


def case(loss: str, N: int, C: int, dtype: torch.dtype = torch.float32, device: torch.device = CPU, tier: Any = "usual") -> Case:
    """One of LOSSES at N rows and C classes, and its gradient in the student."""
    options = LOSSES[loss]
    with_labels = "ce_weight" in options

    def inputs(seed: int) -> tuple[Tensor, Tensor, Tensor | None]:
        random = torch.Generator(device).manual_seed(seed)
        student, teacher = (3 * torch.randn(N, C, generator=random, device=device).to(dtype) for _ in range(2))
        labels = torch.randint(C, (N,), generator=random, device=device) if with_labels else None
        return student.requires_grad_(), teacher, labels

    def exact(student: Tensor, teacher: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor]:
        student = student.detach().double().requires_grad_()
        value = reference.kd_loss(student, teacher.double(), labels, **options)
        return value.detach(), torch.autograd.grad(value, student)[0]

    peers = {"liger-kernel": Variant(lambda: loss_step(_liger(**options)), gpu=True)} if loss in ("kd", "js") else {}
    return Case(
        operator=f"kd_loss ({loss})",
        name=f"{N} x {C}",
        shape={"N": N, "C": C},
        dtype=dtype,
        device=device,
        bytes=3 * N * C * dtype.itemsize,  # student and teacher are read, the gradient is written
        # two softmaxes 10, p (log p - log q) 3, gradient 2; moments and their gradient 13; a third softmax 6; log cosh 9
        operations=N * C * (15 + 13 * ("standardize" in options) + 6 * with_labels + 9 * (loss == "js")),
        inputs=inputs,
        exact=exact,
        variants=loss_variants(lambda *x: original(*x, **options), lambda *x: kd_loss(*x, **options), peers),
        tier=tier,
    )


def original(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    *,
    temperature: float,
    standardize: bool = False,
    kd_weight: float = 1.0,
    ce_weight: float = 0.0,
    divergence: str = "forward",
) -> Tensor:
    """The originals' own operations."""
    s, t = (_standardized(student), _standardized(teacher)) if standardize else (student, teacher)
    log_q = F.log_softmax(s / temperature, dim=1)
    if divergence == "js":
        log_p = F.log_softmax(t / temperature, dim=1)
        log_m = torch.log((log_q.exp() + log_p.exp()) / 2)
        divergences = F.kl_div(log_m, log_p, reduction="sum", log_target=True) + F.kl_div(log_m, log_q, reduction="sum", log_target=True)
        loss = divergences / 2 * temperature**2 / len(student)
    else:
        loss = F.kl_div(log_q, F.softmax(t / temperature, dim=1), reduction="sum") * temperature**2 / len(student)
    if labels is None:
        return loss
    return ce_weight * F.cross_entropy(student, labels) + kd_weight * loss


def _standardized(x: Tensor) -> Tensor:
    return (x - x.mean(dim=-1, keepdim=True)) / (1e-7 + x.std(dim=-1, keepdim=True))


def _liger(temperature: float, divergence: str = "forward") -> Callable[..., Tensor]:
    from liger_kernel.transformers import LigerJSD, LigerKLDIVLoss

    kl, js = LigerKLDIVLoss(reduction="batchmean"), LigerJSD()

    def loss(student: Tensor, teacher: Tensor, labels: None) -> Tensor:
        log_q = F.log_softmax(student / temperature, dim=1)
        if divergence == "js":
            return js(log_q, F.log_softmax(teacher / temperature, dim=1)) * temperature**2
        return kl(log_q, F.softmax(teacher / temperature, dim=1)) * temperature**2

    return loss
