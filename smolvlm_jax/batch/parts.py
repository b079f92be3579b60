"""The rows of a part while it is in progress, in a working file of this runner's own.

Rows are appended in the order they finish. A runner that begins a part first takes over the finished rows of whoever worked
on it before; a torn last line is nobody's row. Two runners on one part do no harm: each has its own file, both arrive at the
same rows, and the one that finishes first gives the part its name.
"""

import json
import os
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..io import remove_dead, to_json, try_lock, unique_name
from .sinks import Sink

__all__ = ["Part", "clean_up", "part_name"]


def part_name(index: int) -> str:
    return f"part-{index:06d}"


class Part:
    """One unit's output in progress. done: positions that have their row."""

    @staticmethod
    def path_of(folder: Path, index: int, sink: Sink) -> Path:
        """The name of the whole part."""
        return folder / f"{part_name(index)}{sink.ending}"

    @classmethod
    def open(cls, folder: Path, index: int, sink: Sink) -> "Part | None":
        """The part, to be worked on; None if it is whole already."""
        return None if cls.path_of(folder, index, sink).exists() else cls(folder, index, sink)

    def __init__(self, folder: Path, index: int, sink: Sink):
        self.index, self._folder, self._sink = index, folder, sink
        self.path = self.path_of(folder, index, sink)
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
    def done(self):
        return self._offsets.keys()

    def add(self, position: int, row: dict[str, Any]) -> bool:
        """Append a row; False if the position has one already."""
        with self._lock:
            if position in self._offsets or self._file.closed:
                return False
            self._offsets[position] = self._file.tell()
            self._file.write(to_json([position, row]))
            return True

    def flush(self) -> None:
        """Hand what was appended to the system, which keeps it if this process is killed."""
        with self._lock:
            if not self._file.closed:
                self._file.flush()

    def finish(self) -> None:
        """All rows are here: write the part in the order of its input, and remove the working files."""
        with self._lock:
            self._file.flush()
            try:
                self._sink.write(self.path, self._rows())
            except OSError:
                # Another runner may have finished the part and removed our file from under us.
                if not self.path.exists():
                    raise
            self._file.close()
        self._own.unlink(missing_ok=True)
        remove_dead(list(self._folder.glob(f".{part_name(self.index)}.*.*")), foreign=True)

    def close(self) -> None:
        """Leave the part as it is, for another run."""
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
        with suppress(FileNotFoundError), open(path, "rb") as file:  # gone: its owner has finished meanwhile
            for line in file:
                try:
                    position, row = json.loads(line)
                    whole = line.endswith(b"\n") and isinstance(position, int) and "finish_reason" in row
                except (ValueError, TypeError):
                    continue
                if whole and self.add(position, row):
                    self.taken_over.append(row)


def clean_up(folder: Path, sink: Sink) -> None:
    """Remove what dead runners left of parts that are whole by now."""
    names = (path for path in folder.iterdir() if path.name.startswith(".part-"))
    remove_dead([path for path in names if (folder / f"{path.name.split('.')[1]}{sink.ending}").exists()], foreign=True)
