"""metrics.jsonl: one line an epoch. Lines written after the last checkpoint of a killed run are cut off on resume."""

import contextlib
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any


class Journal:
    """The lines of a run.

    Args:
        path: metrics.jsonl; made with the first line.
    """

    def __init__(self, path: Path):
        self._path = path

    def _read(self) -> bytes:
        return self._path.read_bytes() if self._path.exists() else b""

    @property
    def size(self) -> int:
        """Bytes so far."""
        return self._path.stat().st_size if self._path.exists() else 0

    def state(self) -> list[Any]:
        """Size and checksum; checkpoints and finished stages remember them."""
        content = self._read()
        return [len(content), hashlib.sha256(content).hexdigest()]

    def check(self, state: Sequence[Any], source: Path) -> None:
        """Checks that the file begins as it was at `state`, which `source` remembers.

        Raises:
            ValueError: it does not.
        """
        content = self._read()[: state[0]]
        if [len(content), hashlib.sha256(content).hexdigest()] != list(state):
            raise ValueError(
                f"{self._path} is not as the run wrote it ({source} knows {state[0]:,} bytes of it): put it back, or begin again with "
                "another --out"
            )

    def stages(self, size: int) -> set[str]:
        """The stages that the first `size` bytes tell of."""
        return {json.loads(line)["stage"] for line in self._read()[:size].splitlines()}

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
        except OSError as error:
            with contextlib.suppress(OSError):
                self.cut(before)
            error.filename = error.filename or str(self._path)  # a full disk's error names none
            raise

    def lines(self) -> list[dict[str, Any]]:
        """All lines."""
        return [json.loads(line) for line in self._read().splitlines()]
