"""Files *.json: an array of records, one record, or JSON lines in spite of the name."""

import codecs
from collections.abc import Iterator, Sequence
from typing import IO, Any

from ...errors import InputError
from ..json_text import Walk, element_lines, one_line
from .jsonl import JsonlSource, LineSource, decode_json
from .plain import copy_of

__all__ = ["JsonSource"]

_BLOCK = 2**18


class JsonSource(LineSource):
    """A record for each element of an array, or the one object that a file holds; its number is its place, from 1.

    The file is split into its elements without being decoded, so that no more than a block of it is held in memory.
    """

    name = "json"
    endings = (".json",)

    @staticmethod
    def converted(file: IO[bytes], path: str, columns: Sequence[tuple[str, str]] | None = None) -> IO[bytes] | None:
        first = next(_blocks(file), b"")[:1]
        if first == b"{" and _is_one_object(_blocks(file)):
            return copy_of(map(one_line, _blocks(file)))
        if first != b"[":
            return None  # lines, perhaps
        try:
            return copy_of(element_lines(_blocks(file)))
        except ValueError as error:
            raise InputError(f"{path} is not valid JSON: {error}") from error

    @staticmethod
    def decode(number: int, read: Any) -> Any:
        return JsonlSource.decode(number, read) if read is None else decode_json(f"record {number}", read)


def _blocks(file: IO[bytes]) -> Iterator[bytes]:
    """A file from its first character on that is no white space and no mark."""
    file.seek(0)
    begun = False
    while block := file.read(_BLOCK):
        if not begun:
            block = block.removeprefix(codecs.BOM_UTF8).lstrip(b" \t\r\n")
            begun = bool(block)
        if block:
            yield block


def _is_one_object(blocks: Iterator[bytes]) -> bool:
    """Whether an object that has begun ends with the text."""
    walk = Walk()
    for block in blocks:
        places, depths = walk(block)
        ends = places[depths == 0]
        if len(ends):
            return not block[int(ends[0]) + 1 :].strip() and not any(more.strip() for more in blocks)
    return False
