"""What a run's results say: rows, the paired difference, the verdict."""

import math
from pathlib import Path
from typing import Any

import pytest

from kdfast.runs.comparison import cells
from kdfast.runs.summary import describe_chance, outcome, paired_difference, summary_rows, verdict
from tests.report.making import make_run


def test_paired_difference_is_students_interval() -> None:
    # differences 1, 2, 3, 4, 5: mean 3, s = sqrt(2.5), t of 4 degrees of freedom at 0.975 is 2.776445 (any table)
    found = paired_difference([0, 0, 0, 0, 0], [1, 2, 3, 4, 5])
    reach = 2.776445 * math.sqrt(2.5) / math.sqrt(5)
    assert (found["n"], found["mean"], found["differences"]) == (5, 3, [1, 2, 3, 4, 5])
    assert found["low"] == pytest.approx(3 - reach, abs=1e-5)
    assert found["high"] == pytest.approx(3 + reach, abs=1e-5)


def test_paired_difference_of_two_seeds() -> None:
    confidence, quantile = 0.95, 12.706205
    found = paired_difference([0.5, 0.5], [0.6, 0.8])
    assert found["high"] - found["mean"] == pytest.approx(quantile * 0.1, rel=1e-5)  # s = 0.2 / sqrt(2), n = 2
    assert found["confidence"] == confidence


@pytest.mark.parametrize(("alone", "distilled"), [([1.0], [1.0]), ([1, 2], [1, 2, 3])])
def test_paired_difference_refuses(alone: list[float], distilled: list[float]) -> None:
    with pytest.raises(ValueError, match="must"):
        paired_difference(alone, distilled)


def test_summary_rows(tmp_path: Path) -> None:
    results: Any = make_run(tmp_path / "run", curves=False)
    for run, top1 in zip(results["arms"]["alone"], (0.90, 0.92, 0.94, 0.96, 0.98)):
        run["best/top1"] = top1
    teacher, alone, distilled = summary_rows(results)
    assert [row.name for row in (teacher, alone, distilled)] == ["teacher", "student alone", "student distilled"]
    assert (teacher.top1, teacher.top1_std, teacher.parameters) == (0.9735, None, 44_549_160)
    assert alone.top1 == pytest.approx(0.94)
    assert alone.top1_std == pytest.approx(math.sqrt(0.001))  # sample: 4 in the denominator
    assert (distilled.seeds, distilled.model, distilled.images_per_s) == (5, "resnet18", 4321.0)
    results |= {"teacher": None, "arms": {"alone": [], "distilled": results["arms"]["distilled"][:1]}}
    assert [(row.name, row.top1_std) for row in summary_rows(results)] == [("student distilled", None)]


RAISED = "Distillation raised test accuracy: +2.06 points (95 % interval +1.30 to +2.82, 2 seeds)."
LOWERED = "Distillation lowered test accuracy: −2.06 points (95 % interval −2.82 to −1.30, 2 seeds)."
UNDECIDED = "no difference that 2 seeds can show: +0.50 points (95 % interval −18.56 to +19.56)"
ONE_SEED = "+2.00 points against the 90.0 % without; without two pairs of seeds there is no spread"


@pytest.mark.parametrize(
    ("alone", "distilled", "said", "kind"),
    [
        pytest.param([0.90, 0.91], [0.92, 0.9312], RAISED, "raised", id="raised"),
        pytest.param([0.92, 0.9312], [0.90, 0.91], LOWERED, "lowered", id="lowered"),
        pytest.param([0.90, 0.91], [0.92, 0.90], UNDECIDED, "undecided", id="undecided"),
        pytest.param([0.9], [0.92], ONE_SEED, "unknown", id="one seed"),
        pytest.param([], [0.92], "without a student trained alone", "unknown", id="no baseline"),
        pytest.param([], [], "No student was distilled", "unknown", id="teacher only"),
    ],
)
def test_the_verdict_claims_no_more_than_the_seeds_show(alone: list[float], distilled: list[float], said: str, kind: str) -> None:
    arms = {"alone": [{"best/top1": x} for x in alone], "distilled": [{"best/top1": x} for x in distilled]}
    results: Any = {"arms": arms, "paired": paired_difference(alone, distilled) if len(alone) > 1 else None}
    assert said in verdict(results)
    assert outcome(results) == kind


@pytest.mark.parametrize(
    ("alone", "distilled"),
    [
        pytest.param([0.5, 0.6], [0.5 + 1 / 30, 0.6 + 1 / 30], id="equal differences of few test images"),
        pytest.param([0.9, 0.9, 0.9], [0.9, 0.9, 0.9], id="no difference at all"),
        pytest.param([0.3, 0.9], [0.6, 0.8], id="an interval wider than all accuracies"),
    ],
)
def test_too_little_data_gets_no_verdict(alone: list[float], distilled: list[float]) -> None:
    arms = {"alone": [{"best/top1": x} for x in alone], "distilled": [{"best/top1": x} for x in distilled]}
    paired = paired_difference(alone, distilled)
    results: Any = {"arms": arms, "paired": paired, "test_images": 30}
    assert f"{len(alone)} seeds and 30 test images are too little for a verdict" in verdict(results)
    assert outcome(results) == "undecided"
    assert "(too little data)" in cells({"recipe": "kd", "best": distilled, "last": [], "paired": paired})[3]


BINARY = ("cat", "dog")


@pytest.mark.parametrize(
    ("confusion", "classes", "said"),
    [
        pytest.param([[73, 27], [27, 73]], BINARY, None, id="73 % of two classes is no chance"),
        pytest.param([[110, 90], [80, 120]], BINARY, None, id="57 % of 400 images"),
        pytest.param([[11, 9], [8, 12]], BINARY, "no better than chance (57.5 % with 2 classes)", id="57 % of 40 images"),
        pytest.param([[90, 0], [10, 0]], BINARY, "every image is taken for cat", id="a constant answer in a lopsided set"),
        pytest.param([[0, 10], [0, 90]], BINARY, "every image is taken for dog", id="the other constant"),
        pytest.param([[144, 36], [4, 16]], BINARY, None, id="below the largest class's share, yet not blind"),
        pytest.param([[0, 50], [50, 0]], BINARY, "no better than chance (0.0 % with 2 classes)", id="all wrong"),
        pytest.param([[3, 0], [0, 0]], BINARY, None, id="all right"),
        pytest.param([[2, 18] * 5] * 10, tuple("abcdefghij"), "no better than chance (10.0 % with 10 classes)", id="ten classes"),
        pytest.param(
            [[18 if i == j else 9 for j in range(10)] for i in range(10)], tuple("abcdefghij"), None, id="twice ten classes' chance"
        ),
    ],
)
def test_chance_is_named(confusion: list[list[int]], classes: tuple[str, ...], said: str | None) -> None:
    found = describe_chance(confusion, classes)
    assert found is None if said is None else said in (found or "")
