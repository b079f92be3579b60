"""Checksums of the files in a directory's folders, in a file of the directory, by which a damaged step of a training run is
recognised."""

import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..io import read_json, write_json

__all__ = ["NAME", "check_name", "damaged_files", "write_sums"]

NAME = "checksums.json"
_PIECE = 4 << 20


def _crc(path: Path) -> str:
    found = 0
    with open(path, "rb", buffering=0) as file:
        while piece := file.read(_PIECE):
            found = zlib.crc32(piece, found)  # releases the interpreter: training goes on meanwhile
    return f"{found:08x}"


def write_sums(directory: Path, step: int) -> None:
    """Write size and CRC of every file in the folders of a directory, which will have the step's name. Raises OSError."""
    found = {}
    for path in sorted(path for path in directory.rglob("*") if path.is_file() and path.parent != directory):
        found[path.relative_to(directory).as_posix()] = {"bytes": path.stat().st_size, "crc32": _crc(path)}
    write_json(directory / NAME, {"step": step, "files": found})


def _read(directory: Path) -> dict[str, Any]:
    return read_json(directory / NAME, what="a list of checksums", unique_keys=True)


def _misnamed(directory: Path, data: Mapping[str, Any]) -> str | None:
    step = str(data.get("step", directory.name))
    return f"it was written as step {step:.20}" if directory.name.isdecimal() and directory.name != step else None


def check_name(directory: Path) -> None:
    """Raise CheckpointError if the directory of a step, which may have no checksums, has the name of another step."""
    if (directory / NAME).is_file() and (wrong := _misnamed(directory, _read(directory))):
        raise CheckpointError(f"{directory} is damaged: {wrong}")


def damaged_files(directory: Path, largest: int | None = None) -> list[str] | None:
    """What is wrong with the files below a directory.

    Args:
        directory: with a file that `write_sums` wrote.
        largest: bytes from which on only the size of a file is compared; None: everything is read.

    Returns:
        A line for each file that is not as it was, and one if the directory has the name of another step; None if there are no
        checksums.
    """
    if not (directory / NAME).is_file():
        return None
    try:
        data = _read(directory)
        wanted = {name: (int(item["bytes"]), item["crc32"]) for name, item in data["files"].items()}
    except CheckpointError as error:  # a ValueError too
        return [str(error)]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        return [f"{directory / NAME} is not a list of checksums ({error!r})"]
    problems = [wrong] if (wrong := _misnamed(directory, data)) else []
    if not wanted:
        problems.append(f"{NAME} lists no files")
    for name, (size, crc) in wanted.items():
        path = directory / name
        try:
            if path.stat().st_size != size:
                problems.append(f"{name} has {path.stat().st_size:,} bytes instead of {size:,}")
            elif (largest is None or size < largest) and _crc(path) != crc:
                problems.append(f"{name} has changed")
        except (OSError, ValueError) as error:
            problems.append(f"{name} cannot be read: {getattr(error, 'strerror', None) or error}")
    return problems
