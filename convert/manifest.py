"""The small files that a conversion writes: config.json, companions, and the manifest of an orbax directory, which says what it
was made from, by which version, with the checksum of every source file and of every array."""

import hashlib
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .. import __version__
from ..config import SmolVLMConfig
from ..errors import CheckpointError
from ..io import copy_companions, read_json, write_json
from .arrays import Digests
from .safetensors_file import MAX_JSON

__all__ = ["MANIFEST", "Checksums", "describe", "read_manifest", "stored_digests", "write_manifest"]

MANIFEST = "manifest.json"
FORMAT = 1


class Checksums(threading.Thread):
    """sha256 of files, computed while they are converted: hashing releases the interpreter, and finds the files cached."""

    def __init__(self, root: Path, files: Sequence[Path]):
        super().__init__(daemon=True)
        self._root, self._files = root, list(files)
        self._found: dict[str, dict[str, Any]] = {}
        self._error: OSError | None = None
        self.start()

    def run(self) -> None:
        try:
            for file in self._files:
                name = str(file.relative_to(self._root)) if file.is_relative_to(self._root) else file.name
                with open(file, "rb", buffering=0) as data:
                    digest = hashlib.file_digest(data, "sha256").hexdigest()
                self._found[name] = {"sha256": digest, "bytes": file.stat().st_size}
        except OSError as error:
            self._error = error

    def result(self) -> dict[str, dict[str, Any]]:
        """Wait; file name relative to the root -> {"sha256", "bytes"}. Raises CheckpointError if a file is unreadable."""
        self.join()
        if self._error is not None:
            raise CheckpointError(f"cannot read {self._error.filename}: {self._error.strerror}") from self._error
        return dict(sorted(self._found.items()))


def describe(directory: Path, config: SmolVLMConfig, *, dtype: np.dtype, companions: Mapping[str, Path]) -> None:
    """Write config.json and copy the companion files of a checkpoint.

    Args:
        directory: where to, made if need be.
        config: of the model; its dtype is replaced.
        dtype: of the weights; the widest if they have several.
        companions: tokenizer, processor and generation files by name.
    """
    config.replace(dtype=dtype.name).save_pretrained(directory)
    copy_companions(companions, directory)


def write_manifest(directory: Path, **facts: Any) -> None:
    """Write manifest.json: the facts, the format's number and our version."""
    data = {"format": FORMAT, "kind": "model", "smolvlm_jax": __version__, **facts}
    write_json(directory / MANIFEST, data)


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest of a directory, empty if it has none."""
    path = directory / MANIFEST
    return read_json(path, what="a manifest of this library", unique_keys=True, limit=MAX_JSON) if path.is_file() else {}


def stored_digests(path: Path, manifest: Mapping[str, Any]) -> Digests | None:
    """The checksums of the arrays, or None if a manifest, which was read from `path`, is from before there were any."""
    found = manifest.get("arrays")
    if found is not None and not (isinstance(found, dict) and all(isinstance(value, str) for value in found.values())):
        raise CheckpointError(f"{path} is not a manifest of this library: arrays is no mapping from parameters to checksums")
    return found
