"""The rows of a part in progress, in a working file that belongs to this process alone (journal.py).

Rows are appended in the order in which they finish, and a row counts once the operating system has all of its bytes. A process
that begins a part first copies the finished rows from working files that earlier runs of the same job left; incomplete rows
there are ignored. Two processes on one part do no harm: each has its own file, both compute the same rows, and the one that
finishes first names the part.
"""

import errno
import json
import os
import threading
from collections.abc import Iterable, Iterator, KeysView
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..errors import UnreachableError
from ..io import errors_name, remove_dead, to_json
from ..storage import AnyPath, StorePath
from .bucket import is_ours
from .journal import open_journal
from .sinks import Sink

__all__ = ["Part", "clean_up", "part_name"]


def part_name(index: int) -> str:
    return f"part-{index:06d}"


class Part:
    """The output of one unit, in progress.

    Args:
        folder: Of the output.
        index: Number of the unit.
        sink: Writes the part when it is complete.
        key: Of the job. Working files of other jobs are left alone.

    Attributes:
        path: Of the complete part.
        row_share: The share of the job that one of its rows is, an estimate until all rows have been read.
        expected: Number of its rows; None until all have been read.
        taken_over: Rows of earlier runs that were copied, by their positions.
    """

    @staticmethod
    def path_of(folder: AnyPath, index: int, sink: Sink) -> AnyPath:
        """Where the complete part is written."""
        return folder / f"{part_name(index)}{sink.ending}"

    @classmethod
    def open(cls, folder: AnyPath, index: int, sink: Sink, key: str = "") -> "Part | None":
        """The part, to be worked on; None if it is complete already."""
        path = cls.path_of(folder, index, sink)
        there = is_ours(path, key) if isinstance(path, StorePath) else path.exists()
        return None if there else cls(folder, index, sink, key)

    def __init__(self, folder: AnyPath, index: int, sink: Sink, key: str = ""):
        self.index, self._folder, self._sink, self._key = index, folder, sink, key
        self.path = self.path_of(folder, index, sink)
        self.row_share = 0.0
        self.expected: int | None = None
        self._offsets: dict[int, int] = {}
        self._end = 0
        self._lock = threading.Lock()
        prefix = f".{part_name(index)}.{key}." if key else f".{part_name(index)}."
        self._journal = open_journal(folder, prefix)
        self._file = self._journal.file
        if isinstance(folder, Path):
            remove_dead(folder.glob(f".{self.path.name}.*.tmp"))
        self.taken_over: dict[int, dict[str, Any]] = {}
        try:
            for line in self._journal.lines():
                if (found := self._row(line)) is not None and self._append(*found):
                    self.taken_over[found[0]] = found[1]
            self._journal.taken_over(self._end)
        except BaseException:
            self.discard()
            raise

    @property
    def done(self) -> KeysView[int]:
        """Positions that have their row."""
        return self._offsets.keys()

    def add(self, position: int, row: dict[str, Any]) -> bool:
        """Append a row. False, and nothing is done, if the position has one already or the part is closed.

        Raises:
            OSError: the row could not be written, and does not count.
            UnreachableError: rows before it could not be put into the store.
        """
        added = self._append(position, row)
        with self._lock:
            if not self._file.closed:
                self._journal.appended(self._end)
        return added

    def _append(self, position: int, row: dict[str, Any]) -> bool:
        line = to_json([position, row])
        with self._lock:
            if position in self._offsets or self._file.closed:
                return False
            self._write(line)
            self._offsets[position] = self._end
            self._end += len(line)
            return True

    def flush(self) -> None:
        """Have the disk keep the rows, through a power cut too."""
        with self._lock:
            if not self._file.closed:
                self._journal.flush(self._end)

    def forget(self, positions: Iterable[int]) -> None:
        """Drop rows: of positions that the unit does not have."""
        with self._lock:
            for position in positions:
                del self._offsets[position]

    def finish(self) -> None:
        """Write the part, whose rows are all here, in the order of its input, and remove the working files."""
        with self._lock:
            try:
                self._sink.write(self.path, self._rows(), self._key)
            except BaseException as error:
                # Another process may have finished the part and removed our working file.
                if not (isinstance(error, OSError) and self.path.exists()):
                    with suppress(OSError, UnreachableError):
                        self._journal.flush(self._end)
                    self._file.close()
                    raise
            self._journal.remove()
        remove_dead(list(self._folder.glob(f".{part_name(self.index)}.*.*")), foreign=True)

    def close(self) -> None:
        """Write finished rows to the disk and stop, for another run to continue. What the disk refuses is computed again."""
        with suppress(OSError, UnreachableError):
            self.flush()
        with self._lock:
            self._file.close()

    def discard(self) -> None:
        """Stop, and leave nothing behind."""
        with self._lock:
            self._journal.remove()

    def _write(self, line: bytes) -> None:
        """Write behind the last row, all or nothing: a disk that fills up takes a part of what it is given."""
        try:
            with errors_name(Path(self._journal.name)):
                self._file.seek(self._end)
                left = memoryview(line)
                while left:
                    left = left[self._file.write(left) :]
                self._file.flush()
        except OSError:
            with suppress(OSError):
                self._file.truncate(self._end)
            raise

    def _rows(self) -> Iterator[dict[str, Any]]:
        with open(os.dup(self._file.fileno()), "rb") as file:  # buffered, as our own is not
            for position in sorted(self._offsets):
                file.seek(self._offsets[position])
                found = self._row(file.readline())
                if found is None or found[0] != position:
                    raise OSError(errno.EIO, "the file was changed by another program", self._journal.name)
                yield found[1]

    def _row(self, line: bytes) -> tuple[int, dict[str, Any]] | None:
        """(position, row) of a line of a working file; None if it is not the whole of one."""
        try:
            position, row = json.loads(line)
        except (ValueError, TypeError, RecursionError):
            return None
        columns = self._sink.columns
        whole = (
            line.endswith(b"\n") and type(position) is int and isinstance(row, dict) and tuple(row)[: len(columns)] == columns
        )
        return (position, row) if whole else None


def clean_up(folder: AnyPath, sink: Sink) -> None:
    """Remove working files that ended processes left of parts that are complete by now, and drafts of small files."""
    complete = {path.name for path in folder.glob("part-*")}
    working = folder.glob(".part-*")
    remove_dead([path for path in working if f"{path.name.split('.')[1]}{sink.ending}" in complete], foreign=True)
    remove_dead(folder.glob("._*.tmp"))
