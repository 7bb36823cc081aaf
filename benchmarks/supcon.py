"""Supervised contrastive loss on the CPU, forward and backward: SupContrast's formula in eager PyTorch, the same compiled, and ours.

    python -m kdfast.benchmarks.supcon [--large]      writes results/cpu-supcon.json

Two views of N / 2 samples, 10 classes, unit rows, float32, tau = 0.07. A training step counts 6 N^2 D operations in the N x N form;
the rates printed are of those, whatever a variant really computes.
"""

import argparse
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from kdfast.benchmarks import timing
from torch import Tensor

from kdfast.losses import SupConLoss

SIZES = (64, 256, 1024, 4096)
LARGE = (8192,)
WIDTHS = (128, 512)
TEMPERATURE = 0.07


def eager(features: Tensor, labels: Tensor) -> Tensor:
    """The loss as SupContrast states it: N x N matrices, the maximum over the diagonal too; features [B, V, D], labels [B]."""
    B, V = features.shape[:2]
    same = (labels[:, None] == labels).float().repeat(V, V)
    others = 1 - torch.eye(B * V)
    rows = torch.cat(features.unbind(1))
    S = rows @ rows.T / TEMPERATURE
    S = S - S.max(dim=1, keepdim=True).values.detach()
    log_probability = S - ((S.exp() * others).sum(1, keepdim=True)).log()
    positive = same * others
    count = positive.sum(1)
    count = torch.where(count < 1e-6, 1, count)
    return -((positive * log_probability).sum(1) / count).view(V, B).mean()


def step(loss: Callable[[Tensor, Tensor], Tensor], features: Tensor, labels: Tensor) -> Callable[[], Tensor]:
    """One forward and backward; returns the features' gradient."""

    def run() -> Tensor:
        return torch.autograd.grad(loss(features, labels), features)[0]

    return run


def batch(N: int, D: int) -> tuple[Tensor, Tensor]:
    """Features [N / 2, 2, D] of unit length that require grad, labels [N / 2]."""
    generator = torch.Generator().manual_seed(N + D)
    features = F.normalize(torch.randn(N // 2, 2, D, generator=generator), dim=2)
    return features.requires_grad_(), torch.randint(0, 10, (N // 2,), generator=generator)


def case(N: int, D: int, pairs: int) -> dict[str, Any]:
    """Times of all variants at one size, and their gradients' largest differences from eager's in float64."""
    features, labels = batch(N, D)
    ours = step(SupConLoss(TEMPERATURE), features, labels)
    original = step(eager, features, labels)
    torch._dynamo.reset()
    compiled = step(torch.compile(eager), features, labels)
    exact = original() if N > 4096 else step(eager, features.detach().double().requires_grad_(), labels)()
    against_eager = timing.interleaved(ours, original, pairs=pairs)
    against_compiled = timing.interleaved(ours, compiled, pairs=pairs)
    return {
        "N": N,
        "D": D,
        "operations": 6 * N * N * D,
        "ours_ms": against_eager["ours_ms"],
        "eager_ms": against_eager["theirs_ms"],
        "compiled_ms": against_compiled["theirs_ms"],
        "speedup_over_eager": against_eager["speedup"],
        "speedup_over_compiled": against_compiled["speedup"],
        "ours_error": ((ours() - exact).abs().max() / exact.abs().max()).item(),
        "eager_error": ((original() - exact).abs().max() / exact.abs().max()).item(),
    }


def main() -> None:
    """Times every size and writes the table."""
    parser = argparse.ArgumentParser(description="supervised contrastive loss on the CPU: eager, compiled, ours")
    parser.add_argument("--large", action="store_true", help="N = 8192 too")
    sizes = SIZES + (LARGE if parser.parse_args().large else ())
    cases = []
    for D in WIDTHS:
        for N in sizes:
            cases.append(case(N, D, pairs=20 if N <= 1024 else 5))
            row = cases[-1]
            times = "  ".join(f"{name} {row[name + '_ms']:9.3f} ms" for name in ("eager", "compiled", "ours"))
            rate = row["operations"] / row["ours_ms"] / 1e6
            print(
                f"N {N:6} D {D:4}  {times}  {row['speedup_over_eager']:5.2f}x {row['speedup_over_compiled']:5.2f}x  {rate:6.0f} GFLOP/s",
                flush=True,
            )
    print(timing.write_json("cpu-supcon", cases))


if __name__ == "__main__":
    main()
