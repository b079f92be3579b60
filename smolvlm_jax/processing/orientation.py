"""Which way up a picture is, by its EXIF data."""

import io

from PIL import Image

from .effort import check_exif

__all__ = ["orientation_of", "upright"]

_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def orientation_of(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; 1 where there is none, or one that is no such number, as in the reference.

    Pillow decodes a PNG to look for EXIF behind the pixels, so it is only asked to if some is there.
    """
    try:
        whole = image.format != "PNG" or "exif" in image.info or _text_after_pixels(image)
        if whole and image.format == "PNG":
            image.load()  # as getexif does
        check_exif(image.info)
        value = (image.getexif() if whole else Image.Image.getexif(image)).get(_ORIENTATION, 1)
        return next((turn for turn in _TURNS if turn == value), 1)
    except Exception:  # damaged or endless EXIF raises whatever it happens to raise; the pixels may be whole
        return 1


def upright(image: Image.Image) -> Image.Image:
    """`image` turned and mirrored as its EXIF orientation says."""
    turn = orientation_of(image)
    return image.transpose(_TURNS[turn]) if turn > 1 else image


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
