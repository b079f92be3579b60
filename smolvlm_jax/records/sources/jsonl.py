"""Lines of JSON: one record a line, found again by its byte offset."""

import functools
import io
import json
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import IO, Any, ClassVar, NamedTuple

from ...errors import ChangedError, InputError
from ...io import unique_pairs
from ..json_text import members
from .base import Row
from .files import FileSource
from .identity import Inputs
from .plain import plain

__all__ = ["JsonlSource", "LineSource", "Opened", "decode_json", "from_offset", "open_lines"]

# A longer line is taken for a file without line ends: it becomes one error row and is not held in memory.
MAX_LINE = 256 * 2**20
_BLOCK = 2**20
_MARK = b"\xef\xbb\xbf"


class Opened(NamedTuple):
    """A file to read lines from.

    Attributes:
        whole: Its plain contents.
        lines: Its lines, the same file where it has lines itself.
        original: The input where it is read itself, so that a change of it matters from byte to byte; None: copies are.
    """

    whole: IO[bytes]
    lines: IO[bytes]
    original: IO[bytes] | None

    def close(self) -> None:
        """Close all of them, which removes copies."""
        self.whole.close()
        self.lines.close()


def open_lines(
    kind: "type[LineSource]", inputs: Inputs, number: int, columns: Sequence[tuple[str, str]] | None = None
) -> Opened:
    """Open a file of lines, or one that is turned into such.

    Args:
        kind: Of the file.
        inputs: Where it is.
        number: Which of them it is.
        columns: As in `LineSource.converted`.

    Raises:
        InputError: if it cannot be unpacked or converted.
        ChangedError: if it is no longer what it was.
    """
    path, (file, copied) = inputs.paths[number], inputs.open_local(number)
    try:
        whole = plain(file, path, text=kind.text)
        lines = kind.converted(whole, path, columns)
        inputs.check(number, file)
    except BaseException:
        file.close()
        raise
    if whole is not file:
        file.close()
    return Opened(whole, whole if lines is None else lines, file if whole is file and not copied else None)


class LineSource(FileSource):
    """Files that hold a record in each line, as they are or once they are converted.

    Attributes:
        text: Whether the files are text, whose encoding matters.
    """

    text: ClassVar[bool] = True

    @staticmethod
    def converted(file: IO[bytes], path: str, columns: Sequence[tuple[str, str]] | None = None) -> IO[bytes] | None:
        """A temporary file with a line of JSON for each record; None where the plain file has those lines itself.

        Args:
            file: Plain (see plain.py), at its beginning.
            path: Its name, for messages.
            columns: What must be there, as in `open_source`; None: anything.
        """
        return None

    @staticmethod
    def completed(line: bytes, file: IO[bytes]) -> Any:
        """What is passed to `decode`: the line, or the data elsewhere in the plain file that it points to."""
        return line

    @staticmethod
    def glance(read: Any, names: Collection[str]) -> Mapping[str, Any]:
        return {} if read is None else members(read, names)

    def __init__(self, path: str, prompt: str | None = None, columns: tuple[tuple[str, str], ...] = ()):
        super().__init__(path, prompt, columns)
        self._copied: tuple[int, Opened] | None = None
        with self._open(0):
            pass  # what is wrong with the one file of most jobs is said before they begin

    @contextmanager
    def _open(self, number: int) -> Iterator[Opened]:
        """A file. What had to be copied stays open until that is so for another one."""
        if self._copied is not None and self._copied[0] == number:
            yield self._copied[1]
            return
        opened = open_lines(type(self), self.inputs, number, self.parse.columns)
        if opened.lines is opened.original:
            with opened.lines:
                yield opened
            return
        if self._copied is not None:
            self._copied[1].close()
        self._copied = (number, opened)
        yield opened

    def pieces(self, file: int, rows: int) -> Iterator[tuple[float, Callable[[], Iterator[Row]]]]:
        with self._open(file) as (_, lines, original):
            size = os.fstat(lines.fileno()).st_size
            offset, line = 0, 1
            while offset < size:
                end = _skip(lines, offset=offset, size=size, lines=rows)
                self.inputs.check(file, original)
                if end == offset:
                    raise ChangedError(f"the input {self.inputs.paths[file]} ends before the size that it has")
                yield (end - offset) / size, functools.partial(self._rows, file, start=offset, end=end, line=line)
                offset, line = end, line + rows

    def _rows(self, number: int, *, start: int, end: int, line: int) -> Iterator[Row]:
        """The lines of a file between two byte offsets. line: number of the first, from 1."""
        with self._open(number) as (whole, lines, original):
            file = from_offset(lines, start)
            place, position = start, 0
            while place < end:
                read = file.readline(MAX_LINE)
                place += len(read)
                complete = read.endswith(b"\n") or place >= end
                if not complete:
                    place += _rest_of_line(file)
                if start == 0 and position == 0:
                    read = read.removeprefix(_MARK)
                payload = self.completed(read, whole) if complete and read.strip() else None
                if original is not None:
                    self.inputs.check(number, original)
                if not read:
                    raise ChangedError(f"the input {self.inputs.paths[number]} ends before the size that it has")
                if payload is not None or not complete:
                    yield Row(position, (number, line + position, payload))
                position += 1
        self.inputs.check(number)


class JsonlSource(LineSource):
    """Files *.jsonl and *.ndjson, compressed or not. Blank lines are no records but count in the numbers of lines."""

    name = "jsonl"
    endings = (".jsonl", ".ndjson")
    beside_pictures = True

    @staticmethod
    def decode(number: int, read: Any) -> Any:
        if read is None:
            raise InputError(f"line {number} is longer than {MAX_LINE} bytes")
        return decode_json(f"line {number}", read)


def decode_json(place: str, text: bytes) -> Any:
    """The value of a JSON text in UTF-8. Raises InputError, in which `place` says where it stands."""
    try:
        return json.loads(text.decode("utf-8"), object_pairs_hook=unique_pairs)
    except UnicodeDecodeError as error:
        raise InputError(f"{place} is not valid UTF-8: {error.reason} at byte {error.start}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{place} is not valid JSON: {error}") from error


def from_offset(file: IO[bytes], offset: int = 0) -> io.BufferedReader:
    """An opened file from an offset on, with a position of its own: several may read one file."""
    return io.BufferedReader(_Reader(file, offset), _BLOCK)


class _Reader(io.RawIOBase):
    def __init__(self, file: IO[bytes], offset: int):
        self._descriptor, self._offset = file.fileno(), offset

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        read = os.pread(self._descriptor, len(buffer), self._offset)
        buffer[: len(read)] = read
        self._offset += len(read)
        return len(read)


def _rest_of_line(file: IO[bytes]) -> int:
    """Skip to the end of a line; returns the number of bytes."""
    count = 0
    while more := file.readline(_BLOCK):
        count += len(more)
        if more.endswith(b"\n"):
            break
    return count


def _skip(file: IO[bytes], *, offset: int, size: int, lines: int) -> int:
    """The offset after `lines` more line ends, or the end of the file. Reads in blocks and looks for nothing but line ends."""
    while offset < size:
        block = os.pread(file.fileno(), min(_BLOCK, size - offset), offset)
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
