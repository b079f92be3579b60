"""The formats of the output: one row per record, as JSONL or Parquet."""

import io
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import IO, Any, ClassVar

from ..errors import InputError
from ..io import to_json, whole_file
from ..records.arrow import import_pyarrow, open_parquet
from ..storage import AnyPath, StorePath
from .arrow_columns import own_arrays, utf8
from .bucket import publish
from .logprobs import LOGPROBS
from .own import finite

__all__ = ["COLUMNS", "SINKS", "Sink", "open_sink"]

# Keys of every row, before those of --logprobs. An id that is a number is a string in Parquet.
COLUMNS = ("id", "text", "error", "finish_reason", "prompt_tokens", "new_tokens", "tiles", "seconds")
_GROUP = 1000


class Sink(ABC):
    """Writes and reads the rows of a part. ending: of its file name.

    Args:
        logprobs: What the job says of log-probabilities.

    Attributes:
        columns: Keys of every row, in order. The user's own may follow.
    """

    name: ClassVar[str]
    ending: ClassVar[str]

    def __init__(self, logprobs: str | None = None):
        self.columns = (*COLUMNS, *(LOGPROBS[logprobs] if logprobs else ()))

    @property
    def logprobs(self) -> tuple[str, ...]:
        """Of the columns those with log-probabilities."""
        return self.columns[len(COLUMNS) :]

    def write(self, path: AnyPath, rows: Iterable[dict[str, Any]], key: str = "") -> None:
        """Write all rows of a part atomically. key: of the job's manifest, which a part in an object store is marked with."""
        if isinstance(path, StorePath):
            buffer = io.BytesIO()
            self._write(buffer, rows)
            publish(path, buffer.getvalue(), key)
            return
        with whole_file(path) as file:
            self._write(file, rows)

    @abstractmethod
    def _write(self, file: IO[bytes], rows: Iterable[dict[str, Any]]) -> None: ...

    @abstractmethod
    def read(self, path: AnyPath) -> Iterator[dict[str, Any]]:
        """The rows of a complete part."""


class JsonlSink(Sink):
    """A line of JSON for each row."""

    name, ending = "jsonl", ".jsonl"

    def _write(self, file, rows):
        for row in rows:
            file.write(to_json(finite(row)))

    def read(self, path):
        with path.open("rb") as file:
            yield from map(json.loads, file)


class ParquetSink(Sink):
    """A Parquet file with row groups of 1,000 rows.

    Args:
        logprobs: As of every sink.
        own: The user's own columns and their types in Arrow.
    """

    name, ending = "parquet", ".parquet"

    def __init__(self, logprobs: str | None = None, own: Mapping[str, Any] | None = None):
        super().__init__(logprobs)
        pa, self._own = import_pyarrow(), dict(own or {})
        kinds = {"prompt_tokens": pa.int32(), "new_tokens": pa.int32(), "tiles": pa.int32(), "seconds": pa.float64()}
        kinds |= {"mean_logprob": pa.float32(), "min_logprob": pa.float32(), "token_logprobs": pa.list_(pa.float32())}
        self._schema = pa.schema([(name, kinds.get(name, pa.string())) for name in self.columns])
        self._whole = pa.schema([*self._schema, *self._own.items()])

    def _write(self, file, rows):
        pyarrow, rows = import_pyarrow(), iter(rows)
        with pyarrow.parquet.ParquetWriter(file, self._whole, write_page_checksum=True) as writer:
            while group := list(islice(rows, _GROUP)):
                own = own_arrays([{k: v for k, v in row.items() if k not in self.columns} for row in group], self._own)
                group = [{**row, **{name: utf8(row[name]) for name in ("id", "text", "error")}} for row in group]
                arrays = pyarrow.Table.from_pylist(group, self._schema).columns
                writer.write_table(pyarrow.Table.from_arrays([*arrays, *own], schema=self._whole))

    def read(self, path):
        with path.open("rb") as opened, open_parquet(opened) as file:
            for batch in file.iter_batches(_GROUP):
                yield from batch.to_pylist()


SINKS: dict[str, type[Sink]] = {sink.name: sink for sink in (JsonlSink, ParquetSink)}


def open_sink(name: str, logprobs: str | None = None, own: Mapping[str, Any] | None = None) -> Sink:
    """The sink of a format, for rows with the columns that `logprobs` adds.

    Args:
        name: Of the format.
        logprobs: What the job says of log-probabilities.
        own: For Parquet, the user's own columns and their types in Arrow.

    Raises:
        InputError: if there is no such format.
        MissingExtraError: for Parquet without pyarrow.
    """
    if name not in SINKS:
        raise InputError(f"no output format {name!r}; it is one of {', '.join(SINKS)}")
    return ParquetSink(logprobs, own) if name == ParquetSink.name else SINKS[name](logprobs)
