"""Parameters of an orbax checkpoint, read lazily: a region of a leaf touches only the chunks it overlaps.

Orbax restores whole trees. Here the tree is read from the checkpoint's `_METADATA`, and each leaf is opened with tensorstore,
the library with which orbax stores arrays.
"""

from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import CheckpointError
from ..io import read_json
from .blocks import copy_into
from .chunks import chunk_regions
from .file_sums import check_name
from .leaves import INT8, Leaf, own
from .ocdbt_files import value_files
from .regions import Region, whole
from .safetensors_file import DTYPES, MAX_JSON

__all__ = ["Found", "OrbaxLeaf", "find_checkpoint", "open_orbax"]

_TREE = "_METADATA"
_PREFIXES: tuple[tuple[str, ...], ...] = ((), ("params",), ("params", "params"))  # where parameters start in a tree
_PENDING = 2  # chunks read ahead while one is copied


@dataclass(frozen=True)
class Found:
    """An orbax checkpoint inside a directory.

    Attributes:
        item: the directory with `_METADATA`.
        names: our parameter path -> name of the stored array.
        zarr3: whether the arrays are in zarr 3.
        step: of a training run, else None.
    """

    item: Path
    names: dict[str, str]
    zarr3: bool
    step: int | None = None


def _steps(directory: Path) -> list[int]:
    """The steps of a training run, in order."""
    return sorted(int(path.name) for path in directory.iterdir() if path.name.isdecimal() and path.is_dir())


def _items(directory: Path) -> list[Path]:
    """The trees of a checkpoint: the directory itself, its folder `params`, or any folders."""
    if (directory / _TREE).is_file():
        return [directory]
    if (directory / "params" / _TREE).is_file():
        return [directory / "params"]
    return sorted(path for path in directory.iterdir() if (path / _TREE).is_file())


def find_checkpoint(directory: Path) -> Found | None:
    """Find the parameters of a model.

    Args:
        directory: an orbax directory of ours, one step of a training run, or the run itself, of which the last step is taken.
            Inside a training state the parameters are the subtree named `params`.

    Returns:
        None if the directory neither is nor holds an orbax checkpoint.

    Raises:
        CheckpointError: it holds an orbax checkpoint, but no model's, or the step that is taken was written as another one.
    """
    inner = directory / "checkpoints"
    run = inner if inner.is_dir() and _steps(inner) else directory
    holders = [run, *(run / str(step) for step in reversed(_steps(run)))]
    holder = next((folder for folder in holders if _items(folder)), None)
    if holder is None:
        return None
    step = int(holder.name) if holder.name.isdecimal() else None
    check_name(holder)
    for item in _items(holder):
        keys, zarr3 = _tree(item)
        for prefix in _PREFIXES:
            if any(key[: len(prefix) + 1] == (*prefix, "model") for key in keys):
                inside = [key for key in keys if key[: len(prefix)] == prefix]
                return Found(item, {"/".join(key[len(prefix) :]): ".".join(key) for key in inside}, zarr3, step)
    raise CheckpointError(f"{holder} is an orbax checkpoint, but no model's: its tree has neither `model` nor `params`")


def _tree(item: Path) -> tuple[list[tuple[str, ...]], bool]:
    """Key paths of the leaves that are arrays, and whether those are in zarr 3."""
    data = read_json(item / _TREE, what="an orbax checkpoint's tree", unique_keys=True, limit=MAX_JSON)
    tree: Any = data.get("tree_metadata")
    try:
        keys = [
            tuple(str(key["key"]) for key in leaf["key_metadata"])
            for leaf in tree.values()
            if leaf["value_metadata"].get("value_type") not in ("None", "Dict", "List", "Tuple", "NamedTuple")
        ]
    except (AttributeError, KeyError, TypeError) as error:
        raise CheckpointError(f"{item / _TREE} is not an orbax checkpoint's tree: {error!r}") from error
    return keys, bool(data.get("use_zarr3", False))


def open_orbax(found: Found) -> dict[str, "OrbaxLeaf"]:
    """Our parameter path -> leaf, for the parameters of a checkpoint."""
    import tensorstore as ts

    context = ts.Context({"cache_pool": {"total_bytes_limit": 0}, "cache_pool#ocdbt": {"total_bytes_limit": 32 << 20}})
    ocdbt, base = (found.item / "manifest.ocdbt").is_file(), f"{found.item.absolute()}/"
    opening = {}
    for path, name in found.names.items():
        kvstore: dict[str, Any] = {"driver": "file", "path": f"{base}{name}/"}
        if ocdbt:
            kvstore = {
                "driver": "ocdbt",
                "base": {"driver": "file", "path": base},
                "path": f"{name}/",
                "cache_pool": "cache_pool#ocdbt",
            }
        spec = {
            "driver": "zarr3" if found.zarr3 else "zarr",
            "kvstore": kvstore,
            "recheck_cached_data": False,
            "recheck_cached_metadata": False,
            "fill_missing_data_reads": False,  # a chunk that is absent is damage, not zeros
        }
        opening[path] = ts.open(spec, open=True, read=True, context=context)
    leaves = {}
    for path, future in opening.items():
        try:
            leaves[path] = OrbaxLeaf(path, found.names[path], future.result(), found.item)
        except (ValueError, OSError) as error:
            raise CheckpointError(f"{found.item}: cannot open the parameter {path}: {_brief(error)}") from error
    return leaves


def _brief(error: Exception) -> str:
    return str(error).splitlines()[0].split(" [")[0]


class OrbaxLeaf(Leaf):
    """A parameter of an orbax checkpoint."""

    def __init__(self, path: str, name: str, store: Any, item: Path):
        self.path, self.shape, self.dtype = path, tuple(store.shape), np.dtype(store.dtype.numpy_dtype)
        self._name, self._store, self._item = name, store, item
        self.chunk = tuple(store.chunk_layout.read_chunk.shape)
        if self.dtype not in (*DTYPES.values(), INT8):
            raise ValueError(f"its dtype is {self.dtype.name}, which no weight of these models has")
        if any(chunk > size for chunk, size in zip(self.chunk, self.shape, strict=True)):
            raise ValueError(f"its chunks, {self.chunk}, are larger than its shape, {self.shape}")

    def files(self) -> list[str]:
        """The files that hold its values."""
        return value_files(self._item, self._name)

    def read(self, region: Region | None = None, dtype: np.dtype | None = None) -> np.ndarray:
        found = self._result(self._store[whole(self.shape) if region is None else region].read(order="C"))
        return found if dtype is None or found.dtype == dtype else own(found, dtype)

    def read_into(self, target: np.ndarray) -> None:
        waiting: deque[tuple[Region, Any]] = deque()
        for region in chunk_regions(self.shape, self.chunk):
            waiting.append((region, self._store[region].read(order="C")))
            if len(waiting) > _PENDING:
                self._copy(target, *waiting.popleft())
        while waiting:
            self._copy(target, *waiting.popleft())

    def _copy(self, target: np.ndarray, region: Region, future: Any) -> None:
        copy_into(target[region], self._result(future))

    def _result(self, future: Any) -> np.ndarray:
        try:
            return future.result()
        except (ValueError, OSError) as error:
            raise CheckpointError(f"{self._item}: cannot read the parameter {self.path}: {_brief(error)}") from error
