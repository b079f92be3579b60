"""`StorePath`: what this package uses of pathlib.Path, over the objects of a bucket."""

import errno
import fnmatch
import io
import os
import posixpath
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from ..errors import InputError
from .stores import STORES, Entry, store_of

__all__ = ["AnyPath", "RangedFile", "StorePath", "is_store", "place", "remove"]

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://([^/]*)/?(.*)", re.DOTALL)
_MAGIC = re.compile(r"[*?\[]")
# Bytes that are read at once where less is asked for.
AHEAD = 2**18


def is_store(path: object) -> bool:
    """Whether a path, or the text of one, is in an object store."""
    return isinstance(path, StorePath) or (isinstance(path, str) and path.startswith(tuple(f"{name}://" for name in STORES)))


@dataclass(frozen=True, order=True)
class StorePath:
    """A place in a bucket: that of an object, or of all objects whose keys begin with it and a slash.

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
        """Of a URL. Raises InputError for what names no bucket."""
        found = _URL.fullmatch(url)
        if found is None or found[1] not in STORES or not found[2]:
            raise InputError(f"{url!r:.300} names no bucket: it is SCHEME://BUCKET/KEY, with the scheme {' or '.join(STORES)}")
        return cls(found[1], found[2], found[3].strip("/"))

    def __str__(self) -> str:
        return f"{self.scheme}://{self.bucket}/{self.key}".rstrip("/")

    def __truediv__(self, name: str) -> "StorePath":
        return StorePath(self.scheme, self.bucket, f"{self.key}/{name}".strip("/"))

    @property
    def name(self) -> str:
        return posixpath.basename(self.key)

    @property
    def stem(self) -> str:
        return posixpath.splitext(self.name)[0]

    @property
    def suffix(self) -> str:
        return posixpath.splitext(self.name)[1]

    @property
    def parent(self) -> "StorePath":
        return StorePath(self.scheme, self.bucket, posixpath.dirname(self.key))

    def with_name(self, name: str) -> "StorePath":
        return self.parent / name

    def joined(self, path: str) -> "StorePath":
        """The place of a relative path, in which `..` is the place above."""
        return StorePath(self.scheme, self.bucket, posixpath.normpath(f"/{self.key}/{path}").strip("/"))

    def below(self, other: "StorePath") -> str | None:
        """This place as seen from another one; None if it is not below that."""
        start = f"{other.key}/".lstrip("/")
        same = (self.scheme, self.bucket) == (other.scheme, other.bucket) and self.key.startswith(start)
        return self.key[len(start) :] or None if same else None

    # ---- what is there

    def info(self) -> Entry:
        """The object's size, tag and metadata. Raises FileNotFoundError."""
        if not self.key:
            raise FileNotFoundError(errno.ENOENT, "a whole bucket is no object", str(self))
        return self._store.head(self.bucket, self.key)._replace(name=self.name)

    def is_file(self) -> bool:
        """Whether there is such an object."""
        with suppress(FileNotFoundError):
            self.info()
            return True
        return False

    def is_dir(self) -> bool:
        """Whether there are objects below it."""
        with suppress(FileNotFoundError):
            return any(page for page in self._store.pages(self.bucket, f"{self.key}/".lstrip("/"), limit=1))
        return False

    def exists(self) -> bool:
        return self.is_file() or self.is_dir()

    def is_symlink(self) -> bool:
        return False

    def entries(self, start: str = "", deep: bool = True) -> Iterator[Entry]:
        """Every object below this place whose name begins with `start`, by name; a page of them at a time is in memory.
        deep: also those below places that are below it."""
        found = self._listed(start, "" if deep else "/")
        return (entry for entry in found if entry.tag and not entry.name.endswith("/"))

    def iterdir(self) -> Iterator["StorePath"]:
        """The objects right below this place, and the places that have objects below them."""
        return (self / entry.name for entry in self._listed("", "/") if entry.name.rstrip("/"))

    def glob(self, pattern: str) -> "Iterator[StorePath]":
        """The objects right below this place whose names match."""
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
        """What the object holds, or at most `size` bytes of it from `start` on."""
        return self._store.get(self.bucket, self.key, start, size)

    def open(self, mode: str = "rb") -> io.BufferedReader:
        """The object, to be read by ranges."""
        if mode != "rb":
            raise ValueError(f"an object is opened for reading only, not as {mode!r}")
        return io.BufferedReader(RangedFile(self), AHEAD)

    # ---- writing

    def write_bytes(self, data: bytes, metadata: Mapping[str, str] | None = None) -> None:
        """Put an object there, in place of any other."""
        self._store.put(self.bucket, self.key, data, metadata=metadata)

    def create(self, data: bytes, metadata: Mapping[str, str] | None = None) -> bool:
        """Put an object there unless there is one; of several processes one succeeds.

        Returns:
            False if there is one. It may be this process's own, if the answer to the put was lost.
        """
        return self._store.put(self.bucket, self.key, data, new=True, metadata=metadata)

    def touch(self) -> None:
        self.write_bytes(b"")

    def mkdir(self, mode: int = 0o777, parents: bool = False, exist_ok: bool = False) -> None:
        """Nothing: there are no directories."""

    def unlink(self, missing_ok: bool = False) -> None:
        """Remove the object. missing_ok: stores do not say whether there was one."""
        self._store.delete(self.bucket, [self.key])

    def rename(self, target: "StorePath") -> "StorePath":
        """Copy the object within its bucket, and remove it. Raises FileNotFoundError."""
        self._store.copy(self.bucket, self.key, target.key)
        self.unlink()
        return target

    @property
    def _store(self) -> Any:
        return store_of(self.scheme)


AnyPath = Path | StorePath


def place(path: str | os.PathLike | StorePath) -> AnyPath:
    """A StorePath for a URL of an object store, else a Path.

    Raises:
        InputError: a URL of another kind, one that names no bucket, or neither a string nor a path.
    """
    if isinstance(path, StorePath):
        return path
    if not isinstance(path, (str, os.PathLike)):
        raise InputError(f"{path!r:.60} is a {type(path).__name__}, and no name: pass a string or a path")
    text = os.fspath(path)
    if isinstance(text, str) and not isinstance(path, os.PathLike) and _URL.fullmatch(text):
        return StorePath.of(text)
    return Path(path)


def in_store(path: object) -> TypeGuard[StorePath]:
    return isinstance(path, StorePath)


def remove(paths: Iterable[StorePath]) -> None:
    """Remove objects, several at a time; those that are not there are none."""
    buckets: dict[tuple[str, str], list[str]] = defaultdict(list)
    for path in paths:
        buckets[path.scheme, path.bucket].append(path.key)
    for (scheme, bucket), keys in buckets.items():
        store_of(scheme).delete(bucket, keys)


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
        """`size` bytes from `start` on, less at the end. ahead: how many are fetched for it, at least."""
        size = max(0, min(size, self.entry.size - start))
        if not self._start <= start <= start + size <= self._start + len(self._block):
            store = store_of(self.path.scheme)
            self._block = store.get(self.path.bucket, self.path.key, start, max(size, ahead), self.entry.tag) if size else b""
            self._start = start
            if len(self._block) < size:
                raise OSError(errno.EIO, f"the store gave {len(self._block)} of {size} bytes", str(self.path))
        return self._block[start - self._start :][:size]

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._place = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: self.entry.size}[whence]
        return self._place

    def readinto(self, buffer: Any) -> int:
        data = self.read_at(len(buffer), self._place)
        buffer[: len(data)] = data
        self._place += len(data)
        return len(data)
