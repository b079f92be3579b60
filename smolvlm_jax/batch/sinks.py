"""What the output looks like: one row per record, as JSONL or Parquet. A part appears under its name only when it is whole."""

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import IO, Any, ClassVar

from ..errors import InputError
from ..io import to_json, whole_file
from ..records.arrow import import_pyarrow

__all__ = ["COLUMNS", "SINKS", "Sink", "open_sink"]

# The schema of a row; `id` is a string in Parquet, and as it was given in JSONL.
COLUMNS = ("id", "text", "error", "finish_reason", "prompt_tokens", "new_tokens", "tiles", "seconds")
_GROUP = 1000


class Sink(ABC):
    """Rows to a file."""

    ending: ClassVar[str]

    def write(self, path: Path, rows: Iterable[dict[str, Any]]) -> None:
        """All rows of a part, in one atomic step."""
        with whole_file(path) as file:
            self._write(file, rows)

    @abstractmethod
    def _write(self, file: IO[bytes], rows: Iterable[dict[str, Any]]) -> None: ...

    @abstractmethod
    def read(self, path: Path) -> Iterator[dict[str, Any]]:
        """The rows of a finished part."""


class JsonlSink(Sink):
    ending = ".jsonl"

    def _write(self, file, rows):
        for row in rows:
            file.write(to_json(row))

    def read(self, path):
        with open(path, "rb") as file:
            yield from map(json.loads, file)


class ParquetSink(Sink):
    ending = ".parquet"

    def __init__(self):
        pa = import_pyarrow()
        kinds = {"prompt_tokens": pa.int32(), "new_tokens": pa.int32(), "tiles": pa.int32(), "seconds": pa.float64()}
        self._schema = pa.schema([(name, kinds.get(name, pa.string())) for name in COLUMNS])

    def _write(self, file, rows):
        pyarrow, rows = import_pyarrow(), iter(rows)
        with pyarrow.parquet.ParquetWriter(file, self._schema) as writer:
            while group := list(islice(rows, _GROUP)):
                group = [{**row, **{name: _utf8(row[name]) for name in ("id", "text", "error")}} for row in group]
                writer.write_table(pyarrow.Table.from_pylist(group, self._schema))

    def read(self, path):
        with import_pyarrow().parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(_GROUP):
                yield from batch.to_pylist()


SINKS: dict[str, type[Sink]] = {"jsonl": JsonlSink, "parquet": ParquetSink}


def open_sink(name: str) -> Sink:
    """The sink of that name. Raises InputError for an unknown one, MissingExtraError for Parquet without pyarrow."""
    if name not in SINKS:
        raise InputError(f"no output format {name!r}; it is one of {', '.join(SINKS)}")
    return SINKS[name]()


def _utf8(value: Any) -> str | None:
    return None if value is None else str(value).encode("utf-8", "backslashreplace").decode()
