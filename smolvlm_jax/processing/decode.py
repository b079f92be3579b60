"""Video files to chosen frames. Which frames is decided elsewhere, so the library that decodes is a detail.

decord where it is installed, PyAV elsewhere. Both number frames by presentation time, so index i is the same frame.
"""

import importlib.util
import math
import os
from collections.abc import Callable, Iterator

import numpy as np

from ..errors import InputError, MediaError, MissingExtraError
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
    def __init__(self, path: str):
        import decord

        decord.logging.set_level(decord.logging.QUIET)
        self._reader = decord.VideoReader(path, num_threads=1)
        self.total = len(self._reader)
        self.fps = float(self._reader.get_avg_fps())

    def frames(self, indices) -> Iterator[np.ndarray]:
        for index in indices:
            yield self._reader[int(index)].asnumpy()

    def close(self):
        self._reader = None


class _PyAV:
    def __init__(self, path: str):
        import av

        av.logging.set_level(av.logging.PANIC)
        self._container = av.open(path)
        if not self._container.streams.video:
            raise MediaError("there is no video stream in it")
        self._stream = stream = self._container.streams.video[0]
        stream.thread_type = "SLICE"
        # Presentation times from the packets alone: cheap, and exact for variable rates too.
        packets = [
            (p.pts if p.pts is not None else p.dts, p.is_keyframe)
            for p in self._container.demux(stream)
            if p.size and (p.pts is not None or p.dts is not None)
        ]
        self._times = sorted(time for time, _ in packets)
        self.total = len(self._times)
        rate = stream.average_rate or stream.guessed_rate or stream.base_rate
        self.fps = float(rate) if rate else 0.0
        self._container.seek(0)

    def frames(self, indices) -> Iterator[np.ndarray]:
        decoded, position = None, -1
        for index in indices:
            wanted = self._times[int(index)]
            # Going on is cheaper than seeking while the frame is near.
            if decoded is None or not 0 <= index - position <= 32:
                self._container.seek(wanted, stream=self._stream, backward=True)
                decoded = self._container.decode(self._stream)
            for frame in decoded:
                if frame.pts is None or frame.pts >= wanted:
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


def decode_video(
    source,
    choose: Callable[[VideoMetadata], np.ndarray] | None = None,
    *,
    keep: Callable[[np.ndarray], object] = lambda frame: frame,
    backend: str | None = None,
    limits: MediaLimits = MediaLimits(),
) -> tuple[list, VideoMetadata]:
    """([keep(frame) for each chosen frame], metadata) of the video at `source`, a path or an http(s) URL.

    choose: from the metadata to the indices wanted; all frames where it is None. keep: what to make of a frame, uint8
    (h, w, 3), before the next one is decoded, so that no more than what it returns is held in memory.
    Raises MediaError, which names the source, whatever is wrong with it.
    """
    name = choose_backend(backend)
    downloaded = None
    try:
        if is_url(source):
            from .http import download

            path = downloaded = download(source, limits, limits.max_video_bytes)
        else:
            path = os.fspath(source)
            if not limits.files:
                raise MediaError(f"local files are switched off, so {describe_source(path)} is not opened")
            open_regular(path, limits.max_video_bytes, "video").close()
        return _decode(path, name, choose, keep)
    except (MediaError, InputError):
        raise
    except Exception as error:  # the libraries raise what they like on a damaged file
        raise MediaError(f"cannot decode the video {describe_source(source)}: {error or type(error).__name__}") from error
    finally:
        if downloaded is not None:
            os.unlink(downloaded)


def _decode(path, name, choose, keep):
    reader = {"decord": _Decord, "pyav": _PyAV}[name](path)
    try:
        if reader.total < 1:
            raise MediaError(f"the video {describe_source(path)} has no frames")
        if not math.isfinite(reader.fps) or reader.fps <= 0:
            raise MediaError(f"the video {describe_source(path)} does not say its rate")
        metadata = VideoMetadata(
            total_num_frames=reader.total, fps=reader.fps, duration=reader.total / reader.fps, video_backend=name
        )
        indices = np.arange(reader.total) if choose is None else np.asarray(choose(metadata))
        kept = []
        for frame in reader.frames(indices):
            metadata.height, metadata.width = frame.shape[:2]
            kept.append(keep(frame))
        metadata.frames_indices = [int(index) for index in indices]
        return kept, metadata
    finally:
        reader.close()
