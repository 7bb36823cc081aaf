"""Ranges of options: a field's type says which values it takes, and every dataclass of options checks itself."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from numbers import Real
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from kdfast.text import printable


@dataclass(frozen=True)
class Range:
    """The values that a field takes.

    Attributes:
        rule: for the message, after the field's name: "must be positive".
        holds: value -> True if it is in the range; NaN is in none.
        least, most: the smallest and the largest value; others would overflow somewhere, or never end.
    """

    rule: str
    holds: Callable[[Any], bool]
    least: float = -1e9
    most: float = 1e9


NOT_NEGATIVE = Range("must not be negative", lambda value: value >= 0)
Positive = Annotated[float, Range("must be positive", lambda value: value > 0, most=1e38)]
NotNegative = Annotated[float, NOT_NEGATIVE]
# logits / T and T^2 are finite in float32
Temperature = Annotated[float, Range("must be positive", lambda value: value > 0, 1e-4, 1e4)]
Count = Annotated[int, NOT_NEGATIVE]
AtLeastOne = Annotated[int, Range("must be at least 1", lambda value: value >= 1)]
# PyTorch cannot resize to one pixel
Pixels = Annotated[int, Range("must be at least 1", lambda value: value >= 1, 2, 4096)]
Threads = Annotated[int, Range("must be at least 1", lambda value: value >= 1, most=4096)]
Processes = Annotated[int, Range("must not be negative", lambda value: value >= 0, most=4096)]
Seed = Annotated[int, Range("must not be negative", lambda value: value >= 0, most=2**63 - 1)]
UpToOne = Annotated[float, Range("must be from 0 to 1", lambda value: 0 <= value <= 1)]
BelowOne = Annotated[float, Range("must be at least 0 and below 1", lambda value: 0 <= value < 1)]


class Checked:
    """Base of dataclasses whose fields have ranges; None passes where the type has it.

    Raises:
        TypeError: a value is of another type than its field.
        ValueError: a value is out of range, none of the choices, or a text that is empty or no UTF-8. The message names the field, what
            it takes and the value.
    """

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self), include_extras=True)
        for field in fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            if not (isinstance(value, str) and value == field.default):
                _check(field.name, hints[field.name], value)


def _check(name: str, hint: Any, value: Any) -> None:
    kind, parts = get_origin(hint), get_args(hint)
    if kind is Annotated:
        _check(name, parts[0], value)
        for limit in hint.__metadata__:
            if isinstance(limit, Range) and value is not None:
                if not limit.holds(value):
                    raise ValueError(f"{name} {limit.rule}, got {value}")
                if not limit.least <= value <= limit.most:
                    side = f"least {limit.least:.15g}" if value < limit.least else f"most {limit.most:.15g}"
                    raise ValueError(f"{name} must be at {side}, got {value}")
    elif kind in (Union, UnionType):
        kinds = [part for part in parts if part is not type(None)]
        if len(kinds) == 1 and value is not None:
            _check(name, kinds[0], value)
    elif kind is Literal:
        if value not in parts:
            raise ValueError(f"{name} must be one of {', '.join(map(str, parts))}, got {value!r}")
    elif kind is tuple and parts[1:] == (...,):
        if not isinstance(value, tuple):
            raise TypeError(f"{name} must be a tuple, got {value!r}")
        for one in value:
            if not isinstance(one, Path):  # a file to be read has any name
                _check(name, parts[0], one)
    elif hint in (int, float, bool, str):
        wanted = {int: int, float: Real}.get(hint, hint)
        if not isinstance(value, wanted) or (isinstance(value, bool) and hint is not bool):
            raise TypeError(f"{name} must be {'a number' if hint is float else hint.__name__}, got {value!r}")
    if isinstance(value, str | Path) and kind not in (Union, UnionType):
        if not str(value):
            raise ValueError(f"{name} must not be empty")
        if any("\ud800" <= letter <= "\udfff" for letter in str(value)):
            raise ValueError(f"{name} must be UTF-8, got {printable(value)}")
