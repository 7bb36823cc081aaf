"""One look at every image file before anything trains: which are bad and why, how large the others are, and who can decode them.

A file is decoded in full, since half of the damaged ones have a sound header. That costs the time of an epoch's decoding, once: what
was found is kept with the file's size and time of modification, and while these stay the file is not opened again.
"""

import hashlib
import json
import multiprocessing
import os
import signal
import stat
import threading
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from kdfast import files
from kdfast.data.datasets import cache_folder
from kdfast.data.images import PLAIN, decode_kind
from kdfast.data.protocol import DataError
from kdfast.data.splits import ImageData, Split
from kdfast.machine import cores

VERSION = 1
"""Of the files that keep what was found, and of what decode_kind() says: to be raised where either changes."""
ALONE = 10.0
"""Seconds of decoding for which no other processes are started: importing torch takes them some of these."""
SAVE_EVERY = 60.0
"""Seconds of decoding that a crash may cost."""
CHUNK = 32
"""Files that a process gets at a time."""
NAMED = 20
"""Bad files that are named in full."""

Progress = Callable[[int, int], None]
"""Called with the files decoded so far, and all that are to be decoded."""

_SIZE, _TIME, _HEIGHT, _WIDTH, _TEXT = range(5)  # columns of a table of files; the last is a position among kinds and reasons


@dataclass(frozen=True, eq=False)
class Checked:
    """What n image files are.

    Attributes:
        sizes: int32 [n, 2], height and width; zeros where the file is bad.
        kinds: n formats, "jpeg" where every JPEG decoder sees the same image; "" where the file is bad.
        bad: reason of every bad file, by its path, in the order of the paths.
        decoded: how many files were opened now; the others were known.
    """

    sizes: Tensor
    kinds: tuple[str, ...]
    bad: Mapping[str, str]
    decoded: int


def check(paths: Sequence[str], *, workers: int | None = None, cache: bool = True, progress: Progress | None = None) -> Checked:
    """Decodes every file that is not known yet.

    What takes a few seconds is done in this process, more in others, which import the main module anew: a script then needs its
    `if __name__ == "__main__"`.

    Args:
        paths: n file names; one may come twice.
        workers: processes; None: one a core; 1: this process alone.
        cache: use what earlier checks have found, and keep what this one finds, in ~/.cache/kdfast.
        progress: called now and then; what it raises ends the check, and what was found until then is kept.

    Raises:
        DataError: workers is not positive, or a process died.
    """
    if workers is not None and workers < 1:
        raise DataError(f"workers must be at least 1, got {workers}")
    absolute = [os.path.abspath(path) for path in paths]
    place = {name: i for i, name in enumerate(dict.fromkeys(absolute))}
    record = _Record(list(place), cache=cache)
    pending = record.unknown()
    if pending:
        try:
            _decode(record, pending, workers or cores(), progress)
        finally:
            record.save()
    table = record.table[np.array([place[name] for name in absolute], np.int64)]
    good = table[:, _HEIGHT] > 0
    texts = [record.texts[text] for text in table[:, _TEXT].tolist()]
    return Checked(
        torch.from_numpy(table[:, [_HEIGHT, _WIDTH]].astype(np.int32)),
        tuple(text if fine else "" for text, fine in zip(texts, good.tolist())),
        {paths[i]: texts[i] for i in np.flatnonzero(~good).tolist()},
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
    """The data set without its bad files, with `sizes` and `plain` of all others; images in memory pass untouched.

    Args:
        data: of kdfast.data.load().
        max_bad_files: how many bad files are left out without complaint.
        workers: processes; None: one a core.
        progress: as check() calls it.
        say: gets a line on the bad files that were left out.
        list_to: a file for all bad files and their reasons, a line each with a tab between; written where there are any.

    Raises:
        DataError: more files are bad, or a class has no others.
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
        raise DataError(f"{data.name}: {count}, where --max-bad-files allows {max_bad_files:,}: {_named(bad, 5)}")
    if bad:
        say(f"{data.name}: left out {len(bad):,} bad image {'file' if len(bad) == 1 else 'files'}: {_named(bad, NAMED)}")
    plain = torch.tensor([kind == PLAIN for kind in checked.kinds])
    lengths = [len(split) for split in splits.values()]
    made = {
        key: _good(replace(split, sizes=sizes, plain=alike))
        for (key, split), sizes, alike in zip(splits.items(), checked.sizes.split(lengths), plain.split(lengths))
    }
    train, val, test = (made.get(id(split), split) for split in (data.train, data.val, data.test))
    return replace(data, train=train, val=val, test=test)


def _good(split: Split) -> Split:
    assert split.sizes is not None  # just filled in
    good = split.sizes[:, 0] > 0
    return split if good.all() else split.subset(good.nonzero().flatten())


def _named(bad: Mapping[str, str], shown: int) -> str:
    """'a.jpg (reason), b.jpg (reason) and 7 more'."""
    more = f" and {len(bad) - shown:,} more" if len(bad) > shown else ""
    return ", ".join(f"{path} ({reason})" for path, reason in list(bad.items())[:shown]) + more


# ---- decoding -------------------------------------------------------------------------------------------------------------------


class _Look(NamedTuple):
    """What one file is: its size in pixels and its kind, or zeros and the reason why it is bad."""

    height: int
    width: int
    text: str
    lasting: bool
    """Whether it is so until the file changes; a file that could not be opened may be readable next time."""


def _look(path: str) -> _Look:
    try:
        image, kind = decode_kind(path)
    except DataError as error:
        return _Look(0, 0, str(error).removeprefix(f"{path}: "), not isinstance(error.__cause__, OSError))
    return _Look(image.shape[1], image.shape[2], kind, True)


def _looks(paths: list[str]) -> list[_Look]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what Pillow only warns about is an image
        return [_look(path) for path in paths]


def _decode(record: "_Record", pending: list[int], workers: int, progress: Progress | None) -> None:
    """Fills in the rows `pending`."""
    start, done = time.monotonic(), 0

    def alone() -> bool:
        spent = time.monotonic() - start
        return workers == 1 or spent < ALONE / 10 or (done > 0 and spent / done * (len(pending) - done) < ALONE)

    def count(rows: list[int], looks: list[_Look]) -> None:
        nonlocal done
        record.put(rows, looks)
        done += len(rows)
        if progress is not None:
            progress(done, len(pending))

    while done < len(pending) and alone():
        count(pending[done : done + 1], _looks([record.names[pending[done]]]))
    if done == len(pending):
        return
    rest = pending[done:]
    # forked from a process without threads: a fork of this one could inherit a lock that one of torch's threads holds
    methods = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    if "forkserver" in methods:
        context.set_forkserver_preload([__name__, "torchvision.io", "PIL.Image"])  # imported once, not by each
    pool = ProcessPoolExecutor(min(workers, -(-len(rest) // CHUNK)), context, _begin_worker)
    try:
        tasks = {}
        for k in range(0, len(rest), CHUNK):
            rows = rest[k : k + CHUNK]
            tasks[pool.submit(_looks, [record.names[i] for i in rows])] = rows
        for task in as_completed(tasks):
            count(tasks[task], task.result())
    except BrokenProcessPool:
        if progress is not None:
            progress(done, len(pending))  # a signal to all processes has reached the caller as well, who may know better
        raise DataError("a process that checks image files died, often for want of memory; try fewer workers") from None
    finally:
        pool.shutdown(cancel_futures=True)


def _begin_worker() -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the main process, which ends the pool
    threading.Thread(target=_end_with_the_main_process, daemon=True).start()


def _end_with_the_main_process() -> None:
    """A worker whose main process was killed would wait for work for ever: it holds both ends of that pipe."""
    parent = multiprocessing.parent_process()
    assert parent is not None  # this is a worker
    parent.join()
    os._exit(1)


# ---- what is known of files -----------------------------------------------------------------------------------------------------


def _stamp(path: str) -> tuple[int, int]:
    """Size in bytes and time of modification in ns; -1 where there is no regular file to have them."""
    try:
        status = os.stat(path)
    except OSError:
        return -1, -1
    return (status.st_size, status.st_mtime_ns) if stat.S_ISREG(status.st_mode) else (-1, -1)


def _file(root: str) -> Path:
    return cache_folder() / "checks" / f"{hashlib.sha256(os.fsencode(root)).hexdigest()[:24]}.npz"


def _read(root: str) -> tuple[list[str], Any, list[str]]:
    """Names, table (int64 [n, 5]) and texts of the cache's file for the files below `root`.

    Raises:
        Exception: of nearly any kind; the file is missing, damaged (the archive has checksums) or another version's.
    """
    with np.load(_file(root), allow_pickle=False) as content:
        facts = json.loads(content["facts"].tobytes())
        if (facts["version"], facts["root"]) != (VERSION, root):
            raise ValueError("another version's, or another folder's")
        prefix = os.path.join(root, "")
        names = [prefix + name for name in os.fsdecode(content["names"].tobytes()).split("\0")]
        table, texts = content["table"], facts["texts"]
    if table.shape != (len(names), 5) or not 0 <= table[:, _TEXT].min() <= table[:, _TEXT].max() < len(texts):
        raise ValueError("its parts do not fit")
    return names, table, texts


class _Record:
    """What is known of some files: the part of the cache that is about them, and what a check adds to it.

    The cache has one file for each folder that was the deepest one to hold all files of a check: an .npz with the names, one after
    another, the table and, as JSON, the texts. A million files take a second or so. Of two processes that write it the last one wins,
    and what the other found is found again.
    """

    def __init__(self, names: list[str], *, cache: bool) -> None:
        self.names = names
        self.table = np.zeros((len(names), 5), np.int64)
        self.texts: list[str] = []
        self._lasting = np.zeros(len(names), bool)  # rows to be kept
        self._root: str | None = None
        self._others: tuple[list[str], Any] = [], self.table[:0]
        self.table[:, [_SIZE, _TIME]] = np.array([_stamp(name) for name in names], np.int64).reshape(-1, 2)
        if cache and names:
            # what the first and the last in order begin with, all begin with
            self._root = os.path.commonpath([os.path.dirname(min(names)), os.path.dirname(max(names))])
            self._recall(self._root)
        self._text = {text: i for i, text in enumerate(self.texts)}
        self._saved = time.monotonic()

    def _recall(self, root: str) -> None:
        try:
            known, table, self.texts = _read(root)
        except Exception:  # as _read says; then nothing is known
            return
        row_of = {name: row for row, name in enumerate(known)}
        rows = np.array([row_of.pop(name, -1) for name in self.names])
        others = list(row_of.values())
        self._others = list(row_of), table[others]
        self._lasting = (rows >= 0) & (self.table[:, :_HEIGHT] == table[rows, :_HEIGHT]).all(axis=1)
        self.table[self._lasting] = table[rows[self._lasting]]

    def unknown(self) -> list[int]:
        """The rows of files that are new, or not as they were."""
        return np.flatnonzero(~self._lasting).tolist()

    def put(self, rows: list[int], looks: list[_Look]) -> None:
        """Fills in rows, and saves where the last time is long ago."""
        for row, look in zip(rows, looks):
            text = self._text.setdefault(look.text, len(self.texts))
            if text == len(self.texts):
                self.texts.append(look.text)
            self.table[row, _HEIGHT:] = look.height, look.width, text
            self._lasting[row] = look.lasting and self.table[row, _SIZE] >= 0
        if time.monotonic() - self._saved > SAVE_EVERY:
            self.save()

    def save(self) -> None:
        """Writes what lasts; where the cache cannot be written, the next check takes as long as this one, no more."""
        self._saved = time.monotonic()
        rows = np.flatnonzero(self._lasting)
        if self._root is None or not len(rows):
            return
        start = len(os.path.join(self._root, ""))
        names = [self.names[row] for row in rows.tolist()] + self._others[0]
        facts = json.dumps({"version": VERSION, "root": self._root, "texts": self.texts})
        try:
            with files.replacing(_file(self._root)) as temporary:
                np.savez(
                    temporary,
                    facts=np.frombuffer(facts.encode(), np.uint8),
                    names=np.frombuffer(b"\0".join(os.fsencode(name[start:]) for name in names), np.uint8),
                    table=np.concatenate([self.table[rows], self._others[1]]),
                )
        except OSError:
            pass
