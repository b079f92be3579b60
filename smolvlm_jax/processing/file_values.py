"""What the values in a checkpoint's processor files must be, so that a faulty file is named before it is used."""

import math
from collections.abc import Callable, Mapping
from typing import Any

from ..errors import CheckpointError
from .geometry import TILINGS

__all__ = ["check_values", "whole"]

_LARGEST = 8192  # pixels of a side after resizing: 200 MB a picture


def whole(value: Any, least: int, most: int) -> bool:
    """Whether a value is an integer from `least` to `most`, and no bool."""
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _number(value: Any, least: float, most: float) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and least <= value <= most


def _flag(value: Any) -> bool:
    return isinstance(value, bool)


def _size(value: Any) -> bool:
    if isinstance(value, Mapping):
        sides = [value[key] for key in ("longest_edge", "shortest_edge", "height", "width") if value.get(key) is not None]
        return bool(sides) and all(whole(side, 1, _LARGEST) for side in sides)
    return whole(value, 1, _LARGEST)


def _channels(value: Any) -> bool:
    values = value if isinstance(value, (list, tuple)) else [value]
    return len(values) in (1, 3) and all(_number(item, -1e6, 1e6) for item in values)


def _deviations(value: Any) -> bool:
    return _channels(value) and all(abs(item) > 1e-6 for item in (value if isinstance(value, (list, tuple)) else [value]))


def _sampling(value: Any) -> bool:
    if not isinstance(value, Mapping):
        return False
    rules: dict[str, Callable[[Any], bool]] = {"max_frames": _frames, "fps": _rate, "video_size": _size}
    return all(rules[key](entry) for key, entry in value.items() if key in rules and entry is not None)


def _frames(value: Any) -> bool:
    return whole(value, 1, 100_000)


def _rate(value: Any) -> bool:
    return _number(value, 1e-6, 1e6)


# Argument of a processor: the test, and the words for a value that fails it.
_RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "size": (_size, f"{{'longest_edge': pixels}}, from 1 to {_LARGEST}"),
    "max_image_size": (_size, f"{{'longest_edge': pixels}}, from 1 to {_LARGEST}"),
    "resample": (lambda value: whole(value, 0, 5), "one of Pillow's filters, 0 to 5"),
    "rescale_factor": (lambda value: _number(value, -1e6, 1e6) and math.isfinite(value), "a number"),
    "image_mean": (_channels, "a number, or three"),
    "image_std": (_deviations, "a number other than 0, or three"),
    "num_frames": (_frames, "a number of frames"),
    "fps": (_rate, "a number of frames per second"),
    "video_sampling": (_sampling, "an object with max_frames, fps and video_size"),
    "max_tiles": (lambda value: whole(value, 1, 2**31), "a number of tiles"),
    "tiling": (lambda value: value in TILINGS, f"one of {', '.join(TILINGS)}"),
    "num_threads": (lambda value: whole(value, 1, 1024), "a number of threads"),
    "backend": (lambda value: isinstance(value, str), "a name"),
}


def check_values(config: Mapping[str, Any], known: Mapping[str, Any], where: str) -> None:
    """Check the arguments of an image or video processor that a file gives.

    Args:
        config: arguments by name. null means off, or the default. Keys that are no arguments are not checked.
        known: the processor's arguments with their defaults.
        where: the file, and the key in it.

    Raises:
        CheckpointError: a value is not what its argument must be; the message names the file and the key.
    """
    for key, default in known.items():
        value = config.get(key)
        if value is None:
            continue
        fits, wants = _RULES.get(key, (_flag, "true or false") if isinstance(default, bool) else (lambda _: False, "left out"))
        if not fits(value):
            raise CheckpointError(f"{where}: {key} must be {wants}, got {value!r:.80}")
