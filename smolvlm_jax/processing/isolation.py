"""Decoding videos in a child process, because a damaged file can crash its decoder.

decord ends the whole process on some damaged files (a failed allocation in its C++), and no thread can be stopped from
outside. So the decoding libraries run in a child that may crash, hang or ask for all memory; its parent raises a MediaError
then. A child serves one video after another.

The cost of a video is counted in the child, in packets and pixels. The parent's clock only ends a child that makes no
progress: a working child sends a message several times a second, however slow it is.
"""

import atexit
import contextlib
import importlib
import os
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from ..child import AVAILABLE, Child, parent
from ..errors import MediaError
from .limits import MediaLimits
from .pyav import Misread
from .readers import BACKENDS, VideoReader, open_reader
from .work import LimitError, RefusedError, Work

__all__ = ["AVAILABLE", "IsolatedReader", "end_helpers", "serve"]

# Address space of a child in bytes: enough for frames of 8K, too little to exhaust the machine.
_MEMORY = 6 * 2**30
# Time without progress, on top of MediaLimits.decode_seconds: libraries may read a whole file before they say a word.
_BYTES_PER_SECOND = 2_000_000
# What a child sends while it works, and the errors whose kind matters to its parent.
_WORKING = "working"
_KINDS = {kind.__name__: kind for kind in (MediaError, RefusedError, LimitError, Misread)}

# Children that wait for work, by process id, since a fork must not use its parent's children, and by backend: each backend
# brings its own FFmpeg, and two of those in one process interfere with each other.
_idle: dict[tuple[int, str], list[Child]] = {}
_lock = threading.Lock()


class IsolatedReader:
    """A video opened in a child process: a VideoReader like those of readers.py.

    Args:
        backend: name of the decoding library.
        path: of the file.
        limits: what may be read.
        options: keywords of `readers.open_reader`.
    """

    def __init__(self, backend: str, path: str, limits: MediaLimits, **options: bool):
        self._seconds = limits.decode_seconds + os.path.getsize(path) / _BYTES_PER_SECOND
        self._backend = backend
        self._clean = True
        self._helper: Child = self._guarded(_take, backend)
        try:
            self._send("open", backend, os.path.abspath(path), limits.max_pixels, limits.max_decoded_pixels, options)
            self.total, self.fps, self.seconds, self.plain = self._answer()
        except BaseException:
            self.close()
            raise

    def frames(self, indices: Sequence[int] | np.ndarray) -> Iterator[np.ndarray]:
        """The frames of these indices, uint8 (h, w, 3), each as it is decoded."""
        self._clean = False  # until the last frame has been read, the channel holds frames that are not wanted any more
        wanted = [int(index) for index in indices]
        self._send("frames", wanted)
        for _ in wanted:
            yield self._answer()
        self._clean = True

    def close(self) -> None:
        """Keep the child for the next video, or end it if it has not answered everything."""
        with contextlib.suppress(OSError):  # it may have ended
            if self._clean:
                self._helper.send(("close",), self._seconds)
                with _lock:
                    _idle.setdefault((os.getpid(), self._backend), []).append(self._helper)
                return
        self._helper.end()

    def _send(self, *request: Any) -> None:
        self._guarded(self._helper.send, request, self._seconds)

    def _answer(self) -> Any:
        while (answer := self._guarded(self._helper.receive, self._seconds)) == _WORKING:
            pass
        value, error, kind = answer
        if error is not None:
            self._clean = True
            raise _KINDS.get(kind, MediaError)(error)
        return value

    def _guarded(self, work, *arguments) -> Any:
        try:
            return work(*arguments)
        except TimeoutError:
            self._clean = False
            raise LimitError(f"the decoder did not answer within {self._seconds:.1f} seconds") from None
        except (OSError, EOFError):
            self._clean = False
            raise MediaError("the decoder crashed on it") from None


def _take(backend: str) -> Child:
    with _lock:
        waiting = _idle.setdefault((os.getpid(), backend), [])
        while waiting:
            helper = waiting.pop()
            if helper.alive():
                return helper
            helper.end()
    return Child(__name__, quiet=True).begin(backend)


@atexit.register
def end_helpers() -> None:
    """End the children of this process that wait for work."""
    for key in [key for key in _idle if key[0] == os.getpid()]:
        for helper in _idle.pop(key):
            helper.end()


def serve() -> None:
    """In the child: answer requests with (value, None, None) or (None, error, kind) until the parent is gone."""
    import resource

    channel = parent()
    with contextlib.suppress(ValueError, OSError):  # a system without this limit, or with a lower one already
        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    module = BACKENDS[channel.receive()]
    with contextlib.suppress(Exception):  # opening a video reports why the library cannot be imported
        importlib.import_module(module)  # now, since this does not count as time of the first video
    channel.send(None)
    reader: VideoReader | None = None
    for kind, *arguments in channel.messages():
        try:
            if kind == "open":
                backend, path, max_pixels, max_decoded_pixels, options = arguments
                work = Work(max_pixels, max_decoded_pixels, lambda: channel.send(_WORKING))
                reader = open_reader(backend, path, work, **options)
                channel.send(((reader.total, reader.fps, reader.seconds, reader.plain), None, None))
            elif kind == "close":
                reader = None
            elif reader is not None:
                for frame in reader.frames(*arguments):
                    channel.send((np.ascontiguousarray(frame), None, None))
        except Exception as error:  # the libraries raise what they like; the parent reports it
            channel.send((None, str(error) or type(error).__name__, type(error).__name__))
