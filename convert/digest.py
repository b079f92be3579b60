"""A hash of the contents of a checkpoint's files, on which answers of a batch job and the state of a training run depend."""

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

__all__ = ["files_digest", "model_digest"]

_SMALL = 64 * 2**20


def files_digest(files: Iterable[tuple[str, Path]]) -> str:
    """A hash of files: their names, sizes and contents.

    Of files above 64 MiB only the first megabyte, where safetensors lists its tensors, and the last one are read.

    Args:
        files: (name, path) of each.

    Raises:
        OSError: one cannot be read.
    """
    digest = hashlib.blake2b(digest_size=16)
    for name, path in files:
        size = path.stat().st_size
        digest.update(f"{name}\0{size}\0".encode())
        with open(path, "rb") as file:
            if size <= _SMALL:
                digest.update(file.read())
            else:
                digest.update(file.read(2**20))
                file.seek(size - 2**20)
                digest.update(file.read())
    return digest.hexdigest()


def model_digest(directory: str | os.PathLike) -> str:
    """`files_digest` of all files below a directory, those aside whose names begin with a dot."""
    directory = Path(directory)
    found = sorted(path for path in directory.rglob("*") if path.is_file() and not path.name.startswith("."))
    return files_digest((str(path.relative_to(directory)), path) for path in found)
