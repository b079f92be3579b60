"""Video files to chosen frames. Which frames is decided elsewhere, so the library that decodes is a detail."""

import contextlib
import importlib.util
import os
from collections.abc import Callable
from typing import Any

import numpy as np

from ..errors import InputError, MediaError, MissingExtraError
from . import http, isolation
from .fetch import is_url, open_regular
from .limits import MediaLimits, describe_source
from .metadata import VideoMetadata
from .readers import BACKENDS, VideoReader, open_reader

__all__ = ["choose_backend", "decode_video"]


def choose_backend(backend: str | None = None) -> str:
    """The name of the decoding library: the given one, or the first that is installed.

    Raises:
        InputError: if there is no such backend.
        MissingExtraError: if it is not installed.
    """
    if backend not in (None, *BACKENDS):
        raise InputError(f"video backend {backend!r}; it is one of {', '.join(BACKENDS)}")
    for name in BACKENDS:
        if backend in (None, name) and importlib.util.find_spec(BACKENDS[name]) is not None:
            return name
    raise MissingExtraError("decoding videos" if backend is None else f"decoding videos with {backend}", "pyav")


def decode_video(
    source: str | os.PathLike[str],
    choose: Callable[[VideoMetadata], np.ndarray] | None = None,
    *,
    keep: Callable[[np.ndarray], Any] = lambda frame: frame,
    backend: str | None = None,
    limits: MediaLimits | None = None,
) -> tuple[list, VideoMetadata]:
    """Decode chosen frames of a video.

    Args:
        source: A path or an http(s) URL.
        choose: From the metadata to the indices wanted; None: all frames.
        keep: From a frame, uint8 (h, w, 3), to what is returned of it. Called before the next frame is decoded, so that only
            what it returns is held in memory.
        backend: "decord" or "pyav"; by default the first that is installed.
        limits: What may be read.

    Returns:
        [keep(frame) for each chosen frame] and the metadata.

    Raises:
        MediaError: whatever is wrong with the video; it names the source.
    """
    name, limits = choose_backend(backend), limits or MediaLimits()
    downloaded: str | None = None
    try:
        path = os.fspath(source)
        if is_url(path):
            path = downloaded = http.download(path, limits, limits.max_video_bytes)
        elif not limits.files:
            raise MediaError(f"local files are switched off, so {describe_source(path)} is not opened")
        with open_regular(path, limits.max_video_bytes, "video") as file:
            _refuse_text(file.read(512))
        with contextlib.closing(_open(name, path, limits)) as reader:
            total, rate = reader.total, reader.fps
            metadata = VideoMetadata(total_num_frames=total, fps=rate, duration=total / rate, video_backend=name)
            indices = np.arange(total) if choose is None else np.asarray(choose(metadata))
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


def _refuse_text(head: bytes) -> None:
    """Refuse a playlist, a text that leads the decoder to other files and addresses; no container is text."""
    if head and not head.startswith(b"YUV4MPEG2") and all(byte >= 32 or byte in b"\t\n\r\f" for byte in head):
        raise MediaError("it is text (a playlist?), not a video")


def _open(backend: str, path: str, limits: MediaLimits) -> VideoReader:
    if limits.isolate and isolation.AVAILABLE:
        return isolation.IsolatedReader(backend, path, max_pixels=limits.max_pixels, seconds=limits.decode_seconds)
    return open_reader(backend, path, limits.max_pixels)
