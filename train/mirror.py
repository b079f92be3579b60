"""A run whose output is in an object store: it works in a temporary directory, which is sent there at every checkpoint.

There is no rename and no lock in a store. The object that orbax writes when a checkpoint is complete is put last and
removed first; a checkpoint that a killed run left without it is removed by the next run. An object `.running` names the run
that writes: if another one has begun since, the earlier one stops before it puts anything more there.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..errors import SmolVLMError, StorageError
from ..io import unique_name
from ..staging import local_files, reading, temporary_folder, writing
from ..storage import StorePath, remove, upload, upload_tree
from ..stored_models import COMMIT, steps_of
from ..terminal import say

__all__ = ["Mirror", "mirrored"]

_STEPS = "checkpoints"
_RUNNING = ".running"
_RESULTS = ("model", "adapter")  # sent when they are complete, by what writes them


class Mirror:
    """A local directory, and the place in a store that it is sent to.

    Attributes:
        path: the place.
        directory: the local directory.
    """

    def __init__(self, path: StorePath, directory: Path):
        self.path, self.directory = path, directory
        self._name = unique_name().encode()
        self._sent: dict[str, tuple[int, int]] = {}  # of each file or step in the store, which one it is

    def fetch(self) -> None:
        """Copy what a run needs to continue: its complete checkpoints, its log and what describes it."""
        self.directory.mkdir()
        with reading(self.path):
            found = [entry for entry in self.path.entries() if entry.name.partition("/")[0] not in (*_RESULTS, _RUNNING)]
            with writing(self.path):
                (self.path / _RUNNING).write_bytes(self._name)
            complete = {f"{_STEPS}/{step}" for step in steps_of([entry.name for entry in found])}
            broken = sorted({step for entry in found if (step := _step(entry.name)) and step not in complete})
            for step in (step for step in broken if step.rpartition("/")[2].isdecimal()):
                say(f"the checkpoint {self.path / step} is incomplete, since what wrote it was killed: it is removed")
                self._remove(step)
            local_files(self.path, self.directory, [entry for entry in found if _step(entry.name) not in broken])
        self._sent = {name: which for name, which in self._local().items() if name in complete or _step(name) is None}

    def send(self) -> None:
        """Make the store the same as the directory. Raises OSError, UnreachableError; StorageError if another run is there."""
        if self._running() != self._name:
            raise StorageError(f"another run is writing {self.path}, and this one stops: choose another output")
        local = self._local()
        # The log first, so that no checkpoint is newer than it.
        for name, which in sorted(local.items(), key=lambda item: _step(item[0]) is not None):
            if self._sent.get(name) == which:
                continue
            if _step(name) is None:
                upload(self.directory / name, self.path / name)
            else:
                self._remove(name)
                upload_tree(self.directory / name, self.path / name, last=[COMMIT] * (self.directory / name / COMMIT).exists())
            self._sent[name] = which
        for name in [name for name in self._sent if name not in local]:
            self._remove(name)
            del self._sent[name]

    def newest(self) -> int | None:
        """The newest step that is in the store, None if none is."""
        names = [name.rpartition("/")[2] for name in list(self._sent) if _step(name) is not None]
        return max((int(name) for name in names if name.isdecimal()), default=None)

    def end(self) -> None:
        """Send what is left, and say that no run is going on."""
        self.send()
        (self.path / _RUNNING).unlink()

    def _running(self) -> bytes:
        with suppress(FileNotFoundError):
            return (self.path / _RUNNING).read_bytes()
        return b""

    def _local(self) -> dict[str, tuple[int, int]]:
        """The files beside the steps, and the steps that are complete or set aside: which file, or directory, each is."""
        found: dict[str, tuple[int, int]] = {}
        for folder, inner, files in os.walk(self.directory):
            here = Path(folder).relative_to(self.directory)
            if here == Path(_STEPS):
                steps = [name for name in inner if "orbax-checkpoint-tmp" not in name]
                found |= {f"{_STEPS}/{name}": _which(Path(folder) / name) for name in steps}
                inner.clear()
                continue
            if here == Path():
                inner[:] = [name for name in inner if name not in _RESULTS]
            kept = [name for name in files if not name.endswith(".tmp")]
            found |= {(here / name).as_posix(): _which(Path(folder) / name) for name in kept}
        return found

    def _remove(self, name: str) -> None:
        """Remove a file, or a step, of which it is visible from the first moment on."""
        remove([self.path / name / COMMIT, self.path / name])
        remove(self.path / name / entry.name for entry in (self.path / name).entries())


def _step(name: str) -> str | None:
    """`checkpoints/STEP` of the name of an object below it."""
    parts = name.split("/")
    return "/".join(parts[:2]) if parts[0] == _STEPS and len(parts) > 1 else None


def _which(path: Path) -> tuple[int, int]:
    info = (path / COMMIT if (path / COMMIT).exists() else path).stat()
    return info.st_ino, info.st_mtime_ns


@contextmanager
def mirrored(path: StorePath) -> Iterator[Mirror]:
    """A mirror of what is at a place, for one run.

    Raises:
        CheckpointError: the store denies access.
        StorageError: another run is writing there; it cannot be written.
    """
    with temporary_folder() as folder:
        mirror = Mirror(path, folder / "run")
        mirror.fetch()
        try:
            yield mirror
        except BaseException:
            with suppress(OSError, SmolVLMError):
                mirror.end()
            raise
        with writing(path):
            mirror.end()
