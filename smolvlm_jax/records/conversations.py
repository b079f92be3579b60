"""What a decoded record asks for, as messages in the chat format: the one reading that batch jobs and training share.

A batch job answers a conversation whose last turn is not the assistant's; training learns one whose last turn is. Everything
else about a record means the same to both.
"""

import json
import os
from collections.abc import Mapping
from typing import Any, Literal

from ..errors import InputError

__all__ = ["MEDIA", "conversation_of", "request_of"]

# Keys of pictures and videos that stand beside a prompt, in the order in which they enter the prompt.
MEDIA = ("image", "images", "video", "videos")
# Names of sampling arguments in requests for an OpenAI endpoint, and our names for them.
_OPENAI = {"max_tokens": "max_new_tokens", "max_completion_tokens": "max_new_tokens"}


def conversation_of(
    record: Any, *, folder: str = "", prompt: str | None = None, last: Literal["user", "assistant"] = "user"
) -> list[dict[str, Any]]:
    """Chat messages of a decoded line or row.

    Args:
        record: {"messages": …} in the chat format (a list, or JSON text of one), a line of an OpenAI batch
            ({"body": {"messages": …}}), or {"prompt", "image" | "images" | "video" | "videos"}.
        folder: where relative paths of pictures and videos start from.
        prompt: for records that have neither messages nor a prompt.
        last: what the last turn may be. "user": anything but the assistant's. "assistant": the assistant's own, where `answer`
            of the record, if any, is appended as that turn; content items {"type": "image"} that carry no picture take the
            record's `images` in order, as datasets for other trainers have it.

    Returns:
        The messages, with every path resolved.

    Raises:
        InputError: if the record has none of these forms, or ends with a turn of the wrong role.
    """
    if not isinstance(record, Mapping):
        raise InputError(f"a record is a JSON object, this is a {type(record).__name__}")
    training = last == "assistant"
    value = record if training and not isinstance(record.get("body"), Mapping) else request_of(record)
    given = _given(value)
    if given is None:
        messages = [{"role": "user", "content": _content(value, folder, prompt)}]
    else:
        left = _pictures(record.get("images")) if training else None
        messages = [_resolved(message, folder, left) for message in given]
    if training and (answer := record.get("answer")) is not None:
        if not isinstance(answer, str):
            raise InputError(f"answer is a {type(answer).__name__}; it needs a string")
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    if training and messages[-1].get("role") != "assistant":
        raise InputError("the last message is not the assistant's, so there is nothing to learn: add its turn, or an answer")
    if not training and messages[-1].get("role") == "assistant":
        raise InputError("the last message is the assistant's own, so there is nothing to answer")
    return messages


def request_of(record: Mapping) -> Mapping:
    """The part of a record that asks: its `body`, as in a line of an OpenAI batch, under our names, or the record itself.

    In such a body a temperature means sampling, and a temperature of 0 the most likely token.
    """
    body = record.get("body")
    if body is None:
        return record
    if not isinstance(body, Mapping):
        raise InputError(f"body is a {type(body).__name__}; it needs an object with messages")
    out = {**body, **{ours: body[theirs] for theirs, ours in _OPENAI.items() if body.get(theirs) is not None}}
    if out.get("temperature") is not None and "do_sample" not in out:
        out["do_sample"] = out["temperature"] != 0
        if out["temperature"] == 0:
            del out["temperature"]
    return out


def _given(value: Mapping) -> list[Mapping] | None:
    """The messages that a record brings; None if it has none."""
    messages = value.get("messages")
    if isinstance(messages, str):  # a column of JSON
        try:
            messages = json.loads(messages)
        except (ValueError, RecursionError) as error:
            raise InputError(f"messages is not valid JSON: {error}") from error
    if messages is None:
        return None
    if not isinstance(messages, list) or not messages or not all(isinstance(m, Mapping) for m in messages):
        raise InputError("messages needs a list of at least one {'role', 'content'}")
    return messages


def _content(value: Mapping, folder: str, prompt: str | None) -> list[dict[str, Any]]:
    """Content of a record without messages: its pictures and videos, then its own prompt or the default one."""
    items: list[dict[str, Any]] = []
    for name in MEDIA:
        found = value.get(name)
        if found is None:
            continue
        kind = name.removesuffix("s")
        many = found if isinstance(found, list) and name.endswith("s") else [found]
        items += [{"type": kind, kind: _source(one, folder, kind)} for one in many]
    own = value.get("prompt")
    text = prompt if own is None else own
    if text is None:
        raise InputError("the record has neither messages nor a prompt, and the job has no --prompt")
    if not isinstance(text, str):
        raise InputError(f"prompt is a {type(text).__name__}; it needs a string")
    return [*items, {"type": "text", "text": text}]


def _pictures(images: Any) -> list:
    if not isinstance(images, list | tuple | None):
        raise InputError(f"images is a {type(images).__name__}; it needs a list")
    return list(images or ())


def _resolved(message: Mapping, folder: str, left: list | None) -> dict[str, Any]:
    content = message.get("content")
    if not isinstance(content, list):
        return dict(message)
    return {**message, "content": [_item(item, folder, left) for item in content]}


def _item(item: Any, folder: str, left: list | None) -> Any:
    """A content item with its relative path resolved. {"type": "image_url"} and {"type": "video_url"} become plain ones.

    A picture item without a picture takes the first of the pictures `left`, if there is such a list.
    """
    if not isinstance(item, Mapping):
        return item
    if left is not None and item.get("type") == "image" and not set(item) - {"type", "text"}:
        if not left:
            raise InputError("an image item without a picture, and no images left in the record")
        item = {"type": "image", "image": left.pop(0)}
    item = {name: value for name, value in item.items() if value is not None}
    kind = item.get("type")
    if kind in ("image_url", "video_url") and kind in item:
        url = item[kind]
        item = {"type": kind.removesuffix("_url"), "url": url.get("url") if isinstance(url, Mapping) else url}
    if item.get("type") in ("image", "video"):
        for name in ("path", "url", item["type"]):
            if name in item:
                item[name] = _source(item[name], folder, name)
    return item


def _source(value: Any, folder: str, name: str) -> Any:
    """A relative path joined to `folder`; URLs, bytes and base64 text as they are. Datasets wrap either in a struct."""
    if isinstance(value, Mapping):
        held = value.get("bytes")
        value = value.get("path") if held is None else held
    if isinstance(value, (bytes, bytearray)):
        return bytes(value)
    if not isinstance(value, str):
        raise InputError(f"{name} is a {type(value).__name__}; it needs a path, a URL, base64 text or the bytes of a file")
    start = value[:8].lower()
    if not folder or start.startswith(("http://", "https://", "data:")) or os.path.isabs(value):
        return value
    joined = os.path.join(folder, value)
    if name != "path" and len(value) >= 64 and not os.path.exists(joined):
        return value  # most likely base64; if it is not, decoding it reports so
    return joined
