# ruff: noqa: RUF009 (_option and _limit make fields)
"""`PictureOptions`: how pictures and videos are read, as the commands, the batch job and recipes are told it. Imports nothing
heavy."""

import dataclasses
import functools
import types
import typing
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from .errors import InputError
from .field_types import check_types
from .habits import named_arguments

__all__ = ["PictureOptions", "flag_of"]

# What the input must have for an option to have an effect. Limits hold whatever there is.
_ABOUT = {
    **dict.fromkeys(
        ("num_frames", "fps", "skip_secs", "do_sample_frames", "video_sampling", "use_video_size", "backend"), ("video",)
    ),
    **dict.fromkeys(("max_tiles", "do_upscale", "tiling", "do_image_splitting", "background", "full_16bit"), ("picture",)),
    **dict.fromkeys(("do_convert_rgb", "do_resize", "size", "max_image_size", "resample"), ("picture", "video")),
    "exif_transpose": ("array of pixels",),
    "pages": ("picture that is not of a PDF",),
    "pdf_dpi": ("PDF",),
}
# What has the effect, by what there is.
_INSTEAD = {
    (
        "pages",
        "PDF",
    ): """; each page of a PDF is a record: ask about some in a file of records, {"document": "FILE.pdf#2"} a line"""
}


def _option(help: str) -> Any:
    return field(default=None, metadata={"help": f"{help} (default: as the checkpoint says)"})


def _limit(help: str, limit: float) -> Any:
    """limit: the default in MediaLimits, which is not imported here."""
    shown = ("off", "on")[limit] if isinstance(limit, bool) else f"{limit:,.10g}"
    return field(default=None, metadata={"help": f"{help} (default: {shown})", "limit": limit})


@named_arguments
@dataclass(frozen=True, kw_only=True)
class PictureOptions:
    """How pictures and videos become tiles, and what may be read for them. None leaves the choice to the checkpoint.

    Each field is an argument of SmolVLMImageProcessor or SmolVLMVideoProcessor, of their calls, or a field of MediaLimits.
    They describe it. Left out are those that the device does or that no job has a use for.

    Raises:
        InputError: a value has the wrong type, is negative, or without end.
    """

    # pictures
    max_tiles: int | None = _option("largest number of tiles of a picture, which is shrunk to it")
    do_upscale: bool | None = _option("enlarge small pictures")
    tiling: str | None = _option("smolvlm, nanovlm or nanovlm-grid")
    do_image_splitting: bool | None = _option("let a picture take several tiles")
    do_convert_rgb: bool | None = _option("convert pictures of any mode to RGB")
    do_resize: bool | None = _option("resize pictures and frames to their size")
    size: dict[str, int] | None = _option('size of resized pictures and frames, such as {"longest_edge": 1024}')
    max_image_size: dict[str, int] | None = _option('size of a tile, such as {"longest_edge": 512}')
    resample: int | None = _option("Pillow's filter, 0 to 5")
    background: str | list | tuple | None = _option("colour under transparent parts, such as white or #rrggbb")
    full_16bit: bool | None = _option("keep 16-bit greys from saturating at white")
    pages: int | str | None = _option("pages of a TIFF: first, all, or the number of one, from 1")
    exif_transpose: bool | None = _option("apply the EXIF orientation to arrays of pixels too, as it always is to files")
    # videos
    num_frames: int | None = _option("largest number of frames taken from a video")
    fps: float | None = _option("frames taken from each second of a video")
    skip_secs: float | None = _option("seconds left out at both ends of a long video")
    do_sample_frames: bool | None = _option("take some frames of a video instead of all")
    video_sampling: dict[str, Any] | None = _option(
        'the settings of videos together, such as {"max_frames": 8, "fps": 1, "video_size": {…}}'
    )
    use_video_size: bool | None = _option("use the size in video_sampling even if there is another one")
    backend: str | None = _option("library that is tried first for videos: pyav or decord")
    # limits
    urls: bool | None = _limit("http and https URLs may be fetched", True)
    files: bool | None = _limit("local paths may be opened", True)
    private_addresses: bool | None = _limit("URLs may lead to loopback, private and link-local addresses", False)
    timeout: float | None = _limit("seconds for one URL", 20.0)
    max_redirects: int | None = _limit("largest number of redirects of one URL", 5)
    max_bytes: int | None = _limit("largest encoded picture, in bytes", 256 * 2**20)
    max_video_bytes: int | None = _limit("largest encoded video or PDF, in bytes", 4 * 2**30)
    max_pixels: int | None = _limit("largest width × height of a picture or frame", 2**27)
    max_frames: int | None = _limit("largest number of frames taken from a video", 4096)
    max_decoded_pixels: int | None = _limit("largest sum of width × height over all frames decoded for a video", 2**39)
    isolate: bool | None = _limit("decode videos in a helper process", True)
    pdf_dpi: float | None = _limit("pixels per inch of a page of a PDF", 144.0)
    decode_seconds: float | None = _limit("seconds without progress after which the helper process is ended", 60.0)

    def __post_init__(self):
        check_types(self, InputError)
        for name, value in self.given().items():
            if isinstance(value, (int, float)) and not 0 <= value < float("inf"):
                raise InputError(f"{name} is {value!r:.80}; it cannot be negative, nor without end")

    def require_use(self, media: Collection[str], where: str) -> None:
        """Refuse an option that has no effect.

        Args:
            media: what there is to read: "picture", "picture that is not of a PDF", "video", "PDF", "array of pixels".
            where: it is, for the message.

        Raises:
            InputError: an option that is given is about none of `media`.
        """
        for name in self.given():
            about = _ABOUT.get(name)
            if about and not set(about) & set(media):
                instead = next((words for (option, kind), words in _INSTEAD.items() if option == name and kind in media), "")
                raise InputError(
                    f"{flag_of(name)} ({name}) has no effect: there is no {' and no '.join(about)} in {where}; leave it out"
                    f"{instead}"
                )

    def given(self) -> dict[str, Any]:
        """The options that are given.

        Returns:
            Names and values of those that are not None.
        """
        return {name: value for name, value in vars(self).items() if value is not None}


def flag_of(name: str) -> str:
    """The option of the command line for a field: --upscale for do_upscale."""
    return "--" + name.removeprefix("do_").replace("_", "-")


@functools.cache
def kinds() -> dict[str, tuple[type, ...]]:
    """The types that the value of each option may have, apart from None."""
    out = {}
    for name, hint in typing.get_type_hints(PictureOptions).items():
        parts = (part for part in typing.get_args(hint) if part is not types.NoneType)
        out[name] = tuple(typing.get_origin(part) or part for part in parts)
    return out


def from_mapping(options: dict[str, Any]) -> PictureOptions:
    """Options by name.

    Raises:
        InputError: there is no option of a name, or a value has the wrong type.
    """
    known = [entry.name for entry in dataclasses.fields(PictureOptions)]
    for name in options:
        if name not in known:
            raise InputError(f"there is no picture option {name!s}; there are {', '.join(known)}")
    return PictureOptions(**options)
