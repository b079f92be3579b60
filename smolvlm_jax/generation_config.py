"""How a prompt is continued: `Sampling`, `GenerationConfig` for `generate`, `SamplingParams` for requests to the engine."""

import dataclasses
import logging
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, fields
from numbers import Real
from pathlib import Path
from typing import Any

from .errors import ConfigError, InputError
from .io import read_json, write_json

__all__ = ["GenerationConfig", "Sampling", "SamplingParams"]

_log = logging.getLogger(__name__)


# The device reads settings as float32 and int32. Scores are divided and multiplied by these, and stay finite.
_SMALLEST, _LARGEST = 1e-15, 1e15
_INT32 = 2**31 - 1
_MOST_STOPS = 256  # each is looked for after every token


def _whole(value: Any, least: int, most: float = math.inf) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _number(value: Any, least: float, most: float) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and value <= most and not value < least


def _is_id(value: Any) -> bool:
    return _whole(value, 0, _INT32)


# What each setting must be: a test, and the words of the message for a value that fails it.
_RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "max_new_tokens": (lambda x: _whole(x, 1), "a positive integer"),
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
}


# Settings of a draw, without effect in greedy decoding.
_DRAWING = ("temperature", "top_k", "top_p", "min_p")
# Settings of transformers that change what is generated, and do not exist here, with their neutral values.
_OTHERS: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(
        ("num_beams", "num_beam_groups", "num_return_sequences", "guidance_scale", "encoder_repetition_penalty"), (1,)
    ),
    **dict.fromkeys(("typical_p", "top_h"), (1,)),
    **dict.fromkeys(
        ("penalty_alpha", "epsilon_cutoff", "eta_cutoff", "no_repeat_ngram_size", "min_length", "min_new_tokens"), (0,)
    ),
    **dict.fromkeys(("encoder_no_repeat_ngram_size", "diversity_penalty"), (0,)),
    **dict.fromkeys(("bad_words_ids", "suppress_tokens", "begin_suppress_tokens", "sequence_bias", "stop_strings"), ([],)),
    **dict.fromkeys(("forced_bos_token_id", "forced_eos_token_id", "exponential_decay_length_penalty", "max_time"), ()),
    **dict.fromkeys(("constraints", "force_words_ids", "watermarking_config", "dola_layers"), ()),
    **dict.fromkeys(("renormalize_logits", "remove_invalid_values", "token_healing"), (False,)),
}


def _check(settings: Any) -> None:
    """Raise InputError for the first field that breaks its rule. None is allowed where it is the field's default, and a top_k
    of -1, as clients of other servers send it, is 0."""
    if settings.top_k == -1:
        object.__setattr__(settings, "top_k", 0)
    for field in fields(settings):
        value = getattr(settings, field.name)
        if field.name not in _RULES or (value is None and field.default is None):
            continue
        fits, wants = _RULES[field.name]
        if not fits(value):
            raise InputError(f"{field.name} must be {wants}, got {value!r:.80}")


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are drawn, with the names and defaults of transformers.

    Attributes:
        do_sample: draw at random; otherwise the best token is taken, and of the other settings only `repetition_penalty`
            has an effect.
        temperature: scores are divided by it.
        top_k: keep the so many best tokens; 0 keeps all.
        top_p: keep the smallest set of best tokens whose probability reaches it; 1 keeps all.
        min_p: drop tokens less probable than this times the most probable one; 0 keeps all.
        repetition_penalty: tokens of the prompt and of the answer so far score lower by this factor; 1 is none.
    """

    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 50
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self):
        _check(self)

    @property
    def sampling(self) -> "Sampling":
        """These settings without those of a subclass."""
        if type(self) is Sampling:
            return self
        return Sampling(**{field.name: getattr(self, field.name) for field in fields(Sampling)})

    @property
    def greedy(self) -> bool:
        """Whether the token that the model scores best is taken."""
        return not self.do_sample and self.repetition_penalty == 1


@dataclass(frozen=True)
class GenerationConfig(Sampling):
    """Sampling and stopping of `generate` and `stream`, with the names and defaults of transformers.

    Attributes:
        max_new_tokens: the limit on new tokens. Where the prompt leaves less room, that is the limit.
        eos_token_id: one id, several, or None for no stop token; stored as a tuple.
        pad_token_id: what rows that have ended are filled with.
    """

    max_new_tokens: int = 20
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "eos_token_id", self.stop_tokens)

    @property
    def stop_tokens(self) -> tuple[int, ...]:
        """`eos_token_id` as a tuple."""
        stops = self.eos_token_id
        return () if stops is None else (stops,) if isinstance(stops, int) else tuple(stops)

    @property
    def fill_token_id(self) -> int:
        """What finished rows are filled with: the pad token, else the first stop token, else 0."""
        if self.pad_token_id is not None:
            return self.pad_token_id
        return self.stop_tokens[0] if self.stop_tokens else 0

    def replace(self, **changes) -> "GenerationConfig":
        """A copy with other values. Raises InputError for names that do not exist and values out of range."""
        known = {f.name for f in fields(self)}
        unknown = sorted(set(changes) - known)
        if unknown:
            raise InputError(f"unknown generation arguments {', '.join(unknown)}; known are {', '.join(sorted(known))}")
        return dataclasses.replace(self, **changes)

    @classmethod
    def from_pretrained(cls, directory: str | os.PathLike) -> "GenerationConfig":
        """Read `generation_config.json`.

        Args:
            directory: of the checkpoint.

        Returns:
            What the file says; an absent file gives the defaults, and so do null and what has no effect, such as the
            temperature of greedy decoding. A log line names settings that are not used though they look as if they should be.

        Raises:
            ConfigError: the file cannot be read, or a value that is used is out of range.
        """
        path = Path(directory) / "generation_config.json"
        data = read_json(path, error=ConfigError, missing_ok=True)
        given = {field.name: data[field.name] for field in fields(cls) if data.get(field.name) is not None}
        unused = [key for key, neutral in _OTHERS.items() if data.get(key) is not None and data[key] not in neutral]
        if given.get("top_k") == -1:  # as other libraries write "off"
            given["top_k"] = 0
        if not given.get("do_sample"):
            for name in (name for name in _DRAWING if name in given and not _RULES[name][0](given[name])):
                if not isinstance(given[name], Real) or isinstance(given[name], bool):
                    continue  # no number at all is a mistake
                if given.pop(name) != 0:
                    unused.append(name)
        if unused:
            _log.warning("%s: without effect here: %s", path, ", ".join(f"{key}={data[key]!r:.80}" for key in sorted(unused)))
        try:
            return cls(**given)
        except InputError as error:
            raise ConfigError(f"{path}: {error}") from error

    def save_pretrained(self, directory: str | os.PathLike) -> None:
        """Write `generation_config.json` into the directory, which is created if need be."""
        data = {k: v for k, v in dataclasses.asdict(self).items() if v is not None}
        stops = list(self.stop_tokens)
        data["eos_token_id"] = stops[0] if len(stops) == 1 else stops or None
        write_json(Path(directory) / "generation_config.json", data, sort_keys=True)


@dataclass(frozen=True)
class SamplingParams:
    """How one request to the engine is continued.

    Attributes:
        max_new_tokens: the limit on new tokens. Where the prompt leaves less room, that is the limit.
        do_sample, temperature, top_k, top_p, min_p, repetition_penalty: as in `Sampling`. Those left out are what the
            checkpoint's `generation_config.json` says, as in `generate`.
        seed: the same seed draws the same tokens whatever other requests are answered at the time, below 2**32. They are
            those of `generate(seed=[seed])`.
        stop: strings that end the answer and are not part of it.
        ignore_eos: go on to the limit.
        repetition_window: end the answer, with finish reason "repetition", once its last so many tokens repeat a pattern
            of at most a quarter of them; 0 switches this off.

    Raises:
        InputError: a value is out of range.
    """

    max_new_tokens: int = 256
    do_sample: bool | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    seed: int = 0
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    repetition_window: int = 256

    def __post_init__(self):
        stops = self.stop
        if not isinstance(stops, list | tuple) or len(stops) > _MOST_STOPS or not all(isinstance(s, str) and s for s in stops):
            raise InputError(f"stop must be a list of at most {_MOST_STOPS} non-empty strings, got {stops!r:.80}")
        object.__setattr__(self, "stop", tuple(stops))
        _check(self)

    def sampling(self, defaults: Sampling | None) -> Sampling:
        """The sampling settings, those left out taken from the checkpoint's."""
        given = {f.name: value for f in fields(Sampling) if (value := getattr(self, f.name)) is not None}
        base = (defaults or Sampling()).sampling
        return dataclasses.replace(base, **given) if given else base
