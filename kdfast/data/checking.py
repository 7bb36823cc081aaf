"""A check of every image file before training: the bad ones and their reasons, the sizes of the others, and who can decode them.

A file is decoded in full, because half of the damaged ones have a sound header. This takes the decoding time of one epoch, once: the
outcome is kept with the file's size and time of modification, and a file that has not changed is not opened again.
"""

import gzip
import hashlib
import json
import os
import stat
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from kdfast import files
from kdfast.data.datasets import cache_folder
from kdfast.data.images import PLAIN, decode_with_kind, read_file
from kdfast.data.protocol import DataError
from kdfast.data.splits import ImageData, Split
from kdfast.data.workers import iterate, make_loader
from kdfast.machine import cores, package_version
from kdfast.ops import checks

VERSION = 5
"""Version of the cache files and of the kinds of decode_with_kind(); raise it when either changes."""
FEW = 500
"""Files that are decoded in this process: for them no others are started."""
CHUNK = 32
"""Files that a process gets at a time, and between two calls of progress()."""
DARK = 15
"""An image without a brighter value is called nearly black."""
SHOWN = 20
"""Bad files that are named in full."""

Progress = Callable[[int, int], None]
"""Called with the number of files decoded so far and the number of all files to decode."""


@dataclass(frozen=True, eq=False)
class Checked:
    """The outcome of a check of n image files.

    Attributes:
        sizes: int32 [n, 2], height and width; zeros for a bad file.
        kinds: n formats, "jpeg" if every JPEG decoder sees the same image; "" for a bad file.
        digests: n checksums of the files' bytes; "" for a bad file.
        bad: reason of every bad file, by its path, in the order of the paths.
        dark: images that come out nearly black: no value above 15 of 255. A format that scales its levels otherwise is often the cause.
        decoded: the number of files that were opened; the others were known.

    Example:
        >>> kdfast.data.check(["absent.png"]).bad
        {'absent.png': 'the image cannot be opened: No such file or directory'}
    """

    sizes: Tensor
    kinds: tuple[str, ...]
    digests: tuple[str, ...]
    bad: Mapping[str, str]
    dark: tuple[str, ...]
    decoded: int


def check(paths: Sequence[str], *, workers: int | None = None, cache: bool = True, progress: Progress | None = None) -> Checked:
    """Decodes every file that is not known yet.

    More than 500 files are decoded by several processes. Where these import the main module again (Windows, macOS, and Linux from Python
    3.14), a script has to call this below `if __name__ == "__main__":`.

    Args:
        paths: n file names; one may come twice.
        workers: processes; None: one a core; 1: this process alone.
        cache: use the outcomes of earlier checks, and keep those of this one, in ~/.cache/kdfast.
        progress: called now and then; an exception from it ends the check, and the outcomes until then are kept.

    Raises:
        DataError: workers is not positive, or a process died.

    Example:
        >>> checked = kdfast.data.check([])
        >>> checked.sizes.shape, checked.bad
        (torch.Size([0, 2]), {})
    """
    if isinstance(paths, str) or not isinstance(paths, Sequence):
        raise TypeError(f"check: paths must be a list of paths, got {paths!r}")
    if workers is not None and (not isinstance(workers, int) or workers < 1):
        raise DataError(f"workers must be at least 1, got {workers}")
    names = [os.path.abspath(path) for path in paths]
    stamps = {name: _read_stamp(name) for name in names}
    path = _locate_cache(stamps) if cache and stamps else None
    known = _read_cache(path) if path is not None else {}
    found = {name: known[name] for name, stamp in stamps.items() if name in known and known[name][:2] == stamp != (-1, -1)}
    pending = [name for name in stamps if name not in found]
    chunks = [pending[k : k + CHUNK] for k in range(0, len(pending), CHUNK)]
    alone = workers == 1 or len(pending) <= FEW
    loader = make_loader(chunks, 0 if alone else min(workers or cores(), len(chunks)), collate_fn=_decode)
    done = 0
    try:
        for chunk, outcomes in zip(chunks, iterate(loader)):
            found.update(zip(chunk, outcomes))
            done += len(chunk)
            if progress is not None:
                progress(done, len(pending))
    finally:
        if path is not None and pending:
            _write_cache(path, known | found)
    outcomes = [found[name] for name in names]
    return Checked(
        torch.tensor([(outcome.height, outcome.width) for outcome in outcomes], dtype=torch.int32).reshape(-1, 2),
        tuple(outcome.text if outcome.height else "" for outcome in outcomes),
        tuple(outcome.digest for outcome in outcomes),
        {path: outcome.text for path, outcome in zip(paths, outcomes) if not outcome.height},
        tuple(path for path, outcome in zip(paths, outcomes) if outcome.dark),
        len(pending),
    )


def usable(
    data: ImageData,
    *,
    max_bad_files: int = 0,
    workers: int | None = None,
    say: Callable[[str], None] = print,
    progress: Progress | None = None,
) -> ImageData:
    """The data set without its bad files, with `sizes` and `plain` of all others; images in memory stay as they are.

    It starts processes as check() does.

    Args:
        data: of kdfast.data.load().
        max_bad_files: how many bad files may be left out without an error.
        workers: processes; None: one a core.
        progress: as check() calls it.
        say: gets a line about the bad files that were left out, and one about images that come out nearly black.

    Raises:
        DataError: more files are bad, or a class has no others.

    Example:
        >>> data = kdfast.data.load("digits")
        >>> kdfast.data.usable(data).train is data.train
        True
    """
    checks.is_a("usable: data", data, ImageData)
    if not isinstance(max_bad_files, int) or max_bad_files < 0:
        raise DataError(f"max_bad_files must be at least 0, got {max_bad_files}")
    found = {
        split: check(split.paths or (), workers=workers, progress=progress)
        for split in dict.fromkeys((data.train, data.val, data.test))  # val may be test
    }
    bad = {path: reason for checked in found.values() for path, reason in checked.bad.items()}
    if len(bad) > max_bad_files:
        count = "1 image file is bad" if len(bad) == 1 else f"{len(bad):,} image files are bad"
        raise DataError(f"{data.name}: {count}, where --max-bad-files allows {max_bad_files:,}: {_list_bad(bad, 5)}")
    if bad:
        say(f"{data.name}: left out {len(bad):,} bad image {'file' if len(bad) == 1 else 'files'}: {_list_bad(bad, SHOWN)}")
    if dark := describe_dark([path for checked in found.values() for path in checked.dark]):
        say(f"{data.name}: {dark}")
    good = {split: _drop_bad(split, checked) for split, checked in found.items()}
    return replace(data, train=good[data.train], val=good[data.val], test=good[data.test])


def _drop_bad(split: Split, checked: Checked) -> Split:
    if split.paths is None:
        return split
    plain = torch.tensor([kind == PLAIN for kind in checked.kinds])
    return replace(split, sizes=checked.sizes, plain=plain, digests=checked.digests).subset(checked.sizes[:, 0].nonzero().flatten())


def _list_bad(bad: Mapping[str, str], shown: int) -> str:
    """'a.jpg (reason), b.jpg (reason) and 7 more'."""
    more = f" and {len(bad) - shown:,} more" if len(bad) > shown else ""
    return ", ".join(f"{path} ({reason})" for path, reason in list(bad.items())[:shown]) + more


def describe_dark(paths: Sequence[str]) -> str:
    """For example "2 images come out nearly black, ...: a.png, b.png"; empty if there are none."""
    if not paths:
        return ""
    count = "1 image comes" if len(paths) == 1 else f"{len(paths):,} images come"
    cause = f"no value is above {DARK} of 255, as with 12 bits in files of 16"
    return f"{count} out nearly black ({cause}): {', '.join(paths[:5])}" + (", ..." if len(paths) > 5 else "")


# ---- decoding -------------------------------------------------------------------------------------------------------------------


class _Outcome(NamedTuple):
    """One decoded file."""

    bytes: int  # of the file; -1: it could not be opened, so another attempt may succeed
    time: int  # of its modification, ns
    height: int  # 0: it is bad
    width: int
    text: str  # its kind, or the reason why it is bad
    digest: str = ""  # of its bytes
    dark: bool = False  # no value above DARK


def _decode(paths: list[str]) -> list[_Outcome]:
    outcomes = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a file that Pillow only warns about is an image
        for path in paths:
            stamp = _read_stamp(path)
            try:
                data = read_file(path)
                image, kind = decode_with_kind(path, data)
                digest = hashlib.sha256(data).hexdigest()[:16]
                outcomes.append(_Outcome(*stamp, image.shape[1], image.shape[2], kind, digest, bool(image.amax() <= DARK)))
            except DataError as error:
                if isinstance(error.__cause__, OSError):
                    stamp = -1, -1
                outcomes.append(_Outcome(*stamp, 0, 0, str(error).removeprefix(f"{path}: ")))
    return outcomes


def _read_stamp(path: str) -> tuple[int, int]:
    """Size in bytes and time of the last change in ns; -1 if there is no such regular file."""
    try:
        status = os.stat(path)
    except OSError:
        return -1, -1
    # a changed file may keep its time of modification, but not that of its last change, which on Windows is when it was made
    return (status.st_size, max(status.st_mtime_ns, status.st_ctime_ns)) if stat.S_ISREG(status.st_mode) else (-1, -1)


# ---- known files ----------------------------------------------------------------------------------------------------------------


def _locate_cache(names: Collection[str]) -> Path:
    """The file of outcomes for the deepest folder that holds all these files (absolute paths)."""
    # common to all names, if to the first and the last; os.path.commonpath refuses files on two drives
    folder = os.path.dirname(os.path.commonprefix([min(names), max(names)]))  # noqa: RUF071
    return cache_folder() / "checks" / f"{hashlib.sha256(os.fsencode(folder)).hexdigest()[:24]}.json.gz"


def _cache_key() -> str:
    """The versions that an outcome depends on."""
    packages = "Pillow", "torchvision", "nvidia-dali-cuda130", "nvidia-dali-cuda120"
    return " ".join(map(str, (VERSION, *map(package_version, packages))))


def _read_cache(path: Path) -> dict[str, _Outcome]:
    """The known outcomes by absolute path; none if the file is missing, damaged or of other versions."""
    try:
        content = json.loads(gzip.decompress(path.read_bytes()))
        return {name: _Outcome(*row) for name, row in content[_cache_key()].items()}
    except Exception:  # a damaged file can raise nearly any exception
        return {}


def _write_cache(path: Path, outcomes: Mapping[str, _Outcome]) -> None:
    """Replaces the file, whose checksum shows damage. If it cannot be written, the next check decodes again."""
    with suppress(OSError):
        files.write_bytes(path, gzip.compress(json.dumps({_cache_key(): outcomes}).encode(), compresslevel=1))
