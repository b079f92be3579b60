"""Requests on their way to the device: read and prepared in a thread, a bounded number ahead."""

import queue
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from ..errors import SmolVLMError
from .requests import Prepared, Request, prepare

__all__ = ["Arrival", "Feed"]


@dataclass(eq=False)
class Arrival:
    """A request and its arrays, or why there are none. held: digests of tiles whose places in the pool it holds."""

    request: Request
    prepared: Prepared | None
    error: str | None = None
    held: list[bytes] = field(default_factory=list)


class Feed:
    """An iterable of requests as a queue that never keeps the device waiting while there is other work."""

    def __init__(self, requests: Iterable[Request], processor, ahead: int):
        self._queue: queue.Queue = queue.Queue(ahead)
        self._leaving = threading.Event()
        self._failure: BaseException | None = None
        self.exhausted = False
        self._thread = threading.Thread(target=self._run, args=(iter(requests), processor), daemon=True)
        self._thread.start()

    def _run(self, requests: Iterator[Request], processor) -> None:
        try:
            for request in requests:
                if not self._put(_prepared(request, processor)):
                    return
        except BaseException as error:  # of the caller's iterator: raised where the results are read
            self._failure = error
        finally:
            self._put(None)

    def _put(self, item: Arrival | None) -> bool:
        while not self._leaving.is_set():
            try:
                self._queue.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def take(self, wait: bool) -> Arrival | None:
        """The next arrival; None where there is none yet, or with `wait` none any more. Raises what the iterator raised."""
        if self.exhausted:
            return None
        try:
            item = self._queue.get(block=wait)
        except queue.Empty:
            return None
        if item is None:
            self.exhausted = True
            if self._failure is not None:
                raise self._failure
        return item

    def close(self) -> None:
        """End the thread, unless the caller's iterator blocks it."""
        self._leaving.set()
        self._thread.join(timeout=1)


def _prepared(request: Request, processor) -> Arrival:
    if request.messages is None:
        return Arrival(request, request.prepared, request.error)
    try:
        return Arrival(request, prepare(processor, request.messages))
    except SmolVLMError as error:
        return Arrival(request, None, str(error))
