"""What an item of a message's content is: its types, their other names, and the keys that each may have.

The tables are closed: an item of another type, or with a key that nothing reads, is refused by name.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any
from urllib.parse import unquote

from ..errors import PromptError

__all__ = ["SOURCES", "JoinedPath", "as_mapping", "is_empty", "local_path", "read_part", "relative_to", "source_of"]

# Every type of an item that is understood -> ours.
_TYPES = {
    "text": "text", "input_text": "text", "output_text": "text",
    "image": "image", "input_image": "image", "image_url": "image",
    "video": "video", "input_video": "video", "video_url": "video",
}  # fmt: skip
# The keys under which an item holds its picture or video.
SOURCES = {kind: (kind, "url", "path", "base64") for kind in ("image", "video")}
# Keys that an item may have although nothing is made of them. OpenAI's `detail` is a wish for a resolution; how pictures become
# tiles is set for the whole call. `cache_control` is about a server's cache.
_WITHOUT_EFFECT = frozenset({"detail", "cache_control"})


def as_mapping(value: Any) -> Any:
    """A dataclass or an object of pydantic as the mapping of its fields, which are left as they are; anything else as it is."""
    if dataclasses.is_dataclass(value) and not isinstance(value, (type, Mapping)):
        return {entry.name: getattr(value, entry.name) for entry in dataclasses.fields(value)}
    return dict(value) if hasattr(type(value), "model_fields") else value


def is_empty(value: Any) -> bool:
    """Whether a value carries nothing: null, or a text, list or mapping without contents."""
    return value is None or (isinstance(value, (str, list, tuple, Mapping)) and not value)


def read_part(where: str, part: Any) -> dict[str, Any]:
    """An item of a message's content under our names.

    Args:
        where: what messages call its place.
        part: a string, or a mapping with a `type`, or an object with such fields; entries whose value is null do not count.

    Returns:
        {"type": "text", "text"}, or {"type": "image" | "video"} with one of SOURCES, if the item has one, and with `index`, the
        number of its picture among those that come with the conversation, if it has one.

    Raises:
        PromptError: the type is unknown, a key is unknown or missing, or the picture is given twice.
    """
    if isinstance(part, str):
        return {"type": "text", "text": part}
    part = as_mapping(part)
    if not isinstance(part, Mapping) or "type" not in part:
        has = f"; this one has {', '.join(map(str, part))!s:.80}" if isinstance(part, Mapping) else ""
        raise PromptError(f"{where}: an item is a mapping with a 'type', or a string{has}")
    given = {name: value for name, value in part.items() if value is not None}
    name = given.pop("type", None)
    kind = _TYPES.get(name) if isinstance(name, str) else None
    if kind is None:
        raise PromptError(f"{where}: nothing reads items of the type {name!r:.80}; the types are {', '.join(_TYPES)}")
    out: dict[str, Any] = {"type": kind}
    if kind == "text":
        known: tuple[str, ...] = ("text",)
        out["text"] = given.pop("text", None)
    else:
        known = (*SOURCES[kind], f"{kind}_url", "index")
        if (url := given.pop(f"{kind}_url", None)) is not None:
            if "url" in given:
                raise PromptError(f"{where}: the item has both {kind}_url and url; it needs one of them")
            given["url"] = url
        out |= {key: given.pop(key) for key in (*SOURCES[kind], "index") if key in given}
    left = [key for key, value in given.items() if key not in _WITHOUT_EFFECT and not is_empty(value)]
    if left:
        raise PromptError(
            f"{where}: nothing reads {left[0]!r:.80} of an item of the type {name}; its keys are {', '.join(known)}"
        )
    if kind == "text":
        if not isinstance(out["text"], str):
            raise PromptError(f"{where}: a text item needs its 'text' as a string")
        return out
    index = out.get("index", 0)
    if not (isinstance(index, int) or (isinstance(index, float) and index.is_integer())) or index < 0:
        raise PromptError(f"{where}: index is {index!r:.80}; it is the number of a picture, from 0")
    found = [key for key in SOURCES[kind] if key in out]
    if len(found) > 1:
        raise PromptError(f"{where}: the item has both {found[0]} and {found[1]}; it needs one of them")
    if found:
        out[found[0]] = source_of(f"{where}: {found[0]}", out[found[0]])
    return out


def source_of(where: str, value: Any) -> Any:
    """What a picture or video is read from, out of the structs that data sets and OpenAI's format wrap it in.

    Args:
        where: what messages call it.
        value: {"bytes", "path"} (bytes count where both are there), {"url"}, or what has no struct around it; a list is the
            frames of a video.

    Returns:
        bytes, a path, an http(s) or data: URL, base64 text, or the object that it was; of a list, a list of these. A file: URL
        becomes its path.

    Raises:
        PromptError: a struct has none of these keys, or others with a value.
    """
    if isinstance(value, (list, tuple)):
        return [source_of(where, frame) for frame in value]
    value = as_mapping(value)
    if isinstance(value, Mapping):
        left = [key for key, held in value.items() if key not in ("bytes", "path", "url", "detail") and not is_empty(held)]
        if left:
            raise PromptError(f"{where} has the unknown key {left[0]!r:.80}; it may have bytes, path or url")
        found = [value[key] for key in ("bytes", "path", "url") if value.get(key) is not None]
        if not found:
            raise PromptError(f"{where} is a struct without bytes, path or url")
        if len(found) > 1 and value.get("url") is not None:
            raise PromptError(f"{where} has a url beside {'bytes' if value.get('bytes') is not None else 'path'}; it needs one")
        value = found[0]
    if isinstance(value, (bytearray, memoryview)):
        return bytes(value)
    return local_path(value)


class JoinedPath(str):
    """A relative path of a record, joined to the folder of the file of records."""

    __slots__ = ()


def relative_to(source: Any) -> str:
    """What a message about a file that is not there says of the place from which its path starts."""
    return " (relative paths start from the folder of the file of records)" if isinstance(source, JoinedPath) else ""


def local_path(source: Any) -> Any:
    """The path that a file: URL of this machine names; anything else as it is. Raises PromptError for another machine's."""
    if not isinstance(source, str) or source[:5].lower() != "file:":
        return source
    rest = source[5:]
    host, slash, path = rest[2:].partition("/") if rest.startswith("//") else rest.partition("/")
    if host.lower() not in ("", "localhost") or not slash:
        raise PromptError(f"{source[:200]!r} names no file of this machine: a file URL is file:///PATH")
    return unquote(slash + path)
