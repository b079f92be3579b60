"""A directory appears whole or not at all: it is filled under another name beside the destination, then renamed.

The temporary name is `.NAME.part`, locked while its writer lives. A run that was killed leaves it behind, and the next one to
the same destination says so, removes it and starts over: resuming would have to trust half-written files, and a conversion
takes little longer than a copy.
"""

import errno
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import CheckpointError

__all__ = ["check_free_space", "whole_directory"]

# What a directory must contain before --force replaces it: a mistyped path must not cost somebody's home.
_OURS = ("config.json", "manifest.json")


def say(message: str) -> None:
    """A line for the person at the terminal."""
    print(f"smolvlm-jax: {message}", file=sys.stderr)


@contextmanager
def whole_directory(destination: Path, force: bool = False, notify: Callable[[str], None] = say) -> Iterator[Path]:
    """Yield an empty temporary directory; when the block ends without an exception, it becomes `destination`.

    Raises CheckpointError if the destination exists and `force` is not given, if it exists and is not a checkpoint, if another
    process is writing it, or if the disk is full. On an exception everything written is removed.
    """
    destination = Path(os.path.abspath(destination))
    temporary = destination.with_name(f".{destination.name}.part")
    replaced = destination.with_name(f".{destination.name}.old")
    _check_destination(destination, force)
    lock = None
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        lock = _claim(temporary, destination, notify)
        _recover(destination, replaced, notify)
        _check_destination(destination, force)
        yield temporary
        _sync(temporary)
        if destination.exists():
            destination.rename(replaced)
        temporary.rename(destination)
        _sync_directory(destination.parent)
        shutil.rmtree(replaced, ignore_errors=True)
    except BaseException as error:
        if lock is not None:
            shutil.rmtree(temporary, ignore_errors=True)
        if _disk_full(error):
            raise CheckpointError(
                f"the disk is full: {destination} was not written, and what was written of it has been removed"
            ) from error
        if isinstance(error, OSError):
            raise CheckpointError(f"cannot write {destination}: {error.strerror or error}") from error
        raise
    finally:
        if lock is not None:
            os.close(lock)


def _check_destination(destination: Path, force: bool) -> None:
    if not os.path.lexists(destination):
        return
    if not force:
        raise CheckpointError(f"{destination} exists: choose another name, or replace it with --force (force=True)")
    empty = destination.is_dir() and not any(destination.iterdir())
    if destination.is_symlink() or not (empty or any((destination / name).is_file() for name in _OURS)):
        raise CheckpointError(f"{destination} exists and is not a checkpoint: it is not replaced, even with --force")


def _claim(temporary: Path, destination: Path, notify: Callable[[str], None]) -> int:
    """Make the temporary directory and lock it, removing one whose writer is dead."""
    for _ in range(100):
        try:
            temporary.mkdir()
            fresh = True
        except FileExistsError:
            fresh = False
        try:
            lock = os.open(temporary, os.O_RDONLY)
        except FileNotFoundError:
            continue
        if not _lock(lock):
            os.close(lock)
            raise CheckpointError(f"another process is writing {destination}: wait for it, or choose another name")
        if not fresh:
            notify(f"an interrupted run left {temporary}: it is removed, starting over")
            shutil.rmtree(temporary, ignore_errors=True)
            os.close(lock)
            continue
        # Somebody may have taken the directory for an abandoned one before it was locked.
        if temporary.exists() and os.fstat(lock).st_ino == temporary.stat().st_ino:
            return lock
        os.close(lock)
    raise CheckpointError(f"cannot create {temporary}: other processes keep removing it")


def _lock(handle: int) -> bool:
    """Lock an open directory until it is closed or its process dies; False if somebody else holds it."""
    import fcntl

    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            return False
        raise
    return True


def _recover(destination: Path, replaced: Path, notify: Callable[[str], None]) -> None:
    """A run that was killed between the two renames of --force left the old directory under its other name."""
    if not replaced.exists():
        return
    if destination.exists():
        shutil.rmtree(replaced, ignore_errors=True)
    else:
        notify(f"an interrupted run had moved {destination} aside: it is put back")
        replaced.rename(destination)


def _disk_full(error: BaseException | None) -> bool:
    """Whether an exception or its cause says so: tensorstore reports the system's message inside its own."""
    while error is not None:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            return True
        if "No space left on device" in str(error) or "Disk quota exceeded" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def _sync(directory: Path) -> None:
    """What is about to get its final name shall survive a power cut under it."""
    for folder, _, files in os.walk(directory):
        for name in files:
            with open(os.path.join(folder, name), "rb") as file:
                os.fsync(file.fileno())
        _sync_directory(Path(folder))


def _sync_directory(directory: Path) -> None:
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def check_free_space(directory: Path, needed: int) -> None:
    """Raise CheckpointError now rather than after an hour of writing. `directory` or its nearest existing parent is asked."""
    folder = Path(os.path.abspath(directory))
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise CheckpointError(
            f"the disk is full: {directory} needs {needed / 1e9:.2f} GB, and {folder} has {free / 1e9:.2f} GB free"
        )
