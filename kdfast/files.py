"""Atomic writes: a file holds either its old content or its new content, never a part."""

import json
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary path in the same folder. It becomes `path` when the block succeeds, and is deleted otherwise.

    Raises:
        OSError: the folder cannot be made or written, or the disk is full; `path` keeps its old content.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # same folder: a rename is atomic within one file system only; same suffix: some writers choose the format by it
    temporary = path.with_name(f".{path.stem}.{uuid.uuid4().hex[:8]}{path.suffix}")
    try:
        yield temporary
        _flush(temporary, os.O_RDWR)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if os.name == "posix":  # Windows cannot open a folder
        _flush(path.parent, os.O_RDONLY)  # the rename itself


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


def write_bytes(path: Path, content: bytes) -> None:
    """Writes `content` to `path` atomically."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def write_text(path: Path, text: str) -> None:
    """Writes `text` to `path` atomically, as UTF-8."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """Writes `value` as JSON to `path` atomically."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def write_torch(path: Path, value: Any) -> None:
    """Writes tensors and plain values with torch.save to `path` atomically."""
    with replacing(path) as temporary:
        torch.save(value, temporary)
