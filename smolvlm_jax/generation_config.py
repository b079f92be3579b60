"""How a prompt is continued: `Sampling`, `GenerationConfig` for `generate`, `SamplingParams` for requests to the engine."""

import dataclasses
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from numbers import Real
from pathlib import Path
from typing import Any

from .errors import ConfigError, InputError
from .generation_habits import ELSEWHERE, INSTEAD, OF_A_CALL, OTHERS, refuses_by_name
from .generation_rules import MOST_STOPS, SETTING_RULES, check
from .habits import SaysWhatToType, asks_for_something, named_arguments, no_attribute, unasked, unchanging, unknown_argument
from .io import read_json, to_json, write_json
from .locate import find_directory

__all__ = ["DRAWING", "GenerationConfig", "Sampling", "SamplingParams"]

_log = logging.getLogger(__name__)


# Settings of a draw, without effect in greedy decoding.
DRAWING = ("temperature", "top_k", "top_p", "min_p")
# What None stands for: off.
_OFF = {
    "do_sample": False, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0,
    "min_length": 0, "min_new_tokens": 0, "num_return_sequences": 1, "bad_words_ids": (),
    "return_dict_in_generate": False, "output_scores": False, "output_logits": False,
}  # fmt: skip


@named_arguments
@dataclass(frozen=True, kw_only=True)
class Sampling(metaclass=SaysWhatToType):
    """How tokens are drawn, with the names and defaults of transformers. None for a setting switches it off.

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

    _instead = INSTEAD

    def __post_init__(self):
        for field in fields(self):
            if getattr(self, field.name) is None and field.name in _OFF:
                object.__setattr__(self, field.name, _OFF[field.name])
        check(self)

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
        max_new_tokens: the limit on new tokens. Where the prompt leaves less room, that is the limit. None: what `max_length`
            leaves, or 20.
        max_length: the limit on prompt, padding included, and answer together, where there is no max_new_tokens.
        min_new_tokens: no stop token is drawn before so many others.
        min_length: the same, with the prompt and its padding counted.
        num_return_sequences: answers to each prompt; they are drawn, with do_sample.
        bad_words_ids: sequences of token ids that are not written.
        eos_token_id: one id, several, or None for no stop token; stored as a tuple.
        pad_token_id: what rows that have ended are filled with.
        return_dict_in_generate: `generate` returns a GenerateOutput.
        output_scores: with the scores that each token was chosen by.
        output_logits: with the model's logits for each token.
        logprobs: `generate` returns a GenerateOutput with the log-probability of each new token by the model's own
            distribution, and of so many most probable tokens in its place; 0: of the new token alone. None: none.
    """

    max_new_tokens: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None
    max_length: int | None = None
    min_new_tokens: int = 0
    min_length: int = 0
    num_return_sequences: int = 1
    bad_words_ids: tuple[tuple[int, ...], ...] = ()
    return_dict_in_generate: bool = False
    output_scores: bool = False
    output_logits: bool = False
    logprobs: int | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.max_new_tokens is None and self.max_length is None:
            object.__setattr__(self, "max_new_tokens", 20)
        object.__setattr__(self, "eos_token_id", self.stop_tokens)

    def __getattr__(self, name: str) -> Any:
        # settings of transformers that ask for nothing here are None
        if name in OTHERS or name in OF_A_CALL:
            return None
        raise no_attribute(self, name, self._instead)

    @classmethod
    def from_model_config(cls, model_config: Any) -> "GenerationConfig":
        """The settings that a config.json holds, of the whole model or else of its decoder, as old checkpoints have them.

        Args:
            model_config: a SmolVLMConfig, or a mapping such as its `to_dict` gives.

        Returns:
            The config.

        Raises:
            InputError: it is neither.
            ConfigError: a value in it is out of range.
        """
        data = model_config.to_dict() if hasattr(model_config, "to_dict") else model_config
        if not isinstance(data, Mapping):
            raise InputError(f"model_config is a {type(model_config).__name__}; it needs a SmolVLMConfig")
        text = data.get("text_config")
        said = [part for part in (text, data) if isinstance(part, Mapping)]
        whole = {name: value for part in said for name, value in part.items() if value is not None}
        return cls._from_mapping(whole, "model_config")

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any]) -> "GenerationConfig":
        """`of` under transformers' name.

        Args:
            config_dict: names and values of settings.

        Returns:
            The config.

        Raises:
            InputError: it is no mapping.
            ConfigError: a value in it is out of range.
        """
        return cls.of(config_dict)

    def for_prompt(self, length: int) -> "GenerationConfig":
        """These settings with `max_new_tokens` and `min_new_tokens` for a batch of prompts.

        Args:
            length: columns of the prompts.

        Returns:
            The config, without max_length and min_length.

        Raises:
            InputError: max_length leaves no room for an answer.
        """
        limit = self.max_new_tokens
        if limit is None:
            limit = (self.max_length or 0) - length
            if limit < 1:
                raise InputError(f"a prompt of {length} tokens leaves none of max_length={self.max_length} for an answer")
        least = max(self.min_new_tokens, self.min_length - length)
        return dataclasses.replace(self, max_new_tokens=limit, min_new_tokens=least, min_length=0, max_length=None)

    def of_a_call(self) -> dict[str, Any]:
        """What a checkpoint asks for and `generate` does, but no request to the engine: limits and the number of answers.

        Returns:
            Names and values of those that are set.
        """
        names = ("max_new_tokens", "max_length", "num_return_sequences")
        default = GenerationConfig()
        asked = {name: getattr(self, name) for name in names}
        return {name: value for name, value in asked.items() if value is not None and value != getattr(default, name)}

    @property
    def bad_words(self) -> tuple[tuple[int, ...], ...]:
        """`bad_words_ids` without stop tokens alone, which are not forbidden, as in transformers."""
        return tuple(word for word in self.bad_words_ids if len(word) > 1 or word[0] not in self.stop_tokens)

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
        """A copy with other values.

        Args:
            **changes: fields and their new values; arguments of transformers with values that ask for nothing.

        Returns:
            The copy.

        Raises:
            InputError: a name that does not exist, a value out of range, or both max_new_tokens and max_length.
        """
        given = unasked("generate", changes, {**OTHERS, **OF_A_CALL, **ELSEWHERE}, {field.name for field in fields(self)})
        if given.get("max_length") is not None and given.setdefault("max_new_tokens", None) is not None:
            raise InputError(
                f"max_new_tokens={given['max_new_tokens']!r:.80} and max_length={given['max_length']!r:.80} both limit an "
                "answer, and max_length counts the prompt too: leave one out"
            )
        return dataclasses.replace(self, **given)

    @classmethod
    def of(cls, config: Any) -> "GenerationConfig":
        """A config of ours from one of either kind.

        Args:
            config: one of ours, which is returned as it is, one of transformers, or a mapping of its settings.

        Returns:
            The config.

        Raises:
            InputError: it is none of these.
            ConfigError: a value in it is out of range.
        """
        if isinstance(config, cls):
            return config
        data = config if isinstance(config, Mapping) else config.to_dict() if hasattr(config, "to_dict") else None
        if not isinstance(data, Mapping):
            raise InputError(f"generation_config is a {type(config).__name__}; it needs a GenerationConfig")
        if isinstance(config, Mapping):
            known = {field.name for field in fields(cls)}
            for name in config:
                if name not in known and name not in OTHERS and name not in OF_A_CALL:
                    raise unknown_argument("generation_config", name, known)
        return cls._from_mapping(data, "generation_config")

    @classmethod
    def from_pretrained(cls, source: str | os.PathLike, **kwargs: Any) -> "GenerationConfig":
        """Read `generation_config.json`.

        Args:
            source: what `load` takes: a directory, the name of a bundled checkpoint, or a Hub id.
            **kwargs: settings that override the file; also revision, subfolder, cache_dir, force_download, local_files_only and
                token.

        Returns:
            What the file says; an absent file gives the defaults, and so do null and what has no effect, such as the
            temperature of greedy decoding. A log line names settings that are not used though they look as if they should be.

        Raises:
            ConfigError: there is no such directory, the file cannot be read, or a value that is used is out of range.
            InputError: a keyword that is no setting.
        """
        known = frozenset({field.name for field in fields(cls)} | {*OTHERS, *OF_A_CALL} | {"config_file_name"})
        path, given = find_directory("GenerationConfig.from_pretrained", source, kwargs, known)
        name = given.pop("config_file_name", None) or "generation_config.json"
        path = path / name if path.is_dir() else path
        config = cls._from_mapping(read_json(path, error=ConfigError, missing_ok=True), str(path))
        return config.replace(**given) if given else config

    @classmethod
    def _from_mapping(cls, data: Mapping[str, Any], path: str) -> "GenerationConfig":
        """The settings of a file, called `path` in messages."""
        given = {field.name: data[field.name] for field in fields(cls) if data.get(field.name) is not None}
        unused = [key for key, neutral in OTHERS.items() if asks_for_something(data.get(key), neutral)]
        if given.get("top_k") == -1:  # as other libraries write "off"
            given["top_k"] = 0
        if given.get("max_length") == 20:  # the default of transformers, which means 20 new tokens
            del given["max_length"]
        if not given.get("do_sample"):
            for name in (name for name in DRAWING if name in given and not SETTING_RULES[name][0](given[name])):
                if not isinstance(given[name], Real) or isinstance(given[name], bool):
                    continue  # no number at all is a mistake
                if given.pop(name) != 0:
                    unused.append(name)
            if given.get("num_return_sequences", 1) != 1:
                unused.append("num_return_sequences")
                del given["num_return_sequences"]
        if unused:
            _log.warning("%s: without effect here: %s", path, ", ".join(f"{key}={data[key]!r:.80}" for key in sorted(unused)))
        try:
            return cls(**given)
        except InputError as error:
            raise ConfigError(f"{path}: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        """The contents of generation_config.json.

        Returns:
            What is set, a single stop token as a number.
        """
        data = {k: v for k, v in dataclasses.asdict(self).items() if v is not None and v != ()}
        stops = list(self.stop_tokens)
        return {**data, "eos_token_id": stops[0] if len(stops) == 1 else stops or None}

    def said(self) -> dict[str, Any]:
        """`to_dict` without what is the default.

        Returns:
            Names and values.
        """
        default = GenerationConfig().to_dict()
        return {name: value for name, value in self.to_dict().items() if value is not None and value != default.get(name)}

    def to_json_string(self) -> str:
        """`to_dict` as indented JSON text.

        Returns:
            The text.
        """
        return to_json(self.to_dict(), indent=2, sort_keys=True).decode()

    def to_json_file(self, json_file_path: str | os.PathLike) -> None:
        """Write `to_json_string` to a file.

        Args:
            json_file_path: the file.
        """
        write_json(json_file_path, self.to_dict(), sort_keys=True)

    def save_pretrained(self, save_directory: str | os.PathLike) -> None:
        """Write `generation_config.json` into a directory.

        Args:
            save_directory: where to; it is created if need be.
        """
        self.to_json_file(Path(save_directory) / "generation_config.json")


refuses_by_name(GenerationConfig)
for _frozen in (Sampling, GenerationConfig):
    unchanging(_frozen, "pass {name}=… to generate, or config.replace({name}=…) gives a changed copy")


@named_arguments
@dataclass(frozen=True)
class SamplingParams:
    """How one request to the engine is continued. The checkpoint's min_new_tokens, min_length and bad_words_ids hold for all.

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
        logprobs: the result has the log-probability of each new token, and of so many most probable tokens in its place; 0: of
            the new token alone. As in `GenerationConfig`. None: none.

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
    logprobs: int | None = None

    def __post_init__(self):
        stops = self.stop
        if not isinstance(stops, list | tuple) or len(stops) > MOST_STOPS or not all(isinstance(s, str) and s for s in stops):
            raise InputError(f"stop must be a list of at most {MOST_STOPS} non-empty strings, got {stops!r:.80}")
        object.__setattr__(self, "stop", tuple(stops))
        check(self)

    def without_effect(self, defaults: Sampling | None) -> list[str]:
        """What is given and changes nothing, since the most likely token is taken.

        Args:
            defaults: as in `sampling`.

        Returns:
            Names of settings, in order.
        """
        if self.sampling(defaults).do_sample:
            return []
        return [name for name in DRAWING if getattr(self, name) is not None] + (["seed"] if self.seed else [])

    def sampling(self, defaults: Sampling | None) -> Sampling:
        """The sampling settings with those that are left out.

        Args:
            defaults: the checkpoint's; None for those of `Sampling`.

        Returns:
            All of them.
        """
        given = {f.name: value for f in fields(Sampling) if (value := getattr(self, f.name)) is not None}
        base = (defaults or Sampling()).sampling
        return dataclasses.replace(base, **given) if given else base
