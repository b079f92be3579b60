"""Parameters of an orbax checkpoint, read lazily: a region of a leaf touches only the chunks it overlaps.

Orbax restores whole trees. Here the tree comes from the checkpoint's `_METADATA`, and each leaf is opened with tensorstore, the
library that orbax stores arrays with.
"""

from collections import deque
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import CheckpointError
from ..io import read_json
from .blocks import copy_into
from .chunks import chunk_regions
from .leaves import Leaf, own, whole
from .rules import Region

__all__ = ["OrbaxLeaf", "find_checkpoint", "is_orbax", "open_orbax"]

_TREE = "_METADATA"
_PENDING = 2  # chunks read ahead while one is copied


@dataclass(frozen=True)
class Found:
    """An orbax checkpoint inside a directory. item: the directory with `_METADATA`; prefix: where the parameters start in its
    tree; step: of a training run, else None."""

    item: Path
    prefix: tuple[str, ...]
    step: int | None = None


def _steps(directory: Path) -> list[int]:
    return sorted(int(path.name) for path in directory.iterdir() if path.name.isdecimal() and path.is_dir())


def _items(directory: Path) -> list[Path]:
    if (directory / _TREE).is_file():
        return [directory]
    if (directory / "params" / _TREE).is_file():
        return [directory / "params"]
    return sorted(path for path in directory.iterdir() if (path / _TREE).is_file())


def _run(directory: Path) -> Path:
    """Where the steps of a training run are: in its folder `checkpoints`, or in the directory itself."""
    inner = directory / "checkpoints"
    return inner if inner.is_dir() and _steps(inner) else directory


def is_orbax(directory: Path) -> bool:
    """Whether a directory is, or holds, an orbax checkpoint."""
    directory = _run(directory)
    return bool(_items(directory)) or any(_items(directory / str(step)) for step in _steps(directory))


def find_checkpoint(directory: Path) -> Found:
    """Find the parameters: `directory` is an orbax directory of ours, one step of a training run, or the run itself, of which
    the last step is taken. Inside a training state they are the subtree named `params`."""
    directory = _run(directory)
    step, holder = None, directory
    if not _items(directory):
        complete = [number for number in _steps(directory) if _items(directory / str(number))]
        if not complete:
            raise CheckpointError(f"{directory} holds no orbax checkpoint")
        step = complete[-1]
        holder = directory / str(step)
    elif directory.name.isdecimal():
        step = int(directory.name)
    for item in _items(holder):
        tops = {key[0] for key, _ in _tree(item)}
        prefix: tuple[str, ...] = ()
        if "model" not in tops and "params" in tops:
            prefix = ("params",)
            if all(key[1] == "params" for key, _ in _tree(item) if key[0] == "params"):
                prefix = ("params", "params")
        if "model" in tops or prefix:
            return Found(item, prefix, step)
    raise CheckpointError(f"{holder} is an orbax checkpoint, but no model's: its tree has neither `model` nor `params`")


def _tree(item: Path) -> list[tuple[tuple[str, ...], bool]]:
    """Key paths of the leaves that are arrays, and whether each is in zarr 3."""
    data = read_json(item / _TREE, what="an orbax checkpoint's tree", unique_keys=True)
    tree = data.get("tree_metadata")
    try:
        return [
            (tuple(str(key["key"]) for key in leaf["key_metadata"]), bool(data.get("use_zarr3", False)))
            for leaf in tree.values()
            if leaf["value_metadata"].get("value_type") not in ("None", "Dict", "List", "Tuple", "NamedTuple")
        ]
    except (AttributeError, KeyError, TypeError) as error:
        raise CheckpointError(f"{item / _TREE} is not an orbax checkpoint's tree: {error!r}") from error


def open_orbax(found: Found) -> dict[str, "OrbaxLeaf"]:
    """Our parameter path -> leaf, for the parameters of a checkpoint."""
    import tensorstore as ts

    context = ts.Context({"cache_pool": {"total_bytes_limit": 0}, "cache_pool#ocdbt": {"total_bytes_limit": 32 << 20}})
    ocdbt = (found.item / "manifest.ocdbt").is_file()
    opening = {}
    for keys, zarr3 in _tree(found.item):
        if keys[: len(found.prefix)] != found.prefix:
            continue
        name = ".".join(keys)
        base = f"{found.item.absolute()}/"
        kvstore = {"driver": "file", "path": f"{base}{name}/"}
        if ocdbt:
            kvstore = {
                "driver": "ocdbt",
                "base": {"driver": "file", "path": base},
                "path": f"{name}/",
                "cache_pool": "cache_pool#ocdbt",
            }
        spec = {
            "driver": "zarr3" if zarr3 else "zarr",
            "kvstore": kvstore,
            "recheck_cached_data": False,
            "recheck_cached_metadata": False,
            "fill_missing_data_reads": False,  # a chunk that is absent is damage, not zeros
        }
        opening["/".join(keys[len(found.prefix) :])] = ts.open(spec, open=True, read=True, context=context)
    leaves = {}
    for path, future in opening.items():
        try:
            leaves[path] = OrbaxLeaf(path, future.result(), found.item)
        except (ValueError, OSError) as error:
            raise CheckpointError(f"{found.item}: cannot open the parameter {path}: {_brief(error)}") from error
    return leaves


def _brief(error: Exception) -> str:
    return str(error).splitlines()[0].split(" [")[0]


class OrbaxLeaf(Leaf):
    """A parameter of an orbax checkpoint."""

    def __init__(self, path: str, store, item: Path):
        self.path, self.shape, self.dtype = path, tuple(store.shape), np.dtype(store.dtype.numpy_dtype)
        self._store, self._item = store, item
        self.chunk = tuple(store.chunk_layout.read_chunk.shape)

    def read(self, region: Region | None = None, dtype: np.dtype | None = None) -> np.ndarray:
        region = whole(self.shape) if region is None else region
        try:
            found = self._store[region].read(order="C").result()
        except (ValueError, OSError) as error:
            raise CheckpointError(f"{self._item}: cannot read the parameter {self.path}: {_brief(error)}") from error
        return found if dtype is None or found.dtype == dtype else own(found, dtype)

    def read_into(self, target: np.ndarray) -> None:
        waiting = deque()
        for region in chunk_regions(self.shape, self.chunk):
            waiting.append((region, self._store[region].read(order="C")))
            if len(waiting) > _PENDING:
                self._copy(target, *waiting.popleft())
        while waiting:
            self._copy(target, *waiting.popleft())

    def _copy(self, target: np.ndarray, region: Region, future) -> None:
        try:
            copy_into(target[region], future.result())
        except (ValueError, OSError) as error:
            raise CheckpointError(f"{self._item}: cannot read the parameter {self.path}: {_brief(error)}") from error
