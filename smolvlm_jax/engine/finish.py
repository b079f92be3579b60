"""When an answer ends for reasons the device does not know: stop strings and repetition. Both look at one token after the
other, so where an answer ends does not depend on how many tokens came at once."""

from collections.abc import Callable, Sequence

__all__ = ["Ending", "repeats"]


def repeats(tokens: Sequence[int], window: int) -> bool:
    """Whether the last `window` tokens are a pattern of at most window / 4 tokens, over and over."""
    if window < 4 or len(tokens) < window:
        return False
    tail = tokens[-window:]
    last = tail[-1]
    # The first comparison settles nearly every case; the slices are the proof.
    return any(tail[-1 - p] == last and tail[p:] == tail[:-p] for p in range(1, window // 4 + 1))


class Ending:
    """Watches one answer grow. `decode` turns token ids into text."""

    def __init__(self, stop: Sequence[str], window: int, decode: Callable[[list[int]], str]):
        self._stop, self._window, self._decode = tuple(stop), window, decode
        self._longest = max(map(len, self._stop), default=0)
        self.tokens: list[int] = []
        self.reason: str | None = None

    def push(self, token: int) -> bool:
        """Add a token; True once the answer has ended, after which nothing more may be pushed."""
        self.tokens.append(token)
        if self._stop and self._found(self._tail()) and self._found(self._text(self.tokens)):
            self.reason = "stop"
        elif repeats(self.tokens, self._window):
            self.reason = "repetition"
        return self.reason is not None

    def _found(self, text: str) -> bool:
        return any(s in text for s in self._stop)

    def _text(self, tokens: list[int]) -> str:
        # The blank that separates an answer from "Assistant:" is no part of it.
        return self._decode(tokens).lstrip()

    def _tail(self) -> str:
        # A token is at least one byte, hence a stop string of n characters takes at most 4 n of them, the tail's first one,
        # which may begin in the middle of a character, aside.
        return self._decode(self.tokens[-(4 * self._longest + 4) :])

    def text(self, stop_tokens: frozenset[int] = frozenset()) -> str:
        """The answer so far, without a stop token at its end, or the stop string and what came with it in one token."""
        ended = self.tokens[-1:] and self.tokens[-1] in stop_tokens
        text = self._text(self.tokens[:-1] if ended else self.tokens)
        cuts = [at for s in self._stop if (at := text.find(s)) >= 0]
        return text[: min(cuts)] if cuts else text
