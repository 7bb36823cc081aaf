"""Ranges of options: a field's type says which values it takes, and every dataclass of options checks itself."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, get_args, get_type_hints


@dataclass(frozen=True)
class Range:
    """The values that a field takes.

    Attributes:
        rule: for the message, after the field's name: "must be positive".
        holds: value -> True if it is in the range; NaN is in none.
    """

    rule: str
    holds: Callable[[Any], bool]


NOT_NEGATIVE = Range("must not be negative", lambda value: value >= 0)
Positive = Annotated[float, Range("must be positive", lambda value: value > 0)]
NotNegative = Annotated[float, NOT_NEGATIVE]
Count = Annotated[int, NOT_NEGATIVE]
AtLeastOne = Annotated[int, Range("must be at least 1", lambda value: value >= 1)]
UpToOne = Annotated[float, Range("must be from 0 to 1", lambda value: 0 <= value <= 1)]


class Checked:
    """Base of dataclasses whose fields have ranges; None passes.

    Raises:
        ValueError: a value is out of range; the message names the field, the range and the value.
    """

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(type(self), include_extras=True).items():
            value, allowed = getattr(self, name), _find_range(hint)
            if allowed is not None and value is not None and not allowed.holds(value):
                raise ValueError(f"{name} {allowed.rule}, got {value}")


def _find_range(hint: Any) -> Range | None:
    """The range in a type, wherever it is: in Annotated, in a union."""
    if isinstance(hint, Range):
        return hint
    return next((found for part in get_args(hint) if (found := _find_range(part))), None)
