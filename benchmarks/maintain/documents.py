"""The tables and figures of README.md and docs/, from the committed results: kdfast bench report

A table stands between <!-- table: DEVICE --> (every case of every operator) or <!-- table: DEVICE-KIND --> (kind: summary,
loaders, momenta, compare_GRID), and <!-- end -->. DEVICE is how the names of files in results/ begin: "cpu" for cpu-lion.json.
"""

import contextlib
import json
import re
import statistics
from pathlib import Path
from typing import Any

from kdfast import files
from kdfast.benchmarks import loaders
from kdfast.benchmarks.maintain import RESULTS, ROOT
from kdfast.benchmarks.report import Results, draw_axes, figures, identify, read, summary, table, to_svg
from kdfast.machine import describe
from kdfast.runs.comparison import markdown
from kdfast.text import markdown_table

PAGES = (ROOT / "README.md", *(ROOT / "docs" / name for name in ("performance.md", "loaders.md", "comparison.md")))
GAINS = {"cifar10": "CIFAR-10, a fifth of the images", "digits_few": "digits, 5 % of the labels"}  # comparisons, and their titles
FIGURES = ROOT / "docs" / "figures"


def load(name: str) -> dict[str, Any]:
    """Loads results/<name>.json."""
    return dict(json.loads((RESULTS / f"{name}.json").read_text()))


def read_committed(device: str) -> list[Results]:
    """Reads the committed results of the operators on a device."""
    found = []
    for path in sorted(RESULTS.glob(f"{device}-*.json")):
        with contextlib.suppress(ValueError):  # loaders
            found.append(read(path))
    return found


def devices() -> list[str]:
    """The devices on which operators were measured."""
    names = {path.name.partition("-")[0] for path in RESULTS.glob("*-*.json")}
    return sorted(name for name in names if read_committed(name))


def loading(device: str) -> str:
    """Images/s of every loader."""
    result = load(f"{device}-loaders")
    return f"{loaders.make_table(result['cases'])}\n\n{describe(result['machine'], result['date'])}."


def momenta(device: str) -> str:
    """Accuracy with narrow momenta, a row a data set and dtype."""
    rows, measured = [], []
    for path in sorted(RESULTS.glob(f"{device}-lion_momentum_*.json")):
        result = load(path.stem)
        measured.append(f"- {result['cases'][0]['dataset']}: {describe(result['machine'], result['date'])}.")
        for c in result["cases"]:
            against = "" if c["momentum"] == "float32" else f"{c['difference']:+.2f} ± {c['standard_error']:.2f}"
            images = f"{c['dataset']}, {c['epochs']} epochs, {len(c['accuracy'])} seeds"
            rows.append((images, c["momentum"], f"{c['momentum_bytes']:,}", f"{statistics.mean(c['accuracy']):.2f}", against))
    made = markdown_table(("images", "momentum", "bytes", "test accuracy, %", "from float32, points"), rows, left=(0, 1))
    return "\n".join([made, "", *measured])


def gains_figure(device: str) -> str:
    """SVG: what each recipe adds to the same student alone, in points of test accuracy; a panel for each comparison.

    Bars are means over seeds, lines their 95 % intervals, where there are several seeds.
    """
    figure, panels = draw_axes(len(GAINS), height=3.6)
    shown = read_gains(device)
    for axes, (grid, rows) in zip(panels, shown.items()):
        gains = [100 * row["paired"]["mean"] for row in rows]
        axes.barh([row["recipe"] for row in rows], gains, color=["#00795c" if gain > 0 else "#b0305c" for gain in gains])
        for place, row in enumerate(rows):
            if "low" in row["paired"]:
                axes.plot([100 * row["paired"]["low"], 100 * row["paired"]["high"]], [place, place], color="#222222", linewidth=1)
        axes.axvline(0, color="#555555", linewidth=1)
        seeds = len(rows[0]["seeds"])
        axes.set_title(f"{GAINS[grid]}, {seeds} seed{'s' if seeds > 1 else ''}", fontsize=10)
        axes.set_xlabel("points over the student alone")
    return to_svg(figure, identify(shown))


def read_gains(device: str) -> dict[str, list[dict[str, Any]]]:
    """The recipes' rows of committed comparisons, by grid, the smallest gain first."""
    rows = {grid: load(f"{device}-compare_{grid}")["rows"] for grid in GAINS}
    return {grid: sorted((row for row in of if "paired" in row), key=lambda row: row["paired"]["mean"]) for grid, of in rows.items()}


TABLES = {"loaders": loading, "momenta": momenta}


def fill_tables(text: str) -> str:
    """Returns the text of a page with its tables filled in between their markers."""

    def fill(marker: re.Match[str]) -> str:
        name, device, kind = marker.groups()
        return f"<!-- table: {name} -->\n{make_table(device, kind)}\n<!-- end -->"

    return re.sub(r"<!-- table: ((\w+?)(?:-(\w+))?) -->\n.*?<!-- end -->", fill, text, flags=re.DOTALL)


def make_table(device: str, kind: str | None) -> str:
    """Returns the table of a marker."""
    if kind in (None, "summary"):
        return (summary if kind else table)(read_committed(device))
    if kind in TABLES:
        return TABLES[kind](device)
    return markdown(load(f"{device}-{kind}")).strip()  # of kdfast compare


def write_documents() -> list[Path]:
    """Writes the tables and figures of README.md and docs/ from the committed results; returns the paths."""
    for page in PAGES:
        files.write_text(page, fill_tables(page.read_text()))
    written = [*PAGES]
    for device in devices():
        for name, svg in figures(read_committed(device)).items():
            written.append(FIGURES / f"{device}-{name}.svg")
            files.write_text(written[-1], svg)
    written.append(FIGURES / "cpu-gains.svg")
    files.write_text(written[-1], gains_figure("cpu"))
    return written
