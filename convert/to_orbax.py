"""Write parameters as an orbax checkpoint, one leaf at a time.

Orbax's plain save wants the whole tree in memory. Here the tree holds leaves that are still somewhere else, and a type handler
of our own, in a registry of its own, reads, writes and awaits them in turn; a process writes only the shards of its own
devices. What lies on disk is what orbax writes itself: an ordinary StandardCheckpointer restores it.
"""

import asyncio
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from .blocks import copy_into, count_nonfinite
from .chunks import chunk_regions, chunk_shape
from .leaves import Leaf
from .progress import Progress
from .rules import Region

__all__ = ["OrbaxWriter", "write_orbax"]

_IN_FLIGHT = 48 << 20  # bytes handed to tensorstore and not yet on disk


class _Lazy:
    """What stands in the tree in place of an array: to jax a leaf, to orbax a type that our handler is registered for."""

    def __init__(self, order: int, leaf: Leaf, axes: tuple, dtype: np.dtype):
        self.order, self.leaf, self.axes, self.dtype, self.shape = order, leaf, axes, dtype, leaf.shape
        self.nbytes = leaf.nbytes // leaf.dtype.itemsize * dtype.itemsize


@dataclass
class OrbaxWriter:
    """How to write: mesh: a Mesh, or MeshShape, whose shards the chunks follow; process, owner: of several processes which is
    this one, and which regions of an array of that shape and those axes are its to write (None: everything).

    After writing, `nonfinite` counts NaN and infinite values by parameter.
    """

    dtype: np.dtype | None = None
    mesh: object = None
    process: int = 0
    progress: Progress = field(default_factory=lambda: Progress("", 0, quiet=True))
    nonfinite: dict[str, int] = field(default_factory=dict)
    _pending: deque = field(default_factory=deque)

    def regions(self, lazy: _Lazy) -> Iterator[tuple[Region, np.ndarray]]:
        """The chunks this process writes, as arrays of their own, each read when it is asked for."""
        from .hosts import my_regions

        chunk = self.chunk(lazy)
        mine = my_regions(lazy.axes, lazy.shape, self.mesh)
        if mine is None:
            source = lazy.leaf.borrow()
            for region in chunk_regions(lazy.shape, chunk):
                out = np.empty([part.stop - part.start for part in region], lazy.dtype)
                copy_into(out, source[region])
                yield region, out
            return
        for shard in mine:
            source = lazy.leaf.read(shard, lazy.dtype)
            for region in chunk_regions(lazy.shape, chunk, shard):
                inner = tuple(
                    slice(part.start - edge.start, part.stop - edge.start) for part, edge in zip(region, shard, strict=True)
                )
                yield region, np.ascontiguousarray(source[inner])

    def chunk(self, lazy: _Lazy) -> tuple[int, ...]:
        return chunk_shape(lazy.axes, lazy.shape, lazy.dtype.itemsize, self.mesh)

    async def open(self, lazy: _Lazy, directory: Path, name: str, context):
        """A store for one parameter, empty."""
        import tensorstore as ts

        spec = {
            "driver": "zarr",
            "kvstore": {
                "driver": "ocdbt",
                # orbax joins the directories of all processes into one store when the checkpoint is finalised
                "base": {"driver": "file", "path": f"{directory}/ocdbt.process_{self.process}/"},
                "path": f"{name}/",
                "config": {"max_inline_value_bytes": 1024, "max_decoded_node_bytes": 100_000_000, "manifest_kind": "single"},
                "assume_config": True,
                "cache_pool": "cache_pool#ocdbt",
            },
            "dtype": lazy.dtype.name,
            # uncompressed: trained weights hardly shrink, and zstd would cost more time than the writing
            "metadata": {"shape": list(lazy.shape), "chunks": list(self.chunk(lazy)), "compressor": None},
            "store_data_equal_to_fill_value": True,  # orbax takes a missing chunk for damage, even one of zeros
            "recheck_cached_data": False,
            "recheck_cached_metadata": False,
        }
        return await ts.open(spec, create=True, open=True, context=context)

    async def write(self, lazy: _Lazy, store) -> None:
        """Read a parameter and hand it over chunk by chunk."""
        for region, array in self.regions(lazy):
            bad = count_nonfinite(array)
            if bad:
                self.nonfinite[lazy.leaf.path] = self.nonfinite.get(lazy.leaf.path, 0) + bad
            future = store[region].write(array, can_reference_source_data_indefinitely=True)
            self._pending.append((array.nbytes, future))
            del array
            await self.settle(_IN_FLIGHT)

    async def settle(self, limit: int = 0) -> None:
        """Wait until at most `limit` bytes are on their way to the disk."""
        while sum(size for size, _ in self._pending) > limit:
            size, future = self._pending.popleft()
            await future
            self.progress.add(size)


def write_orbax(directory: Path, leaves: Mapping[str, Leaf], axes: Mapping[str, tuple], writer: OrbaxWriter) -> None:
    """Write leaves, in their order, as an orbax checkpoint. `axes`: the logical names of each parameter's dimensions."""
    import jax
    import orbax.checkpoint as ocp

    from ..parameters import unflatten_params

    class Handler(ocp.type_handlers.NumpyHandler):
        async def serialize(self, values, infos, args=None):
            for info in infos:
                await info.await_path_creation()
            # All at once, because every commit of the store is a file and a new index: 657 of them cost more than the data.
            stores = await asyncio.gather(
                *(writer.open(lazy, i.parent_dir, i.name, i.ts_context) for lazy, i in zip(values, infos, strict=True))
            )
            for lazy, store in sorted(zip(values, stores, strict=True), key=lambda pair: pair[0].order):
                await writer.write(lazy, store)
            await writer.settle()
            return []

    lazies = {
        path: _Lazy(order, leaf, axes[path], np.dtype(writer.dtype or leaf.dtype))
        for order, (path, leaf) in enumerate(leaves.items())
    }
    registry = ocp.type_handlers.create_type_handler_registry(
        (_Lazy, Handler()),
        (jax.Array, ocp.type_handlers.ArrayHandler()),  # never met here: without it orbax warns that it is missing
    )
    handler = ocp.PyTreeCheckpointHandler(type_handler_registry=registry)
    with ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(directory.absolute(), args=ocp.args.PyTreeSave(unflatten_params(lazies)))
