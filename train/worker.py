"""What the worker processes of the training data begin with, and what they leave. No jax in this module."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing import connection, parent_process, resource_tracker, util
from multiprocessing.synchronize import SemLock

__all__ = ["end_with_parent", "release_semaphores", "unstopped"]


def end_with_parent(index: int, count: int) -> None:
    """In a worker process: end when the parent has ended, or was killed. Grain passes the worker's number and their count."""
    parent = parent_process()
    if parent is None:  # not started by multiprocessing
        return

    def watch() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@contextmanager
def unstopped() -> Iterator[None]:
    """Processes that are started within the block take no SIGTERM and no SIGINT: those go to all processes of a group, and the
    parent reads until it has saved."""
    resource_tracker.ensure_running()  # starting it would unblock both
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGINT))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def release_semaphores() -> None:
    """Remove the names of the semaphores that are shared with workers, before `os._exit`, which does not. Otherwise Python's
    resource tracker removes them, and warns of each process that left some."""
    for finalizer in list(util._finalizer_registry.values()):  # type: ignore[attr-defined]
        if finalizer._callback is SemLock._cleanup:  # type: ignore[attr-defined]
            with suppress(OSError):
                finalizer()
