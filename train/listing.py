"""The built-in recipes and the keys of a recipe as text, from the files and docstrings that define them."""

import dataclasses
import inspect
import re
import typing
from typing import Any

from ..terminal import table

__all__ = ["described", "recipe_keys"]


def described(*, keys: bool) -> str:
    """The built-in recipes, one on a line, and with `keys` every key of a recipe with its default and its meaning."""
    from .recipes import recipe_names, recipe_purpose

    recipes = table([(name, recipe_purpose(name)) for name in recipe_names()])
    if not keys:
        return recipes
    return f"{recipes}\n\n{table([(f'{key}={default}', text) for key, default, text in recipe_keys()])}"


def recipe_keys() -> list[tuple[str, str, str]]:
    """Each key as it is written on the command line, its default, and what its docstring says."""
    from .config import TrainConfig

    return list(_keys(TrainConfig, ""))


def _keys(settings: Any, prefix: str):
    from .plain import MAPPINGS

    hints, meanings = typing.get_type_hints(settings), _meanings(settings)
    for field in dataclasses.fields(settings):
        kinds = [kind for kind in (hints[field.name], *typing.get_args(hints[field.name])) if dataclasses.is_dataclass(kind)]
        if kinds:
            for kind in kinds:
                sources = typing.get_origin(hints[field.name]) is tuple
                yield from _keys(kind, f"{prefix}{field.name}{'[]' if sources else ''}.")
            continue
        required = field.default is field.default_factory is dataclasses.MISSING
        value = field.default if field.default is not dataclasses.MISSING else ()
        default = "…" if required else "{}" if field.name in MAPPINGS else _shown(value)
        yield f"{prefix}{field.name}", default, meanings[field.name]


def _shown(value: Any) -> str:
    """A default as YAML has it."""
    words = {None: "null", True: "true", False: "false"}
    if isinstance(value, (bool, type(None))):
        return words[value]
    return "[]" if value == () else str(value) or "''"


def _meanings(settings: Any) -> dict[str, str]:
    """From the section Attributes or Args of a docstring: what is said of each name."""
    text = inspect.getdoc(settings) or ""
    section = re.search(r"^(?:Attributes|Args):\n((?:[ ]+.*\n?|\n)*)", text, re.MULTILINE)
    entries = re.findall(r"^    ([\w, ]+): (.*(?:\n      .*)*)", section[1] if section else "", re.MULTILINE)
    return {name.strip(): " ".join(text.split()) for names, text in entries for name in names.split(",")}
