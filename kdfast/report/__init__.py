"""The report of a run: curves and one self-contained page, made from the files of a run folder alone."""

from kdfast.report.page import write_comparison, write_report
from kdfast.runs.folder import read_run
from kdfast.runs.summary import SummaryRow, outcome, paired_difference, summary_rows, verdict

__all__ = [
    "SummaryRow",
    "outcome",
    "paired_difference",
    "read_run",
    "summary_rows",
    "verdict",
    "write_comparison",
    "write_report",
]
