"""A check that all loss modules share."""

from collections.abc import Sequence

from torch import Tensor

from kdfast.ops import checks


def check_not_swapped(student: Tensor, teacher: Tensor | Sequence[Tensor]) -> None:
    """Raises if the teacher requires grad and the student does not: the caller has swapped them."""
    checks.is_tensor("student", student)
    teachers = checks.as_list("teacher", teacher)
    if student.requires_grad:
        return
    if any(t.requires_grad for t in teachers):
        raise ValueError("the teacher requires grad and the student does not: student and teacher are swapped")
