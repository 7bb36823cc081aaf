"""Attention transfer, forward and backward on the CPU, against eager PyTorch: python -m kdfast.benchmarks.attention_map

Floor: the student's features are read twice and their gradient written once, the teacher's are read once. Cases are the stages
of CIFAR networks (ResNet-110 to ResNet-20, resnet32x4 to resnet8x4) and of ImageNet's ResNet-34 to ResNet-18.
"""

from typing import Any

import torch
import torch.nn.functional as F
from kdfast.benchmarks import timing
from torch import Tensor

from kdfast import functional

CASES = [
    ((64, 16, 32, 32), (64, 16, 32, 32)),
    ((64, 64, 32, 32), (64, 64, 32, 32)),
    ((64, 256, 8, 8), (64, 256, 8, 8)),
    ((32, 128, 28, 28), (32, 128, 28, 28)),
    ((64, 64, 8, 8), (64, 256, 8, 8)),
]


def eager(student: Tensor, teacher: Tensor) -> Tensor:
    """The originals' formula for equal sizes, differentiated by autograd."""
    a, b = (F.normalize(f.pow(2).mean(1).flatten(1)) for f in (student, teacher))
    return (a - b).pow(2).mean()


def measure(student_shape: tuple[int, ...], teacher_shape: tuple[int, ...], channels_last: bool, pairs: int) -> dict[str, Any]:
    """Loss and student gradient, in turn."""
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    student = torch.randn(student_shape).to(memory_format=memory_format).requires_grad_()
    teacher = torch.randn(teacher_shape).to(memory_format=memory_format)
    result = timing.interleaved(
        lambda: torch.autograd.grad(functional.attention_transfer_loss(student, teacher), student),
        lambda: torch.autograd.grad(eager(student, teacher), student),
        pairs=pairs,
    )
    return {
        "student": list(student_shape),
        "teacher": list(teacher_shape),
        "channels_last": channels_last,
        "peer": "eager",
        "bytes": 4 * (3 * student.numel() + teacher.numel()),
        **result,
    }


def main(pairs: int = 20) -> None:
    """Measures every case, prints a table and writes results/cpu-attention_map.json."""
    cases = []
    for student_shape, teacher_shape in CASES:
        for channels_last in (False, True):
            cases.append(measure(student_shape, teacher_shape, channels_last, pairs))
            layout = "channels_last" if channels_last else "contiguous"
            print(
                "{student!s:20} {layout:13} ours {ours_ms:7.2f} ms  eager {theirs_ms:7.2f} ms  speed-up {speedup:.2f}".format(
                    layout=layout, **cases[-1]
                ),
                flush=True,
            )
    print(timing.write_json("cpu-attention_map", cases))


if __name__ == "__main__":
    main()
