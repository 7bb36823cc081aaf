"""The documents' tables, made from benchmarks/results/*.json: `python -m kdfast.benchmarks.tables` writes them between markers.

A row is an operator, a case, the median milliseconds of ours and of the peer, and the median ratio of interleaved pairs; rows in which
the peer wins are there like the others.
"""

import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from kdfast.benchmarks.timing import RESULTS

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "README.md", ROOT / "docs" / "performance.md")


class Row(NamedTuple):
    """One comparison."""

    operator: str
    case: str
    peer: str
    ours_ms: float
    theirs_ms: float
    speedup: float


def rows(operator: str, cases: list[dict[str, Any]]) -> Iterator[Row]:
    """The comparisons of one result file."""
    for c in cases:
        match operator:
            case "distill_kl":
                yield Row(f"kd_loss ({c['variant']})", f"{c['N']} x {c['C']}", "eager", c["ours_ms"], c["theirs_ms"], c["speedup"])
            case "supcon":
                for peer in ("eager", "compiled"):
                    name = {"eager": "eager SupContrast", "compiled": "its torch.compile"}[peer]
                    case = f"N {c['N']:,}, D {c['D']}"
                    yield Row("supcon_loss", case, name, c["ours_ms"], c[f"{peer}_ms"], c[f"speedup_over_{peer}"])
            case "lion":
                yield Row("Lion", c["case"], c["peer"], c["ours_ms"], c["theirs_ms"], c["speedup"])
            case "attention_map":
                case = " x ".join(map(str, c["student"])) + (", channels_last" if c["channels_last"] else "")
                yield Row("attention_transfer_loss", case, c["peer"], c["ours_ms"], c["theirs_ms"], c["speedup"])


def results(names: tuple[str, ...] = ("distill_kl", "supcon", "lion", "attention_map")) -> tuple[list[Row], str]:
    """All comparisons, and a line that says on what they were measured."""
    found = [(name, json.loads((RESULTS / f"cpu-{name}.json").read_text())) for name in names]
    machine, date = found[0][1]["machine"], found[0][1]["date"]
    threads = "1 thread" if machine["threads"] == 1 else f"{machine['threads']} threads"
    measured = f"{machine['cpu']}, {threads}, PyTorch {machine['torch']}, Python {machine['python']}, {date}."
    return [row for name, result in found for row in rows(name, result["cases"])], measured


def summary() -> str:
    """One line an operator and peer: how many cases, how many we lose, the least, median and largest speed-up."""
    everything, measured = results()
    groups: dict[tuple[str, str], list[float]] = {}
    for row in everything:
        if not row.peer.startswith("kdfast"):
            groups.setdefault((row.operator, row.peer), []).append(row.speedup)
    lines = ["| operator | against | cases | least | median | largest | slower in |", "|---|---|---:|---:|---:|---:|---:|"]
    for (operator, peer), ratios in groups.items():
        spread = f"{min(ratios):.2f} | {statistics.median(ratios):.2f} | {max(ratios):.2f}"
        lines.append(f"| {operator} | {peer} | {len(ratios)} | {spread} | {sum(r < 1 for r in ratios)} |")
    return "\n".join([*lines, "", measured])


def table() -> str:
    """Every case."""
    everything, measured = results()
    lines = ["| operator | case | against | ours, ms | theirs, ms | speed-up |", "|---|---|---|---:|---:|---:|"]
    for row in everything:
        numbers = f"{row.ours_ms:.3g} | {row.theirs_ms:.3g} | {row.speedup:.2f}"
        lines.append(f"| {row.operator} | {row.case} | {row.peer} | {numbers} |")
    return "\n".join([*lines, "", measured])


def training() -> str:
    """Images/s of whole training loops."""
    result = json.loads((RESULTS / "cpu-self_distillation.json").read_text())
    lines = ["| loop | images/s | over the tutorial's |", "|---|---:|---:|"]
    lines += [f"| {c['variant']} | {c['images_per_s']:.1f} | {c['speedup']:.2f} |" for c in result["cases"]]
    machine = result["machine"]
    return "\n".join([*lines, "", f"{machine['cpu']}, {machine['threads']} threads, PyTorch {machine['torch']}, {result['date']}."])


def filled(text: str) -> str:
    """The text of a page with its tables between their markers."""
    for name, make in (("cpu-summary", summary), ("cpu", table), ("cpu-training", training)):
        before, marker, rest = text.partition(f"<!-- table: {name} -->\n")
        if marker:
            text = f"{before}{marker}{make()}\n<!-- end -->{rest.partition('<!-- end -->')[2]}"
    return text


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(filled(page.read_text()))
