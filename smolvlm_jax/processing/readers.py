"""The libraries that decode videos, behind one interface. Index i is the i-th frame that a player presents, by either."""

import math
from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np

from ..errors import MediaError
from .containers import HEAD, recognise
from .pyav import Misread, PyAVReader
from .work import RefusedError, Work

__all__ = ["BACKENDS", "VideoReader", "open_reader"]

# Name of a backend: the module it imports.
BACKENDS = {"decord": "decord", "pyav": "av"}
# What decord's index can be made from; elsewhere it returns other frames than asked for, without an error.
_DECORD_READS = ("mov", "matroska", "avi")


class VideoReader(Protocol):
    """An opened video.

    Attributes:
        total: number of frames that are presented.
        fps: frames a second on average.
        seconds: float64 (total,): when each frame is presented, counted from the first.
        plain: another library may be trusted with it, if it finds the same times.
    """

    total: int
    fps: float
    seconds: np.ndarray
    plain: bool

    def frames(self, indices: Sequence[int] | np.ndarray) -> Iterator[np.ndarray]:
        """The frames of these indices, uint8 (h, w, 3), each as it is decoded."""

    def close(self) -> None:
        """Release the file."""


class _Decord:
    """By decord, from the first frame on: it says nothing about where a seek has landed, and seeks land on other frames.

    Args:
        path: of the file.
        work: what may be decoded.
    """

    plain = False

    def __init__(self, path: str, work: Work):
        with open(path, "rb") as file:
            if recognise(file.read(HEAD)) not in _DECORD_READS:
                raise MediaError("decord gives wrong frames of such files; PyAV reads them: pip install 'smolvlm-jax[pyav]'")
        self._path, self._work = path, work
        self._open()
        self.total = len(self._reader)
        self.fps = float(self._reader.get_avg_fps())
        times = self._reader.get_frame_timestamp(range(self.total))[:, 0].astype(np.float64)
        if times[0] < 0 or not (np.diff(times) > 0).all():
            raise MediaError("decord cannot tell its frames apart by time; PyAV can: pip install 'smolvlm-jax[pyav]'")
        self.seconds = times - times[0]

    def _open(self) -> None:
        import decord

        decord.logging.set_level(decord.logging.QUIET)
        self._reader, self._next = decord.VideoReader(self._path, num_threads=1), 0

    def frames(self, indices: Sequence[int] | np.ndarray) -> Iterator[np.ndarray]:
        for index in indices:
            if index < self._next:
                self._open()
            for last in (*(False for _ in range(int(index) - self._next)), True):
                self._work.packet()
                try:
                    frame = self._reader.next()
                except Exception as error:  # StopIteration among them
                    raise Misread("decord does not decode all of its frames") from error
                self._work.frame(frame.shape[1], frame.shape[0])
                if last:
                    self._next = int(index) + 1
                    yield _whole(frame.asnumpy())

    def close(self) -> None:
        self._reader = None


def _whole(frame: np.ndarray) -> np.ndarray:
    """uint8 (h, w, 3). Small turned frames come with the padding of their rows, counted as channels."""
    height, width = frame.shape[:2]
    if frame.shape[2] == 3:
        return frame
    return np.ascontiguousarray(frame.reshape(height, -1)[:, : 3 * width]).reshape(height, width, 3)


def open_reader(backend: str, path: str, work: Work, *, serial: bool = False, vouch: bool = False) -> VideoReader:
    """Open the video at `path` in this process.

    Args:
        backend: "pyav" or "decord".
        path: of the file.
        work: what may be read and decoded.
        serial: for PyAV: count the frames by decoding all of them.
        vouch: for PyAV: find out whether the video is plain.

    Raises:
        MediaError: it has no frames, or no rate.
    """
    reader: VideoReader
    decord = backend == "decord"
    reader = _Decord(path, work) if decord else PyAVReader(path, work, serial=serial, vouch=vouch)
    if reader.total < 1:
        raise RefusedError("it has no frames")
    # The rate that a file states may be missing, or be that of its clock: then it follows from the times of the frames.
    length = float(reader.seconds[-1])
    stated = math.isfinite(reader.fps) and 0 < reader.fps <= 100_000
    if length > 0 and math.isfinite(length) and not (stated and 2 / 3 < (reader.total - 1) / reader.fps / length < 1.5):
        reader.fps = (reader.total - 1) / length
    elif not stated and reader.total == 1:
        reader.fps = 1.0
    elif not stated:
        raise RefusedError("it does not say its rate")
    return reader
