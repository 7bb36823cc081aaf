"""Files that are either the old version or the new one, never half of one."""

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary path in the same folder that becomes `path` when the block ends well, and vanishes otherwise.

    Raises:
        OSError: the folder cannot be made or written, or the disk is full; what was at `path` is still there.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # in the same folder, since only within a file system is a rename atomic; the same ending, since some writers go by it
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}.", suffix=path.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        _flush(temporary)
        temporary.chmod(0o666 & ~_umask())  # mkstemp makes files private
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _flush(path.parent)  # the rename itself


def check_writable(path: Path, option: str, *, folder: bool = False) -> None:
    """Finds what stands against a file (or a folder) at `path`, before the work whose outcome is to go there; makes nothing.

    Args:
        path: need not be there, nor its parents.
        option: that gave the path, for messages.
        folder: whether `path` is to be a folder.

    Raises:
        ValueError: it is a folder where a file is wanted or the reverse, or a folder above it is a file or cannot be written.
    """
    if path.exists() and path.is_dir() != folder:
        raise ValueError(f"{option} {path} is {'a file: name a folder' if folder else 'a folder: name a file'}")
    above = [path, *path.absolute().parents] if folder else path.absolute().parents
    nearest = next(place for place in above if place.exists())
    if not nearest.is_dir():
        raise ValueError(f"{option} {path}: {nearest} is a file, no folder")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise ValueError(f"{option} {path}: the folder {nearest} cannot be written")


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask


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
