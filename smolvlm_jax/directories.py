"""Atomic directories: filled under a temporary name beside the destination, then renamed.

The temporary name is `.NAME.part`, locked while its writer runs. A process that was killed leaves it behind; the next one
with the same destination removes it and starts over, because resuming would mean trusting half-written files. What is
replaced may be the only copy of somebody's weights: it is kept under another name.
"""

import ctypes
import errno
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from .errors import CheckpointError, InputError, SmolVLMError, StorageError, sizes_apart
from .io import lock, sync_directory
from .storage import AnyPath, StorePath
from .terminal import say

__all__ = ["EXISTS", "check_destination", "check_free_space", "disk_full", "make_directory", "replaced_name"]
__all__ += ["temporary_directory", "whole_directory"]

EXISTS = "exists: choose another name, or replace it with --force (force=True), which keeps the old one under another name"
# `force` replaces only a directory with one of these files, so that a mistyped path deletes no other data.
_OURS = ("config.json", "adapter_config.json", "manifest.json")
_Place = TypeVar("_Place", Path, StorePath)
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # of renameat2(2)


def make_directory(path: AnyPath, what: str) -> None:
    """Make a directory, and those above it, if need be.

    Args:
        path: the directory.
        what: of the user's settings it is, for the message.

    Raises:
        InputError: it cannot be one.
        OSError: the disk is full.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise InputError(f"{what} is a directory, and {path} cannot be one: {error.strerror}") from error
    except OSError as error:
        if disk_full(error):
            raise
        raise InputError(f"{what} cannot be made at {path}: {error.strerror or error}; choose another directory") from error


def temporary_directory(destination: Path) -> Path:
    """The absolute name under which `whole_directory` fills `destination`."""
    destination = Path(os.path.abspath(destination))
    return destination.with_name(f".{destination.name}.part")


@contextmanager
def whole_directory(
    destination: Path, force: bool = False, notify: Callable[[str], None] = say, *, own: bool = False
) -> Iterator[Path]:
    """Write a directory atomically.

    Yields an empty temporary directory. It becomes `destination` when the block ends, and is removed if the block raises.

    Args:
        destination: the directory to make; missing parents are made too.
        force: replace an existing checkpoint.
        notify: called with a line when something is moved, or something of an interrupted run is cleaned up.
        own: whether what is replaced is an earlier result of the same work, which is removed. Otherwise it is kept as
            `NAME_replaced-1`, or with the next free number.

    Raises:
        CheckpointError: the destination exists and `force` is not given, or it is not a checkpoint; no directory can be there.
        StorageError: another process is writing it; it cannot be written, or the disk is full.
    """
    destination = Path(os.path.abspath(destination))
    temporary = temporary_directory(destination)
    check_destination(destination, force)
    handle = None
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        handle = _claim(temporary, destination, notify)
        _recover(destination, notify, own=own)
        check_destination(destination, force)
        yield temporary
        _sync(temporary)
        aside = _replace(temporary, destination)
        sync_directory(destination.parent)
        if aside is not None:
            _let_go(aside, destination, notify, own=own)
    except BaseException as error:
        if handle is not None:
            _remove(temporary)
        if disk_full(error):
            raise StorageError(
                f"the disk is full: {destination} was not written, and what was written of it has been removed"
            ) from error
        if isinstance(error, OSError) and not isinstance(error, SmolVLMError):
            never = isinstance(error, (FileExistsError, FileNotFoundError, NotADirectoryError, PermissionError))
            kind = CheckpointError if never or error.errno == errno.EROFS else StorageError
            raise kind(f"cannot write {destination}: {error.strerror or error}") from error
        raise
    finally:
        if handle is not None:
            os.close(handle)


def _remove(directory: Path) -> None:
    """Remove a directory, also while threads that an error left behind end what they were writing to it."""
    for pause in (0, 0.1, 0.5, 2):
        time.sleep(pause)
        shutil.rmtree(directory, ignore_errors=True)
        if not directory.exists():
            return


def check_destination(destination: Path, force: bool) -> None:
    """Raise CheckpointError if `whole_directory` would not write the destination."""
    if not os.path.lexists(destination):
        return
    if not force:
        raise CheckpointError(f"{destination} {EXISTS}")
    empty = destination.is_dir() and not any(destination.iterdir())
    if destination.is_symlink() or not (empty or any((destination / name).is_file() for name in _OURS)):
        raise CheckpointError(f"{destination} exists and is not a checkpoint: it is not replaced, even with --force")


def _claim(temporary: Path, destination: Path, notify: Callable[[str], None]) -> int:
    """Make the temporary directory and lock it, removing one whose writer has ended."""
    for _ in range(100):
        try:
            temporary.mkdir()
            fresh = True
        except FileExistsError:
            fresh = False
            if temporary.is_symlink() or temporary.is_file():
                raise StorageError(f"{temporary} is in the way of {destination}: remove it") from None
        try:
            handle = os.open(temporary, os.O_RDONLY)
        except FileNotFoundError:
            continue
        if not lock(handle):
            os.close(handle)
            raise StorageError(f"another process is writing {destination}: wait for it, or choose another name")
        if not fresh:
            notify(f"an interrupted run left {temporary}: it is removed, starting over")
            shutil.rmtree(temporary, ignore_errors=True)
            os.close(handle)
            continue
        # Another process may have removed the directory as abandoned before it was locked.
        if temporary.exists() and os.fstat(handle).st_ino == temporary.stat().st_ino:
            return handle
        os.close(handle)
    raise StorageError(f"cannot create {temporary}: other processes keep removing it")


def _old(destination: Path) -> Path:
    """The name of what is replaced until it is let go."""
    return destination.with_name(f".{destination.name}.old")


def _replace(temporary: Path, destination: Path) -> Path | None:
    """Give a complete directory its final name. Returns where what had that name is now; None if nothing had."""
    if destination.exists() and not any(destination.iterdir()):
        destination.rmdir()
    if not destination.exists():
        temporary.rename(destination)
        return None
    old = _old(destination)
    temporary.rename(old)
    if not _exchange(old, destination):
        old.rename(temporary)
        destination.rename(old)
        try:
            temporary.rename(destination)
        except OSError:
            old.rename(destination)
            raise
    return old


def _exchange(one: Path, other: Path) -> bool:
    """Let two directories change names in one step, so that both exist at every moment. Returns False, and does nothing, where
    the system or the file system cannot."""
    try:
        rename = ctypes.CDLL(None).renameat2  # of Linux
    except (AttributeError, OSError, TypeError):
        return False
    return rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0


def replaced_name(destination: _Place) -> _Place:
    """The free name beside a destination under which what is replaced there is kept, `NAME_replaced-1` or a higher number."""
    number = 1
    while True:
        aside = destination.with_name(f"{destination.name}_replaced-{number}")
        if not (aside.exists() or aside.is_symlink()):
            return aside
        number += 1


def _let_go(old: Path, destination: Path, notify: Callable[[str], None], *, own: bool) -> None:
    """Remove what was replaced, or keep it under a name that says what it is."""
    if own:
        shutil.rmtree(old, ignore_errors=True)
        return
    aside = replaced_name(destination)
    old.rename(aside)
    sync_directory(destination.parent)
    notify(f"the old {destination} is kept as {aside}")


def _recover(destination: Path, notify: Callable[[str], None], *, own: bool) -> None:
    """Restore or let go the old directory if a run was killed while it replaced it."""
    old = _old(destination)
    if not old.exists():
        return
    if destination.exists():
        _let_go(old, destination, notify, own=own)
    else:
        notify(f"an interrupted run had moved {destination} aside: it is put back")
        old.rename(destination)


def disk_full(error: BaseException | None) -> bool:
    """Whether an exception or one of its causes means so; tensorstore quotes the system's message in its own."""
    while error is not None:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            return True
        if "No space left on device" in str(error) or "Disk quota exceeded" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def _sync(directory: Path) -> None:
    """Flush everything in a directory to the disk before it gets its final name."""
    for folder, _, files in os.walk(directory):
        for name in files:
            with open(os.path.join(folder, name), "rb") as file:
                os.fsync(file.fileno())
        sync_directory(Path(folder))


def check_free_space(directory: Path, needed: int) -> None:
    """Raise StorageError unless the file system of `directory`, which need not exist yet, has `needed` bytes free, and
    CheckpointError if no directory can be there."""
    folder = Path(os.path.abspath(directory))
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir() and folder != Path(os.path.abspath(directory)):
        raise CheckpointError(f"cannot write {directory}: {folder} is not a directory")
    usage = shutil.disk_usage(folder)
    if usage.total == 0:  # /proc and its like
        raise CheckpointError(f"cannot write {directory}: {folder} is no place for files")
    free = usage.free
    if free < needed:
        wanted, left, _ = sizes_apart(needed, free)
        raise StorageError(f"the disk is full: {directory} needs {wanted}, and {folder} has {left} free")
