"""metrics.jsonl: one line an epoch. Lines written after the last checkpoint of a killed run are cut off on resume."""

import contextlib
import json
import os
from pathlib import Path
from typing import Any


class Journal:
    """The lines of a run.

    Args:
        path: metrics.jsonl; made with the first line.
    """

    def __init__(self, path: Path):
        self._path = path

    @property
    def size(self) -> int:
        """Bytes so far; a checkpoint remembers them."""
        return self._path.stat().st_size if self._path.exists() else 0

    def cut(self, size: int) -> None:
        """Removes all lines after the first `size` bytes."""
        if self.size > size:
            os.truncate(self._path, size)

    def append(self, line: dict[str, Any]) -> None:
        """Adds one line, or nothing at all if the disk is full."""
        before = self.size
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError:
            with contextlib.suppress(OSError):
                self.cut(before)
            raise

    def lines(self) -> list[dict[str, Any]]:
        """All lines."""
        return [json.loads(line) for line in self._path.read_text().splitlines()] if self._path.exists() else []
