"""A run's directory: its own as long as the run lasts, and gone again where the run never began."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..directories import make_directory
from ..errors import StorageError
from ..io import lock
from ..terminal import say

__all__ = ["made_directory", "nothing_left", "only_run"]

# What a run writes before its first step is done.
_FIRST = ("run.json", "config.json", "metrics.jsonl", "checkpoints", "tensorboard")


@contextmanager
def made_directory(path: Path) -> Iterator[None]:
    """Make a run's directory. If the block raises and leaves it empty, it is removed, with those above it that were made too.

    Raises:
        InputError: it cannot be made.
    """
    made = []
    for folder in (path, *path.parents):
        if os.path.lexists(folder):
            break
        made.append(folder)
    try:
        make_directory(path, "output")
        yield
    except BaseException:
        with suppress(OSError):
            for folder in made:
                folder.rmdir()
        raise


@contextmanager
def nothing_left(directory: Path) -> Iterator[None]:
    """If the block raises before the run has finished a step, what it has written into its directory is removed."""
    before = set(os.listdir(directory))
    try:
        yield
    except BaseException:
        if not _begun(directory):
            for name in set(_FIRST) - before:
                path = directory / name
                shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
        raise


def _begun(directory: Path) -> bool:
    """Whether there is a line of metrics, or a checkpoint, whole or not."""
    log, steps = directory / "metrics.jsonl", directory / "checkpoints"
    return (log.is_file() and log.stat().st_size > 0) or (steps.is_dir() and any(steps.iterdir()))


@contextmanager
def only_run(directory: Path) -> Iterator[None]:
    """Keep other runs out of a directory until the block ends, or this process does.

    The directory itself is locked, so that nothing is left behind.

    Raises:
        StorageError: another run is in it.
    """
    handle = os.open(directory, os.O_RDONLY)
    try:
        try:
            free = lock(handle)
        except OSError as error:
            say(f"{directory} cannot be locked ({error.strerror or error}): start no second run with the same output")
            free = True
        if not free:
            raise StorageError(f"another run is writing {directory}: wait until it ends, or choose another output")
        yield
    finally:
        os.close(handle)
