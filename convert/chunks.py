"""How a parameter is cut into the chunks of an orbax checkpoint, so that a host reads only what its devices hold.

A chunk is the smallest unit that can be read. Orbax by default writes one chunk per array, which every host would have to read
whole. Our chunk is the shard of a mesh, cut further until it is small enough to stream.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import product

from jax.sharding import AbstractMesh, Mesh, NamedSharding

from ..sharding import AXES, partition_spec
from .regions import Region, whole

__all__ = ["DEFAULT_MESH", "AnyMesh", "abstract_mesh", "chunk_regions", "chunk_shape", "shard_shape"]

DEFAULT_MESH = {"data": 1, "fsdp": 8, "tensor": 1}  # the default; FSDP over 1, 2, 4 or 8 devices reads exactly its part
MAX_BYTES = 8 << 20  # streaming holds a few of these in memory
MIN_BYTES = 1 << 20  # below this a chunk costs more than reading too much does


AnyMesh = Mesh | AbstractMesh


def abstract_mesh(sizes: Mapping[str, int]) -> AbstractMesh:
    """A mesh of these sizes without devices; an axis that is not named has size 1."""
    return AbstractMesh(tuple(sizes.get(axis, 1) for axis in AXES), AXES)


def shard_shape(names: Sequence[str | None], shape: Sequence[int], mesh: AnyMesh) -> tuple[int, ...]:
    """Shape of what one device of a mesh holds of an array whose dimensions have these logical names."""
    return NamedSharding(mesh, partition_spec(names, shape, mesh, quiet=True)).shard_shape(tuple(shape))


def chunk_shape(
    names: Sequence[str | None], shape: Sequence[int], itemsize: int, mesh: AnyMesh | None = None
) -> tuple[int, ...]:
    """The chunk of an array: one shard of `mesh`, cut further along its longest dimension while it exceeds 8 MiB.

    Args:
        names: the logical names of the dimensions.
        shape: of the array.
        itemsize: bytes of a value.
        mesh: default: DEFAULT_MESH, or one with fewer ways of FSDP where its shard would have less than 1 MiB.
    """
    defaults = [abstract_mesh({**DEFAULT_MESH, "fsdp": ways}) for ways in (8, 4, 2)]
    least = MIN_BYTES if mesh is None else 0
    shards = (shard_shape(names, shape, choice) for choice in (defaults if mesh is None else [mesh]))
    chunk = list(next((shard for shard in shards if math.prod(shard) * itemsize >= least), shape))
    while math.prod(chunk) * itemsize > MAX_BYTES:
        axis = max(range(len(chunk)), key=lambda a: (chunk[a], -a))
        # a divisor keeps shards made of whole chunks; a prime is cut unevenly, which costs a partly filled last chunk
        divisor = next((d for d in (2, 3, 5, 7) if chunk[axis] % d == 0), None)
        chunk[axis] = chunk[axis] // divisor if divisor else -(-chunk[axis] // 2)
    return tuple(chunk)


def chunk_regions(shape: Sequence[int], chunk: Sequence[int], within: Region | None = None) -> Iterator[Region]:
    """The regions of all chunks of an array, or of those that make up the region `within`."""
    parts = whole(shape) if within is None else within
    starts = [range(part.start // step * step, part.stop, step) for part, step in zip(parts, chunk, strict=True)]
    for place in product(*starts):
        yield tuple(
            slice(max(start, part.start), min(start + step, part.stop))
            for start, step, part in zip(place, chunk, parts, strict=True)
        )
