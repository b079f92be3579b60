"""What goes into the engine and what comes out: `Request`, `Prepared`, `Result`. No jax in here."""

import hashlib
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..errors import InputError

__all__ = ["Prepared", "Request", "Result", "SamplingParams", "prepare"]


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


@dataclass(frozen=True)
class Prepared:
    """A prompt as arrays. input_ids int32 (t,); tiles uint8 (n, T, T, 3), n may be 0; digests: one per tile, the hash of
    its pixels, by which identical tiles are encoded once."""

    input_ids: np.ndarray
    tiles: np.ndarray
    digests: tuple[bytes, ...]


@dataclass(frozen=True)
class Request:
    """One prompt: either chat `messages`, or what `prepare` made of them."""

    id: Any
    messages: list[dict[str, Any]] | None = None
    prepared: Prepared | None = None
    params: SamplingParams = field(default_factory=SamplingParams)

    def __post_init__(self):
        if (self.messages is None) == (self.prepared is None):
            raise InputError(f"request {self.id!r} needs exactly one of messages and prepared")


@dataclass(frozen=True)
class Result:
    """One answer.

    text: None where there is an error. finish_reason: "stop", "length", "repetition" or "error". token_ids: the new tokens,
    a stop token that ended them included. tiles: of the prompt's pictures. seconds: from admission to the last token.
    """

    id: Any
    text: str | None
    error: str | None
    finish_reason: str
    prompt_tokens: int
    new_tokens: int
    tiles: int
    token_ids: tuple[int, ...] = ()
    seconds: float = 0.0


def tile_digests(tiles: np.ndarray) -> tuple[bytes, ...]:
    """A hash of each tile's pixels, uint8 (n, T, T, 3)."""
    return tuple(hashlib.blake2b(np.ascontiguousarray(tile), digest_size=16).digest() for tile in tiles)


def prepare(processor, messages: list[dict[str, Any]], **kwargs) -> Prepared:
    """Messages, ending with a user's turn, to arrays. Keywords go to `apply_chat_template`.

    Words that look like special tokens are read as plain characters, since whoever wrote a dataset is not who runs the job;
    pass special_tokens_in_text="allow" or "error" to change that. Raises InputError and its kinds.
    """
    kwargs = {"special_tokens_in_text": "escape", "add_generation_prompt": True} | kwargs
    batch = processor.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_tensors="np", pixel_format="uint8", **kwargs
    )
    ids = np.asarray(batch["input_ids"], np.int32)[0]
    tiles = batch.get("pixel_values")
    if tiles is None:
        return Prepared(ids, np.zeros((0, 0, 0, 3), np.uint8), ())
    tiles = np.asarray(tiles)[: int(batch["num_tiles"])]
    return Prepared(ids, tiles, tile_digests(tiles))
