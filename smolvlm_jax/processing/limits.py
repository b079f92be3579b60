"""What may be read from the outside, and how a source is named in a message."""

import os
from dataclasses import dataclass

from PIL import Image

from ..errors import InputError
from ..field_types import check_types
from ..habits import named_arguments


@named_arguments
@dataclass(frozen=True)
class MediaLimits:
    """What may be read for one picture or video. Records of a data set are not trusted, so everything is bounded.

    Attributes:
        urls: http and https URLs may be fetched.
        files: local paths, and objects in stores (s3://, gs://), may be opened.
        private_addresses: URLs may lead to loopback, private and link-local addresses.
        timeout: seconds for one URL, redirects included.
        max_bytes: size of one encoded picture in bytes, wherever it comes from.
        max_video_bytes: size of one encoded video, or of a PDF, in bytes, wherever it comes from.
        max_pixels: width × height of a picture or frame, checked before any pixel is decoded, and again after it.
        max_frames: frames taken from one video file.
        max_decoded_pixels: sum of width × height over all frames that have to be decoded for those taken: two hours of 1080p at
            24 frames a second take 3.6e11 if all are needed, but few are needed where key frames are near.
        max_redirects: redirects of one URL; each address is checked like the first.
        pdf_dpi: pixels per inch of a page of a PDF, which has no pixels of its own.
        isolate: decode videos in a helper process, so that a damaged file cannot crash the caller (see isolation.py).
        decode_seconds: how long that helper may go without any progress; one second is added for every two megabytes of the
            file. What a video may cost is bounded by the numbers above, which do not depend on how busy the machine is.

    Raises:
        InputError: a value has the wrong type, or is negative.
    """

    urls: bool = True
    files: bool = True
    private_addresses: bool = False
    timeout: float = 20.0
    max_bytes: int = 256 * 2**20
    max_video_bytes: int = 4 * 2**30
    max_pixels: int = 2**27
    max_frames: int = 4096
    max_decoded_pixels: int = 2**39
    max_redirects: int = 5
    pdf_dpi: float = 144.0
    isolate: bool = True
    decode_seconds: float = 60.0

    def __post_init__(self):
        check_types(self, InputError)
        for name, value in vars(self).items():
            if not value >= 0:
                raise InputError(f"MediaLimits.{name} is {value!r:.80}; it cannot be negative")


def describe_source(source: object) -> str:
    """`source` in a few words for a message: long base64 text is cut, bytes are counted, objects are named by type."""
    if isinstance(source, (bytes, bytearray)):
        return f"{len(source)} bytes"
    if isinstance(source, (str, os.PathLike)):
        text = os.fsdecode(source)
        return repr(text if len(text) <= 200 else f"{text[:80]}…({len(text)} characters)")
    size = source.size if isinstance(source, Image.Image) else getattr(source, "shape", None)
    return f"a {type(source).__name__}" + (f" of {size}" if size is not None else "")
