"""Files *.json: an array of records, one record, or in truth JSON lines."""

import json
from collections.abc import Iterator, Sequence
from typing import IO, Any

from ...errors import InputError
from .jsonl import JsonlSource, LineSource, decode_json
from .plain import copy_of

__all__ = ["JsonSource"]

_MOST = 2**30
_MARK = "\ufeff"


class JsonSource(LineSource):
    """A record for each element of an array, or the one object that a file holds; its number is its place, from 1."""

    name = "json"
    endings = (".json",)

    @staticmethod
    def converted(file: IO[bytes], path: str, columns: Sequence[tuple[str, str]] | None = None) -> IO[bytes] | None:
        data = file.read(_MOST + 1)
        if len(data) > _MOST:
            raise InputError(f"{path} has more than {_MOST:,} bytes, and is read as a whole: make JSON lines of it (.jsonl)")
        try:
            text = data.decode("utf-8").removeprefix(_MARK)
        except UnicodeDecodeError as error:
            if data.lstrip()[:1] != b"[":
                return None  # lines, perhaps: then those that are not UTF-8 are in error
            raise InputError(f"{path} is not valid UTF-8: {error.reason} at byte {error.start}") from error
        del data
        try:
            return copy_of(_elements(text))
        except (ValueError, RecursionError) as error:
            if text.lstrip()[:1] == "[":
                raise InputError(f"{path} is not valid JSON: {error}") from error
            return None

    @staticmethod
    def decode(number: int, read: Any) -> Any:
        return JsonlSource.decode(number, read) if read is None else decode_json(f"record {number}", read)


def _elements(text: str) -> Iterator[bytes]:
    """The elements of an array, or the one value, each as a line. Raises ValueError."""
    decoder, place = json.JSONDecoder(), _next(text, 0)
    array = text[place : place + 1] == "["
    place = _next(text, place + 1) if array else place
    if array and text[place : place + 1] == "]":
        return _end(text, place + 1)
    while True:
        _, end = decoder.raw_decode(text, place)
        # Line ends stand between tokens only: in a string they are escaped.
        yield text[place:end].replace("\n", " ").replace("\r", " ").encode("utf-8", "surrogatepass") + b"\n"
        place = _next(text, end)
        if not array:
            return _end(text, place)
        mark = text[place : place + 1]
        if mark == "]":
            return _end(text, place + 1)
        if mark != ",":
            raise json.JSONDecodeError("Expecting ',' delimiter", text, place)
        place = _next(text, place + 1)


def _next(text: str, place: int) -> int:
    """The place of the next character that is no white space."""
    while text[place : place + 1] in (" ", "\t", "\n", "\r"):
        place += 1
    return place


def _end(text: str, place: int) -> None:
    if (place := _next(text, place)) < len(text):
        raise json.JSONDecodeError("Extra data", text, place)
