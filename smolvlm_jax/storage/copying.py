"""Files and directories to and from a store."""

import os
from collections.abc import Callable, Iterable
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import IO, Any

from .paths import RangedFile, StorePath
from .stores import Entry, store_of

__all__ = ["download", "download_tree", "upload", "upload_tree"]

_PIECE = 2**23
_TOGETHER = 8


def download(path: StorePath, file: IO[bytes] | str | os.PathLike, entry: Entry | None = None) -> None:
    """Copy an object into a file.

    Args:
        path: Of the object.
        file: Opened for writing, or a path.
        entry: What is known of the object; by default it is looked at first.

    Raises:
        OSError: ESTALE, if another object has taken its place meanwhile.
    """
    if isinstance(file, (str, os.PathLike)):
        with open(file, "wb") as opened:
            return download(path, opened, entry)
    source = RangedFile(path, entry)
    for start in range(0, source.entry.size, _PIECE):
        file.write(source.read_at(_PIECE, start, 0))
    return None


def upload(file: str | os.PathLike, path: StorePath) -> None:
    """Copy a file into an object, in pieces where it is large; the object appears whole.

    Args:
        file: The file.
        path: Of the object.

    Raises:
        OSError: the file cannot be read, or the store refuses it.
    """
    store_of(path.scheme).upload(file, path.bucket, path.key)


def download_tree(path: StorePath, folder: Path, wanted: Callable[[str], bool] = lambda name: True) -> list[str]:
    """Copy all objects below a place into a directory, which is made.

    Args:
        path: The place.
        folder: The directory.
        wanted: Whether an object is, by its name below the place.

    Returns:
        Their names.

    Raises:
        FileNotFoundError: there is none.
        OSError: the name of an object leads out of the directory.
    """
    entries = [entry for entry in path.entries() if wanted(entry.name)]
    if not entries:
        path.info()
        raise FileNotFoundError(f"nothing below {path}")
    root = os.path.realpath(folder)
    for entry in entries:
        target = os.path.realpath(folder / entry.name)
        if os.path.commonpath([root, target]) != root:
            raise OSError(f"{path / entry.name}: its name leads out of the directory that it is copied to")
        os.makedirs(os.path.dirname(target), exist_ok=True)
    _together(lambda entry: download(path / entry.name, folder / entry.name, entry), entries)
    return [entry.name for entry in entries]


def upload_tree(folder: Path, path: StorePath, last: Iterable[str] = ()) -> None:
    """Copy the files of a directory, and of those below it, into objects.

    Args:
        folder: The directory.
        path: The place.
        last: Names of files that are copied when all others are there, one after the other: what says that it is complete.
    """
    late = list(last)
    names = sorted(str(file.relative_to(folder).as_posix()) for file in folder.rglob("*") if file.is_file())
    _together(lambda name: upload(folder / name, path / name), [name for name in names if name not in late])
    for name in late:
        upload(folder / name, path / name)


def _together(work: Callable[[Any], Any], items: list) -> None:
    with ThreadPool(min(_TOGETHER, max(len(items), 1))) as pool:
        for _ in pool.imap_unordered(work, items):
            pass
