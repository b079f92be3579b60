"""SIGTERM and Ctrl-C, answered at once by a thread, or as exceptions.

Python runs a signal handler only between two instructions of the main thread, which may be inside a compilation or a step for
minutes. The interpreter's wake-up descriptor is written at once, so a thread reads that.

One stop may be two signals: `timeout` of coreutils sends one to its child and then to the group that the child is in, and some
schedulers do likewise. What follows the first one within half a second is the same stop.
"""

import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

__all__ = ["Signals", "answered", "raised"]

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_SAME_SECONDS = 0.5


class Signals:
    """The signals that come while `answered` has its block.

    Args:
        end: the end of a socket pair at which their numbers are read.
    """

    def __init__(self, end: socket.socket):
        self._end = end
        self._answering = False

    def next(self, seconds: float | None = None) -> int | None:
        """Wait for a signal that is not of the same stop as the one before.

        Args:
            seconds: how long; None: until the block ends.

        Returns:
            Its number; None once the block has ended.

        Raises:
            TimeoutError: none came in time.
        """
        begun = time.monotonic()
        until = None if seconds is None else begun + seconds
        again = begun + _SAME_SECONDS if self._answering else begun  # counted from when the one before has been answered
        while True:
            self._end.settimeout(None if until is None else max(until - time.monotonic(), 1e-3))
            data = self._end.recv(64)
            if not data:
                return None
            number = next((number for number in data if number in _SIGNALS), None)
            if number is not None and time.monotonic() >= again:
                self._answering = True
                return number


@contextmanager
def answered(answer: Callable[[Signals], None]) -> Iterator[None]:
    """Within the block SIGTERM and SIGINT do nothing but what `answer` does, which runs in a thread of its own.

    Only the main thread may enter it.
    """
    ours, wake = socket.socketpair()
    wake.setblocking(False)
    old = {number: signal.signal(number, lambda *_: None) for number in _SIGNALS}
    old_wake = signal.set_wakeup_fd(wake.fileno(), warn_on_full_buffer=False)
    thread = threading.Thread(target=answer, args=(Signals(ours),), daemon=True)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(old_wake)
        for number, handler in old.items():
            signal.signal(number, handler)
        wake.close()
        thread.join(timeout=5)
        ours.close()


@contextmanager
def raised() -> Iterator[None]:
    """Within the block SIGTERM and SIGINT are exceptions, one for each stop, so that what was written is removed.

    Outside of the main thread, which alone may handle signals, they are left as they are.

    Raises:
        SystemExit: with 143, after SIGTERM.
        KeyboardInterrupt: after SIGINT.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    same_until = 0.0

    def stop(number: int, _: FrameType | None) -> None:
        nonlocal same_until
        if (now := time.monotonic()) >= same_until:
            same_until = now + _SAME_SECONDS
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            sys.exit(128 + number)

    old = {number: signal.signal(number, stop) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
