"""Where records come from, one module per source.

A source cuts its input into units of `shard_size` rows, in an order that depends on nothing but the input, and yields each
row as a payload with as little work as possible, since one process reads for many workers. `parse`, which makes a Record of
a payload, runs in the workers.

To add a source, write a module with a subclass of Source and name it in SOURCES.
"""

import os

from ...errors import InputError
from .base import Row, Source, Unit
from .jsonl import JsonlSource
from .media import MediaSource
from .parquet import ParquetSource

__all__ = ["SOURCES", "Row", "Source", "Unit", "open_source"]

# The first that claims an input gets it; the last claims every input.
SOURCES: dict[str, type[Source]] = {source.name: source for source in (JsonlSource, ParquetSource, MediaSource)}


def open_source(
    path: str | os.PathLike[str],
    name: str | None = None,
    *,
    prompt: str | None = None,
    columns: tuple[tuple[str, str], ...] = (),
) -> Source:
    """Open the input at `path`.

    Args:
        path: A file, directory or glob.
        name: One of SOURCES, by default the first that claims the path.
        prompt: For records without a prompt of their own.
        columns: Pairs (our name of a key, its name in the input).

    Raises:
        InputError: if there is no such input, nothing in it, or no source of that name.
    """
    if name is not None and name not in SOURCES:
        raise InputError(f"no source {name!r}; it is one of {', '.join(SOURCES)}")
    path = os.fspath(path)
    if not os.path.exists(path) and not any(c in path for c in "*?["):
        raise InputError(f"no input {path!r}: no such file or directory; a glob has one of * ? [ in it")
    kind = SOURCES[name] if name else next(kind for kind in SOURCES.values() if kind.claims(path))
    return kind(path, prompt, columns)
