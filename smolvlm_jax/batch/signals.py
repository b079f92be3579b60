"""SIGTERM and SIGINT while a job runs: answer the requests in flight if that is quick, and end.

Python runs a signal handler only between two instructions of the main thread, which may be inside a compilation for minutes.
The interpreter's wake-up descriptor is written at once, so a thread reads that and acts.
"""

import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from .job import BatchJob

__all__ = ["GRACE_SECONDS", "stop_on_signals"]

# Preemption leaves 30 seconds on most platforms; less than half of them are for answers in flight.
GRACE_SECONDS = 12.0
_SIGNALS = (signal.SIGTERM, signal.SIGINT)


@contextmanager
def stop_on_signals(
    job: BatchJob, grace: float = GRACE_SECONDS, notify: Callable[[str], None] = lambda line: None
) -> Iterator[list[int]]:
    """Within the block, a signal stops `job`.

    Args:
        job: Runs within the block.
        grace: Seconds after which, if the job has not returned, its finished rows are written to the disk and the process ends
            with 128 + the signal's number. A second signal does the same at once, and so does the first while no request is
            under way.
        notify: Called at once with what is kept, and how to go on.

    Yields:
        The list of signals that came. Outside of the main thread, which alone may handle signals, it stays empty.
    """
    came: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield came
        return
    ours, wake = socket.socketpair()
    wake.setblocking(False)
    ours.setblocking(True)

    def watch() -> None:
        first = _next_signal(ours)
        if first is None:
            return
        came.append(first)
        job.stop()
        if job.answering:
            notify(
                f"stopping: {job.kept()}. Answers that are under way have {grace:g} seconds to end; a second Ctrl-C (or "
                "signal) ends them at once"
            )
            ours.settimeout(grace)
            with suppress(TimeoutError):
                if _next_signal(ours) is None:
                    return  # the job has returned
        job.park()
        notify(f"stopped: {job.kept()}; run the same command again to go on")
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
    """The next of `_SIGNALS`; None once the other end is closed. Raises TimeoutError."""
    while True:
        number = end.recv(1)
        if not number:
            return None
        if number[0] in _SIGNALS:
            return number[0]
