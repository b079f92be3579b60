"""Worker processes, as many as asked for, that outlive no job and are replaced when a record kills them.

Each is started as a fresh interpreter, never forked: jax and its threads do not survive a fork. One thread of ours stands
behind each worker, hands it one payload at a time and waits, so that whoever dies, dies on a known record.
"""

import os
import queue
import socket
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator
from multiprocessing.connection import Connection
from typing import Any

from ..errors import InputError, SmolVLMError
from .workers import Made, Preparer, Setup, receive

__all__ = ["WorkerPool", "default_workers"]

_START_SECONDS = 120
_ATTEMPTS = 2
_SERVE = "from smolvlm_jax.batch.workers import serve; serve({})"


def default_workers() -> int:
    """One per core that may be used, less one for the process that feeds the device; at most 64. None where there is no
    POSIX, whose sockets they are handed."""
    if os.name != "posix":
        return 0
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(usable - 1, 64))


class WorkerPool:
    """workers: processes; 0 prepares in the calling process. timeout: seconds for one record, after which its worker counts as
    dead. A record during which its worker dies twice becomes an error."""

    def __init__(self, setup: Setup, workers: int, timeout: float = 120.0):
        if workers and os.name != "posix":
            raise InputError("worker processes need a POSIX system; prepare records in this process with --workers 0")
        self._setup, self._timeout, self.size = setup, timeout, workers
        self.deaths = 0
        self._closed = threading.Event()
        self._tasks: queue.SimpleQueue = queue.SimpleQueue()
        self._answers: queue.SimpleQueue = queue.SimpleQueue()
        self._threads = [threading.Thread(target=self._stand_behind, daemon=True) for _ in range(workers)]
        for thread in self._threads:
            thread.start()

    def map(self, tasks: Iterable[tuple[Any, Any]], stop: threading.Event | None = None) -> Iterator[tuple[Any, Made]]:
        """(key, payload) to (key, Made), in the order they are finished, a few ahead of what is taken.

        stop: once set, nothing more is taken from `tasks`, and what is not finished yet is left out.
        """
        tasks = iter(tasks)
        if not self.size:
            preparer = Preparer(self._setup)
            for key, payload in tasks:
                if stop is not None and stop.is_set():
                    return
                yield key, preparer(payload)
            return
        ahead, outstanding, more = 2 * self.size + 2, 0, True
        while more or outstanding:
            while more and outstanding < ahead:
                task = next(tasks, None)
                if task is None:
                    more = False
                    break
                self._tasks.put(task)
                outstanding += 1
            if not outstanding:
                return
            try:
                answer = self._answers.get(timeout=0.2)
            except queue.Empty:
                if self._closed.is_set() or (stop is not None and stop.is_set()):
                    return
                continue
            if isinstance(answer, BaseException):
                raise answer
            outstanding -= 1
            yield answer
            if stop is not None and stop.is_set():
                return

    def close(self) -> None:
        """End all workers, whatever they are doing."""
        self._closed.set()
        for _ in self._threads:
            self._tasks.put(None)
        for thread in self._threads:
            thread.join(timeout=5)

    def __enter__(self) -> "WorkerPool":
        return self

    def __exit__(self, *exc) -> None:
        self.close()

    def _stand_behind(self) -> None:
        worker = None
        try:
            while (task := self._tasks.get()) is not None and not self._closed.is_set():
                key, payload = task
                made = None
                for _ in range(_ATTEMPTS):
                    worker = worker or _Worker(self._setup, self._closed)
                    made, died = worker.ask(payload, self._timeout)
                    if not died:
                        break
                    worker = worker.end()
                    if self._closed.is_set():
                        return
                    self.deaths += 1
                self._answers.put((key, made if not died else self._blame(payload, died)))
        except BaseException as error:
            self._answers.put(error)
        finally:
            if worker is not None:
                worker.end()

    def _blame(self, payload: Any, died: str) -> Made:
        """The row of a record that nobody survives. Reading its id is safe: json and a dictionary."""
        record = self._setup.parse(payload)
        message = f"preparing this record {died}, {_ATTEMPTS} times in a row"
        return Made(record.id, self._setup.sampling, None, message)


class _Worker:
    """One process and our end of its socket."""

    def __init__(self, setup: Setup, closed: threading.Event):
        self._closed = closed
        ours, theirs = socket.socketpair()
        environment = dict(os.environ, OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")
        environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
        self._process = subprocess.Popen(
            [sys.executable, "-c", _SERVE.format(theirs.fileno())],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            env=environment,
            pass_fds=[theirs.fileno()],
            start_new_session=True,  # Ctrl-C is for the job, which ends its workers
        )
        theirs.close()
        self._connection = Connection(ours.detach())
        trouble = self._exchange(lambda: self._connection.send(setup), self._connection.recv, _START_SECONDS)
        if trouble[1] or trouble[0]:
            self.end()
            raise SmolVLMError(f"a worker process did not start: {trouble[0] or 'it ' + trouble[1]}")

    def ask(self, payload: Any, timeout: float) -> tuple[Made | None, str | None]:
        """(answer, None), or (None, how the worker died)."""
        return self._exchange(lambda: self._connection.send(payload), lambda: receive(self._connection), timeout)

    def _exchange(self, send, answer, timeout: float):
        try:
            send()
            left = timeout
            while not self._connection.poll(min(left, 0.5)):
                left -= 0.5
                if left <= 0:
                    return None, f"took its worker more than {timeout:g} seconds"
                if self._closed.is_set():
                    return None, "was cut short"
            return answer(), None
        except (EOFError, OSError):
            code = self._wait()
            return None, f"ended its worker with {'signal' if code < 0 else 'exit code'} {abs(code)}"

    def _wait(self) -> int:
        try:
            return self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            return 0

    def end(self) -> None:
        self._process.kill()
        self._process.wait()
        self._process.stdin.close()
        self._connection.close()
