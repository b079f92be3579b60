"""What the worker processes of the training data begin with, and what they leave. No jax in this module."""

import os
import signal
import threading
from contextlib import suppress
from multiprocessing import connection, parent_process, util
from multiprocessing.synchronize import SemLock

__all__ = ["end_with_parent", "release_semaphores"]


def end_with_parent(index: int, count: int) -> None:
    """In a worker process: end when the parent has ended, or was killed, and not by the signals that tell all processes of a
    group to stop, since the parent still reads then. Grain passes the worker's number and their count."""
    parent = parent_process()
    if parent is None:  # not started by multiprocessing
        return

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)

    def watch() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def release_semaphores() -> None:
    """Remove the names of the semaphores that are shared with workers, before `os._exit`, which does not. Otherwise Python's
    resource tracker removes them, and warns of each process that left some."""
    for finalizer in list(util._finalizer_registry.values()):  # type: ignore[attr-defined]
        if finalizer._callback is SemLock._cleanup:  # type: ignore[attr-defined]
            with suppress(OSError):
                finalizer()
