"""Parquet: one record a row, with pictures as bytes, paths or {"bytes", "path"} structs. Needs pyarrow."""

import functools
import io
from collections.abc import Callable, Iterator
from typing import Any

from ...errors import InputError
from ..arrow import import_pyarrow
from ..columns import MEDIA, UNUSED
from ..values import Unreadable
from .base import Row
from .files import FileSource
from .tables import require_columns

__all__ = ["ParquetSource"]

_BATCH = 16  # rows decoded at once: a picture may have megabytes
_OUT_OF_RANGE = "<value out of range"  # what Arrow writes in place of such a time


class ParquetSource(FileSource):
    """Files *.parquet and *.pq. Columns that are renamed `unused` are not read.

    Dates and times are text as Arrow writes it, with the digits of their unit: 2024-01-31, 2024-01-31 12:00:00.000. Columns of
    bytes that are no pictures or videos hold UTF-8.
    """

    name = "parquet"
    endings = (".parquet", ".pq")
    compressed = False
    beside_pictures = True

    def __init__(self, path: str, prompt: str | None = None, columns: tuple[tuple[str, str], ...] = ()):
        pyarrow = import_pyarrow()
        super().__init__(path, prompt, columns)
        self._media = frozenset({*MEDIA, *(column for name, column in columns if name in MEDIA)})
        left_out = {column for name, column in columns if name == UNUSED}
        self._counts: list[int] = []
        self._columns: list[list[str]] = []
        for number, place in enumerate(self.inputs.paths):
            try:
                with self.inputs.open(number) as raw, pyarrow.parquet.ParquetFile(io.BufferedReader(raw)) as file:
                    self._counts.append(file.metadata.num_rows)
                    groups = [file.metadata.row_group(group).num_rows for group in range(file.metadata.num_row_groups)]
                    if min(groups, default=0) < 0 or sum(groups) != file.metadata.num_rows:
                        raise OSError(f"its groups have {sum(groups)} rows, and it says {file.metadata.num_rows}")
                    names = file.schema_arrow.names
            except (pyarrow.ArrowException, OSError) as error:
                raise InputError(f"{place!r} is no Parquet file that can be read: {error}") from error
            require_columns(place, names, columns)
            self._columns.append([name for name in names if name not in left_out])

    @staticmethod
    def decode(number: int, read: Any) -> Any:
        if isinstance(read, str):
            raise InputError(f"row {number} cannot be read: {read}")
        return read

    def pieces(self, file: int, rows: int) -> Iterator[tuple[float, Callable[[], Iterator[Row]]]]:
        count = self._counts[file]
        for start in range(0, count, rows):
            stop = min(count, start + rows)
            yield (stop - start) / count, functools.partial(self._rows, file, start=start, stop=stop)

    def _rows(self, number: int, *, start: int, stop: int) -> Iterator[Row]:
        """Rows start to stop of a file. Where the file is damaged, an error message stands for each row that cannot be read."""
        place, error = start, "the file ends before it"
        try:
            for row in self._read(number, start=start, stop=stop):
                yield Row(place - start, (number, place + 1, row))
                place += 1
        except (import_pyarrow().ArrowException, OSError) as problem:
            error = str(problem)
        self.inputs.check(number)  # before a row is blamed on damage
        for missing in range(place, stop):
            yield Row(missing - start, (number, missing + 1, error))

    def _read(self, number: int, *, start: int, stop: int) -> Iterator[dict]:
        """The row groups that hold the rows, a few rows decoded at a time."""
        parquet = import_pyarrow().parquet
        with (
            self.inputs.open(number) as raw,
            parquet.ParquetFile(io.BufferedReader(raw), pre_buffer=False, buffer_size=2**20) as file,
        ):
            first, here = 0, start
            groups: list[int] = []
            for group in range(file.metadata.num_row_groups):
                count = file.metadata.row_group(group).num_rows
                if first < stop and first + count > start:
                    here = here if groups else first
                    groups.append(group)
                first += count
            for batch in file.iter_batches(_BATCH, row_groups=groups, columns=self._columns[number], use_threads=False):
                low, high = max(start - here, 0), min(stop - here, batch.num_rows)
                if low < high:
                    rows = self._plain(batch.slice(low, high - low))
                    self.inputs.check(number, raw)
                    yield from rows
                here += batch.num_rows
                if here >= stop:
                    return

    def _plain(self, batch) -> list[dict]:
        """The rows of a pyarrow.RecordBatch."""
        names = batch.schema.names
        columns = [_values(batch.column(place), text=name not in self._media) for place, name in enumerate(names)]
        return [dict(zip(names, values, strict=True)) for values in zip(*columns, strict=True)]


def _values(column, text: bool) -> list[Any]:
    """The values of a pyarrow.Array, an Unreadable in place of each that has none in Python. text: bytes are UTF-8."""
    pyarrow = import_pyarrow()
    kind = column.type
    time = pyarrow.types.is_temporal(kind)
    binary = any(
        check(kind) for check in (pyarrow.types.is_binary, pyarrow.types.is_large_binary, pyarrow.types.is_binary_view)
    )
    try:
        found = (column.cast(pyarrow.string()) if time or (text and binary) else column).to_pylist()
    except Exception as error:  # of Arrow, of Python's codecs and calendars
        if len(column) == 1:  # bytes that are no text stay bytes, so that whoever reads the record says what they are not
            return column.to_pylist() if binary else [Unreadable(" ".join(str(error).split()))]
        return [value for place in range(len(column)) for value in _values(column.slice(place, 1), text)]
    return [Unreadable(value) if time and value and value.startswith(_OUT_OF_RANGE) else value for value in found]
