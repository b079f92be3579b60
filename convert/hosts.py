"""Conversions by several processes, each of which does its part: with one process, or without a mesh, everything."""

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, NamedSharding

from ..errors import ConfigError, JobError
from ..sharding import partition_spec
from .chunks import AnyMesh
from .regions import Region, bounds, concrete

__all__ = ["barrier", "everyones", "join_job", "my_regions", "process_count", "process_index"]


def join_job() -> None:
    """Become one process of a jax job, unless this is one already.

    TPU slices, Slurm and the like are recognised by jax; elsewhere JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and
    JAX_PROCESS_ID describe the job.

    Raises:
        ConfigError: the environment describes none.
        JobError: the other processes cannot be reached.
    """
    if jax.distributed.is_initialized():
        return
    numbers: dict[str, Any] = {}
    for name in ("num_processes", "process_id"):
        text = os.environ.get(f"JAX_{name.upper()}")
        if text and not text.isdecimal():
            raise ConfigError(f"JAX_{name.upper()} is {text!r}, which is no number")
        numbers[name] = int(text) if text else None
    try:
        jax.distributed.initialize(**numbers)
    except ValueError as error:
        raise ConfigError(f"the environment describes no job of several processes: {str(error).splitlines()[0]}") from error
    except RuntimeError as error:
        raise JobError(f"this process cannot join the job: {str(error).splitlines()[0]}") from error


def process_count() -> int:
    """Processes of this job. Does not initialise the backend, because a conversion needs no TPU."""
    return jax.process_count() if jax.distributed.is_initialized() else 1


def process_index() -> int:
    """The number of this process, from 0."""
    return jax.process_index() if jax.distributed.is_initialized() else 0


def barrier(name: str) -> None:
    """Wait until every process has reached this point."""
    if process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)


def everyones(value: Any) -> list:
    """The JSON values of all processes, in the order of processes, on each of them."""
    from jax.experimental import multihost_utils

    text = json.dumps(value).encode()
    longest = int(multihost_utils.process_allgather(np.int32(len(text))).max())
    padded = np.frombuffer(text.ljust(longest), np.uint8)
    return [json.loads(bytes(row).decode()) for row in multihost_utils.process_allgather(padded)]


def my_regions(axes: Sequence[str | None], shape: Sequence[int], mesh: AnyMesh | None) -> list[Region] | None:
    """The regions of an array that this process writes; None means everything.

    Each distinct shard on the mesh is written by the process of the first device that holds it.
    """
    if process_count() == 1:
        return None
    if mesh is None or isinstance(mesh, AbstractMesh):
        return None if process_index() == 0 else []
    sharding = NamedSharding(mesh, partition_spec(axes, shape, mesh, quiet=True))
    devices: Mapping[Any, Any] = sharding.devices_indices_map(tuple(shape))
    owners: dict[tuple, Any] = {}  # the device of lowest id that holds a region
    for device, index in devices.items():
        key = bounds(concrete(index, shape))
        if key not in owners or device.id < owners[key].id:
            owners[key] = device
    here = process_index()
    return [tuple(slice(*ends) for ends in key) for key, device in owners.items() if device.process_index == here]
