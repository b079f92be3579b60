"""What a file of text holds, as UTF-8: unpacked, and its encoding decided once, by the mark at its beginning.

A file that is UTF-8 already is read where it is. Of any other an unlinked temporary copy is made (where TMPDIR says), so that
records are found by byte offsets in every case, and memory does not grow with the file.
"""

import bz2
import codecs
import contextlib
import gzip
import lzma
import os
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from ...errors import InputError, import_extra
from ...io import errors_name

__all__ = ["COMPRESSED", "copy_of", "ending_of", "plain"]

_BLOCK = 2**18
# The longer marks first: that of UTF-16-LE is the beginning of UTF-32-LE's.
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
# What unpacks one stream of a file that may hold several.
_STREAMS: dict[str, Callable[[], Any]] = {".bz2": bz2.BZ2Decompressor, ".xz": lzma.LZMADecompressor}
# What a packed file may unpack to: as a copy on the disk, which a few megabytes of zeros would fill otherwise.
_ANY_BYTES, _MOST_TIMES = 2**30, 250
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")


def ending_of(name: str) -> str:
    """The ending, in lower case, that says what a file holds: ".csv" of a.csv and of a.CSV.gz."""
    stem, last = os.path.splitext(name.lower())
    if last == ".tgz":
        return ".tar"
    return os.path.splitext(stem)[1] if last in COMPRESSED else last


def plain(file: IO[bytes], path: str, *, text: bool = True) -> IO[bytes]:
    """The file itself if it holds UTF-8 (a mark at its beginning included) uncompressed, else a copy that does.

    What is not valid in another encoding is not valid UTF-8 in the copy, so the line that it stands in is in error.

    Args:
        file: Opened, at its beginning.
        path: Its name, whose ending tells the compression.
        text: Whether it holds text. If not, it is unpacked only.

    Raises:
        InputError: if it cannot be unpacked.
    """
    packed = path.lower().endswith((*COMPRESSED, ".tgz"))
    if not (packed or text):
        return file
    blocks = _unpacked(file, path) if packed else iter(lambda: file.read(4 if file.tell() == 0 else _BLOCK), b"")
    if not text:
        return copy_of(blocks)
    start = b""
    while len(start) < 4 and (more := next(blocks, b"")):
        start += more
    mark, encoding = next(((mark, name) for mark, name in _MARKS if start.startswith(mark)), (b"", "utf-8"))
    if encoding == "utf-8" and not packed:
        file.seek(0)
        return file
    whole = _chain(start[len(mark) :], blocks)
    return copy_of(whole if encoding == "utf-8" else _recoded(whole, encoding))


def copy_of(blocks: Iterable[bytes]) -> IO[bytes]:
    """An unlinked temporary file with these contents, at its beginning."""
    place = Path(tempfile.gettempdir())
    copy = tempfile.TemporaryFile()  # noqa: SIM115 (the caller closes it)
    try:
        for block in blocks:
            with errors_name(place):
                copy.write(block)
        with errors_name(place):
            copy.seek(0)
    except BaseException:
        with contextlib.suppress(OSError):  # it would write once more
            copy.close()
        raise
    return copy


def _chain(first: bytes, rest: Iterator[bytes]) -> Iterator[bytes]:
    yield first
    yield from rest


def _unpacked(file: IO[bytes], path: str) -> Iterator[bytes]:
    ending = os.path.splitext(path.lower())[1]
    if ending == ".zst":
        blocks = _zstandard(file)
    elif ending in _STREAMS:
        blocks = _streams(file, _STREAMS[ending])
    else:
        reader = gzip.GzipFile(fileobj=file)
        blocks = iter(lambda: reader.read(_BLOCK), b"")
    try:
        size, total = os.fstat(file.fileno()).st_size, 0
        if not size:
            raise ValueError("it is empty")
        for block in blocks:
            total += len(block)
            if total > max(_ANY_BYTES, _MOST_TIMES * size):
                raise ValueError(f"it holds more than {_MOST_TIMES} times its {size:,} bytes, which no records do")
            yield block
    except (OSError, EOFError, ValueError, lzma.LZMAError, zlib.error) as error:
        raise InputError(f"{path} cannot be unpacked: {error}") from error


def _streams(file: IO[bytes], new: Callable[[], Any]) -> Iterator[bytes]:
    """Stream after stream. Python's own readers end in silence where the next one is damaged."""
    data = file.read(_BLOCK)
    while data:
        stream = new()
        while not stream.eof:
            if stream.needs_input and not data and not (data := file.read(_BLOCK)):
                raise ValueError("it ends in the middle of a stream")
            block, data = stream.decompress(data, _BLOCK), b""
            if block:
                yield block
        data = stream.unused_data.lstrip(b"\0")
        while not data and (data := file.read(_BLOCK)):
            data = data.lstrip(b"\0")  # padding


def _zstandard(file: IO[bytes]) -> Iterator[bytes]:
    """Frame after frame, in pieces so small that even the best packed one unpacks to what memory holds."""
    zstandard = import_extra("zstandard", "reading .zst files", "zstd")
    frame, begun = zstandard.ZstdDecompressor().decompressobj(), False
    while piece := file.read(4096):
        while piece:
            try:
                block = frame.decompress(piece)
            except zstandard.ZstdError as error:
                raise ValueError(error) from error
            begun, piece = True, b""
            if frame.eof:
                piece = frame.unused_data
                frame, begun = zstandard.ZstdDecompressor().decompressobj(), False
            if block:
                yield block
    if begun:
        raise ValueError("it ends in the middle of a frame")


# What stands for bytes that are nothing in their encoding: in UTF-8 it is nothing either.
codecs.register_error("smolvlm_jax.invalid", lambda error: ("\udcff", error.end))  # type: ignore[attr-defined]


def _recoded(blocks: Iterator[bytes], encoding: str) -> Iterator[bytes]:
    decoder = codecs.getincrementaldecoder(encoding)("smolvlm_jax.invalid")
    for block in blocks:
        yield decoder.decode(block).encode("utf-8", "surrogatepass")
    yield decoder.decode(b"", final=True).encode("utf-8", "surrogatepass")
