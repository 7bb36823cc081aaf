"""Tables on the terminal."""

from collections.abc import Iterable, Sequence

from rich import box
from rich.table import Table


def make_table(columns: Sequence[str], rows: Iterable[Sequence[str]], *, left: int = 1) -> Table:
    """Returns a table whose first `left` columns are aligned to the left and fold, and all others to the right."""
    table = Table(box=box.SIMPLE_HEAD)
    for place, column in enumerate(columns):
        table.add_column(column, justify="left" if place < left else "right", overflow="fold" if place < left else "ellipsis")
    for row in rows:
        table.add_row(*row)
    return table
