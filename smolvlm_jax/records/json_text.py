"""Walking through JSON text without decoding it: as Python objects it may take thirty times its size."""

import json
import re
from collections.abc import Collection, Iterable, Iterator
from typing import Any

import numpy as np

__all__ = ["Walk", "element_lines", "members", "one_line"]

_BLOCK = 2**18
_LONGEST = 4096  # bytes of a value that `members` finds
_QUOTE, _BACKSLASH, _OPEN, _CLOSE, _COMMA = range(1, 6)
_KINDS = np.zeros(256, np.uint8)
for _kind, _characters in ((_QUOTE, b'"'), (_BACKSLASH, b"\\"), (_OPEN, b"[{"), (_CLOSE, b"]}"), (_COMMA, b",")):
    _KINDS[list(_characters)] = _kind
_ONE_LINE = bytes.maketrans(b"\r\n", b"\t\t")


class Walk:
    """Finds the brackets and commas of a text that comes in blocks, leaving out those in strings.

    Attributes:
        depth: How many brackets are open.
    """

    def __init__(self) -> None:
        self.depth = 0
        self._in_string, self._escaped = False, False  # of the next byte

    def __call__(self, block: bytes) -> tuple[np.ndarray, np.ndarray]:
        """Of the next block, the places of brackets and commas (n,), and how many brackets are open after each of them (n,)."""
        found = _KINDS[np.frombuffer(block, np.uint8)]
        places = np.flatnonzero(found)
        kinds = found[places]
        quotes = self._unescaped(places[kinds == _QUOTE], places[kinds == _BACKSLASH], len(block))
        marks = kinds >= _OPEN
        places, kinds = places[marks], kinds[marks]
        outside = (np.searchsorted(quotes, places) + self._in_string) % 2 == 0
        self._in_string = bool((len(quotes) + self._in_string) % 2)
        places, kinds = places[outside], kinds[outside].astype(np.int64)
        depths = self.depth + np.cumsum((kinds == _OPEN).astype(np.int64) - (kinds == _CLOSE))
        if len(depths):
            self.depth = int(depths[-1])
        return places, depths

    def _unescaped(self, quotes: np.ndarray, backslashes: np.ndarray, size: int) -> np.ndarray:
        """The quotes that no backslash escapes: of a row of backslashes each second one escapes what follows."""
        escaped = np.zeros(size + 1, bool)
        escaped[0] = self._escaped
        if len(backslashes):
            begins = np.diff(backslashes, prepend=-2) != 1
            first = backslashes[begins][np.cumsum(begins) - 1]
            order = backslashes - first + ((first == 0) & self._escaped)
            escaped[backslashes[order % 2 == 0] + 1] = True
        self._escaped = bool(escaped[size]) if size else self._escaped
        return quotes[~escaped[quotes]]


def one_line(text: bytes) -> bytes:
    """JSON text with tabs for line ends, which stand between tokens. In a string either is wrong, and stays wrong."""
    return text.translate(_ONE_LINE)


def element_lines(blocks: Iterable[bytes]) -> Iterator[bytes]:
    """The text of an array with each element on a line of its own, in blocks. What is wrong inside an element stays wrong.

    Args:
        blocks: The text, which begins with its bracket.

    Raises:
        ValueError: an element is missing, the array does not end, or something follows it.
    """
    walk, count, filled, ended = Walk(), 0, False, False
    for number, block in enumerate(blocks):
        if ended:
            if block.strip():
                raise ValueError("something follows the array")
            continue
        places, depths = walk(block)
        line = np.frombuffer(one_line(block), np.uint8).copy()
        if number == 0:
            line[0] = ord(" ")
        ends = places[depths == 0][:1]
        last = int(ends[0]) if len(ends) else len(line)
        marks = (depths == 1) & (places < last)
        commas = places[marks][np.frombuffer(block, np.uint8)[places[marks]] == ord(",")]
        line[commas] = ord("\n")
        text = line[:last].tobytes()
        first, *others = text.split(b"\n", 1)
        filled = filled or bool(first.strip())
        if others:
            missing = not filled or re.search(rb"\n[ \t]*\n", text)
            filled = bool(text[text.rindex(b"\n") :].strip())
            if missing:
                raise ValueError(f"between elements {count + 1:,} and {count + 1 + len(commas):,} one is missing")
        count += len(commas)
        if len(ends):
            ended = True
            if block[last + 1 :].strip():
                raise ValueError("something follows the array")
            if not filled and count:
                raise ValueError("no element follows the last comma")
            text += b"\n"
        yield text
    if not ended:
        raise ValueError("the array does not end")


def members(text: bytes, names: Collection[str]) -> dict[str, Any]:
    """The values of some members of an object, where they are strings or numbers, in memory that does not grow with the text.

    Args:
        text: Of the object, in UTF-8.
        names: Of the members. One whose name or value is longer than 4 KiB, or that is written with escapes where it needs
            none, is not found.

    Returns:
        What is found, by name. Nothing where the text is no whole object, or has two members of a name.
    """
    found: dict[str, Any] = {}
    if text.lstrip(b" \t\r\n")[:1] != b"{":
        return found
    written = {form for name in names for form in (json.dumps(name), json.dumps(name, ensure_ascii=False))}
    keys = b"|".join(re.escape(form.encode()) for form in sorted(written))
    value = rb'"(?:[^"\\]|\\.){0,%d}"|-?[0-9][0-9.eE+-]{0,%d}' % (_LONGEST, _LONGEST)
    space = rb"[ \t\r\n]*"
    member = re.compile(rb"[{,]%b(%b)%b:%b(%b)%b(?=[,}])" % (space, keys, space, space, value, space), re.DOTALL)
    walk = Walk()
    for start in range(0, len(text), _BLOCK):
        block = text[start : start + _BLOCK]
        places, depths = walk(block)
        own: set[int] | None = None  # places of the object's own commas and bracket
        for match in member.finditer(text, start, start + len(block) + 4 * _LONGEST):
            if match.start() >= start + len(block):
                break
            own = set(places[depths == 1].tolist()) if own is None else own
            if match.start() - start not in own:
                continue
            try:
                name, what = json.loads(match[1]), json.loads(match[2])
            except ValueError:
                return {}
            if name in found:
                return {}
            found[name] = what
    return {} if walk.depth else found
