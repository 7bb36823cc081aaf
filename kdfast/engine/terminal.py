"""The terminal of all commands. Names of files, classes and folders are printed as they are: nothing in them is markup."""

from typing import Any

from rich.console import Console
from rich.text import Text

from kdfast.text import printable


class Terminal(Console):
    """A console that reads no markup, escapes control characters and, where its output goes into a file or a pipe, wraps no line."""

    def __init__(self, *, soft_wrap: bool = True, **options: Any) -> None:
        super().__init__(soft_wrap=soft_wrap, markup=False, emoji=False, highlight=False, **options)
        if not self.is_terminal and "width" not in options:
            self.width = 10_000

    def render_str(self, text: str, **options: Any) -> Text:
        """Returns the text with its control characters escaped."""
        return super().render_str(printable(text), **options)
