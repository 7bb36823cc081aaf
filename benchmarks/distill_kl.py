"""Logit distillation, forward and backward, against the originals in eager PyTorch: python -m kdfast.benchmarks.distill_kl.

kd is the loss as RepDistiller writes it, lskd as the authors of logit standardization do; +ce adds F.cross_entropy, which
both train with. `error` is that of the student's gradient against float64, max|ours - exact| / max|exact|.
"""

import argparse
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from kdfast.benchmarks.timing import interleaved, write_json
from torch import Tensor

from kdfast import reference
from kdfast.functional import kd_loss

SHAPES = [(8, 10), (1024, 10), (64, 100), (128, 100), (256, 1000), (1024, 1000), (64, 32000)]
LARGE = [(64, 131072)]
VARIANTS = {
    "kd": {"temperature": 4.0},
    "lskd": {"temperature": 2.0, "standardize": True},
    "kd+ce": {"temperature": 4.0, "kd_weight": 0.9, "ce_weight": 0.1},
    "lskd+ce": {"temperature": 2.0, "standardize": True, "kd_weight": 9.0, "ce_weight": 0.1},
}


def _standardized(x: Tensor) -> Tensor:
    return (x - x.mean(dim=-1, keepdim=True)) / (1e-7 + x.std(dim=-1, keepdim=True))


def original(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    *,
    temperature: float,
    standardize: bool = False,
    kd_weight: float = 1.0,
    ce_weight: float = 0.0,
) -> Tensor:
    """The originals' own operations."""
    s, t = (_standardized(student), _standardized(teacher)) if standardize else (student, teacher)
    log_q, p = F.log_softmax(s / temperature, dim=1), F.softmax(t / temperature, dim=1)
    loss = F.kl_div(log_q, p, reduction="sum") * temperature**2 / len(student)
    if labels is None:
        return loss
    return ce_weight * F.cross_entropy(student, labels) + kd_weight * loss


def _error(options: dict[str, Any], student: Tensor, teacher: Tensor, labels: Tensor | None) -> float:
    (ours,) = torch.autograd.grad(kd_loss(student, teacher, labels, **options), student)
    exact_student = student.detach().double().requires_grad_()
    (exact,) = torch.autograd.grad(reference.kd_loss(exact_student, teacher.double(), labels, **options), exact_student)
    return ((ours - exact).abs().max() / exact.abs().max()).item()


def measure(N: int, C: int, *, pairs: int = 20) -> Iterator[dict[str, Any]]:
    """One entry a variant at N rows and C classes, float32."""
    student, teacher, labels = torch.randn(N, C, requires_grad=True), torch.randn(N, C), torch.randint(C, (N,))

    def step(loss: Callable[[], Tensor]) -> Callable[[], None]:
        def run() -> None:
            student.grad = None
            loss().backward()

        return run

    for name, options in VARIANTS.items():
        y = labels if "ce_weight" in options else None
        times = interleaved(
            step(lambda: kd_loss(student, teacher, y, **options)),  # noqa: B023
            step(lambda: original(student, teacher, y, **options)),  # noqa: B023
            pairs=pairs,
        )
        yield {"variant": name, "N": N, "C": C, "dtype": "float32", **times, "error": _error(options, student, teacher, y)}


def main() -> None:
    """Prints a line a case and writes benchmarks/results/cpu-distill_kl.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--large", action="store_true", help="131,072 classes as well")
    parser.add_argument("--pairs", type=int, default=20)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    cases = []
    for N, C in SHAPES + (LARGE if arguments.large else []):
        for case in measure(N, C, pairs=arguments.pairs):
            cases.append(case)
            print(
                f"{N:6d} x {C:<7d}{case['variant']:9s}ours {case['ours_ms']:9.3f} ms   eager {case['theirs_ms']:9.3f} ms   "
                f"{case['speedup']:5.2f}x   error {case['error']:.1e}",
                flush=True,
            )
    print(write_json("cpu-distill_kl", cases))


if __name__ == "__main__":
    main()
