"""Settings as plain data: from a recipe to `TrainConfig` and back, and whether two runs have the same."""

import dataclasses
import json
import types
import typing
from collections.abc import Mapping
from typing import Any

from ..arguments import nearest
from ..errors import CheckpointError, ConfigError
from .bounds import shown
from .config import DataSource, EvaluationConfig, TrainConfig
from .foreign import FOREIGN

__all__ = ["MAPPINGS", "from_dict", "require_same", "to_dict"]

# Fields of pairs that are written as a mapping.
MAPPINGS = ("learning_rates", "image_options")


def require_same(what: str, before: Mapping[str, Any], now: Mapping[str, Any], *names: str) -> None:
    """Raise CheckpointError unless a run continues with the values of these keys that `what` was made with."""
    for name in names:
        old, new = before.get(name), now[name]
        if old == new:
            continue
        if isinstance(old, Mapping) and isinstance(new, Mapping) and set(old) == set(new):  # of which one key may differ
            inner = next(key for key in new if old[key] != new[key])
            name, old, new = f"{name}.{inner}", old[inner], new[inner]
        raise CheckpointError(
            f"{what} has {name} {old!r}, but now it is {new!r}: continue with the same, or choose another output directory"
        )


def to_dict(config) -> dict[str, Any]:
    """A config as plain data, which `from_dict` reads."""
    plain = lambda items: {name: dict(value) if name in MAPPINGS else value for name, value in items}
    return json.loads(json.dumps(dataclasses.asdict(config, dict_factory=plain)))  # lists in place of tuples, as in a file


def from_dict(data: Mapping[str, Any], cls=TrainConfig, where: str = "") -> Any:
    """A config from plain data.

    Args:
        data: keys and values.
        cls: the dataclass to make.
        where: prefix of keys in messages.

    Raises:
        ConfigError: a key is unknown, missing or of the wrong type; the message names it and what is meant.
    """
    if not isinstance(data, Mapping):
        raise ConfigError(f"{where.rstrip('.') or 'a recipe'} must be a mapping of keys to values, not {shown(data)}")
    hints = typing.get_type_hints(cls)
    known = {entry.name: entry for entry in dataclasses.fields(cls)}
    for key in data:
        if key not in known:
            here = FOREIGN.get(str(key))
            hint = f"; here: {here}" if here else nearest(str(key), known) or "; smolvlm-jax train --list shows all keys"
            raise ConfigError(f"unknown key {where}{key!s}{hint}")
    values = {key: _convert(value, hints[key], f"{where}{key}") for key, value in data.items()}
    required = [n for n, e in known.items() if e.default is e.default_factory is dataclasses.MISSING]
    missing = [f"{where}{name}" for name in required if name not in values]
    if missing:
        raise ConfigError(f"missing: {', '.join(missing)}")
    return cls(**values)


def _convert(value, kind, where: str):
    """A value converted to its field's type: YAML 1.1 reads 5e-6 as a string, and one path may stand for a list of sources."""
    if isinstance(kind, types.UnionType):
        if value is None:
            return None
        kinds = [k for k in typing.get_args(kind) if k is not type(None)]
        several = [k for k in kinds if typing.get_origin(k) is tuple] if isinstance(value, (list, tuple)) else []
        kind = (several or kinds)[0]
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        if kind in (DataSource, EvaluationConfig) and isinstance(value, str):
            value = {"path": value}
        return value if isinstance(value, kind) else from_dict(value, kind, f"{where}.")
    if typing.get_origin(kind) is tuple:
        return _convert_tuple(value, typing.get_args(kind), where)
    try:
        if kind is float and not isinstance(value, bool):
            return float(value)
        if kind is int and not isinstance(value, bool):
            if isinstance(value, int):
                return value
            if float(value) == int(float(value)):
                return int(float(value))
        elif isinstance(value, kind) and (kind is bool or not isinstance(value, bool)):
            return value
    except (TypeError, ValueError, OverflowError):
        pass
    raise ConfigError(f"{where} is {shown(value)}; it needs a value of type {kind.__name__}")


def _convert_tuple(value, inner, where: str):
    sources = inner[0] is DataSource
    if isinstance(value, Mapping) and not sources:
        value = list(value.items())
    if isinstance(value, (str, Mapping)):
        value = [value]
    if not isinstance(value, (list, tuple)):
        raise ConfigError(f"{where} is {shown(value)}; it needs a {'path, or a list of sources' if sources else 'list'}")
    if typing.get_origin(inner[0]) is tuple:
        kinds = typing.get_args(inner[0])
        if not all(isinstance(v, (list, tuple)) and len(v) == len(kinds) for v in value):
            raise ConfigError(f"{where} is {shown(value)}; it needs groups of {len(kinds)} values")
        return tuple(tuple(x if k is Any else _convert(x, k, where) for x, k in zip(v, kinds, strict=True)) for v in value)
    return tuple(_convert(v, inner[0], f"{where}[{i}]") for i, v in enumerate(value))
