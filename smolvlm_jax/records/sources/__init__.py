"""Where records come from, one module per source.

A source cuts its input into units of `shard_size` rows, in an order that depends on nothing but the input, and yields each
row as a payload with as little work as possible, since one process reads for many workers. `parse`, which makes a Record of
a payload, runs in the workers. Files are checked at every reading (identity.py): one that changes while a job runs ends it.

To add a source, write a module with a subclass of Source and name it in SOURCES. A kind of file that can be turned into lines
of JSON is a subclass of LineSource, which training reads too.
"""

import os

from ...errors import InputError
from ...storage import place
from ..kinds import PDFS, PICTURES, VIDEOS, is_media
from .base import Row, Source, Unit
from .finding import kinds_in, require_input, takes_in
from .json_files import JsonSource
from .jsonl import JsonlSource, LineSource
from .media import MediaSource, counted
from .parquet import ParquetSource
from .plain import COMPRESSED
from .tables import TableSource
from .tar import TarSource

__all__ = ["LINES", "SOURCES", "Row", "Source", "Unit", "counted", "open_source", "takes_in"]

# Kinds of files of lines, and of files that are turned into such.
LINES: tuple[type[LineSource], ...] = (JsonlSource, JsonSource, TableSource, TarSource)
# The first that claims an input gets it; the last claims every input.
SOURCES: dict[str, type[Source]] = {
    source.name: source for source in (JsonlSource, ParquetSource, JsonSource, TableSource, TarSource, MediaSource)
}


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
        prompt: For records without a prompt of their own; an empty one is none.
        columns: Pairs (our name of a key, its name in the input).

    Raises:
        InputError: if there is no such input, nothing in it, no source of that name, or none for files of this kind.
        ChangedError: if a file changes while it is opened.
    """
    if name is not None and name not in SOURCES:
        raise InputError(f"no source {name!r}; it is one of {', '.join(SOURCES)}")
    path = os.fspath(path)
    require_input(path)
    names = None if name else kinds_in(path)
    kind = SOURCES[name] if name else next(kind for kind in SOURCES.values() if kind.claims(path, names))
    guessed = name is None and kind is MediaSource
    if guessed and names is None and place(path).is_file() and not is_media(path):
        raise InputError(f"{path!r} is of a kind that is not read. These are: {_kinds()}")
    source = kind(path, prompt or None, columns)
    if guessed and isinstance(source, MediaSource) and not source.plausible:
        raise InputError(f"all that {path!r} matches is of kinds that are not read. These are: {_kinds()}")
    return source


def _kinds() -> str:
    lines = "; ".join(f"{kind.name} ({', '.join(kind.endings)})" for kind in LINES)
    return (
        f"{lines}, each also with {', '.join(COMPRESSED)}; parquet ({', '.join(ParquetSource.endings)}); media, that is "
        f"pictures ({', '.join(PICTURES)}), videos ({', '.join(VIDEOS)}) and PDFs ({', '.join(PDFS)}). If it is one of these "
        "under another name, say so with --source"
    )
