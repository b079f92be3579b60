"""Files *.csv and *.tsv: a line of names, then a record a row."""

import csv
import dataclasses
import functools
import io
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import IO, Any

from ...errors import InputError
from ..columns import ASKS, CHATS, DOCUMENTS, MEDIA
from ..record import FIELDS, OVERRIDES
from .jsonl import MAX_LINE, JsonlSource, LineSource, decode_json
from .plain import copy_of, ending_of

__all__ = ["TableSource", "require_columns"]

_LISTS = ("body", "images", "stop", "videos")
# Delimiters of a row, those in quotes included: each may begin a cell, an object of Python of some fifty bytes.
_MOST_CELLS = 2**22
_DELIMITERS = ",;\t"


class TableSource(LineSource):
    """Cells are text, and an empty one is none. Where a key wants a number, yes or no, or a list, its cell is read as JSON.

    Between cells is a comma, in *.tsv a tab. Where the line of names has none outside quotes, and only semicolons, only
    commas or only tabs, these are: spreadsheets write semicolons in countries with a decimal comma.

    The number of a record is that of its row below the names, from 1.
    """

    name = "csv"
    endings = (".csv", ".tsv")

    def __init__(self, path: str, prompt: str | None = None, columns: tuple[tuple[str, str], ...] = ()):
        super().__init__(path, prompt, columns)
        ours = {column: name for name, column in columns}
        self.parse = dataclasses.replace(self.parse, decode=functools.partial(_decode, ours))

    @staticmethod
    def converted(file: IO[bytes], path: str, columns: Sequence[tuple[str, str]] | None = None) -> IO[bytes] | None:
        file.seek(0)
        text = io.TextIOWrapper(io.BufferedReader(file), "utf-8-sig", errors="surrogateescape", newline="")  # type: ignore[type-var]
        before = csv.field_size_limit(MAX_LINE)
        delimiter = _delimiter(text.readline(MAX_LINE), "\t" if ending_of(path) == ".tsv" else ",")
        text.seek(0)
        bounded = _Bounded(text, delimiter)
        reader = csv.reader(bounded, strict=True, delimiter=delimiter)
        try:
            return copy_of(_lines(bounded.each(reader), path, columns))
        except csv.Error as error:
            raise InputError(f"{path}, line {reader.line_num}: {error}") from error
        finally:
            csv.field_size_limit(before)
            text.detach().detach()

    @staticmethod
    def decode(number: int, read: Any) -> Any:
        return _decode({}, number, read)


class _Bounded:
    """The lines of a table for csv.reader, which makes objects of all of a row's cells at once.

    Args:
        text: of the table.
        delimiter: between cells.
    """

    def __init__(self, text: IO[str], delimiter: str):
        self._text, self._delimiter, self._left = text, delimiter, _MOST_CELLS

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = self._text.readline(MAX_LINE)
        self._left -= line.count(self._delimiter)
        if len(line) >= MAX_LINE:
            raise csv.Error(f"it is longer than {MAX_LINE:,} characters")
        if self._left < 0:
            raise csv.Error(f"a row has more than {_MOST_CELLS:,} cells")
        if not line:
            raise StopIteration
        return line

    def each(self, rows: Iterator[list[str]]) -> Iterator[list[str]]:
        """The rows that csv.reader makes of these lines, each of which may be as long as any."""
        for row in rows:
            self._left = _MOST_CELLS
            yield row


def require_columns(path: str, names: Sequence[str], columns: Sequence[tuple[str, str]] | None) -> None:
    """Make sure that records can be made of the columns of a table.

    Args:
        path: Of the file, for messages.
        names: Of all its columns.
        columns: Pairs (our name of a key, its name in the file); None: the reader of the records decides which must be there.

    Raises:
        InputError: if none is one that records are made of, one of `columns` is missing, or two have one name.
    """
    if twice := sorted(name for name, count in Counter(names).items() if count > 1 and name):
        raise InputError(f"{path!r} has several columns of one name: {', '.join(twice)}")
    if columns is None:
        return
    for name, column in columns:
        if column not in names:
            raise InputError(f"{path!r} has no column {column!r} for {name!r}; it has {', '.join(names)}")
    if not {*FIELDS, *(column for _, column in columns)} & set(names):
        raise InputError(
            f"{path!r} has none of the columns {', '.join((*CHATS, *ASKS, *MEDIA, *DOCUMENTS))}; it has "
            f"{', '.join(names)}: say which is which with --column image=NAME"
        )


def _delimiter(line: str, usual: str) -> str:
    """What separates the cells of a table. line: of names; usual: what files with this ending have."""
    outside = re.sub('"[^"]*"', "", line)
    others = [one for one in _DELIMITERS if one in outside]
    return others[0] if len(others) == 1 else usual


def _lines(rows: Iterator[list[str]], path: str, columns: Sequence[tuple[str, str]] | None) -> Iterator[bytes]:
    """An object of the cells that are not empty for each row; a list with a message for one that cannot be read."""
    names = next(rows, None)
    if not names:
        raise InputError(f"{path} does not begin with a line of names, such as prompt,image")
    require_columns(path, names, columns)
    for row in rows:
        if not row:
            continue
        value: Any = {name: cell for name, cell in zip(names, row, strict=False) if cell}
        if len(row) != len(names):
            value = [f"has {len(row)} cells, and there are {len(names)} names"]
        elif any("\ud800" <= character <= "\udfff" for cell in row for character in cell if not cell.isascii()):
            value = ["is not valid UTF-8"]
        yield json.dumps(value).encode() + b"\n"


def _decode(ours: dict[str, str], number: int, read: bytes | None) -> Any:
    """ours: for columns that have a name of their own, our name of the key."""
    value = JsonlSource.decode(number, read) if read is None else decode_json(f"row {number}", read)
    if isinstance(value, list):
        raise InputError(f"row {number} {value[0]}")
    return {name: _value(ours.get(name, name), cell) for name, cell in value.items()}


def _value(name: str, cell: str) -> Any:
    text = cell.strip()
    number = name in OVERRIDES and name != "stop"
    if number or (name in _LISTS and text.startswith(("[", "{"))):
        try:
            return json.loads(text.lower() if number else text)
        except (ValueError, RecursionError):
            pass  # the reader of the record reports it
    return cell
