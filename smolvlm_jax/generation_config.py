"""`GenerationConfig`: how to continue a prompt. transformers' names and defaults, frozen and hashable."""

import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path

from .errors import ConfigError, InputError

__all__ = ["GenerationConfig"]


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
        path = Path(directory) / "generation_config.json"
        if not path.exists():
            return cls()
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"cannot read {path}: {error}") from error
        known = {f.name for f in dataclasses.fields(cls)}
        data = {k: v for k, v in data.items() if k in known and v is not None}
        if isinstance(data.get("eos_token_id"), list):
            data["eos_token_id"] = tuple(data["eos_token_id"])
        return cls(**data)

    def save_pretrained(self, directory: str | os.PathLike) -> None:
        target = Path(directory)
        target.mkdir(parents=True, exist_ok=True)
        data = {k: v for k, v in dataclasses.asdict(self).items() if v is not None}
        stops = list(self.eos_token_id)
        data["eos_token_id"] = stops[0] if len(stops) == 1 else stops or None
        temporary = target / ".generation_config.json.part"
        temporary.write_text(json.dumps(data, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        temporary.replace(target / "generation_config.json")
