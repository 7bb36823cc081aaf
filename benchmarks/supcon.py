"""Supervised contrastive loss, forward and backward.

Two views of N / 2 samples, 10 classes, unit rows, tau = 0.07. A training step counts 6 N^2 D operations in the N x N form (2 forward,
4 backward); rates are of those, whatever a variant really computes.
"""

import importlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from kdfast import reference
from kdfast.benchmarks.harness import Call, Case, Launch, Variant, in_float64, loss_call, loss_step, loss_variants, short_names
from kdfast.benchmarks.timing import CPU
from kdfast.functional import supcon_loss
from kdfast.losses import SupConLoss
from kdfast.ops.supcon.op import Setting

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

    def exact(features: Tensor, labels: Tensor) -> Tensor:
        if N <= LARGEST_MATRIX:
            return reference.supcon_loss(features, labels, temperature=TEMPERATURE)
        return supcon_loss(features, labels, temperature=TEMPERATURE)  # float64 runs in PyTorch, in tiles; tests hold it to the reference

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
        exact=in_float64(exact),
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
    distances, losses = (importlib.import_module(f"pytorch_metric_learning.{name}") for name in ("distances", "losses"))
    peer = losses.SupConLoss(TEMPERATURE, distance=distances.DotProductSimilarity(normalize_embeddings=False))

    def loss(features: Tensor, labels: Tensor) -> Tensor:
        return peer(torch.cat(features.unbind(1)), labels.repeat(features.shape[1]))

    return loss


# ---- small calls -----------------------------------------------------------------------------------------------------


def calls(device: torch.device, dtype: torch.dtype) -> Iterator[Call]:
    """Rows that are held and rows that are walked, labels and a mask, contrast rows that are no anchors."""
    for D in (10, 128, 300):
        yield _call(65, D, dtype, device)
        if dtype != torch.float16:  # the gradient of a few rows among many is too small for it
            yield _call(67, D, dtype, device, others=5, normalize=True, duplicates=2)
        if dtype == torch.float32:
            yield _call(65, D, dtype, device, others=3, masked=True, self_positive=True)
    if device.type == "cuda":  # the interpreter would take a minute
        yield _call(4099, 128, dtype, device)
        yield _call(4099, 128, dtype, device, temperature=0.05)


def _call(N: int, D: int, dtype: torch.dtype, device: torch.device, *, others: int = 0, masked: bool = False, **options: Any) -> Call:
    def inputs(seed: int) -> list[Any]:
        random = torch.Generator(device).manual_seed(seed)
        features, contrast = (
            F.normalize(torch.randn(rows, D, generator=random, device=device), dim=1).to(dtype).requires_grad_() for rows in (N, others)
        )
        labels = torch.randint(3, (N,), generator=random, device=device)
        mask = torch.rand(N, N, generator=random, device=device) if masked else None
        return [features, contrast if others else None, None if masked else labels, mask]

    def ours(features: Tensor, contrast: Tensor | None, labels: Tensor | None, mask: Tensor | None) -> Tensor:
        return supcon_loss(features, labels, mask=mask, contrast=contrast, **options)

    def exact(features: Tensor, contrast: Tensor | None, labels: Tensor | None, mask: Tensor | None) -> Tensor:
        return reference.supcon_loss(features, labels, mask=mask, contrast=contrast, **options)

    words = [f"N {N}, D {D}", *([f"{others} other rows"] if others else []), *(["mask"] if masked else [])]
    return loss_call(", ".join([*words, *(f"{name} {value}" for name, value in options.items())]), inputs, ours, exact)


# ---- launches whose machine code is read -----------------------------------------------------------------------------


def launches(target: str) -> Iterator[Launch]:
    """Every plan of both walks on the target, and the kernels beside them."""
    fp32, bf16, fp16 = torch.float32, torch.bfloat16, torch.float16
    for N in (1024, 8192):
        for D in (64, 128, 256, 512, 2048):
            for request in ("labels", "normalize, 2 views", "mask, queue"):
                yield from step_launches(target, N, D, request, bf16)
        for D in (64, 128, 256, 512):
            for request in ("labels, tf32", "mask, queue, tf32"):
                yield from step_launches(target, N, D, request, fp32)
    for D in (64, 128, 512):
        yield from step_launches(target, 8192, D, "labels", fp32)
    yield from step_launches(target, 8192, 128, "labels", fp16)
    for D, dtype in ((10, fp32), (128, bf16), (2048, bf16)):
        yield from step_launches(target, 8192, D, "normalize, 2 views", dtype, ("_prepare", "_finish"))
    yield from step_launches(target, 8192, 128, "labels", bf16, ("_first_of_name", "_losses", "_shares"))


def step_launches(
    target: str, N: int, D: int, request: str, dtype: torch.dtype, functions: Sequence[str] = ("_denominators", "_gradients")
) -> Iterator[Launch]:
    """Launches of one training step of the loss: the two walks, or those of the functions. The words of the request are its options."""
    from kdfast.benchmarks.binaries import SHARED_LIMIT
    from kdfast.kernels import supcon as kernel

    words = request.split(", ")
    masked, highest, queue = "mask" in words, "tf32" not in words, 64 if "queue" in words else 0  # rows that are no anchors
    setting = Setting(0.07, 1.0, 2 if "2 views" in words else 1, False, "normalize" in words)
    device = kernel.H100 if target == "sm_90" else kernel.Device(SHARED_LIMIT[target], tensor_memory=target == "sm_100")

    def call() -> None:
        anchors, others = torch.zeros(N, D, dtype=dtype), torch.zeros(queue, D, dtype=dtype)
        names, mask = torch.zeros(N, dtype=torch.int64), torch.zeros(4, 4) if masked else None
        with mock.patch.multiple(kernel, _kind=lambda *_: device, _is_highest=lambda: highest):
            saved = kernel.forward(anchors, others, names, mask, setting)[1]
            kernel.backward(torch.ones(N), anchors, others, names, mask, saved, setting, queue > 0)

    precision = "ieee" if dtype == torch.float32 and highest else "tf32"
    slice = kernel.plans(N, -(-D // 8) * 8, dtype, precision, masked, device).slice
    forward, backward = kernel.operations(N, D, slice)
    counted = {"_denominators": (forward, forward), "_gradients": (backward, 4 * N**2 * D)}
    for function in functions:
        moved, floor = counted.get(function, (1, 1))
        yield Launch("supcon", N, D, short_names(dtype), f"{request}, N {N}", call, moved, floor, function)
