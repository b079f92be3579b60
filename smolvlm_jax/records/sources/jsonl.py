"""JSON lines: one record a line, found again by its byte offset. Several files are read one after the other by name."""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ..record import Record
from .base import FileParser, Row, Source, Unit, data_files, holds

__all__ = ["JsonlSource"]

_ENDINGS = (".jsonl", ".ndjson")
# A line beyond this is no record but a file without line ends; it becomes one error row and is not held in memory.
MAX_LINE = 256 * 2**20
_BLOCK = 2**20


class _Parse(FileParser):
    """(file number, line number, line) to a record."""

    def __call__(self, payload: tuple[int, int, bytes | None]) -> Record:
        file, number, line = payload
        default = self.default_id(file, number)
        if line is None:
            return Record(default, error=f"line {number} is longer than {MAX_LINE} bytes")
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            return Record(default, error=f"line {number} is not valid JSON: {error}")
        return self.record(value, file, number)


class JsonlSource(Source):
    """A file, or the *.jsonl and *.ndjson files of a directory or glob. Blank lines are no records but keep their number."""

    name = "jsonl"

    def __init__(self, path: str, prompt: str | None = None, columns: tuple[tuple[str, str], ...] = ()):
        found = data_files(path, _ENDINGS)
        self._paths = [p for _, p in found]
        self._sizes = [os.path.getsize(p) for p in self._paths]
        self.parse = _Parse.of(found, prompt, columns)

    @classmethod
    def claims(cls, path: str) -> bool:
        return holds(path, _ENDINGS)

    def describe(self) -> dict[str, Any]:
        return {"source": self.name, "files": dict(zip(self.parse.names, self._sizes, strict=True))}

    def units(self, shard_size: int) -> Iterator[Unit]:
        index, total = 0, max(1, sum(self._sizes))
        for number, (path, size) in enumerate(zip(self._paths, self._sizes, strict=True)):
            offset, line = 0, 1
            with open(path, "rb", buffering=0) as file:
                while offset < size:
                    end = _skip(file, offset, size, shard_size)
                    yield Unit(index, (end - offset) / total, _Rows(path, number, offset, end, line))
                    index, offset, line = index + 1, end, line + shard_size


@dataclass(frozen=True)
class _Rows:
    """The lines between two offsets."""

    path: str
    file: int
    start: int
    end: int
    line: int

    def __call__(self) -> Iterator[Row]:
        with open(self.path, "rb", buffering=_BLOCK) as file:
            file.seek(self.start)
            position = 0
            while file.tell() < self.end:
                text = file.readline(MAX_LINE)
                whole = text.endswith(b"\n") or file.tell() >= self.end
                while not whole:
                    more = file.readline(_BLOCK)
                    whole = not more or more.endswith(b"\n")
                    text = None
                if text is not None and self.start == 0 and position == 0:
                    text = text.removeprefix(b"\xef\xbb\xbf")
                if text is None or text.strip():
                    yield Row(position, (self.file, self.line + position, text))
                position += 1


def _skip(file, offset: int, size: int, lines: int) -> int:
    """The offset after `lines` more line ends, or the end of the file, in blocks: a line end is all that is looked for."""
    file.seek(offset)
    while offset < size:
        block = file.read(min(_BLOCK, size - offset))
        if not block:
            return offset
        count = block.count(b"\n")
        if count < lines:
            lines, offset = lines - count, offset + len(block)
            continue
        place = -1
        for _ in range(lines):
            place = block.index(b"\n", place + 1)
        return offset + place + 1
    return size
