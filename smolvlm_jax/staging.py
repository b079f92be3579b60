"""Between files and object stores: local copies of objects, and new directories that are sent to a store when complete.

What reads and writes checkpoints works on files, so a checkpoint in a store is copied whole, to or from a folder under the
system's directory for temporary files (TMPDIR). The folder is removed when it is no longer needed; after a process
was killed, the next one on the machine removes it.

There is no rename in a store. The file that marks a directory as complete, its config.json or adapter_config.json, is put
last and removed first; until then there is an object `.incomplete` beside the others.
"""

import atexit
import errno
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from .directories import EXISTS, check_destination, check_free_space, disk_full, replaced_name, whole_directory
from .errors import ChangedError, CheckpointError, DownloadError, InputError, MissingFileError, SmolVLMError, StorageError
from .io import HOST, lock, unique_name
from .storage import AnyPath, Entry, StorePath, download, remove, upload, upload_tree
from .terminal import say

__all__ = ["INCOMPLETE", "MARKERS", "check_new", "check_room", "folder_of_copies", "local_copy", "local_files", "new_directory"]
__all__ += ["reading", "remove_temporary_folders", "temporary_folder", "writing"]

INCOMPLETE = ".incomplete"
MARKERS = ("config.json", "adapter_config.json")
_OURS = (*MARKERS, "manifest.json")
_NAME = "smolvlm-jax-stage"
_TOGETHER = 8
_REMOVING_SECONDS = 2.0

_temporary: dict[Path, int] = {}  # folders, and the number of the process that made each


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """An empty folder for temporary files, removed when the block ends; those of processes that were killed are removed now."""
    parent = Path(tempfile.gettempdir())
    for left in parent.glob(f"{_NAME}.{HOST}.*"):
        _remove_dead(left)
    folder = parent / f"{_NAME}.{unique_name()}"
    folder.mkdir(mode=0o700)
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # a file system without locks
            lock(handle)
        _temporary[folder] = os.getpid()
        yield folder
    finally:
        _remove_own(folder)
        _temporary.pop(folder, None)
        os.close(handle)


def remove_temporary_folders() -> None:
    """Remove those of this process, before `os._exit`, which ends no block."""
    for folder, number in list(_temporary.items()):
        if number == os.getpid():
            _remove_own(folder)


def _remove_own(folder: Path) -> None:
    """Remove a folder into which threads of this process may write for a moment yet."""
    until = time.monotonic() + _REMOVING_SECONDS
    while folder.exists() and time.monotonic() < until:
        shutil.rmtree(folder, ignore_errors=True)
        time.sleep(0.02 * folder.exists())


def _remove_dead(folder: Path) -> None:
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            # One that is as young as this may not be locked yet.
            if os.stat(folder).st_mtime < time.time() - 1 and lock(handle):
                shutil.rmtree(folder, ignore_errors=True)
        finally:
            os.close(handle)


@contextmanager
def reading(path: StorePath) -> Iterator[None]:
    """Within the block, what a store answers is an error of this library, in one line."""
    try:
        yield
    except SmolVLMError:
        raise
    except FileNotFoundError as error:
        raise MissingFileError(f"cannot read {error.filename or path}: {error.strerror or error}") from error
    except PermissionError as error:
        raise CheckpointError(f"cannot read {error.filename or path}: {error.strerror or error}") from error
    except OSError as error:
        if error.errno == errno.ESTALE:
            raise ChangedError(f"{error.filename or path} changed while it was read: nothing of it is used") from error
        if disk_full(error):
            raise StorageError(f"the disk is full: {path} is copied to {tempfile.gettempdir()} (TMPDIR) to be read") from error
        raise DownloadError(f"cannot read {error.filename or path}: {error.strerror or error}") from error


# ---- local copies

_copies: dict[tuple, Path] = {}
_guard = threading.RLock()
_owner: list[tuple[int, ExitStack, Path]] = []  # this process's number and folder


def local_copy(path: StorePath, wanted: Callable[[Sequence[Entry]], Sequence[Entry]] = lambda entries: entries) -> Path:
    """A local copy of the objects below a place, which stays until this process ends and is made once for what is there.

    Args:
        path: the place.
        wanted: chooses among all objects below it.

    Returns:
        The directory.

    Raises:
        MissingFileError: there is no such bucket, or nothing below the place.
        CheckpointError: the store denies access.
        ChangedError: an object was replaced meanwhile.
        DownloadError, UnreachableError: the store cannot be reached, or fails.
    """
    with _guard, reading(path):
        entries = wanted(list(path.entries()))
        if not entries:
            raise FileNotFoundError(errno.ENOENT, "there is nothing below it in the bucket", str(path))
        key = (os.getpid(), path, *((entry.name, entry.size, entry.tag) for entry in entries))
        if key not in _copies:
            folder = _process_folder() / f"{len(_copies)}" / (path.name or path.bucket)
            check_room(path, sum(entry.size for entry in entries))
            local_files(path, folder, entries)
            _copies[key] = folder
        return _copies[key]


def folder_of_copies(path: str | os.PathLike) -> Path | None:
    """Where what is made of a local copy belongs, so that it is removed with it; None for a path that is none."""
    folder = _owner[0][2] if _owner else None
    return folder if folder is not None and Path(path).is_relative_to(folder) else None


def _process_folder() -> Path:
    if not _owner or _owner[0][0] != os.getpid():
        stack = ExitStack()
        folder = stack.enter_context(temporary_folder())
        _owner[:] = [(os.getpid(), stack, folder)]
        atexit.register(_forget)
    return _owner[0][2]


def _forget() -> None:
    if _owner and _owner[0][0] == os.getpid():
        _owner.pop()[1].close()


def local_files(path: StorePath, folder: Path, entries: Sequence[Entry]) -> None:
    """Copy objects below a place, by their names there, into a directory. Raises OSError, UnreachableError."""
    from multiprocessing.pool import ThreadPool

    root = os.path.realpath(folder)
    for entry in entries:
        if not os.path.realpath(folder / entry.name).startswith(root + os.sep):
            raise OSError(errno.EINVAL, "its name leads out of the directory that it is copied to", str(path / entry.name))
        (folder / entry.name).parent.mkdir(parents=True, exist_ok=True)
    with ThreadPool(min(_TOGETHER, max(len(entries), 1))) as pool:
        for _ in pool.imap_unordered(lambda entry: download(path / entry.name, folder / entry.name, entry), entries):
            pass


# ---- new directories


def check_room(path: AnyPath, needed: int) -> None:
    """Raise StorageError unless there are `needed` bytes for a directory, or for its copy on the way to or from a store."""
    check_free_space(Path(tempfile.gettempdir()) if isinstance(path, StorePath) else path, needed)


def check_new(destination: AnyPath, force: bool) -> None:
    """Raise CheckpointError if `new_directory` would not write the destination."""
    if not isinstance(destination, StorePath):
        return check_destination(destination, force)
    if not destination.key:
        raise InputError(f"{destination} is a whole bucket: name a directory in it")
    with writing(destination):
        names = [name for name in (*_OURS, INCOMPLETE) if (destination / name).is_file()]
        if not names and not destination.exists():
            return None
    if INCOMPLETE in names and not set(names).intersection(MARKERS):
        return None
    if not force:
        raise CheckpointError(f"{destination} {EXISTS}")
    if not names:
        raise CheckpointError(f"{destination} exists and is not a checkpoint: it is not replaced, even with --force")
    return None


@contextmanager
def new_directory(
    destination: AnyPath, force: bool = False, notify: Callable[[str], None] = say, *, own: bool = False
) -> Iterator[Path]:
    """Write a directory, which appears only when it is complete.

    Yields an empty local directory. When the block ends it becomes the destination, or is copied there, config.json or
    adapter_config.json last; if the block raises it is removed.

    Args:
        destination: a directory, or a place in a store.
        force: replace an existing checkpoint. In a store it is incomplete meanwhile, which its readers say.
        notify: called with a line when something is moved, or something of an interrupted run is cleaned up.
        own: as in `whole_directory`.

    Raises:
        CheckpointError: the destination exists and `force` is not given, or it is not a checkpoint; the store denies access.
        StorageError: another process is writing it; it cannot be written, or the disk is full.
    """
    if not isinstance(destination, StorePath):
        with whole_directory(destination, force, notify, own=own) as target:
            yield target
        return
    check_new(destination, force)
    with temporary_folder() as folder, writing(destination):
        target = folder / "directory"
        target.mkdir()
        yield target
        check_new(destination, force)
        _send(target, destination, notify, own=own)


@contextmanager
def writing(destination: StorePath) -> Iterator[None]:
    """Within the block, what a store answers to a writer is an error of this library, in one line."""
    try:
        yield
    except SmolVLMError:
        raise
    except Exception as error:
        if disk_full(error):
            where = tempfile.gettempdir()
            raise StorageError(f"the disk is full: {destination} is made in {where} (TMPDIR) before it is sent") from error
        if not isinstance(error, OSError):
            raise
        denied = isinstance(error, (PermissionError, FileNotFoundError))
        raise (CheckpointError if denied else StorageError)(f"cannot write {destination}: {error.strerror or error}") from error


def _send(folder: Path, destination: StorePath, notify: Callable[[str], None], *, own: bool) -> None:
    """Copy a directory to a store."""
    claim, mine = destination / INCOMPLETE, unique_name().encode()
    interrupted = claim.is_file()
    aside = None if own else _aside(destination, interrupted)
    if interrupted:
        notify(f"an interrupted run left an incomplete {destination}: it is removed, starting over")
    claim.write_bytes(mine)
    if aside is not None:
        _move(destination, aside)
        notify(f"the old {destination} is kept as {aside}")
    late = folder.with_name("late")
    late.mkdir()
    for name in MARKERS:
        if (folder / name).is_file():
            (folder / name).rename(late / name)
    sizes = {file.relative_to(folder).as_posix(): file.stat().st_size for file in folder.rglob("*") if file.is_file()}
    try:
        old = [entry.name for entry in destination.entries() if entry.name != INCOMPLETE]
        remove(destination / name for name in old if name in MARKERS)
        remove(destination / name for name in old)
        upload_tree(folder, destination)
        found = {entry.name: entry.size for entry in destination.entries()}
        if found != {**sizes, INCOMPLETE: len(mine)} or claim.read_bytes() != mine:
            raise StorageError(f"another process is writing {destination}: wait for it, or choose another name")
        for name in MARKERS:
            if (late / name).is_file():
                upload(late / name, destination / name)
        claim.unlink()
    except StorageError:
        raise  # what is there is another process's
    except BaseException:
        with suppress(OSError, SmolVLMError):
            remove(destination / name for name in (*MARKERS, *sizes))
            claim.unlink()
        raise


def _aside(destination: StorePath, interrupted: bool) -> StorePath | None:
    """Where the objects below a destination are to be kept, marked as incomplete; None if there are none, or only those that an
    interrupted run has sent.

    A run that is killed while it moves them leaves the mark, by which the next one knows that the rest is not its own.
    """
    free = replaced_name(destination)
    number = int(free.name.rpartition("-")[2])
    latest = destination.with_name(f"{destination.name}_replaced-{number - 1}")
    if (latest / INCOMPLETE).is_file():
        return latest
    if interrupted or not destination.exists():
        return None
    (free / INCOMPLETE).touch()
    return free


def _move(destination: StorePath, aside: StorePath) -> None:
    """Move what is below a destination, the markers first: at no moment does it look complete."""
    names = [entry.name for entry in destination.entries() if entry.name != INCOMPLETE]
    for name in sorted(names, key=lambda name: name not in MARKERS):
        if (aside / name).is_file():  # copied by a run that was killed, or by another process
            (destination / name).unlink()
        else:
            with suppress(FileNotFoundError):  # moved by another process
                (destination / name).rename(aside / name)
    (aside / INCOMPLETE).unlink()
