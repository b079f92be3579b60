"""Recipes: whole training runs as YAML files, some of them built in."""

import itertools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...arguments import nearest
from ...errors import ConfigError, import_extra
from ...storage import StorePath, place
from ...stored_models import stored_file
from ..config import TrainConfig
from ..continued import EXPORTED
from ..plain import from_dict

__all__ = ["load_recipe", "recipe_names", "recipe_purpose"]

# Two keys for one thing.
_WARMUPS = ("warmup_steps", "warmup_fraction")
_HERE = Path(__file__).parent


def recipe_names() -> list[str]:
    """The built-in recipes."""
    return sorted(path.stem for path in _HERE.glob("*.yaml"))


def recipe_purpose(name: str) -> str:
    """What a built-in recipe is for: the first sentence of the comment at its head."""
    lines = (_HERE / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    head = itertools.takewhile(lambda line: line.startswith("# "), lines)
    return " ".join(line.removeprefix("# ") for line in head if not line.startswith("#  ")).partition(". ")[0].rstrip(".")


def load_recipe(name: str, overrides: Sequence[str] = ()) -> TrainConfig:
    """Read a recipe and apply `key=value` words.

    Args:
        name: a YAML file, or the name of a built-in recipe.
        overrides: words such as "data.length=1024": dots go into nested settings, values are YAML.

    Returns:
        The configuration of the run.

    Raises:
        ConfigError: something does not fit; the message names the recipe and the key.
        MissingExtraError: PyYAML is not installed.
    """
    yaml = import_extra("yaml", "reading a recipe", "train")
    given_path = place(name)
    if isinstance(given_path, StorePath):
        given_path = stored_file(given_path)
    path = next((path for path in (given_path, _HERE / f"{name}.yaml") if path.is_file()), None)
    if path is None:
        names = recipe_names()
        if re.match(r"[\w.]+=", name):
            raise ConfigError(
                f"no recipe {name!r}, which is KEY=VALUE: first comes a recipe, a YAML file or one of the built-in "
                f"{', '.join(names)}, such as in `lora-256m {name}`"
            )
        raise ConfigError(
            f"no recipe {name!r}: not a file, and not one of the built-in {', '.join(names)}{nearest(name, names)}"
        )
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error
    data = _read(yaml, text, str(path))
    if not isinstance(data, dict):
        raise ConfigError(f"{path} holds no recipe: it is YAML of keys and values, such as steps: 100")
    data.pop(EXPORTED, None)  # of a run's run.json, which is a recipe otherwise
    words: dict[str, str] = {}
    for word in overrides:
        key, equals, _ = word.partition("=")
        if not equals or not key:
            raise ConfigError(f"{word!r} is not KEY=VALUE")
        words[key] = word  # the last of one key counts, as of a switch, so that a script's words can be followed by others
    given: list[tuple[str, str]] = []
    for key, word in words.items():
        value = _read(yaml, word.partition("=")[2], repr(word))
        leaves = _leaves(key, value)
        for name, other in given:
            if any(f"{a}.".startswith(f"{b}.") for leaf in (key, *leaves) for a, b in ((leaf, name), (name, leaf))):
                raise ConfigError(f"{other!r} and {word!r} set the same: leave one out")
        given += [(leaf, word) for leaf in leaves]
        _set(data, key.split("."), value, word)
    for name, other in (_WARMUPS, _WARMUPS[::-1]):
        if name in words and other not in words and data[name] is not None:  # a word takes the place of the recipe's warm-up
            data.pop(other, None)
    try:
        return from_dict(data)
    except ConfigError as error:
        raise ConfigError(f"recipe {path.stem}: {error}") from error


def _read(yaml: Any, text: str, what: str) -> Any:
    """What a YAML text holds. A key that occurs twice, of which YAML would take the last, is an error."""

    class Loader(yaml.SafeLoader):
        def compose_mapping_node(self, anchor):
            node = super().compose_mapping_node(anchor)
            names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
            if twice := [name for name in names if names.count(name) > 1]:
                raise yaml.MarkedYAMLError(problem=f"the key {twice[0]!r} occurs twice", problem_mark=node.start_mark)
            return node

    try:
        return yaml.load(text, Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a date or a number that cannot be
        raise ConfigError(f"{what} is not valid YAML: {' '.join(str(error).split())}") from error


def _leaves(key: str, value: Any) -> list[str]:
    """The keys that a value sets, with dots between levels."""
    if isinstance(value, dict):
        return [leaf for name, inner in value.items() for leaf in _leaves(f"{key}.{name}", inner)]
    return [key]


def _set(data: dict, keys: list[str], value: Any, word: str) -> None:
    *parents, last = keys
    for key in parents:
        if data.get(key) is None:
            data[key] = {}
        data = data[key]
        if not isinstance(data, dict):
            raise ConfigError(f"{word!r}: {key} is a value, there is nothing below it")
    data[last] = value
