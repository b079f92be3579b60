"""Pictures and videos in columns beside a conversation, and their places in it.

Places are items {"type": "image"} without a picture, or words <image> in the texts (<video> for videos), from the first message
to the last. Where there are neither, all pictures go before what the user says first. Every picture gets one place and every
place one picture, or the record is refused with the two numbers.
"""

import re
from collections.abc import Iterator, Sequence
from typing import Any

from ..errors import InputError
from ..processing.parts import SOURCES

__all__ = ["count_words", "place_media"]

Messages = list[dict[str, Any]]


def count_words(messages: Messages, word: str) -> int:
    """How often `word` occurs in the texts of a conversation."""
    return sum(item["text"].count(word) for message in messages for item in _content(message) if item["type"] == "text")


def place_media(messages: Messages, kind: str, sources: Sequence[Any], *, word: str, words: bool) -> Messages:
    """A conversation with the pictures or videos beside it put into their places.

    Args:
        messages: as `read_message` returns them.
        kind: "image" or "video".
        sources: the pictures or videos in the columns.
        word: that stands in a text for one of them.
        words: whether it may be a mere word where nothing stands beside the conversation.

    Raises:
        InputError: places and pictures differ in number.
    """
    items = [item for message in messages for item in _content(message) if item["type"] == kind]
    bare = [item for item in items if _held(item) is None]
    given, tags = len(sources), count_words(messages, word)
    if not given and not bare and (words or not tags):
        return messages
    indices = [item["index"] for item in bare if "index" in item]
    if given and given == len(bare):  # words beside as many items stay words
        if indices:
            if sorted(indices) != list(range(given)):
                raise InputError(f"{kind} items with the indices {indices!r:.80} for the {given} {kind}s beside the messages")
            sources = [sources[int(index)] for index in indices]
        return _filled(messages, kind, sources, word=None)
    if given and given == len(bare) + tags and not indices:
        return _filled(messages, kind, sources, word=word)
    if given and not items and not tags:
        return _prepended(messages, kind, sources)
    if given and not bare and _same([_held(item) for item in items], sources):
        return messages  # the column repeats what the items hold
    places = len(bare) if indices else len(bare) + tags
    own = f"; items that hold one themselves: {len(items) - len(bare)}" if len(items) > len(bare) else ""
    left = f": no {kind}s left for the others" if given < places else ""
    raise InputError(
        f"{given} {kind}(s) beside messages with {places} place(s) for them ({len(bare)} {kind} items without one, {tags} "
        f"{word}){own}{left}"
    )


def _filled(messages: Messages, kind: str, sources: Sequence[Any], *, word: str | None) -> Messages:
    """Items without a picture, and each `word` in a text, replaced by the sources in order."""
    rest = iter(sources)
    take = lambda: {"type": kind, kind: next(rest)}

    def fill(item: dict[str, Any]) -> Iterator[dict[str, Any]]:
        if item["type"] == kind and _held(item) is None:
            yield take()
        elif item["type"] == "text" and word is not None and word in item["text"]:
            for part in re.split(f"({word})", item["text"]):
                if part:
                    yield take() if part == word else {"type": "text", "text": part}
        else:
            yield item

    filled = []
    for message in messages:
        before = _content(message)
        content = [new for item in before for new in fill(item)]
        # Arrays cannot be compared, so identity tells what has changed.
        same = len(content) == len(before) and all(new is old for new, old in zip(content, before, strict=True))
        filled.append(message if same else {**message, "content": content})
    return filled


def _prepended(messages: Messages, kind: str, sources: Sequence[Any]) -> Messages:
    """The sources at the beginning of the user's first turn."""
    place = next((place for place, message in enumerate(messages) if message["role"] == "user"), None)
    if place is None:
        raise InputError(f"{len(sources)} {kind}(s) beside messages without a turn of the user, so there is no place for them")
    items = [{"type": kind, kind: source} for source in sources]
    message = {**messages[place], "content": [*items, *_content(messages[place])]}
    return [*messages[:place], message, *messages[place + 1 :]]


def _content(message: dict[str, Any]) -> list[dict[str, Any]]:
    content = message.get("content") or []
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _held(item: dict[str, Any]) -> Any:
    """The picture or video that an item holds; None for one that is only a place."""
    return next((item[key] for key in SOURCES[item["type"]] if item.get(key) is not None), None)


def _same(ones: Sequence[Any], others: Sequence[Any]) -> bool:
    """Whether two lists name the same files, or hold the same bytes."""
    plain = all(isinstance(value, (str, bytes)) for value in (*ones, *others))
    return plain and list(ones) == list(others)
