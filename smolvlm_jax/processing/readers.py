"""The libraries that decode videos, behind one interface. Both number frames by presentation time, so that index i is the
same frame."""

import math
from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np

from ..errors import MediaError

__all__ = ["BACKENDS", "VideoReader", "open_reader"]

# Name of a backend: the module it imports. The first that is installed is the default.
BACKENDS = {"decord": "decord", "pyav": "av"}


class VideoReader(Protocol):
    """An opened video.

    Attributes:
        total: Number of frames.
        fps: Frames a second on average.
    """

    total: int
    fps: float

    def frames(self, indices: Sequence[int] | np.ndarray) -> Iterator[np.ndarray]:
        """The frames of these indices, uint8 (h, w, 3), each as it is decoded."""

    def close(self) -> None:
        """Release the file."""


class _Decord:
    """By decord. fps is what the file says: 0, infinite or NaN if it does not."""

    def __init__(self, path: str):
        import decord

        decord.logging.set_level(decord.logging.QUIET)
        self._reader = decord.VideoReader(path, num_threads=1)
        self.total = len(self._reader)
        self.fps = float(self._reader.get_avg_fps())

    def times(self) -> tuple[float, float]:
        """Seconds of the first and the last frame."""
        first, last = (float(self._reader.get_frame_timestamp(index)[0]) for index in (0, self.total - 1))
        return first, last

    def frames(self, indices: Sequence[int] | np.ndarray) -> Iterator[np.ndarray]:
        for index in indices:
            frame = self._reader[int(index)].asnumpy()
            if frame.shape[2] != 3:
                # Small turned frames come with the padding of their rows, counted as channels.
                height, width = frame.shape[:2]
                frame = np.ascontiguousarray(frame.reshape(height, -1)[:, : 3 * width]).reshape(height, width, 3)
            yield frame

    def close(self) -> None:
        self._reader = None


class _PyAV:
    """By PyAV. fps as with decord."""

    def __init__(self, path: str, max_pixels: int):
        import av

        av.logging.set_level(av.logging.PANIC)
        self._container = av.open(path, options={"protocol_whitelist": "file"})
        if not self._container.streams.video:
            raise MediaError("there is no video stream in it")
        self._stream = stream = self._container.streams.video[0]
        stream.thread_type = "SLICE"
        if (stream.width or 0) * (stream.height or 0) > max_pixels:
            raise MediaError(f"frames of {stream.width}×{stream.height} pixels are above the limit of {max_pixels}")
        # Presentation times from the packets alone: cheap, and exact for variable rates too.
        packets = (packet for packet in self._container.demux(stream) if packet.size)
        times = (packet.pts if packet.pts is not None else packet.dts for packet in packets)
        self._times = sorted(time for time in times if time is not None)
        self.total = len(self._times)
        rate = stream.average_rate or stream.guessed_rate or stream.base_rate
        self.fps = float(rate) if rate else 0.0
        self._container.seek(0)

    def times(self) -> tuple[float, float]:
        """Seconds of the first and the last frame."""
        base = float(self._stream.time_base or 0)
        return self._times[0] * base, self._times[-1] * base

    def frames(self, indices: Sequence[int] | np.ndarray) -> Iterator[np.ndarray]:
        decoded, position = None, -1
        for index in indices:
            wanted = self._times[int(index)]
            # Going on is cheaper than seeking while the frame is near.
            if decoded is None or not 0 <= index - position <= 32:
                self._container.seek(wanted, stream=self._stream, backward=True)
                decoded = self._container.decode(self._stream)
            for frame in decoded:
                time = frame.pts if frame.pts is not None else frame.dts
                if time is None:
                    raise MediaError("its frames do not say their times")
                if time >= wanted:
                    position = index
                    yield _upright(frame)
                    break
            else:
                raise MediaError(f"frame {index} of {self.total} does not decode")

    def close(self) -> None:
        self._container.close()


def _upright(frame) -> np.ndarray:
    pixels = frame.to_ndarray(format="rgb24")
    turns = round((getattr(frame, "rotation", 0) or 0) / 90) % 4
    return np.ascontiguousarray(np.rot90(pixels, turns)) if turns else pixels


def open_reader(backend: str, path: str, max_pixels: int) -> VideoReader:
    """Open the video at `path` in this process. max_pixels: largest width × height of a frame, for backends that tell early.

    Raises:
        MediaError: it has no frames, or no rate.
    """
    reader = _Decord(path) if backend == "decord" else _PyAV(path, max_pixels)
    if reader.total < 1:
        raise MediaError("it has no frames")
    if not (math.isfinite(reader.fps) and 0 < reader.fps <= 100_000):  # then it follows from the times of the frames
        first, last = reader.times()
        if reader.total == 1 or not math.isfinite(last - first) or last <= first:
            raise MediaError("it does not say its rate")
        reader.fps = (reader.total - 1) / (last - first)
    return reader
