"""From a path, URL, base64 text or bytes to a decoded picture, under limits of size, time and place.

A record of a data set is not to be trusted: a URL may lead to the machine's own services, a file may claim a billion
pixels. Nothing here trusts an extension, follows a redirect unseen, or reads more than it was allowed to.
"""

import base64
import binascii
import io
import os
import stat
from dataclasses import dataclass

from PIL import Image, ImageOps

from ..errors import MediaError

# Pillow plug-ins that start programs (Ghostscript) or need a handler somebody else registered.
_UNSAFE_FORMATS = {"EPS", "WMF", "FPX", "MIC", "GRIB", "BUFR", "HDF5"}


@dataclass(frozen=True)
class MediaLimits:
    """What may be read for one picture or video.

    urls: http and https may be fetched. files: local paths may be opened. private_addresses: URLs may lead to
    loopback, private and link-local addresses. timeout: seconds for one URL, redirects and all. max_bytes,
    max_video_bytes: size of an encoded picture or video, from wherever it comes. max_pixels: width × height of a
    picture, checked before a pixel is decoded. max_redirects: hops of one URL, each checked like the first.
    """

    urls: bool = True
    files: bool = True
    private_addresses: bool = False
    timeout: float = 20.0
    max_bytes: int = 256 * 2**20
    max_video_bytes: int = 4 * 2**30
    max_pixels: int = 2**27
    max_redirects: int = 5


def describe_source(source) -> str:
    """`source` in a few words for a message: long base64 is cut, bytes are counted, objects are named."""
    if isinstance(source, (bytes, bytearray)):
        return f"{len(source)} bytes"
    if isinstance(source, (str, os.PathLike)):
        text = os.fspath(source)
        text = text if isinstance(text, str) else os.fsdecode(text)
        return repr(text if len(text) <= 200 else f"{text[:80]}…({len(text)} characters)")
    size = getattr(source, "size", None) if isinstance(source, Image.Image) else getattr(source, "shape", None)
    return f"a {type(source).__name__}" + (f" of {size}" if size is not None else "")


def is_url(source) -> bool:
    return isinstance(source, str) and source[:8].lower().startswith(("http://", "https://"))


def open_regular(path, limit: int, kind: str):
    """Open a regular file of at most `limit` bytes; a pipe or device, which might never end, is refused."""
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


def open_source(source, limits: MediaLimits):
    """A readable binary file for an encoded picture: from bytes, a URL, a path, a `data:` URL or bare base64."""
    if isinstance(source, (bytes, bytearray)):
        if len(source) > limits.max_bytes:
            raise MediaError(f"the picture has {len(source)} bytes, above the limit of {limits.max_bytes}")
        return io.BytesIO(bytes(source))
    if is_url(source):
        from .http import fetch_url

        return io.BytesIO(fetch_url(source, limits, limits.max_bytes))
    text = os.fspath(source)
    if isinstance(text, str) and text[:5].lower() == "data:":
        return io.BytesIO(_decode_base64(text.partition(",")[2], text, limits))
    if _exists(text):
        if not limits.files:
            raise MediaError(f"local files are switched off, so {describe_source(text)} is not opened")
        return open_regular(text, limits.max_bytes, "picture")
    if isinstance(text, str) and len(text) >= 64 and not isinstance(source, os.PathLike):
        return io.BytesIO(_decode_base64(text, text, limits))
    raise MediaError(f"no picture at {describe_source(text)}; pass a path, an http(s) or data: URL, or base64 text")


def _exists(path) -> bool:
    try:
        return os.path.exists(path)
    except (OSError, ValueError):  # too long for a name, or with a NUL in it
        return False


def _decode_base64(text: str, whole: str, limits: MediaLimits) -> bytes:
    if len(text) > limits.max_bytes * 4 // 3 + 4096:
        raise MediaError(f"base64 text of {len(text)} characters is above the limit of {limits.max_bytes} bytes")
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise MediaError(f"no picture at {describe_source(whole)}: no such file, and not base64 either ({error})") from error


def load_image(source, limits: MediaLimits = MediaLimits()) -> Image.Image:
    """The first frame of the picture at `source`, turned as its EXIF orientation says, as RGB (alpha is dropped).

    source: a path, an http(s) URL, a `data:` URL, base64 text, or the bytes of a file.
    Raises MediaError, which names the source, whatever is wrong with it.
    """
    try:
        with open_source(source, limits) as file:
            formats = [name for name in _registered_formats() if name not in _UNSAFE_FORMATS]
            with Image.open(file, formats=formats) as image:
                width, height = image.size
                if width * height > limits.max_pixels:
                    raise MediaError(
                        f"the picture {describe_source(source)} claims {width}×{height} pixels, above the limit of "
                        f"{limits.max_pixels}; raise MediaLimits.max_pixels if it is meant"
                    )
                image.load()
                turned = ImageOps.exif_transpose(image)
                return turned if turned.mode == "RGB" else turned.convert("RGB")
    except MediaError:
        raise
    except Exception as error:  # a damaged file raises whatever its plug-in happens to raise
        raise MediaError(f"cannot decode the picture {describe_source(source)}: {error or type(error).__name__}") from error


def _registered_formats() -> list[str]:
    Image.init()
    return list(Image.OPEN)
