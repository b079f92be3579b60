"""The user's own columns in Parquet: every part of a job has the same columns with the same types.

They are those of a Parquet input. What other inputs hold is seen in their first records: columns of whole numbers, of numbers,
of yes and no, and of text, which lists, objects and mixtures are too, as JSON. What turns up later, or does not fit the type of
its column, is in `other_columns`, as JSON.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..records.arrow import import_pyarrow
from ..records.record import Record, own_columns
from ..records.sources import Source
from .own import Own, finite

__all__ = ["REST", "arrow_types", "own_arrays", "utf8"]

# The column of what has no place in another one.
REST = "other_columns"
_INT64 = 2**63


def arrow_types(source: Source, records: Iterable[Record], own: Own) -> dict[str, Any]:
    """The user's own columns with their types.

    Args:
        source: Of the records.
        records: The first of them.
        own: Which columns are kept.
    """
    pyarrow = import_pyarrow()
    stored: Mapping[str, Any] = getattr(source, "kinds", {})
    if stored:
        names = own_columns(stored, own.columns) if own.keep is None else [name for name in own.keep if name != "id"]
        return {name: _kept_type(stored[name]) for name in names if name in stored}
    values: dict[str, list[Any]] = {}
    for record in records:
        names = own_columns(record.given, own.columns) if own.keep is None else own.keep
        for name in names:
            if name != "id" and name in record.given:
                values.setdefault(name, []).append(record.given[name])
    types = {name: _type_of(found) for name, found in values.items()}
    return {**types, REST: pyarrow.string()} if own.keep != () else {}


def own_arrays(rows: Sequence[Mapping[str, Any]], types: Mapping[str, Any]) -> list[Any]:
    """An array of each of the columns `types`, of rows with the user's own columns alone."""
    left: list[dict[str, Any]] = [{name: row[name] for name in row if name not in types} for row in rows]
    arrays = {}
    for name, kind in types.items():
        if name != REST:
            arrays[name], misfits = _array([row.get(name) for row in rows], kind)
            for place in misfits:
                left[place][name] = rows[place][name]
    if REST in types:
        arrays[REST] = import_pyarrow().array([json.dumps(finite(row)) if row else None for row in left], types[REST])
    return [arrays[name] for name in types]


def utf8(value: Any) -> str | None:
    """A value as text that UTF-8 can hold."""
    return None if value is None else str(value).encode("utf-8", "backslashreplace").decode()


def _array(values: list[Any], kind: Any) -> tuple[Any, list[int]]:
    """(the values as an array, places of those that are not of its type, which are null there)."""
    pyarrow = import_pyarrow()
    if pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind):
        texts = [value if value is None or isinstance(value, str) else json.dumps(finite(value)) for value in values]
        return pyarrow.array(map(utf8, texts), kind), []
    wrong = (pyarrow.ArrowException, ValueError, TypeError, OverflowError)
    try:
        return _converted(values, kind), []
    except wrong:
        pass
    good, misfits = list(values), []
    for place, value in enumerate(values):
        try:
            _converted([value], kind)
        except wrong:
            good[place] = None
            misfits.append(place)
    return _converted(good, kind), misfits


def _converted(values: list[Any], kind: Any) -> Any:
    """An array of JSON values; dates, times and decimals are text in JSON."""
    pyarrow = import_pyarrow()
    if pyarrow.types.is_time(kind):  # which Arrow makes of no text
        days = [None if value is None else f"1970-01-01 {value}" for value in values]
        return pyarrow.array(days, pyarrow.string()).cast(pyarrow.timestamp(kind.unit)).cast(kind)
    if pyarrow.types.is_temporal(kind) or pyarrow.types.is_decimal(kind):
        return pyarrow.array(values, pyarrow.string()).cast(kind)
    check = pyarrow.types
    for is_kind, own in ((check.is_boolean, (bool,)), (check.is_integer, (int,)), (check.is_floating, (int, float))):
        if is_kind(kind) and any(value is not None and type(value) not in own for value in values):
            raise TypeError(f"a value is no {kind}")  # Arrow would make 1 of 1.5
    return pyarrow.array(values, kind)


def _type_of(values: list[Any]) -> Any:
    """The type of a column that holds these values of JSON or of a table."""
    pyarrow = import_pyarrow()
    kinds = {type(value) for value in values if value is not None}
    if kinds == {bool}:
        return pyarrow.bool_()
    if kinds == {int} and all(value is None or -_INT64 <= value < _INT64 for value in values):
        return pyarrow.int64()
    return pyarrow.float64() if kinds and kinds <= {int, float} else pyarrow.string()


def _kept_type(kind: Any) -> Any:
    """The type in which a column of Parquet input is written: its own, or text where its values have no place in JSON."""
    pyarrow = import_pyarrow()
    check = pyarrow.types
    if kind is not None and check.is_dictionary(kind):
        return _kept_type(kind.value_type)
    plain_types = (check.is_boolean, check.is_integer, check.is_floating, check.is_string, check.is_large_string)
    texts = (check.is_decimal, check.is_date, check.is_time, check.is_timestamp)
    if kind is None or not any(test(kind) for test in (*plain_types, *texts)):
        return kind if kind is not None and _is_plain(kind) else pyarrow.string()
    return pyarrow.float32() if check.is_float16(kind) else kind


def _is_plain(kind: Any) -> bool:
    """Whether values of a type are as they are in JSON, in lists and structs too."""
    check = import_pyarrow().types
    if check.is_list(kind) or check.is_large_list(kind) or check.is_fixed_size_list(kind):
        return _is_plain(kind.value_type)
    if check.is_struct(kind):
        return all(_is_plain(kind.field(place).type) for place in range(kind.num_fields))
    return any(test(kind) for test in (check.is_boolean, check.is_integer, check.is_floating, check.is_string))
