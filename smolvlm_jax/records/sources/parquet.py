"""Parquet: one record a row, with pictures as bytes, paths or {"bytes", "path"} structs. Needs pyarrow."""

import functools
from collections.abc import Callable, Iterator

from ...errors import InputError
from ..arrow import import_pyarrow
from ..record import FIELDS
from .base import Row
from .files import FileSource

__all__ = ["ParquetSource"]

_BATCH = 16  # rows decoded at once: a picture may have megabytes


def _decode(number: int, row: dict | str) -> dict:
    if isinstance(row, str):
        raise InputError(f"row {number} cannot be read: {row}")
    return row


class ParquetSource(FileSource):
    """Files *.parquet and *.pq. Only columns that records are made of are read."""

    name = "parquet"
    endings = (".parquet", ".pq")
    decode = _decode

    def __init__(self, path: str, prompt: str | None = None, columns: tuple[tuple[str, str], ...] = ()):
        pyarrow = import_pyarrow()
        super().__init__(path, prompt, columns)
        wanted = {*FIELDS, *(column for _, column in columns)}
        self.lengths = []
        self._columns: list[list[str]] = []
        for place in self._paths:
            try:
                with pyarrow.parquet.ParquetFile(place) as file:
                    self.lengths.append(file.metadata.num_rows)
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

    def pieces(self, file: int, rows: int) -> Iterator[tuple[int, int, Callable[[], Iterator[Row]]]]:
        for start in range(0, self.lengths[file], rows):
            stop = min(self.lengths[file], start + rows)
            yield start, stop, functools.partial(self._rows, file, start=start, stop=stop)

    def _rows(self, number: int, *, start: int, stop: int) -> Iterator[Row]:
        """Rows start to stop of a file. Where the file is damaged, an error message stands for each row that cannot be read."""
        place, error = start, "the file ends before it"
        try:
            for row in self._read(number, start=start, stop=stop):
                yield Row(place - start, (number, place + 1, row))
                place += 1
        except (import_pyarrow().ArrowException, OSError) as problem:
            error = str(problem)
        for missing in range(place, stop):
            yield Row(missing - start, (number, missing + 1, error))

    def _read(self, number: int, *, start: int, stop: int) -> Iterator[dict]:
        """The row groups that hold the rows, a few rows decoded at a time."""
        parquet = import_pyarrow().parquet
        with parquet.ParquetFile(self._paths[number], pre_buffer=False, buffer_size=2**20) as file:
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
                    yield from batch.slice(low, high - low).to_pylist()
                here += batch.num_rows
                if here >= stop:
                    return
