"""Atomic files, and the locks that tell the files of a running process from those that a killed one has left."""

import errno
import os
import secrets
import socket
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

try:
    import fcntl
except ImportError:  # not POSIX: without locks nobody can tell that a writer is dead, so its files are not removed
    fcntl = None  # type: ignore[assignment]

__all__ = ["HOST", "lock", "remove_dead", "sync_directory", "try_lock", "unique_name", "whole_file"]

HOST = "".join(c if c.isalnum() or c == "-" else "-" for c in socket.gethostname()) or "host"


def unique_name() -> str:
    """HOST.PID-RANDOM: no two writers share one, on whatever machine or in whatever container they run."""
    return f"{HOST}.{os.getpid()}-{secrets.token_hex(4)}"


@contextmanager
def whole_file(path: Path) -> Iterator[IO[bytes]]:
    """Write a file atomically.

    Yields a binary file with a temporary name in the directory of `path`. It is flushed to the disk and renamed to `path`
    when the block ends, and removed if the block raises.
    """
    temporary = path.with_name(f".{path.name}.{unique_name()}.tmp")
    try:
        with open(temporary, "wb") as file:
            try_lock(file)
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_directory(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def lock(file: IO | int) -> bool:
    """Lock an open file or directory until it is closed or its process ends.

    Returns:
        False if another process holds the lock.

    Raises:
        OSError: the file system, or the platform, has no locks.
    """
    if fcntl is None:
        raise OSError(errno.ENOLCK, "this platform has no file locks")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            return False
        raise
    return True


def try_lock(file: IO) -> bool:
    """As `lock`, and False as well where there are no locks."""
    try:
        return lock(file)
    except OSError:
        return False


def remove_dead(paths: Iterable[Path], foreign: bool = False) -> None:
    """Remove files, named as `unique_name` says, whose writers have ended.

    Args:
        paths: files that their writers keep locked.
        foreign: also remove files of other hosts, whose locks cannot be seen here. Only for files that nobody needs any more.
    """
    for path in paths:
        ours = f".{HOST}." in path.name
        if not ours and not foreign:
            continue
        try:
            with open(path, "rb") as file:
                if not ours or try_lock(file):
                    path.unlink(missing_ok=True)
        except OSError:
            continue


def sync_directory(directory: Path) -> None:
    """Make renames in a directory survive a power cut, on file systems that support it."""
    try:
        handle = os.open(directory, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError:
        pass
    finally:
        os.close(handle)
