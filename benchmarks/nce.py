"""Contrastive representation distillation against its original, which gathers [B, 1 + K, D] rows in each direction.

    python -m kdfast.benchmarks.nce [--batch 64] [--negatives 16384] [--features 128] [--images 50000] [--device cuda] [--out FILE]

runs both in turn, forward and backward, checks them against each other and prints milliseconds, speedup and the most memory at once.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from kdfast.benchmarks import operators, timing
from kdfast.benchmarks.timing import CPU
from torch import Tensor

from kdfast import files
from kdfast.functional import crd_loss

TEMPERATURE = 0.07
EPS = 1e-7


class Problem:
    """One step: unit embeddings of B samples, two banks of n rows, K negatives for each sample, constants that are set."""

    def __init__(self, B: int, K: int, D: int, n: int, device: torch.device = CPU):
        random = torch.Generator(device).manual_seed(0)

        def rows(count: int) -> Tensor:
            return F.normalize(torch.randn(count, D, generator=random, device=device), dim=1)

        self.embeddings = rows(B).requires_grad_(), rows(B).requires_grad_()
        self.banks = rows(n), rows(n)
        self.indices = torch.randint(n, (B, 1 + K), generator=random, device=device)
        self.Zs = torch.full((2,), n * 1.5, device=device).unbind()
        self.device = device
        # bytes: both directions read every gathered row and its index once
        self.floor = 2 * B * (1 + K) * (4 * D + 8)

    def step(self, loss: Callable[..., Tensor]) -> Callable[[], list[Tensor]]:
        """A call that gives the value and both gradients."""

        def run() -> list[Tensor]:
            value = loss(*self.embeddings, *self.banks, self.indices, *self.Zs)
            return [value.detach(), *torch.autograd.grad(value, self.embeddings)]

        return run


def ours(student: Tensor, teacher: Tensor, student_bank: Tensor, teacher_bank: Tensor, indices: Tensor, *Zs: Tensor) -> Tensor:
    """kdfast.functional.crd_loss."""
    return crd_loss(student, teacher, student_bank, teacher_bank, indices, *Zs, temperature=TEMPERATURE)


def gathered(student: Tensor, teacher: Tensor, student_bank: Tensor, teacher_bank: Tensor, indices: Tensor, *Zs: Tensor) -> Tensor:
    """CRD's formula as published: rows are gathered, multiplied by bmm, and the terms are logarithms of quotients."""
    B, columns = indices.shape
    total = student.new_zeros(())
    for v, bank, Z in ((student, teacher_bank, Zs[0]), (teacher, student_bank, Zs[1])):
        rows = bank.index_select(0, indices.view(-1)).view(B, columns, -1)
        scores = torch.bmm(rows, v[:, :, None]).squeeze(2).div(TEMPERATURE).exp() / Z
        noise = (columns - 1) / len(bank)
        positive, negative = scores[:, 0], scores[:, 1:]
        total = total - ((positive / (positive + noise + EPS)).log().sum() + (noise / (negative + noise + EPS)).log().sum()) / B
    return total


def measure(problem: Problem, rounds: int) -> dict[str, Any]:
    """Milliseconds, bytes and errors of both.

    Raises:
        AssertionError: they compute different things.
    """
    steps = {"kdfast": problem.step(ours), "gathered": problem.step(gathered)}
    results = {name: step() for name, step in steps.items()}
    difference = max(
        ((a - b).abs().max() / b.abs().max()).item() for a, b in zip(results["kdfast"], results["gathered"], strict=True)
    )  # fmt: skip
    if not difference < 1e-3:
        raise AssertionError(f"kdfast and the gathered form differ by {difference:.1e}")
    seconds = timing.in_turn(steps, rounds=rounds, device=problem.device)
    measured: dict[str, Any] = {"difference": difference, "speedup": round(timing.speedup(seconds["kdfast"], seconds["gathered"]), 3)}
    for name, step in steps.items():
        milliseconds = 1e3 * statistics.median(seconds[name])
        measured[name] = {"call_ms": round(milliseconds, 3), "memory": timing.peak_memory(step, problem.device)}
        if problem.device.type == "cuda":
            device_ms = 1e3 * timing.device_seconds([step])
            measured[name] |= {"device_ms": round(device_ms, 4), "gathered_bytes_per_s": round(problem.floor / device_ms * 1e3)}
    return measured


def main() -> None:
    """Prints what was measured, and writes it where asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--negatives", type=int, default=16384)
    parser.add_argument("--features", type=int, default=128)
    parser.add_argument("--images", type=int, default=50_000)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="a JSON file")
    options = parser.parse_args()
    shape = {"B": options.batch, "K": options.negatives, "D": options.features, "n": options.images}
    measured = {"operator": "crd_loss", "shape": shape, **measure(Problem(*shape.values(), torch.device(options.device)), options.rounds)}
    print(measured)
    if options.out is not None:
        files.write_json(options.out, {"machine": operators.facts(), "date": time.strftime("%Y-%m-%d"), "cases": [measured]})


if __name__ == "__main__":
    main()
