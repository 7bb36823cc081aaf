"""Logit distillation without the logits, forward and backward: python -m kdfast.benchmarks.linear_kd [--device cuda].

    ours      linear_kd_loss, in chunks of its own choice
    unfused   kd_loss of two F.linear
    eager     the loss as RepDistiller writes it, of two F.linear

The student's hidden states and weight get gradients, the teacher's do not; both have D features. A step is 8 N C D operations: two
products for logits, two for gradients. `peak_mb` is what a step holds at most beyond its inputs, gradients included: at least
`gradients_mb`. `errors` are of the gradients of hidden states and weight against float64, max|x - exact| / max|exact|, on 64 rows in
chunks of 16.
"""

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kdfast import reference
from kdfast.benchmarks.timing import in_turn, peak_memory, speedup
from kdfast.functional import kd_loss, linear_kd_loss
from kdfast.ops.distill_kl.linear import Layer, default_rows

# N, D, C, dtype
CASES = {
    "cpu": [
        (512, 256, 1000, torch.float32),
        (2048, 512, 1000, torch.float32),
        (2048, 512, 1000, torch.bfloat16),
        (512, 256, 32000, torch.float32),
        (1024, 1024, 32000, torch.float32),
        (1024, 1024, 32000, torch.bfloat16),
        (512, 256, 131072, torch.float32),
    ],
    "cuda": [
        (2048, 512, 1000, torch.bfloat16),
        (4096, 1024, 32000, torch.float32),
        (4096, 1024, 32000, torch.bfloat16),
        (8192, 4096, 32000, torch.bfloat16),
        (8192, 4096, 131072, torch.bfloat16),
    ],
}
TEMPERATURE = 4.0


def unfused(student_hidden: Tensor, student_weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor) -> Tensor:
    """The fused row operator on whole logits."""
    return kd_loss(F.linear(student_hidden, student_weight), F.linear(teacher_hidden, teacher_weight), temperature=TEMPERATURE)


def eager(student_hidden: Tensor, student_weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor) -> Tensor:
    """The original's own operations."""
    log_q = F.log_softmax(F.linear(student_hidden, student_weight) / TEMPERATURE, dim=1)
    p = F.softmax(F.linear(teacher_hidden, teacher_weight) / TEMPERATURE, dim=1)
    return F.kl_div(log_q, p, reduction="sum") * TEMPERATURE**2 / len(student_hidden)


def ours(*tensors: Tensor, chunk_rows: int | None = None) -> Tensor:
    """The library's."""
    return linear_kd_loss(*tensors, temperature=TEMPERATURE, chunk_rows=chunk_rows)


def _step(loss: Callable[..., Tensor], tensors: list[Tensor]) -> Callable[[], None]:
    """Forward and backward, into fresh gradients."""

    def run() -> None:
        for x in tensors:
            x.grad = None
        loss(*tensors).backward()

    return run


def _errors(loss: Callable[..., Tensor], tensors: list[Tensor]) -> list[float]:
    """Of the gradients of the student's hidden states and weight."""
    leaves = [x.detach().requires_grad_(x.requires_grad) for x in tensors]
    exact_leaves = [x.detach().double().requires_grad_(x.requires_grad) for x in tensors]
    got = torch.autograd.grad(loss(*leaves), leaves[:2])
    exact = torch.autograd.grad(reference.linear_kd_loss(*exact_leaves, temperature=TEMPERATURE), exact_leaves[:2])
    return [((a - b).abs().max() / b.abs().max()).item() for a, b in zip(got, exact)]


def measure(N: int, D: int, C: int, dtype: torch.dtype, *, rounds: int = 20, device: str = "cpu") -> dict[str, Any]:
    """Times, peak memory and errors of all variants on N rows of D features and C classes."""
    where = torch.device(device)
    tensors = [
        x.to(dtype).requires_grad_(student)
        for student in (True, False)
        for x in (torch.randn(N, D, device=where), torch.randn(C, D, device=where) * 2 / D**0.5)
    ]
    losses = {"ours": ours, "unfused": unfused, "eager": eager}
    steps = {name: _step(loss, tensors) for name, loss in losses.items()}
    seconds = in_turn(steps, rounds=rounds, device=where)
    for x in tensors:
        x.grad = None
    student, teacher = Layer(*tensors[:2], None), Layer(*tensors[2:], None)
    few = [tensors[0][:64], tensors[1], tensors[2][:64], tensors[3]]
    in_chunks = {**losses, "ours": lambda *x: ours(*x, chunk_rows=16)}
    return {
        "N": N,
        "D": D,
        "C": C,
        "dtype": str(dtype).removeprefix("torch."),
        "chunk_rows": min(N, default_rows(student, teacher, (True, True) + 4 * (False,), None)),
        "operations": 8 * N * C * D,
        "gradients_mb": (tensors[0].nbytes + tensors[1].nbytes) / 1e6,
        "milliseconds": {name: 1e3 * statistics.median(values) for name, values in seconds.items()},
        "speedup_over_unfused": speedup(seconds["ours"], seconds["unfused"]),
        "speedup_over_eager": speedup(seconds["ours"], seconds["eager"]),
        "peak_mb": {name: peak_memory(_step(loss, tensors), where) / 1e6 for name, loss in losses.items()},
        "errors": {name: _errors(loss, few) for name, loss in in_chunks.items()},
    }


def main() -> None:
    """Prints a line a case and writes benchmarks/results/<device>-linear_kd.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--device", choices=CASES, default="cpu")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    cases = []
    for N, D, C, dtype in CASES[arguments.device]:
        case = measure(N, D, C, dtype, rounds=arguments.rounds, device=arguments.device)
        cases.append(case)
        variants = "   ".join(
            f"{name} {case['milliseconds'][name]:9.2f} ms {case['peak_mb'][name]:8.1f} MB {max(case['errors'][name]):.1e}"
            for name in case["milliseconds"]
        )
        print(f"{N:6d} x {D:<5d}x {C:<7d}{case['dtype']:9s}{variants}   {case['speedup_over_eager']:.2f}x eager", flush=True)
    from kdfast.benchmarks.maintain import write_results

    print(write_results(f"{arguments.device}-linear_kd", cases))


if __name__ == "__main__":
    main()
