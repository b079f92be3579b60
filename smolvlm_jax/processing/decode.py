"""Video files to chosen frames. Which frames is decided elsewhere, so the library that decodes is a detail.

decord where it is installed, PyAV elsewhere. Both number frames by presentation time, so index i is the same frame.
"""

import importlib.util
import math
import os
from collections.abc import Callable, Iterator

import numpy as np

from ..errors import InputError, MediaError, MissingExtraError
from . import isolation
from .fetch import MediaLimits, describe_source, is_url, open_regular
from .metadata import VideoMetadata

BACKENDS = ("decord", "pyav")
_MODULES = {"decord": "decord", "pyav": "av"}


def choose_backend(backend: str | None = None) -> str:
    """The decoding library's name: the asked for one, or the first that is installed."""
    if backend is not None:
        if backend not in BACKENDS:
            raise InputError(f"video backend {backend!r}; it is one of {', '.join(BACKENDS)}")
        if importlib.util.find_spec(_MODULES[backend]) is None:
            raise MissingExtraError(f"decoding videos with {backend}", "pyav")
        return backend
    for name in BACKENDS:
        if importlib.util.find_spec(_MODULES[name]) is not None:
            return name
    raise MissingExtraError("decoding videos", "pyav")


class _Decord:
    def __init__(self, path: str, max_pixels: int = 2**27):
        import decord

        decord.logging.set_level(decord.logging.QUIET)
        self._reader = decord.VideoReader(path, num_threads=1)
        self.total = len(self._reader)
        self.fps = float(self._reader.get_avg_fps())

    def times(self) -> tuple[float, float]:
        """Seconds of the first and the last frame."""
        return tuple(float(self._reader.get_frame_timestamp(index)[0]) for index in (0, self.total - 1))

    def frames(self, indices) -> Iterator[np.ndarray]:
        for index in indices:
            frame = self._reader[int(index)].asnumpy()
            if frame.shape[2] != 3:
                # Small turned frames come with the padding of their rows, counted as channels.
                height, width = frame.shape[:2]
                frame = np.ascontiguousarray(frame.reshape(height, -1)[:, : 3 * width]).reshape(height, width, 3)
            yield frame

    def close(self):
        self._reader = None


class _PyAV:
    def __init__(self, path: str, max_pixels: int = 2**27):
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

    def frames(self, indices) -> Iterator[np.ndarray]:
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

    def close(self):
        self._container.close()


def _upright(frame) -> np.ndarray:
    pixels = frame.to_ndarray(format="rgb24")
    turns = round((getattr(frame, "rotation", 0) or 0) / 90) % 4
    return np.ascontiguousarray(np.rot90(pixels, turns)) if turns else pixels


def open_reader(backend: str, path: str, max_pixels: int):
    """The video at `path` in this very process: an object with total, fps, times(), frames(indices) and close()."""
    return {"decord": _Decord, "pyav": _PyAV}[backend](path, max_pixels)


def decode_video(
    source,
    choose: Callable[[VideoMetadata], np.ndarray] | None = None,
    *,
    keep: Callable[[np.ndarray], object] = lambda frame: frame,
    backend: str | None = None,
    limits: MediaLimits | None = None,
) -> tuple[list, VideoMetadata]:
    """([keep(frame) for each chosen frame], metadata) of the video at `source`, a path or an http(s) URL.

    choose: from the metadata to the indices wanted; all frames where it is None. keep: what to make of a frame, uint8
    (h, w, 3), before the next one is decoded, so that no more than what it returns is held in memory.
    Raises MediaError, which names the source, whatever is wrong with it.
    """
    name, limits = choose_backend(backend), limits or MediaLimits()
    downloaded = None
    try:
        if is_url(source):
            from .http import download

            path = downloaded = download(source, limits, limits.max_video_bytes)
        else:
            path = os.fspath(source)
            if not limits.files:
                raise MediaError(f"local files are switched off, so {describe_source(path)} is not opened")
        with open_regular(path, limits.max_video_bytes, "video") as file:
            _refuse_text(file.read(512))
        return _decode(path, name, choose, keep, limits)
    except MediaError as error:
        if describe_source(source) in str(error):
            raise
        raise MediaError(f"{describe_source(source)}: {error}") from error
    except InputError:
        raise
    except Exception as error:  # the libraries raise what they like on a damaged file
        raise MediaError(f"cannot decode the video {describe_source(source)}: {error or type(error).__name__}") from error
    finally:
        if downloaded is not None:
            os.unlink(downloaded)


def _refuse_text(head: bytes):
    """A playlist is text that sends the decoder to other files and addresses; no container is text."""
    if head and not head.startswith(b"YUV4MPEG2") and all(byte >= 32 or byte in b"\t\n\r\f" for byte in head):
        raise MediaError("it is text (a playlist?), not a video")


def _decode(path, name, choose, keep, limits):
    if limits.isolate and isolation.AVAILABLE:
        reader = isolation.IsolatedReader(name, path, limits.max_pixels, limits.decode_seconds)
    else:
        reader = open_reader(name, path, limits.max_pixels)
    try:
        if reader.total < 1:
            raise MediaError("it has no frames")
        rate = _rate(reader)
        metadata = VideoMetadata(total_num_frames=reader.total, fps=rate, duration=reader.total / rate, video_backend=name)
        indices = np.arange(reader.total) if choose is None else np.asarray(choose(metadata))
        if len(indices) > limits.max_frames:
            raise MediaError(
                f"{len(indices)} frames are above the limit of {limits.max_frames}; choose with do_sample_frames=True, "
                "or raise MediaLimits.max_frames"
            )
        kept = []
        for frame in reader.frames(indices):
            metadata.height, metadata.width = frame.shape[:2]
            if frame.shape[0] * frame.shape[1] > limits.max_pixels:
                raise MediaError(f"frames of {frame.shape[1]}×{frame.shape[0]} pixels are above the limit")
            kept.append(keep(frame))
        metadata.frames_indices = [int(index) for index in indices]
        return kept, metadata
    finally:
        reader.close()


def _rate(reader) -> float:
    """Frames a second: what the file says on average, or else what the frames' own times come to."""
    if math.isfinite(reader.fps) and 0 < reader.fps <= 100_000:
        return reader.fps
    first, last = reader.times()
    if reader.total > 1 and math.isfinite(last - first) and last > first:
        return (reader.total - 1) / (last - first)
    raise MediaError("it does not say its rate")
