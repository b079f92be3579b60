"""Which keyword of a call belongs to the text, which to the pictures, which to the videos."""

from ..errors import InputError
from .images import SmolVLMImageProcessor
from .videos import SmolVLMVideoProcessor

TEXT = frozenset(
    {
        "padding",
        "truncation",
        "max_length",
        "pad_to_multiple_of",
        "padding_side",
        "return_attention_mask",
        "add_special_tokens",
    }
)
_MEDIA = frozenset({"input_data_format", "num_threads"})
IMAGES = frozenset({*SmolVLMImageProcessor.DEFAULTS, *SmolVLMImageProcessor.NEUTRAL, "return_image_hashes"}) | _MEDIA
VIDEOS = frozenset({*SmolVLMVideoProcessor.DEFAULTS, *SmolVLMVideoProcessor.NEUTRAL, "video_metadata", "skip_secs"}) | _MEDIA
# arguments of SmolVLMProcessor.__call__ itself
OWN = frozenset(
    {"return_tensors", "return_metadata", "pixel_format", "limits", "text_kwargs", "images_kwargs", "videos_kwargs"}
)
ALL = TEXT | IMAGES | VIDEOS | OWN


def sort_arguments(kwargs: dict, text_kwargs, images_kwargs, videos_kwargs) -> tuple[dict, dict, dict]:
    """(for the text, for the pictures, for the videos). A keyword goes to all that know it.

    Raises InputError for one that nobody knows (the reference drops it and says nothing), or that is given twice.
    """
    groups = ((TEXT, dict(text_kwargs or {})), (IMAGES, dict(images_kwargs or {})), (VIDEOS, dict(videos_kwargs or {})))
    for names, options in groups:
        unknown = sorted(set(options) - names)
        if unknown:
            raise InputError(f"no argument {unknown[0]!r} here; there are {', '.join(sorted(names))}")
    for name, value in kwargs.items():
        takers = [options for names, options in groups if name in names]
        if not takers:
            raise InputError(f"SmolVLMProcessor has no argument {name!r}; it has {', '.join(sorted(ALL))}")
        for options in takers:
            if name in options:
                raise InputError(f"{name!r} is given twice, on its own and in a dictionary")
            options[name] = value
    return tuple(options for _, options in groups)
