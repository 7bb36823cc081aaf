import math

import pytest

from kdfast import text


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (text.count(1, "epoch"), "1 epoch"),
        (text.count(2000, "epoch"), "2,000 epochs"),
        (text.number(1234.5), "1,234"),
        (text.number(0.08713, 4), "0.0871"),
        (text.percent(0.97352), "97.35"),
        (text.percent(None) + text.percent(math.nan) + text.duration(math.inf), "–––"),
        (text.share(0.002), "0.2%"),
        (text.signed(0.021), "+2.10"),
        (text.signed(-0.021), "−2.10"),
        (text.signed(-1e-6), "0.00"),
        (text.duration(1.23), "1.2 s"),
        (text.duration(59.96), "1 min 0 s"),
        (text.duration(754), "12 min 34 s"),
        (text.duration(7260), "2 h 1 min"),
    ],
)
def test_numbers_as_readers_see_them(shown: str, expected: str):
    assert shown == expected
