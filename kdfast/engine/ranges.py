"""Checks of options: every dataclass of options names the ranges of its fields in one call."""

from collections.abc import Sequence


def check_ranges(
    options: object,
    *,
    positive: Sequence[str] = (),
    not_negative: Sequence[str] = (),
    at_least_one: Sequence[str] = (),
    up_to_one: Sequence[str] = (),
) -> None:
    """Checks fields of a dataclass; None passes, NaN does not.

    Args:
        options: the dataclass.
        positive: names of fields above 0.
        not_negative: names of fields from 0.
        at_least_one: names of fields from 1.
        up_to_one: names of fields from 0 to 1.

    Raises:
        ValueError: a value is out of range; the message names the field, the range and the value.
    """
    for names, rule, holds in (
        (positive, "must be positive", lambda value: value > 0),
        (not_negative, "must not be negative", lambda value: value >= 0),
        (at_least_one, "must be at least 1", lambda value: value >= 1),
        (up_to_one, "must be from 0 to 1", lambda value: 0 <= value <= 1),
    ):
        for name in names:
            value = getattr(options, name)
            if value is not None and not holds(value):
                raise ValueError(f"{name} {rule}, got {value}")
