"""What a conversation and its messages are, and the pictures and videos in them; parts.py describes their items."""

import re
from collections.abc import Callable, Iterator, Mapping
from numbers import Real
from typing import Any, NamedTuple

from ..errors import PromptError
from .parts import SOURCES, as_mapping, is_empty, read_part

Message = dict[str, Any]
"""{"role", "content"}, where content is a list of items {"type", …}."""

# The other names of a message's keys, and of the roles that come with them (LLaVA's and ShareGPT's).
_KEYS = {"from": "role", "value": "content"}
_ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant", "system": "system"}
# Roles that are meant however they are spelt ("Assistant"); others are the template's own, as they are.
_ANY_CASE = frozenset({"user", "assistant", "system", "tool", "developer"})


class Conversations(NamedTuple):
    """Conversations in plain form.

    Attributes:
        messages: the messages of each conversation.
        batched: several conversations were passed, not one.
        strings: for each conversation the places of the messages whose content was given as a string.
    """

    messages: list[list[Message]]
    batched: bool
    strings: list[set[int]]


def normalize_conversations(conversation: Any) -> Conversations:
    """One conversation or several in plain form. The caller's messages are not changed.

    Messages are read as `read_message` does; besides, a content string becomes one text item.

    Args:
        conversation: a list of messages, an object with such a list as `messages`, or a list of those.

    Raises:
        PromptError: anything that is not a list of messages, and what `read_message` raises.
    """
    if isinstance(conversation, Mapping) or not isinstance(conversation, (list, tuple)):
        raise PromptError("a conversation is a list of messages: [{'role': 'user', 'content': [...]}]")
    if not conversation:
        raise PromptError("the conversation is empty")
    batched = isinstance(conversation[0], (list, tuple)) or hasattr(conversation[0], "messages")
    out = Conversations([], batched, [])
    for index, messages in enumerate(conversation if batched else [conversation]):
        messages = getattr(messages, "messages", messages)
        if not isinstance(messages, (list, tuple)):
            raise PromptError(f"conversation {index} is a {type(messages).__name__}; it needs a list of messages")
        read = [read_message(f"conversation {index}, message {n}", message) for n, message in enumerate(messages)]
        out.strings.append({n for n, message in enumerate(read) if isinstance(message.get("content"), str)})
        for n in out.strings[-1]:
            read[n]["content"] = [{"type": "text", "text": read[n]["content"]}]
        out.messages.append(read)
    return out


def read_message(where: str, message: Any) -> Message:
    """A message under our names.

    Args:
        where: what messages of errors call its place.
        message: {"role", "content"} or {"from", "value"}, a mapping or an object with such fields (a dataclass, or pydantic's),
            whose content is a string or a list of items as `read_part` takes them; entries whose value is null do not count.
            `weight` is 1, or 0 for a turn that training does not learn. Further
            keys are the template's, and `refuse_unused_keys` decides about them.

    Returns:
        The same with our keys, our roles, and items as `read_part` returns them. A string stays one.

    Raises:
        PromptError: it is no such message.
    """
    message = as_mapping(message)
    if not isinstance(message, Mapping) or not ("role" in message or "from" in message):
        raise PromptError(f"{where}: a message is a mapping with 'role' and 'content'")
    read = {name: value for name, value in message.items() if value is not None}
    if read.get("type") == "message":  # as the items of OpenAI's endpoint /v1/responses say
        del read["type"]
    for theirs, ours in _KEYS.items():
        if theirs not in read:
            continue
        if ours in read:
            raise PromptError(f"{where}: the message has both {theirs!r} and {ours!r}; it needs one of them")
        read[ours] = value = read.pop(theirs)
        if theirs == "from":
            if not isinstance(value, str) or value.lower() not in _ROLES:
                raise PromptError(f"{where}: 'from' is {value!r:.80}; it is one of {', '.join(_ROLES)}")
            read[ours] = _ROLES[value.lower()]
    if not isinstance(read.get("role"), str):
        raise PromptError(f"{where}: the role is {read.get('role')!r:.80}; it needs a string")
    if read["role"].lower() in _ANY_CASE:
        read["role"] = read["role"].lower()
    weight, content = read.get("weight", 1), read.get("content")
    if not isinstance(weight, Real) or weight not in (0, 1):
        raise PromptError(f"{where}: weight is {weight!r:.80}; it is 1, or 0 for a turn that is not learned")
    if isinstance(content, (list, tuple)):
        read["content"] = [read_part(f"{where}, item {number}", item) for number, item in enumerate(content)]
    elif content is not None and not isinstance(content, str):
        raise PromptError(f"{where}: content is a {type(content).__name__}; it needs a string or a list of items")
    return read


def refuse_unused_keys(conversations: list[list[Message]], template: str) -> None:
    """Refuse what a message holds beyond role, content and weight, unless the template reads it.

    Args:
        conversations: normalised messages.
        template: jinja text. It reads a key if it has `.key`, `['key']` or `get('key')` somewhere.

    Raises:
        PromptError: names the key; or the message has neither content nor anything else that is read.
    """
    for index, messages in enumerate(conversations):
        for place, message in enumerate(messages):
            where = f"conversation {index}, message {place}"
            further = [key for key in message if key not in ("role", "content", "weight") and not is_empty(message[key])]
            for key in further:
                name = re.escape(str(key))
                if not re.search(rf"""\.\s*{name}\b|(\[|\bget\()\s*(["']){name}\2""", template):
                    raise PromptError(f"{where}: neither the processor nor the chat template has a use for {key!r:.80}")
            if "content" not in message and not further:
                raise PromptError(f"{where}: the message has no content")


def items_of(messages: list[Message], kind: str) -> Iterator[dict[str, Any]]:
    """The items of `kind` ("text", "image" or "video") of a normalised conversation, in order."""
    return (item for message in messages for item in message.get("content") or [] if item.get("type") == kind)


def collect_media(conversations: list[list[Message]], kind: str) -> list[list]:
    """What the items of `kind` ("image" or "video") hold, in order, a list for each conversation."""
    return [
        [item[key] for item in items_of(messages, kind) for key in SOURCES[kind] if item.get(key) is not None]
        for messages in conversations
    ]


def has_video(conversations: list[list[Message]]) -> bool:
    """Whether any of the conversations has a video item."""
    return any(True for messages in conversations for _ in items_of(messages, "video"))


def expand_images(conversations: list[list[Message]], pages_of: Callable[[Any], list]) -> None:
    """Put an item for each picture that `pages_of` gives in the place of every image item. Normalised messages are changed."""
    for message in (message for messages in conversations for message in messages):
        items = []
        for item in message.get("content") or []:
            keys = SOURCES["image"] if item.get("type") == "image" else ()
            held = [item[key] for key in keys if item.get(key) is not None]
            pages = pages_of(held[0]) if len(held) == 1 else held
            alone = len(pages) == len(held) and all(page is one for page, one in zip(pages, held, strict=True))
            items.extend([item] if alone else [{"type": "image", "image": page} for page in pages])
        if items:
            message["content"] = items
