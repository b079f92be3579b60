"""How pictures and videos may be nested in a call, and the one nesting that the rest of the package works with."""

import os
import re
from collections.abc import Iterator, Sequence
from typing import Any

from PIL import Image

from ..errors import InputError
from .fetch import is_source
from .limits import describe_source
from .pixels import is_array

# How a URL or path begins, and how the name of a file ends.
_NAMED = re.compile(r"^(\w+://|data:|file:|[A-Za-z]:\\|[/~]|\.{1,2}/)|\.\w{1,5}$")
_SENTENCE_ENDS = (".", "?", "!", ":", "…", "。", "？", "！")
_LONGEST_WORD = 64


def _is_picture(value: object) -> bool:
    return is_source(value) or isinstance(value, Image.Image) or is_array(value)


def check_order(images: Any, text: Any, token: str) -> None:
    """Raise InputError where a prompt stands in the place of pictures, or pictures in that of prompts. By the rules of
    `_is_prose` a prompt alone is told from the name of a file that is not there.

    Args:
        images: the first argument of a processor.
        text: the second.
        token: of a picture in a text.
    """
    prose = next((value for value in _strings(images) if _is_prose(value, token)), None)
    if images is None or (text is None and prose is None):
        return
    if text is None:
        raise InputError(
            f"images, the first argument, is {describe_source(prose)}, which is no file: pictures go there, and a prompt "
            "goes by name: processor(text=…)"
        )
    texts, pictures = (value if isinstance(value, (list, tuple)) else [value] for value in (text, images))
    strings = [value for value in texts if isinstance(value, str)]
    prompts = prose is not None or any(isinstance(value, str) and token in value for value in pictures)
    if len(strings) < len(texts) or (prompts and not any(token in value for value in strings)):
        raise InputError(
            "text needs a string or a list of strings, and images pictures; images come first, processor(images, text), or go "
            "by name: processor(text=…, images=…)"
        )


def _strings(value: Any) -> Iterator[str]:
    """The strings in nested lists."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, tuple)):
        yield from (text for entry in value for text in _strings(entry))


def _is_prose(text: str, token: str) -> bool:
    """Whether a string reads like a prompt: words or a sentence, and neither a URL, a path, the name of a file nor a file.

    Base64 text may hold white space too, but not between words.
    """
    text = text.strip()
    if token not in text:
        if _NAMED.search(text) or (not text.endswith(_SENTENCE_ENDS) and " " not in text):
            return False
        if max(map(len, text.split())) >= _LONGEST_WORD:
            return False
    return "\0" in text or not os.path.exists(text)


def nest_images(images: Any) -> list[list]:
    """One list for each sample, with one entry for each picture.

    Args:
        images: a picture, a flat list (one sample), a list of lists, a 4-D array (one sample of its pictures), or a list
            of 4-D arrays (a sample each). A picture is a Pillow image, a 3-D array, a path, a URL, base64 text or bytes.

    Raises:
        InputError: anything nested deeper, mixed nestings, or an empty list.
    """
    if _is_picture(images):
        return [_sample("images", images)]
    if not isinstance(images, Sequence):
        raise InputError(f"images is {describe_source(images)}; pass a picture, a list of pictures or a list of lists")
    if not images:
        raise InputError("images is an empty list; leave it out for a batch of text only")
    if all(isinstance(sample, (list, tuple)) for sample in images):
        return [[_picture(f"images[{row}]", entry) for entry in sample] for row, sample in enumerate(images)]
    if is_array(images[0]) and images[0].ndim == 4:
        return [_sample(f"images[{row}]", sample) for row, sample in enumerate(images)]
    return [[_picture(f"images[{index}]", entry) for index, entry in enumerate(images)]]


def _picture(where: str, value: Any) -> Any:
    """`value`, called `where` in a message. Raises InputError unless it is one picture."""
    if value is None:
        raise InputError(f"{where} is None; a text without pictures has an empty list in their place, images=[[picture], []]")
    if not _is_picture(value) or (is_array(value) and value.ndim != 3):
        raise InputError(
            f"{where} holds {describe_source(value)}; a sample is a list of pictures, nested no deeper, or an array of four "
            "dimensions; a picture is a Pillow image, a path, a URL, base64 text, bytes, or an array (height, width, channels) "
            "or (channels, height, width)"
        )
    return value


def _sample(where: str, value: Any) -> list:
    """The pictures of a sample that is one picture or an array of several."""
    return list(value) if is_array(value) and value.ndim == 4 else [_picture(where, value)]


def _is_frame(value: Any) -> bool:
    return isinstance(value, Image.Image) or (is_array(value) and value.ndim == 3)


def _are_frames(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and bool(value) and all(is_source(frame) or _is_frame(frame) for frame in value)


class _Frames(list[Any]):
    """The frames of one video, also where this list stands alone."""


def flatten_videos(videos: Any) -> list:
    """One entry for each video: a 4-D array, a list of frames, or a file; frames may be files too.

    Args:
        videos: a list of frames is one video, and so is a 4-D array; a 5-D array is several; lists nest freely around
            them. Files (paths, URLs, base64 text, bytes) in one or two lists are a video each, in three lists the frames of
            one.

    Raises:
        InputError: anything else.
    """
    if is_source(videos) or isinstance(videos, _Frames) or (is_array(videos) and videos.ndim == 4):
        return [videos]
    if _is_frame(videos):
        return [[videos]]
    if is_array(videos):
        if videos.ndim == 5:
            return list(videos)
        raise InputError(f"a video array of shape {tuple(videos.shape)}; it needs (frames, height, width, channels)")
    if not isinstance(videos, (list, tuple)):
        raise InputError(f"a video of type {type(videos).__name__}; pass an array, a list of frames, a path or a URL")
    if videos and all(_is_frame(entry) for entry in videos):
        return [list(videos)]
    flat: list[Any] = []
    for entry in videos:
        if _is_frame(entry):
            raise InputError("frames and whole videos in one list; put the frames of a video in a list of their own")
        if isinstance(entry, (list, tuple)) and any(map(_are_frames, entry)):
            for video in entry:
                flat.extend([_Frames(video)] if _are_frames(video) else flatten_videos([video]))
        else:
            flat.extend(flatten_videos(entry))
    return flat


def metadata_of_videos(video_metadata: Any, count: int) -> list:
    """One entry for each of `count` videos, None where nothing was given. Raises InputError where the counts differ."""
    if video_metadata is None:
        return [None] * count
    if not isinstance(video_metadata, (list, tuple)):
        video_metadata = [video_metadata]
    flat: list[Any] = []
    for entry in video_metadata:
        flat.extend(entry if isinstance(entry, (list, tuple)) else [entry])
    if len(flat) != count:
        raise InputError(f"{count} videos, but {len(flat)} entries of video_metadata; pass one for each")
    return flat
