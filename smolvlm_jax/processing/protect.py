"""Keeping what a user wrote apart from what steers the model.

A text that says `<image>` must not become a slot for a picture, nor `<end_of_utterance>` the end of a turn. Such words
are refused, or escaped: broken by a mark on their way through the template, and read as plain characters afterwards.
"""

import re
from collections.abc import Iterable, Mapping

from ..errors import InputError, PromptError

MODES = ("error", "escape", "allow")
# Characters nobody's text has: a mark is the first of them that does not occur in the conversation at hand.
_PRIVATE_USE = range(0xE000, 0xF8FF)
_GRID_MARKER = r"<row_\d+_col_\d+>"


class Guard:
    """The words that steer one model, and what to do when a text has one. See the module."""

    def __init__(self, words: Iterable[str]):
        self.words = sorted({word for word in words if word}, key=len, reverse=True)
        self._pattern = re.compile("|".join([*map(re.escape, self.words), _GRID_MARKER]))
        # every proper beginning and end of a word: a text that ends or starts with one might complete a word
        heads = {word[:n] for word in self.words for n in range(1, len(word))}
        tails = {word[n:] for word in self.words for n in range(1, len(word))}
        self._heads, self._tails = tuple(heads), tuple(tails)

    def find(self, text: str) -> str | None:
        """The first steering word in `text`."""
        found = self._pattern.search(text)
        return found and found.group()

    def count(self, text: str) -> int:
        return sum(1 for _ in self._pattern.finditer(text))

    def apply(self, conversations: list[list[dict]], variables: dict, mode: str):
        """(conversations, variables, mark) fit to be rendered; mark is None where no text had to be touched.

        mode: "error" refuses steering words, "escape" marks them, "allow" does nothing. Roles are always refused.
        Raises PromptError with the place of the word.
        """
        if mode not in MODES:
            raise InputError(f"special_tokens_in_text is {mode!r}; it is one of {', '.join(MODES)}")
        if mode == "allow":
            return conversations, variables, None
        doubtful = False
        for index, messages in enumerate(conversations):
            for place, message in enumerate(messages):
                doubtful |= self._check(f"conversation {index}, message {place}", message, mode)
        for name, value in variables.items():
            doubtful |= self._check_strings(f"the template's variable {name!r}", value, mode)
        if not doubtful:
            return conversations, variables, None
        mark = _unused((conversations, variables))
        marked = [[self._mark_message(message, mark) for message in messages] for messages in conversations]
        return marked, self._mark(variables, mark), mark

    def settle(self, prompts: list[str], mark: str, mode: str) -> tuple[list[str], str | None]:
        """Rendered prompts: in "error" mode without their marks, once they are seen to have kept nothing apart."""
        if mode != "error":
            return prompts, mark
        bare = [prompt.replace(mark, "") for prompt in prompts]
        for prompt, without in zip(prompts, bare, strict=True):
            if self.count(prompt) != self.count(without):
                raise PromptError("a text and what stands next to it in the prompt add up to a special token; " + _ADVICE)
        return bare, None

    def _check(self, where: str, message: Mapping, mode: str) -> bool:
        """Whether something in the message needs marking. Refuses what is to be refused."""
        role = message.get("role")
        if isinstance(role, str) and self.find(role):
            raise PromptError(f"{where}: the role {role!r} holds the special token {self.find(role)!r}")
        doubtful = False
        texts = [item["text"] for item in message.get("content") or [] if isinstance(item.get("text"), str)]
        # joined as well: two harmless texts side by side may make a word
        for text in (*texts, "".join(texts)) if len(texts) > 1 else texts:
            doubtful |= self._check_strings(where, text, mode)
        rest = {key: value for key, value in message.items() if key not in ("role", "content")}
        return doubtful | self._check_strings(where, rest, mode)

    def _check_strings(self, where: str, value, mode: str) -> bool:
        if isinstance(value, str):
            word = self.find(value)
            if word is not None and mode == "error":
                raise PromptError(f"{where}: the text holds the special token {word!r}; " + _ADVICE)
            return word is not None or value.endswith(self._heads) or value.startswith(self._tails)
        if isinstance(value, Mapping):
            value = list(value.values())
        if not isinstance(value, (list, tuple)):
            return False
        doubtful = False
        for item in value:  # all of them: one that is doubtful does not excuse the next from being refused
            doubtful |= self._check_strings(where, item, mode)
        return doubtful

    def _mark_message(self, message: dict, mark: str) -> dict:
        out = {key: value if key == "role" else self._mark(value, mark) for key, value in message.items()}
        if isinstance(message.get("content"), list):
            # of an item only the text is the user's words; its other entries are kinds and places of media
            out["content"] = [
                {**item, "text": self._mark(item["text"], mark)} if isinstance(item.get("text"), str) else item
                for item in message["content"]
            ]
        return out

    def _mark(self, value, mark: str):
        if isinstance(value, str):
            value = self._pattern.sub(lambda m: m.group()[0] + mark + m.group()[1:], value)
            start = mark if value.startswith(self._tails) else ""
            return start + value + (mark if value.endswith(self._heads) else "")
        if isinstance(value, Mapping):
            return {key: self._mark(item, mark) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self._mark(item, mark) for item in value]
        return value


_ADVICE = (
    "pass special_tokens_in_text='escape' to have it read as plain characters, or 'allow' if it is meant to steer the model"
)


def _unused(value) -> str:
    used = set()

    def collect(value):
        if isinstance(value, str):
            used.update(value)
        elif isinstance(value, Mapping):
            collect(list(value.values()))
        elif isinstance(value, (list, tuple)):
            for item in value:
                collect(item)

    collect(value)
    for code in _PRIVATE_USE:
        if chr(code) not in used:
            return chr(code)
    raise PromptError("the conversation uses every private-use character there is, so none is left to escape with")


def encode_marked(tokenizer, text: str, mark: str) -> list[int]:
    """The ids of a rendered prompt with marks in it.

    Between two special tokens of the template, text is read by a tokenizer that knows no special tokens, without its
    marks: the ids are what the characters would get if the word were no token.
    Raises PromptError where the vocabulary has no other way to read the word.
    """
    tokens = sorted(tokenizer.added_tokens, key=len, reverse=True)
    ids, start = [], 0

    def plain(piece: str):
        if not piece:
            return
        found = tokenizer.encode(piece.replace(mark, ""), add_special_tokens=False, split_special_tokens=True)
        steering = {tokenizer.added_tokens[token] for token in tokenizer.control_tokens}
        if not steering.isdisjoint(found):
            raise PromptError("this tokenizer reads a special token even out of plain text, so the text cannot be escaped")
        ids.extend(found)

    for found in re.finditer("|".join(map(re.escape, tokens)) or "(?!)", text):
        plain(text[start : found.start()])
        ids.append(tokenizer.added_tokens[found.group()])
        start = found.end()
    plain(text[start:])
    return ids
