"""Values of tables as the user wrote them: tables turn whole numbers into floats, and have types that JSON does not have."""

import datetime
import uuid
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from ..errors import InputError

__all__ = ["Unreadable", "id_of", "plain_number"]


@dataclass(frozen=True)
class Unreadable:
    """Stands in a decoded row for a value that could not be decoded.

    Attributes:
        why: In words.
    """

    why: str


def id_of(value: Any) -> str | int | None:
    """An id: a string, a whole number, or None where there is none. Decimals, dates, times and UUIDs are ids by their text.

    Raises:
        InputError: it is something else.
    """
    if isinstance(value, Unreadable):
        raise InputError(f"id cannot be read: {value.why}")
    value = plain_number(value) if isinstance(value, float) else value
    if isinstance(value, Decimal):
        return format(value, "f")
    if isinstance(value, datetime.date | datetime.time | uuid.UUID):
        return str(value)
    if value is not None and (isinstance(value, bool) or not isinstance(value, (str, int))):
        raise InputError(f"id is {value!r:.80}; it needs a string or a whole number")
    return value


def plain_number(value: Any) -> Any:
    """A number as it was meant: beside a missing one, which is not-a-number, a table has floats for whole numbers. Other values
    stay as they are."""
    if isinstance(value, Decimal):
        value = float(value) if value % 1 else int(value)
    if isinstance(value, float):
        if value != value:
            return None
        return int(value) if value.is_integer() else value
    return value
