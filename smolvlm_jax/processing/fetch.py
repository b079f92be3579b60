"""From a path, URL, base64 text or bytes to a decoded picture, under limits of size, time and place.

A record of a data set is not trusted: a URL may lead to the machine's own services, and a file may claim a billion pixels.
Nothing here relies on a file's extension, follows a redirect unchecked, or reads more than it is allowed to.
"""

import base64
import contextlib
import functools
import io
import os
import stat
from collections.abc import Iterator
from typing import IO, Any, TypeGuard

from PIL import Image, ImageOps, UnidentifiedImageError

from ..errors import InputError, MediaError
from . import http
from .limits import MediaLimits, describe_source
from .pixels import channel_axis, is_array

_ORIENTATION = 0x0112
# Pillow plug-ins that start programs (Ghostscript) or need a handler that another library registers.
_UNSAFE_FORMATS = {"EPS", "WMF", "FPX", "MIC", "GRIB", "BUFR", "HDF5"}


def is_path(value: object) -> TypeGuard[str | os.PathLike]:
    """Whether `value` is text or a path object: a path, a URL or base64 text."""
    return isinstance(value, (str, os.PathLike))


def is_source(value: object) -> bool:
    """Whether `value` names or holds an encoded picture: a path, a URL, base64 text, or the bytes of a file."""
    return is_path(value) or isinstance(value, (bytes, bytearray))


def is_url(source: object) -> TypeGuard[str]:
    """Whether `source` is an http or https URL."""
    return isinstance(source, str) and source[:8].lower().startswith(("http://", "https://"))


def open_regular(path: Any, limit: int, kind: str) -> IO[bytes]:
    """Open a regular file for reading.

    Args:
        path: of the file.
        limit: its largest size in bytes.
        kind: what a message calls it, "picture" or "video".

    Raises:
        MediaError: it cannot be opened, is too large, or is a pipe or device, which might never end.
    """
    name = os.fspath(path)
    try:
        # O_NONBLOCK: opening a pipe without a writer would wait for ever.
        descriptor = os.open(name, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except (OSError, ValueError) as error:
        raise MediaError(f"cannot open the {kind} {describe_source(name)}: {error}") from error
    try:
        info = os.fstat(descriptor)
        if not stat.S_ISREG(info.st_mode):
            raise MediaError(f"the {kind} {describe_source(name)} is not a regular file")
        if info.st_size > limit:
            raise MediaError(f"the {kind} {describe_source(name)} has {info.st_size} bytes, above the limit of {limit}")
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def open_media(source: Any, limits: MediaLimits) -> IO[bytes]:
    """A readable binary file of an encoded picture.

    Args:
        source: bytes, an http(s) URL, a path, a `data:` URL, or base64 text of 64 characters and more.
        limits: what may be read.

    Raises:
        MediaError: there is nothing at `source`, or the limits forbid it.
    """
    if isinstance(source, (bytes, bytearray)):
        if len(source) > limits.max_bytes:
            raise MediaError(f"the picture has {len(source)} bytes, above the limit of {limits.max_bytes}")
        return io.BytesIO(bytes(source))
    if is_url(source):
        return io.BytesIO(http.fetch_url(source, limits, limits.max_bytes))
    text = os.fspath(source)
    if isinstance(text, str) and text[:5].lower() == "data:":
        return io.BytesIO(_decode_base64(text.partition(",")[2], limits, whole=text))
    if os.path.exists(text):
        if not limits.files:
            raise MediaError(f"local files are switched off, so {describe_source(text)} is not opened")
        return open_regular(text, limits.max_bytes, "picture")
    if isinstance(text, str) and len(text) >= 64 and not isinstance(source, os.PathLike):
        return io.BytesIO(_decode_base64(text, limits, whole=text))
    raise MediaError(f"no picture at {describe_source(text)}; pass a path, an http(s) or data: URL, or base64 text")


def _decode_base64(text: str, limits: MediaLimits, *, whole: str) -> bytes:
    if len(text) > limits.max_bytes * 4 // 3 + 4096:
        raise MediaError(f"base64 text of {len(text)} characters is above the limit of {limits.max_bytes} bytes")
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except ValueError as error:
        raise MediaError(f"no picture at {describe_source(whole)}: no such file, and not base64 either ({error})") from error


def load_image(source: Any, limits: MediaLimits | None = None) -> Image.Image:
    """The first frame of the picture at `source`, turned as its EXIF orientation says, as RGB. Alpha is dropped.

    Args:
        source: a path, an http(s) URL, a `data:` URL, base64 text, or the bytes of a file.
        limits: what may be read; None takes the defaults of MediaLimits.

    Raises:
        MediaError: whatever is wrong with the source, which the message names.
    """
    with _opened(source, limits or MediaLimits()) as image:
        image.load()
        turned = ImageOps.exif_transpose(image) if _orientation(image) > 1 else image
        return turned if turned.mode == "RGB" else turned.convert("RGB")


def image_size(value: Any, limits: MediaLimits | None = None, exif_transpose: bool = False) -> tuple[int, int]:
    """(height, width) of a picture from its header or shape; no pixel is decoded.

    Args:
        value: a picture as `layout.nest_images` takes it. A path, URL or encoded picture counts as turned by its EXIF
            orientation, as `load_image` turns it.
        limits: what may be read; None takes the defaults of MediaLimits.
        exif_transpose: count a Pillow image as turned by its EXIF orientation too.

    Raises:
        MediaError: as `load_image`.
        InputError: `value` is no picture.
    """
    if is_source(value):
        with _opened(value, limits or MediaLimits()) as image:
            return _turned_size(image, turn=True)
    if isinstance(value, Image.Image):
        return _turned_size(value, turn=exif_transpose)
    if is_array(value):
        return tuple(value.shape[1:] if channel_axis(value.shape) == 0 else value.shape[:2])
    raise InputError(f"a picture of type {type(value).__name__}; pass a Pillow image, an array, a path or a URL")


@contextlib.contextmanager
def _opened(source: Any, limits: MediaLimits) -> Iterator[Image.Image]:
    """The picture at `source`, with its header read and its size checked. Any exception in the block becomes a MediaError."""
    try:
        with open_media(source, limits) as file, Image.open(file, formats=_safe_formats()) as image:
            width, height = image.size
            if width * height > limits.max_pixels:
                raise MediaError(
                    f"the picture {describe_source(source)} claims {width}×{height} pixels, above the limit of "
                    f"{limits.max_pixels}; raise MediaLimits.max_pixels if that is meant"
                )
            yield image
    except MediaError:
        raise
    except UnidentifiedImageError as error:
        raise MediaError(f"cannot decode {describe_source(source)}: no picture of a kind that Pillow knows") from error
    except Exception as error:  # a damaged file raises whatever its plug-in happens to raise
        raise MediaError(f"cannot decode the picture {describe_source(source)}: {error or type(error).__name__}") from error


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8. Pillow decodes a PNG to look for EXIF behind the pixels, so ask only if some is there."""
    whole = image.format != "PNG" or "exif" in image.info or _text_after_pixels(image)
    return (image.getexif() if whole else Image.Image.getexif(image)).get(_ORIENTATION, 1)


def _text_after_pixels(image: Image.Image) -> bool:
    """Whether a PNG file has metadata behind its pixel data, from the chunks' headers."""
    file = getattr(image, "fp", None)
    if file is None:  # decoded already
        return True
    place = file.tell()
    try:
        file.seek(8)
        pixels = False
        while len(header := file.read(8)) == 8:
            length, kind = int.from_bytes(header[:4], "big"), header[4:]
            if kind == b"IEND":
                return False
            if pixels and kind in (b"eXIf", b"zTXt", b"tEXt", b"iTXt"):
                return True
            pixels |= kind == b"IDAT"
            file.seek(length + 4, io.SEEK_CUR)
        return False
    finally:
        file.seek(place)


def _turned_size(image: Image.Image, *, turn: bool) -> tuple[int, int]:
    width, height = image.size
    return (width, height) if turn and _orientation(image) in (5, 6, 7, 8) else (height, width)


@functools.cache
def _safe_formats() -> list[str]:
    Image.init()
    return [name for name in Image.OPEN if name not in _UNSAFE_FORMATS]
