"""What a decoded record asks for, as messages in the chat format: the one reading that batch jobs and training share.

A batch job answers a conversation whose last turn is not the assistant's; training learns one whose last turn is. Everything
else about a record means the same to both. Everything in it is used once or refused: columns.py says which columns are read,
layouts.py what they mean, places.py where pictures beside a conversation go.
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from PIL import Image

from ..errors import InputError
from ..processing.parts import SOURCES, JoinedPath, is_empty, source_of
from ..processing.pdf import PdfPage
from ..processing.pdf_pages import PdfFile
from ..processing.pixels import is_array
from ..storage import StorePath, is_store
from .columns import ANSWERS, ASKS, CHATS, DOCUMENTS, MEDIA, PDF, left_over, meant, names_pdfs, renamed, require_pdfs
from .kinds import VIDEOS
from .layouts import answer_of, asked_of, text_of
from .places import count_words, place_media
from .request import BODY, OPENAI, SETTINGS, request_of

__all__ = ["Conversation", "conversation_of", "read_conversation"]

_KNOWN = (*CHATS, *ASKS, *ANSWERS, *MEDIA, "system", "id", "custom_id")


@dataclass(frozen=True)
class Conversation:
    """What was read of a record.

    Attributes:
        messages: in the chat format, with every path resolved.
        unread: names of the record's columns that nothing reads: the user's own.
    """

    messages: list[dict[str, Any]]
    unread: tuple[str, ...] = ()


def conversation_of(record: Any, **options: Any) -> list[dict[str, Any]]:
    """The messages of `read_conversation`, which has the same arguments."""
    return read_conversation(record, **options).messages


def read_conversation(
    record: Any,
    *,
    folder: str = "",
    prompt: str | None = None,
    last: Literal["user", "assistant"] = "user",
    columns: Iterable[tuple[str, str]] = (),
) -> Conversation:
    """Read a decoded line or row.

    Args:
        record: a mapping in one of the layouts of layouts.py, with pictures and videos in its messages or in columns beside
            them, or a line of an OpenAI batch ({"body": {"messages": …}}).
        folder: where relative paths of pictures and videos start from.
        prompt: for records that have neither messages nor a prompt.
        last: what the last turn may be. "user": anything but the assistant's; an answer in a column of its own is the user's.
            "assistant": the assistant's own, which may stand in such a column.
        columns: pairs (our name of a column, its name in the record).

    Raises:
        InputError: the record has none of these forms, holds something that nothing reads, or ends with a turn of the wrong
            role.
    """
    if not isinstance(record, Mapping):
        raise InputError(f"a record is a JSON object, this is a {type(record).__name__}")
    training = last == "assistant"
    columns = tuple(columns)
    record = renamed(record, columns)
    require_pdfs(record, columns)
    if training and not isinstance(record.get("body"), Mapping):
        asked: Mapping[str, Any] = {name: value for name, value in record.items() if name != "body"}
        known: tuple[str, ...] = (*_KNOWN, "body")
    else:
        asked = request_of(record)
        known = (*_KNOWN, *SETTINGS, *(BODY if isinstance(record.get("body"), Mapping) else ()))
    documents = tuple(name for name in DOCUMENTS if names_pdfs(asked.get(name)))
    if documents:
        named = [one for name in documents for one in _beside(name, asked[name])]
        asked = {
            **{k: v for k, v in asked.items() if k not in documents},
            "images": [*_beside("images", asked.get("images")), *named],
        }
    messages = asked_of(asked, prompt, training=training)
    if training:
        messages = [*messages, *answer_of(record, messages)]
    messages = [_resolved(message, folder) for message in messages]
    used = {text_of(message) for message in messages}
    used |= {name for message in messages for item in _media(message) for name in _names(item)}
    messages, names = _with_columns(messages, asked, folder)
    if training and messages[-1]["role"] != "assistant":
        there = ", ".join(str(name) for name, value in record.items() if not is_empty(value))
        todo = "add its turn, or an answer"
        if all(record.get(name) is None for name in CHATS):
            todo += f", or say which column is the answer, as in data.train=[{meant(record, asked=True)}]"
        raise InputError(
            f"the last message is not the assistant's, so there is nothing to learn (the record has {there:.200}): {todo}"
        )
    if not training and messages[-1]["role"] == "assistant":
        raise InputError("the last message is the assistant's own, so there is nothing to answer")
    seen = any(_media(message) for message in messages)
    return Conversation(messages, left_over(record, (*known, *documents), used | names, seen=seen, ours=OPENAI))


def _with_columns(messages: list[dict[str, Any]], asked: Mapping, folder: str) -> tuple[list[dict[str, Any]], set[str]]:
    """The messages with the pictures and videos of the columns MEDIA, and the names of their files."""
    used: set[str] = set()
    sources: dict[str, list] = {"image": [], "video": []}
    for name in (name for name in MEDIA if name in asked):
        for value in _beside(name, asked[name]):
            used.update(_names(value))
            kind = name.removesuffix("s")
            sources[kind].append(_source(value, folder, name=name, kind=kind))
    # LLaVA's data of videos call the place of a video <image>.
    images, videos = (count_words(messages, word) for word in ("<image>", "<video>"))
    moving = not sources["image"] and not videos and 0 < images == len(sources["video"])
    strict = any(asked.get(name) is not None for name in CHATS[1:])  # layouts that have no items know places as words only
    for kind in ("video",) if moving else ("image", "video"):
        words = not strict and not any(name in asked for name in (kind, f"{kind}s"))
        messages = place_media(messages, kind, sources[kind], word="<image>" if moving else f"<{kind}>", words=words)
    return messages, used


def _beside(name: str, value: Any) -> list:
    """The pictures or videos of one of the columns MEDIA, each still as the record has it."""
    if isinstance(value, str) and value[:1] == "[":  # a column of JSON
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            pass  # the name of a file may begin like that
    if value is None:
        return []
    if not isinstance(value, (list, tuple)):
        return [value]
    frames = name == "video" and not all(isinstance(one, str) and one.lower().endswith(VIDEOS) for one in value)
    return [list(value)] if frames and value else list(value)


def _resolved(message: dict[str, Any], folder: str) -> dict[str, Any]:
    """A message with the paths of its items joined to `folder`."""
    if not _media(message):
        return message
    content = []
    for item in message["content"]:
        keys = SOURCES.get(item["type"], ())
        content.append({k: _source(v, folder, name=k, kind=item["type"]) if k in keys else v for k, v in item.items()})
    return {**message, "content": content}


def _media(message: Mapping) -> list[dict[str, Any]]:
    content = message.get("content")
    return [item for item in content if item["type"] in SOURCES] if isinstance(content, list) else []


def _source(value: Any, folder: str, *, name: str, kind: str) -> Any:
    """A relative path joined to `folder`, which may be in an object store; URLs, bytes and base64 text as they are, and a list
    of frames likewise."""
    value = source_of(name, value)
    if kind == "video" and isinstance(value, list):
        if not value:
            raise InputError(f"{name} is a list without frames")
        return [_source(frame, folder, name=f"{name}[{number}]", kind="image") for number, frame in enumerate(value)]
    if isinstance(value, (bytes, Image.Image)) or is_array(value):
        return value
    if not isinstance(value, str):
        raise InputError(f"{name} is a {type(value).__name__}; it needs a path, a URL, base64 text or the bytes of a file")
    if kind == "image" and name != "base64" and (found := PDF.fullmatch(value)):
        return _pdf(*found.groups(), folder=folder)
    start = value[:8].lower()
    if not folder or start.startswith(("http://", "https://", "data:")) or os.path.isabs(value) or name == "base64":
        return value
    if is_store(value):
        return value
    text = name != "path" and len(value) >= 64 and "." not in value  # most likely base64, which has no dot in it
    if is_store(folder):  # whether there is such an object would take a request
        return value if text else JoinedPath(StorePath.of(folder).joined(value))
    joined = os.path.join(folder, value)
    return value if text and not os.path.exists(joined) else JoinedPath(joined)


def _pdf(path: str, page: str | None, *, folder: str) -> PdfFile | PdfPage:
    """All pages of a PDF file, or the one that is named."""
    if path[:8].lower().startswith(("http://", "https://", "data:")):
        raise InputError(f"{path[:200]!r} is a PDF behind a URL, which is not fetched: download it, and name the file")
    if is_store(folder) and not is_store(path) and not os.path.isabs(path):
        path = JoinedPath(StorePath.of(folder).joined(path))
    elif not is_store(path) and not os.path.isabs(path):
        path = JoinedPath(os.path.join(folder, path))
    return PdfFile(path) if page is None else PdfPage(path, int(page))


def _names(value: Any) -> Iterator[str]:
    """The names, without folders, of the files that a picture, a video or an item is read from."""
    for part in value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else [value]:
        part = part.source if isinstance(part, (PdfFile, PdfPage)) else part
        if isinstance(part, str) and len(part) < 4096:
            yield os.path.basename(part)
