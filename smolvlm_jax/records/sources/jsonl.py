"""JSON lines: one record a line, found again by its byte offset."""

import functools
import json
from collections.abc import Callable, Iterator
from typing import IO, Any

from ...errors import InputError
from .base import Row
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

    def pieces(self, file: int, rows: int) -> Iterator[tuple[int, int, Callable[[], Iterator[Row]]]]:
        offset, line, size = 0, 1, self.lengths[file]
        with open(self._paths[file], "rb", buffering=0) as opened:
            while offset < size:
                end = _skip(opened, offset=offset, size=size, lines=rows)
                yield offset, end, functools.partial(self._rows, file, start=offset, end=end, line=line)
                offset, line = end, line + rows

    def _rows(self, number: int, *, start: int, end: int, line: int) -> Iterator[Row]:
        """The lines of a file between two byte offsets. line: number of the first, from 1."""
        with open(self._paths[number], "rb", buffering=_BLOCK) as file:
            file.seek(start)
            position = 0
            while file.tell() < end:
                read = file.readline(MAX_LINE)
                whole = complete = read.endswith(b"\n") or file.tell() >= end
                while not complete:
                    more = file.readline(_BLOCK)
                    complete = not more or more.endswith(b"\n")
                if start == 0 and position == 0:
                    read = read.removeprefix(b"\xef\xbb\xbf")
                if read.strip() or not whole:
                    yield Row(position, (number, line + position, read if whole else None))
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
