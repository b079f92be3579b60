"""PDF files written by hand, whole and damaged."""

import zlib

# Of a page, in points: a letter.
SIZE = (612, 792)
DAMAGES = ("stream", "cut", "flip", "page", "missing")
ENCRYPT = b"/Encrypt<</Filter/Standard/V 1/R 2/P -4/O<%s>/U<%s>>>/ID[<%s><%s>]" % (
    b"41" * 32,
    b"42" * 32,
    b"43" * 16,
    b"43" * 16,
)


def lines(*texts: str) -> bytes:
    """The contents of a page: lines of text."""
    out = [b"BT /F1 14 Tf 72 %d Td (%s) Tj ET\n" % (720 - 18 * number, text.encode()) for number, text in enumerate(texts)]
    return b"".join(out)


def table(rows: int = 4, columns: int = 3) -> bytes:
    """The contents of a page: a ruled table of numbers."""
    grid = [b"72 %d m 372 %d l S\n" % (600 - 20 * row, 600 - 20 * row) for row in range(rows + 1)]
    grid += [b"%d 600 m %d %d l S\n" % (72 + 100 * c, 72 + 100 * c, 600 - 20 * rows) for c in range(columns + 1)]
    cells = [
        b"BT /F1 12 Tf %d %d Td (%d) Tj ET\n" % (76 + 100 * column, 586 - 20 * row, row * columns + column)
        for row in range(rows)
        for column in range(columns)
    ]
    return b"".join(grid + cells)


PICTURE = b"q 200 0 0 200 100 300 cm /P Do Q\n"  # contents that show the picture that every page may show


def pdf(
    pages: list[bytes], *, damaged: int | None = None, how: str = "stream", size: tuple = SIZE, trailer: bytes = b""
) -> bytes:
    """A PDF of these contents.

    Args:
        pages: contents of each.
        damaged: the index of a page that is damaged.
        how: "stream": its contents cannot be unpacked; "cut": half of them is missing; "flip": a bit of them is wrong;
            "page": its object is none; "missing": its contents are not there.
        size: of the pages, in points.
        trailer: more entries of the trailer.
    """
    first = 5
    kids = b" ".join(b"%d 0 R" % (first + 2 * number) for number in range(len(pages)))
    picture = zlib.compress(bytes(range(256)) * 3)
    objects = [
        b"<</Type/Catalog/Pages 2 0 R>>",
        b"<</Type/Pages/Count %d/Kids[%s]>>" % (len(pages), kids),
        b"<</Type/Font/Subtype/Type1/BaseFont/Helvetica>>",
        b"<</Type/XObject/Subtype/Image/Width 16/Height 16/ColorSpace/DeviceRGB/BitsPerComponent 8/Filter/FlateDecode"
        b"/Length %d>>stream\n%s\nendstream" % (len(picture), picture),
    ]
    for number, contents in enumerate(pages):
        packed, own = zlib.compress(contents), first + 2 * number
        page = (
            b"<</Type/Page/Parent 2 0 R/MediaBox[0 0 %d %d]/Resources<</Font<</F1 3 0 R>>/XObject<</P 4 0 R>>>>/Contents "
            b"%d 0 R>>" % (*size, own + 1)
        )
        if number == damaged:
            middle = len(packed) // 2
            if how == "stream":
                packed = packed[:10] + b"\xc5" * (len(packed) - 10)
            elif how == "cut":
                packed = packed[:middle]
            elif how == "flip":
                packed = packed[:middle] + bytes([packed[middle] ^ 4]) + packed[middle + 1 :]
            elif how == "page":
                page = b"(nothing)"
            elif how == "missing":
                page = page.replace(b"%d 0 R>>" % (own + 1), b"99999 0 R>>")
        objects += [page, b"<</Filter/FlateDecode/Length %d>>stream\n%s\nendstream" % (len(packed), packed)]
    out, places = bytearray(b"%PDF-1.4\n"), []
    for number, body in enumerate(objects):
        places.append(len(out))
        out += b"%d 0 obj\n%s\nendobj\n" % (number + 1, body)
    start = len(out)
    out += b"xref\n0 %d\n0000000000 65535 f \n" % (len(objects) + 1) + b"".join(b"%010d 00000 n \n" % place for place in places)
    out += b"trailer<</Size %d/Root 1 0 R%s>>\nstartxref\n%d\n%%%%EOF\n" % (len(objects) + 1, trailer, start)
    return bytes(out)
