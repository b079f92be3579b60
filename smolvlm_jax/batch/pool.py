"""Worker processes that prepare records, replaced when a record kills them.

A thread of this process sends a worker one payload at a time and waits for the answer, so it is always known on which record a
worker died.
"""

import os
import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.pool import ThreadPool
from typing import Any

from ..child import AVAILABLE, Child
from ..engine.requests import Request
from ..engine.room import Room
from ..errors import InputError, JobError
from .own import payload_size
from .workers import LOST, NO_MEMORY, OUT_OF_MEMORY, Preparer, Setup

__all__ = ["WorkerPool", "default_workers"]

_ATTEMPTS = 2
_STARTS = 3
_POLL_SECONDS = 0.2
# Bytes of payloads that wait for a worker, and of prepared requests that wait for the engine. A single one may be larger.
AHEAD_BYTES = 2**26


def default_workers() -> int:
    """One per core that may be used, less one for the process that feeds the device; at most 64. 0 where there are no child
    processes."""
    if not AVAILABLE:
        return 0
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(usable - 1, 64))


class WorkerPool:
    """Prepares records in worker processes.

    Args:
        setup: What every worker is told.
        workers: Number of processes; 0 prepares in the calling process.
        timeout: Seconds for one record, after which its worker is killed. A record that ends its worker twice in a row becomes
            a request with an error.

    Attributes:
        size: Number of workers.
        deaths: How often a worker was ended by a record so far.
    """

    def __init__(self, setup: Setup, workers: int, timeout: float = 120.0):
        if workers and not AVAILABLE:
            raise InputError("worker processes need a POSIX system; prepare records in this process with --workers 0")
        self._setup, self._timeout, self.size = setup, timeout, workers
        self.deaths = 0
        self._closed = threading.Event()
        self._children: set[Child] = set()
        self._idle: queue.SimpleQueue[Child] = queue.SimpleQueue()
        self._failed = ""  # why no worker starts
        # Not an executor of concurrent.futures, which takes no more work once the main thread has ended.
        self._threads = ThreadPool(max(workers, 1))

    def map(self, tasks: Iterable[tuple[Any, Any]], stop: threading.Event | None = None) -> Iterator[tuple[Any, Request]]:
        """Prepare records, a few ahead of what is taken.

        Args:
            tasks: (key, payload) of each record.
            stop: Once set, nothing more is taken from `tasks`, and what is not prepared yet is left out.

        Yields:
            (key, request), in the order in which they are prepared.
        """
        stop, tasks = stop or threading.Event(), iter(tasks)
        if not self.size:
            preparer = Preparer(self._setup)
            for key, payload in tasks:
                if stop.is_set():
                    return
                request = _checked(preparer(payload))
                yield key, request if request.id is not None else self._named(payload, request.error)
            return
        ended = threading.Event()
        try:
            yield from self._in_workers(tasks, lambda: stop.is_set() or self._closed.is_set() or ended.is_set())
        finally:
            ended.set()

    def _in_workers(self, tasks: Iterator[tuple[Any, Any]], stopped: Callable[[], bool]) -> Iterator[tuple[Any, Request]]:
        done: queue.SimpleQueue[tuple[Any, Request] | BaseException] = queue.SimpleQueue()
        room = Room(AHEAD_BYTES)  # for what is prepared and not taken yet
        waiting: dict[Any, int] = {}  # bytes of the payloads of the records that are under way
        left = True

        def work(key: Any, payload: Any) -> tuple[Any, Request]:
            answer = self._prepare(key, payload)
            room.take(_size(answer[1]), stopped)
            return answer

        while not stopped():
            while left and len(waiting) < 2 * self.size + 2 and sum(waiting.values()) < AHEAD_BYTES:
                task = next(tasks, None)
                left = task is not None
                if task is not None:
                    waiting[task[0]] = payload_size(task[1])
                    self._threads.apply_async(work, task, callback=done.put, error_callback=done.put)
            if not waiting:
                return
            try:
                answer = done.get(timeout=_POLL_SECONDS)
            except queue.Empty:
                continue
            if self._closed.is_set():
                return
            if isinstance(answer, BaseException):
                raise answer
            room.give(_size(answer[1]))
            del waiting[answer[0]]
            yield answer

    def close(self) -> None:
        """End all workers, whatever they are doing."""
        self._closed.set()
        for child in list(self._children):
            child.kill()
        self._threads.terminate()
        self._threads.join()
        for child in list(self._children):
            self._end(child)

    def __enter__(self) -> "WorkerPool":
        return self

    def __exit__(self, *exc) -> None:
        self.close()

    def _prepare(self, key: Any, payload: Any) -> tuple[Any, Request]:
        """Prepare a record in a worker that nothing else uses."""
        for _ in range(_ATTEMPTS):
            try:
                child = self._idle.get_nowait()
            except queue.Empty:
                child = self._start()
            request, died = _ask(child, payload, self._timeout)
            if request is not None:
                self._idle.put(child)
                return key, _checked(request)
            self._end(child)
            if self._closed.is_set():
                raise InputError("the pool is closed")  # not shown to anyone
            self.deaths += 1
        return key, self._named(payload, f"preparing this record {died}, {_ATTEMPTS} times in a row")

    def _named(self, payload: Any, error: str | None) -> Request:
        """The error of a record that may take more memory to read than there is."""
        return Request(self._setup.parse.identify(payload), error=error)

    def _start(self) -> Child:
        """A new worker. One that ends while it starts is replaced, since that is the machine's doing and no record's."""
        ended = ""
        for _ in range(_STARTS):
            if self._failed:  # another record has found it out, and the job is about to end
                break
            child = Child("smolvlm_jax.batch.workers")
            self._children.add(child)
            if self._closed.is_set():  # close() may have looked before this one was there
                child.kill()
            try:
                trouble = child.begin(self._setup).started
            except TimeoutError as error:
                trouble = str(error)
            except (EOFError, OSError):
                ended = _ending(child)
                self._children.discard(child)
                if self._closed.is_set():
                    break
                continue
            if trouble is None:
                return child
            self._end(child)
            raise JobError(f"a worker process did not start: {trouble}")
        self._failed = self._failed or (
            f"worker processes ended while they started, {_STARTS} times in a row (the last with {ended}). If the machine is "
            "short of memory, lower --workers; what is finished is kept"
        )
        raise JobError(self._failed)

    def _end(self, child: Child) -> None:
        child.end()
        self._children.discard(child)


def _checked(request: Request) -> Request:
    """The request. Raises JobError for what is not the record's own fault."""
    if request.error is not None and request.error.startswith(LOST):
        raise JobError(f"{request.error.removeprefix(LOST)}; what is finished is kept")
    return request


def _size(request: Request) -> int:
    return 0 if request.prepared is None else request.prepared.nbytes


def _ask(child: Child, payload: Any, seconds: float) -> tuple[Request | None, str]:
    """(the worker's answer, ""), or (None, how the worker ended)."""
    try:
        child.send(payload, seconds)
        return child.receive(seconds), ""
    except TimeoutError:
        return None, f"took its worker more than {seconds:g} seconds"
    except (EOFError, OSError):
        ended = _ending(child)
        return None, NO_MEMORY if child.exit_code() == OUT_OF_MEMORY else f"ended its worker with {ended}"


def _ending(child: Child) -> str:
    code = child.exit_code()
    return f"{'signal' if code < 0 else 'exit code'} {abs(code)}"
