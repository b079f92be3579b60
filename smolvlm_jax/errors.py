"""The exceptions users meet. Each message says what is wrong, where, and what to do about it.

Every class also derives from the built-in exception the reference raises in the same situation, so that code which
moves over from transformers keeps its `except` clauses.
"""

import importlib
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar


class SmolVLMError(Exception):
    """Base class: whatever this library raises on purpose is one of these.

    Attributes:
        exit_code: of the command line. 2 is a mistake, which the same command would make again.
    """

    exit_code: ClassVar[int] = 2


class ConfigError(SmolVLMError, ValueError):
    """A config.json, or an argument of a config, that no model can be built from."""


class CheckpointError(SmolVLMError, ValueError):
    """A checkpoint that is absent, incomplete, or disagrees with its config."""


class MissingFileError(CheckpointError, ConfigError, FileNotFoundError):
    """A model, or a file of one, that is not where it was said to be."""


class DownloadError(CheckpointError, OSError):
    """A model that cannot be downloaded at the moment: the network or the server fails. The same command may be run again."""

    exit_code = 1


class InputError(SmolVLMError, ValueError):
    """Arguments that contradict each other: counts of pictures, tiles and image tokens, shapes, ranges."""


class HabitError(InputError, AttributeError, TypeError):
    """What transformers or torch would do and we do otherwise: the message says what to type instead."""


class MediaError(InputError, OSError):
    """A picture or video that cannot be found, fetched, decoded, or that exceeds a limit."""


class PromptError(InputError):
    """A conversation or template that cannot be turned into a prompt."""


class ArgumentError(InputError, TypeError):
    """A call with an argument that there is not, without one that it needs, or with one given twice: a TypeError of Python that
    also says which name was probably meant."""


class JobError(SmolVLMError, RuntimeError):
    """What ends a job without a mistake of the user: a device without memory, workers that do not start, an output or an input
    that another process changed. What is finished is kept, and the same command may be run again."""

    exit_code = 1


class ChangedError(JobError):
    """A file that is no longer what it was when work on it began. Once it is back, the same command may be run again."""


class UnreachableError(JobError):
    """An object store that has not answered for a minute. Nothing is known to be wrong with what was asked of it, so this is no
    OSError, which would be taken for a fault of the file."""


class StorageError(CheckpointError, JobError):
    """A directory that cannot be written now: another process writes it, or the disk is full. It is as it was."""

    exit_code = 1


class MissingExtraError(SmolVLMError, ImportError):
    """An optional dependency is not installed; the message names the `pip install` that brings it.

    Args:
        what: what needs it.
        extra: the extra of this package that brings it; None where no extra does.
        then: a command after that.
    """

    def __init__(self, what: str, extra: str | None, then: str = ""):
        command = " && ".join(filter(None, (extra and f"pip install 'smolvlm-jax[{extra}]'", then)))
        super().__init__(f"{what} needs an optional dependency. Install it with: {command}")


def describe(error: BaseException) -> str:
    """What went wrong, in one line.

    Args:
        error: of any kind.

    Returns:
        The message of an error of this library; of any other its type and message.
    """
    text = str(error) if isinstance(error, SmolVLMError) else f"{type(error).__name__}: {error}"
    return " ".join(text.split())


def import_extra(module: str, what: str, extra: str | None, then: str = "") -> Any:
    """An optional module.

    Args:
        module: its name.
        what: what needs it, for the message.
        extra: the extra of this package that brings it; None where no extra does.
        then: a command after that, for what no extra can bring.

    Returns:
        The module.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtraError(what, extra, then) from error


def first_few(items: Iterable[str], limit: int = 10) -> list[str]:
    """The first of many things a message has to name, and a count of the others.

    Args:
        items: the things.
        limit: how many are named.

    Returns:
        The first `limit`, and a line that counts the others if there are any.
    """
    found = list(items)
    more = len(found) - limit
    return found if more <= 0 else [*found[:limit], f"… and {more:,} more"]


def size_text(count: int) -> str:
    """A number of bytes in words.

    Args:
        count: the number.

    Returns:
        Such as "1.25 GB" or "3.0 MB".
    """
    for unit, scale, digits in (("GB", 1e9, 2), ("MB", 1e6, 1), ("kB", 1e3, 1)):
        if abs(count) >= scale:
            return f"{count / scale:,.{digits}f} {unit}"
    return f"{count} byte{'s' * (count != 1)}"


def sizes_apart(needed: int, there: int) -> tuple[str, str, str]:
    """For a message that something is too large: both sizes with as many digits as show the difference, and that.

    Args:
        needed: bytes, more than `there`.
        there: bytes.

    Returns:
        Both in GB, and by how much the first is larger.
    """
    over = needed - there
    digits = next((digits for digits in range(2, 9) if 10 ** (9 - digits) <= over), 9)
    return f"{needed / 1e9:,.{digits}f} GB", f"{there / 1e9:,.{digits}f} GB", size_text(over)


@contextmanager
def device_errors(lower: str) -> Iterator[None]:
    """Within the block, what jax says of a device that fails, is full or is not there becomes a JobError of one line.

    Args:
        lower: what needs less of the device's memory, for the message.

    Yields:
        Nothing.

    Raises:
        JobError: the device fails, is full or is not there.
    """
    try:
        yield
    except RuntimeError as error:
        jax = sys.modules.get("jax")
        text = str(error).strip()
        absent = text.startswith("Unable to initialize backend")
        if jax is None or not (absent or isinstance(error, jax.errors.JaxRuntimeError)):
            raise
        first = (text.splitlines() or [type(error).__name__])[0][:300]
        if "RESOURCE_EXHAUSTED" in text or "out of memory" in text.lower():
            raise JobError(f"the device is out of memory: lower {lower} ({first})") from error
        raise JobError(f"the device failed: {first}") from error
