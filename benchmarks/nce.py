"""Contrastive representation distillation, forward and backward, against its original, which gathers the [B, 1 + K, D] rows of both banks.

Sizes: CRD's on CIFAR (50,000 images, and the 10,000 of one of its files), fewer negatives, and ImageNet's images.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kdfast import reference
from kdfast.benchmarks.harness import Call, Case, Launch, in_float64, loss_call, loss_variants, short_names
from kdfast.benchmarks.timing import CPU
from kdfast.functional import crd_loss

TEMPERATURE = 0.07
EPS = 1e-7
FEATURES = 128
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
    read = min(B * (1 + K), n) * FEATURES * 4 + B * (1 + K) * 8  # each row that is asked for, and every index
    return Case(
        operator="crd_loss",
        name=f"B {B}, K {K:,}, {n:,} rows of {FEATURES}",
        shape={"B": B, "K": K, "n": n},
        dtype=dtype,
        device=device,
        bytes=2 * read,
        operations=2 * B * (1 + K) * 4 * FEATURES,  # both directions: the products, and the weighted sum of rows
        inputs=lambda seed: _inputs(B, n, K, FEATURES, dtype, torch.float32, device, seed) + _constants(n, device),
        exact=in_float64(exact),
        variants=loss_variants(gathered, ours),
        tier=tier,
    )


def _inputs(B: int, n: int, K: int, D: int, dtype: torch.dtype, bank_dtype: torch.dtype, device: torch.device, seed: int) -> list[Tensor]:
    random = torch.Generator(device).manual_seed(seed)
    rows = [F.normalize(torch.randn(N, D, generator=random, device=device), dim=1) for N in (B, B, n, n)]
    student, teacher = (x.to(dtype).requires_grad_() for x in rows[:2])
    return [student, teacher, *(x.to(bank_dtype) for x in rows[2:]), torch.randint(n, (B, 1 + K), generator=random, device=device)]


def _constants(n: int, device: torch.device) -> list[Tensor]:
    return [torch.full((), n * 1.5, device=device) for _ in range(2)]


def ours(*inputs: Tensor) -> Tensor:
    """Our loss; constants that are not given are estimated."""
    return crd_loss(*inputs, temperature=TEMPERATURE)


def exact(student: Tensor, teacher: Tensor, student_bank: Tensor, teacher_bank: Tensor, indices: Tensor, *Zs: Tensor) -> Tensor:
    """The sum of both directions."""
    pairs = ((student, teacher_bank), (teacher, student_bank))
    Z = Zs[0] if Zs else None
    return torch.stack([reference.crd_loss(v, bank, indices, Z=Z, temperature=TEMPERATURE) for v, bank in pairs]).sum()


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


# ---- small calls -----------------------------------------------------------------------------------------------------


def calls(device: torch.device, dtype: torch.dtype) -> Iterator[Call]:
    """Rows of every width, many parts and few columns, no negatives, a bank of another dtype, constants known and estimated."""

    def call(B: int, K: int, D: int, n: int = 37, bank_dtype: torch.dtype = dtype, estimate: bool = False) -> Call:
        Zs = [] if estimate else _constants(n, device)
        name = f"B {B}, K {K}, {n} rows of {D}, {short_names(bank_dtype)} banks{', constants estimated' * estimate}"
        inputs = partial(_inputs, B, n, K, D, dtype, bank_dtype, device)
        return loss_call(name, inputs, lambda *x: ours(*x, *Zs), lambda *x: exact(*x, *Zs))

    for D in (3, 16, 100, 101, 128, 300, 2050) if dtype == torch.float32 else (16, 101, 2050):
        yield call(3, 70, D)
    yield call(3, 0, 16)
    yield call(3, 130, 128, bank_dtype=torch.bfloat16)
    yield call(3, 130, 128, estimate=True)
    if device.type == "cuda":  # the interpreter would take a minute
        yield call(64, 16384, 128, n=5000)
        yield call(3000, 5, 128)  # more losses than a block adds up at a time


def hostile_calls(device: torch.device) -> None:
    """Indices of no row of the bank; a CPU refuses them."""
    if device.type == "cuda":
        anchors, bank = torch.randn(3, 128, device=device, requires_grad=True), torch.randn(37, 128, device=device)
        indices = torch.full((3, 71), 37, device=device)
        indices[:, ::2] = -1
        torch.autograd.grad(crd_loss(anchors, anchors, bank, bank, indices, temperature=20.0), anchors)


# ---- launches whose machine code is read -----------------------------------------------------------------------------

SHAPE = 64, 16384, 50_000  # B, K and the bank's rows, as CRD trains on CIFAR


def launches(target: str) -> Iterator[Launch]:
    """Every plan, every pair of dtypes, with and without a gradient, and the kernels beside the walk."""
    fp32, bf16, fp16 = torch.float32, torch.bfloat16, torch.float16
    for D in (4, 16, 32, 64, 100, 101, 128, 256, 512, 1024, 2048, 4096, 8192):
        yield launch(D, fp32, fp32, "_losses")
        yield launch(D, bf16, bf16, "_losses")
    for function in ("_losses", "_losses, no gradient", "_exponentials"):
        for dtypes in ((fp32, fp32), (bf16, fp32), (fp32, bf16), (fp16, fp32), (fp16, bf16)):
            yield launch(128, *dtypes, function)
    for D in (100, 101, 128, 8192):
        yield launch(D, fp32, fp32, "_finish")
    yield launch(128, fp32, fp32, "_settle")


def launch(D: int, anchors_dtype: torch.dtype, bank_dtype: torch.dtype, function: str) -> Launch:
    """One launch of the loss or of its normalizer."""
    from kdfast.kernels import nce as kernel

    name, with_gradient = function.split(",")[0], "no gradient" not in function
    B, K, n = SHAPE

    def call() -> None:
        anchors = torch.zeros(B, D, dtype=anchors_dtype)
        bank = torch.empty(n, D, dtype=bank_dtype)  # never touched: nothing is run
        indices = torch.zeros(B, 1 + K, dtype=torch.int64)
        kernel.loss_and_gradient(anchors, bank, indices, torch.ones(()), 0.07, 0.0, 0.0, with_gradient)
        kernel.normalizer(anchors, bank, indices, torch.ones(()), 0.07)

    moved = floor = 1
    if name in ("_losses", "_exponentials"):
        moved = bytes_of_walk(B, K, D, anchors_dtype, bank_dtype, with_gradient and name == "_losses")
        floor = bytes_of_rows(B, K, D, bank_dtype)
    return Launch("nce", B, D, short_names(anchors_dtype, bank_dtype), function, call, moved, floor, name)


def bytes_of_rows(B: int, K: int, D: int, bank_dtype: torch.dtype) -> int:
    """Bytes of every gathered row and its index, once."""
    return B * (1 + K) * (D * bank_dtype.itemsize + 8)


def bytes_of_walk(B: int, K: int, D: int, anchors_dtype: torch.dtype, bank_dtype: torch.dtype, with_gradient: bool) -> int:
    """Bytes that a walk asks for: the gathered rows, and for every part its anchor, Z and its sums."""
    from kdfast.kernels import nce as kernel

    split, _ = kernel.parts(B, 1 + K, kernel.plan(D)[0])
    each = D * anchors_dtype.itemsize + 4 + 4 * (1 + D * with_gradient)
    return bytes_of_rows(B, K, D, bank_dtype) + B * split * each
