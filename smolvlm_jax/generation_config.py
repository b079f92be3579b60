"""`GenerationConfig`: how to continue a prompt. transformers' names and defaults, frozen and hashable."""

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path

from .errors import ConfigError, InputError
from .io import read_json, write_json

__all__ = ["GenerationConfig", "SamplingParams"]


@dataclass(frozen=True)
class GenerationConfig:
    """Sampling and stopping.

    eos_token_id: one id, several, or None for no stop token. With `do_sample=False` the sampling arguments are ignored,
    except `repetition_penalty`, which applies to greedy decoding too.
    """

    max_new_tokens: int = 20
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 50
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None

    def __post_init__(self):
        stops = self.eos_token_id
        stops = () if stops is None else (stops,) if isinstance(stops, int) else tuple(stops)
        object.__setattr__(self, "eos_token_id", stops)
        for name, ok, wants in (
            ("max_new_tokens", isinstance(self.max_new_tokens, int) and self.max_new_tokens > 0, "a positive integer"),
            ("temperature", self.temperature > 0, "greater than 0 (use do_sample=False for greedy decoding)"),
            ("top_k", self.top_k >= 0, "0 (off) or more"),
            ("top_p", 0 < self.top_p <= 1, "in (0, 1]"),
            ("min_p", 0 <= self.min_p <= 1, "in [0, 1]"),
            ("repetition_penalty", self.repetition_penalty > 0, "greater than 0"),
        ):
            if not ok:
                raise InputError(f"{name} must be {wants}, got {getattr(self, name)!r}")

    @property
    def fill_token_id(self) -> int:
        """What finished rows are filled with: the pad token, else the first stop token, else 0."""
        if self.pad_token_id is not None:
            return self.pad_token_id
        return self.eos_token_id[0] if self.eos_token_id else 0

    def replace(self, **changes) -> "GenerationConfig":
        known = {f.name for f in dataclasses.fields(self)}
        unknown = sorted(set(changes) - known)
        if unknown:
            raise InputError(f"unknown generation arguments {', '.join(unknown)}; known are {', '.join(sorted(known))}")
        return dataclasses.replace(self, **changes)

    @classmethod
    def from_pretrained(cls, directory: str | os.PathLike) -> "GenerationConfig":
        """Read `generation_config.json`; keys that mean nothing here are ignored, an absent file gives the defaults."""
        data = read_json(Path(directory) / "generation_config.json", error=ConfigError, missing_ok=True)
        known = {f.name for f in dataclasses.fields(cls)}
        data = {k: v for k, v in data.items() if k in known and v is not None}
        if isinstance(data.get("eos_token_id"), list):
            data["eos_token_id"] = tuple(data["eos_token_id"])
        return cls(**data)

    def save_pretrained(self, directory: str | os.PathLike) -> None:
        data = {k: v for k, v in dataclasses.asdict(self).items() if v is not None}
        stops = list(self.eos_token_id)
        data["eos_token_id"] = stops[0] if len(stops) == 1 else stops or None
        write_json(Path(directory) / "generation_config.json", data, sort_keys=True)


@dataclass(frozen=True)
class SamplingParams:
    """How one request is continued.

    max_new_tokens: the limit. do_sample, temperature, top_k, top_p, min_p, repetition_penalty: as in `generate`, per
    request. seed: the request's own; the same seed draws the same tokens whatever stands beside it. stop: strings that end
    the answer and are not part of it. ignore_eos: go on to the limit. repetition_window: end the answer, with finish reason
    "repetition", once its last so many tokens repeat a pattern of at most a quarter of them; 0 switches this off.
    """

    max_new_tokens: int = 256
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    repetition_window: int = 256

    def __post_init__(self):
        if isinstance(self.stop, str) or not all(isinstance(s, str) and s for s in self.stop):
            raise InputError(f"stop must be a sequence of non-empty strings, got {self.stop!r}")
        object.__setattr__(self, "stop", tuple(self.stop))
        whole = {"max_new_tokens": 1, "top_k": 0, "seed": 0, "repetition_window": 0}
        for name, least in whole.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise InputError(f"{name} must be a whole number from {least} on, got {value!r}")
        if self.seed >= 2**32:
            raise InputError(f"seed must be below 2**32, got {self.seed}")
        bounds = {
            "temperature": self.temperature > 0,
            "top_p": 0 < self.top_p <= 1,
            "min_p": 0 <= self.min_p <= 1,
            "repetition_penalty": self.repetition_penalty > 0,
        }
        for name, fine in bounds.items():
            if not fine:
                raise InputError(f"{name} is out of range: {getattr(self, name)!r}")

    @property
    def greedy(self) -> bool:
        """Whether the best token is taken as the model has it."""
        return not self.do_sample and self.repetition_penalty == 1
