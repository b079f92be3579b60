"""A checkpoint's processor with the options of a job."""

import dataclasses
import os
from typing import Any

from PIL import Image

from ..errors import InputError
from ..media_options import PictureOptions, flag_of
from .choices import one_of
from .limits import MediaLimits
from .processor import SmolVLMProcessor
from .readers import BACKENDS

__all__ = ["call_options", "check_options", "limits_of", "open_processor"]

_LIMITS = tuple(entry.name for entry in dataclasses.fields(MediaLimits))
_SPLITTING = ("max_tiles", "tiling")  # how a picture is cut into tiles
# What is said anew in every call: the processor has other defaults for conversations than for single calls.
_CALL = ("do_sample_frames", "skip_secs")


def open_processor(directory: str | os.PathLike, options: PictureOptions) -> SmolVLMProcessor:
    """The processor of a checkpoint with these options, apart from `call_options`.

    Raises:
        CheckpointError: the checkpoint has none.
        InputError: an option makes no sense, or has no effect.
    """
    given = {name: value for name, value in options.given().items() if name not in _CALL}
    given = {name: value for name, value in given.items() if name not in _LIMITS}
    backend = given.pop("backend", None)
    processor = SmolVLMProcessor.from_pretrained(directory, **given, limits=limits_of(options))
    if not processor.image_processor.do_image_splitting:
        for name in options.given():
            if name in _SPLITTING:
                raise InputError(
                    f"{flag_of(name)} ({name}) has no effect where a picture is one tile (do_image_splitting is off): leave it "
                    "out, or pass --image-splitting (do_image_splitting)"
                )
    if backend is not None:  # for transformers a keyword of another meaning
        processor.video_processor.backend = backend
    return processor


def limits_of(options: PictureOptions) -> MediaLimits:
    """What may be read for a picture or video, by these options."""
    return MediaLimits(**{name: value for name, value in options.given().items() if name in _LIMITS})


def check_options(processor: SmolVLMProcessor) -> None:
    """Try the options on a picture of one pixel: a mistake in them would be an error of every record.

    Raises:
        InputError: an option has a value that makes no sense.
    """
    backend = processor.video_processor.backend
    if backend is not None:
        one_of("backend", backend, tuple(BACKENDS))
    processor.image_processor(Image.new("RGBA", (1, 1)), pixel_format="uint8")


def call_options(options: PictureOptions) -> dict[str, Any]:
    """The options that are keywords of `encode_chat`."""
    return {name: value for name, value in options.given().items() if name in _CALL}
