"""SIGTERM and Ctrl-C, answered at once by a thread.

Python runs a signal handler only between two instructions of the main thread, which may be inside a compilation or a step for
minutes. The interpreter's wake-up descriptor is written at once, so a thread reads that.
"""

import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["Signals", "answered"]

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Signals:
    """The signals that come while `answered` has its block.

    Args:
        end: the end of a socket pair at which their numbers are read.
    """

    def __init__(self, end: socket.socket):
        self._end = end

    def next(self, seconds: float | None = None) -> int | None:
        """Wait for a signal.

        Args:
            seconds: how long; None: until the block ends.

        Returns:
            Its number; None once the block has ended.

        Raises:
            TimeoutError: none came in time.
        """
        self._end.settimeout(seconds)
        while data := self._end.recv(1):
            if data[0] in _SIGNALS:
                return data[0]
        return None


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
