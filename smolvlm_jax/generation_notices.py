"""Warnings about settings that a caller gives and that do not change what is generated."""

import sys
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from .generation_config import DRAWING, GenerationConfig, Sampling
from .prompt_arrays import PromptArrays

__all__ = ["call_config", "unread", "warn", "warn_of_room"]

# Values of the settings of a draw that ask for nothing: the defaults, and what switches them off.
_NOTHING = (Sampling(), Sampling(**dict.fromkeys(DRAWING)))  # type: ignore[arg-type]


def warn(text: str) -> None:
    """A warning in the name of the first caller from outside of the package, so that Python says it once for each place."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] == __package__:
        level, frame = level + 1, frame.f_back
    warnings.warn(text, stacklevel=level)


def unread(config: Sampling, given: Iterable[str]) -> dict[str, str]:
    """What changes nothing of the settings that a caller gave, by name.

    Args:
        config: all settings.
        given: names of those that the caller gave.

    Returns:
        For each such setting a line.
    """
    idle = {}
    for name in given:
        value, needed = getattr(config, name, None), None
        if name in DRAWING and not config.do_sample and all(value != getattr(other, name) for other in _NOTHING):
            needed = "do_sample"
        elif name in ("output_scores", "output_logits") and value and not getattr(config, "return_dict_in_generate", True):
            needed = "return_dict_in_generate"
        if needed is not None:
            idle[name] = f"{name}={value!r:.80} has no effect without {needed}=True"
    return idle


def call_config(model: Any, generation_config: Any, overrides: Mapping[str, Any]) -> GenerationConfig:
    """The settings of a call of `generate` or `stream`, with a warning for each that the caller gives and that changes nothing.

    A checkpoint's own settings are no choice of the caller.
    """
    own = GenerationConfig.of(model.generation_config or GenerationConfig())
    config = GenerationConfig.of(generation_config or own)
    given = [name for name in config.__dataclass_fields__ if getattr(config, name) != getattr(own, name)]
    config = config.replace(**overrides)
    for line in unread(config, {**dict.fromkeys(given), **overrides}).values():
        warn(line)
    if config.logprobs:  # no more alternatives than there are
        config = config.replace(logprobs=min(config.logprobs, model.config.text_config.vocab_size))
    return config


def warn_of_room(model: Any, config: GenerationConfig, overrides: Mapping[str, Any], prompts: PromptArrays) -> None:
    """Warn where the caller's limit is beyond the model's positions, where an answer ends."""
    limit, positions = prompts.settings.limit, model.config.text_config.max_position_embeddings
    room = prompts.config.max_new_tokens or 0 if limit is None else int(np.asarray(limit).min())
    for name, most in (("max_new_tokens", room), ("max_length", positions)):
        asked = getattr(config, name)
        if overrides.get(name) is not None and asked > most:
            warn(f"{name}={asked!r:.40}: the prompt leaves {room:,} of the model's {positions:,} positions, where answers end")
