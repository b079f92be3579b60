"""What sources of data files share: finding the files, and a parser that knows their names and folders."""

import contextlib
import functools
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from ...errors import InputError, JobError
from ..kinds import PDFS, PICTURES, VIDEOS
from ..record import IDS, Record, id_from, record_from
from .base import Row, Source, Unit
from .finding import files_in, folder_of
from .identity import Inputs
from .plain import COMPRESSED, ending_of

__all__ = ["FileParser", "FileSource"]


@dataclass(frozen=True)
class FileParser:
    """(file number, line or row number from 1, what was read) to a record.

    Attributes:
        files: (name, folder) of each file. Relative paths of pictures start from the folder.
        prompt: For records without a prompt of their own.
        columns: Pairs (our name of a key, its name in the files).
        decode: (number, what was read) to a decoded record. Raises InputError, which becomes the record's error.
        glance: (what was read, names of keys) to those of them that are found without decoding the record.
    """

    files: tuple[tuple[str, str], ...]
    prompt: str | None
    columns: tuple[tuple[str, str], ...]
    decode: Callable[[int, Any], Any]
    glance: Callable[[Any, Collection[str]], Mapping[str, Any]]

    def __call__(self, payload: tuple[int, int, Any]) -> Record:
        file, number, read = payload
        default_id, folder = self._place(file, number), self.files[file][1]
        try:
            value = self.decode(number, read)
        except InputError as error:
            return Record(default_id, error=str(error))
        return record_from(value, default_id, folder=folder, prompt=self.prompt, columns=self.columns)

    def identify(self, payload: tuple[int, int, Any]) -> str | int:
        """As in Parser."""
        file, number, read = payload
        names = {*IDS, *(column for name, column in self.columns if name in IDS)}
        return id_from(self.glance(read, names), self._place(file, number), self.columns)

    def _place(self, file: int, number: int) -> str | int:
        return number if len(self.files) == 1 else f"{self.files[file][0]}:{number}"


class FileSource(Source):
    """A file, or the files of a directory or glob, one after the other by name.

    Attributes:
        endings: Of the files' names, in lower case. Those of compressed files may follow.
        compressed: Whether such files are read.
        beside_pictures: Whether a directory is of this kind that holds pictures, videos or PDFs too.
        inputs: The files, which are checked at every reading, and all of them when the last unit has been asked for.
    """

    endings: ClassVar[tuple[str, ...]]
    parse: FileParser
    compressed: ClassVar[bool] = True
    beside_pictures: ClassVar[bool] = False

    def __init__(self, path: str, prompt: str | None = None, columns: tuple[tuple[str, str], ...] = ()):
        found, self.unread, self.beside = _data_files(path, self._wanted)
        if not found:
            endings = " or ".join(self.endings)
            raise InputError(f"nothing in {path!r}: no file that ends with {endings}{', compressed or not' * self.compressed}")
        self._path = path
        self.inputs = Inputs([place for _, place in found])
        self._names = [name for name, _ in found]
        files = tuple((name, folder_of(place)) for name, place in found)
        self.parse = FileParser(files, prompt, columns, type(self).decode, type(self).glance)

    @staticmethod
    @abstractmethod
    def decode(number: int, read: Any) -> Any:
        """A decoded record, as in FileParser."""

    @staticmethod
    @abstractmethod
    def glance(read: Any, names: Collection[str]) -> Mapping[str, Any]:
        """Some keys of a record that is not decoded, as in FileParser."""

    @abstractmethod
    def pieces(self, file: int, rows: int) -> Iterator[tuple[float, Callable[[], Iterator[Row]]]]:
        """(share of the file, rows) of the pieces with so many rows in which a file is read."""

    def units(self, shard_size: int) -> Iterator[Unit]:
        total = max(1, sum(self.inputs.sizes))
        pieces = ((size, piece) for file, size in enumerate(self.inputs.sizes) for piece in self.pieces(file, shard_size))
        with _during_the_job():
            for index, (size, (share, rows)) in enumerate(pieces):
                yield Unit(index, share * size / total, functools.partial(_rows, rows))
        self.inputs.check_all()

    def added(self) -> list[str]:
        with contextlib.suppress(OSError):  # of a directory that is gone by now
            return sorted({name for name, _ in _data_files(self._path, self._wanted)[0]}.difference(self._names))
        return []

    @classmethod
    def claims(cls, path: str, names: Collection[str] | None) -> bool:
        if names is None:
            return cls._fits(path)
        if not cls.beside_pictures and any(ending_of(name) in (*PICTURES, *VIDEOS, *PDFS) for name in names):
            return False
        return any(map(cls._wanted, names))

    def describe(self) -> dict[str, Any]:
        files = dict(zip(self._names, self.inputs.sizes, strict=True))
        return {"source": self.name, "files": files, "contents": self.inputs.fingerprint()}

    @classmethod
    def _fits(cls, name: str) -> bool:
        return ending_of(name) in cls.endings and (cls.compressed or not name.lower().endswith(COMPRESSED))

    @classmethod
    def _wanted(cls, name: str) -> bool:
        return cls._fits(name) and not name.startswith((".", "_"))


@contextlib.contextmanager
def _during_the_job() -> Iterator[None]:
    """Within the block, what is wrong with a file was not so when the job began."""
    try:
        yield
    except InputError as error:
        raise JobError(f"{error}; finished rows are kept") from error


def _rows(rows: Callable[[], Iterator[Row]]) -> Iterator[Row]:
    with _during_the_job():
        yield from rows()


def _data_files(path: str, wanted: Callable[[str], bool]) -> tuple[list[tuple[str, str]], Counter[str], list[str]]:
    """(name, path) of the files at a file, directory or glob, sorted by name, those of a directory by their ending; how many
    files of a directory are neither read nor pictures or videos, which records may name; and the names of these."""
    unread: Counter[str] = Counter()
    beside: list[str] = []
    files, whole = files_in(path)
    if not whole:
        return files, unread, beside
    found = []
    for name, place in files:
        if wanted(name):
            found.append((name, place))
        elif name.startswith((".", "_")):
            continue
        elif ending_of(name) in (*PICTURES, *VIDEOS):
            beside.append(name)
        else:
            unread[ending_of(name) or "no ending"] += 1
    return found, unread, beside
