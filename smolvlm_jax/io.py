"""Files that appear whole or not at all: written under a name with a dot, flushed to the disk, renamed."""

import json
import os
import secrets
import socket
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

try:
    import fcntl
except ImportError:  # not POSIX: no lock says whether a runner is alive, so what it left behind stays until a part is whole
    fcntl = None

__all__ = ["HOST", "remove_dead", "sync_directory", "try_lock", "unique_name", "whole_file", "write_json"]

HOST = "".join(c if c.isalnum() or c == "-" else "-" for c in socket.gethostname()) or "host"


def unique_name() -> str:
    """HOST.PID-RANDOM: no two writers have the same, whatever machine, container or run they are of."""
    return f"{HOST}.{os.getpid()}-{secrets.token_hex(4)}"


@contextmanager
def whole_file(path: Path) -> Iterator[IO[bytes]]:
    """A file to write to, which becomes `path` when the block ends without an exception, and is gone otherwise."""
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


def write_json(path: Path, value: Any) -> None:
    """`value` as an indented JSON file, whole or not at all."""
    with whole_file(path) as file:
        file.write((json.dumps(value, indent=2) + "\n").encode())


def try_lock(file: IO) -> bool:
    """Lock an open file until it is closed or its process ends; False if somebody else holds it, or nobody can tell."""
    if fcntl is None:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except OSError:
        return False


def remove_dead(paths: Iterable[Path], foreign: bool = False) -> None:
    """Remove files, named as `unique_name` says, whose writers are dead. Locks tell on this host alone; other hosts' files are
    removed only with `foreign`, which is for when they have become useless."""
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
    """Let a rename survive a power cut; a file system that cannot be asked for that is left in peace."""
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
