"""What is wrong with the streams of a page of a PDF. PDFium draws what it can decode and does not report the rest, so a
page of damaged text would be blank."""

import re
import zlib

__all__ = ["damage_of"]

# The beginning of an object, up to its stream or its end.
_OBJECT = re.compile(rb"\d+ \d+ obj\b(.*?)(>>\s*stream\r?\n|endobj)", re.DOTALL)
_PAGE = re.compile(rb"/Type\s*/Page\b")
_DRAWN = re.compile(rb"/(Contents|Annots)\b")
_LENGTH = re.compile(rb"/Length (\d+)\b(?! \d+ R)")
_FILTER = re.compile(rb"/Filter\s*\[?\s*/(\w+)")
_BLOCK = 2**16


def damage_of(document: bytes) -> str | None:
    """What is wrong with a page, in words, or None.

    What is packed by Flate is unpacked, and its checksum compared; JPEG pictures must have a beginning and an end.

    Args:
        document: a PDF file of this one page, as PDFium writes it: one object after the other, each with its length in place.
    """
    place, pages, drawn = 0, 0, False
    while found := _OBJECT.search(document, place):
        place, head = found.end(), found[1]
        if found[2] == b"endobj":
            if _PAGE.search(head):
                pages, drawn = pages + 1, drawn or _DRAWN.search(head) is not None
            continue
        length, packed = _LENGTH.search(head), _FILTER.search(head)
        if length is None:
            return None  # not as PDFium writes it, so nothing can be told
        data = memoryview(document)[place : place + int(length[1])]
        place += len(data)
        damage = _CHECKS[packed[1]](data) if packed and packed[1] in _CHECKS else None
        if damage is not None:
            return damage
    return "it has no contents" if pages and not drawn else None


def _flate(data: memoryview) -> str | None:
    """The format is that of RFC 1950: two bytes, blocks of RFC 1951, and a checksum, which some programs leave out."""
    if not data:
        return None
    unpacker, checksum = zlib.decompressobj(-zlib.MAX_WBITS), 1
    try:
        for start in range(2, len(data), _BLOCK):
            piece: bytes | memoryview = data[start : start + _BLOCK]
            while piece and not unpacker.eof:
                checksum = zlib.adler32(unpacker.decompress(piece, _BLOCK), checksum)
                piece = unpacker.unconsumed_tail
            if unpacker.eof:
                left = unpacker.unused_data + data[start + _BLOCK : start + _BLOCK + 4]
                wrong = len(left) >= 4 and int.from_bytes(left[:4], "big") != checksum
                return "a stream does not have its checksum" if wrong else None
        checksum = zlib.adler32(unpacker.flush(), checksum)
    except zlib.error as error:
        return f"a stream cannot be unpacked ({error})"
    return None if unpacker.eof else "a stream is cut off"


def _jpeg(data: memoryview) -> str | None:
    found = bytes(data)
    return None if found.startswith(b"\xff\xd8") and b"\xff\xd9" in found else "a picture is cut off"


_CHECKS = {b"FlateDecode": _flate, b"Fl": _flate, b"DCTDecode": _jpeg, b"DCT": _jpeg}
