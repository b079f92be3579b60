"""What a job's rows depend on, written beside them, so that a restart that would answer differently is refused."""

import errno
import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from .. import __version__
from ..directories import make_directory
from ..errors import InputError, JobError, SmolVLMError, first_few
from ..io import create_json, parse_json, sync_directory, to_json, wait_for_lock
from ..storage import AnyPath, StorePath
from .bucket import claimed, withdraw

__all__ = ["DOCUMENTS", "GALLERY", "MANIFEST", "Manifest", "differences"]

MANIFEST = "_manifest.json"
GALLERY = "_gallery.html"  # the page that gallery.py makes of rows
DOCUMENTS = "documents"  # the folder of what documents.py makes of rows
FORMAT = 1
_OWNER = "_rows-of-"  # with a manifest's key, the name of an empty file beside rows that were made under it
# Of the first thing that is written: what does not go away with time.
_FOR_GOOD = (
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EINVAL,
    errno.ENAMETOOLONG,
)
_DAMAGED = f"its {MANIFEST} is empty or damaged"


def differences(old: dict[str, Any], new: dict[str, Any], name: str = "") -> list[str]:
    """Each key in which two manifests differ, with both values."""
    found = []
    for key in sorted({*old, *new}, key=str):
        a, b, here = old.get(key), new.get(key), f"{name}.{key}".lstrip(".")
        if here == "input" and isinstance(a, dict) and isinstance(b, dict) and a.get("source") == b.get("source"):
            found += _input_changes(a, b)
        elif isinstance(a, dict) and isinstance(b, dict):
            found += differences(a, b, here)
        elif to_json(a, sort_keys=True) != to_json(b, sort_keys=True):  # as they are written: nan equals nan
            found.append(f"{here} was {_short(a)}, is {_short(b)}")
    return found


def _input_changes(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """What has happened to the input, in words; [] if nothing has."""
    if old == new:
        return []
    if "count" in new:  # files that are records, of which only a digest is known
        a, b = old.get("count"), new["count"]
        what = f"it had {a:,} files or pages, and has {b:,}" if a != b else "a file was renamed or replaced"
        return [f"the input has changed: {what}"]
    before, after = old.get("files", {}), new.get("files", {})
    gone, come = [n for n in before if n not in after], [n for n in after if n not in before]
    if old.get("contents") == new.get("contents") and len(gone) == len(come):
        pairs = zip(gone, come, strict=True)
        return [f"the input has changed: {', '.join(first_few(f'{a} is called {b} now' for a, b in pairs))}"]
    sizes = [(n, before[n], after[n]) for n in after if n in before and before[n] != after[n]]
    words = [f"{n} has {'grown' if b > a else 'shrunk'} from {a:,} to {b:,} bytes" for n, a, b in sizes]
    words += [*(f"{n} is new" for n in come), *(f"{n} is gone" for n in gone)]
    return [f"the input has changed: {', '.join(first_few(words)) or 'its files have the same sizes and hold something else'}"]


class Manifest:
    """The facts that a job's rows depend on, and the file that says whose rows a directory holds.

    Another job may replace the file at any time, with --force. Rows get their final names only while it is `held`.

    Args:
        folder: Of the output.
        facts: As JSON.

    Attributes:
        key: A digest of the facts, by which a job knows its own working files.
    """

    def __init__(self, folder: AnyPath, facts: dict[str, Any]):
        self.path = folder / MANIFEST
        self.facts = {"format": FORMAT, "smolvlm_jax": __version__, **facts}
        self.key = hashlib.blake2b(to_json(self.facts, sort_keys=True), digest_size=6).hexdigest()
        self._marked = False  # whether the file that says so is there, as far as this process knows
        self._ours: bytes | None = None  # content that was found to say the same

    def agree(self, force: bool, notify: Callable[[str], None]) -> None:
        """Make sure that everything in the directory, which is made if need be, belongs to a job with these facts.

        Args:
            force: Move the output of another job into a directory `_replaced-…` and start afresh.
            notify: Called with a line when something is moved.

        Raises:
            InputError: the directory holds the output of another job, each difference to which is named, or cannot be one.
        """
        folder = self.path.parent
        make_directory(folder, "OUTPUT")
        try:
            self._agree(folder, force, notify)
            if isinstance(folder, Path) and not os.access(folder, os.W_OK | os.X_OK):  # nothing has been written by now
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        except OSError as error:
            if isinstance(error, SmolVLMError) or error.errno not in _FOR_GOOD:
                raise
            if isinstance(folder, StorePath):
                raise InputError(f"OUTPUT ({folder}) cannot be used: {error.strerror}") from error
            what = f"{error.strerror} ({error.filename})" if error.filename else error.strerror
            raise InputError(f"nothing can be written to OUTPUT ({folder}): {what}; choose another directory") from error

    def _agree(self, folder: AnyPath, force: bool, notify: Callable[[str], None]) -> None:
        while True:
            data, strangers = self._read(), _outputs(folder)
            if data is None and not strangers:
                if create_json(self.path, self.facts):
                    return
                continue  # another process has just created one: compare with it
            absent = [f"there is no {MANIFEST}, but there is {path.name}" for path in strangers[:1]]
            changes = absent if data is None else self._changes(data) or self._foreign(strangers)
            if not changes:
                return
            if not force and (strangers or changes != [_DAMAGED]):
                hint = any(change.startswith("the input has changed") for change in changes)
                first = "Put the input back, with new records in files and an OUTPUT of their own; choose" if hint else "Choose"
                raise InputError(
                    f"{folder} holds the output of another job: {'; '.join(changes)}. {first} another directory, or have the "
                    "old output moved aside with --force"
                )
            if data is None:
                create_json(self.path, {})  # the manifest is what processes lock
            else:
                self._replace(data, notify)

    def check(self) -> None:
        """Raise JobError if the directory belongs to another job by now."""
        data = self._read()
        if data is not None and not self._changes(data):
            return
        found = {} if data is None else _object(data)
        why = differences(self.facts, found)[0] if found else "it is gone or empty"
        raise JobError(
            f"{self.path} was replaced while this job ran ({why}): the directory belongs to another job now, where no row of "
            "this one counts; what --force moves aside is kept beside it in _replaced-…"
        )

    @contextmanager
    def held(self, made: AnyPath | None = None) -> Iterator[None]:
        """Within the block no other job takes the directory over. Raises JobError if one has.

        Args:
            made: What the block writes. In an object store, where nothing can be locked, it is removed again if another job has
                taken over meanwhile; a process that is killed before leaves it to that job, which knows it by its mark.
        """
        self.check()
        if isinstance(self.path, StorePath):
            mark = self.path.parent / f"{_OWNER}{self.key}"
            if not self._marked:
                mark.touch()
                self._marked = True
            yield
            try:
                self.check()
            except JobError:
                if isinstance(made, StorePath):
                    withdraw(made, self.key)
                raise
            return
        with open(self.path, "rb") as file:
            wait_for_lock(file, shared=True)
            self.check()
            (self.path.parent / f"{_OWNER}{self.key}").touch()  # before any row is there
            yield

    def _read(self) -> bytes | None:
        try:
            return self.path.read_bytes()
        except FileNotFoundError:
            if self.path.is_symlink():
                raise InputError(f"{self.path} is a link to a file that does not exist: remove it") from None
            return None

    def _changes(self, data: bytes) -> list[str]:
        """How our facts differ from those in the file."""
        if data == self._ours:
            return []
        found = _object(data)
        changes = differences(found, self.facts) if found else [_DAMAGED]
        if not changes:
            self._ours = data
        return changes

    def _foreign(self, outputs: list[AnyPath]) -> list[str]:
        """What says that rows are of other facts, though the manifest says ours: somebody has put another manifest there."""
        owners = [path.name for path in outputs if path.name.startswith(_OWNER) and path.name != f"{_OWNER}{self.key}"]
        return [f"{name} says that it has rows of another manifest" for name in owners[:1]]

    def _replace(self, old: bytes, notify: Callable[[str], None]) -> None:
        """Move the other job's output aside, unless another process does so."""
        if isinstance(self.path, StorePath):
            with claimed(self.path.parent, old) as ours:
                if ours and self._read() == old:
                    notify(f"moved the other job's output to {_set_aside(self.path.parent)}")
                    create_json(self.path, self.facts)
            return
        with suppress(FileNotFoundError), open(self.path, "r+b") as file:
            # A job that is giving a part its name holds the lock. It ends with its process, whatever ends that.
            wait_for_lock(file, shared=False)
            if self._read() == old:
                notify(f"moved the other job's output to {_set_aside(self.path.parent)}")
                create_json(self.path, self.facts)


def _outputs(folder: AnyPath) -> list[AnyPath]:
    """All files that a job writes, apart from the manifest. Of documents on a file system it is their directory."""
    patterns = ("part-*", ".part-*", "_summary-*", f"{_OWNER}*", GALLERY, DOCUMENTS)
    if isinstance(folder, StorePath):
        documents = (folder / DOCUMENTS / entry.name for entry in (folder / DOCUMENTS).entries())
        return sorted((*(path for pattern in patterns for path in folder.glob(pattern)), *documents))
    return sorted(path for pattern in patterns for path in folder.glob(pattern))


def _set_aside(folder: AnyPath) -> AnyPath:
    """Move a job's files into a directory of their own, the manifest last: a process that is killed before leaves the directory
    to the old job, and the next one goes on with it."""
    number = 1
    while (folder / f"_replaced-{number}" / MANIFEST).exists():
        number += 1
    aside = folder / f"_replaced-{number}"
    aside.mkdir(exist_ok=True)
    for path in [*_outputs(folder), folder / MANIFEST]:
        with suppress(FileNotFoundError):  # its owner may have finished and removed it
            name = path.below(folder) if isinstance(folder, StorePath) and isinstance(path, StorePath) else path.name
            path.rename(aside / (name or path.name))  # type: ignore[arg-type]  # both are of one kind
    sync_directory(folder)
    return aside


def _object(data: bytes) -> dict[str, Any]:
    """What a manifest says; {} if that is nothing."""
    try:
        return parse_json(data)
    except ValueError:
        return {}


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 120 else text[:117] + "…"
