"""How a job writes OUTPUT in an object store, which has no renames, no locks and no appending.

A part is one conditional put, which says under which manifest it was made: a late part of a job that was replaced is
recognised, and written again. A conditional put also decides which of several processes replaces another job's output: of a
claim that its owner renews as long as it lives.
"""

import hashlib
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count

from ..io import unique_name
from ..storage import StorePath, remove

__all__ = ["claimed", "is_ours", "publish", "withdraw"]

_OWNER = "rows-of"
_RENEWED, _DEAD = 5.0, 30.0  # seconds between two renewals of a claim, and after which it is that of a process that has ended


def is_ours(path: StorePath, key: str) -> bool:
    """Whether there is a part, and it is not of a job with another manifest than that with this key."""
    with suppress(FileNotFoundError):
        return path.info().metadata.get(_OWNER, key) == key
    return False


def publish(path: StorePath, data: bytes, key: str) -> None:
    """Put a part there, unless another process of the job has done so."""
    metadata = {_OWNER: key} if key else None
    if not path.create(data, metadata) and key and not is_ours(path, key):
        path.write_bytes(data, metadata)


def withdraw(path: StorePath, key: str) -> None:
    """Remove a part that this job has put there though the directory is another job's by now."""
    with suppress(FileNotFoundError):
        if path.info().metadata.get(_OWNER) == key:
            path.unlink()


@contextmanager
def claimed(folder: StorePath, what: bytes) -> Iterator[bool]:
    """Within the block no other process that has claimed the same does its block.

    Yields:
        False, if another process has done it meanwhile.
    """
    stem = f"_replacing-{hashlib.blake2b(what, digest_size=6).hexdigest()}-"
    name = unique_name()
    for number in count():
        claim = folder / f"{stem}{number}"
        if claim.create(f"{name} 0".encode()) or _read(claim).startswith(name):
            break
        if not _is_dead(claim):
            yield False
            return
    ended = threading.Event()

    def renew() -> None:
        for beat in count(1):
            if ended.wait(_RENEWED):
                return
            claim.write_bytes(f"{name} {beat}".encode())

    thread = threading.Thread(target=renew, daemon=True)
    thread.start()
    try:
        yield True
    finally:
        ended.set()
        thread.join()
        remove(folder / f"{stem}{n}" for n in range(number + 1))


def _is_dead(claim: StorePath) -> bool:
    """Wait until a claim is gone (False) or has not been renewed for long (True)."""
    seen, since = "", time.monotonic()
    while time.monotonic() - since < _DEAD:
        now = _read(claim)
        if not now:
            return False
        if now != seen:
            seen, since = now, time.monotonic()
        time.sleep(0.5)
    return True


def _read(claim: StorePath) -> str:
    with suppress(FileNotFoundError):
        return claim.read_bytes().decode()
    return ""
