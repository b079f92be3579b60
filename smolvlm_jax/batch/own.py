"""The user's own columns, from records to the rows of their answers. Imports no jax."""

import datetime
import math
import re
import uuid
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from ..arguments import nearest
from ..errors import InputError, first_few
from ..records.columns import NOTHING_READS, UNUSED
from ..records.record import Record, own_columns
from ..records.sources import Source
from ..records.values import Unreadable
from .remarks import has_media

__all__ = ["Own", "check_columns", "look", "plain", "require_records", "unnamed"]

_RECORDS, _BYTES, _RECORD_BYTES = 1000, 2**24, 2**20
_UNIT = 16
# Names of columns that say that there is a picture or video in it, and values that say where it is.
_PICTURE = re.compile(r"(?i)(^|[^a-z])(images?|imgs?|pictures?|pics?|photos?|jpe?g|png|webp|videos?|clips?|mp4)([^a-z]|$)")
_PLACE = re.compile(r"(?i)(https?|s3|gs|file)://\S+$|data:(image|video)/|/\S+$")


@dataclass(frozen=True)
class Own:
    """Which columns of a record its row has too.

    Attributes:
        keep: Their names in the input; None: all that the job does not read.
        taken: Names of the columns of an answer, which none of them may have.
        columns: Pairs (our name of a key, its name in the input).
    """

    keep: tuple[str, ...] | None = ()
    taken: tuple[str, ...] = ()
    columns: tuple[tuple[str, str], ...] = ()

    def of(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The columns of a record, as JSON. given: the record as it was decoded.

        Raises:
            InputError: one has the name of a column of the answer, or holds what no row can.
        """
        names = own_columns(given, self.columns) if self.keep is None else [n for n in self.keep if n != "id"]
        for name in names:
            if name in self.taken:
                raise _clash(name)
        return {name: plain(name, given.get(name)) for name in names}


def plain(name: str, value: Any) -> Any:
    """A value of a column as JSON: decimals, dates, times and UUIDs by their text, a value that cannot be decoded as null.

    Raises:
        InputError: it holds bytes or pixels.
    """
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    if isinstance(value, Mapping):
        return {str(key): plain(name, item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(name, item) for item in value]
    if isinstance(value, Unreadable):
        return None
    if isinstance(value, Decimal):
        return format(value, "f")
    if isinstance(value, datetime.date | datetime.time | datetime.timedelta | uuid.UUID):
        return str(value)
    raise InputError(
        f"the column {name!r:.80} holds {type(value).__name__}, which no row of answers can: leave it out of --keep"
    )


def look(source: Source) -> tuple[list[Record], bool]:
    """The first records of the input, at most a thousand, and of large ones fewer; those above a mebibyte are left out.

    Returns:
        (the records, whether they are all that there are).
    """
    found = list(_first(source))
    records = [record for record in found if record is not None]
    return records, len(records) == len(found)


def _first(source: Source) -> Iterator[Record | None]:
    """Records, and None for one that is left out and for the rest of the input."""
    count = size = 0
    with closing(source.units(_UNIT)) as units:  # type: ignore[type-var]
        for unit in units:
            for row in unit.rows():
                bytes_of = payload_size(row.payload)
                count, size = count + 1, size + bytes_of
                yield source.parse(row.payload) if bytes_of <= _RECORD_BYTES else None
                if count >= _RECORDS or size > _BYTES:
                    yield None
                    return


def unnamed(source: Source, records: list[Record], *, whole: bool) -> list[str]:
    """Of the pictures and videos beside files of records, those that no record names, as far as these records tell: all where
    none of them has a picture, and single ones where they are the whole input and can be read.

    Args:
        source: The input.
        records: The first of it.
        whole: Whether they are all that there are.
    """
    if not any(has_media(record) for record in records):
        return list(source.beside)
    if not whole or any(record.messages is None for record in records):
        return []
    named = {name for record in records for message in record.messages or () for name in _file_names(message.get("content"))}
    return [name for name in source.beside if name not in named]


def _file_names(value: Any) -> Iterator[str]:
    """The last parts of all texts in a value, of which some are paths."""
    if isinstance(value, str):
        yield value.rpartition("/")[2]
    elif isinstance(value, (list, tuple, Mapping)):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from _file_names(part)


def require_records(source: Source, name: str) -> None:
    """Raise InputError for an input without a record, in which `name` says where it is."""
    with closing(source.units(_UNIT)) as units:  # type: ignore[type-var]
        if not any(True for unit in units for _ in unit.rows()):
            raise InputError(f"{name!r} holds no records, so there is nothing to answer: name a file or directory that does")


def payload_size(payload: Any) -> int:
    """Bytes of the texts and files in a payload."""
    if isinstance(payload, (bytes, str)):
        return len(payload)
    if isinstance(payload, dict):
        payload = payload.values()
    elif not isinstance(payload, (list, tuple)):
        return 0
    return sum(map(payload_size, payload))


def check_columns(records: list[Record], own: Own) -> None:
    """Look at the first records for what would be wrong with all of them.

    Raises:
        InputError: a column that is kept has the name of one of the answers, --keep names one that there is not, or what looks
            like pictures is read by nothing.
    """
    records = [record for record in records if record.given]
    found = list(dict.fromkeys(str(name) for record in records for name in record.given))
    if not records:
        return
    there = f"the first {len(records):,} records have the columns {', '.join(first_few(found, 30))}"
    kept = [name for record in records for name in own_columns(record.given, own.columns)] if own.keep is None else own.keep
    for name in kept:
        if name in own.taken and name != "id":
            raise _clash(name)
        if name not in found and name != "id":
            raise InputError(f"--keep {name}: no such column{nearest(name, found)}; {there}")
    if any(has_media(record) for record in records):
        return
    faults = [record.error or "" for record in records]
    if all(fault.startswith(NOTHING_READS) for fault in faults):
        raise InputError(
            f"none of the first {len(records):,} records can be read: {faults[0]}. The columns are {', '.join(found)}"
        )
    for record in records:
        for name in own_columns(record.given, own.columns):
            value = record.given[name]
            if name in (own.keep or ()) or not (_PICTURE.search(str(name)) and isinstance(value, str) and _PLACE.match(value)):
                continue
            raise InputError(
                f"no record has a picture or video, and the column {name!r:.80} looks like one: --column image={name:.80} "
                f"reads it, --column {UNUSED}={name:.80} leaves it out; {there}"
            )


def _clash(name: str) -> InputError:
    return InputError(
        f"the input has a column {name!r:.80}, which the rows of answers have too: rename it, leave it out with --column "
        f"{UNUSED}={name:.80}, or say which are kept with --keep NAME,…"
    )


def finite(value: Any) -> Any:
    """JSON without the numbers that it does not have: null in their place."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {name: finite(item) for name, item in value.items()}
    return [finite(item) for item in value] if isinstance(value, list) else value
