"""What goes into the engine and what comes out: `Request`, `Prepared`, `Result`, `Score`. No jax in here."""

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ..errors import InputError
from ..generation_config import SamplingParams
from ..habits import named_arguments
from ..processing.bounds import check_length

__all__ = ["Prepared", "Request", "Result", "Score", "continuation_ids", "prepare"]


@dataclass(frozen=True)
class Prepared:
    """A prompt as arrays.

    Attributes:
        input_ids: int32 (t,).
        tiles: uint8 (n, T, T, 3); n may be 0.
        digests: for each tile the hash of its pixels, by which identical tiles are encoded once.
    """

    input_ids: np.ndarray
    tiles: np.ndarray
    digests: tuple[bytes, ...]

    @classmethod
    def of(cls, input_ids: np.ndarray, tiles: np.ndarray | None = None) -> "Prepared":
        """A prompt of arrays, with the digests of its tiles.

        Args:
            input_ids: int32 (t,).
            tiles: uint8 (n, T, T, 3). Default: none.

        Returns:
            The prompt.
        """
        if tiles is None:
            return cls(input_ids, np.zeros((0, 0, 0, 3), np.uint8), ())
        return cls(input_ids, tiles, tile_digests(tiles))

    @property
    def nbytes(self) -> int:
        """Bytes of its arrays."""
        return self.input_ids.nbytes + self.tiles.nbytes

    def without_pixels(self) -> "Prepared":
        """The same, with tiles of the same shape that take no memory.

        Returns:
            The copy.
        """
        return replace(self, tiles=np.broadcast_to(np.zeros((), self.tiles.dtype), self.tiles.shape))


@named_arguments
@dataclass(frozen=True)
class Request:
    """One prompt. Exactly one of `messages`, `prepared` and `error` is given.

    Attributes:
        id: comes back in the result.
        messages: a conversation in chat format, ending with a user's turn.
        prepared: what `prepare` made of such messages.
        params: how the prompt is continued.
        error: why there is no prompt. Such a request comes back, in its turn, as a result with this error, so that
            the results of a job have a row for every record.
        unread: names of columns of the record that are not used, for the remarks of the job.
        notes: what the job counts of the record, for its remarks.
        own: columns of the record that its row has too, as JSON.
        continuation: for `Engine.loglikelihood`, the text after the prompt, as in `continuation_ids`, or token ids.
    """

    id: Any
    messages: list[dict[str, Any]] | None = None
    prepared: Prepared | None = None
    params: SamplingParams = field(default_factory=SamplingParams)
    error: str | None = None
    unread: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    own: dict[str, Any] = field(default_factory=dict)
    continuation: str | Sequence[int] | None = None

    def __post_init__(self):
        if sum(given is not None for given in (self.messages, self.prepared, self.error)) != 1:
            raise InputError(f"request {self.id!r} needs exactly one of messages, prepared and error")


@dataclass(frozen=True)
class Result:
    """One answer.

    Attributes:
        id: of the request.
        text: None where there is an error.
        error: why there is no answer.
        finish_reason: "stop", "length", "repetition" or "error".
        prompt_tokens: of the prompt, pictures included.
        new_tokens: of the answer.
        tiles: of the prompt's pictures.
        token_ids: the new tokens, a stop token that ended them included.
        seconds: from admission to the last token.
        logprobs: of `token_ids`, by the model's own distribution (see `smolvlm_jax.logprobs`); None if not asked for.
        top_logprobs: for each of `token_ids` the most probable tokens in its place, best first, as (token id, log-probability);
            None if no alternatives were asked for.
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
    logprobs: tuple[float, ...] | None = None
    top_logprobs: tuple[tuple[tuple[int, float], ...], ...] | None = None


@dataclass(frozen=True)
class Score:
    """How probable a continuation is.

    Attributes:
        id: of the request.
        loglikelihood: the sum of `logprobs`; None where there is an error.
        is_greedy: whether greedy decoding would write just these tokens; None where there is an error.
        error: why there is no score.
        prompt_tokens: of the prompt, pictures included.
        tiles: of the prompt's pictures.
        token_ids: of the continuation.
        logprobs: of each of them, after the prompt and those before it, by the model's own distribution.
    """

    id: Any
    loglikelihood: float | None
    is_greedy: bool | None
    error: str | None
    prompt_tokens: int
    tiles: int
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()


def tile_digests(tiles: np.ndarray) -> tuple[bytes, ...]:
    """A hash of each tile's pixels, uint8 (n, T, T, 3)."""
    return tuple(hashlib.blake2b(np.ascontiguousarray(tile), digest_size=16).digest() for tile in tiles)


def prepare(processor, messages: list[dict[str, Any]], *, longest: int | None = None, **kwargs) -> Prepared:
    """Messages to arrays.

    Words that look like special tokens are read as plain characters, since the authors of a data set are not the users who
    run the job; pass special_tokens_in_text="allow" or "error" to change that.

    Args:
        processor: of the checkpoint.
        messages: chat format, ending with a user's turn, or with the beginning of the assistant's, after which the answer goes
            on.
        longest: tokens of a prompt, at most: one that is longer is refused before it is made, where that can be told.
        **kwargs: go to `SmolVLMProcessor.encode_chat`.

    Returns:
        Ids and tiles.

    Raises:
        InputError: and its subclasses, for messages, pictures or videos that cannot be read.
    """
    if longest is not None:
        check_length(processor, messages, longest)
    begun = messages[-1].get("role") == "assistant" if messages else False
    turn = {"add_generation_prompt": not begun, "continue_final_message": begun}
    batch = processor.encode_chat(messages, **{"special_tokens_in_text": "escape", **turn, **kwargs})
    if len(batch["input_ids"]) != 1:
        raise InputError(f"{len(batch['input_ids'])} conversations for one request; make a request of each")
    ids = np.asarray(batch["input_ids"], np.int32)[0]
    tiles = batch.get("pixel_values")
    return Prepared.of(ids, None if tiles is None else np.asarray(tiles)[: int(batch["num_tiles"])])


def continuation_ids(processor, text: str) -> list[int]:
    """The tokens of an answer that is given.

    Args:
        processor: of the checkpoint.
        text: as `Result.text` has answers: what the chat template writes between "Assistant:" and an answer, a blank, is put
            before it unless it begins with white space. Words that are special tokens are such tokens; the token that ends a
            turn is not added.
    """
    between = _before_answers(processor)
    return processor.tokenizer.encode(text if text[:1].isspace() else between + text, add_special_tokens=False)


@functools.lru_cache(maxsize=8)
def _before_answers(processor) -> str:
    """What the chat template writes between the end of a prompt and the text of an answer."""
    turn = lambda role, text: {"role": role, "content": [{"type": "text", "text": text}]}
    asked, answer = turn("user", "x"), turn("assistant", "y")
    prompt = processor.apply_chat_template([asked], add_generation_prompt=True)
    whole = processor.apply_chat_template([asked, answer], continue_final_message=True)
    return whole[len(prompt) : -1] if whole.startswith(prompt) and whole.endswith("y") else ""
