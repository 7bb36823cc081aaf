"""The options of kd_loss as one value that checks itself."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from kdfast.ops import checks

Divergence = Literal["forward", "reverse", "js"]
Reduction = Literal["mean", "sum", "none"]
DIVERGENCES = get_args(Divergence)
REDUCTIONS = get_args(Reduction)
NUMBERS = ("temperature", "eps", "kd_weight", "ce_weight", "label_smoothing")


@dataclass(frozen=True, kw_only=True)
class KDOptions:
    """The options of kd_loss, by its argument names; numbers become Python numbers, which a graph, a kernel and a cache can keep.

    Raises:
        TypeError: a number is none, or is a tensor that requires grad.
        ValueError: an option is out of range, whatever the tensors.
    """

    temperature: float
    standardize: bool
    eps: float
    kd_weight: float
    ce_weight: float
    teacher_weights: Sequence[float] | None = None  # None: ones
    label_smoothing: float
    ignore_index: int
    divergence: Divergence
    reduction: Reduction
    operator: str = "kd_loss"  # the function that errors name

    def __post_init__(self) -> None:
        name = self.operator
        for field in NUMBERS:
            value = getattr(self, field)
            if type(value) is not float:
                object.__setattr__(self, field, checks.number(f"{name}: {field}", value))
        if self.teacher_weights is not None:
            # NumPy's arrays are no Sequence
            if not isinstance(self.teacher_weights, Sequence) and getattr(self.teacher_weights, "ndim", 0) != 1:
                raise TypeError(f"{name}: teacher_weights must be a sequence of numbers, got {self.teacher_weights!r}")
            weights = tuple([checks.number(f"{name}: teacher_weights", weight) for weight in self.teacher_weights])
            object.__setattr__(self, "teacher_weights", weights)
        for field in ("kd_weight", "ce_weight"):
            checks.number_within(f"{name}: {field}", getattr(self, field))
        for weight in self.teacher_weights or ():
            checks.number_within(f"{name}: teacher_weights", weight)
        if type(self.ignore_index) is not int:
            checks.are_counts(None, **{f"{name}: ignore_index": self.ignore_index})
        checks.is_one_of(f"{name}: standardize", self.standardize, (True, False))
        checks.positive_number(f"{name}: temperature", self.temperature)
        if not 0 <= self.eps < math.inf:
            raise ValueError(f"{name}: eps must not be negative or infinite, got {self.eps}")
        if not 0 <= self.label_smoothing <= 1:
            raise ValueError(f"{name}: label_smoothing must be in [0, 1], got {self.label_smoothing}")
        if self.divergence not in DIVERGENCES:
            raise ValueError(f"{name}: divergence must be one of {', '.join(DIVERGENCES)}, got {self.divergence!r}")
        if self.reduction not in REDUCTIONS:
            raise ValueError(f"{name}: reduction must be one of {', '.join(REDUCTIONS)}, got {self.reduction!r}")

    def weights(self, teachers: int) -> Sequence[float]:
        """One weight for each of the teachers."""
        return (1.0,) * teachers if self.teacher_weights is None else self.teacher_weights

    def encode(self) -> tuple[list[float], int, str]:
        """The options in types that torch.library's operators accept; torch.compile can trace it for numbers that change, too."""
        numbers = [float(getattr(self, field)) for field in NUMBERS]
        choices = f"{self.divergence} {self.reduction}{' standardize' if self.standardize else ''}"
        return [*numbers, *(self.teacher_weights or ())], self.ignore_index, choices

    @classmethod
    def decode(cls, numbers: Sequence[float], ignore_index: int, choices: str) -> "KDOptions":
        """The options that `encode` wrote."""
        divergence, reduction, *standardize = choices.split()
        fields: dict[str, Any] = dict(zip(NUMBERS, numbers)) | {"divergence": divergence, "reduction": reduction}
        weights = tuple(numbers[len(NUMBERS) :]) or None
        return cls(**fields, teacher_weights=weights, ignore_index=ignore_index, standardize=bool(standardize))
