"""Read ahead in a thread."""

import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any

__all__ = ["prefetch"]


def prefetch(make: Callable[[int], Any], start: int, stop: int, depth: int = 4) -> Iterator[Any]:
    """Yield make(start), …, make(stop - 1), computed up to `depth` ahead in a thread.

    An error in the thread is raised here; leaving early ends the thread.
    """
    ready: queue.Queue = queue.Queue(depth)
    leaving = threading.Event()

    def put(item) -> bool:
        while not leaving.is_set():
            try:
                ready.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def work():
        try:
            for index in range(start, stop):
                if not put((make(index), None)):
                    return
        except BaseException as error:
            put((None, error))

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        for _ in range(start, stop):
            item, error = ready.get()
            if error is not None:
                raise error
            yield item
    finally:
        leaving.set()
        thread.join()
