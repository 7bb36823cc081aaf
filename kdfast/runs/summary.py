"""A summary of a run's results: one row a network, the paired difference, and a verdict in one sentence.

The student alone and the student distilled share their seeds, hence initial weights and the order of images, so what distillation adds
is the mean of the paired differences d_i = distilled_i - alone_i over n seeds, with Student's t interval

    mean(d) +- t_{n-1, (1 + confidence) / 2} * s_d / sqrt(n),        s_d^2 = sum (d_i - mean(d))^2 / (n - 1).

The interval covers the spread over seeds, not over test images.
"""

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple, cast

from kdfast import text
from kdfast.ops import checks
from kdfast.runs.results import Matrix, Network, Paired, Results, accuracies, kept, students

CONFIDENCE = 0.95  # probability that an interval covers the true mean
CHANCE = 0.01  # more right answers than chance gives this often are better than chance

Outcome = Literal["raised", "lowered", "undecided", "unknown"]


class SummaryRow(NamedTuple):
    """One line of the closing table. Accuracies are fractions of the test images, with the weights that were kept.

    Attributes:
        name: "teacher", "student alone" or "student distilled".
        model: architecture.
        top1: mean over seeds.
        top1_std: sample standard deviation over seeds; None for a single one.
        top5: mean over seeds.
        loss: mean cross-entropy over seeds, nats.
        parameters: of the network.
        images_per_s: inference.
        seeds: number of seeds.
        each: top-1 by seed.
    """

    name: str
    model: str
    top1: float
    top1_std: float | None
    top5: float | None
    loss: float | None
    parameters: int | None
    images_per_s: float | None
    seeds: int
    each: tuple[float, ...]


def summary_rows(results: Results) -> list[SummaryRow]:
    """Returns teacher, student alone and student distilled, as far as the run has them."""
    rows = []
    if teacher := results.get("teacher"):
        rows.append(_row("teacher", teacher, [teacher["top1"]], [teacher.get("top5")], [teacher.get("loss")]))
    for arm in ("alone", "distilled"):
        if top1 := accuracies(results, arm):
            found = cast("list[dict[str, Any]]", students(results, arm))
            top5, loss = ([student.get(f"{kept(results)}/{name}") for student in found] for name in ("top5", "loss"))
            network = (results.get("student_alone") if arm == "alone" else None) or results["student"]
            assert network is not None
            rows.append(_row(f"student {arm}", network, top1, top5, loss))
    return rows


def _row(name: str, network: Network, top1: Sequence[float], top5: Iterable[float | None], loss: Iterable[float | None]) -> SummaryRow:
    middle, spread = statistics.fmean(top1), statistics.stdev(top1) if len(top1) > 1 else None
    size, speed = network.get("parameters"), network.get("images_per_s")
    return SummaryRow(name, network["model"], middle, spread, mean(top5), mean(loss), size, speed, len(top1), tuple(top1))


def mean(values: Iterable[float | None]) -> float | None:
    """Returns the mean of the values that are not None, or None without any."""
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def paired_difference(alone: Sequence[float], distilled: Sequence[float]) -> Paired:
    """Returns what distillation adds to accuracy: the mean over seeds of the paired differences, and its Student-t interval.

    Args:
        alone: accuracy without distillation, one number a seed.
        distilled: accuracy with distillation, of the same seeds in the same order.

    Raises:
        ValueError: the lengths differ, or there are fewer than two seeds.
    """
    from scipy.special import stdtrit

    n = len(alone)
    if len(distilled) != n or n < 2:
        raise ValueError(f"alone and distilled must hold the same seeds, at least 2, got {n} and {len(distilled)} numbers")
    differences = [checks.number("distilled", after) - checks.number("alone", before) for before, after in zip(alone, distilled)]
    middle = statistics.fmean(differences)
    reach = float(stdtrit(n - 1, (1 + CONFIDENCE) / 2)) * statistics.stdev(differences) / math.sqrt(n)
    return {"n": n, "mean": middle, "low": middle - reach, "high": middle + reach, "confidence": CONFIDENCE, "differences": differences}


def describe_chance(confusion: Matrix, classes: Sequence[str]) -> str | None:
    """Says that a classifier is no better than chance; None if it is better, or right about every image.

    Answers that ignore the image, but are given as often as the classifier gives them, are right with p = sum over classes k of
    (images of k) (answers k) / n^2; a constant answer with the share of its class. The classifier is better than chance if that many
    right answers of n or more have a probability below 1 % in the binomial distribution of n and p.

    Args:
        confusion: images by true class (rows) and predicted class.
        classes: names of the classes.
    """
    from scipy.special import bdtrc

    n, right = sum(map(sum, confusion)), sum(row[k] for k, row in enumerate(confusion))
    answers = [sum(column) for column in zip(*confusion)]
    p = sum(sum(row) * given for row, given in zip(confusion, answers)) / n**2
    if right == n or (right and bdtrc(right - 1, n, p) < CHANCE):
        return None
    constant = f", every image is taken for {classes[answers.index(n)]}" if n in answers else ""
    return f"no better than chance ({text.percent(right / n, 1)} % with {len(classes)} classes{constant})"


def is_too_little(paired: Paired) -> bool:
    """Returns whether the interval says nothing: no spread at all, as of few test images, or wider than any difference can be."""
    return not 1e-9 < paired["high"] - paired["low"] < 1


def outcome(results: Results) -> Outcome:
    """Returns what the seeds show of distillation; "unknown" without a paired comparison."""
    paired = results.get("paired")
    if not paired:
        return "unknown"
    if is_too_little(paired):
        return "undecided"
    return "raised" if paired["low"] > 0 else "lowered" if paired["high"] < 0 else "undecided"


def verdict(results: Results) -> str:
    """Says what distillation did to test accuracy, in one sentence that claims no more than the seeds show."""
    alone, distilled = accuracies(results, "alone"), accuracies(results, "distilled")
    if not distilled:
        return "No student was distilled in this run."
    accuracy = f"{100 * statistics.fmean(distilled):.1f} % test accuracy"
    if not alone:
        return (
            f"The distilled student reaches {accuracy} ({text.count(len(distilled), 'seed')}); "
            "without a student trained alone this run does not say what distillation adds."
        )
    paired = results.get("paired")
    if not paired:
        before = statistics.fmean(alone)
        return (
            f"With distillation the student reaches {accuracy}, {text.signed(statistics.fmean(distilled) - before)} points against "
            f"the {100 * before:.1f} % without; without two pairs of seeds there is no spread, so this may be chance."
        )
    if is_too_little(paired):
        data = f"{text.count(paired['n'], 'seed')} and {text.count(results['test_images'], 'test image')}"
        return f"{data} are too little for a verdict: {text.signed(paired['mean'])} points, without a spread that could be trusted."
    interval = f"{100 * paired['confidence']:g} % interval {text.signed(paired['low'])} to {text.signed(paired['high'])}"
    if outcome(results) == "undecided":
        return f"Distillation made no difference that {paired['n']} seeds can show: {text.signed(paired['mean'])} points ({interval})."
    return f"Distillation {outcome(results)} test accuracy: {text.signed(paired['mean'])} points ({interval}, {paired['n']} seeds)."
