"""Parquet: one record a row, with pictures as bytes, paths or {"bytes", "path"} structs. Needs pyarrow."""

import os
from collections.abc import Iterator
from typing import Any

from ...errors import InputError, MissingExtraError
from ..record import FIELDS, Record
from .base import FileParser, Row, Source, Unit, data_files, holds

__all__ = ["ParquetSource", "import_pyarrow"]

_ENDINGS = (".parquet", ".pq")
_BATCH = 16  # rows decoded at once: a picture may have megabytes


def import_pyarrow():
    """pyarrow with its parquet module. Raises MissingExtraError."""
    try:
        import pyarrow.parquet

        return pyarrow
    except ImportError as error:
        raise MissingExtraError("Parquet", "parquet") from error


class _Parse(FileParser):
    """(file number, row number from 1, row) to a record."""

    def __call__(self, payload: tuple[int, int, dict | str]) -> Record:
        file, number, row = payload
        if isinstance(row, str):
            return Record(self.default_id(file, number), error=f"row {number} cannot be read: {row}")
        return self.record(row, file, number)


class ParquetSource(Source):
    """A file, or the *.parquet files of a directory or glob. Only columns that records are made of are read."""

    name = "parquet"

    def __init__(self, path: str, prompt: str | None = None, columns: tuple[tuple[str, str], ...] = ()):
        pyarrow = import_pyarrow()
        found = data_files(path, _ENDINGS)
        self._paths = [p for _, p in found]
        wanted = {*FIELDS, *(column for _, column in columns)}
        self._rows_of, self._columns = [], []
        for place in self._paths:
            try:
                with pyarrow.parquet.ParquetFile(place) as file:
                    self._rows_of.append(file.metadata.num_rows)
                    here = file.schema_arrow.names
            except (pyarrow.ArrowException, OSError) as error:
                raise InputError(f"{place!r} is no Parquet file that can be read: {error}") from error
            for name, column in columns:
                if column not in here:
                    raise InputError(f"{place!r} has no column {column!r} for {name!r}; it has {', '.join(here)}")
            self._columns.append([column for column in here if column in wanted])
            if not self._columns[-1]:
                raise InputError(
                    f"{place!r} has none of the columns messages, prompt, image, images, video, videos; it has "
                    f"{', '.join(here)}: say which is which with --column image=NAME"
                )
        self.parse = _Parse.of(found, prompt, columns)

    @classmethod
    def claims(cls, path: str) -> bool:
        return holds(path, _ENDINGS)

    def describe(self) -> dict[str, Any]:
        sizes = (os.path.getsize(path) for path in self._paths)
        return {"source": self.name, "files": dict(zip(self.parse.names, sizes, strict=True))}

    def units(self, shard_size: int) -> Iterator[Unit]:
        index, total = 0, max(1, sum(self._rows_of))
        for number, rows in enumerate(self._rows_of):
            for start in range(0, rows, shard_size):
                stop = min(rows, start + shard_size)
                read = lambda number=number, start=start, stop=stop: self._rows(number, start, stop)
                yield Unit(index, (stop - start) / total, read)
                index += 1

    def _rows(self, number: int, start: int, stop: int) -> Iterator[Row]:
        """Rows start to stop of a file. Where the file is damaged, the rows that cannot be read say so."""
        place, error = start, None
        try:
            for row in self._read(number, start, stop):
                yield Row(place - start, (number, place + 1, row))
                place += 1
        except (import_pyarrow().ArrowException, OSError) as problem:
            error = str(problem)
        for missing in range(place, stop):
            yield Row(missing - start, (number, missing + 1, error or "the file ends before it"))

    def _read(self, number: int, start: int, stop: int) -> Iterator[dict]:
        """The row groups that hold the rows, a few rows decoded at a time."""
        parquet = import_pyarrow().parquet
        with parquet.ParquetFile(self._paths[number], pre_buffer=False, buffer_size=2**20) as file:
            first, groups, here = 0, [], None
            for group in range(file.metadata.num_row_groups):
                count = file.metadata.row_group(group).num_rows
                if first < stop and first + count > start:
                    groups.append(group)
                    here = first if here is None else here
                first += count
            for batch in file.iter_batches(_BATCH, row_groups=groups, columns=self._columns[number], use_threads=False):
                low, high = max(start - here, 0), min(stop - here, batch.num_rows)
                if low < high:
                    yield from batch.slice(low, high - low).to_pylist()
                here += batch.num_rows
                if here >= stop:
                    return
