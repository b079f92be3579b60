"""What the value of each setting of generation may be."""

import math
from collections.abc import Callable
from dataclasses import fields
from numbers import Real
from typing import Any

from .errors import InputError
from .habits import plain_value

__all__ = ["MOST_STOPS", "SETTING_RULES", "check"]

# The device reads settings as float32 and int32. Scores are divided and multiplied by these, and stay finite.
_SMALLEST, _LARGEST = 1e-15, 1e15
_INT32 = 2**31 - 1
MOST_STOPS = 256  # each is looked for after every token
_MOST_LOGPROBS = 1024  # alternatives, which go to the host with every token


def _whole(value: Any, least: int, most: float = math.inf) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _number(value: Any, least: float, most: float) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and value <= most and not value < least


def _is_id(value: Any) -> bool:
    return _whole(value, 0, _INT32)


# What each setting must be: a test, and the words of the message for a value that fails it.
SETTING_RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "max_new_tokens": (lambda x: _whole(x, 1), "a positive integer"),
    "max_length": (lambda x: _whole(x, 1), "a positive integer"),
    "min_length": (lambda x: _whole(x, 0), "0 (off) or a positive integer"),
    "min_new_tokens": (lambda x: _whole(x, 0), "0 (off) or a positive integer"),
    "num_return_sequences": (lambda x: _whole(x, 1), "a positive integer"),
    "bad_words_ids": (
        lambda x: all(isinstance(word, tuple) and word and all(map(_is_id, word)) for word in x),
        "lists of token ids",
    ),
    **dict.fromkeys(
        ("return_dict_in_generate", "output_scores", "output_logits"), (lambda x: isinstance(x, bool), "true or false")
    ),
    "do_sample": (lambda x: isinstance(x, bool), "true or false"),
    "temperature": (
        lambda x: _number(x, _SMALLEST, _LARGEST),
        f"a number from {_SMALLEST:g} to {_LARGEST:g} (use do_sample=False for greedy decoding)",
    ),
    "top_k": (lambda x: _whole(x, 0, _INT32), "0 (off) or a positive integer below 2**31"),
    "top_p": (lambda x: _number(x, 0, 1) and x > 0, "a number in (0, 1]"),
    "min_p": (lambda x: _number(x, 0, 1), "a number in [0, 1]"),
    "repetition_penalty": (lambda x: _number(x, _SMALLEST, _LARGEST), f"a number from {_SMALLEST:g} to {_LARGEST:g}"),
    "seed": (lambda x: _whole(x, 0, 2**32 - 1), "an integer from 0 to 2**32 - 1"),
    "ignore_eos": (lambda x: isinstance(x, bool), "true or false"),
    "repetition_window": (lambda x: _whole(x, 0), "0 (off) or a positive integer"),
    "eos_token_id": (lambda x: all(map(_is_id, x if isinstance(x, (list, tuple)) else [x])), "a token id or a list of them"),
    "pad_token_id": (lambda x: _is_id(x), "a token id"),
    "logprobs": (
        lambda x: _whole(x, 0, _MOST_LOGPROBS),
        f"0 (of the chosen token alone) or a number of alternatives up to {_MOST_LOGPROBS:,}",
    ),
}


def plain(value: Any) -> Any:
    """Numbers of numpy and jax as Python's, arrays and lists of them as tuples."""
    value = plain_value(value)
    return tuple(map(plain, value)) if isinstance(value, (list, tuple)) else value


def check(settings: Any) -> None:
    """Raise InputError for the first field that breaks its rule. None is allowed where it is the field's default, and a top_k
    of -1, as clients of other servers send it, is 0."""
    if settings.top_k == -1:
        object.__setattr__(settings, "top_k", 0)
    for field in fields(settings):
        value = plain(getattr(settings, field.name))
        object.__setattr__(settings, field.name, value)
        if field.name not in SETTING_RULES or (value is None and field.default is None):
            continue
        fits, wants = SETTING_RULES[field.name]
        if not fits(value):
            raise InputError(f"{field.name} must be {wants}, got {value!r:.80}")
