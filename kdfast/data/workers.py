"""Worker processes of PyTorch's DataLoader: signals and sudden deaths are the main process's matter."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.data import DataLoader

from kdfast.data.images import import_decoders
from kdfast.data.protocol import DataError


def make_loader(data: Any, workers: int, **options: Any) -> "DataLoader[Any]":
    """A DataLoader without batching, whose workers leave signals to the main process; it draws nothing from the default generator."""
    if workers:
        import_decoders()  # once, before the workers are forked: each of them would take seconds
    return DataLoader(
        data,
        batch_size=None,
        num_workers=workers,
        worker_init_fn=_leave_signals_to_main_process if workers else None,
        generator=torch.Generator(),  # DataLoader draws a number an epoch
        **options,
    )


def iterate(loader: "DataLoader[Any]") -> Iterator[Any]:
    """The loader's items.

    Raises:
        DataError: a worker died.
    """
    try:
        with _hold_signals():
            items = iter(loader)
        yield from items
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        cause = "a process that reads images died, often for lack of memory or shared memory; try fewer workers"
        raise DataError(f"{cause} ({str(error).splitlines()[0]})") from None


@contextmanager
def _hold_signals() -> Iterator[None]:
    """Blocks the signals that end a run until the block has ended; workers inherit that until they have their own handling."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _leave_signals_to_main_process(_: int) -> None:
    """In a worker: signals to the whole process group are for the main process, which saves and stops the workers."""
    for name in ("SIGINT", "SIGHUP"):
        if hasattr(signal, name):  # Windows has no SIGHUP
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # on Linux
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        threading.Thread(target=_end_when_main_process_asks, daemon=True).start()


def _end_when_main_process_asks() -> None:
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != os.getppid():
        pass  # from another sender: the signal has reached the main process too
    os._exit(0)
