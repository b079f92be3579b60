"""One record of a batch job: its id, the conversation to answer, and the sampling arguments that it sets for itself."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ..errors import InputError, describe
from ..generation_config import SamplingParams
from .columns import ASKS, CHATS, DOCUMENTS, MEDIA, UNUSED, names_pdfs, renamed, require_pdfs
from .conversations import read_conversation
from .request import BODY, OVERRIDES, SETTINGS, request_of
from .values import Unreadable, id_of, plain_number

__all__ = [
    "FIELDS", "IDS", "OVERRIDES", "Record", "check_names", "id_from", "own_columns", "record_from", "request_seed",
    "with_overrides",
]  # fmt: skip

# The names of columns that records are made of, for renaming; UNUSED is for one that is not to be read.
IDS = ("id", "custom_id")
FIELDS = (*IDS, "body", *CHATS, *ASKS, *MEDIA, *DOCUMENTS, "system", *OVERRIDES, UNUSED)
# Those that are read whatever they hold; DOCUMENTS only where they name PDFs.
_ALWAYS = tuple(name for name in FIELDS if name not in DOCUMENTS)


def check_names(columns: Iterable[tuple[str, str]]) -> None:
    """Raise InputError unless pairs (our name of a column, its name in the input) have names of ours. Ray has a mapping."""
    for name, column in columns:
        if name not in FIELDS or not column:
            raise InputError(f"--column {name}={column} is not NAME=COLUMN with a name of {', '.join(FIELDS)}")


@dataclass(frozen=True)
class Record:
    """A record as it was read.

    Attributes:
        id: A string or a whole number.
        messages: In the chat format, with paths resolved; None where there is an error.
        overrides: Arguments of SamplingParams that the record sets for itself.
        error: What is wrong with the record, or None.
        unread: Names of its columns that nothing reads: the user's own.
        given: The record as it was decoded; empty where it could not be, and for files that are records themselves.
    """

    id: str | int
    messages: list[dict[str, Any]] | None = None
    overrides: dict[str, Any] = field(default_factory=dict)
    error: str | None = None
    unread: tuple[str, ...] = ()
    given: Mapping[str, Any] = field(default_factory=dict)


def record_from(
    value: Any,
    default_id: str | int,
    *,
    folder: str = "",
    prompt: str | None = None,
    columns: tuple[tuple[str, str], ...] = (),
) -> Record:
    """Read a decoded line or row. A faulty record raises nothing: its `error` says what is wrong.

    Args:
        value: In one of the forms that `read_conversation` takes, with an optional `id` or `custom_id` and sampling arguments.
        default_id: For records without an id.
        folder: Where relative paths start from.
        prompt: For records without a prompt of their own.
        columns: Pairs (our name of a key, its name in `value`).
    """
    key: str | int = default_id
    given: Mapping[str, Any] = {}
    try:
        if not isinstance(value, Mapping):
            raise InputError(f"a record is a JSON object, this is a {type(value).__name__}")
        given = value
        value = renamed(value, columns)
        key = _id(value, default_id)
        require_pdfs(value, columns)
        for name in _ALWAYS:
            if isinstance(found := value.get(name), Unreadable):
                raise InputError(f"{name} cannot be read: {found.why}")
        overrides = _overrides(value)
        read = read_conversation(value, folder=folder, prompt=prompt)
        return Record(key, read.messages, overrides, unread=read.unread, given=given)
    except Exception as error:  # an unforeseen failure is still the fault of this record alone
        return Record(key, error=describe(error), given=given)


def own_columns(record: Mapping, columns: tuple[tuple[str, str], ...] = ()) -> tuple[str, ...]:
    """The names of the columns that a batch job does not read, whatever they hold: the user's own, such as the wanted answer.

    Args:
        record: As it was decoded.
        columns: Pairs (our name of a key, its name in the record).
    """
    body = next((column for name, column in columns if name == "body"), "body")
    read = {*_ALWAYS, *SETTINGS, *(BODY if isinstance(record.get(body), Mapping) else ())} - {UNUSED}
    read |= {column for _, column in columns} | {name for name in DOCUMENTS if names_pdfs(record.get(name))}
    return tuple(name for name in record if name not in read)


def id_from(value: Mapping, default_id: str | int, columns: tuple[tuple[str, str], ...] = ()) -> str | int:
    """The id of the record that `record_from` makes of `value`, of which the columns of IDS suffice."""
    try:
        return _id(renamed(value, columns), default_id)
    except InputError:
        return default_id


def _id(value: Mapping, default: str | int) -> str | int:
    found, other = id_of(value.get("id")), id_of(value.get("custom_id"))
    if found is not None and other is not None and found != other:
        raise InputError(f"id is {found!r:.80} and custom_id is {other!r:.80}; a row has one of them")
    found = other if found is None else found
    return default if found is None else found


def _overrides(value: Mapping) -> dict[str, Any]:
    request = request_of(value)
    found = {name: plain_number(request.get(name)) for name in OVERRIDES}
    return {name: value for name, value in found.items() if value is not None}


def request_seed(job_seed: int, key: str | int) -> int:
    """A seed below 2**32 from the job's seed and the record's id: the same tokens are drawn wherever and whenever it runs."""
    return int.from_bytes(hashlib.blake2b(json.dumps([job_seed, key]).encode(), digest_size=4).digest(), "big")


def with_overrides(sampling: SamplingParams, record: Record) -> SamplingParams:
    """The job's sampling with the record's own arguments and a seed for the record.

    Raises:
        InputError: if an argument has the wrong type or is out of range.
    """
    overrides = {"seed": request_seed(sampling.seed, record.id), **record.overrides}
    stop = overrides.get("stop")
    if isinstance(stop, str):
        overrides["stop"] = (stop,)
    try:
        return replace(sampling, **overrides)
    except TypeError as error:
        raise InputError(f"the record's sampling arguments have the wrong type: {error}") from error
