"""The report of a run: numbers, curves and one self-contained page, made from the files of a run folder alone."""

from kdfast.report.page import (
    SummaryRow,
    outcome,
    paired_difference,
    read_run,
    summary_rows,
    verdict,
    write_comparison,
    write_report,
)

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
