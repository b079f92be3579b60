"""What the files of an input were when they were found, checked whenever they are read: answers belong to the input that the
job began with, so a file that changes ends the job before a row is made of what it holds now."""

import contextlib
import hashlib
import io
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from ...errors import ChangedError, InputError
from ...io import Identity, errors_name
from ...storage import Entry, RangedFile, StorePath, download, is_store

__all__ = ["Inputs", "check"]

_BLOCK = 2**16
_BLOCKS = 64
_WHOLE = 2**26
_PIECE = 2**23  # bytes of an object that are read at once where all of it is


def check(known: Identity, file: str | int, name: str) -> None:
    """Compare what was known of a file with what is at a path or a descriptor now.

    Raises:
        ChangedError: it is not what it was; `name` is the file's in the message.
    """
    try:
        now = Identity.of(file)
    except OSError as error:
        raise ChangedError(f"the input {name} cannot be read any more: {error.strerror}; {_ADVICE}") from error
    if now == known:
        return
    if now.size != known.size:
        what = f"it had {known.size} bytes when the job began, and now has {now.size}"
    elif (now.device, now.inode) != (known.device, known.inode):
        what = "another file has taken its place"
    else:
        what = "it was written to after the job had begun"
    raise ChangedError(f"the input {name} has changed: {what}; {_ADVICE}")


_ADVICE = "put it back and run the same command again; what is finished is kept"


class Inputs:
    """The files of an input.

    Args:
        paths: Of the files, each of which is looked at now.

    Attributes:
        paths: Likewise.
        sizes: In bytes.

    Raises:
        InputError: if one cannot be read.
    """

    def __init__(self, paths: Sequence[str]):
        self.paths = list(paths)
        self._objects: dict[int, Entry] = {}
        try:
            self._objects = {n: StorePath.of(path).info() for n, path in enumerate(self.paths) if is_store(path)}
            self._identities = [
                Identity.of_object(self._objects[n]) if n in self._objects else Identity.of(path)
                for n, path in enumerate(self.paths)
            ]
        except OSError as error:
            raise InputError(f"the input {error.filename} cannot be read: {error.strerror}") from error
        self.sizes = [identity.size for identity in self._identities]
        self._whole = sum(self.sizes) <= _WHOLE
        self._digests: list[bytes] = []  # of each, once there is a fingerprint

    def open(self, number: int) -> io.FileIO | RangedFile:
        """A file, unbuffered and unchanged as yet. Raises ChangedError, and InputError if it cannot be opened."""
        if number in self._objects:
            return RangedFile(StorePath.of(self.paths[number]), self._objects[number])
        try:
            file = open(self.paths[number], "rb", buffering=0)  # noqa: SIM115 (the caller closes it)
        except OSError as error:
            self.check(number)
            raise InputError(f"the input {self.paths[number]} cannot be read: {error.strerror}") from error
        try:
            self.check(number, file)
        except BaseException:
            file.close()
            raise
        return file

    def open_local(self, number: int) -> tuple[IO[bytes], bool]:
        """A file that has a descriptor, which an object of a store is copied into; and whether it is such a copy. Raises
        ChangedError, and InputError if it cannot be opened."""
        file = self.open(number)
        if not isinstance(file, RangedFile):
            return file, False
        copy = tempfile.TemporaryFile()  # noqa: SIM115 (the caller closes it)
        try:
            with errors_name(Path(tempfile.gettempdir())):
                download(file.path, copy, file.entry)
                copy.flush()
        except OSError as error:
            copy.close()
            self.check(number)
            raise InputError(
                f"the input {self.paths[number]} cannot be copied to {error.filename}: {error.strerror}"
            ) from error
        except BaseException:
            copy.close()
            raise
        copy.seek(0)
        return copy, True

    def check(self, number: int, file: Any = None) -> None:
        """Make sure that an opened file, or else the file at its path, is unchanged. Raises ChangedError."""
        path = self.paths[number]
        if number in self._objects:
            if not isinstance(file, RangedFile):  # each of whose requests fails when there is another object
                check(self._identities[number], path, path)
            return
        try:
            check(self._identities[number], path if file is None else file.fileno(), path)
        except ChangedError:
            if not self._is_copy(number, file):
                raise

    def _is_copy(self, number: int, file: Any) -> bool:
        """Whether another file has the same size, time and contents, which is then the file from now on: a mounted bucket may
        give a file another inode, and one that was moved away may be back from a copy."""
        known = self._identities[number]
        try:
            with open(self.paths[number], "rb", buffering=0) if file is None else contextlib.nullcontext(file) as opened:
                now = Identity.of(opened.fileno())
                if not self._digests or (now.size, now.modified) != (known.size, known.modified):
                    return False
                if self._digest(number, opened) != self._digests[number]:
                    return False
        except OSError:
            return False
        self._identities[number] = now
        return True

    def check_all(self) -> None:
        """`check` every path."""
        for number in range(len(self.paths)):
            self.check(number)

    def fingerprint(self) -> str:
        """A hash of what the files hold: of all of it up to 64 MiB, beyond that of blocks spread evenly over each file.

        Raises:
            InputError: if one cannot be read.
        """
        self._digests = []
        try:
            for number in range(len(self.paths)):
                with self.open(number) as file:
                    self._digests.append(self._digest(number, file))
        except OSError as error:
            self.check_all()
            raise InputError(f"the input {error.filename} cannot be read: {error.strerror}") from error
        return hashlib.blake2b(b"".join(self._digests), digest_size=16).hexdigest()

    def _digest(self, number: int, file: IO[bytes] | RangedFile) -> bytes:
        size, whole, blocks = self.sizes[number], self._whole, max(2, _BLOCKS // len(self.paths))
        last = max(size - _BLOCK, 0)
        count = -(-size // _BLOCK) if whole else blocks
        places = sorted({min(place * _BLOCK, last) if whole else last * place // (blocks - 1) for place in range(count)})
        digest = hashlib.blake2b(digest_size=16)
        for place in places:
            if isinstance(file, RangedFile):
                digest.update(file.read_at(_BLOCK, place, _PIECE if whole else 0))
            else:
                digest.update(os.pread(file.fileno(), _BLOCK, place))
        return digest.digest()
