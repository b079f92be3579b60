"""The parameter tree as a contract: abstract shapes, logical axes and random initial values, all derived from the model."""

import functools

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import Mesh

from .model import SmolVLMForConditionalGeneration
from .sharding import parameter_shardings

__all__ = ["abstract_params", "flatten_params", "init_params", "logical_axes", "unflatten_params"]


@functools.lru_cache(maxsize=32)
def _boxed(model: SmolVLMForConditionalGeneration):
    return jax.eval_shape(model.init, jax.random.key(0))["params"]


def abstract_params(model: SmolVLMForConditionalGeneration, dtype=None):
    """The tree of ShapeDtypeStructs, float32 unless `dtype` says otherwise. Nothing is allocated."""
    tree = nn.unbox(_boxed(model))
    return tree if dtype is None else jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), tree)


def logical_axes(model: SmolVLMForConditionalGeneration):
    """The same tree with a tuple of logical axis names in place of each parameter (None = never sharded)."""
    is_box = lambda x: isinstance(x, nn.LogicallyPartitioned)
    return jax.tree.map(lambda box: AxisNames(box.names), _boxed(model), is_leaf=is_box)


class AxisNames(tuple):
    """A tuple of axis names that jax treats as a leaf, because it is not exactly `tuple`."""

    __slots__ = ()


def init_params(model: SmolVLMForConditionalGeneration, seed: int = 0, dtype=jnp.float32, mesh: Mesh | None = None):
    """Random parameters from the config alone, made where they will live: on `mesh` if given, else on the default device."""

    def make(key):
        return jax.tree.map(lambda x: x.astype(dtype), nn.unbox(model.init(key)["params"]))

    shardings = None if mesh is None else parameter_shardings(abstract_params(model), logical_axes(model), mesh)
    return jax.jit(make, out_shardings=shardings)(jax.random.key(seed))


def flatten_params(tree) -> dict[str, jax.Array]:
    """A nested dict of parameters as {"model/text_model/…/kernel": leaf}."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {"/".join(key.key for key in path): leaf for path, leaf in leaves}


def unflatten_params(flat: dict[str, jax.Array]) -> dict:
    """The inverse of `flatten_params`."""
    tree: dict = {}
    for path, leaf in flat.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree
