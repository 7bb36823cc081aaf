"""The pages: report.html of one run, and several runs side by side. Each is one file that loads nothing.

Accuracies are fractions in files and percent on the page.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kdfast import text
from kdfast.files import replacing, write_text
from kdfast.report.contents import describe_comparison, describe_run
from kdfast.report.curves import panels, write_png
from kdfast.runs.folder import read_run
from kdfast.runs.summary import is_too_little


def write_report(run: Path) -> Path:
    """Makes RUN/curves.png and RUN/report.html from the run's files, during the run or after it.

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
    page = _render("report.html", describe_run(read, drawn))
    if drawn:
        with replacing(read.path / "curves.png") as temporary:
            write_png(drawn, temporary)
    write_text(read.path / "report.html", page)
    return read.path / "report.html"


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
    write_text(Path(out), _render("comparison.html", describe_comparison([read_run(Path(run)) for run in runs])))
    return Path(out)


def _render(template: str, values: dict[str, Any]) -> str:
    import jinja2

    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=loader, autoescape=True, finalize=_show, trim_blocks=True, lstrip_blocks=True)
    shown = (text.percent, text.signed, text.number, text.duration)
    environment.filters |= {function.__name__: function for function in shown} | {"plain": _plain}
    environment.tests["too_little"] = is_too_little
    return environment.get_template(template).render(values)


def _show(value: Any) -> Any:
    """Shows the control characters of names; markup that the page brings itself stays."""
    return text.printable(value) if type(value) is str else value


def _plain(value: Any) -> str:
    """Formats a value of the configuration for readers."""
    if isinstance(value, list):
        return ", ".join(map(_plain, value)) or "none"
    return str(value).lower() if isinstance(value, bool) else str(value)
