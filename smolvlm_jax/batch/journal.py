"""The working file of a part: rows as they finish, for whichever run goes on with it.

In a directory it is appended to. In an object store, which appends nothing, it is a temporary file of this machine, whose new
rows are put into an object of their own from time to time, in the background: `.part-000000.KEY.HOST.PID-RANDOM-0000.rows`,
`-0001.rows`, …. A process that is killed loses what has not been put yet: the rows of the last second, or of the last fiftieth
of the time that it has spent on the part, whichever is longer. So a part has 200 such objects after half an hour.
"""

import os
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import IO

from ..io import remove_dead, try_lock, unique_name
from ..storage import AnyPath, StorePath

__all__ = ["Journal", "StoreJournal", "open_journal"]

_LEAST_SECONDS, _SHARE = 1.0, 1 / 50
_TOGETHER = 16


class Journal:
    """Of a part in a directory.

    Args:
        folder: Of the output.
        prefix: Of the names of all working files of this part and this job.

    Attributes:
        name: What messages call it.
        file: To be written behind its last row.
    """

    name: str
    file: IO[bytes]

    def __init__(self, folder: Path, prefix: str):
        self._path = folder / f"{prefix}{unique_name()}.rows"
        self._others = [path for path in folder.glob(f"{prefix}*.rows") if path != self._path]
        self.name = str(self._path)
        self.file = open(self._path, "w+b", buffering=0)  # noqa: SIM115 (open as long as the part is)
        try_lock(self.file)

    def lines(self) -> Iterator[bytes]:
        """What earlier runs wrote, line by line; the last of a file may not be whole."""
        for path in self._others:
            with suppress(FileNotFoundError), open(path, "rb") as file:  # its owner may have finished and removed it
                yield from file

    def taken_over(self, end: int) -> None:
        """What was worth it of `lines` is in our file, up to byte `end`: files of processes that have ended are not needed."""
        if self._others:
            self.flush(end)
        remove_dead(self._others)

    def appended(self, end: int) -> None:
        """Rows have been written up to byte `end`."""

    def flush(self, end: int) -> None:
        """Have the rows up to byte `end` kept, through a power cut too."""
        os.fsync(self.file.fileno())

    def remove(self) -> None:
        """Leave nothing behind."""
        self.file.close()
        self._path.unlink(missing_ok=True)


class StoreJournal(Journal):
    """Of a part in an object store. Arguments and attributes are those of `Journal`."""

    def __init__(self, folder: StorePath, prefix: str):
        self._folder, self._prefix = folder, f"{prefix}{unique_name()}"
        self._found = list(folder.glob(f"{prefix}*.rows"))
        self.file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 (open as long as the part is)
        self.name = tempfile.gettempdir()
        self._sent, self._objects = 0, 0
        self._began = self._last = time.monotonic()
        self._sender: threading.Thread | None = None
        self._failure: BaseException | None = None

    def lines(self) -> Iterator[bytes]:
        if self._found:
            with ThreadPool(min(_TOGETHER, len(self._found))) as pool:
                for data in pool.imap(_contents, self._found):
                    yield from data.splitlines(keepends=True)

    def taken_over(self, end: int) -> None:
        self._sent = end  # those objects stay until the part is complete

    def appended(self, end: int) -> None:
        now = time.monotonic()
        if now - self._last > max(_LEAST_SECONDS, (now - self._began) * _SHARE):
            if self._sender is not None and self._sender.is_alive():
                return
            self._settle()
            self._last = now
            data = os.pread(self.file.fileno(), end - self._sent, self._sent)
            self._sender = threading.Thread(target=self._send, args=(data,), daemon=True)
            self._sender.start()

    def flush(self, end: int) -> None:
        self._settle()
        if end > self._sent:
            self._send(os.pread(self.file.fileno(), end - self._sent, self._sent))
            self._settle()

    def remove(self) -> None:
        with suppress(OSError):
            self._settle()
        self.file.close()

    def _send(self, data: bytes) -> None:
        try:
            (self._folder / f"{self._prefix}-{self._objects:04d}.rows").write_bytes(data)
            self._objects, self._sent = self._objects + 1, self._sent + len(data)
        except BaseException as error:
            self._failure = error

    def _settle(self) -> None:
        """Wait for the object that is under way; raise what went wrong."""
        if self._sender is not None:
            self._sender.join()
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure


def open_journal(folder: AnyPath, prefix: str) -> Journal:
    """The working file of a part whose working files' names begin with `prefix`."""
    return StoreJournal(folder, prefix) if isinstance(folder, StorePath) else Journal(folder, prefix)


def _contents(path: StorePath) -> bytes:
    with suppress(FileNotFoundError):
        return path.read_bytes()
    return b""
