"""Keeping what a user wrote apart from what steers the model.

A text that says `<image>` must not become the place of a picture, nor `<end_of_utterance>` the end of a turn. Such words
are refused, or escaped: broken by a mark before the template is rendered, and read as plain characters afterwards. Which words
they are is decided in steering.py; other added tokens of a tokenizer are words like any.
"""

import functools
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from ..errors import InputError, PromptError
from .chat import Message
from .prompts import GRID_PATTERN
from .tokenizer import SmolVLMTokenizer

MODES = ("error", "escape", "allow")
# Characters that no text has: a mark is the first of them that does not occur in the conversation at hand.
_PRIVATE_USE = range(0xE000, 0xF8FF)
_ADVICE = (
    "pass special_tokens_in_text='escape' to have it read as plain characters, or 'allow' if it is meant to steer the model"
)


class Guarded(NamedTuple):
    """What is fit to be rendered; `mark` is None where no text had to be touched."""

    conversations: list[list[Message]]
    variables: dict[str, Any]
    mark: str | None


class Guard:
    """Finds the words that steer one model in the texts of a user, and refuses or marks them.

    Args:
        words: see steering.steering_words. Markers of rows and columns of tiles are added.
    """

    def __init__(self, words: Iterable[str]):
        self.words = sorted({word for word in words if word}, key=len, reverse=True)
        self._pattern = re.compile("|".join([*map(re.escape, self.words), GRID_PATTERN]))
        # Every proper beginning and end of a word: a text that ends or starts with one might complete a word.
        self._heads = tuple({word[:n] for word in self.words for n in range(1, len(word))})
        self._tails = tuple({word[n:] for word in self.words for n in range(1, len(word))})

    def find(self, text: str) -> str | None:
        """The first steering word in `text`."""
        found = self._pattern.search(text)
        return found and found.group()

    def apply(self, conversations: list[list[Message]], variables: dict[str, Any], mode: str) -> Guarded:
        """Refuse or mark the steering words of conversations and of the variables of a template.

        Args:
            conversations: normalised messages.
            variables: what else the template can see.
            mode: "error" refuses steering words, "escape" marks them, "allow" does nothing. In a role they are refused
                in both of the first two.

        Raises:
            PromptError: a steering word is refused; the message says where it is.
            InputError: there is no such mode.
        """
        if mode not in MODES:
            raise InputError(f"special_tokens_in_text is {mode!r}; it is one of {', '.join(MODES)}")
        if mode == "allow":
            return Guarded(conversations, variables, None)
        doubtful = False
        for index, messages in enumerate(conversations):
            for place, message in enumerate(messages):
                doubtful |= self._check(f"conversation {index}, message {place}", message, mode)
        for name, value in variables.items():
            doubtful |= self._check_strings(f"the template's variable {name!r}", value, mode)
        if not doubtful:
            return Guarded(conversations, variables, None)
        mark = _unused((conversations, variables))
        marked = [[self._mark_message(message, mark) for message in messages] for messages in conversations]
        return Guarded(marked, self._mark(variables, mark), mark)

    def unmark(self, prompts: list[str], mark: str) -> list[str]:
        """Rendered prompts without their marks. Raises PromptError where only a mark kept a steering word apart."""
        bare = [prompt.replace(mark, "") for prompt in prompts]
        for prompt, without in zip(prompts, bare, strict=True):
            if len(self._pattern.findall(prompt)) != len(self._pattern.findall(without)):
                raise PromptError("a text and what stands next to it in the prompt add up to a special token; " + _ADVICE)
        return bare

    def _check(self, where: str, message: Message, mode: str) -> bool:
        """Whether something in the message needs a mark. Raises PromptError for what is refused."""
        role = message.get("role")
        if isinstance(role, str) and self.find(role):
            raise PromptError(f"{where}: the role {role!r} holds the special token {self.find(role)!r}")
        texts = [item["text"] for item in message.get("content") or [] if isinstance(item.get("text"), str)]
        # Joined as well: two harmless texts side by side may make a word.
        doubtful = self._check_strings(where, [*texts, "".join(texts)] if len(texts) > 1 else texts, mode)
        rest = {key: value for key, value in message.items() if key not in ("role", "content")}
        return doubtful | self._check_strings(where, rest, mode)

    def _check_strings(self, where: str, value: Any, mode: str) -> bool:
        doubtful = False
        for text in _strings(value):  # all of them: one that is doubtful does not excuse the next from being refused
            word = self.find(text)
            if word is not None and mode == "error":
                raise PromptError(f"{where}: the text holds the special token {word!r}; " + _ADVICE)
            doubtful |= word is not None or text.endswith(self._heads) or text.startswith(self._tails)
        return doubtful

    def _mark_message(self, message: Message, mark: str) -> Message:
        out = {key: value if key == "role" else self._mark(value, mark) for key, value in message.items()}
        if isinstance(message.get("content"), list):
            # Of an item only the text is what the user wrote; its other entries are kinds and places of media.
            out["content"] = [
                {**item, "text": self._mark(item["text"], mark)} if isinstance(item.get("text"), str) else item
                for item in message["content"]
            ]
        return out

    def _mark(self, value: Any, mark: str) -> Any:
        if isinstance(value, str):
            value = self._pattern.sub(lambda m: m.group()[0] + mark + m.group()[1:], value)
            start = mark if value.startswith(self._tails) else ""
            return start + value + (mark if value.endswith(self._heads) else "")
        if isinstance(value, Mapping):
            return {key: self._mark(item, mark) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self._mark(item, mark) for item in value]
        return value


guard_for = functools.lru_cache(maxsize=8)(Guard)


def _strings(value: Any) -> Iterator[str]:
    """All strings in nested mappings and lists, keys not included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (Mapping, list, tuple)):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _strings(item)


def _unused(value: Any) -> str:
    """A private-use character that occurs in none of the strings of `value`."""
    used: set[str] = set().union(*_strings(value))
    for code in _PRIVATE_USE:
        if chr(code) not in used:
            return chr(code)
    raise PromptError("the conversation uses every private-use character there is, so none is left to escape with")


class Escaped(NamedTuple):
    """How escaped words are kept apart in rendered prompts.

    Attributes:
        mark: the character that breaks them.
        words: the words that steer.
    """

    mark: str
    words: frozenset[str]


def encode_prompt(tokenizer: SmolVLMTokenizer, text: str, *, escaped: Escaped | None, add_special_tokens: bool) -> list[int]:
    """The ids of a rendered prompt, which may have marks in it.

    A prompt without marks is encoded as usual. One with marks is encoded with them first, which finds the words that the
    template wrote; the text between two of them is read, without its marks, by a tokenizer that has no such tokens. So the
    ids are what the characters would get if the escaped words were no tokens, and other added tokens are found as ever.

    Raises:
        PromptError: the vocabulary has no other way to read the word.
    """
    if escaped is None or escaped.mark not in text:
        return tokenizer.encode(text, add_special_tokens)
    mark, words = escaped
    steering = {tokenizer.added_tokens[word] for word in words if word in tokenizer.added_tokens}

    def plain(piece: str) -> list[int]:
        found = tokenizer.encode_without(words, piece.replace(mark, ""))
        if not steering.isdisjoint(found):
            raise PromptError("this tokenizer reads a special token even out of plain text, so the text cannot be escaped")
        return found

    marked = tokenizer.encoding(text, add_special_tokens)
    # What the tokenizer puts around every text is marked in this mask; tokens found in the text are not.
    around = marked.special_tokens_mask
    first = next((n for n, flag in enumerate(around) if not flag), len(around))
    last = next((n for n in range(len(around), first, -1) if not around[n - 1]), first)
    ids, at = marked.ids[:first], 0
    for id, (start, stop) in zip(marked.ids[first:last], marked.offsets[first:last], strict=True):
        if id in steering and mark not in text[start:stop]:
            start, stop = tokenizer.with_spaces(id, text, start, stop)
            ids += [*plain(text[at:start]), id]
            at = stop
    return [*ids, *plain(text[at:]), *marked.ids[last:]]
