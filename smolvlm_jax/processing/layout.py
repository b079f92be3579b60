"""How pictures and videos may be nested in a call, and the one nesting that the rest of the package works with."""

from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from ..errors import InputError
from .fetch import is_path, is_source
from .pixels import is_array


def _is_picture(value: object) -> bool:
    return is_source(value) or isinstance(value, Image.Image) or is_array(value)


def nest_images(images: Any) -> list[list]:
    """One list for each sample, with one entry for each picture.

    Args:
        images: a picture, a flat list (one sample), a list of lists, a 4-D array (one sample of its pictures), or a list
            of 4-D arrays (a sample each). A picture is a Pillow image, a 3-D array, a path, a URL, base64 text or bytes.

    Raises:
        InputError: anything nested deeper, mixed nestings, or an empty list.
    """
    if images is None:
        raise InputError("images is None; pass a picture, a list of pictures or a list of lists")
    if _is_picture(images):
        return [_pictures_of(images)]
    if not isinstance(images, Sequence):
        raise InputError(f"images is a {type(images).__name__}; pass a picture, a list of pictures or a list of lists")
    if not len(images):
        raise InputError("images is an empty list; leave it out for a batch of text only")
    if all(isinstance(sample, (list, tuple)) for sample in images):
        for index, sample in enumerate(images):
            for entry in sample:
                if not _is_picture(entry) or (is_array(entry) and entry.ndim != 3):
                    raise InputError(
                        f"images[{index}] holds {_describe(entry)}; a sample is a list of pictures, nested no deeper"
                    )
        return [list(sample) for sample in images]
    for index, entry in enumerate(images):
        if not _is_picture(entry):
            raise InputError(f"images[{index}] is {_describe(entry)}; pass pictures only, or lists of pictures only")
    if is_array(images[0]) and images[0].ndim == 4:
        return [_pictures_of(sample) for sample in images]
    return [[picture for entry in images for picture in _pictures_of(entry, single=True)]]


def _pictures_of(value: Any, *, single: bool = False) -> list:
    """The pictures of an entry; `single` refuses an array of several."""
    if not is_array(value) or isinstance(value, Image.Image) or value.ndim == 3:
        return [value]
    if value.ndim == 4 and not single:
        return list(value)
    raise InputError(
        f"a picture array of shape {tuple(value.shape)}; it needs (height, width, channels) or (channels, height, "
        "width), and one more dimension in front for several pictures of one sample"
    )


def _describe(value: Any) -> str:
    shape = getattr(value, "shape", None)
    return f"an array of shape {tuple(shape)}" if shape is not None else f"a {type(value).__name__}"


def _is_frame(value: Any) -> bool:
    return isinstance(value, Image.Image) or (is_array(value) and value.ndim == 3)


def flatten_videos(videos: Any) -> list:
    """One entry for each video: a 4-D array, a list of frames, a path, or a list of frame paths.

    Args:
        videos: a list of frames is one video, and so is a 4-D array; a 5-D array is several; lists nest freely around
            them. Paths in one or two lists are a video each, in three lists the frames of one.

    Raises:
        InputError: anything else.
    """
    if is_path(videos):
        return [videos]
    if _is_frame(videos):
        return [[videos]]
    if is_array(videos):
        if videos.ndim == 4:
            return [videos]
        if videos.ndim == 5:
            return list(videos)
        raise InputError(f"a video array of shape {tuple(videos.shape)}; it needs (frames, height, width, channels)")
    if not isinstance(videos, (list, tuple)):
        raise InputError(f"a video of type {type(videos).__name__}; pass an array, a list of frames, a path or a URL")
    if not videos:
        return []
    if all(_is_frame(entry) for entry in videos):
        return [list(videos)]
    flat: list[Any] = []
    for entry in videos:
        nested = isinstance(entry, (list, tuple)) and entry and isinstance(entry[0], (list, tuple))
        if nested and all(is_path(path) for frames in entry for path in frames):
            flat.extend(list(frames) for frames in entry)
        elif _is_frame(entry):
            raise InputError("frames and whole videos in one list; put the frames of a video in a list of their own")
        else:
            flat.extend(flatten_videos(entry))
    return flat


def metadata_of_videos(video_metadata: Any, count: int) -> list:
    """One entry for each of `count` videos, None where nothing was given. Raises InputError where the counts differ."""
    if video_metadata is None:
        return [None] * count
    if isinstance(video_metadata, Mapping) or not isinstance(video_metadata, (list, tuple)):
        video_metadata = [video_metadata]
    flat: list[Any] = []
    for entry in video_metadata:
        flat.extend(entry if isinstance(entry, (list, tuple)) else [entry])
    if len(flat) != count:
        raise InputError(f"{count} videos, but {len(flat)} entries of video_metadata; pass one for each")
    return flat
