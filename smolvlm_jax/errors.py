"""The exceptions users meet. Each message says what is wrong, where, and what to do about it.

Every class also derives from the built-in exception the reference raises in the same situation, so that code which
moves over from transformers keeps its `except` clauses.
"""

import importlib
from collections.abc import Iterable
from typing import Any


class SmolVLMError(Exception):
    """Base class: whatever this library raises on purpose is one of these."""


class ConfigError(SmolVLMError, ValueError):
    """A config.json, or an argument of a config, that no model can be built from."""


class CheckpointError(SmolVLMError, ValueError):
    """A checkpoint that is absent, incomplete, or disagrees with its config."""


class ChangedError(SmolVLMError):
    """A file that is no longer what it was when work on it began. Once it is back, the same command may be run again."""

    exit_code = 1


class InputError(SmolVLMError, ValueError):
    """Arguments that contradict each other: counts of pictures, tiles and image tokens, shapes, ranges."""


class MediaError(InputError, OSError):
    """A picture or video that cannot be found, fetched, decoded, or that exceeds a limit."""


class PromptError(InputError):
    """A conversation or template that cannot be turned into a prompt."""


class MissingExtraError(SmolVLMError, ImportError):
    """An optional dependency is not installed; the message names the `pip install` that brings it."""

    def __init__(self, what: str, extra: str):
        super().__init__(f"{what} needs an optional dependency. Install it with: pip install 'smolvlm-jax[{extra}]'")


def describe(error: BaseException) -> str:
    """What went wrong, in one line: the message of an error of this library, with the type in front of any other."""
    text = str(error) if isinstance(error, SmolVLMError) else f"{type(error).__name__}: {error}"
    return " ".join(text.split())


def import_extra(module: str, what: str, extra: str) -> Any:
    """An optional module.

    Args:
        module: its name.
        what: what needs it, for the message.
        extra: the extra of this package that brings it.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtraError(what, extra) from error


def first_few(items: Iterable[str], limit: int = 10) -> list[str]:
    """The first of many things a message has to name, and a count of the others."""
    found = list(items)
    more = len(found) - limit
    return found if more <= 0 else [*found[:limit], f"… and {more:,} more"]
