"""What is said of a call of `generate`: warnings about settings that change nothing, and errors for calls that do not fit."""

import sys
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np
from flax import errors

from .errors import InputError
from .generation_config import DRAWING, GenerationConfig, Sampling
from .generation_habits import ELSEWHERE, OF_A_CALL, OTHERS
from .habits import unknown_argument
from .prompt_arrays import PromptArrays

__all__ = ["OTHER_PARAMETERS", "call_config", "check_call", "misfit", "unread", "warn", "warn_of_room"]

# What flax says of parameters that are another model's.
OTHER_PARAMETERS = (errors.ScopeCollectionNotFound, errors.ScopeParamNotFoundError, errors.ScopeParamShapeError)
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


def check_call(where: str, parameters: Iterable[str], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Refuse a call of `generate` or `stream` with names that nothing knows, or within a transformation of jax.

    Args:
        where: the function, for messages.
        parameters: its own, beside the settings.
        args, kwargs: of the call.

    Raises:
        InputError: what is wrong.
    """
    neutral = {**OTHERS, **OF_A_CALL, **ELSEWHERE}
    known = {*GenerationConfig.__dataclass_fields__, *parameters} - {"overrides"}
    for name in kwargs:
        if name not in known and name not in neutral:
            raise unknown_argument(where, name, known, neutral)
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves((args, kwargs))):
        raise InputError(
            f"{where} is compiled itself, and takes arrays: call it outside of jax.jit, jax.vmap and the like, where these are "
            "tracers; model.apply can be called there"
        )


def misfit(error: Exception) -> InputError:
    """The error for one of `OTHER_PARAMETERS`."""
    first = " ".join(str(error).split()).partition(" (http")[0]
    return InputError(f"params do not fit the model: pass those that load gave with it ({first:.200})")
