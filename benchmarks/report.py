"""Tables and figures from measured JSON: kdfast bench report FILE...

Cases in which a peer wins are there like the others.
"""

import hashlib
import io
import json
import re
import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from kdfast import files
from kdfast.benchmarks.harness import COMPILED, EAGER, OURS
from kdfast.benchmarks.operators import OPERATORS
from kdfast.machine import describe
from kdfast.text import markdown_table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = {OURS: "#00795c", EAGER: "#b0305c", COMPILED: "#3d6fc4"}
NAMES = {OURS: "kdfast", EAGER: "eager PyTorch", COMPILED: "its torch.compile"}

# ---- reading ---------------------------------------------------------------------------------------------------------


class Results(NamedTuple):
    """Results of harness.measure from one machine.

    Attributes:
        measured: on what, with which PyTorch, when.
        packages: the peers' versions; "" where they are not known.
        cases: the results.
    """

    measured: str
    packages: str
    cases: list[dict[str, Any]]


def read(path: Path) -> Results:
    """Reads operators' results from `kdfast bench kernels --out`, `pytest benchmarks --benchmark-json` or maintain/gpu.py.

    Raises:
        ValueError: the file holds none.
    """
    try:
        text = path.read_text()
        try:
            document = json.loads(text)
        except json.JSONDecodeError:  # gpu.py writes a line per result, the machine first
            document, *lines = map(json.loads, text.splitlines())
            document["cases"] = lines
        if "benchmarks" in document:  # pytest-benchmark's
            cases = [benchmark["extra_info"] for benchmark in document["benchmarks"]]
            document = {"machine": document["machine_info"], "date": document["datetime"][:10], "cases": cases}
        found = from_document(document)
    except (AttributeError, KeyError, TypeError, ValueError):
        found = None
    if found is None or not found.cases:
        raise ValueError(f"{path} must hold results of `kdfast bench kernels` or `pytest benchmarks`, and it holds none")
    return found


def from_document(document: dict[str, Any]) -> Results:
    """Takes the operators' results from a document of machine.document."""
    machine = document["machine"]
    packages = ", ".join(f"{name} {version}" for name, version in machine.get("packages", {}).items())
    return Results(describe(machine, document["date"]), packages, [case for case in document["cases"] if "variants" in case])


# ---- tables ----------------------------------------------------------------------------------------------------------


def summary(results: Sequence[Results]) -> str:
    """A line an operator and peer: how many cases, the least, median and largest speed-up, in how many we are slower."""
    groups: dict[tuple[str, str], list[float]] = {}
    for case in _cases(results):
        for peer, row in peers(case):
            groups.setdefault((case["operator"], peer), []).append(row["speedup"])
            if (on_device := _device_speedup(case, row)) is not None:
                groups.setdefault((case["operator"], f"{peer}, device time"), []).append(on_device)
    rows = [
        (*names, str(len(x)), *(f"{spread(x):.2f}" for spread in (min, statistics.median, max)), str(sum(ratio < 1 for ratio in x)))
        for names, x in groups.items()
    ]
    columns = ("operator", "against", "cases", "least", "median", "largest", "slower in")
    return f"{markdown_table(columns, rows, left=(0, 1))}\n\n{_sources(results)}"


def table(results: Sequence[Results]) -> str:
    """Every case: a table an operator, and what could not be measured below it."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for case in _cases(results):
        groups.setdefault(_family(case), []).append(case)
    packages = "; ".join(dict.fromkeys(result.packages for result in results if result.packages))
    return "\n\n".join([*map(_operator_table, groups.values()), _sources(results), *([f"With {packages}."] if packages else [])])


def _operator_table(cases: list[dict[str, Any]]) -> str:
    names = list(dict.fromkeys(peer for case in cases for peer, _ in peers(case)))
    on_gpu = {"device, ms": "device_ms", "cold, ms": "cold_ms", "launches": "launches"}
    if not any("device_ms" in case["variants"][OURS] for case in cases):
        on_gpu = {}
    columns = ["operator", "case", "ours, ms", *on_gpu, *(f"over {peer}" for peer in names)]
    columns += ["of the floor", "memory, MB", "eager's, MB", "error"]
    rows = []
    for case in cases:
        ours, eager = case["variants"][OURS], case["variants"].get(EAGER, {})
        dtype = "" if case["dtype"] == "float32" else f", {case['dtype']}"
        cells = [case["operator"], f"{case['case']}{dtype}", *(_number(ours.get(key)) for key in ("call_ms", *on_gpu.values()))]
        cells += [_speedups(case, peer) for peer in names]
        cells.append(f"{100 * ours['floor_share']:.0f} %" if "floor_share" in ours else "–")
        cells += [_number(variant["memory"] / 1e6 if "memory" in variant else None) for variant in (ours, eager)]
        errors = [ours[key] for key in ("value_error", "gradient_error") if key in ours]
        rows.append([*cells, f"{max(errors):.0e}" if errors else "–"])
    why = Counter(
        f"{peer}{', on the device' if key == 'device_skipped' else ''}: {row[key]}"
        for case in cases
        for peer, row in case["variants"].items()
        for key in ("skipped", "device_skipped")
        if key in row
    )
    reasons = "; ".join(f"{reason} ({count} of {len(cases)} cases)" for reason, count in why.items())
    return markdown_table(columns, rows, left=(0, 1)) + (f"\n\nNot measured: {reasons}." if why else "")


def _cases(results: Sequence[Results]) -> list[dict[str, Any]]:
    """All cases, by operator and then by size."""
    cases = [case for result in results for case in result.cases]
    names, families = list(dict.fromkeys(case["operator"] for case in cases)), list(OPERATORS)

    def place(case: dict[str, Any]) -> tuple[Any, ...]:
        return families.index(_family(case)), names.index(case["operator"]), *reversed(case["shape"].values()), case["case"]

    return sorted(cases, key=place)


def _family(case: dict[str, Any]) -> str:
    return case["operator"].partition(" ")[0]


def peers(case: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The measured variants other than ours."""
    return ((name, row) for name, row in case["variants"].items() if name != OURS and "call_ms" in row)


def _device_speedup(case: dict[str, Any], row: dict[str, Any]) -> float | None:
    ours = case["variants"][OURS]
    return row["device_ms"] / ours["device_ms"] if "device_ms" in row and "device_ms" in ours else None


def _speedups(case: dict[str, Any], peer: str) -> str:
    """Formats ours over a peer in call time, and on a GPU in device time."""
    row = case["variants"].get(peer, {})
    if "call_ms" not in row:
        return "–"
    on_device = _device_speedup(case, row)
    return f"{row['speedup']:.2f}" + (f" / {on_device:.2f}" if on_device is not None else "")


def _number(x: float | None) -> str:
    """Formats a number with three digits."""
    if x is None:
        return "–"
    return f"{x:,.0f}" if x >= 100 else f"{x:.3g}"


def _sources(results: Sequence[Results]) -> str:
    """Says on which machine each operator was measured; a single machine is named once."""
    operators: dict[str, list[str]] = {}
    for result in results:
        operators.setdefault(result.measured, []).extend(map(_family, result.cases))
    if len(operators) == 1:
        return f"{next(iter(operators))}."
    return "\n".join(f"- {', '.join(dict.fromkeys(names))}: {measured}." for measured, names in operators.items())


# ---- figures ---------------------------------------------------------------------------------------------------------


def figures(results: Sequence[Results]) -> dict[str, str]:
    """SVGs by name; each carries digest(results), by which a stale one is found."""
    cases = _cases(results)
    drawn = {"speedup": _speedup_figure(cases), "roofline": _roofline_figure(cases), "memory": _memory_figure(cases)}
    return {name: to_svg(figure, digest(results)) for name, figure in drawn.items() if figure is not None}


def digest(results: Sequence[Results]) -> str:
    """Identifies the cases that figures are made from."""
    return identify(_cases(results))


def identify(numbers: Any) -> str:
    """A digest of JSON numbers, which a figure carries so that a stale one is found."""
    return hashlib.sha256(json.dumps(numbers, sort_keys=True).encode()).hexdigest()[:16]


def _speedup_figure(cases: list[dict[str, Any]]) -> "Figure":
    """A line an operator, a dot a case."""
    operators = list(dict.fromkeys(case["operator"] for case in cases))[::-1]
    figure, (axes,) = draw_axes(1, height=1.2 + 0.42 * len(operators))
    for offset, peer in ((0.14, EAGER), (-0.14, COMPILED)):
        found = [(case, case["variants"][peer]) for case in cases if "call_ms" in case["variants"].get(peer, {})]
        ratios = [_device_speedup(case, row) or row["speedup"] for case, row in found]
        heights = [operators.index(case["operator"]) + offset for case, _ in found]
        if found:
            axes.scatter(ratios, heights, s=26, color=COLOURS[peer], alpha=0.75, linewidths=0, label=f"over {NAMES[peer]}")
    axes.axvline(1, color="#555555", linewidth=1)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}x")
    axes.set_yticks(range(len(operators)), operators)
    axes.set_ylim(-0.6, len(operators) - 0.4)
    axes.set_xlabel("speed-up, a dot a case; left of 1 the peer is faster")
    figure.legend(loc="outside upper center", ncols=2, frameon=False)
    return figure


def _roofline_figure(cases: list[dict[str, Any]]) -> "Figure | None":
    """Each operator's largest case: operations a second over operations a byte, below what this machine copies and multiplies."""
    cases = sorted((case for case in cases if "floor_ms" in case), key=lambda case: case["floor_ms"])
    largest = {(case["operator"], case["dtype"]): case for case in cases}
    if not largest:
        return None
    figure, (axes,) = draw_axes(1, height=4.6)
    intensities = [case["operations"] / case["bytes"] for case in largest.values()]
    for dtype in dict.fromkeys(case["dtype"] for case in cases):
        own = [case for case in cases if case["dtype"] == dtype]
        bandwidth, rate = (statistics.median(case[key] for case in own) for key in ("copy_bytes_per_s", "dense_operations_per_s"))
        xs = sorted([min(intensities) / 2, rate / bandwidth, max(intensities) * 2])
        label = f"{dtype}: copies {bandwidth / 1e9:,.0f} GB/s, multiplies {rate / 1e9:,.0f} GFLOP/s"
        axes.plot(xs, [min(rate, bandwidth * x) / 1e9 for x in xs], color="#555555", linewidth=1.2, label=label)
    for variant in (EAGER, COMPILED, OURS):
        rows = [(x, case, case["variants"].get(variant, {})) for x, case in zip(intensities, largest.values())]
        points = [(x, case["operations"] / row.get("device_ms", row["call_ms"]) / 1e6) for x, case, row in rows if "call_ms" in row]
        if points:
            axes.scatter([x for x, _ in points], [y for _, y in points], s=26, color=COLOURS[variant], linewidths=0, label=NAMES[variant])
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_ylim(bottom=axes.get_ylim()[0] / 30)  # room for names
    for x, (operator, _) in zip(intensities, largest):
        axes.text(x, 0.02, operator, transform=axes.get_xaxis_transform(), rotation=90, ha="center", va="bottom", fontsize=8)
    axes.set_xlabel("operations a byte that any version has to move")
    axes.set_ylabel("GFLOP/s")
    figure.legend(loc="outside upper center", ncols=2, frameon=False)
    return figure


def _memory_figure(cases: list[dict[str, Any]]) -> "Figure | None":
    """Peak memory over size, where an operator has one series of sizes: logits' elements, or rows at 128 features."""
    panels = {
        "kd_loss (lskd)": ("logits, N C", lambda shape: shape["N"] * shape["C"]),
        "supcon_loss": ("rows N, D = 128", lambda shape: shape["N"] if shape["D"] == 128 else None),
    }
    drawn = {name: panel for name, panel in panels.items() if any(case["operator"] == name for case in cases)}
    if not drawn:
        return None
    figure, all_axes = draw_axes(len(drawn), height=3.6)
    for axes, (operator, (label, size)) in zip(all_axes, drawn.items()):
        for variant in (EAGER, COMPILED, OURS):
            points = sorted(
                (size(case["shape"]), case["variants"][variant]["memory"] / 1e6)
                for case in cases
                if case["operator"] == operator and case["dtype"] == cases[0]["dtype"]
                if size(case["shape"]) is not None and case["variants"].get(variant, {}).get("memory")
            )
            if points:
                axes.plot(*zip(*points), "o-", markersize=4, linewidth=1.5, color=COLOURS[variant], label=NAMES[variant])
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_title(operator, fontsize=10)
        axes.set_xlabel(label)
        axes.set_ylabel("MB beyond the inputs")
    figure.legend(*all_axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False)
    return figure


def draw_axes(columns: int, height: float) -> "tuple[Figure, list[Axes]]":
    """A white figure of this many axes side by side, with a light grid; `height` in inches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, height), layout="constrained", facecolor="white")
    axes = [figure.add_subplot(1, columns, place + 1) for place in range(columns)]
    for each in axes:
        each.grid(color="#dddddd", linewidth=0.6)
        each.set_axisbelow(True)
        each.spines[["top", "right"]].set_visible(False)
    return figure, axes


def to_svg(figure: "Figure", identifier: str) -> str:
    """The same text for the same figure: no date, no random names."""
    import matplotlib as mpl

    text = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "kdfast"}):
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": "kdfast bench report", "Identifier": identifier})
    return re.sub(r"[ \t]+$", "", text.getvalue(), flags=re.MULTILINE)


# ---- writing ---------------------------------------------------------------------------------------------------------


def write_report(paths: Sequence[Path], folder: Path) -> Path:
    """Writes report.md and its figures on the results in these files; returns its path.

    Raises:
        ValueError: a file holds no results.
    """
    results = [read(path) for path in paths]
    lines = ["# Operators", "", summary(results), "", table(results), ""]
    for name, svg in figures(results).items():
        files.write_text(folder / f"{name}.svg", svg)
        lines += [f"![{name}]({name}.svg)", ""]
    files.write_text(folder / "report.md", "\n".join(lines))
    return folder / "report.md"
