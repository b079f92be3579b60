"""When an answer ends. Tokens are looked at one after the other, so that where an answer ends does not depend on how many of
them arrive at once."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from ..generation_config import SamplingParams
from ..logprobs import TokenLogprobs

__all__ = ["Ending", "measured", "repeats"]

# Of a token: its log-probability, and the most probable tokens with theirs.
Measured = tuple[float, tuple[tuple[int, float], ...]]


def measured(logprobs: TokenLogprobs | None, where: Any, count: int, alternatives: int | None) -> list[Measured]:
    """The log-probabilities of a request's new tokens, in Python's numbers.

    Args:
        logprobs: arrays on the host: of a prefill (D, S), of a chunk (b, steps).
        where: of a prefill (lane, segment), of a chunk the row.
        count: how many new tokens the request has there.
        alternatives: how many of the most probable tokens the request asks for in each place; None if it asks for no
            log-probabilities.

    Returns:
        One for each token; nothing where none are asked for.
    """
    if logprobs is None or alternatives is None:
        return []
    row = lambda x: np.atleast_1d(x[where])[:count] if x.ndim == 2 else x[where].reshape(-1, x.shape[-1])[:count, :alternatives]
    chosen = row(logprobs.chosen).tolist()
    if not alternatives or logprobs.top is None:
        return [(value, ()) for value in chosen]
    pairs = zip(row(logprobs.top_tokens).tolist(), row(logprobs.top).tolist(), strict=True)
    return [(value, tuple(zip(*best, strict=True))) for value, best in zip(chosen, pairs, strict=True)]


def repeats(tokens: Sequence[int], window: int) -> bool:
    """Whether the last `window` tokens repeat a pattern of at most window / 4 tokens."""
    if window < 4 or len(tokens) < window:
        return False
    tail = tokens[-window:]
    last = tail[-1]
    # Comparing single tokens first decides nearly every case; comparing the slices makes it certain.
    return any(tail[-1 - p] == last and tail[p:] == tail[:-p] for p in range(1, window // 4 + 1))


class Ending:
    """One answer as it grows.

    Attributes:
        tokens: of the answer so far.
        logprobs: of the tokens, as far as they are asked for.
        reason: why it has ended: "stop", "length" or "repetition"; None while it goes on.
    """

    def __init__(self, params: SamplingParams, stop_tokens: frozenset[int], decode: Callable[[list[int]], str]):
        """Args:
        params: of the request.
        stop_tokens: of the checkpoint.
        decode: token ids to text.
        """
        self._params, self._stop_tokens, self._decode = params, stop_tokens, decode
        self._longest = max(map(len, params.stop), default=0)
        self.tokens: list[int] = []
        self.logprobs: list[Measured] = []
        self.reason: str | None = None

    def push(self, tokens: Iterable[int], logprobs: Sequence[Measured] = ()) -> bool:
        """Add tokens, and their log-probabilities if there are any, up to the one that ends the answer; returns whether it has
        ended."""
        for number, token in enumerate(tokens):
            self.logprobs += logprobs[number : number + 1]
            self.tokens.append(token)
            self.reason = self._reason()
            if self.reason is not None:
                return True
        return False

    def _reason(self) -> str | None:
        params = self._params
        if self.tokens[-1] in self._stop_tokens and not params.ignore_eos:
            return "stop"
        if params.stop and self._found(self._tail()) and self._found(self._text(self.tokens)):
            return "stop"
        if repeats(self.tokens, params.repetition_window):
            return "repetition"
        return "length" if len(self.tokens) == params.max_new_tokens else None

    def _found(self, text: str) -> bool:
        return any(s in text for s in self._params.stop)

    def _text(self, tokens: list[int]) -> str:
        # The blank that separates an answer from "Assistant:" is no part of it.
        return self._decode(tokens).lstrip()

    def _tail(self) -> str:
        # A token is at least one byte, so that a stop string of n characters has at most 4 n tokens. The tail's first
        # character may be cut in the middle, hence a few more.
        return self._decode(self.tokens[-(4 * self._longest + 4) :])

    def text(self) -> str:
        """The answer so far, without a stop token at its end, and without a stop string and what follows it."""
        ended = self.tokens[-1:] and self.tokens[-1] in self._stop_tokens
        text = self._text(self.tokens[:-1] if ended else self.tokens)
        cuts = [at for s in self._params.stop if (at := text.find(s)) >= 0]
        return (text[: min(cuts)] if cuts else text).strip()
