"""A directory, glob or file of pictures, videos and PDFs, each a record with the job's prompt; its name is its id. Of a PDF
each page is a record, and its id is the name of the file and its number: `report.pdf#3`.

A million names need not fit in memory: they are sorted in a temporary database on disk, which is removed with its connection.
"""

import contextlib
import functools
import hashlib
import math
import os
import sqlite3
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from ...errors import InputError, JobError
from ...io import Identity
from ...processing.pdf import PdfPage
from ...processing.pdf_count import PageCounter
from ...storage import is_store
from ..kinds import HEIF, PDFS, PICTURES, VIDEOS, is_media
from ..record import Record
from .base import Row, Source, Unit
from .finding import absolute, matches, objects_in, split
from .identity import check
from .plain import ending_of

__all__ = ["MediaSource", "counted"]

_FIELDS = ", ".join(Identity._fields)


# The bytes of a name, and the number of a page of a PDF, from 1. It is 0 for the whole of a file: of any other kind, and of a
# PDF whose pages cannot be counted.
_Place = tuple[bytes, int]


@dataclass(frozen=True)
class _Parse:
    """A file, or a page of one, to a record. The ending tells videos and PDFs; any other file that a glob matches is a
    picture."""

    folder: str
    prompt: str

    def __call__(self, place: _Place) -> Record:
        name, page = place
        path = os.path.join(self.folder, os.fsdecode(name))
        if path.lower().endswith(PDFS):
            item: dict[str, Any] = {"type": "image", "image": PdfPage(path, page)}
        else:
            item = {"type": "video" if path.lower().endswith(VIDEOS) else "image", "path": path}
        return Record(self.identify(place), [{"role": "user", "content": [item, {"type": "text", "text": self.prompt}]}])

    def identify(self, place: _Place) -> str:
        """As in Parser. A name that is not UTF-8 could be written to no output."""
        name, page = place
        return name.decode("utf-8", "backslashreplace") + (f"#{page}" if page else "")


class MediaSource(Source):
    """Of a directory, the pictures, videos and PDFs below it, by their endings; of a glob, every file that it matches.

    Names that begin with a dot are left out, and links to directories are not followed.

    Attributes:
        plausible: Whether any of the files may be a picture, a video or a PDF, by its name.

    Raises:
        MissingExtraError: if there is a PDF, and nothing that reads it.
    """

    name = "media"

    def __init__(self, path: str, prompt: str | None = None, columns: tuple[tuple[str, str], ...] = ()):
        if prompt is None:
            raise InputError(f"{path!r} holds pictures, videos or PDFs, so the job needs a question for them: --prompt")
        if columns:
            raise InputError(f"{path!r} holds pictures, videos or PDFs, which have no columns to rename")
        self._folder, pattern = split(path)
        self.parse = _Parse(absolute(self._folder), prompt)
        self.unread = Counter()
        self.plausible = False
        self.media: set[str] = set()
        self._pattern = pattern
        self._under_way: dict[_Place, Identity] = {}  # from the reading of a row to the check of its file
        self._digest, self._count, self._bytes = hashlib.blake2b(digest_size=16), 0, 0
        try:
            self._sort(_walk(self._folder, pattern, self.unread))
        except sqlite3.Error as error:
            raise JobError(
                f"the names in {path!r} cannot be sorted in a temporary file ({error}): make room for it, or set TMPDIR "
                "to where there is some"
            ) from error
        if not self._count:
            others = f"; it has {counted(self.unread)}" if self.unread else ""
            raise InputError(
                f"no picture and no video in {path!r}, and no PDF{others}: name a file, directory or glob that has one"
            )

    def _sort(self, found: Iterable[tuple[bytes, Identity]]) -> None:
        self._database = sqlite3.connect("", check_same_thread=False)
        self._database.execute(f"CREATE TABLE found (name BLOB PRIMARY KEY, {_FIELDS}) WITHOUT ROWID")
        rows = ((name, *map(str, identity)) for name, identity in found)
        self._database.executemany("INSERT OR IGNORE INTO found VALUES (?, ?, ?, ?, ?)", rows)
        self._database.execute(f"CREATE TABLE media (name BLOB, {_FIELDS}, page)")
        with PageCounter() as counter:
            sorted_names = self._database.execute(f"SELECT name, {_FIELDS} FROM found ORDER BY name")
            self._database.executemany(
                "INSERT INTO media VALUES (?, ?, ?, ?, ?, ?)",
                ((name, *identity, page) for name, *identity in sorted_names for page in self._pages(name, counter)),
            )
        self._database.execute("DROP TABLE found")
        for name, size, page in self._database.execute("SELECT name, size, page FROM media ORDER BY rowid"):
            self._digest.update(name + (b"\0%d#%d\n" % (int(size), page) if page else b"\0%d\n" % int(size)))
            self._count, self._bytes = self._count + 1, self._bytes + (int(size) if page < 2 else 0)
            self.plausible = self.plausible or is_media(os.fsdecode(name))
            self.media |= _kinds_of(os.fsdecode(name).lower())

    def _pages(self, name: bytes, counter: PageCounter) -> range:
        """The numbers of what are the records of a file."""
        path = os.path.join(self._folder, os.fsdecode(name))
        count = counter(path) if path.lower().endswith(PDFS) else 0
        return range(1, count + 1) if count else range(1)

    @classmethod
    def claims(cls, path: str, names: Collection[str] | None) -> bool:
        return True

    def describe(self) -> dict[str, Any]:
        names = self._digest.hexdigest()
        return {"source": self.name, "count": self._count, "bytes": self._bytes, "names and sizes": names}

    def units(self, shard_size: int) -> Iterator[Unit]:
        for index, start in enumerate(range(0, self._count, shard_size)):
            share = min(shard_size, self._count - start) / self._count
            yield Unit(index, share, functools.partial(self._rows, start=start, count=shard_size))

    def added(self) -> list[str]:
        with contextlib.suppress(OSError, sqlite3.Error):  # of a directory that is gone by now, or a full disk
            self._database.execute("CREATE TEMPORARY TABLE IF NOT EXISTS now (name BLOB PRIMARY KEY) WITHOUT ROWID")
            self._database.execute("DELETE FROM now")
            names = ((name,) for name, _ in _walk(self._folder, self._pattern, Counter()))
            self._database.executemany("INSERT OR IGNORE INTO now VALUES (?)", names)
            found = self._database.execute("SELECT name FROM now EXCEPT SELECT name FROM media").fetchall()
            return [str(self.parse.identify((name, 0))) for (name,) in found]
        return []

    def _rows(self, *, start: int, count: int) -> Iterator[Row]:
        query = f"SELECT name, page, {_FIELDS} FROM media WHERE rowid > ? AND rowid <= ? ORDER BY rowid"
        found = self._database.execute(query, (start, start + count)).fetchall()
        for position, (name, page, *identity) in enumerate(found):
            self._under_way[name, page] = Identity(*map(int, identity))
            yield Row(position, (name, page))

    def check(self, payload: _Place) -> None:
        identity = self._under_way.pop(payload, None)
        if identity is not None:
            path = os.path.join(self._folder, os.fsdecode(payload[0]))
            check(identity, path, repr(path))


def _kinds_of(name: str) -> set[str]:
    """What a file shows, by its name in lower case."""
    if name.endswith(PDFS):
        return {"picture", "PDF"}
    return {"video"} if name.endswith(VIDEOS) else {"picture", "picture that is not of a PDF"}


def counted(endings: Counter[str]) -> str:
    """How many files have which ending, in words."""
    words = ", ".join(f"{count} {ending}" for ending, count in sorted(endings.items()))
    return words + (" (HEIF pictures are read with pip install 'smolvlm-jax[heif]')" if set(HEIF) & set(endings) else "")


def _walk(folder: str, pattern: tuple[str, ...] | None, unread: Counter[str]) -> Iterator[tuple[bytes, Identity]]:
    """(name below `folder`, what the file is) of what matches, in no order; one directory entry at a time.

    `unread` counts what a whole directory holds besides.
    """
    if is_store(folder):
        for found in objects_in(folder, pattern):
            if _wanted(tuple(found.name.split("/")), pattern):
                yield os.fsencode(found.name), Identity.of_object(found)
            elif pattern is None:
                unread[ending_of(found.name) or "without an ending"] += 1
        return
    waiting: list[tuple[str, ...]] = [()]
    deepest = math.inf if pattern is None or "**" in pattern else len(pattern)
    while waiting:
        parts = waiting.pop()
        with os.scandir(os.path.join(folder, *parts)) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                here = (*parts, entry.name)
                if entry.is_dir(follow_symlinks=False):
                    if len(here) < deepest:
                        waiting.append(here)
                elif _is_file(entry) and _wanted(here, pattern):
                    yield os.fsencode("/".join(here)), Identity.of(entry.path)
                elif pattern is None:
                    unread[_kind(entry)] += 1


def _is_file(entry: os.DirEntry) -> bool:
    try:
        return entry.is_file()
    except OSError:  # links that lead to each other
        return False


def _kind(entry: os.DirEntry) -> str:
    """What is counted that is not read: an ending, in lower case."""
    if not _is_file(entry):
        return "links to directories" if os.path.isdir(entry) else "no files"
    return ending_of(entry.name) or "without an ending"


def _wanted(parts: tuple[str, ...], pattern: tuple[str, ...] | None) -> bool:
    if pattern is None:
        return parts[-1].lower().endswith((*PICTURES, *VIDEOS, *PDFS))
    return matches(parts, pattern)
