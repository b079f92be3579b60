"""The rows of a part in progress, in a working file that belongs to this process alone.

Rows are appended in the order in which they finish. A process that begins a part first copies the finished rows from working
files that earlier runs left; an incomplete last line is ignored. Two processes on one part do no harm: each has its own file,
both compute the same rows, and the one that finishes first names the part.
"""

import json
import os
import threading
from collections.abc import Iterator, KeysView
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..io import remove_dead, to_json, try_lock, unique_name
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

    Attributes:
        path: Of the complete part.
        row_share: The share of the job that one of its rows is, an estimate until all rows have been read.
        expected: Number of its rows; None until all have been read.
        taken_over: Rows of earlier runs that were copied.
    """

    @staticmethod
    def path_of(folder: Path, index: int, sink: Sink) -> Path:
        """Where the complete part is written."""
        return folder / f"{part_name(index)}{sink.ending}"

    @classmethod
    def open(cls, folder: Path, index: int, sink: Sink) -> "Part | None":
        """The part, to be worked on; None if it is complete already."""
        return None if cls.path_of(folder, index, sink).exists() else cls(folder, index, sink)

    def __init__(self, folder: Path, index: int, sink: Sink):
        self.index, self._folder, self._sink = index, folder, sink
        self.path = self.path_of(folder, index, sink)
        self.row_share = 0.0
        self.expected: int | None = None
        self._offsets: dict[int, int] = {}
        self._lock = threading.Lock()
        self._own = folder / f".{part_name(index)}.{unique_name()}.rows"
        others = [path for path in folder.glob(f".{part_name(index)}.*.rows") if path != self._own]
        self._file = open(self._own, "w+b")  # noqa: SIM115 (open as long as the part is)
        try_lock(self._file)
        remove_dead(folder.glob(f".{self.path.name}.*.tmp"))
        self.taken_over: list[dict[str, Any]] = []
        for other in others:
            self._take_over(other)
        if others:
            self._file.flush()
            os.fsync(self._file.fileno())
            remove_dead(others)

    @property
    def done(self) -> KeysView[int]:
        """Positions that have their row."""
        return self._offsets.keys()

    def add(self, position: int, row: dict[str, Any]) -> bool:
        """Append a row. False, and nothing is done, if the position has one already or the part is closed."""
        with self._lock:
            if position in self._offsets or self._file.closed:
                return False
            self._offsets[position] = self._file.tell()
            self._file.write(to_json([position, row]))
            return True

    def flush(self) -> None:
        """Pass appended rows to the operating system, which keeps them if this process is killed."""
        with self._lock:
            if not self._file.closed:
                self._file.flush()

    def finish(self) -> None:
        """Write the part, whose rows are all here, in the order of its input, and remove the working files."""
        with self._lock:
            self._file.flush()
            try:
                self._sink.write(self.path, self._rows())
            except OSError:
                # Another process may have finished the part and removed our working file.
                if not self.path.exists():
                    raise
            self._file.close()
        self._own.unlink(missing_ok=True)
        remove_dead(list(self._folder.glob(f".{part_name(self.index)}.*.*")), foreign=True)

    def close(self) -> None:
        """Write finished rows to the disk and stop, for another run to continue."""
        with self._lock:
            if not self._file.closed:
                self._file.flush()
                os.fsync(self._file.fileno())
                self._file.close()

    def _rows(self) -> Iterator[dict[str, Any]]:
        for position in sorted(self._offsets):
            self._file.seek(self._offsets[position])
            yield json.loads(self._file.readline())[1]

    def _take_over(self, path: Path) -> None:
        with suppress(FileNotFoundError), open(path, "rb") as file:  # its owner may have finished and removed it
            for line in file:
                try:
                    position, row = json.loads(line)
                    whole = line.endswith(b"\n") and isinstance(position, int) and "finish_reason" in row
                except (ValueError, TypeError):
                    continue
                if whole and self.add(position, row):
                    self.taken_over.append(row)


def clean_up(folder: Path, sink: Sink) -> None:
    """Remove working files that ended processes left of parts that are complete by now."""
    names = (path for path in folder.iterdir() if path.name.startswith(".part-"))
    remove_dead([path for path in names if (folder / f"{path.name.split('.')[1]}{sink.ending}").exists()], foreign=True)
