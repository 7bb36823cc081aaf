"""Atomic writes: a file holds either its old content or its new content, never a part. Sealed files end with a checksum of the rest."""

import hashlib
import io
import json
import os
import re
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch

PARTIAL = re.compile(r"\..+\.[0-9a-f]{8}\.part(\.\w+)?")  # names of temporary files


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary path in the same folder. It becomes `path` when the block succeeds, and is deleted otherwise.

    Raises:
        OSError: the folder cannot be made or written, or the disk is full; `path` keeps its old content.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # same folder: a rename is atomic within one file system only; same suffix: some writers choose the format by it
    temporary = path.with_name(f".{path.stem}.{uuid.uuid4().hex[:8]}.part{path.suffix}")
    try:
        yield temporary
        _flush(temporary, os.O_RDWR)
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno:
            error.filename = error.filename or str(path)  # a full disk's error names none
        raise
    if os.name == "posix":  # Windows cannot open a folder
        _flush(path.parent, os.O_RDONLY)  # the rename itself


def remove_partial(paths: Iterable[Path]) -> None:
    """Deletes those of the files that are temporary ones of a killed process."""
    for path in paths:
        if PARTIAL.fullmatch(path.name):
            path.unlink()


def check_writable(path: Path, option: str, *, folder: bool = False) -> None:
    """Checks that a file (or a folder) can be written at `path`, before long work starts; creates nothing.

    Args:
        path: it and its parents may be missing.
        option: the option that gave the path, for messages.
        folder: True if `path` will be a folder.

    Raises:
        ValueError: `path` is a folder instead of a file or the reverse, or a folder above it is a file or cannot be written.
    """
    if path.exists() and path.is_dir() != folder:
        raise ValueError(f"{option} {path} is {'a file: name a folder' if folder else 'a folder: name a file'}")
    above = [path, *path.absolute().parents] if folder else path.absolute().parents
    nearest = next(place for place in above if place.exists())
    if not nearest.is_dir():
        raise ValueError(f"{option} {path}: {nearest} is a file, no folder")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise ValueError(f"{option} {path}: the folder {nearest} cannot be written")


def _flush(path: Path, mode: int) -> None:
    descriptor = os.open(path, mode)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_bytes(path: Path, *parts: bytes | memoryview) -> None:
    """Writes the parts to `path` atomically."""
    with replacing(path) as temporary, temporary.open("wb") as file:
        for part in parts:
            file.write(part)


def write_text(path: Path, text: str) -> None:
    """Writes `text` to `path` atomically, as UTF-8."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """Writes `value` as JSON to `path` atomically."""
    write_text(path, json.dumps(value, indent=1) + "\n")


class _Summed:
    """A file that sums up what is written to it, and keeps a failure's reason: torch.save reports neither its number nor its text."""

    def __init__(self, file: IO[bytes]):
        self._file, self._sum = file, hashlib.sha256()
        self.error: OSError | None = None

    def write(self, part: bytes) -> int:
        self._sum.update(part)
        try:
            return self._file.write(part)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self._file.flush()

    @property
    def seal(self) -> bytes:
        return self._sum.hexdigest().encode()


def write_torch(path: Path, value: Any) -> None:
    """Writes tensors and plain values with torch.save to `path` atomically. 64 bytes follow that torch.load skips: the rest's SHA-256."""
    with replacing(path) as temporary, temporary.open("wb") as file:
        summed = _Summed(file)
        try:
            torch.save(value, summed)  # type: ignore[arg-type]
        except RuntimeError as error:
            raise summed.error or error from None
        file.write(summed.seal)


def read_torch(path: Path) -> Any:
    """Reads what `write_torch` wrote, to the CPU.

    Raises:
        ValueError: the file is damaged.
    """
    content = memoryview(path.read_bytes())
    if hashlib.sha256(content[:-64]).hexdigest().encode() != content[-64:]:
        raise ValueError(f"{path} is damaged")
    return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)


def write_sealed_json(path: Path, value: dict[str, Any]) -> None:
    """Writes `value` as JSON to `path` atomically, with its checksum as the last entry."""
    write_json(path, value | {"sha256": checksum(value)})


def read_sealed_json(path: Path) -> dict[str, Any]:
    """Reads what `write_sealed_json` wrote.

    Raises:
        ValueError: the file is damaged or has been edited.
    """
    value = read_json(path)
    if value.pop("sha256", None) != checksum(value):
        raise ValueError(f"{path} is damaged or has been edited")
    return value


def read_json(path: Path) -> dict[str, Any]:
    """Reads an object of JSON.

    Raises:
        ValueError: the file holds none.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # JSON's and UTF-8's errors are kinds of it
        raise ValueError(f"{path} is damaged: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} is damaged: it holds no object")
    return value


def sha256(path: Path) -> str:
    """Returns the checksum of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def checksum(value: Any) -> str:
    """Returns the checksum of a value as JSON, hexadecimal."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
