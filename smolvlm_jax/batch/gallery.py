"""A page of a job's first answers with their pictures, as one file that needs nothing else.

Pictures are read and scaled down in a separate process, because a damaged or very large picture may end it. Imports no jax.
"""

import base64
import contextlib
import io
import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..child import AVAILABLE, Child, parent
from ..errors import InputError, JobError, describe
from ..io import render_page, write_text
from ..processing.chat import items_of, normalize_conversations
from ..processing.decode import decode_video
from ..processing.fetch import load_image
from ..processing.limits import MediaLimits, describe_source
from ..processing.parts import SOURCES
from ..processing.pdf_pages import with_pages
from ..records.sources import Source
from ..records.sources.base import Parser
from ..storage import AnyPath
from .manifest import GALLERY
from .parts import Part
from .sinks import Sink
from .workers import limit_memory

__all__ = ["ANSWERS", "serve", "write_gallery"]

# Bounds of the page: answers, pictures of each, pixels of a picture's side, characters of a text and of a column.
ANSWERS, _PICTURES, _SIDE = 50, 8, 256
_TEXT, _COLUMN = 4000, 200
_FRAMES, _COLUMNS = 4, 20  # of a video that is a list of frames; of a row
_QUALITY = 80


@dataclass(frozen=True)
class Reader:
    """What the process that reads pictures is told.

    Attributes:
        parse: From a row's payload to its record.
        limits: What may be read.
        memory: Bytes that it may take beside what it has.
    """

    parse: Parser
    limits: MediaLimits
    memory: int


def write_gallery(
    folder: AnyPath, sink: Sink, source: Source, reader: Reader, *, shard_size: int, seconds: float, title: str
) -> AnyPath:
    """Write the page of the first answers whose parts are there.

    Args:
        folder: Of the output.
        sink: Reads its parts.
        source: Of the records.
        reader: How pictures are read.
        shard_size: Rows of a part.
        seconds: For the pictures of one record.
        title: Of the page.

    Returns:
        Its path.

    Raises:
        ChangedError: the input is no longer what it was.
        OSError: the page cannot be written.
    """
    entries = []
    with contextlib.closing(_Pictures(reader, seconds)) as pictures:
        for row, payload in itertools.islice(_rows(folder, sink, source, shard_size), ANSWERS):
            asked = pictures.of(payload)
            entries.append(_entry(row, asked, sink.columns))
    errors = sum(entry["error"] is not None for entry in entries)
    words = f"The first {len(entries)} answers" + (f", {errors} of them errors." if errors else ".")
    page = render_page(Path(__file__).with_name("gallery.html"), title=title, summary=words, entries=entries)
    path = folder / GALLERY
    write_text(path, page.encode(errors="backslashreplace"))  # an answer may hold half a surrogate pair
    return path


def _rows(folder: AnyPath, sink: Sink, source: Source, shard_size: int) -> Iterator[tuple[dict[str, Any], Any]]:
    """(row, payload of its record), of the parts that are there."""
    with contextlib.closing(source.units(shard_size)) as units:  # type: ignore[type-var]
        for unit in units:
            path = Part.path_of(folder, unit.index, sink)
            if path.exists():
                for row, found in zip(sink.read(path), unit.rows(), strict=False):
                    yield row, found.payload


def _entry(row: Mapping[str, Any], asked: Mapping[str, Any], columns: tuple[str, ...]) -> dict[str, Any]:
    own = [
        (_short(name, _COLUMN), _short(value, _COLUMN))
        for name, value in row.items()
        if name not in columns and value is not None
    ]
    jpeg = [{**picture, "jpeg": base64.b64encode(picture["jpeg"]).decode()} for picture in asked["pictures"]]
    return {
        "id": _short(row["id"], _COLUMN),
        "text": None if row["text"] is None else _short(row["text"], _TEXT),
        "error": None if row["error"] is None else _short(row["error"], _TEXT),
        "figures": f"{row['finish_reason']}, {row['prompt_tokens']} + {row['new_tokens']} tokens, {row['tiles']} tiles",
        "own": own[:_COLUMNS],
        "pictures": jpeg,
        "turns": [(_short(role, _COLUMN), _short(words, _TEXT)) for role, words in asked["turns"]],
    }


def _short(value: Any, most: int) -> str:
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return text if len(text) <= most else f"{text[:most]}… ({len(text):,} characters)"


class _Pictures:
    """The child that reads the pictures of records, replaced when one ends it."""

    def __init__(self, reader: Reader, seconds: float):
        self._reader, self._seconds = reader, seconds
        self._child: Child | None = None

    def of(self, payload: Any) -> dict[str, Any]:
        """Turns and pictures of a record; without pictures where they cannot be had."""
        if not AVAILABLE:
            return _read(self._reader, payload)
        try:
            child = self._child or Child(__name__, quiet=True).begin(self._reader)
            self._child = child
            child.send(payload, self._seconds)
            return child.receive(self._seconds)
        except (OSError, EOFError) as error:  # a TimeoutError is an OSError too
            self.close()
            return {
                "turns": [],
                "pictures": [{"name": "", "jpeg": b"", "fault": f"its pictures cannot be shown: {describe(error)}"}],
            }

    def close(self) -> None:
        child, self._child = self._child, None
        if child is not None:
            child.end()


def serve() -> None:
    """In the child: answer each payload with the turns and the small pictures of its record."""
    channel = parent()
    reader = channel.receive()
    limit_memory(reader.memory)
    channel.send(None)
    with contextlib.suppress(ConnectionError):
        for payload in channel.messages():
            channel.send(_read(reader, payload))


def _read(reader: Reader, payload: Any) -> dict[str, Any]:
    record = reader.parse(payload)
    asked = with_pages(record.messages or [], reader.limits)
    messages = normalize_conversations(asked).messages[0] if asked else []
    pictures = [item for message in messages for item in message.get("content") or () if item["type"] in SOURCES]
    shown = [shot for item in pictures[:_PICTURES] for shot in _shots(item, reader.limits)]
    if len(pictures) > _PICTURES:
        shown.append({"name": "", "jpeg": b"", "fault": f"and {len(pictures) - _PICTURES} more"})
    turns = [
        (message["role"], " ".join(item["text"] for item in items_of([message], "text"))[: 2 * _TEXT]) for message in messages
    ]
    return {"turns": turns, "pictures": shown}


def _shots(item: Mapping[str, Any], limits: MediaLimits) -> Iterator[dict[str, Any]]:
    """The small picture of a picture, of the first frame of a video, or of the first ones of a list of frames."""
    source = next((item[key] for key in SOURCES[item["type"]] if item.get(key) is not None), None)
    frames: list[Any] = list(source[:_FRAMES]) if isinstance(source, (list, tuple)) else [source]
    for frame in frames:
        name = describe_source(frame) if isinstance(frame, str) else "" if isinstance(frame, bytes) else str(frame)[:_COLUMN]
        try:
            if item["type"] == "video" and not isinstance(source, (list, tuple)):
                (found,), _ = decode_video(frame, choose=lambda _: np.zeros(1, int), limits=limits)
            else:
                found = frame if hasattr(frame, "thumbnail") else load_image(frame, limits)
            yield {"name": name, "jpeg": _jpeg(found), "fault": ""}
        except (InputError, JobError, OSError, ValueError, MemoryError) as error:
            yield {"name": name, "jpeg": b"", "fault": describe(error)[:_TEXT]}


def _jpeg(picture: Any) -> bytes:
    """A small JPEG of a picture, or of the pixels of one, uint8 (h, w, 3)."""
    from PIL import Image

    small = picture if hasattr(picture, "thumbnail") else Image.fromarray(picture)
    small = small.convert("RGB")
    small.thumbnail((_SIDE, _SIDE))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=_QUALITY)
    return buffer.getvalue()
