"""One record of a batch job: what a line, a row or a file asks for, as messages in the chat format. No jax in here."""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from ..errors import InputError
from ..generation_config import SamplingParams

__all__ = ["FIELDS", "Record", "record_from", "request_seed", "with_overrides"]

OVERRIDES = tuple(f.name for f in fields(SamplingParams))
_MEDIA = ("image", "images", "video", "videos")
# Everything a record is read for. Other keys are the user's own and are left alone.
FIELDS = ("id", "custom_id", "body", "messages", "prompt", *_MEDIA, *OVERRIDES)
# What requests for an OpenAI endpoint call it, and what it is called here.
_OPENAI = {"max_tokens": "max_new_tokens", "max_completion_tokens": "max_new_tokens"}


@dataclass(frozen=True)
class Record:
    """id: a string or whole number. messages: chat format, paths resolved. overrides: arguments of SamplingParams that this
    record sets for itself. error: what is wrong with the record, which then has no messages."""

    id: str | int
    messages: list[dict[str, Any]] | None = None
    overrides: dict[str, Any] = field(default_factory=dict)
    error: str | None = None


def record_from(
    value: Any, default_id: str | int, folder: str = "", prompt: str | None = None, columns: tuple[tuple[str, str], ...] = ()
) -> Record:
    """A decoded line or row to a record. Raises nothing: a faulty record says so itself.

    value: {"messages": …} in the chat format, a line for an OpenAI batch ({"custom_id", "body": {"messages", …}}), or
    {"prompt", "image" | "images" | "video" | "videos"}. folder: what relative paths start from. prompt: for records
    without a prompt of their own. columns: (name, what it is called in `value`).
    """
    key = default_id
    try:
        if not isinstance(value, Mapping):
            raise InputError(f"a record is a JSON object, this is a {type(value).__name__}")
        if columns:
            value = {**value, **{name: value[column] for name, column in columns if column in value}}
        key = _id(value, default_id)
        body = value.get("body")
        if body is not None:
            if not isinstance(body, Mapping):
                raise InputError(f"body is a {type(body).__name__}; it needs an object with messages")
            value = _openai(body)
        messages = _messages(value, folder, prompt)
        return Record(key, messages, {name: value[name] for name in OVERRIDES if value.get(name) is not None})
    except InputError as error:
        return Record(key, error=str(error))
    except Exception as error:  # what no rule above foresaw is still one record's fault
        return Record(key, error=f"{type(error).__name__}: {error}")


def _id(value: Mapping, default: str | int) -> str | int:
    found = value.get("id")
    found = value.get("custom_id") if found is None else found
    if found is None:
        return default
    if isinstance(found, bool) or not isinstance(found, (str, int)):
        raise InputError(f"id is {found!r:.80}; it needs a string or a whole number")
    return found


def _openai(body: Mapping) -> dict[str, Any]:
    """The body of a chat completion as a record. A temperature means sampling there, and 0 the most likely token."""
    if body.get("n") not in (None, 1):
        raise InputError(f"n is {body['n']!r}; a record has one answer")
    out = {**body, **{ours: body[theirs] for theirs, ours in _OPENAI.items() if body.get(theirs) is not None}}
    if out.get("temperature") is not None and "do_sample" not in out:
        out["do_sample"] = out["temperature"] != 0
        if out["temperature"] == 0:
            del out["temperature"]
    return out


def _messages(value: Mapping, folder: str, prompt: str | None) -> list[dict[str, Any]]:
    messages = value.get("messages")
    if isinstance(messages, str):  # a column of JSON
        try:
            messages = json.loads(messages)
        except (ValueError, RecursionError) as error:
            raise InputError(f"messages is not valid JSON: {error}") from error
    if messages is None:
        return [{"role": "user", "content": _content(value, folder, prompt)}]
    if not isinstance(messages, list) or not messages or not all(isinstance(m, Mapping) for m in messages):
        raise InputError("messages needs a list of at least one {'role', 'content'}")
    if messages[-1].get("role") == "assistant":
        raise InputError("the last message is the assistant's own, so there is nothing to answer")
    return [_resolved(message, folder) for message in messages]


def _content(value: Mapping, folder: str, prompt: str | None) -> list[dict[str, Any]]:
    """Content of a record without messages: its pictures and videos, then its prompt or the job's."""
    items = []
    for name in _MEDIA:
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


def _resolved(message: Mapping, folder: str) -> dict[str, Any]:
    content = message.get("content")
    if not isinstance(content, list):
        return dict(message)
    return {**message, "content": [_item(item, folder) for item in content]}


def _item(item: Any, folder: str) -> Any:
    """A content item with its relative path resolved. {"type": "image_url"} and {"type": "video_url"} become plain ones."""
    if not isinstance(item, Mapping):
        return item
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
    """A path that is not absolute from `folder`; URLs, bytes and base64 text as they are. Datasets wrap either in a struct."""
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
    if name != "path" and len(value) >= 64 and not _exists(joined):
        return value  # base64, most likely; if not, the error will show it
    return joined


def _exists(path: str) -> bool:
    try:
        return os.path.exists(path)
    except (OSError, ValueError):
        return False


def request_seed(job_seed: int, key: str | int) -> int:
    """A seed below 2**32 from the job's seed and the record's id: the same tokens are drawn wherever and whenever it runs."""
    return int.from_bytes(hashlib.blake2b(json.dumps([job_seed, key]).encode(), digest_size=4).digest(), "big")


def with_overrides(sampling: SamplingParams, record: Record) -> SamplingParams:
    """The job's sampling with what the record sets itself, and a seed of its own. Raises InputError."""
    overrides = {"seed": request_seed(sampling.seed, record.id), **record.overrides}
    stop = overrides.get("stop")
    if isinstance(stop, str):
        overrides["stop"] = (stop,)
    for name in ("do_sample", "ignore_eos"):
        if not isinstance(overrides.get(name, False), bool):
            raise InputError(f"{name} is {overrides[name]!r}; it needs true or false")
    try:
        return replace(sampling, **overrides)
    except TypeError as error:
        raise InputError(f"the record's sampling arguments have the wrong type: {error}") from error
