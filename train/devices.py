"""The devices of a run: their mesh, and whether they share a batch evenly. `plan` asks here too."""

import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from ..errors import ConfigError
from ..sharding import make_mesh
from .config import MeshConfig, TrainConfig

__all__ = ["check_rows", "open_mesh"]


def open_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh of a run.

    Args:
        config: its settings.
        devices: that there are. Default: all devices of all processes.

    Raises:
        ConfigError: `mesh.devices` are more than these.
        InputError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    if config.devices is not None:
        if config.devices > len(devices):
            raise ConfigError(f"mesh.devices is {config.devices}, but there are {len(devices)}")
        devices = devices[: config.devices]
    return make_mesh(config.data, config.fsdp, config.tensor, devices)


def check_rows(config: TrainConfig, mesh: Mesh) -> None:
    """Raise ConfigError unless the devices of a mesh have equally many rows of a batch."""
    rows, data, fsdp = config.data.batch_size, mesh.shape["data"], mesh.shape["fsdp"]
    ways = data * fsdp
    if rows % ways == 0:
        return
    less, more = rows // ways * ways, -(-rows // ways) * ways
    words = " or ".join(f"data.batch_size={number}" for number in (less, more) if number)
    if -1 in (config.mesh.data, config.mesh.fsdp) and jax.process_count() == 1:
        fitting = [count for count in range(1, mesh.size) if _divides(config, count, rows)]
        words += f", or mesh.devices={fitting[-1]}" if fitting else ""
    raise ConfigError(
        f"data.batch_size is {rows}, no multiple of the {ways} devices that share the rows of a batch (mesh.data {data} × "
        f"mesh.fsdp {fsdp}): write {words}"
    )


def _divides(config: TrainConfig, devices: int, rows: int) -> bool:
    """Whether the mesh of a configuration can be made of so many devices, and these share the rows evenly."""
    fixed = math.prod(size for size in (config.mesh.data, config.mesh.fsdp, config.mesh.tensor) if size != -1)
    return devices % fixed == 0 and rows % (devices // config.mesh.tensor) == 0
