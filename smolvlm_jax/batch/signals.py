"""SIGTERM and SIGINT while a job runs: finish what is in flight if that is quick, set it aside if not, and go.

Python runs a signal handler only between two steps of the main thread, which may be inside a compilation for minutes. The
interpreter's wake-up descriptor is written at once, so a thread of ours reads that and acts.
"""

import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from .job import BatchJob

__all__ = ["GRACE_SECONDS", "stop_on_signals"]

# Preemption leaves 30 seconds on most platforms; half of that for answers under way.
GRACE_SECONDS = 12.0
_SIGNALS = (signal.SIGTERM, signal.SIGINT)


@contextmanager
def stop_on_signals(job: BatchJob, grace: float = GRACE_SECONDS) -> Iterator[list[int]]:
    """Inside, a signal stops `job`; the list yielded holds the signals that came. If the job has not returned after `grace`
    seconds, or a second signal comes, its finished rows are written and the process ends with 128 + the signal's number."""
    came: list[int] = []
    if threading.current_thread() is not threading.main_thread():  # only the main thread may handle signals
        yield came
        return
    ours, wake = socket.socketpair()
    wake.setblocking(False)
    ours.setblocking(True)

    def watch():
        first = _next_signal(ours)
        if first is None:
            return
        came.append(first)
        job.stop()
        ours.settimeout(grace)
        try:
            if _next_signal(ours) is None:
                return  # the job has returned
        except TimeoutError:
            pass
        job.park()
        os._exit(128 + first)

    old = {number: signal.signal(number, lambda *_: None) for number in _SIGNALS}
    old_wake = signal.set_wakeup_fd(wake.fileno(), warn_on_full_buffer=False)
    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield came
    finally:
        signal.set_wakeup_fd(old_wake)
        for number, handler in old.items():
            signal.signal(number, handler)
        wake.close()
        thread.join(timeout=5)
        ours.close()


def _next_signal(end: socket.socket) -> int | None:
    """The next of our signals; None once the other end is closed. Raises TimeoutError."""
    while True:
        number = end.recv(1)
        if not number:
            return None
        if number[0] in _SIGNALS:
            return number[0]
