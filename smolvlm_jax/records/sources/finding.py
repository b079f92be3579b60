"""Finding the files of an input: at a path, in a directory or by a glob, on the machine or in an object store."""

import fnmatch
import glob
import os
import re
from collections.abc import Iterator

from ...errors import InputError
from ...storage import Entry, StorePath, is_store, place
from .plain import ending_of

__all__ = ["absolute", "files_in", "folder_of", "kinds_in", "matches", "objects_in", "require_input", "split", "takes_in"]

_MAGIC = re.compile(r"[*?\[]")


def absolute(folder: str) -> str:
    """The absolute path of a directory; a URL as it is."""
    return folder if is_store(folder) else os.path.abspath(folder)


def folder_of(path: str) -> str:
    """Where the relative paths in a file start from."""
    return str(StorePath.of(path).parent) if is_store(path) else os.path.dirname(os.path.abspath(path))


def require_input(path: str) -> None:
    """Make sure that there is something at a path, or that it is a glob.

    Raises:
        InputError: if not, or if what is there cannot be read twice, or must not be read.
    """
    where = place(path)
    try:
        if not where.exists() and not _MAGIC.search(path):
            raise InputError(f"no input {path!r}: no such file or directory; a glob has one of * ? [ in it")
        if isinstance(where, StorePath):
            return
        if where.exists() and not (where.is_file() or where.is_dir()):
            raise InputError(
                f"{path!r} is no file and no directory: a pipe or a device cannot be read again after an interruption"
            )
    except PermissionError as error:
        raise InputError(f"the input {path} cannot be read: {error.strerror}") from error


def kinds_in(path: str) -> list[str] | None:
    """Of each kind of name in a directory one, to tell what it holds; None for what is no directory."""
    if not place(path).is_dir():
        return None
    if not is_store(path):
        with os.scandir(path) as entries:
            return [entry.name for entry in entries]
    kinds: dict[tuple, str] = {}
    for entry in StorePath.of(path).iterdir():
        kinds.setdefault((ending_of(entry.name), os.path.splitext(entry.name)[1], entry.name[:1] in "._"), entry.name)
    return list(kinds.values())


def files_in(path: str) -> tuple[list[tuple[str, str]], bool]:
    """The files at a file, directory or glob.

    Returns:
        ((name, path) of each, sorted by name; whether it is a whole directory, of which only the files right in it are given).
    """
    where = place(path)
    if where.is_file():
        return [(where.name, path)], False
    if where.is_dir():
        files = [entry.name for entry in where.glob("*")] if isinstance(where, StorePath) else sorted(os.listdir(path))
        places = [(name, os.path.join(path, name)) for name in files]
        return [(name, found) for name, found in places if isinstance(where, StorePath) or os.path.isfile(found)], True
    if isinstance(where, StorePath):
        folder, pattern = split(path)
        below = [entry.name for entry in objects_in(folder, pattern) if matches(tuple(entry.name.split("/")), pattern or ())]
        paths = sorted(os.path.join(folder, name) for name in below)
    else:
        paths = sorted(p for p in glob.glob(path, recursive=True) if os.path.isfile(p))
    base = os.path.commonpath([os.path.dirname(p) for p in paths]) if paths else ""
    return [(os.path.relpath(p, base or "."), p) for p in paths], False


def split(path: str) -> tuple[str, tuple[str, ...] | None]:
    """(folder, the glob's parts below it; None for a whole directory)."""
    where = place(path)
    if where.is_dir():
        return path, None
    if where.is_file():
        return str(where.parent), (glob.escape(where.name),)
    parts = path.split("/")
    first = next(number for number, part in enumerate(parts) if any(c in part for c in "*?["))
    folder = "/".join(parts[:first]) or ("/" if path.startswith("/") else ".")
    if not place(folder).is_dir():
        raise InputError(f"no directory {folder!r}, so nothing matches {path!r}")
    return folder, tuple(parts[first:])


def objects_in(folder: str, pattern: tuple[str, ...] | None) -> Iterator[Entry]:
    """The objects of a store below a place among which those are that a glob matches, a page of them in memory at a time.
    Names with a part that begins with a dot are left out."""
    first = "" if pattern is None else pattern[0]
    magic = _MAGIC.search(first)
    start = first[: magic.start()] if magic else first
    flat = pattern is not None and len(pattern) == 1 and first != "**"
    for entry in StorePath.of(folder).entries(start, deep=not flat):
        if not any(part.startswith(".") for part in entry.name.split("/")):
            yield entry


def takes_in(path: str, file: str, *, deep: bool = False) -> bool:
    """Whether a file, which need not exist, would be one of those at a directory or glob, as far as its place tells. deep: of a
    directory, what is anywhere below it is read too."""
    if is_store(path) != is_store(file) or place(path).is_file():
        return False
    folder, pattern = split(path)
    if is_store(path):
        below = StorePath.of(file).below(StorePath.of(folder))
        parts = tuple(below.split("/")) if below else ("..",)
    else:
        parts = tuple(os.path.relpath(os.path.realpath(file), os.path.realpath(folder)).split(os.sep))
    if pattern is None:
        return parts[0] != ".." and (deep or len(parts) == 1)
    return matches(parts, pattern)


def matches(parts: tuple[str, ...], pattern: tuple[str, ...]) -> bool:
    """As glob matches, part by part; ** is any number of directories."""
    if not pattern:
        return not parts
    if pattern[0] == "**":
        return any(matches(parts[skip:], pattern[1:] or ("*",)) for skip in range(len(parts)))
    return bool(parts) and fnmatch.fnmatchcase(parts[0], pattern[0]) and matches(parts[1:], pattern[1:])
