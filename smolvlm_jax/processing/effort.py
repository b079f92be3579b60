"""How much work the file of a picture may make, whatever its size: Pillow reads many formats piece by piece in Python, and a
file of tiny pieces takes minutes.

Two things bound it. `Metered` counts what is read of a file, one call after the other, so every loop of Pillow over a file
ends. `check_pieces` looks for what takes time or memory without reading: lists of strips, and texts that are joined again and
again. Neither depends on how fast or busy the machine is.
"""

import io
import re
from collections.abc import Mapping
from typing import IO, Any

import numpy as np

__all__ = ["EffortError", "Metered", "check_exif", "check_pieces"]

# Calls to read a file: until its header is known, and for its pixels. PNG has three for each chunk, of 8 KiB mostly, TIFF two
# for each strip or tile.
_HEADER_CALLS, _PIXEL_CALLS = 2**15, 2**20
# Pixels of a BMP with run lengths, which Pillow decodes run by run, in Python.
_MOST_SLOW = 2**24
# Each scan of a JPEG goes over all of its pixels, and may take a few bytes. Progressive pictures have about ten.
_MOST_SCANS = 100
# Blocks of Exif data in a JPEG, which Pillow joins one by one; segments of one that has more of these than fit in a header.
_MOST_EXIF, _MOST_SEGMENTS = 64, 100_000
_MARKER = re.compile(rb"\xff([^\xff\x00\x01\xd0-\xd8])", re.DOTALL)
# Of a TIFF: strips or tiles of a page, values of any other tag that is not bytes, and pages that are looked at.
_MOST_STRIPS, _MOST_VALUES, _MOST_PAGES = 2**17, 2**18, 4097
_STRIPS = (273, 279, 324, 325)
_BYTES = (1, 2, 6, 7)
# Bytes of a value by its kind. Tags that claim more in all than the file has several times share them, and each gets a copy.
_SIZES = np.array([0, 1, 1, 2, 4, 8, 1, 1, 2, 4, 8, 4, 8, 4, 0, 0, 8, 8, 8], np.float64)
_MOST_TIMES, _ANY_BYTES = 4, 2**24
_TIFF_HEADS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
# Of a picture whose pixels are written as text: bytes, and comments, of which Pillow copies everything behind each.
_MOST_TEXT, _MOST_COMMENTS = 2**25, 1000
_ADVICE = "store it anew, as PNG, say"


class EffortError(Exception):
    """A picture would take more work than it may. None of Pillow's plug-ins expects it, so it ends whatever they do."""


class Metered:
    """A file that can be read so many times.

    Args:
        file: opened for reading.

    Attributes:
        left: calls that may still be made.
    """

    def __init__(self, file: IO[bytes]):
        self._file, self.left = file, _HEADER_CALLS

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def _count(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise EffortError(f"consists of too many small pieces; {_ADVICE}")

    def read(self, *size: int) -> bytes:
        self._count()
        return self._file.read(*size)

    def readline(self, *size: int) -> bytes:
        self._count()
        return self._file.readline(*size)

    def seek(self, *place: int) -> int:
        self._count()
        return self._file.seek(*place)

    def header_read(self, image: Any) -> None:
        """Allow for the pixels of the picture that has been opened.

        Raises:
            EffortError: it is in a form that is decoded run by run, and too large for that.
        """
        self.left = _PIXEL_CALLS
        if not any(tile[0] == "bmp_rle" for tile in image.tile):
            return
        pixels = image.size[0] * image.size[1]
        if pixels > _MOST_SLOW:
            raise EffortError(f"has {pixels:,} pixels in runs, of which at most {_MOST_SLOW:,} are read; {_ADVICE}")
        self.left += 2 * pixels


def check_pieces(file: IO[bytes]) -> None:
    """Look at the pieces of a picture before Pillow does; the file's place stays as it is.

    Args:
        file: opened, at its beginning.

    Raises:
        EffortError: there are too many.
    """
    head = file.read(16)
    if head[:3] == b"\xff\xd8\xff":
        file.seek(0)
        _check_jpeg(file.read())
    elif head[:4] in _TIFF_HEADS:
        _check_tiff(file, head)
    elif head[4:8] == b"ftyp":  # AVIF, whose Exif data Pillow reads when it opens it, and HEIF
        content = head + file.read()
        for found in re.finditer(b"|".join(map(re.escape, _TIFF_HEADS[:2])), content):
            _check_tiff(io.BytesIO(content[found.start() :]), content[found.start() : found.start() + 16])
    elif head[:2] in (b"P1", b"P2", b"P3"):
        content = head + file.read(_MOST_TEXT)
        if len(content) > _MOST_TEXT or content.count(b"#") > _MOST_COMMENTS:
            raise EffortError(
                f"has its pixels as text, of which {_MOST_TEXT:,} bytes with {_MOST_COMMENTS:,} comments are read; {_ADVICE}"
            )
    file.seek(0)


def check_exif(info: Mapping[Any, Any]) -> None:
    """Look at the Exif data of an opened picture before they are read: Pillow makes objects of all values of a tag.

    Args:
        info: of the picture.

    Raises:
        EffortError: there are too many.
        ValueError: text that should hold them does not.
    """
    data = info.get("exif")
    if data is None and "Raw profile type exif" in info:  # as Pillow reads it
        data = bytes.fromhex("".join(info["Raw profile type exif"].split("\n")[3:]))
    if isinstance(data, bytes):
        data = data.removeprefix(b"Exif\0\0")
        if data[:4] in _TIFF_HEADS:
            _check_tiff(io.BytesIO(data), data[:16])


def _check_jpeg(content: bytes) -> None:
    if content.count(b"\xff\xda") <= _MOST_SCANS and content.count(b"Exif\0\0") <= _MOST_EXIF:
        return
    # Such bytes may stand in metadata, and behind the picture: phones put a film there.
    scans = exif = at = 0
    for _ in range(_MOST_SEGMENTS):
        found = _MARKER.search(content, at)
        if found is None or found[1] == b"\xd9":
            return
        scans += found[1] == b"\xda"
        exif += found[1] == b"\xe1" and content.startswith(b"Exif\0\0", found.end() + 2)
        if scans > _MOST_SCANS:
            raise EffortError(f"is a JPEG of more than {_MOST_SCANS} scans")
        if exif > _MOST_EXIF:
            raise EffortError(f"is a JPEG of more than {_MOST_EXIF} blocks of Exif data")
        at = found.end() + int.from_bytes(content[found.end() : found.end() + 2], "big")
    raise EffortError(f"is a JPEG of more than {_MOST_SEGMENTS:,} segments")


def _check_tiff(file: IO[bytes], head: bytes) -> None:
    """The directories of a TIFF, whose entries say how many values each tag has."""
    order, big = ("<" if head[:2] == b"II" else ">"), b"+" in head[2:4]
    whole, number = ("little" if order == "<" else "big"), (8 if big else 4)
    fields = [("tag", order + "u2"), ("kind", order + "u2"), ("count", f"{order}u{number}"), ("value", f"V{number}")]
    entry = np.dtype(fields)
    place = int.from_bytes(head[8:16] if big else head[4:8], whole)  # type: ignore[arg-type]
    seen: set[int] = set()
    size, claimed = file.seek(0, io.SEEK_END), 0.0
    while place and place not in seen and len(seen) < _MOST_PAGES:
        seen.add(place)
        if place >= 2**62:
            return
        file.seek(place)
        count = int.from_bytes(file.read(8 if big else 2), whole)  # type: ignore[arg-type]
        if count > 2**16:
            raise EffortError(f"is a TIFF with {count:,} tags on a page")
        data = file.read(count * entry.itemsize)
        entries = np.frombuffer(data, entry, len(data) // entry.itemsize)
        numeric = ~np.isin(entries["kind"], _BYTES)
        most = np.where(np.isin(entries["tag"], _STRIPS), _MOST_STRIPS, _MOST_VALUES)
        if (large := entries[numeric & (entries["count"] > most)]).size:
            tag, values = int(large["tag"][0]), int(large["count"][0])
            what = f"{values:,} strips or tiles" if tag in _STRIPS else f"{values:,} values of the tag {tag}"
            raise EffortError(f"is a TIFF with {what} on a page; {_ADVICE}")
        kinds = np.minimum(entries["kind"], len(_SIZES) - 1)
        sizes = _SIZES[kinds] * entries["count"]
        claimed += float(sizes[sizes <= size].sum())  # what is larger than the file cannot be read
        if claimed > _MOST_TIMES * size + _ANY_BYTES:
            raise EffortError(f"is a TIFF whose tags have {claimed:,.0f} bytes in all, and the file has fewer")
        place = int.from_bytes(file.read(number), whole)  # type: ignore[arg-type]
