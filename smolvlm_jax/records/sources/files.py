"""What sources of data files share: finding the files, and a parser that knows their names and folders."""

import glob
import os
from abc import abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from ...errors import InputError
from ..record import Record, record_from
from .base import Row, Source, Unit

__all__ = ["FileParser", "FileSource"]


@dataclass(frozen=True)
class FileParser:
    """(file number, line or row number from 1, what was read) to a record.

    Attributes:
        files: (name, folder) of each file. Relative paths of pictures start from the folder.
        prompt: For records without a prompt of their own.
        columns: Pairs (our name of a key, its name in the files).
        decode: (number, what was read) to a decoded record. Raises InputError, which becomes the record's error.
    """

    files: tuple[tuple[str, str], ...]
    prompt: str | None
    columns: tuple[tuple[str, str], ...]
    decode: Callable[[int, Any], Any]

    def __call__(self, payload: tuple[int, int, Any]) -> Record:
        file, number, read = payload
        name, folder = self.files[file]
        default_id = number if len(self.files) == 1 else f"{name}:{number}"
        try:
            value = self.decode(number, read)
        except InputError as error:
            return Record(default_id, error=str(error))
        return record_from(value, default_id, folder=folder, prompt=self.prompt, columns=self.columns)


class FileSource(Source):
    """A file, or the files of a directory or glob, one after the other by name.

    Attributes:
        endings: Of the files' names, in lower case.
        decode: As in FileParser.
        lengths: Of the files, in bytes or what else `pieces` counts in.
    """

    endings: ClassVar[tuple[str, ...]]
    decode: ClassVar[Callable[[int, Any], Any]]

    def __init__(self, path: str, prompt: str | None = None, columns: tuple[tuple[str, str], ...] = ()):
        found = _data_files(path, self.endings)
        self._paths = [place for _, place in found]
        self._sizes = {name: os.path.getsize(place) for name, place in found}
        self.lengths = list(self._sizes.values())
        files = tuple((name, os.path.dirname(os.path.abspath(place))) for name, place in found)
        self.parse = FileParser(files, prompt, columns, type(self).decode)

    @abstractmethod
    def pieces(self, file: int, rows: int) -> Iterator[tuple[int, int, Callable[[], Iterator[Row]]]]:
        """(beginning, end, rows) of the pieces with so many rows in which a file is read."""

    def units(self, shard_size: int) -> Iterator[Unit]:
        total = max(1, sum(self.lengths))
        pieces = (piece for file in range(len(self.lengths)) for piece in self.pieces(file, shard_size))
        for index, (begin, end, rows) in enumerate(pieces):
            yield Unit(index, (end - begin) / total, rows)

    @classmethod
    def claims(cls, path: str) -> bool:
        if os.path.isdir(path):
            with os.scandir(path) as entries:
                return any(_wanted(entry.name, cls.endings) for entry in entries)
        return path.lower().endswith(cls.endings)

    def describe(self) -> dict[str, Any]:
        return {"source": self.name, "files": self._sizes}


def _data_files(path: str, endings: tuple[str, ...]) -> list[tuple[str, str]]:
    """(name, path) of the files at a file, directory or glob, sorted by name; those of a directory by their ending.

    Raises:
        InputError: if there is none.
    """
    if os.path.isfile(path):
        return [(os.path.basename(path), path)]
    if os.path.isdir(path):
        names = sorted(name for name in os.listdir(path) if _wanted(name, endings))
        found = [(name, os.path.join(path, name)) for name in names]
    else:
        paths = sorted(p for p in glob.glob(path, recursive=True) if os.path.isfile(p))
        base = os.path.commonpath([os.path.dirname(p) for p in paths]) if paths else ""
        found = [(os.path.relpath(p, base or "."), p) for p in paths]
    if not found:
        raise InputError(f"nothing in {path!r}: no file that ends with {' or '.join(endings)}")
    return found


def _wanted(name: str, endings: tuple[str, ...]) -> bool:
    return name.lower().endswith(endings) and not name.startswith((".", "_"))
