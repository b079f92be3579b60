"""Patterns of an adapter: PEFT's regular expressions over names of modules, as far as they are matched in bounded time."""

import re
from collections.abc import Iterable

__all__ = ["bounded"]

# A piece of a pattern: one character, which may be repeated; the ends of a group; "or"; an end of the name. A group is not
# repeated, so that a pattern matches a name in no more ways than its pieces' numbers of ways multiply to.
_PIECE = re.compile(
    r"(?P<one>\\[.dDwWsS-]|\[\^?(?:\\[.dDwWsS-]|[^\[\]\\])+\]|[\w.-])(?P<times>[*+?]|\{\d{1,4}(?:,\d{0,4})?\})?\??"
    r"|(?P<open>\((?:\?:)?)|(?P<close>\)\??)|(?P<choice>\|)|[\^$]"
)
_LENGTH = 100  # of a module's name, about
_MOST = 100_000  # ways in which all patterns together may match a name


def bounded(patterns: Iterable[str]) -> bool:
    """Whether all are regular expressions, and together match a name in bounded time."""
    left = _MOST
    for pattern in patterns:
        ways = _ways(pattern)
        if ways is None or ways > left:
            return False
        left -= ways
    return True


def _ways(pattern: str) -> int | None:
    """In how many ways a pattern may match a name, at most; None if it has other pieces than those above."""
    ways, at, groups = 1, 0, [1]
    while at < len(pattern) and ways <= _MOST:
        piece = _PIECE.match(pattern, at)
        if piece is None:
            return None
        at = piece.end()
        if piece["open"]:
            groups.append(1)
        elif piece["choice"]:
            groups[-1] += 1
        elif piece["close"]:
            if len(groups) == 1:
                return None
            ways *= groups.pop() * (2 if piece["close"].endswith("?") else 1)
        elif piece["times"]:
            ways *= _repeats(piece["times"])
    try:
        re.compile(pattern)
    except (re.error, OverflowError):
        return None
    return ways * groups[0]


def _repeats(times: str) -> int:
    """How many numbers of repetitions there are."""
    if not times.startswith("{"):
        return 2 if times == "?" else _LENGTH
    least, _, most = times[1:-1].partition(",")
    return _LENGTH if times.endswith(",}") else max(int(most or least) - int(least) + 1, 1)
