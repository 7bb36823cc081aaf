"""kdfast bench: measurements of this machine, and reports of them."""

import importlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from rich.markdown import Markdown

from kdfast import files, machine
from kdfast.benchmarks import harness, operators, report
from kdfast.benchmarks.harness import COMPILED, EAGER, OURS
from kdfast.commands.command_line import Command, run_one_of
from kdfast.engine import join
from kdfast.engine.ranges import Checked
from kdfast.engine.terminal import Terminal
from kdfast.imports import MissingPackage

BENCHES = {
    "kernels": "every operator against eager PyTorch and torch.compile",
    "loaders": "images a second of the loaders, against torchvision's",
    "train": "images a second of a distillation step, and the time of its parts",
    "codegen": "compiled code of every kernel; needs no GPU",
    "report": "tables and figures from measured JSON",
}

_HELP = f"Any of {', '.join(operators.OPERATORS)}."
_Operators = Annotated[tuple[str, ...], tyro.conf.arg(help=_HELP, help_behavior_hint="(default: all)")]


@dataclass(frozen=True)
class Kernels(Checked):
    """Measure the operators on this machine: time, fraction of the floor, memory and error, beside eager PyTorch and torch.compile."""

    operators: _Operators = ()
    tier: Literal["quick", "usual", "long"] = "quick"
    """Number and size of the cases: about a minute, some minutes, or all."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of floating-point inputs."""
    peers: bool = False
    """Also measure other libraries and torch.compile max-autotune."""
    device: str = "auto"
    """Device: auto, cpu, cuda or cuda:N."""
    out: Path | None = None
    """Also write the numbers, with machine and versions, to this JSON file."""


def kernels(options: Kernels) -> list[dict[str, Any]]:
    """Measures, prints a table, writes options.out where asked to, and returns the results of harness.measure.

    Raises:
        ValueError: there is no such device or operator, or options.out cannot be written.
    """
    if options.out is not None:
        files.check_writable(options.out, "--out")
    device = join(options.device).device
    if device.type == "cuda":
        torch.cuda.set_device(device)
    cases = operators.cases(device, getattr(torch, options.dtype), operators=options.operators, tier=options.tier)
    console, results = Terminal(soft_wrap=False, width=None if sys.stdout.isatty() else 200), []
    with console.status("") as status:
        for number, case in enumerate(cases, 1):
            status.update(f"{number} of {len(cases)}: {case}")
            try:
                results.append(harness.measure(case, only=None if options.peers else (EAGER, COMPILED, OURS)))
            except torch.OutOfMemoryError:
                console.print(f"{case} does not fit on this GPU")
    document = machine.document(results, **operators.describe_peers())
    console.print(Markdown(report.table([report.from_document(document)])))
    if options.out is not None:
        files.write_json(options.out, document)
        console.print(options.out, soft_wrap=True)
    return results


@dataclass(frozen=True)
class Report(Checked):
    """Make tables and figures of the given files, or of the committed results for README.md and docs/."""

    results: Annotated[tuple[Path, ...], tyro.conf.Positional] = ()
    """JSON files of `kdfast bench kernels --out` or `pytest benchmarks --benchmark-json`; none: the committed ones."""
    out: Path = Path("bench-report")
    """Folder for report.md and its figures, if files are given."""


def make_report(options: Report) -> list[Path]:
    """Writes the report and returns its paths.

    Raises:
        ValueError: a file without results, or no checkout whose documents could be written.
    """
    if options.results:
        files.check_writable(options.out, "--out", folder=True)
        written = [report.write_report(options.results, options.out)]
    else:
        try:
            from kdfast.benchmarks.maintain import documents
        except ModuleNotFoundError:
            raise ValueError("bench report without files needs a clone of kdfast, whose documents it writes: name JSON files") from None
        written = documents.write_documents()
    for path in written:
        print(path)
    return written


def run(arguments: Sequence[str]) -> None:
    """Runs one of BENCHES."""
    run_one_of("bench", BENCHES, _find, arguments)


def _find(name: str) -> Command:
    """The options and the function of one of BENCHES.

    Raises:
        ImportError: it needs a package that is not installed.
    """
    if name == "kernels":
        return Kernels, kernels
    if name == "report":
        return Report, make_report
    try:
        module = importlib.import_module(f"kdfast.benchmarks.{'training' if name == 'train' else name}")
    except ModuleNotFoundError as missing:
        raise MissingPackage(missing.name or name, extra="bench", what=f"kdfast bench {name}") from missing
    return getattr(module, name.capitalize()), module.run
