"""PPM and PGM whose values do not end at 255: Pillow decodes them one by one in Python, here it is done at once."""

from typing import Any

import numpy as np
from PIL import Image

__all__ = ["decode_netpbm"]


def decode_netpbm(image: Any) -> Image.Image | None:
    """The picture, with the values that Pillow's decoder gives it.

    Args:
        image: opened by Pillow, not decoded yet.

    Returns:
        A picture of the same mode; None where the file is of another kind.

    Raises:
        ValueError: the file is cut off.
    """
    if image.format != "PPM" or len(image.tile) != 1 or image.tile[0][0] != "ppm":
        return None
    _, _, offset, (_, highest) = image.tile[0]
    kind = np.dtype(np.uint8 if highest < 256 else ">u2")
    bands = len(image.getbands())
    most, out = (65535, np.dtype(np.int32)) if image.mode == "I" else (255, np.dtype(np.uint8))
    count = image.size[0] * image.size[1] * bands
    image.fp.seek(offset)
    data = image.fp.read(count * kind.itemsize)
    if len(data) < count * kind.itemsize:
        raise ValueError("not enough image data")
    values = np.arange(256**kind.itemsize)
    table = np.minimum(most, np.round(values / highest * most)).astype(out)
    pixels = table[np.frombuffer(data, kind)].reshape(*image.size[::-1], *((bands,) if bands > 1 else ()))
    decoded = Image.fromarray(pixels)
    decoded.format = image.format
    return decoded
