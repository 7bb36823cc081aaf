"""The run report: one self-contained page made from a run folder's files alone, and several runs side by side.

    config.toml      what was asked for
    metrics.jsonl    one line an epoch and stage: losses by term, validation loss and accuracy, seconds, images/s
    results.json     accuracy on the test images, written when the run ends; until then the page shows how far it has come

The student alone and the student distilled share their seeds, hence initial weights and the order of images, so what
distillation adds is the mean of the paired differences d_i = distilled_i - alone_i over n seeds, with Student's t interval

    mean(d) +- t_{n-1, (1 + confidence) / 2} * s_d / sqrt(n),        s_d^2 = sum (d_i - mean(d))^2 / (n - 1).

It speaks of the spread over seeds, not over test images. Accuracies are fractions in files and percent on the page.
"""

import json
import math
import statistics
import tomllib
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from kdfast.files import replacing, write_text
from kdfast.report.curves import SERIES, STYLES, Curve, Line, Panel, as_curves, by_stage, panels, read_metrics, svg, write_png

MATRIX_CLASSES = 25  # above, a confusion matrix is a carpet, and its most confused pairs say more
LISTED_PAIRS = 20
LISTED_CHANGES = 10


# ---- numbers -------------------------------------------------------------------------------------


class SummaryRow(NamedTuple):
    """One line of the closing table. Accuracies are fractions of the test images, with the weights that were kept."""

    name: str
    """"teacher", "student alone" or "student distilled"."""
    model: str
    top1: float
    """Mean over seeds."""
    top1_std: float | None
    """Sample standard deviation over seeds; None for a single one."""
    top5: float | None
    loss: float | None
    """Mean cross-entropy over seeds, nats."""
    parameters: int | None
    images_per_s: float | None
    """Inference."""
    seeds: int
    each: tuple[float, ...]
    """top-1 by seed."""


def summary_rows(results: Mapping[str, Any]) -> list[SummaryRow]:
    """Teacher, student alone and student distilled, as far as the run has them.

    Args:
        results: what results.json holds.
    """
    rows = []
    if results.get("teacher"):
        test = results["teacher"]
        rows.append(_row("teacher", test, [test["top1"]], [test.get("top5")], [test.get("loss")]))
    for arm in ("alone", "distilled"):
        if runs := _arm(results, arm):
            top1 = [run[f"{_kept(results)}/top1"] for run in runs]
            top5, loss = ([run.get(f"{_kept(results)}/{name}") for run in runs] for name in ("top5", "loss"))
            network = results.get("student_alone" if arm == "alone" else "student") or results["student"]
            rows.append(_row(f"student {arm}", network, top1, top5, loss))
    return rows


def _row(
    name: str,
    network: Mapping[str, Any],
    top1: Sequence[float],
    top5: Iterable[float | None],
    loss: Iterable[float | None],
) -> SummaryRow:
    return SummaryRow(
        name,
        network["model"],
        statistics.fmean(top1),
        statistics.stdev(top1) if len(top1) > 1 else None,
        _mean(top5),
        _mean(loss),
        network.get("parameters"),
        network.get("images_per_s"),
        len(top1),
        tuple(top1),
    )


def paired_difference(alone: Sequence[float], distilled: Sequence[float], confidence: float = 0.95) -> dict[str, Any]:
    """What distillation adds to accuracy: mean over seeds of the paired differences, and its Student-t interval.

    Args:
        alone: accuracy without distillation, one number a seed.
        distilled: accuracy with distillation, of the same seeds in the same order.
        confidence: probability that the interval covers the true mean, between 0 and 1.

    Returns:
        n, mean, low, high, confidence and the list of differences.

    Raises:
        ValueError: the lengths differ, there are fewer than two seeds, or confidence is not between 0 and 1.
    """
    from scipy.special import stdtrit

    n = len(alone)
    if len(distilled) != n or n < 2:
        raise ValueError(f"alone and distilled must hold the same seeds, at least 2, got {n} and {len(distilled)} numbers")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be between 0 and 1, got {confidence}")
    differences = [after - before for before, after in zip(alone, distilled)]
    mean = statistics.fmean(differences)
    reach = float(stdtrit(n - 1, (1 + confidence) / 2)) * statistics.stdev(differences) / math.sqrt(n)
    return {
        "n": n,
        "mean": mean,
        "low": mean - reach,
        "high": mean + reach,
        "confidence": confidence,
        "differences": differences,
    }


def outcome(results: Mapping[str, Any]) -> str:
    """What the seeds show of distillation: "raised", "lowered", "undecided"; "unknown" without a paired comparison."""
    paired = results.get("paired")
    if not paired:
        return "unknown"
    return "raised" if paired["low"] > 0 else "lowered" if paired["high"] < 0 else "undecided"


def verdict(results: Mapping[str, Any]) -> str:
    """What distillation did to test accuracy, in one sentence that claims no more than the seeds show.

    Args:
        results: what results.json holds.
    """
    alone, distilled = (_arm(results, arm) for arm in ("alone", "distilled"))
    if not distilled:
        return "No student was distilled in this run."
    accuracy = statistics.fmean(run[f"{_kept(results)}/top1"] for run in distilled)
    seeds = _count(len(distilled), "seed")
    if not alone:
        return (
            f"The distilled student reaches {100 * accuracy:.1f} % test accuracy ({seeds}); "
            "without a student trained alone this run does not say what distillation adds."
        )
    paired = results.get("paired")
    if not paired:
        before = statistics.fmean(run[f"{_kept(results)}/top1"] for run in alone)
        (change,) = _points(accuracy - before)
        evidence = "one seed shows" if len(distilled) == 1 else "seeds that do not pair show"
        return (
            f"With distillation the student reaches {100 * accuracy:.1f} % test accuracy, {change} points against "
            f"the {100 * before:.1f} % without; {evidence} no spread, so this may be chance."
        )
    mean, low, high = _points(paired["mean"], paired["low"], paired["high"])
    seeds, confidence = _count(paired["n"], "seed"), f"{100 * paired['confidence']:g} %"
    if outcome(results) == "undecided":
        interval = f"{mean} points ({confidence} interval {low} to {high})"
        return f"Distillation made no difference that {seeds} can show: {interval}."
    # "lowered by 2.1" says the sign, so the interval leaves it out and runs from small to large
    near, far = (low, high) if paired["mean"] > 0 else (high, low)
    by, near, far = (text.lstrip("+-") for text in (mean, near, far))
    return f"Distillation {outcome(results)} test accuracy by {by} points ({confidence} interval {near} to {far}, {seeds})."


def _points(*fractions: float) -> list[str]:
    """Percentage points with a sign, all with as many decimals (1 to 3) as keep the smallest from reading as zero."""
    points = [100 * fraction for fraction in fractions]
    decimals = next((d for d in (1, 2, 3) if all(round(x, d) or abs(x) < 1e-9 for x in points)), 3)
    return [f"{x + 0.0:+.{decimals}f}" if round(x, decimals) else f"{0:.{decimals}f}" for x in points]


def _kept(results: Mapping[str, Any]) -> str:
    """Which epoch's weights a run kept, and is judged by: "best" on the validation images, or "last"."""
    return results.get("kept") or "best"


def _arm(results: Mapping[str, Any], arm: str) -> list[dict[str, Any]]:
    """The students of every seed that were trained "alone" or "distilled"; none where the run has none."""
    return (results.get("arms") or {}).get(arm) or []


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


# ---- the files of a run --------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """What a run folder holds."""

    folder: Path
    config: dict[str, Any]
    curves: list[Curve]
    unreadable: int
    """Lines of metrics.jsonl that are no JSON: a run killed while it wrote leaves one."""
    written: datetime | None
    """When metrics.jsonl last grew."""
    results: dict[str, Any] | None
    """None: the run is unfinished."""


def read_run(folder: Path) -> Run:
    """Reads a run folder, finished or not.

    Raises:
        FileNotFoundError: the folder holds none of a run's files.
        ValueError: config.toml or results.json cannot be read as TOML, JSON.
    """
    config, metrics, results = folder / "config.toml", folder / "metrics.jsonl", folder / "results.json"
    if not any(path.is_file() for path in (config, metrics, results)):
        raise FileNotFoundError(f"{folder} is no run folder: it holds neither config.toml nor metrics.jsonl nor results.json")
    lines, unreadable = read_metrics(metrics) if metrics.is_file() else ([], 0)
    return Run(
        folder,
        _parsed(config, tomllib.loads) if config.is_file() else {},
        as_curves(lines),
        unreadable,
        datetime.fromtimestamp(metrics.stat().st_mtime) if metrics.is_file() else None,
        _parsed(results, json.loads) if results.is_file() else None,
    )


def _parsed(path: Path, parse: Callable[[str], Any]) -> Any:
    try:
        return parse(path.read_text(encoding="utf-8"))
    except ValueError as error:  # of which JSON's, TOML's and UTF-8's errors are kinds
        raise ValueError(f"{path} cannot be read: {error}") from error


# ---- the page ------------------------------------------------------------------------------------


def write_report(run: Path) -> Path:
    """Makes RUN/curves.png and RUN/report.html from the run's files; again and again, also while the run goes on.

    Args:
        run: a run folder.

    Returns:
        The path of report.html. A report that cannot be written leaves the old one as it was.

    Raises:
        FileNotFoundError: the folder holds none of a run's files.
        ValueError: config.toml or results.json cannot be read.
        OSError: the folder cannot be written to.
    """
    read = read_run(Path(run))
    drawn = panels(read.curves)
    page = _page("report.html", **_report(read, drawn))
    if drawn:
        with replacing(read.folder / "curves.png") as temporary:
            write_png(drawn, temporary)
    write_text(read.folder / "report.html", page)
    return read.folder / "report.html"


def write_comparison(runs: Sequence[Path], out: Path) -> Path:
    """Makes one page that shows several runs side by side: one table, and the validation curves on top of each other.

    Args:
        runs: run folders, at least one; unfinished ones are shown as far as they are.
        out: the page to write.

    Returns:
        out.

    Raises:
        FileNotFoundError: a folder holds none of a run's files.
        ValueError: no runs, or a run's config.toml or results.json cannot be read.
        OSError: the page cannot be written.
    """
    if not runs:
        raise ValueError("runs must name at least one run folder, got none")
    write_text(Path(out), _page("comparison.html", **_comparison([read_run(Path(run)) for run in runs])))
    return Path(out)


def _page(template: str, **values: Any) -> str:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "percent": _percent,
        "signed": _signed,
        "number": _number,
        "duration": _duration,
        "plain": _plain,
    }
    return environment.get_template(template).render(values)


def _known(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _percent(fraction: Any, decimals: int = 2) -> str:
    return f"{100 * fraction:.{decimals}f}" if _known(fraction) else "–"


def _signed(fraction: Any, decimals: int = 2) -> str:
    """Percentage points with a sign; zero has none."""
    if not _known(fraction):
        return "–"
    return f"{100 * fraction:+.{decimals}f}".replace("-", "−") if round(100 * fraction, decimals) else f"{0:.{decimals}f}"


def _number(value: Any, decimals: int = 0) -> str:
    return f"{value:,.{decimals}f}" if _known(value) else "–"


def _duration(seconds: Any) -> str:
    if not _known(seconds):
        return "–"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min"


def _plain(value: Any) -> str:
    """A value of the configuration as one reads it."""
    if isinstance(value, list):
        return ", ".join(map(_plain, value)) or "none"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


@dataclass(frozen=True)
class Scale:
    """Places numbers on a horizontal axis with round ends."""

    low: float
    high: float

    @classmethod
    def around(cls, values: Iterable[float], highest: float = math.inf) -> "Scale":
        """The least scale with round ends that holds all `values`; it does not go beyond `highest`."""
        from matplotlib.ticker import MaxNLocator

        known = [value for value in values if _known(value)] or [0.0, 1.0]
        ticks = MaxNLocator(4, steps=[1, 2, 2.5, 5, 10], min_n_ticks=3).tick_values(min(known), max(known))
        return cls(float(ticks[0]), min(float(ticks[-1]), highest))

    def at(self, value: float) -> float:
        """Per cent of the way from low to high."""
        return round(100 * (value - self.low) / (self.high - self.low), 2) if self.high > self.low else 50.0


def _report(run: Run, drawn: Sequence[Panel]) -> dict[str, Any]:
    """What the template of a run's page needs."""
    results = run.results
    page: dict[str, Any] = {
        "run": run,
        "results": results,
        "title": run.folder.resolve().name,
        "figures": [(panel, svg(panel)) for panel in drawn],
        "stages": _stage_rows(run.curves),
        "progress": _progress(run.curves),
        "config": _sections(run.config),
    }
    if results is not None:
        rows = summary_rows(results)
        page |= {
            "verdict": verdict(results),
            "outcome": outcome(results),
            "rows": rows,
            "scale": Scale.around((top1 for row in rows for top1 in row.each), highest=1.0),
            "seeds": _seed_rows(results),
            "confusion": _confusion(results),
        }
        if paired := results.get("paired"):
            page["paired_scale"] = Scale.around([0.0, paired["low"], paired["high"], *paired["differences"]])
    return page


def _sections(config: Mapping[str, Any], name: str = "") -> list[tuple[str, dict[str, Any]]]:
    """Tables of a TOML document with their dotted names, those of the top level first."""
    values = {key: value for key, value in config.items() if not isinstance(value, Mapping)}
    sections = [(name, values)] if values else []
    for key, value in config.items():
        if isinstance(value, Mapping):
            sections += _sections(value, f"{name}.{key}" if name else key)
    return sections


def _stage_rows(curves: Sequence[Curve]) -> list[dict[str, Any]]:
    """Epochs, speed and time of every stage over its seeds."""
    rows = []
    for stage, seeds in by_stage(curves).items():
        speeds = [value for curve in seeds for value in curve.series("images_per_s")[1]]
        seconds = [sum(curve.series("seconds")[1]) for curve in seeds]
        rows.append(
            {
                "stage": stage,
                "role": seeds[0].role,
                "seeds": len(seeds),
                "epochs": sum(len(curve.epochs) for curve in seeds),
                "images_per_s": statistics.median(speeds) if speeds else None,
                "seconds": sum(seconds),
                "seconds_a_seed": statistics.fmean(seconds),
            }
        )
    return rows


def _progress(curves: Sequence[Curve]) -> list[dict[str, Any]]:
    """How far every training of an unfinished run has come."""
    rows = []
    for curve in curves:
        last = curve.epochs[-1]
        accuracies, losses = curve.series("val/top1")[1], curve.series("val/loss")[1]
        rows.append(
            {
                "name": curve.stage if curve.seed is None else f"seed {curve.seed}, {curve.stage}",
                "epoch": last["epoch"],
                "epochs": last.get("epochs"),
                "best": max(accuracies, default=None),
                "loss": min(losses, default=None),
                "seconds": sum(curve.series("seconds")[1]),
            }
        )
    return rows


def _seed_rows(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Both students of every seed, and their difference in test top-1 where both are there."""
    arms = {arm: {run["seed"]: run for run in _arm(results, arm)} for arm in ("alone", "distilled")}
    rows = []
    for seed in sorted({*arms["alone"], *arms["distilled"]}):
        found = {arm: runs[seed] for arm, runs in arms.items() if seed in runs}
        tops = [run[f"{_kept(results)}/top1"] for run in found.values()]
        rows.append({"seed": seed, "arms": found, "difference": tops[1] - tops[0] if len(tops) == 2 else None})
    return rows


# ---- confusion -----------------------------------------------------------------------------------


class ClassRow(NamedTuple):
    """One true class. Recalls are fractions of its test images, over all seeds."""

    name: str
    images: int
    """With every seed counted."""
    teacher: float | None
    alone: float | None
    distilled: float | None
    change: float | None
    """distilled - alone."""
    cells: list[tuple[int, float, bool]]
    """By predicted class: images, depth of colour from 0 to 1, whether that is the true class."""


def _confusion(results: Mapping[str, Any]) -> dict[str, Any] | None:
    """Confusions of the distilled student: by class, and the most confused pairs."""
    tables = dict(results.get("confusion") or {})
    distilled = tables.get("distilled")
    if not distilled:
        return None
    classes = results.get("classes") or [str(i) for i in range(len(distilled))]
    alone = tables.get("alone")
    recalls = {
        "teacher": _recalls((results.get("teacher") or {}).get("confusion"), len(classes)),
        "alone": _recalls(alone, len(classes)),
        "distilled": _recalls(distilled, len(classes)),
    }
    worst = max((share for i, row in enumerate(distilled) for j, share in enumerate(_shares(row)) if i != j), default=0) or 1
    rows = []
    for i, (name, counts) in enumerate(zip(classes, distilled)):
        of = {key: values[i] for key, values in recalls.items()}
        change = of["distilled"] - of["alone"] if of["distilled"] is not None and of["alone"] is not None else None
        # mistakes are few: their colour is scaled to the largest of them, by the root so that single ones show
        cells = [
            (count, share if i == j else math.sqrt(share / worst), i == j) for j, (count, share) in enumerate(zip(counts, _shares(counts)))
        ]
        rows.append(ClassRow(name, sum(counts), of["teacher"], of["alone"], of["distilled"], change, cells))
    pairs = [
        {
            "true": classes[i],
            "predicted": classes[j],
            "images": n,
            "share": n / sum(row),
            "alone": alone[i][j] if alone else None,
        }
        for i, row in enumerate(distilled)
        for j, n in enumerate(row)
        if i != j and n
    ]
    changed = sorted((row for row in rows if row.change), key=lambda row: row.change or 0.0)
    return {
        "matrix": len(classes) <= MATRIX_CLASSES,
        "rows": rows,
        "pairs": sorted(pairs, key=lambda pair: -pair["images"])[:LISTED_PAIRS],
        "gained": [row for row in reversed(changed) if (row.change or 0.0) > 0][:LISTED_CHANGES],
        "lost": [row for row in changed if (row.change or 0.0) < 0][:LISTED_CHANGES],
        "seeds": len(_arm(results, "distilled")),
    }


def _shares(counts: Sequence[int]) -> list[float]:
    total = sum(counts)
    return [count / total if total else 0.0 for count in counts]


def _recalls(table: Sequence[Sequence[int]] | None, classes: int) -> list[float | None]:
    if not table:
        return [None] * classes
    return [row[i] / sum(row) if sum(row) else None for i, row in enumerate(table)]


# ---- several runs --------------------------------------------------------------------------------


def _comparison(runs: Sequence[Run]) -> dict[str, Any]:
    """What the template of the comparison needs."""
    names = _names([run.folder.resolve() for run in runs])
    colours = [SERIES[place % len(SERIES)] for place in range(len(runs))]
    rows = [
        {
            "name": name,
            "colour": colour,
            "results": run.results,
            "arms": {row.name: row for row in summary_rows(run.results)} if run.results else {},
            "train_images_per_s": _mean(student.get("train_images_per_s") for student in _arm(run.results or {}, "distilled")),
        }
        for name, colour, run in zip(names, colours, runs)
    ]
    top1 = [accuracy for run in runs if run.results for row in summary_rows(run.results) for accuracy in row.each]
    lines = [
        Line(name, colour, _distilled_accuracy(run), STYLES[place // len(SERIES) % len(STYLES)])
        for place, (name, colour, run) in enumerate(zip(names, colours, runs))
    ]
    lines = [line for line in lines if line.seeds]
    panel = Panel("Validation accuracy of the distilled student", "top-1, %", lines, percent=True)
    finished = [run.results for run in runs if run.results]
    paired = [results["paired"] for results in finished if results.get("paired")]
    tasks = {(results.get("dataset"), results.get("test_images"), results.get("label_fraction")) for results in finished}
    return {
        "rows": rows,
        "figures": [(panel, svg(panel))] if lines else [],
        "scale": Scale.around(top1, highest=1.0),
        "paired_scale": Scale.around([0.0, *(value for p in paired for value in (p["low"], p["high"], *p["differences"]))])
        if paired
        else None,
        "same_task": len(tasks) <= 1,
        "chosen_on_test": [
            name for name, run in zip(names, runs) if run.results and run.results.get("val_is_test") and _kept(run.results) == "best"
        ],
        "kept": sorted({_kept(results) for results in finished}),
    }


def _names(folders: Sequence[Path]) -> list[str]:
    """As many of the last parts of their paths as tell the folders apart."""
    depth = max(len(folder.parts) for folder in folders)
    for parts in range(1, depth + 1):
        names = [str(Path(*folder.parts[-parts:])) for folder in folders]
        if len(set(names)) == len(set(folders)):
            break
    return names


def _distilled_accuracy(run: Run) -> list[tuple[list[int], list[float]]]:
    """Validation top-1 of every seed over the epochs of all its stages of distillation, one stage after the other."""
    seeds: dict[int | None, tuple[list[int], list[float]]] = defaultdict(lambda: ([], []))
    before: dict[int | None, int] = defaultdict(int)
    for curve in run.curves:
        if curve.role == "distilled":
            epochs, values = curve.series("val/top1")
            seeds[curve.seed][0].extend(before[curve.seed] + epoch for epoch in epochs)
            seeds[curve.seed][1].extend(values)
            before[curve.seed] += curve.epochs[-1]["epoch"]
    return [series for series in seeds.values() if series[0]]
