"""Video files to chosen frames. Which frames is decided elsewhere, so the library that decodes is a detail."""

import contextlib
import importlib.util
import os
import tempfile
from collections.abc import Callable, Iterator
from typing import IO, Any

import numpy as np

from ..errors import InputError, JobError, MediaError, MissingExtraError
from ..storage import download, is_store
from . import http, isolation
from .containers import HEAD, recognise
from .fetch import encoded_bytes, is_url, open_object, open_regular, unread_object
from .limits import MediaLimits, describe_source
from .metadata import VideoMetadata
from .parts import local_path
from .pyav import Misread
from .readers import BACKENDS, VideoReader, open_reader
from .work import RefusedError, Work

__all__ = ["choose_backend", "decode_video"]

# PyAV says at which time each decoded frame is presented, which decord does not, and has the newer FFmpeg.
_PREFERRED = ("pyav", "decord")


def choose_backend(backend: str | None = None) -> str:
    """The name of the decoding library: the given one, or PyAV where it is installed and decord elsewhere.

    Raises:
        InputError: if there is no such backend.
        MissingExtraError: if it is not installed.
    """
    if backend not in (None, *BACKENDS):
        raise InputError(f"video backend {backend!r}; it is one of {', '.join(BACKENDS)}")
    for name in _PREFERRED:
        if backend in (None, name) and _installed(name):
            return name
    raise MissingExtraError("decoding videos" if backend is None else f"decoding videos with {backend}", "pyav")


def decode_video(
    source: str | os.PathLike[str] | bytes | bytearray,
    choose: Callable[[VideoMetadata], np.ndarray] | None = None,
    *,
    keep: Callable[[np.ndarray], Any] = lambda frame: frame,
    backend: str | None = None,
    limits: MediaLimits | None = None,
) -> tuple[list, VideoMetadata]:
    """Decode chosen frames of a video.

    Args:
        source: a path, an http(s) or `data:` URL, base64 text, or the bytes of a file.
        choose: from the metadata to the indices wanted; None: all frames.
        keep: from a frame, uint8 (h, w, 3), to what is returned of it. Called before the next frame is decoded, so that only
            what it returns is held in memory.
        backend: "decord" or "pyav"; by default PyAV where it is installed. If the one cannot read a video, or decord cannot be
            trusted with it, the other one is tried.
        limits: what may be read.

    Returns:
        [keep(frame) for each chosen frame] and the metadata.

    Raises:
        MediaError: whatever is wrong with the video; it names the source.
    """
    name, limits = choose_backend(backend), limits or MediaLimits()
    try:
        with _local_file(source, limits) as path:
            with open(path, "rb") as file:
                recognise(file.read(HEAD))
            try:
                return _read(name, path, choose, keep, limits, serial=False)
            except Misread:
                return _read("pyav", path, choose, keep, limits, serial=True)
    except MediaError as error:
        if describe_source(source) in str(error):
            raise
        raise MediaError(f"{describe_source(source)}: {error}") from error
    except (InputError, JobError):
        raise
    except Exception as error:  # the libraries raise what they like on a damaged file
        raise MediaError(f"cannot decode the video {describe_source(source)}: {error or type(error).__name__}") from error


def _read(
    name: str, path: str, choose: Callable | None, keep: Callable, limits: MediaLimits, *, serial: bool
) -> tuple[list, VideoMetadata]:
    name, reader = _open(name, path, limits, serial=serial)
    with contextlib.closing(reader):
        total, rate = reader.total, reader.fps
        metadata = VideoMetadata(total_num_frames=total, fps=rate, duration=total / rate, video_backend=name)
        indices = np.arange(total) if choose is None else np.asarray(choose(metadata))
        if len(indices) > limits.max_frames:
            raise MediaError(
                f"{len(indices)} frames are above the limit of {limits.max_frames}; choose with do_sample_frames=True, "
                "or raise --max-frames (MediaLimits.max_frames)"
            )
        kept = []
        for frame in reader.frames(indices):
            metadata.height, metadata.width = frame.shape[:2]
            kept.append(keep(frame))
        metadata.frames_indices = [int(index) for index in indices]
        metadata.frames_seconds = [float(reader.seconds[index]) for index in indices]
    return kept, metadata


@contextlib.contextmanager
def _local_file(source: Any, limits: MediaLimits) -> Iterator[str]:
    """The path of a regular file with the video."""
    source = local_path(source)
    if is_url(source):
        with _temporary_file() as (file, path):
            http.download(source, limits, limits.max_video_bytes, file)
            file.flush()
            yield path
    elif isinstance(source, str) and is_store(source):
        found = open_object(source, limits, limits.max_video_bytes, "video")
        with _temporary_file() as (file, path):
            try:
                download(found.path, file, found.entry)
            except OSError as error:
                raise unread_object(source, error, "video") from error
            file.flush()
            yield path
    elif (content := encoded_bytes(source, limits.max_video_bytes, "video")) is not None:
        with _temporary_file() as (file, path):
            file.write(content)
            file.flush()
            yield path
    else:
        path = os.fspath(source)
        if not limits.files:
            raise MediaError(f"local files are switched off, so {describe_source(path)} is not opened")
        open_regular(path, limits.max_video_bytes, "video").close()
        yield path


@contextlib.contextmanager
def _temporary_file() -> Iterator[tuple[IO[bytes], str]]:
    """A file and a path to it. Linux keeps it without a name, so that nothing of it is left by a process that is killed."""
    with tempfile.TemporaryFile() as file:
        path = f"/proc/{os.getpid()}/fd/{file.fileno()}"
        if os.path.exists(path):
            yield file, path
            return
    descriptor, path = tempfile.mkstemp(suffix=".video")
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file, path
    finally:
        os.unlink(path)


def _installed(name: str) -> bool:
    return importlib.util.find_spec(BACKENDS[name]) is not None


def _open(name: str, path: str, limits: MediaLimits, *, serial: bool) -> tuple[str, VideoReader]:
    """The video by the library `name`, or by the other one, and the name of that which reads it."""
    if serial:
        return name, _reader(name, path, limits, serial=True)
    if name == "decord" and _isolated(limits) and _installed("pyav"):
        return _decord_or_pyav(path, limits)
    try:
        return name, _reader(name, path, limits)
    except RefusedError:
        raise
    except Exception:  # the libraries raise what they like
        other = "decord" if name == "pyav" else "pyav"
        if not (_isolated(limits) and _installed(other)):  # two FFmpegs in one process interfere with each other
            raise
        with contextlib.suppress(Exception):
            return other, _reader(other, path, limits)
        raise


def _decord_or_pyav(path: str, limits: MediaLimits) -> tuple[str, VideoReader]:
    """By decord if PyAV finds nothing in the video that decord is known to read wrongly, and both find the same times."""
    try:
        checked = _reader("pyav", path, limits, vouch=True)
    except RefusedError:
        raise
    except Exception:
        with contextlib.suppress(Exception):
            return "decord", _reader("decord", path, limits)
        raise
    with contextlib.suppress(Exception):
        if checked.plain:
            reader = _reader("decord", path, limits)
            if reader.total == checked.total and np.allclose(reader.seconds, checked.seconds, rtol=1e-4, atol=1e-3):
                checked.close()
                reader.fps, reader.seconds = checked.fps, checked.seconds
                return "decord", reader
            reader.close()
    return "pyav", checked


def _isolated(limits: MediaLimits) -> bool:
    return limits.isolate and isolation.AVAILABLE


def _reader(name: str, path: str, limits: MediaLimits, **options: bool) -> VideoReader:
    if _isolated(limits):
        return isolation.IsolatedReader(name, path, limits, **options)
    return open_reader(name, path, Work(limits.max_pixels, limits.max_decoded_pixels), **options)
