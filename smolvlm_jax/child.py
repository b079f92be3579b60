"""Child processes that exchange messages with their parent: video decoders and the workers of a batch job.

A child is a fresh interpreter, never a fork: jax, its threads and the decoders' libraries do not survive a fork. Parent and
child share one socket, which is the child's standard input. A message is a pickle (protocol 5); the bytes of arrays follow it
as they are, so that pictures are not copied into the pickle. Every wait has a deadline. A child ends with its parent, also
when the parent is killed while the child hangs in C code.

A child trusts its parent. From a child, where a malicious file may have taken over a decoder, the parent reads nothing but
plain values, arrays and dataclasses of this package.
"""

import contextlib
import ctypes
import dataclasses
import functools
import io
import os
import pickle
import queue
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any

__all__ = ["AVAILABLE", "Channel", "Child", "PlainUnpickler", "parent"]

AVAILABLE = os.name == "posix"  # elsewhere a socket cannot be a standard input
_START_SECONDS = 120
_PR_SET_PDEATHSIG = 1
_NUMBER = struct.Struct("!Q")
# What pickles of arrays refer to.
_ARRAYS = frozenset(
    f"numpy.{name}"
    for name in ("dtype", "ndarray", "_core.numeric._frombuffer", "_core.multiarray._reconstruct", "_core.multiarray.scalar")
)


class PlainUnpickler(pickle.Unpickler):
    """Reads a pickle that is not trusted: plain values, arrays and dataclasses of this package, else a ConnectionError."""

    def find_class(self, module: str, name: str) -> Any:
        if f"{module}.{name}" in _ARRAYS:
            return super().find_class(module, name)
        if module.partition(".")[0] == __package__ and dataclasses.is_dataclass(found := super().find_class(module, name)):
            return found
        raise ConnectionError(f"a child process sent {module}.{name}, which is neither an array nor a dataclass")


class Channel:
    """One end of a socket that carries messages, any object that can be pickled."""

    _unpickler: type[pickle.Unpickler] = pickle.Unpickler

    def __init__(self, connection: socket.socket):
        self._socket = connection

    def send(self, message: Any, seconds: float | None = None) -> None:
        """Send a message.

        Args:
            message: Any object that can be pickled.
            seconds: For each of its parts; None: no limit.

        Raises:
            TimeoutError: if the other side does not read.
            OSError: if the other side is gone.
        """
        buffers: list[pickle.PickleBuffer] = []
        pickled = pickle.dumps(message, protocol=5, buffer_callback=buffers.append)
        parts = [memoryview(pickled), *(buffer.raw() for buffer in buffers)]
        self._socket.settimeout(seconds)
        self._socket.sendall(b"".join(_NUMBER.pack(number) for number in (len(parts), *(part.nbytes for part in parts))))
        for part in parts:
            self._socket.sendall(part)

    def receive(self, seconds: float | None = None) -> Any:
        """The next message.

        Args:
            seconds: Until all of it is here; None: no limit.

        Raises:
            TimeoutError: if it is not here in time. What arrives later is part of it, so the channel is useless then.
            EOFError: if the other side is gone.
        """
        deadline = None if seconds is None else time.monotonic() + seconds
        count = self._number(deadline)
        sizes = [self._number(deadline) for _ in range(count)]
        pickled, *buffers = [self._read(size, deadline) for size in sizes]
        return self._unpickler(io.BytesIO(pickled), buffers=buffers).load()

    def messages(self) -> Iterator[Any]:
        """Messages until the other side is gone."""
        while True:
            try:
                message = self.receive()
            except (EOFError, ConnectionError):
                return
            yield message

    def close(self) -> None:
        """Close this end."""
        self._socket.close()

    def _number(self, deadline: float | None) -> int:
        return _NUMBER.unpack(self._read(_NUMBER.size, deadline))[0]

    def _read(self, size: int, deadline: float | None) -> bytearray:
        out = bytearray(size)
        view = memoryview(out)
        while view:
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                raise TimeoutError("the other process did not answer in time")
            self._socket.settimeout(left)
            count = self._socket.recv_into(view)
            if not count:
                raise EOFError("the other process has ended")
            view = view[count:]
        return out


class Child(Channel):
    """The parent's end of a child process.

    Args:
        module: The child imports it and calls its function `serve()`, which calls `parent()`, answers the first message, the
            setup, and then serves.
        quiet: Whether what the child writes to standard error is dropped. Standard output always is.

    Attributes:
        started: The child's answer to the setup.
    """

    _unpickler = PlainUnpickler

    def __init__(self, module: str, *, quiet: bool = False):
        ours, theirs = socket.socketpair()
        super().__init__(ours)
        environment = dict(os.environ, OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")
        environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
        start = functools.partial(
            subprocess.Popen,
            [sys.executable, "-c", f"from {module} import serve; serve()"],
            stdin=theirs,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL if quiet else None,
            env=environment,
            start_new_session=True,  # Ctrl-C is for the parent, which ends its children
        )
        try:
            started: Future[subprocess.Popen] = Future()
            with theirs:
                _starter(os.getpid()).put((start, started))
                self._process = started.result()
        except BaseException:
            self.close()
            raise
        self.started: Any = None

    def begin(self, setup: Any) -> "Child":
        """Send the setup and wait until the child serves.

        Returns:
            This child.

        Raises:
            EOFError: if it ends without an answer.
            TimeoutError: if it does not answer within two minutes; then it is ended.
        """
        try:
            self.send(setup, _START_SECONDS)
            self.started = self.receive(_START_SECONDS)
        except BaseException:
            self.end()
            raise
        return self

    def alive(self) -> bool:
        """Whether the process has not ended."""
        return self._process.poll() is None

    def exit_code(self) -> int:
        """Of a process that is ending: its exit code, or minus the signal that ended it; 0 if it does not end."""
        try:
            return self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            return 0

    def kill(self) -> None:
        """End the process, from any thread: a thread that waits for its message gets an EOFError."""
        self._process.kill()

    def end(self) -> None:
        """End the process and close this end."""
        self.kill()
        self._process.wait()
        self.close()


@functools.lru_cache
def _starter(process: int) -> queue.SimpleQueue[tuple[Callable[[], subprocess.Popen], Future[subprocess.Popen]]]:
    """What the thread that starts all children of a process is told: Linux ends a child with the *thread* that started it.

    The thread never ends, not even with the main thread, whose end other threads may outlive.
    """
    tasks: queue.SimpleQueue = queue.SimpleQueue()

    def run() -> None:
        while True:
            start, started = tasks.get()
            try:
                started.set_result(start())
            except BaseException as error:
                started.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return tasks


def parent() -> Channel:
    """In a child: the channel to the parent, whose end is this process's end too."""
    connection = socket.socket(fileno=os.dup(0))
    with open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), 0)  # what this process starts must not hold the socket open
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    poll = select.poll()
    poll.register(connection, 0)  # no event but the end of the other side
    if poll.poll(0):  # it came before the signal was asked for
        os._exit(1)

    def watch() -> None:
        poll.poll()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    return Channel(connection)
