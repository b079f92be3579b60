"""How pictures and videos may be nested in a call, and the one nesting everything else works with."""

from collections.abc import Sequence

from PIL import Image

from ..errors import InputError
from .fetch import is_source
from .pixels import is_array


def _is_picture(value) -> bool:
    return is_source(value) or isinstance(value, Image.Image) or is_array(value)


def nest_images(images) -> list[list]:
    """One list per sample of one entry per picture.

    A picture, a flat list (one sample), a list of lists, a 4-D array (one sample of its pictures), a list of 4-D
    arrays (a sample each). Raises InputError for anything deeper, mixed, or empty throughout.
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


def _pictures_of(value, single: bool = False) -> list:
    if not is_array(value) or isinstance(value, Image.Image):
        return [value]
    if value.ndim == 3:
        return [value]
    if value.ndim == 4 and not single:
        return list(value)
    raise InputError(
        f"a picture array of shape {tuple(value.shape)}; it needs (height, width, channels) or (channels, height, "
        "width), and one more dimension in front for several pictures of one sample"
    )


def _describe(value) -> str:
    shape = getattr(value, "shape", None)
    return f"an array of shape {tuple(shape)}" if shape is not None else f"a {type(value).__name__}"
