"""SIGTERM and Ctrl-C while a run trains: finish the step, save it, and end."""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator

import jax

from ..signals import Signals, answered
from ..staging import remove_temporary_folders
from .worker import release_semaphores

__all__ = ["Preempted", "told_to_stop"]


class Preempted(SystemExit):
    """The process was told to stop (SIGTERM, Ctrl-C) and has saved a checkpoint.

    Attributes:
        step: of the checkpoint.
        code: 128 + the signal's number.
    """

    def __init__(self, step: int, number: int = signal.SIGTERM):
        super().__init__(128 + number)
        self.step = step


@contextlib.contextmanager
def told_to_stop(answer: Callable[[str], None], newest: Callable[[], int | None] = lambda: None) -> Iterator[list[int]]:
    """Within the block, SIGTERM and SIGINT are answered at once and collected; a second stop ends the process.

    In a job of several processes jax's own handler is used instead, since all processes have to agree on a step; outside of the
    main thread no handler can be set.

    Args:
        answer: called with a line for the user.
        newest: the step of the newest complete checkpoint, None if there is none.

    Yields:
        The list of signals that came.
    """
    came: list[int] = []
    if jax.process_count() > 1 or threading.current_thread() is not threading.main_thread():
        yield came
        return

    def watch(signals: Signals) -> None:
        while (number := signals.next()) is not None:
            if came:
                step = newest()
                kept = (
                    "nothing was saved" if step is None else f"step {step:,} is saved, and the same command goes on from there"
                )
                answer(f"ended at once; {kept}")
                release_semaphores()
                remove_temporary_folders()
                os._exit(128 + number)
            came.append(number)
            answer("stopping: the step under way is finished and saved first; Ctrl-C again ends the run at once")

    with answered(watch):
        yield came
