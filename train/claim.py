"""A lock, so that only one run at a time is in a directory."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import StorageError
from ..io import lock
from ..terminal import say

__all__ = ["only_run"]


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
