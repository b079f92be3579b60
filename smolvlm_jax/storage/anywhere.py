"""Paths that may be local or in an object store."""

import os
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from ..errors import InputError
from .paths import URL, StorePath
from .stores import STORES, store_of

__all__ = ["AnyPath", "is_store", "place", "remove"]

AnyPath = Path | StorePath
_SCHEME_PARTS = {f"{name}:" for name in STORES}  # pathlib makes s3:/a of s3://a


def is_store(path: object) -> bool:
    """Whether a path, or the text of one, is in an object store.

    Args:
        path: Anything.

    Returns:
        True for a StorePath and for text that begins as a URL of a known store does.
    """
    return isinstance(path, StorePath) or (isinstance(path, str) and path.startswith(tuple(f"{name}://" for name in STORES)))


def place(path: str | os.PathLike | StorePath) -> AnyPath:
    """A StorePath for a URL of an object store, else a Path.

    Args:
        path: A path, the text of one, or a URL.

    Returns:
        The place.

    Raises:
        InputError: a URL of another kind, one that names no bucket, one that has lost a slash, as it does in a `pathlib.Path`,
            an empty name, or neither a string nor a path.
    """
    if isinstance(path, StorePath):
        return path
    if not isinstance(path, (str, os.PathLike)):
        raise InputError(f"{path!r:.60} is a {type(path).__name__}, and no name: pass a string or a path")
    text = os.fspath(path)
    if not text:
        raise InputError("an empty name is given, which would be the current directory: pass a path or a URL")
    if isinstance(text, str) and not isinstance(path, os.PathLike) and URL.fullmatch(text):
        return StorePath.of(text)
    found = Path(path)
    if found.parts and found.parts[0] in _SCHEME_PARTS and not Path(found.parts[0]).exists():
        url = found.as_posix().replace(":/", "://", 1)
        raise InputError(
            f"{found} would be in a directory named {found.parts[0]!r}: write {url}, as text and not as a pathlib.Path"
        )
    return found


def remove(paths: Iterable[StorePath]) -> None:
    """Remove objects, several at a time.

    Args:
        paths: Their places; one without an object is passed over.
    """
    buckets: dict[tuple[str, str], list[str]] = defaultdict(list)
    for path in paths:
        buckets[path.scheme, path.bucket].append(path.key)
    for (scheme, bucket), keys in buckets.items():
        store_of(scheme).delete(bucket, keys)
