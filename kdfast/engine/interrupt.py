"""Ctrl-C, SIGTERM and SIGHUP become a flag that the loop reads between steps; a second Ctrl-C stops at once."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupted(Exception):
    """A signal stopped the run, after it saved its state.

    Example:
        >>> import signal
        >>> from kdfast.engine import Interrupted
        >>> print(Interrupted(signal.SIGTERM))
        stopped by SIGTERM
    """

    def __init__(self, signal_number: int):
        super().__init__(f"stopped by {signal.Signals(signal_number).name}")
        self.signal_number = signal_number


class StopRequest:
    """The signal received so far; true once there is one."""

    signal_number: int | None = None

    def __bool__(self) -> bool:
        return self.signal_number is not None


@contextmanager
def catching() -> Iterator[StopRequest]:
    """Turns SIGINT, SIGTERM and SIGHUP into a StopRequest within the block, and restores the handlers after it.

    A SIGHUP that is ignored, as under nohup, stays so.

    Example:
        >>> import signal
        >>> from kdfast.engine import catching
        >>> with catching() as stop:
        ...     signal.raise_signal(signal.SIGTERM)
        ...     print(bool(stop), stop.signal_number == signal.SIGTERM)
        True True
    """
    request = StopRequest()

    def handler(number: int, frame: FrameType | None) -> None:
        if request.signal_number is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        request.signal_number = number

    numbers = [signal.SIGINT, signal.SIGTERM]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # Windows has none
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield request
    finally:
        for number, old in before.items():
            signal.signal(number, old)
