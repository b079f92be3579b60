"""What a source is: units of rows in a fixed order, and a function from a row's payload to a record."""

import glob
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

from ...errors import InputError
from ..record import Record, record_from

__all__ = ["FileParser", "Row", "Source", "Unit", "data_files", "holds"]


@dataclass(frozen=True)
class Row:
    """position: in its unit, rising. payload: what the source's `parse` makes a record of; it can be pickled."""

    position: int
    payload: Any


@dataclass
class Unit:
    """At most `shard_size` rows, the unit of output. share: which part of the whole input it is, for the progress.

    rows(): the rows, read as they are taken. To be taken, if at all, before the next unit is asked for.
    """

    index: int
    share: float
    rows: Callable[[], Iterator[Row]] = field(repr=False)


@dataclass(frozen=True)
class FileParser:
    """What parsers of data files share: names and folders of the files, a prompt for all, which column is which field."""

    names: tuple[str, ...]
    folders: tuple[str, ...]
    prompt: str | None
    columns: tuple[tuple[str, str], ...]

    @classmethod
    def of(cls, found: list[tuple[str, str]], prompt: str | None, columns: tuple[tuple[str, str], ...]):
        """From `data_files`' answer; relative paths of pictures start from their file's folder."""
        folders = (os.path.dirname(os.path.abspath(path)) for _, path in found)
        return cls(tuple(name for name, _ in found), tuple(folders), prompt, columns)

    def default_id(self, file: int, number: int) -> int | str:
        """A missing id: the line's or row's number, of several files FILE:NUMBER."""
        return number if len(self.names) == 1 else f"{self.names[file]}:{number}"

    def record(self, value: Any, file: int, number: int) -> Record:
        return record_from(value, self.default_id(file, number), self.folders[file], self.prompt, self.columns)


class Source(ABC):
    """An input, opened. `parse` must be picklable: a function of its module, or an instance of a small class."""

    name: ClassVar[str]
    parse: Callable[[Any], Record]

    @classmethod
    @abstractmethod
    def claims(cls, path: str) -> bool:
        """Whether a file, directory or glob is of this kind, by its name or its contents' names."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Names and sizes for the manifest, as JSON. The same on every host, wherever the input is mounted."""

    @abstractmethod
    def units(self, shard_size: int) -> Iterator[Unit]:
        """The units in order, found as they are asked for."""


def data_files(path: str, endings: tuple[str, ...]) -> list[tuple[str, str]]:
    """(name, path) of the data files at a file, directory or glob, sorted by name; those of a directory by their ending.

    Raises InputError if there is none.
    """
    if os.path.isfile(path):
        return [(os.path.basename(path), path)]
    if os.path.isdir(path):
        names = sorted(n for n in os.listdir(path) if n.lower().endswith(endings) and not n.startswith((".", "_")))
        found = [(name, os.path.join(path, name)) for name in names]
    else:
        paths = sorted(p for p in glob.glob(path, recursive=True) if os.path.isfile(p))
        base = os.path.commonpath([os.path.dirname(p) for p in paths]) if paths else ""
        found = [(os.path.relpath(p, base or "."), p) for p in paths]
    if not found:
        raise InputError(f"nothing in {path!r}: no file that ends with {' or '.join(endings)}")
    return found


def holds(path: str, endings: tuple[str, ...]) -> bool:
    """Whether `path` is such a file, a glob for such files, or a directory with such a file in it."""
    if os.path.isdir(path):
        with os.scandir(path) as entries:
            return any(e.name.lower().endswith(endings) and not e.name.startswith((".", "_")) for e in entries)
    return path.lower().endswith(endings)
