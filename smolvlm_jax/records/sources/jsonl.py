"""JSON lines: one record a line, found again by its byte offset."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Any

from ...errors import InputError
from .base import Row, Unit
from .files import FileSource

__all__ = ["JsonlSource"]

# A longer line is taken for a file without line ends: it becomes one error row and is not held in memory.
MAX_LINE = 256 * 2**20
_BLOCK = 2**20


def _decode(number: int, line: bytes | None) -> Any:
    if line is None:
        raise InputError(f"line {number} is longer than {MAX_LINE} bytes")
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"line {number} is not valid JSON: {error}") from error


class JsonlSource(FileSource):
    """Files *.jsonl and *.ndjson. Blank lines are no records but count in the numbers of lines."""

    name = "jsonl"
    endings = (".jsonl", ".ndjson")
    decode = _decode

    def units(self, shard_size: int) -> Iterator[Unit]:
        index, total = 0, max(1, sum(self._sizes.values()))
        for number, (path, size) in enumerate(zip(self._paths, self._sizes.values(), strict=True)):
            offset, line = 0, 1
            with open(path, "rb", buffering=0) as file:
                while offset < size:
                    end = _skip(file, offset=offset, size=size, lines=shard_size)
                    yield Unit(index, (end - offset) / total, _Rows(path, number, start=offset, end=end, line=line))
                    index, offset, line = index + 1, end, line + shard_size


@dataclass(frozen=True)
class _Rows:
    """The lines of a file between two byte offsets. line: number of the first, from 1."""

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
                line = file.readline(MAX_LINE)
                whole = complete = line.endswith(b"\n") or file.tell() >= self.end
                while not complete:
                    more = file.readline(_BLOCK)
                    complete = not more or more.endswith(b"\n")
                if self.start == 0 and position == 0:
                    line = line.removeprefix(b"\xef\xbb\xbf")
                if line.strip() or not whole:
                    yield Row(position, (self.file, self.line + position, line if whole else None))
                position += 1


def _skip(file: IO[bytes], *, offset: int, size: int, lines: int) -> int:
    """The offset after `lines` more line ends, or the end of the file. Reads in blocks and looks for nothing but line ends."""
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
