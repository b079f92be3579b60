"""Notices about parts of a picture that the reference ignores silently, once in a process."""

import logging
from typing import Any

import numpy as np
from PIL import Image

from .limits import describe_source
from .pixels import has_alpha

__all__ = ["alpha", "depth", "pages"]

_log = logging.getLogger(__name__)
_said: set[str] = set()


def pages(source: Any, image: Any) -> None:
    """Of a file with several pictures, the first is read. The second one of a JPEG is a preview, which viewers leave out."""
    if image.format == "TIFF" and "pages" not in _said and image.tag_v2.next:
        _say("pages", source, "has more than one page, of which the first is read; pages='all' reads all of them")
    elif image.format in ("GIF", "PNG", "WEBP", "AVIF") and "animation" not in _said and _is_animated(image):
        _say("animation", source, "is animated, and its first frame is read; a GIF may be given as a video")


def _is_animated(image: Any) -> bool:
    try:
        return getattr(image, "is_animated", False)
    except Exception:  # Pillow looks for a second frame, whose damage is not the first one's
        image.seek(0)
        return False


def depth(source: Any, image: Image.Image) -> None:
    """Greys of 16 bits saturate, and floats are cut off to whole numbers from 0 to 255."""
    if image.mode.startswith("I") and "depth" not in _said and np.asarray(image).max(initial=0) > 255:
        _say("depth", source, "has 16-bit greys, which saturate at white; full_16bit=True keeps them")
    elif image.mode == "F" and "floats" not in _said:
        _say("floats", source, "has greys in floating point, which are cut off to whole numbers from 0 to 255")


def alpha(source: Any, image: Image.Image) -> None:
    """Transparency is dropped."""
    if has_alpha(image) and "alpha" not in _said:
        image = image if image.mode in ("RGBA", "LA") else image.convert("RGBA")
        if np.asarray(image.getchannel("A")).min(initial=255) < 255:
            why = "has transparent parts, which are read in the colour that is stored under them"
            _say("alpha", source, f"{why}; background='white' lays them over white")


def _say(kind: str, source: Any, text: str) -> None:
    _said.add(kind)
    _log.warning("%s %s (this is said once)", describe_source(source), text)
