"""Arguments that take one of a few names."""

from collections.abc import Sequence

from ..errors import InputError


def as_name(value: object) -> str:
    """`value` as a string; a member of an enum (transformers passes some) counts as its value."""
    return str(getattr(value, "value", value))


def one_of(name: str, value: object, choices: Sequence[str]) -> str:
    """`value`, the argument called `name`, as one of `choices`. Raises InputError if it is none of them."""
    text = as_name(value)
    if text not in choices:
        raise InputError(f"{name} is {text!r}; it is {' or '.join(map(repr, choices))}")
    return text
