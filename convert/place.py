"""The parameters of an open checkpoint as arrays on a device or a mesh."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from ..model import SmolVLMForConditionalGeneration
from ..parameters import abstract_params, flatten_params, logical_axes, unflatten_params
from ..sharding import parameter_shardings
from .leaves import Leaf
from .opened import Checkpoint
from .regions import bounds, concrete

__all__ = ["place"]


def place(source: Checkpoint, model: SmolVLMForConditionalGeneration, dtype: Any = None, mesh: Mesh | None = None) -> dict:
    """Read the parameters of a checkpoint.

    Args:
        source: the open checkpoint.
        model: the model that takes them.
        dtype: of the arrays; default: each parameter keeps its own.
        mesh: where to put them, as their logical axes say; every host reads only what its devices hold. Default: the default
            device.

    Returns:
        A nested dict of jax arrays.
    """
    wanted = None if dtype is None else np.dtype(dtype)
    abstract = abstract_params(model)
    shardings = {} if mesh is None else flatten_params(parameter_shardings(abstract, logical_axes(model), mesh))
    params = {}
    for path, leaf in source.leaves.items():
        params[path] = jnp.asarray(leaf.read(dtype=wanted)) if mesh is None else _sharded(leaf, shardings[path], wanted)
    return unflatten_params({path: params[path] for path in flatten_params(abstract)})


def _sharded(leaf: Leaf, sharding: NamedSharding, dtype: np.dtype | None) -> jax.Array:
    """One read for each distinct shard on this host, however many devices hold it."""
    parts: dict[tuple, np.ndarray] = {}

    def part(index):
        region = concrete(index, leaf.shape)
        key = bounds(region)
        if key not in parts:
            parts[key] = leaf.read(region, dtype)
        return parts[key]

    return jax.make_array_from_callback(leaf.shape, sharding, part)
