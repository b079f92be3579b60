"""The parameters of an open checkpoint as arrays on a device or a mesh."""

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from ..model import SmolVLMForConditionalGeneration
from ..parameters import abstract_params, flatten_params, logical_axes, unflatten_params, with_scales
from ..sharding import parameter_shardings
from .leaves import INT8, Leaf, dtype_of
from .opened import Checkpoint
from .regions import bounds, concrete
from .rules import check_shapes

__all__ = ["place"]


def place(source: Checkpoint, model: SmolVLMForConditionalGeneration, dtype: Any = None, mesh: Mesh | None = None) -> dict:
    """Read the parameters of a checkpoint.

    Args:
        source: the open checkpoint.
        model: the model that takes them.
        dtype: of the arrays; default: each parameter keeps its own. Weights in 8 bits and their scales keep theirs in any case.
        mesh: where to put them, as their logical axes say; every host reads only what its devices hold. Default: the default
            device.

    Returns:
        A nested dict of jax arrays.
    """
    wanted = None if dtype is None else np.dtype(dtype)
    leaves = source.quantized or source.leaves
    in_8_bits = {path for path, leaf in leaves.items() if leaf.dtype == INT8}
    abstract, axes = (with_scales(model, tree, in_8_bits) for tree in (abstract_params(model), logical_axes(model)))
    shapes = {path: leaf.shape for path, leaf in flatten_params(abstract).items()}
    check_shapes(shapes, {path: leaf.shape for path, leaf in leaves.items()}, str(source.path))
    shardings = {} if mesh is None else flatten_params(parameter_shardings(abstract, axes, mesh))
    params = {}
    for path, leaf in leaves.items():
        own = dtype_of(leaf, wanted)
        # `device_put` takes an aligned array as it is where the device is the CPU; jnp.asarray would copy it.
        params[path] = jax.device_put(leaf.read(dtype=own)) if mesh is None else _sharded(leaf, shardings[path], own)
    return unflatten_params({path: params[path] for path in shapes})


def _sharded(leaf: Leaf, sharding: NamedSharding, dtype: np.dtype) -> jax.Array:
    """One read for each distinct shard on this host, however many devices hold it."""
    parts: dict[tuple, np.ndarray] = {}

    def part(index):
        region = concrete(index, leaf.shape)
        key = bounds(region)
        if key not in parts:
            parts[key] = leaf.read(region, dtype)
        return parts[key]

    return jax.make_array_from_callback(leaf.shape, sharding, part)
