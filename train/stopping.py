"""SIGTERM and Ctrl-C while a run trains: finish the step, save it, and end.

Python runs a signal handler only between two instructions of the main thread, which may be inside a compilation or a step for
minutes. The interpreter's wake-up descriptor is written at once, so a thread reads that and answers.
"""

import contextlib
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator

import jax

__all__ = ["Preempted", "told_to_stop"]

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


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
def told_to_stop(answer: Callable[[str], None]) -> Iterator[list[int]]:
    """Within the block, SIGTERM and SIGINT are answered at once and collected; a second one ends the process.

    In a job of several processes jax's own handler is used instead, since all processes have to agree on a step; outside of the
    main thread no handler can be set.

    Args:
        answer: called with a line for the user.

    Yields:
        The list of signals that came.
    """
    came: list[int] = []
    if jax.process_count() > 1 or threading.current_thread() is not threading.main_thread():
        yield came
        return
    ours, wake = socket.socketpair()
    wake.setblocking(False)

    def watch() -> None:
        while data := ours.recv(1):
            if data[0] not in _SIGNALS:
                continue
            if came:
                answer("ended at once; the newest checkpoint stays, and the same command goes on from there")
                os._exit(128 + data[0])
            came.append(data[0])
            answer("stopping: the step under way is finished and saved first; Ctrl-C again ends the run at once")

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
