"""kdfast report: a run's report again, or a page that compares several runs."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from kdfast import files
from kdfast.commands.command_line import parse
from kdfast.engine.ranges import Checked
from kdfast.report import write_comparison, write_report
from kdfast.text import printable


@dataclass(frozen=True)
class Report(Checked):
    """Make a run's report again, or compare several runs."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Run folders."""
    out: Path = Path("comparison.html")
    """Page that compares several runs."""


def run(arguments: Sequence[str]) -> None:
    """Runs the command.

    Raises:
        ValueError: no runs, a path that is no run folder, or a page that cannot be written.
    """
    options: Report = parse(Report, arguments, "report")
    if not options.runs:
        raise ValueError("runs: name one run folder or several, got none")
    if len(options.runs) > 1:
        files.check_writable(options.out, "--out")
    for folder in options.runs:
        if not folder.exists():
            raise ValueError(f"{folder}: there is no such path")
        if not (folder / "config.toml").exists():
            raise ValueError(f"{folder} is not a run folder: there is no config.toml in it")
        print(printable(write_report(folder)))
    if len(options.runs) > 1:
        print(printable(write_comparison(options.runs, options.out)))
