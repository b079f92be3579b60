"""Write parameters as an orbax checkpoint, one leaf at a time.

Orbax's plain save needs the whole tree in memory. Here the tree holds leaves that are still somewhere else, and a type handler
of our own, in a registry of its own, reads, writes and awaits them one after the other; a process writes only the shards of its
own devices. The result is what orbax writes itself: an ordinary StandardCheckpointer restores it.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .arrays import checksum
from .blocks import copy_into, count_nonfinite
from .chunks import AnyMesh, chunk_regions, chunk_shape
from .hosts import my_regions
from .leaves import Leaf, dtype_of
from .regions import Region, byte_size, region_shape, relative

__all__ = ["OrbaxWriter"]

_IN_FLIGHT = 48 << 20  # bytes handed to tensorstore and not yet on disk


class _Lazy:
    """What the tree holds in place of an array: to jax a leaf, to orbax a type that our handler is registered for."""

    def __init__(self, order: int, leaf: Leaf, axes: tuple, dtype: np.dtype):
        self.order, self.leaf, self.axes, self.dtype, self.shape = order, leaf, axes, dtype, leaf.shape
        self.nbytes = byte_size(leaf.shape, dtype)


class OrbaxWriter:
    """Writes parameters as an orbax checkpoint.

    Args:
        dtype: of what is written; None: each parameter keeps its own.
        mesh: whose shards the chunks follow; None: the default of `chunk_shape`.
        process: of several processes, which one this is.
        progress: told of the bytes that are on the disk.

    Attributes:
        nonfinite: after writing, the number of NaN and infinite values by parameter.
        checksums: after writing, of the parameters that this process wrote whole, which are all if there is no other.
    """

    def __init__(self, dtype: np.dtype | None, mesh: AnyMesh | None, process: int, progress: Callable[[int], object]):
        self._dtype, self._mesh, self._process, self._progress = dtype, mesh, process, progress
        self.nonfinite: dict[str, int] = {}
        self.checksums: dict[str, str] = {}
        self._pending: deque[tuple[int, Any]] = deque()

    def write(self, directory: Path, leaves: Mapping[str, Leaf], axes: Mapping[str, tuple]) -> None:
        """Write leaves in their order. `axes`: the logical names of each parameter's dimensions."""
        import jax
        import orbax.checkpoint as ocp

        from ..parameters import unflatten_params

        class Handler(ocp.type_handlers.NumpyHandler):
            async def serialize(_, values, infos, args=None):
                for info in infos:
                    await info.await_path_creation()
                # All at once, because every commit of the store is a file and a new index: 657 of them cost more than the data.
                stores = await asyncio.gather(
                    *(self._open(lazy, i.parent_dir, i.name, i.ts_context) for lazy, i in zip(values, infos, strict=True))
                )
                try:
                    for lazy, store in sorted(zip(values, stores, strict=True), key=lambda pair: pair[0].order):
                        await self._write(lazy, store)
                    await self._settle()
                finally:  # after an error nothing may write on while the directory is removed
                    await asyncio.gather(*(future for _, future in self._pending), return_exceptions=True)
                return []

        lazies = {
            path: _Lazy(order, leaf, axes[path], dtype_of(leaf, self._dtype))
            for order, (path, leaf) in enumerate(leaves.items())
        }
        registry = ocp.type_handlers.create_type_handler_registry(
            (_Lazy, Handler()),
            (jax.Array, ocp.type_handlers.ArrayHandler()),  # never used here: without it orbax warns that it is missing
        )
        handler = ocp.PyTreeCheckpointHandler(type_handler_registry=registry)
        with ocp.Checkpointer(handler) as checkpointer:
            checkpointer.save(directory.absolute(), args=ocp.args.PyTreeSave(unflatten_params(lazies)))

    def _regions(self, lazy: _Lazy) -> Iterator[tuple[Region, np.ndarray]]:
        """The chunks this process writes, as arrays of their own, each read when it is asked for."""
        chunk = self._chunk(lazy)
        mine = my_regions(lazy.axes, lazy.shape, self._mesh)
        if mine is None:
            source = lazy.leaf.borrow()
            self.checksums[lazy.leaf.path] = checksum(source, lazy.dtype)
            for region in chunk_regions(lazy.shape, chunk):
                out = np.empty(region_shape(region), lazy.dtype)
                copy_into(out, source[region])
                yield region, out
            return
        for shard in mine:
            source = lazy.leaf.read(shard, lazy.dtype)
            for region in chunk_regions(lazy.shape, chunk, shard):
                yield region, np.ascontiguousarray(source[relative(region, shard)])

    def _chunk(self, lazy: _Lazy) -> tuple[int, ...]:
        return chunk_shape(lazy.axes, lazy.shape, lazy.dtype.itemsize, self._mesh)

    async def _open(self, lazy: _Lazy, directory: Path, name: str, context: Any) -> Any:
        """A store for one parameter, empty."""
        import tensorstore as ts

        spec = {
            "driver": "zarr",
            "kvstore": {
                "driver": "ocdbt",
                # orbax joins the directories of all processes into one store when the checkpoint is finalised
                "base": {"driver": "file", "path": f"{directory}/ocdbt.process_{self._process}/"},
                "path": f"{name}/",
                "config": {"max_inline_value_bytes": 1024, "max_decoded_node_bytes": 100_000_000, "manifest_kind": "single"},
                "assume_config": True,
                "cache_pool": "cache_pool#ocdbt",
            },
            "dtype": lazy.dtype.name,
            # uncompressed: trained weights hardly shrink, and zstd would cost more time than the writing
            "metadata": {"shape": list(lazy.shape), "chunks": list(self._chunk(lazy)), "compressor": None},
            "store_data_equal_to_fill_value": True,  # orbax takes a missing chunk for damage, even one of zeros
            "recheck_cached_data": False,
            "recheck_cached_metadata": False,
        }
        return await ts.open(spec, create=True, open=True, context=context)

    async def _write(self, lazy: _Lazy, store: Any) -> None:
        """Read a parameter and hand it over chunk by chunk."""
        for region, array in self._regions(lazy):
            bad = count_nonfinite(array)
            if bad:
                self.nonfinite[lazy.leaf.path] = self.nonfinite.get(lazy.leaf.path, 0) + bad
            future = store[region].write(array, can_reference_source_data_indefinitely=True)
            self._pending.append((array.nbytes, future))
            del array
            await self._settle(_IN_FLIGHT)

    async def _settle(self, limit: int = 0) -> None:
        """Wait until at most `limit` bytes are on their way to the disk."""
        while sum(size for size, _ in self._pending) > limit:
            size, future = self._pending.popleft()
            await future
            self._progress(size)
