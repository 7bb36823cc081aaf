"""The curves of a run, drawn.

Every panel is drawn twice by the same code: into curves.png, and as an SVG element that takes its colours and font from the page
around it, light or dark, and names no address.
"""

import html
import io
import math
import re
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdfast.runs.folder import Curve, group_by_stage

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Colours that differ in lightness as well as hue, so that they keep apart for the colour-blind. In the page they become
# CSS variables, which have values of their own on a dark ground.
PALETTE = {
    "ink": "#1b1f24",
    "grid": "#dfe3e8",
    "muted": "#667080",
    "distilled": "#0067a5",
    "alone": "#c24e00",
    "teacher": "#8a4a9c",
    "extra1": "#00795c",
    "extra2": "#8f6400",
    "extra3": "#b0305c",
    "extra4": "#3d8fc4",
}
SERIES = ("distilled", "extra1", "extra2", "extra3", "extra4", "alone", "teacher")
STYLES = ("-", (0, (6, 2)), (0, (2, 1.5)), (0, (6, 2, 1.5, 2)))


@dataclass(frozen=True)
class Line:
    """A named quantity over epochs: one thin line a seed, and their mean."""

    name: str
    colour: str
    seeds: list[tuple[list[int], list[float]]]
    style: Any = "-"
    width: float = 1.8

    def mean(self) -> tuple[list[int], list[float]]:
        """Mean over the seeds that reached an epoch, as far as half of them came."""
        values: dict[int, list[float]] = defaultdict(list)
        for epochs, series in self.seeds:
            for epoch, value in zip(epochs, series):
                values[epoch].append(value)
        kept = sorted(epoch for epoch, found in values.items() if 2 * len(found) >= len(self.seeds))
        return kept, [statistics.fmean(values[epoch]) for epoch in kept]


@dataclass(frozen=True)
class Panel:
    """One diagram."""

    title: str
    y_label: str
    lines: list[Line]
    percent: bool = False


def panels(curves: Sequence[Curve]) -> list[Panel]:
    """Validation accuracy of all stages, and the loss terms of every stage of distillation."""
    stages = group_by_stage(curves)
    accuracies = {stage: found for stage, seeds in stages.items() if (found := _found(seeds, "val/top1"))}
    roles = {stage: seeds[0].role for stage, seeds in stages.items()}
    # the last stage of distillation gives the student that counts, and has the colour of the distilled student
    ours = [stage for stage in reversed(accuracies) if roles[stage] == "distilled"]
    colours = roles | dict(zip(ours, SERIES * len(ours)))
    accuracy = [Line(stage, colours[stage], found, STYLES[2] if roles[stage] == "teacher" else "-") for stage, found in accuracies.items()]
    drawn = [Panel("Validation accuracy", "top-1, %", accuracy, percent=True)] if accuracy else []
    for stage, seeds in stages.items():
        if roles[stage] == "distilled" and (lines := _loss_lines(seeds)):
            drawn.append(Panel(f"Losses of {stage}", "loss", lines))
    return drawn


def _loss_lines(seeds: Sequence[Curve]) -> list[Line]:
    keys = dict.fromkeys(key for curve in seeds for line in curve.epochs for key in line if key.startswith("train/"))
    terms = [key for key in keys if key not in ("train/loss", "train/top1", "train/top5")]
    lines = [
        Line(term.removeprefix("train/"), colour, _found(seeds, term), style)
        for term, colour, style in zip(terms, SERIES * len(terms), STYLES * len(terms))
    ]
    # the sum of a single term is that term, and would hide it
    if len(terms) != 1:
        lines.append(Line("sum" if terms else "training", "ink", _found(seeds, "train/loss"), "-", 1.2))
    lines.append(Line("validation", "muted", _found(seeds, "val/loss"), STYLES[2], 1.4))
    return [line for line in lines if line.seeds]


def _found(seeds: Sequence[Curve], key: str) -> list[tuple[list[int], list[float]]]:
    return [series for curve in seeds if (series := curve.series(key))[0]]


def _draw(axes: "Axes", panel: Panel) -> None:
    from matplotlib.ticker import MaxNLocator

    scale = 100 if panel.percent else 1
    means: list[Any] = []
    drawn: list[float] = []
    for line in panel.lines:
        colour = PALETTE[line.colour]
        if len(line.seeds) > 1:
            for epochs, values in line.seeds:
                axes.plot(epochs, [scale * v for v in values], color=colour, linewidth=0.7, alpha=0.35)
        epochs, values = line.mean()
        values = [scale * v for v in values]
        means += axes.plot(epochs, values, color=colour, linewidth=line.width, linestyle=line.style, solid_capstyle="round")
        axes.plot(epochs[-1:], values[-1:], color=colour, marker="o", markersize=3.5)
        drawn += [scale * value for _, series in line.seeds for value in series]
    axes.set_title(panel.title, loc="left", fontsize=12, fontweight="bold", color=PALETTE["ink"], parse_math=False)
    axes.set_xlabel("epoch", color=PALETTE["muted"])
    axes.set_ylabel(panel.y_label, color=PALETTE["muted"])
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10], integer=True))
    axes.grid(axis="y", color=PALETTE["grid"], linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=PALETTE["muted"], length=0, labelsize=10.5)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(PALETTE["muted"])
    _limit(axes, panel, drawn)
    legend = axes.legend(
        means, [" "] * len(means), loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, labelcolor="linecolor", handlelength=1.6
    )
    for text, line in zip(legend.get_texts(), panel.lines):  # a name may begin with "_" or hold "$"
        text.set(text=_short(line.name), parse_math=False)


def _limit(axes: "Axes", panel: Panel, values: Sequence[float]) -> None:
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    finite = sorted(value for value in values if math.isfinite(value))
    if not finite:
        return
    if panel.percent:
        # the first epochs would flatten all that matters into the last few points
        low, high = finite[len(finite) // 5], finite[-1]
        room = max(high - low, 1.0)
        axes.set_ylim(max(0.0, low - 0.15 * room), min(100.5, high + 0.1 * room))
    elif finite[0] > 0 and finite[-1] > 20 * finite[0]:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_locator(NullLocator())
    elif finite[0] >= 0:
        axes.set_ylim(bottom=0)


def _short(name: str) -> str:
    """At most 24 characters, so that a long path leaves room for the curves."""
    return name if len(name) <= 24 else f"{name[:12]}…{name[-11:]}"


def _figure(drawn: Sequence[Panel], columns: int) -> "Figure":
    import matplotlib as mpl
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    rows = math.ceil(len(drawn) / columns)
    with mpl.rc_context({"font.family": "DejaVu Sans", "font.size": 11}):
        layout = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.08, wspace=0.03)
        figure = Figure(figsize=(5.6 * columns, 3.5 * rows), dpi=144, layout=layout)
        for place, panel in enumerate(drawn, 1):
            _draw(figure.add_subplot(rows, columns, place), panel)
    return figure


def write_png(drawn: Sequence[Panel], path: Path) -> None:
    """Draws the panels into one picture, dark on white."""
    _figure(drawn, min(len(drawn), 2)).savefig(path, format="png", facecolor="white")


def svg(panel: Panel) -> str:
    """The panel as an SVG element that takes the page's colours and font, light or dark, and names no address."""
    import matplotlib as mpl

    text = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": panel.title}):
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        _figure([panel], 1).savefig(text, format="svg", transparent=True, metadata=nothing)
    element = re.sub(r'\s(xmlns(:xlink)?|id)="(?!\w*[0-9a-f]{10}")[^"]*"', "", text.getvalue().partition("<svg")[2])
    element = element.replace("xlink:href=", "href=")
    element = re.sub(r'\swidth="[\d.]+pt" height="[\d.]+pt"', "", element, count=1)
    element = re.sub(r"<style.*?</style>", "", element, count=1, flags=re.DOTALL)
    variables = {colour: f"var(--{name})" for name, colour in PALETTE.items()}
    element = re.sub(r"(?<=: )#[0-9a-f]{6}", lambda found: variables.get(found[0], found[0]), element)
    element = re.sub(r"font-family: [^;\"]+", "font-family: inherit", element)
    return f'<svg role="img" aria-label="{html.escape(panel.title)}"{element}'
