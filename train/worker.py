"""What the worker processes of the training data begin with. No jax in this module."""

import os
import threading
from multiprocessing import connection, parent_process

__all__ = ["end_with_parent"]


def end_with_parent(index: int, count: int) -> None:
    """In a worker process: end when the parent has ended, or was killed. Grain passes the worker's number and their count."""
    parent = parent_process()
    if parent is None:  # not started by multiprocessing
        return

    def watch() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
