"""A check that all loss modules share."""

from collections.abc import Sequence

from torch import Tensor

from kdfast.ops import checks


def check_not_swapped(student: Tensor, teacher: Tensor | Sequence[Tensor]) -> None:
    """Raises if the teacher requires grad and the student does not: the caller has swapped them."""
    checks.is_tensor("student", student)
    if student.requires_grad:
        return
    teachers = teacher if isinstance(teacher, Sequence) else (teacher,)
    if any(isinstance(t, Tensor) and t.requires_grad for t in teachers):
        raise ValueError("the teacher requires grad and the student does not: student and teacher are swapped")
