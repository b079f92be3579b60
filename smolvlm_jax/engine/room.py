"""A bound on the bytes that wait between threads."""

import threading
from collections.abc import Callable

__all__ = ["Room"]

_POLL_SECONDS = 0.1


class Room:
    """Room for things of known sizes. What is larger than all of it has its turn when nothing else is there.

    Args:
        size: bytes.
    """

    def __init__(self, size: int):
        self._size, self._held = size, 0
        self._changed = threading.Condition()

    def take(self, size: int, stopped: Callable[[], bool]) -> None:
        """Wait until there is room for so many bytes, or until they are not wanted any more."""
        with self._changed:
            while self._held and self._held + size > self._size and not stopped():
                self._changed.wait(_POLL_SECONDS)
            self._held += size

    def give(self, size: int) -> None:
        """Give so many bytes back."""
        with self._changed:
            self._held -= size
            self._changed.notify_all()
