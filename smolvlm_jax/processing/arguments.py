"""Which keyword of a call belongs to the text, which to the pictures, which to the videos."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import InputError
from ..habits import Neutral, unasked
from .images import SmolVLMImageProcessor
from .text_options import TEXT_NEUTRAL, TEXT_OPTIONS
from .videos import SmolVLMVideoProcessor


def _keywords(function: Callable) -> frozenset[str]:
    found = inspect.signature(function).parameters.values()
    return frozenset(parameter.name for parameter in found if parameter.kind is parameter.KEYWORD_ONLY)


def _of_processor(kind: type[SmolVLMImageProcessor] | type[SmolVLMVideoProcessor], own: str) -> frozenset[str]:
    """The keywords of a processor's calls. `own` is one that SmolVLMProcessor sets itself."""
    return (_keywords(kind.preprocess) | {*kind.DEFAULTS, *kind.NEUTRAL}) - {own}


GROUPS = {
    "text_kwargs": TEXT_OPTIONS | {*TEXT_NEUTRAL},
    "images_kwargs": _of_processor(SmolVLMImageProcessor, "return_row_col_info"),
    "videos_kwargs": _of_processor(SmolVLMVideoProcessor, "return_metadata"),
}
_TWICE = "{!r} is given twice, on its own and in a dictionary"
_NO_AUDIO = "SmolVLM has no audio"
_NEUTRAL = {
    "audio": Neutral((), _NO_AUDIO),
    "audio_kwargs": Neutral(({},), _NO_AUDIO),
    "sampling_rate": Neutral((), _NO_AUDIO),
    "load_audio_from_video": Neutral((False,), _NO_AUDIO),
    "common_kwargs": Neutral(({},), "pass its keywords on their own"),
}
ALL = frozenset({*GROUPS, "return_metadata", *_NEUTRAL}).union(*GROUPS.values())


@dataclass(frozen=True)
class Arguments:
    """The keywords of one call, by what takes them: the tokenizer, the image, the video processor and SmolVLMProcessor."""

    text: dict[str, Any]
    images: dict[str, Any]
    videos: dict[str, Any]
    return_metadata: bool


def joined_arguments(own: Mapping[str, Any], further: Mapping[str, Any] | None) -> dict[str, Any]:
    """The keywords of a call that stand on their own, and those in its `processor_kwargs`.

    Raises:
        InputError: one stands in both.
    """
    joined = dict(further or {})
    for name, value in own.items():
        if value is not None and joined.get(name) is not None:
            raise InputError(_TWICE.format(name))
        if value is not None or name not in joined:
            joined[name] = value
    return joined


def sort_arguments(kwargs: Mapping[str, Any]) -> Arguments:
    """Sort the keywords of a call of SmolVLMProcessor; each goes to every part that knows it.

    Args:
        kwargs: keywords by name; text_kwargs, images_kwargs and videos_kwargs hold such for one part each.

    Raises:
        InputError: no part knows a keyword (the reference drops it silently), or it is given twice.
    """
    options = {group: dict(kwargs.get(group) or {}) for group in GROUPS}
    metadata = options["videos_kwargs"].pop("return_metadata", None)
    if metadata is not None and kwargs.get("return_metadata") is not None:
        raise InputError(_TWICE.format("return_metadata"))
    metadata = metadata or kwargs.get("return_metadata")
    for group, given in options.items():
        unknown = sorted(set(given) - GROUPS[group])
        if unknown:
            raise InputError(f"no argument {unknown[0]!r} here; there are {', '.join(sorted(GROUPS[group]))}")
    for name, value in unasked("SmolVLMProcessor", kwargs, _NEUTRAL, ALL - {*_NEUTRAL}).items():
        takers = [taker for group, taker in options.items() if name in GROUPS[group]]
        for taker in takers:
            if name in taker:
                raise InputError(_TWICE.format(name))
            taker[name] = value
    text, images, videos = options.values()
    return Arguments(text, images, videos, return_metadata=bool(metadata))
