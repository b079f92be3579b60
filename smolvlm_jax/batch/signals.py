"""SIGTERM and SIGINT while a job runs: answer the requests in flight if that is quick, and end."""

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from ..signals import Signals, answered
from ..staging import remove_temporary_folders
from .job import BatchJob

__all__ = ["GRACE_SECONDS", "stop_on_signals"]

# Preemption leaves 30 seconds on most platforms; less than half of them are for answers in flight.
GRACE_SECONDS = 12.0


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

    def watch(signals: Signals) -> None:
        first = signals.next()
        if first is None:
            return
        came.append(first)
        job.stop()
        if job.answering:
            notify(
                f"stopping: {job.kept()}. Answers that are under way have {grace:g} seconds to end; a second Ctrl-C (or "
                "signal) ends them at once"
            )
            with suppress(TimeoutError):
                if signals.next(grace) is None:
                    return  # the job has returned
        job.park()
        notify(f"stopped: {job.kept()}; run the same command again to go on")
        remove_temporary_folders()
        os._exit(128 + first)

    with answered(watch):
        yield came
