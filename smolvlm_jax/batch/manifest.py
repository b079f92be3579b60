"""What a job's rows depend on, written beside them, so that a restart that would answer differently is refused."""

import hashlib
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .. import __version__
from ..errors import InputError
from ..io import create_json, read_json, sync_directory

__all__ = ["MANIFEST", "agree", "differences", "model_digest"]

MANIFEST = "_manifest.json"
FORMAT = 1
_CLAIM = "_replacing"
_SMALL = 64 * 2**20
_CLAIM_SECONDS = 60


def model_digest(directory: str | os.PathLike) -> str:
    """A hash of a checkpoint's files: their names, sizes and contents.

    Of files above 64 MiB only the first megabyte, where safetensors lists its tensors, and the last one are read.
    """
    directory, digest = Path(directory), hashlib.blake2b(digest_size=16)
    for path in sorted(p for p in directory.rglob("*") if p.is_file() and not p.name.startswith(".")):
        size = path.stat().st_size
        digest.update(f"{path.relative_to(directory)}\0{size}\0".encode())
        with open(path, "rb") as file:
            if size <= _SMALL:
                digest.update(file.read())
            else:
                digest.update(file.read(2**20))
                file.seek(size - 2**20)
                digest.update(file.read())
    return digest.hexdigest()


def differences(old: dict[str, Any], new: dict[str, Any], name: str = "") -> list[str]:
    """Each key in which two manifests differ, with both values."""
    found = []
    for key in sorted({*old, *new}, key=str):
        a, b, here = old.get(key), new.get(key), f"{name}.{key}".lstrip(".")
        if isinstance(a, dict) and isinstance(b, dict):
            found += differences(a, b, here)
        elif a != b:
            found.append(f"{here} was {_short(a)}, is {_short(b)}")
    return found


def agree(folder: Path, facts: dict[str, Any], force: bool, notify: Callable[[str], None]) -> None:
    """Make sure that everything in `folder` belongs to a job with these facts, and write them if the folder is new.

    Args:
        folder: Of the output; made if need be.
        facts: What rows depend on, as JSON.
        force: Move the output of another job into a directory `_replaced-…` and start afresh.
        notify: Called with a line when something is moved.

    Raises:
        InputError: if the folder holds the output of another job; it names every difference.
    """
    facts = {"format": FORMAT, "smolvlm_jax": __version__, **facts}
    path, claim = folder / MANIFEST, folder / _CLAIM
    folder.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + _CLAIM_SECONDS
    while True:
        if claim.exists():  # another process with --force is moving files
            if time.monotonic() > deadline:
                raise InputError(f"{claim} is older than {_CLAIM_SECONDS} seconds: if no other job is starting, remove it")
            time.sleep(0.1)
            continue
        old = read_json(path, missing_ok=True)
        found = differences(old, facts) if old else []
        if not old and (strangers := _outputs(folder)) and not path.exists():
            found = [f"there is no {MANIFEST}, but there is {strangers[0].name}"]
        if old and not found:
            return
        if not found:
            if create_json(path, facts):
                return
            continue  # another process has just created one: compare with it
        if not force:
            raise InputError(
                f"{folder} holds the output of another job: {'; '.join(found)}. Choose another directory, or have the old "
                "output moved aside with --force"
            )
        try:
            claim.mkdir()
        except FileExistsError:
            continue
        try:
            if read_json(path, missing_ok=True) == old:
                notify(f"moved the other job's output to {_set_aside(folder)}")
                create_json(path, facts)
        finally:
            claim.rmdir()


def _outputs(folder: Path) -> list[Path]:
    """All files that a job writes, apart from the manifest."""
    return sorted(p for pattern in ("part-*", ".part-*", "_summary-*") for p in folder.glob(pattern))


def _set_aside(folder: Path) -> Path:
    number = 1
    while (aside := folder / f"_replaced-{number}").exists():
        number += 1
    aside.mkdir()
    for path in _outputs(folder):
        path.rename(aside / path.name)
    if (folder / MANIFEST).exists():
        (folder / MANIFEST).rename(aside / MANIFEST)
    sync_directory(folder)
    return aside


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 120 else text[:117] + "…"
