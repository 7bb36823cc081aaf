"""A check of every image file before training: the bad ones and their reasons, the sizes of the others, and who can decode them.

A file is decoded in full, because half of the damaged ones have a sound header. This takes the decoding time of one epoch, once: the
outcome is kept with the file's size and time of modification, and a file that has not changed is not opened again.
"""

import gzip
import hashlib
import json
import multiprocessing
import os
import signal
import stat
import threading
import time
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from kdfast import files
from kdfast.data.datasets import cache_folder
from kdfast.data.images import PLAIN, decode_with_kind
from kdfast.data.protocol import DataError
from kdfast.data.splits import ImageData, Split
from kdfast.machine import cores

VERSION = 2
"""Version of the cache files and of the kinds of decode_with_kind(); raise it when either changes."""
FEW = 500
"""Files that are decoded in this process: others would take seconds to import torch."""
SAVE_EVERY = 60.0
"""Seconds of decoding that a crash may cost."""
CHUNK = 32
"""Files that a process gets at a time."""
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
        bad: reason of every bad file, by its path, in the order of the paths.
        decoded: the number of files that were opened; the others were known.

    Example:
        >>> kdfast.data.check(["absent.png"]).bad
        {'absent.png': 'the image cannot be opened: No such file or directory'}
    """

    sizes: Tensor
    kinds: tuple[str, ...]
    bad: Mapping[str, str]
    decoded: int


def check(paths: Sequence[str], *, workers: int | None = None, cache: bool = True, progress: Progress | None = None) -> Checked:
    """Decodes every file that is not known yet.

    More than 500 files are decoded by several processes. These import the main module again, so a script needs its
    `if __name__ == "__main__"`.

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
    if workers is not None and workers < 1:
        raise DataError(f"workers must be at least 1, got {workers}")
    names = [os.path.abspath(path) for path in paths]
    stamps = {name: _read_stamp(name) for name in names}
    store = _Cache(stamps if cache else ())
    found = {name: outcome for name, outcome in store.read().items() if outcome[:2] == stamps.get(name)}
    pending = [name for name in stamps if name not in found]
    done = 0

    def put(chunk: list[str], looks: list[_Look]) -> None:
        nonlocal done
        for name, look in zip(chunk, looks):
            found[name] = _Outcome(*stamps[name], look.height, look.width, look.text)
            if look.lasting and stamps[name][0] >= 0:
                store.add(name, found[name])
        done += len(chunk)
        if progress is not None:
            progress(done, len(pending))

    try:
        _decode(pending, workers or cores(), put)
    finally:
        if pending:
            store.save()
    outcomes = [found[name] for name in names]
    return Checked(
        torch.tensor([(outcome.height, outcome.width) for outcome in outcomes], dtype=torch.int32).reshape(-1, 2),
        tuple(outcome.text if outcome.height else "" for outcome in outcomes),
        {path: outcome.text for path, outcome in zip(paths, outcomes) if not outcome.height},
        len(pending),
    )


def usable(
    data: ImageData,
    *,
    max_bad_files: int = 0,
    workers: int | None = None,
    say: Callable[[str], None] = print,
    progress: Progress | None = None,
    list_to: Path | None = None,
) -> ImageData:
    """The data set without its bad files, with `sizes` and `plain` of all others; images in memory stay as they are.

    Args:
        data: of kdfast.data.load().
        max_bad_files: how many bad files may be left out without an error.
        workers: processes; None: one a core.
        progress: as check() calls it.
        say: gets a line about the bad files that were left out.
        list_to: a file for all bad files and their reasons, a line each with a tab between; written if there are any.

    Raises:
        DataError: more files are bad, or a class has no others.

    Example:
        >>> data = kdfast.data.load("digits")
        >>> kdfast.data.usable(data) is data
        True
    """
    if max_bad_files < 0:
        raise DataError(f"max_bad_files must be at least 0, got {max_bad_files}")
    splits = {id(split): split for split in (data.train, data.val, data.test) if split.paths is not None}  # val may be test
    if not splits:
        return data
    checked = check([path for split in splits.values() for path in split.paths or ()], workers=workers, progress=progress)
    bad = checked.bad
    if bad and list_to is not None:
        files.write_text(list_to, "".join(f"{path}\t{reason}\n" for path, reason in bad.items()))
    if len(bad) > max_bad_files:
        count = "1 image file is bad" if len(bad) == 1 else f"{len(bad):,} image files are bad"
        raise DataError(f"{data.name}: {count}, where --max-bad-files allows {max_bad_files:,}: {_list_bad(bad, 5)}")
    if bad:
        say(f"{data.name}: left out {len(bad):,} bad image {'file' if len(bad) == 1 else 'files'}: {_list_bad(bad, SHOWN)}")
    plain = torch.tensor([kind == PLAIN for kind in checked.kinds])
    lengths = [len(split) for split in splits.values()]
    parts = zip(splits.items(), checked.sizes.split(lengths), plain.split(lengths))
    good = {key: _drop_bad(replace(split, sizes=sizes, plain=alike), sizes) for (key, split), sizes, alike in parts}
    train, val, test = (good.get(id(split), split) for split in (data.train, data.val, data.test))
    return replace(data, train=train, val=val, test=test)


def _drop_bad(split: Split, sizes: Tensor) -> Split:
    good = sizes[:, 0] > 0
    return split if good.all() else split.subset(good.nonzero().flatten())


def _list_bad(bad: Mapping[str, str], shown: int) -> str:
    """'a.jpg (reason), b.jpg (reason) and 7 more'."""
    more = f" and {len(bad) - shown:,} more" if len(bad) > shown else ""
    return ", ".join(f"{path} ({reason})" for path, reason in list(bad.items())[:shown]) + more


# ---- decoding -------------------------------------------------------------------------------------------------------------------


class _Look(NamedTuple):
    """One decoded file: its size in pixels and its kind, or zeros and the reason why it is bad."""

    height: int
    width: int
    text: str
    lasting: bool
    """The outcome holds until the file changes. A file that could not be opened may be readable next time."""


def _look_at(paths: list[str]) -> list[_Look]:
    looks = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a file that Pillow only warns about is an image
        for path in paths:
            try:
                image, kind = decode_with_kind(path)
                looks.append(_Look(image.shape[1], image.shape[2], kind, True))
            except DataError as error:
                looks.append(_Look(0, 0, str(error).removeprefix(f"{path}: "), not isinstance(error.__cause__, OSError)))
    return looks


def _decode(names: list[str], workers: int, put: Callable[[list[str], list[_Look]], None]) -> None:
    """Decodes files, and calls put(names, looks) for some of them at a time."""
    if workers == 1 or len(names) <= FEW:
        for name in names:
            put([name], _look_at([name]))
        return
    # forked from a process without threads: a fork of this one could inherit a lock that one of torch's threads holds
    method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    context = multiprocessing.get_context(method)
    if method == "forkserver":
        context.set_forkserver_preload([__name__, "torchvision.io", "PIL.Image"])  # imported once, not by each
    chunks = [names[k : k + CHUNK] for k in range(0, len(names), CHUNK)]
    pool = ProcessPoolExecutor(min(workers, len(chunks)), context, _begin_worker)
    try:
        tasks = {pool.submit(_look_at, chunk): chunk for chunk in chunks}
        for task in as_completed(tasks):
            put(tasks[task], task.result())
    except BrokenProcessPool:
        put([], [])  # a signal to all processes has reached the caller too, whose progress() may know the true reason
        raise DataError("a process that checks image files died, often for lack of memory; try fewer workers") from None
    finally:
        pool.shutdown(cancel_futures=True)


def _begin_worker() -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the main process, which ends the pool
    threading.Thread(target=_end_with_main_process, daemon=True).start()


def _end_with_main_process() -> None:
    """Ends a worker whose main process was killed; it would wait for work for ever, since it holds both ends of that pipe."""
    parent = multiprocessing.parent_process()
    assert parent is not None  # this is a worker
    parent.join()
    os._exit(1)


# ---- known files ----------------------------------------------------------------------------------------------------------------


class _Outcome(NamedTuple):
    """One file in the cache."""

    bytes: int  # of the file; -1: no regular file
    time: int  # of its modification, ns
    height: int  # 0: it is bad
    width: int
    text: str  # its kind, or the reason why it is bad


def _read_stamp(path: str) -> tuple[int, int]:
    """Size in bytes and time of modification in ns; -1 if there is no such regular file."""
    try:
        status = os.stat(path)
    except OSError:
        return -1, -1
    return (status.st_size, status.st_mtime_ns) if stat.S_ISREG(status.st_mode) else (-1, -1)


class _Cache:
    """The outcomes of earlier checks, by absolute path.

    There is one file for each folder that was the deepest one to hold all files of a check: compressed JSON, whose checksum shows damage.
    If two processes write it, the last one wins, and the next check repeats the work of the other.

    Args:
        names: absolute paths of the files to check; empty: keep nothing.
    """

    def __init__(self, names: Collection[str]) -> None:
        self._outcomes: dict[str, _Outcome] = {}
        self._saved = time.monotonic()
        ends = [os.path.dirname(end(names)) for end in (min, max)] if names else []
        self._root = os.path.commonpath(ends) if ends else ""  # the beginning of the first and the last name is that of all
        self._path = cache_folder() / "checks" / f"{hashlib.sha256(os.fsencode(self._root)).hexdigest()[:24]}.json.gz"

    def read(self) -> Mapping[str, _Outcome]:
        """The known outcomes; none if the file is missing, damaged or of another version or folder."""
        try:
            content = json.loads(gzip.decompress(self._path.read_bytes()))
            if self._root and (content["version"], content["root"]) == (VERSION, self._root):
                prefix, texts = os.path.join(self._root, ""), content["texts"]
                *columns, text = content["columns"]
                outcomes = map(_Outcome, *columns, (texts[k] for k in text))
                self._outcomes = dict(zip((prefix + name for name in content["names"]), outcomes))
        except Exception:  # a damaged file can raise nearly any exception
            pass
        return self._outcomes

    def add(self, name: str, outcome: _Outcome) -> None:
        """Adds an outcome, and saves all if the last time is long ago."""
        self._outcomes[name] = outcome
        if time.monotonic() - self._saved > SAVE_EVERY:
            self.save()

    def save(self) -> None:
        """Writes the file. If it cannot be written, the next check decodes again."""
        self._saved = time.monotonic()
        if not self._root or not self._outcomes:
            return
        start = len(os.path.join(self._root, ""))
        *columns, text = zip(*self._outcomes.values())
        texts = {text: k for k, text in enumerate(dict.fromkeys(text))}
        content = {
            "version": VERSION,
            "root": self._root,
            "names": [name[start:] for name in self._outcomes],
            "columns": [*columns, [texts[t] for t in text]],  # of numbers: a million files take seconds
            "texts": list(texts),
        }
        with suppress(OSError):
            files.write_bytes(self._path, gzip.compress(json.dumps(content).encode(), compresslevel=1))
