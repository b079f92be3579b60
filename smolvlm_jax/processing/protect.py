"""Keeping a user's text apart from the tokens that steer the model.

A text that says `<image>` must not become the place of a picture, nor `<end_of_utterance>` the end of a turn. Such words
are refused, or escaped: broken by a mark before the template is rendered, and read as plain characters afterwards. Which words
they are is decided in steering.py; other added tokens of a tokenizer are ordinary words.
"""

import functools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from ..errors import InputError, PromptError
from ..habits import require_agreement
from .chat import Message
from .prompts import GRID_PATTERN
from .tokenizer import SmolVLMTokenizer

MODES = ("error", "escape", "allow")
# Characters that no text has: a mark is the first of them that does not occur in the conversation at hand. Some tokenizers drop
# the private ones, so rare letters follow.
_MARKS = (*range(0xE000, 0xF8FF), *range(0x2A000, 0x2A600))
_ADVICE = (
    "pictures are named beside the text (--image FILE); special_tokens_in_text='escape' has it read as plain characters, "
    "'allow' lets it steer the model"
)


def mode_of(special_tokens_in_text: str | None, sanitize_control_tokens: bool) -> str:
    """The mode that a call asks for under our name or transformers'. Raises InputError where they differ."""
    asked = {"special_tokens_in_text": special_tokens_in_text, "sanitize_control_tokens": sanitize_control_tokens or None}
    require_agreement("apply_chat_template", asked, lambda value: value if isinstance(value, str) else "escape")
    return special_tokens_in_text or ("escape" if sanitize_control_tokens else "error")


class Guarded(NamedTuple):
    """What is fit to be rendered; `mark` is None where no text had to be touched."""

    conversations: list[list[Message]]
    variables: dict[str, Any]
    mark: str | None


class Guard:
    """Finds the words that steer one model in the texts of a user, and refuses or marks them.

    A tokenizer may look for its words in a text that it has normalised: then a wide twin of <image> is <image> to it, and so it
    is here. A template may change the case of what it writes, so words are marked in any case; whether one steers is seen in
    the prompt.

    Args:
        words: see steering.steering_words. Markers of rows and columns of tiles are added.
        tokenizer: that will read the prompts.
    """

    def __init__(self, words: Iterable[str], tokenizer: SmolVLMTokenizer | None = None):
        self.words = _by_length(words)
        self._pattern, self._any_case = _pattern(self.words), _pattern(self.words, re.IGNORECASE)
        forms: list[str] = []
        self._normalized: Callable[[str], str] | None = None
        if tokenizer is not None and not tokenizer.normalized_words.isdisjoint(self.words):
            self._normalized = tokenizer.normalized
            forms = _by_length(map(tokenizer.normalized, tokenizer.normalized_words.intersection(self.words)))
        self._forms = _pattern(forms)
        # Every proper beginning and end of a word: a text that ends or starts with one might complete a word.
        known = [word.lower() for word in (*self.words, *forms)]
        self._longest = max(map(len, known), default=0)
        self._heads = tuple({word[:n] for word in known for n in range(1, len(word))})
        self._tails = tuple({word[n:] for word in known for n in range(1, len(word))})

    def find(self, text: str) -> str | None:
        """The first steering word in `text`."""
        found = self._pattern.search(text) or self._found_normalized(text)
        return found and found.group()

    def _found_normalized(self, text: str) -> re.Match[str] | None:
        return None if self._normalized is None else self._forms.search(self._normalized(text))

    def _count(self, prompt: str) -> int:
        count = sum(1 for _ in self._pattern.finditer(prompt))
        return count if self._normalized is None else count + sum(1 for _ in self._forms.finditer(self._normalized(prompt)))

    def _edges(self, text: str) -> tuple[bool, bool]:
        """Whether the beginning and the end of a text might complete a word."""
        texts = [text] if self._normalized is None else [text, self._normalized(text)]
        begins = any(text[: self._longest].lower().startswith(self._tails) for text in texts)
        return begins, any(text[-self._longest :].lower().endswith(self._heads) for text in texts)

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
        mark = self._unused((conversations, variables))
        marked = [[self._mark_message(message, mark) for message in messages] for messages in conversations]
        return Guarded(marked, self._mark(variables, mark), mark)

    def unmark(self, prompts: list[str], mark: str) -> list[str]:
        """Rendered prompts without their marks. Raises PromptError where only a mark kept a steering word apart."""
        bare = [prompt.replace(mark, "") for prompt in prompts]
        for prompt, without in zip(prompts, bare, strict=True):
            if self._count(prompt) != self._count(without):
                raise PromptError("a text and what stands next to it in the prompt add up to a special token; " + _ADVICE)
        return bare

    def _check(self, where: str, message: Message, mode: str) -> bool:
        """Whether something in the message needs a mark. Raises PromptError for what is refused."""
        role = message.get("role")
        if isinstance(role, str) and (self._any_case.search(role) or self.find(role)):
            raise PromptError(f"{where}: the role {role!r:.80} holds a special token")
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
            doubtful = doubtful or word is not None or any(self._edges(text)) or self._any_case.search(text) is not None
        for key in _keys(value):
            if self.find(key):
                raise PromptError(f"{where}: the key {key!r:.80} holds a special token")
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
            begins, ends = self._edges(value)
            if self._found_normalized(value):  # which of its characters make the word is not known
                value = mark.join(value)
            else:
                value = self._any_case.sub(lambda m: m.group()[0] + mark + m.group()[1:], value)
            return mark * begins + value + mark * ends
        if isinstance(value, Mapping):
            return {key: self._mark(item, mark) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self._mark(item, mark) for item in value]
        return value

    def _unused(self, value: Any) -> str:
        """A character that occurs in none of the strings of `value`, and that the tokenizer keeps."""
        used: set[str] = set().union(*_strings(value))
        for mark in map(chr, _MARKS):
            if mark not in used and (self._normalized is None or mark in self._normalized(f"x{mark}x")):
                return mark
        raise PromptError("the conversation uses every character that no text has, so none is left to escape with")


guard_for = functools.lru_cache(maxsize=8)(Guard)


def _by_length(words: Iterable[str]) -> list[str]:
    return sorted({word for word in words if word}, key=len, reverse=True)


def _pattern(words: Iterable[str], flags: int = 0) -> re.Pattern[str]:
    return re.compile("|".join([*map(re.escape, words), GRID_PATTERN]), flags)


def _strings(value: Any) -> Iterator[str]:
    """All strings in nested mappings and lists, keys not included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (Mapping, list, tuple)):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _strings(item)


def _keys(value: Any) -> Iterator[str]:
    """The keys of nested mappings."""
    if isinstance(value, Mapping):
        yield from (str(key) for key in value)
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from _keys(item)


def unused_characters(value: Any, count: int) -> list[str]:
    """Characters that no text has, and that occur in none of the strings of `value`. Raises PromptError if there are fewer."""
    used: set[str] = set().union(*_strings(value))
    found = [mark for mark in map(chr, _MARKS) if mark not in used][:count]
    if len(found) < count:
        raise PromptError("the conversation uses every character that no text has, so none is left to mark answers with")
    return found


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
