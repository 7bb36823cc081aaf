"""Text and numbers as readers see them. A number that is None, NaN or infinite is a dash."""

import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

# control characters, marks that turn the direction of writing, and bytes of a name that is no UTF-8
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: object) -> str:
    """Returns the text with every character that would act on a terminal, or that no file can hold, as an escape such as \\x1b."""
    return _UNPRINTABLE.sub(lambda found: repr(found[0])[1:-1].replace("\\udc", "\\x"), str(text))


def is_known(value: Any) -> bool:
    """Returns whether `value` is a finite number."""
    return isinstance(value, int | float) and math.isfinite(value)


def count(number: int, noun: str) -> str:
    """1 -> "1 epoch", 2000 -> "2,000 epochs"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def number(value: Any, decimals: int = 0) -> str:
    """1234.5 -> "1,234"."""
    return f"{value:,.{decimals}f}" if is_known(value) else "–"


def percent(fraction: Any, decimals: int = 2) -> str:
    """0.9735 -> "97.35": percent without the sign."""
    return f"{100 * fraction:.{decimals}f}" if is_known(fraction) else "–"


def share(fraction: float) -> str:
    """0.05 -> "5%", 0.002 -> "0.2%": as many digits as the number needs."""
    return f"{100 * fraction:.4g}%"


def signed(fraction: Any, decimals: int = 2) -> str:
    """0.021 -> "+2.10", -0.021 -> "−2.10", 0 -> "0.00": percentage points."""
    if not is_known(fraction):
        return "–"
    return f"{100 * fraction:+.{decimals}f}".replace("-", "−") if round(100 * fraction, decimals) else f"{0:.{decimals}f}"


def duration(seconds: Any) -> str:
    """1.2 -> "1.2 s", 754 -> "12 min 34 s", 7260 -> "2 h 1 min"."""
    if not is_known(seconds):
        return "–"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min"


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[str]], *, left: Sequence[int] = (0,)) -> str:
    """Returns a Markdown table; columns at the places `left` are aligned to the left, the others to the right."""
    line = "".join("---|" if place in left else "---:|" for place in range(len(columns)))
    return "\n".join([f"| {' | '.join(columns)} |", f"|{line}", *(f"| {' | '.join(row)} |" for row in rows)])
