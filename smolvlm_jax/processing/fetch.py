"""From a path, URL, base64 text or bytes to a decoded picture, under limits of size, time and place.

A record of a data set is not trusted: a URL may lead to the machine's own services, and a file may claim a billion pixels.
Nothing here relies on a file's extension, follows a redirect unchecked, or reads more than it is allowed to.
"""

import base64
import contextlib
import functools
import importlib
import importlib.util
import io
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Any, TypeGuard
from urllib.parse import unquote

from PIL import Image, ImageFile, UnidentifiedImageError
from PIL._util import DeferredError

from ..errors import InputError, JobError, MediaError
from ..storage import RangedFile, StorePath, is_store
from ..storage.paths import AHEAD
from . import http, notices
from .effort import EffortError, Metered, check_pieces
from .limits import MediaLimits, describe_source
from .netpbm import decode_netpbm
from .orientation import orientation_of, upright
from .parts import JoinedPath, local_path, relative_to
from .pdf import PdfPage, page_size, render
from .pixels import channel_axis, flatten_alpha, is_array, reduce_16bit

# What pictures of data sets are, HEIF where pillow-heif is installed. None of these plug-ins opens another format or starts a
# program, as others of Pillow do (EPS starts Ghostscript, and IPTC opens whatever it contains). A format without a signature
# (TGA) would take any bytes for a picture.
_FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP", "TIFF", "PPM", "ICO", "JPEG2000", "AVIF", "HEIF")
_HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
# Kinds of pages of a TIFF, by its tag of that number, that are not pages of their own: smaller copies and masks.
_SUBFILE, _NO_PAGE = 254, 1 | 4
# Tags of a TIFF for its width and height.
_SIDES = (256, 257)


@dataclass(frozen=True)
class Page:
    """One page of a file that has several.

    Attributes:
        source: of the file, as `load_image` takes it.
        number: of the page, counted from 0.
    """

    source: Any
    number: int


def is_path(value: object) -> TypeGuard[str | os.PathLike]:
    """Whether `value` is text or a path object: a path, a URL or base64 text."""
    return isinstance(value, (str, os.PathLike))


def is_source(value: object) -> bool:
    """Whether `value` names or holds an encoded picture or video: a path, a URL, base64 text, or the bytes of a file."""
    return is_path(value) or isinstance(value, (bytes, bytearray, Page, PdfPage))


def is_url(source: object) -> TypeGuard[str]:
    """Whether `source` is an http or https URL."""
    return isinstance(source, str) and source[:8].lower().startswith(("http://", "https://"))


def open_regular(path: Any, limit: int, kind: str) -> IO[bytes]:
    """Open a regular file for reading.

    Args:
        path: of the file.
        limit: its largest size in bytes.
        kind: what a message calls it, "picture", "video" or "PDF".

    Raises:
        MediaError: it cannot be opened, is too large, or is a pipe or device, which might never end.
    """
    name = os.fspath(path)
    try:
        # O_NONBLOCK: opening a pipe without a writer would wait for ever.
        descriptor = os.open(name, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except (OSError, ValueError) as error:
        where = relative_to(name) if isinstance(error, FileNotFoundError) else ""
        raise MediaError(f"cannot open the {kind} {describe_source(name)}{where}: {error}") from error
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


def encoded_bytes(source: Any, limit: int, kind: str) -> bytes | None:
    """The file that `source` holds itself: bytes, a `data:` URL, or base64 text of 64 characters and more. None for a path.

    Args:
        source: bytes, text or a path, but no http(s) URL.
        limit: its largest size in bytes.
        kind: what a message calls it, "picture" or "video".

    Raises:
        MediaError: it is too large, or neither a file nor base64.
    """
    if isinstance(source, (bytes, bytearray)):
        return bytes(_bounded(source, limit, kind))
    text = os.fspath(source)
    if isinstance(text, str) and text[:5].lower() == "data:":
        return _decode_data_url(text, limit, kind)
    if not os.path.exists(text):
        if isinstance(text, str) and len(text) >= 64 and not isinstance(source, (os.PathLike, JoinedPath)):
            return _decode_base64(text, limit, kind, whole=text)
        raise MediaError(_absent(text, kind))
    return None


def _absent(source: Any, kind: str) -> str:
    place = f"{describe_source(source)}{relative_to(source)}"
    return f"no {kind} at {place}; pass a path, a URL (http, https, data, s3, gs), or base64 text"


def open_media(source: Any, limits: MediaLimits) -> IO[bytes]:
    """A readable binary file of an encoded picture.

    Args:
        source: bytes, an http(s) or `file:` URL, a path, a `data:` URL, or base64 text of 64 characters and more.
        limits: what may be read.

    Raises:
        MediaError: there is nothing at `source`, or the limits forbid it.
    """
    source = local_path(source)
    if is_url(source):
        return io.BytesIO(http.fetch_url(source, limits, limits.max_bytes))
    if isinstance(source, str) and is_store(source):
        return io.BytesIO(read_object(source, limits, limits.max_bytes, "picture"))
    content = encoded_bytes(source, limits.max_bytes, "picture")
    if content is not None:
        return io.BytesIO(content)
    if not limits.files:
        raise MediaError(f"local files are switched off, so {describe_source(source)} is not opened")
    return open_regular(source, limits.max_bytes, "picture")


def read_object(url: str, limits: MediaLimits, most: int, kind: str) -> bytes:
    """What an object in a store holds, in one request. It is read with the rights of this process, as a local file is.

    Args:
        url: of the object.
        limits: what may be read.
        most: its largest size in bytes.
        kind: what a message calls it.

    Raises:
        MediaError: it cannot be read, is too large, or the limits forbid it.
    """
    if not limits.files:
        raise MediaError(f"local files and object stores are switched off, so {describe_source(url)} is not read")
    try:
        content = StorePath.of(url).read_bytes(0, most + 1)
    except OSError as error:
        raise unread_object(url, error, kind) from error
    return _bounded(content, most, f"{kind} {describe_source(url)}")


def unread_object(url: str, error: OSError, kind: str) -> MediaError:
    """What to raise for an object that cannot be read; in the words of a file that is not there, where that is so."""
    if isinstance(error, FileNotFoundError):
        return MediaError(_absent(url, kind))
    return MediaError(f"cannot open the {kind} {describe_source(url)}: {error.strerror or error}")


def open_object(url: str, limits: MediaLimits, most: int, kind: str) -> RangedFile:
    """An object in a store, to be read by ranges. Arguments and errors are those of `read_object`."""
    if not limits.files:
        raise MediaError(f"local files and object stores are switched off, so {describe_source(url)} is not read")
    try:
        file = RangedFile(StorePath.of(url))
    except OSError as error:
        raise unread_object(url, error, kind) from error
    if file.entry.size > most:
        raise MediaError(f"the {kind} {describe_source(url)} has {file.entry.size} bytes, above the limit of {most}")
    return file


def open_pdf(path: Any, limits: MediaLimits) -> IO[bytes]:
    """A PDF file, which may be as large as a video, since only what a page needs of it is read. Raises MediaError."""
    if not limits.files:
        raise MediaError(f"local files are switched off, so {describe_source(path)} is not opened")
    if isinstance(path, str) and is_store(path):
        return io.BufferedReader(open_object(path, limits, limits.max_video_bytes, "PDF"), AHEAD)
    return open_regular(path, limits.max_video_bytes, "PDF")


def _decode_data_url(url: str, limit: int, kind: str) -> bytes:
    """The contents of a data: URL in base64, or of one without, whose bytes stand for themselves or are percent-encoded."""
    head, comma, text = url.partition(",")
    if not comma:
        raise MediaError(f"no {kind} at {describe_source(url)}: a data: URL is data:TYPE;base64,TEXT")
    if len(text) > 3 * limit + 4096:
        raise MediaError(f"a data: URL of {len(text)} characters is above the limit of {limit} bytes")
    encoded = "%" in text
    text = unquote(text, "latin-1") if encoded else text
    if encoded and not head[5:].lower().replace(" ", "").endswith(";base64"):
        return _bounded(text.encode("latin-1", "replace"), limit, kind)
    if "-" in text or "_" in text:  # base64 for URLs, which is without padding mostly
        text = text.replace("-", "+").replace("_", "/")
    text = "".join(text.split())
    return _decode_base64(text + "=" * (-len(text) % 4), limit, kind, whole=url)


def _decode_base64(text: str, limit: int, kind: str, *, whole: str) -> bytes:
    if len(text) > limit * 4 // 3 + 4096:
        raise MediaError(f"base64 text of {len(text)} characters is above the limit of {limit} bytes")
    try:
        content = base64.b64decode("".join(text.split()), validate=True)
    except ValueError as error:
        raise MediaError(f"no {kind} at {describe_source(whole)}: no such file, and not base64 either ({error})") from error
    return _bounded(content, limit, kind)


def _bounded(content: Any, limit: int, kind: str) -> Any:
    if len(content) > limit:
        raise MediaError(f"the {kind} has {len(content)} bytes, above the limit of {limit}")
    return content


def load_image(
    source: Any, limits: MediaLimits | None = None, *, full_16bit: bool = False, background: Any = None
) -> Image.Image:
    """The first frame of the picture at `source`, turned as its EXIF orientation says, as RGB.

    Args:
        source: a path, an http(s) URL, a `data:` URL, base64 text, the bytes of a file, a Page of one of these, or a PdfPage.
        limits: what may be read; None takes the defaults of MediaLimits.
        full_16bit: divide 16-bit greys by 257; without it they saturate at 255.
        background: a colour to lay what is transparent over; None drops the alpha, as the reference does, with a notice.

    Raises:
        MediaError: whatever is wrong with the source, which the message names.
    """
    limits = limits or MediaLimits()
    if isinstance(source, PdfPage):
        with open_pdf(source.source, limits) as file:
            return render(file, source, limits)
    with _opened(source, limits) as image:
        if not isinstance(source, Page):
            notices.pages(source, image)
        decoded = decode_netpbm(image)
        if decoded is None:
            image.load()
            decoded = image
        # A file inside the file may be larger than the header said.
        _check_size(getattr(source, "source", source), decoded, limits)
        turned = upright(decoded)
        if full_16bit:
            turned = reduce_16bit(turned)
        else:
            notices.depth(source, turned)
        if background is not None:
            return flatten_alpha(turned, background)
        notices.alpha(source, turned)
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
    if isinstance(value, PdfPage):
        limits = limits or MediaLimits()
        with open_pdf(value.source, limits) as file:
            return page_size(file, value, limits)
    if is_source(value):
        with _opened(value, limits or MediaLimits()) as image:
            return _turned_size(image, turn=True)
    if isinstance(value, Image.Image):
        return _turned_size(value, turn=exif_transpose)
    if is_array(value):
        return tuple(value.shape[1:] if channel_axis(value.shape) == 0 else value.shape[:2])
    raise InputError(f"a picture of type {type(value).__name__}; pass a Pillow image, an array, a path or a URL")


def loaded(image: Image.Image, limits: MediaLimits) -> Image.Image:
    """A caller's Pillow image, decoded: Pillow opens any file and decodes it later, with whatever its plug-in starts.

    Raises:
        MediaError: it is not decoded yet, and is of a format that is not decoded here, or it is too large.
    """
    if isinstance(getattr(image, "_im", None), DeferredError):
        raise MediaError(f"{describe_source(image)} is closed: pass it while it is open, or its path")
    if isinstance(image, ImageFile.ImageFile) and getattr(image, "_im", None) is None:
        if image.format not in _FORMATS:
            raise MediaError(f"{describe_source(image)} is of the format {image.format}; {_formats_in_words()}")
        _check_size(image, image, limits)
        try:
            image.load()
        except Exception as error:  # a damaged file raises whatever its plug-in happens to raise
            raise MediaError(f"cannot decode {describe_source(image)}: {error or type(error).__name__}") from error
        _check_size(image, image, limits)
    return image


def pages_of(source: Any, pages: str | int, limits: MediaLimits) -> list[Any]:
    """The pictures to read of a file: its Pages where it is a TIFF of several, else the source itself.

    Args:
        source: a picture as `layout.nest_images` takes it. A Pillow image gives copies of its pages.
        pages: "first", "all", or the number of one, counted from 1.
        limits: what may be read; max_frames bounds the number of pages.

    Raises:
        InputError: `pages` is none of these.
        MediaError: as `load_image`, or there is no such page.
    """
    if pages != "all" and pages != "first" and (not isinstance(pages, int) or isinstance(pages, bool) or pages < 1):
        raise InputError(f"pages is {pages!r}; it is 'first', 'all', or the number of a page, counted from 1")
    if (
        pages == "first"
        or isinstance(source, (Page, PdfPage))
        or not (is_source(source) or getattr(source, "format", None) == "TIFF")
    ):
        return [source]
    with contextlib.nullcontext(source) if isinstance(source, Image.Image) else _opened(source, limits) as image:
        if image.format != "TIFF":
            if isinstance(pages, int) and pages > 1:
                raise MediaError(f"{describe_source(source)} is no TIFF and has one page, so there is no page {pages}")
            return [source]
        numbers = _page_numbers(image, limits)
        if isinstance(pages, int):
            if pages > len(numbers):
                raise MediaError(f"{describe_source(source)} has {len(numbers)} pages, so there is no page {pages}")
            numbers = numbers[pages - 1 : pages]
        if not isinstance(source, Image.Image):
            return [Page(source, number) for number in numbers]
        place, copies = image.tell(), []
        for number in numbers:
            image.seek(number)
            copies.append(image.copy())
        image.seek(place)
        return copies


@contextlib.contextmanager
def _opened(source: Any, limits: MediaLimits) -> Iterator[Image.Image]:
    """The picture at `source`, with its header read and its size checked. Any exception in the block becomes a MediaError."""
    whole, number = (source.source, source.number) if isinstance(source, Page) else (source, 0)
    try:
        with open_media(whole, limits) as file:
            if not file.read(1):
                raise MediaError(f"cannot decode {describe_source(whole)}: it is empty")
            file.seek(0)
            check_pieces(file)
            metered: Any = Metered(file)
            with Image.open(metered, formats=_formats(_is_heif(file))) as image:
                metered.header_read(image)
                if number:
                    image.seek(number)
                _check_size(whole, image, limits)
                yield image
    except EffortError as error:
        raise MediaError(f"the picture {describe_source(whole)} {error}") from error
    except (MediaError, JobError, MemoryError):
        raise
    except Image.DecompressionBombError as error:
        why = f"more pixels than Pillow opens ({error}); set PIL.Image.MAX_IMAGE_PIXELS too if that is meant"
        raise MediaError(f"the picture {describe_source(whole)} has {why}") from error
    except UnidentifiedImageError as error:
        raise MediaError(
            f"cannot decode {describe_source(whole)}: no picture of a kind that is read; {_formats_in_words()}"
        ) from error
    except Exception as error:  # a damaged file raises whatever its plug-in happens to raise
        raise MediaError(f"cannot decode the picture {describe_source(whole)}: {str(error) or type(error).__name__}") from error


def _check_size(source: Any, image: Image.Image, limits: MediaLimits) -> None:
    width, height = image.size
    if width * height > limits.max_pixels:
        raise MediaError(
            f"the picture {describe_source(source)} claims {width}×{height} pixels, above the limit of "
            f"{limits.max_pixels}; raise --max-pixels (MediaLimits.max_pixels) if that is meant"
        )


def _turned_size(image: Any, *, turn: bool) -> tuple[int, int]:
    width, height = image.size
    # Newer versions of Pillow turn a TIFF themselves, and say so from the start: its tags hold the sides as they are stored.
    turned = image.format == "TIFF" and (width, height) != tuple(map(image.tag_v2.get, _SIDES))
    return (width, height) if turn and not turned and orientation_of(image) in (5, 6, 7, 8) else (height, width)


def _is_heif(file: IO[bytes]) -> bool:
    head = file.read(12)
    file.seek(0)
    return head[4:8] == b"ftyp" and head[8:12] in _HEIF_BRANDS


@functools.cache
def _formats(heif: bool) -> list[str]:
    """Of _FORMATS those that Pillow has, with HEIF where that is asked for and there is a plug-in for it."""
    Image.init()
    if heif:
        if importlib.util.find_spec("pillow_heif") is None:
            raise MediaError("pictures in HEIF need an optional dependency: pip install 'smolvlm-jax[heif]'")
        importlib.import_module("pillow_heif").register_heif_opener()
    return [name for name in _FORMATS if name in Image.OPEN]


def _formats_in_words() -> str:
    return f"these are: {', '.join(_FORMATS)}"


def _page_numbers(image: Any, limits: MediaLimits) -> list[int]:
    """The pages of a TIFF, without smaller copies and masks. Only headers are read."""
    place, numbers = image.tell(), []
    with contextlib.suppress(EOFError):
        for number in range(limits.max_frames + 1):
            image.seek(number)
            if number == limits.max_frames:
                raise MediaError(
                    f"it has more pages than the limit of {limits.max_frames}; raise --max-frames (MediaLimits.max_frames)"
                )
            if not number or not int(image.tag_v2.get(_SUBFILE, 0)) & _NO_PAGE:
                numbers.append(number)
    image.seek(place)
    return numbers
