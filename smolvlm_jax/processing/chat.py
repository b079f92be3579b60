"""What a conversation is: messages in one plain form, and the pictures and videos in them."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from ..errors import PromptError

Message = dict[str, Any]
"""{"role", "content"}, where content is a list of items {"type", …}."""

MEDIA_KEYS = {"image": ("image", "url", "path", "base64"), "video": ("video", "url", "path")}


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

    Keys whose value is None are dropped, a content string becomes one text item, and {"type": "image_url"} items become
    images.

    Args:
        conversation: a list of messages, an object with such a list as `messages`, or a list of those.

    Raises:
        PromptError: anything that is not a list of messages.
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
        out.messages.append([_message(f"conversation {index}, message {n}", message) for n, message in enumerate(messages)])
        out.strings.append({n for n, message in enumerate(messages) if isinstance(message.get("content"), str)})
    return out


def _message(where: str, message: Any) -> Message:
    if not isinstance(message, Mapping) or "role" not in message:
        raise PromptError(f"{where}: a message is a mapping with 'role' and 'content'")
    message = {key: value for key, value in message.items() if value is not None}
    content = message.get("content")
    if isinstance(content, str):
        message["content"] = [{"type": "text", "text": content}]
    elif isinstance(content, (list, tuple)):
        message["content"] = [_item(f"{where}, item {number}", item) for number, item in enumerate(content)]
    elif content is not None:
        raise PromptError(f"{where}: content is a {type(content).__name__}; it needs a string or a list of items")
    return message


def _item(where: str, item: Any) -> dict[str, Any]:
    if isinstance(item, str):
        return {"type": "text", "text": item}
    if not isinstance(item, Mapping) or "type" not in item:
        raise PromptError(f"{where}: an item is a mapping with a 'type', or a string")
    item = dict(item)
    if item["type"] == "image_url" and "image_url" in item:
        url = item["image_url"]
        item = {"type": "image", "url": url.get("url", "") if isinstance(url, Mapping) else url}
    if item["type"] == "text" and not isinstance(item.get("text"), str):
        raise PromptError(f"{where}: a text item needs its 'text' as a string")
    return item


def items_of(messages: list[Message], kind: str) -> Iterator[dict[str, Any]]:
    """The items of `kind` ("text", "image" or "video") of a normalised conversation, in order."""
    return (item for message in messages for item in message.get("content") or [] if item.get("type") == kind)


def collect_media(conversations: list[list[Message]], kind: str) -> list[list]:
    """What the items of `kind` ("image" or "video") hold, in order, a list for each conversation."""
    return [
        [item[key] for item in items_of(messages, kind) for key in MEDIA_KEYS[kind] if item.get(key) is not None]
        for messages in conversations
    ]


def has_video(conversations: list[list[Message]]) -> bool:
    """Whether any of the conversations has a video item."""
    return any(True for messages in conversations for _ in items_of(messages, "video"))
