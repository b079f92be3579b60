"""`StorePath`: what this package uses of pathlib.Path, over the objects of a bucket."""

import errno
import fnmatch
import io
import os
import posixpath
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from ..errors import InputError
from .stores import STORES, Entry, store_of

__all__ = ["URL", "RangedFile", "StorePath"]

URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://([^/]*)/?(.*)", re.DOTALL)
_MAGIC = re.compile(r"[*?\[]")
# Bytes that are read at once where less is asked for.
AHEAD = 2**18


@dataclass(frozen=True, order=True)
class StorePath:
    """A place in a bucket: that of an object, or of all objects whose keys begin with it and a slash.

    Methods that ask the store raise OSErrors of one line that name the URL, and UnreachableError.

    Attributes:
        scheme: Of the store.
        bucket: Name of the bucket.
        key: Without slashes at its ends; empty for the whole bucket.
    """

    scheme: str
    bucket: str
    key: str = ""

    @classmethod
    def of(cls, url: str) -> "StorePath":
        """The place that a URL names.

        Args:
            url: SCHEME://BUCKET/KEY.

        Returns:
            The place.

        Raises:
            InputError: the URL names no bucket, or its scheme is none of STORES.
        """
        found = URL.fullmatch(url)
        if found is None or found[1] not in STORES or not found[2]:
            raise InputError(f"{url!r:.300} names no bucket: it is SCHEME://BUCKET/KEY, with the scheme {' or '.join(STORES)}")
        return cls(found[1], found[2], found[3].strip("/"))

    def __str__(self) -> str:
        return f"{self.scheme}://{self.bucket}/{self.key}".rstrip("/")

    def __truediv__(self, name: str) -> "StorePath":
        return StorePath(self.scheme, self.bucket, f"{self.key}/{name}".strip("/"))

    @property
    def name(self) -> str:
        """What follows the last slash of the key."""
        return posixpath.basename(self.key)

    @property
    def stem(self) -> str:
        """The name without its ending."""
        return posixpath.splitext(self.name)[0]

    @property
    def suffix(self) -> str:
        """The ending of the name, with its dot; empty if there is none."""
        return posixpath.splitext(self.name)[1]

    @property
    def parent(self) -> "StorePath":
        """The place above."""
        return StorePath(self.scheme, self.bucket, posixpath.dirname(self.key))

    def with_name(self, name: str) -> "StorePath":
        """Another place beside this one.

        Args:
            name: Its name.

        Returns:
            The place.
        """
        return self.parent / name

    def joined(self, path: str) -> "StorePath":
        """The place of a relative path.

        Args:
            path: Relative to this place; `..` is the place above.

        Returns:
            The place.
        """
        return StorePath(self.scheme, self.bucket, posixpath.normpath(f"/{self.key}/{path}").strip("/"))

    def below(self, other: "StorePath") -> str | None:
        """This place as seen from another one.

        Args:
            other: The other place.

        Returns:
            The relative path; None if this place is not below the other.
        """
        start = f"{other.key}/".lstrip("/")
        same = (self.scheme, self.bucket) == (other.scheme, other.bucket) and self.key.startswith(start)
        return self.key[len(start) :] or None if same else None

    # ---- what is there

    def info(self) -> Entry:
        """What the store says of the object.

        Returns:
            Its name, size, tag and metadata.

        Raises:
            FileNotFoundError: there is no such object.
        """
        if not self.key:
            raise FileNotFoundError(errno.ENOENT, "a whole bucket is no object", str(self))
        return self._store.head(self.bucket, self.key)._replace(name=self.name)

    def is_file(self) -> bool:
        """Whether there is such an object.

        Returns:
            True if there is.
        """
        with suppress(FileNotFoundError):
            self.info()
            return True
        return False

    def is_dir(self) -> bool:
        """Whether there are objects below this place.

        Returns:
            True if there are.
        """
        with suppress(FileNotFoundError):
            return any(page for page in self._store.pages(self.bucket, f"{self.key}/".lstrip("/"), limit=1))
        return False

    def exists(self) -> bool:
        """Whether there is such an object, or objects below this place.

        Returns:
            True if there are.
        """
        return self.is_file() or self.is_dir()

    def is_symlink(self) -> bool:
        """Whether this is a link, which no store has.

        Returns:
            False.
        """
        return False

    def entries(self, start: str = "", deep: bool = True) -> Iterator[Entry]:
        """The objects below this place, by name; a page of them at a time is in memory.

        Args:
            start: What their names begin with.
            deep: Also those below places that are below this one.

        Returns:
            The objects, with their names below this place.
        """
        found = self._listed(start, "" if deep else "/")
        return (entry for entry in found if entry.tag and not entry.name.endswith("/"))

    def iterdir(self) -> Iterator["StorePath"]:
        """What is right below this place.

        Returns:
            Objects, and places that have objects below them.
        """
        return (self / entry.name for entry in self._listed("", "/") if entry.name.rstrip("/"))

    def glob(self, pattern: str) -> "Iterator[StorePath]":
        """The objects right below this place whose names match.

        Args:
            pattern: As `fnmatch` reads it.

        Yields:
            Their places.
        """
        magic = _MAGIC.search(pattern)
        for entry in self._listed(pattern[: magic.start()] if magic else pattern, "/"):
            if entry.tag and fnmatch.fnmatchcase(entry.name, pattern):
                yield self / entry.name

    def _listed(self, start: str, delimiter: str) -> Iterator[Entry]:
        above = f"{self.key}/".lstrip("/")
        for page in self._store.pages(self.bucket, above + start, delimiter):
            for entry in page:
                if entry.name != above:
                    yield entry._replace(name=entry.name[len(above) :])

    # ---- reading

    def read_bytes(self, start: int = 0, size: int | None = None) -> bytes:
        """What the object holds, or a part of it.

        Args:
            start: The first byte.
            size: How many bytes, at most; None: all that follow.

        Returns:
            The bytes, fewer than `size` at the object's end.

        Raises:
            FileNotFoundError: there is no such object.
        """
        return self._store.get(self.bucket, self.key, start, size)

    def open(self, mode: str = "rb") -> io.BufferedReader:
        """The object as a file that is read by ranges.

        Args:
            mode: "rb".

        Returns:
            The file.

        Raises:
            ValueError: another mode.
            FileNotFoundError: there is no such object.
        """
        if mode != "rb":
            raise ValueError(f"an object is opened for reading only, not as {mode!r}")
        return io.BufferedReader(RangedFile(self), AHEAD)

    # ---- writing

    def write_bytes(self, data: bytes, metadata: Mapping[str, str] | None = None) -> None:
        """Put an object there, in place of any other.

        Args:
            data: What it holds.
            metadata: Names, in lower case, and values that are kept with it.
        """
        self._store.put(self.bucket, self.key, data, metadata=metadata)

    def create(self, data: bytes, metadata: Mapping[str, str] | None = None) -> bool:
        """Put an object there unless there is one; of several processes one succeeds.

        Args:
            data: What it holds.
            metadata: As in `write_bytes`.

        Returns:
            False if there is one. It may be this process's own, if the answer to the put was lost.
        """
        return self._store.put(self.bucket, self.key, data, new=True, metadata=metadata)

    def touch(self) -> None:
        """Put an empty object there, in place of any other."""
        self.write_bytes(b"")

    def mkdir(self, mode: int = 0o777, parents: bool = False, exist_ok: bool = False) -> None:
        """Does nothing: a store has no directories.

        Args:
            mode: As in pathlib; not used.
            parents: Likewise.
            exist_ok: Likewise.
        """

    def unlink(self, missing_ok: bool = False) -> None:
        """Remove the object.

        Args:
            missing_ok: Not used: stores do not say whether there was one.
        """
        self._store.delete(self.bucket, [self.key])

    def rename(self, target: "StorePath") -> "StorePath":
        """Copy the object within its bucket, and remove it here.

        Args:
            target: Its new place.

        Returns:
            The new place.

        Raises:
            FileNotFoundError: there is no such object.
        """
        self._store.copy(self.bucket, self.key, target.key)
        self.unlink()
        return target

    @property
    def _store(self) -> Any:
        return store_of(self.scheme)


class RangedFile(io.RawIOBase):
    """An object that is read by ranges, all of one and the same contents.

    Args:
        path: Of the object.
        entry: What is known of it; by default it is looked at now.

    Raises:
        OSError: also of every reading: ESTALE, if another object has taken its place.
    """

    def __init__(self, path: StorePath, entry: Entry | None = None):
        self.path, self.entry = path, path.info() if entry is None else entry
        self._place = 0
        self._block, self._start = b"", 0

    def read_at(self, size: int, start: int, ahead: int = AHEAD) -> bytes:
        """Bytes of the object, wherever the file's own position is.

        Args:
            size: How many.
            start: The first of them.
            ahead: How many are fetched for it, at least.

        Returns:
            The bytes, fewer at the object's end.

        Raises:
            OSError: ESTALE, if another object has taken its place; EIO, if the store gives fewer bytes.
        """
        size = max(0, min(size, self.entry.size - start))
        if not self._start <= start <= start + size <= self._start + len(self._block):
            store = store_of(self.path.scheme)
            self._block = store.get(self.path.bucket, self.path.key, start, max(size, ahead), self.entry.tag) if size else b""
            self._start = start
            if len(self._block) < size:
                raise OSError(errno.EIO, f"the store gave {len(self._block)} of {size} bytes", str(self.path))
        return self._block[start - self._start :][:size]

    def readable(self) -> bool:
        """Whether it can be read.

        Returns:
            True.
        """
        return True

    def seekable(self) -> bool:
        """Whether its position can be set.

        Returns:
            True.
        """
        return True

    def tell(self) -> int:
        """The position.

        Returns:
            The number of the byte that is read next.
        """
        return self._place

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Set the position.

        Args:
            offset: In bytes.
            whence: What it is counted from: os.SEEK_SET, os.SEEK_CUR or os.SEEK_END.

        Returns:
            The new position.
        """
        self._place = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: self.entry.size}[whence]
        return self._place

    def readinto(self, buffer: Any) -> int:
        """Read from the position on, and move it.

        Args:
            buffer: Is filled; writable bytes.

        Returns:
            How many bytes were read; 0 at the end.

        Raises:
            OSError: as `read_at` does.
        """
        data = self.read_at(len(buffer), self._place)
        buffer[: len(data)] = data
        self._place += len(data)
        return len(data)
