"""Several processes that convert together, each its own part. With one process, or without a mesh, that part is everything."""

from collections.abc import Sequence

import jax

from .chunks import MeshShape
from .rules import Region

__all__ = ["barrier", "concrete", "my_regions", "process_count", "process_index"]


def process_count() -> int:
    """Processes of this job. Asked without waking a TPU that a conversion does not need."""
    return jax.process_count() if jax.distributed.is_initialized() else 1


def process_index() -> int:
    return jax.process_index() if jax.distributed.is_initialized() else 0


def barrier(name: str) -> None:
    """Wait until every process is here."""
    if process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)


def concrete(index: Sequence[slice], shape: Sequence[int]) -> Region:
    """An index of jax, whose slices may be open, as a region."""
    return tuple(slice(*part.indices(size)[:2]) for part, size in zip(index, shape, strict=True))


def my_regions(axes: Sequence[str | None], shape: Sequence[int], mesh) -> list[Region] | None:
    """The regions of an array that this process writes: of each distinct shard on the mesh the first device's process is the
    writer. None means everything."""
    if process_count() == 1:
        return None
    if mesh is None or isinstance(mesh, MeshShape):
        return None if process_index() == 0 else []
    from jax.sharding import NamedSharding

    from ..sharding import partition_spec

    sharding = NamedSharding(mesh, partition_spec(axes, shape, mesh, quiet=True))
    owners: dict[tuple, jax.Device] = {}
    for device, index in sharding.devices_indices_map(tuple(shape)).items():
        key = tuple((part.start, part.stop) for part in concrete(index, shape))
        if key not in owners or device.id < owners[key].id:
            owners[key] = device
    here = process_index()
    return [tuple(slice(*bounds) for bounds in key) for key, device in owners.items() if device.process_index == here]
