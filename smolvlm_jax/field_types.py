"""Whether the fields of a dataclass of settings have the types that it declares, checked in the constructor: otherwise a
wrong type is found in the middle of the work, as an error of Python."""

import dataclasses
import functools
import numbers
import os
import re
import types
import typing
from typing import Any

from .errors import ConfigError, InputError, SmolVLMError

__all__ = ["check_kind", "check_types"]

_MODULES = re.compile(r"\b(?:\w+\.)+(?=\w)")


# What counts as a value of a type, where that is not its instances alone.
_ACCEPTED: dict[Any, tuple[type, ...]] = {int: (numbers.Integral,), float: (numbers.Real,), tuple: (tuple, list)}


def check_types(settings: Any, error: type[SmolVLMError] = ConfigError) -> None:
    """Compare the fields with their annotations. A whole number is a float, a list a tuple, and True no number; a field may
    hold its default, whatever its annotation.

    Args:
        settings: An instance of a dataclass.
        error: The exception to raise.

    Raises:
        SmolVLMError: an `error`: a field has a value of another type; the message names both.
    """
    kind: Any = type(settings)
    hints = _hints(kind)
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if value is not field.default and not _fits(value, hints[field.name]):
            raise error(f"{field.name} is {value!r:.80}; it needs a value of type {_words(hints[field.name])}")


def check_kind(name: str, value: Any, kinds: type | tuple[type, ...], what: str) -> None:
    """Refuse an argument of another kind by name.

    Args:
        name: of the argument.
        value: what it is.
        kinds: what it may be an instance of.
        what: what to pass, for the message.

    Raises:
        InputError: it is of none of them.
    """
    if not isinstance(value, kinds):
        # the text of a tree of arrays would fetch them from the device
        shown = f"{value!r:.60}, " if isinstance(value, (str, os.PathLike, int, float, type(None))) else ""
        raise InputError(f"{name} is {shown}a {type(value).__name__}; pass {what}")


@functools.cache
def _hints(kind: Any) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _fits(value: Any, hint: Any) -> bool:
    if hint is Any:
        return True
    if hint is None or hint is types.NoneType:
        return value is None
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, part) for part in arguments)
    kind = origin or hint
    if not isinstance(kind, type):
        return True
    if isinstance(value, bool) and kind in (int, float):
        return False
    if not isinstance(value, _ACCEPTED.get(kind, (kind,))):
        return False
    if kind is not tuple or not arguments or not isinstance(value, (tuple, list)):
        return True
    if arguments[-1] is Ellipsis:
        return all(_fits(item, arguments[0]) for item in value)
    return len(value) == len(arguments) and all(map(_fits, value, arguments))


def _words(hint: Any) -> str:
    """The types of a hint, for a message."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " or ".join(_words(part) for part in typing.get_args(hint) if part is not types.NoneType)
    return hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else _MODULES.sub("", str(hint))
