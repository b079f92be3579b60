"""Parquet: one record a row, with pictures as bytes, paths or {"bytes", "path"} structs. Needs pyarrow."""

import functools
import io
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

from ...errors import InputError
from ..arrow import import_pyarrow, open_parquet
from ..columns import MEDIA, UNUSED
from ..values import Unreadable
from .base import Row
from .files import FileSource
from .jsonl import MAX_LINE
from .tables import require_columns

__all__ = ["ParquetSource"]

_BATCH = 16  # rows decoded at once: a picture may have megabytes
_LARGE = 2**25  # bytes of rows that are made objects of Python at once
_MOST_VALUES = 2**22  # values in lists of such rows: an empty list has no byte in Arrow, and 56 in Python
_OUT_OF_RANGE = "<value out of range"  # what Arrow writes in place of such a time


class ParquetSource(FileSource):
    """Files *.parquet and *.pq. Columns that are renamed `unused` are not read.

    Dates and times are text as Arrow writes it, with the digits of their unit: 2024-01-31, 2024-01-31 12:00:00.000. Columns of
    bytes that are no pictures or videos hold UTF-8.

    Attributes:
        kinds: The columns that are read and their types in Arrow; None for one that has another type in another file.
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
        self._groups: list[list[int]] = []  # numbers of rows
        self._columns: list[list[str]] = []
        self.kinds: dict[str, Any] = {}
        for number, place in enumerate(self.inputs.paths):
            try:
                with self.inputs.open(number) as raw, open_parquet(io.BufferedReader(raw)) as file:
                    groups = [file.metadata.row_group(group).num_rows for group in range(file.metadata.num_row_groups)]
                    if min(groups, default=0) < 0 or sum(groups) != file.metadata.num_rows:
                        raise OSError(f"its groups have {sum(groups)} rows, and it says {file.metadata.num_rows}")
                    self._groups.append(groups)
                    names, found = file.schema_arrow.names, {field.name: field.type for field in file.schema_arrow}
            except (pyarrow.ArrowException, OSError) as error:
                raise InputError(f"{place!r} is no Parquet file that can be read: {error}") from error
            require_columns(place, names, columns)
            self._columns.append([name for name in names if name not in left_out])
            for name in self._columns[-1]:
                self.kinds[name] = found[name] if self.kinds.get(name, found[name]) == found[name] else None

    @staticmethod
    def decode(number: int, read: Any) -> Any:
        if isinstance(read, str):
            raise InputError(f"row {number} cannot be read: {read}")
        return read

    @staticmethod
    def glance(read: Any, names: Collection[str]) -> Mapping[str, Any]:
        return {} if isinstance(read, str) else {name: read[name] for name in names if name in read}

    def pieces(self, file: int, rows: int) -> Iterator[tuple[float, Callable[[], Iterator[Row]]]]:
        count = sum(self._groups[file])
        for start in range(0, count, rows):
            stop = min(count, start + rows)
            yield (stop - start) / count, functools.partial(self._rows, file, start=start, stop=stop)

    def _rows(self, number: int, *, start: int, stop: int) -> Iterator[Row]:
        """Rows start to stop of a file. An error message stands for each row that cannot be read."""
        place, problem = start, ""
        try:
            with self.inputs.open(number) as raw, open_parquet(io.BufferedReader(raw), buffer_size=2**20) as file:
                first = 0
                for group, count in enumerate(self._groups[number]):
                    low, high = max(start, first), min(stop, first + count)
                    if low < high:
                        for payload in self._rows_of_group(file, raw, number, group, low=low - first, high=high - first):
                            yield Row(place - start, (number, place + 1, payload))
                            place += 1
                    first += count
        except (import_pyarrow().ArrowException, OSError) as error:  # of opening it
            problem = " ".join(str(error).split())
        self.inputs.check(number)  # before a row is blamed on damage
        for missing in range(place, stop):
            yield Row(missing - start, (number, missing + 1, problem))

    def _rows_of_group(self, file, raw: io.RawIOBase, number: int, group: int, *, low: int, high: int) -> Iterator[dict | str]:
        """Rows low to high of a row group, a few decoded at a time; what is wrong with it for each that cannot be read."""
        here, done, problem = 0, low, "it ends before this row"
        try:
            _check_size(file, group, self._columns[number])
            for batch in file.iter_batches(_BATCH, row_groups=[group], columns=self._columns[number], use_threads=False):
                first, last = max(low - here, 0), min(high - here, batch.num_rows)
                here += batch.num_rows
                for rows in self._few(batch.slice(first, last - first)) if first < last else ():
                    self.inputs.check(number, raw)
                    done += len(rows)
                    yield from rows
                if here >= high:
                    break
        except (import_pyarrow().ArrowException, OSError) as error:
            problem = " ".join(str(error).split())
        if done < high:
            self.inputs.check(number, raw)  # before a row is blamed on damage
            yield from [f"row group {group} of {self.inputs.paths[number]}: {problem}"] * (high - done)

    def _few(self, batch) -> Iterator[Sequence[dict | str]]:
        """The rows of a pyarrow.RecordBatch, one by one where they are large."""
        size = batch.num_rows if batch.nbytes <= _LARGE and _values_in(batch) <= _MOST_VALUES else 1
        for place in range(0, batch.num_rows, size):
            rows = batch.slice(place, size)
            if size == 1 and rows.nbytes > MAX_LINE:
                yield [f"it has more than {MAX_LINE:,} bytes"]
            elif size == 1 and _values_in(rows) > _MOST_VALUES:
                yield [f"it has more than {_MOST_VALUES:,} values in lists"]
            else:
                yield self._plain(rows)

    def _plain(self, batch) -> list[dict]:
        """The rows of a pyarrow.RecordBatch."""
        names = batch.schema.names
        columns = [_values(batch.column(place), text=name not in self._media) for place, name in enumerate(names)]
        return [dict(zip(names, values, strict=True)) for values in zip(*columns, strict=True)]


def _check_size(file, group: int, names: Sequence[str]) -> None:
    """Raise OSError if rows of a group have more on average than a row may: a file of a kilobyte may decode to gigabytes, which
    Arrow takes at once."""
    found = file.metadata.row_group(group)
    for place in range(found.num_columns):
        chunk, lists = found.column(place), file.schema.column(place).max_repetition_level
        name = chunk.path_in_schema
        if not any(name == own or name.startswith(f"{own}.") for own in names):
            continue
        if lists and chunk.num_values > _MOST_VALUES * found.num_rows:
            raise OSError(f"{name} has {chunk.num_values:,} values in {found.num_rows:,} rows")
        if chunk.total_uncompressed_size > MAX_LINE * found.num_rows:
            raise OSError(f"{name} has {chunk.total_uncompressed_size:,} bytes in {found.num_rows:,} rows")


def _values_in(batch) -> int:
    """How many values the lists in a pyarrow.RecordBatch hold, those in lists of lists included."""
    return sum(map(_values_below, batch.columns))


def _values_below(column) -> int:
    pyarrow = import_pyarrow()
    kind = column.type
    if isinstance(kind, pyarrow.BaseExtensionType):
        return _values_below(column.storage)
    if pyarrow.types.is_struct(kind):
        return sum(map(_values_below, column.flatten()))
    if pyarrow.types.is_map(kind):
        column = column.cast(pyarrow.list_(pyarrow.struct([("key", kind.key_type), ("value", kind.item_type)])))
    elif not pyarrow.types.is_nested(kind) or pyarrow.types.is_union(kind):
        return 0
    values = column.flatten()
    return len(values) + _values_below(values)


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
        if len(column) == 1:  # bytes that are no text stay bytes, so that the reader of the record reports them
            return column.to_pylist() if binary else [Unreadable(" ".join(str(error).split()))]
        return [value for place in range(len(column)) for value in _values(column.slice(place, 1), text)]
    return [Unreadable(value) if time and value and value.startswith(_OUT_OF_RANGE) else value for value in found]
