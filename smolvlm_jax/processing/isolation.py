"""Decoding videos in a child process, because a damaged one can take its reader along.

decord ends the whole process on some damaged files (a failed allocation in its C++), and no thread can be stopped
from outside. So the decoding libraries run in a helper that may crash, hang or ask for all memory, and what its
parent sees then is a MediaError. A helper serves one video after another and starts once per thread that decodes.

The parent writes requests as lines of json; the helper answers with lines of json, each frame's followed by its bytes.
"""

import atexit
import json
import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import numpy as np

from ..errors import MediaError

AVAILABLE = os.name == "posix"  # elsewhere there is no waiting for a pipe with a time limit
# Address space of a helper: enough for frames of 8K, too little to bring the machine down.
_MEMORY = 6 * 2**30
# Time for one answer, on top of MediaLimits.decode_seconds: reading and decoding take longer in larger files.
_BYTES_PER_SECOND = 2_000_000
_START_SECONDS = 60

# By process id, since a fork must not talk to its parent's helpers, and by backend: each brings its own FFmpeg, and two
# of those in one process get in each other's way.
_idle: dict[tuple[int, str], list["_Helper"]] = {}
_lock = threading.Lock()


class IsolatedReader:
    """A video opened in a helper: total, fps, times() and frames(indices), as the readers of decode.py have them."""

    def __init__(self, backend: str, path: str, max_pixels: int, seconds: float):
        self._seconds = seconds + os.path.getsize(path) / _BYTES_PER_SECOND
        self._backend = backend
        self._helper = _take(backend)
        self._clean = True
        try:
            opened = self._ask({"open": os.path.abspath(path), "backend": backend, "max_pixels": max_pixels})
        except BaseException:
            self.close()
            raise
        self.total, self.fps = opened["total"], opened["fps"]

    def times(self) -> tuple[float, float]:
        return tuple(self._ask({"times": True})["times"])

    def frames(self, indices) -> Iterator[np.ndarray]:
        self._clean = False  # until the last frame is here, the pipe holds what nobody asked for any more
        indices = [int(index) for index in indices]
        self._send({"frames": indices})
        for _ in indices:
            shape = self._answer()["shape"]
            pixels = self._helper.read(int(np.prod(shape)), self._seconds)
            yield np.frombuffer(pixels, np.uint8).reshape(shape)
        self._clean = True

    def close(self):
        helper, self._helper = self._helper, None
        if helper is None:
            return
        try:
            if self._clean:
                helper.send({"close": True})
                return _give(self._backend, helper)
        except OSError:
            pass  # it is gone already
        helper.kill()

    def _ask(self, request: dict) -> dict:
        self._send(request)
        return self._answer()

    def _send(self, request: dict):
        self._guarded(lambda: self._helper.send(request))

    def _answer(self) -> dict:
        answer = self._guarded(lambda: json.loads(self._helper.read_line(self._seconds)))
        if "error" in answer:
            self._clean = True
            raise MediaError(answer["error"])
        return answer

    def _guarded(self, work):
        try:
            return work()
        except TimeoutError:
            self._clean = False
            raise MediaError(f"the decoder did not answer within {self._seconds:.1f} seconds") from None
        except (OSError, EOFError, ValueError):
            self._clean = False
            raise MediaError("the decoder crashed on it") from None


class _Helper:
    """The child process and its two pipes."""

    def __init__(self):
        environment = dict(os.environ, OPENBLAS_NUM_THREADS="1", OMP_NUM_THREADS="1")
        environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
        self._process = subprocess.Popen(
            [sys.executable, "-c", "from smolvlm_jax.processing.isolation import serve; serve()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
            bufsize=0,
            start_new_session=True,  # Ctrl-C is for the parent
        )
        self._out = self._process.stdout.fileno()
        self._pending = b""
        self.started = False

    def alive(self) -> bool:
        return self._process.poll() is None

    def send(self, request: dict):
        self._process.stdin.write(json.dumps(request).encode() + b"\n")

    def read_line(self, seconds: float) -> bytes:
        seconds = seconds if self.started else seconds + _START_SECONDS
        deadline = time.monotonic() + seconds
        while b"\n" not in self._pending:
            self._pending += self._receive(1 << 16, deadline)
        self.started = True
        line, self._pending = self._pending.split(b"\n", 1)
        return line

    def read(self, size: int, seconds: float) -> bytearray:
        deadline = time.monotonic() + seconds
        out = bytearray(self._pending[:size])
        self._pending = self._pending[size:]
        while len(out) < size:
            out += self._receive(size - len(out), deadline)
        return out

    def _receive(self, size: int, deadline: float) -> bytes:
        ready, _, _ = select.select([self._out], [], [], max(0, deadline - time.monotonic()))
        if not ready:
            raise TimeoutError
        got = os.read(self._out, min(size, 1 << 20))
        if not got:
            raise EOFError
        return got

    def kill(self):
        self._process.kill()
        self._process.wait()
        self._process.stdin.close()
        self._process.stdout.close()


def _take(backend: str) -> _Helper:
    with _lock:
        waiting = _idle.setdefault((os.getpid(), backend), [])
        while waiting:
            helper = waiting.pop()
            if helper.alive():
                return helper
    return _Helper()


def _give(backend: str, helper: _Helper):
    with _lock:
        _idle.setdefault((os.getpid(), backend), []).append(helper)


@atexit.register
def end_helpers():
    """End the helpers of this process that are waiting for work."""
    for key in [key for key in _idle if key[0] == os.getpid()]:
        for helper in _idle.pop(key):
            helper.kill()


def serve():
    """The helper's side: answer requests until the parent is gone."""
    import resource

    from .decode import open_reader

    try:
        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    except (ValueError, OSError):
        pass  # a system without this limit, or with a lower one already
    # The libraries may print what they like; the parent reads a descriptor that only this function writes to.
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    reader = None
    for line in sys.stdin.buffer:
        request = json.loads(line)
        try:
            if "open" in request:
                reader = open_reader(request["backend"], request["open"], request["max_pixels"])
                _tell(out, {"total": reader.total, "fps": reader.fps})
            elif "times" in request:
                _tell(out, {"times": reader.times()})
            elif "frames" in request:
                for frame in reader.frames(request["frames"]):
                    _tell(out, {"shape": frame.shape}, frame)
            else:  # "close", which nobody waits for an answer to
                reader = None
        except Exception as error:  # whatever the library raises is news for the parent
            _tell(out, {"error": str(error) or type(error).__name__})


def _tell(out, header: dict, frame: np.ndarray | None = None):
    out.write(json.dumps(header).encode() + b"\n")
    if frame is not None:
        out.write(np.ascontiguousarray(frame).data)
    out.flush()
