"""Low-rank adapters: two thin factors beside a projection's kernel, which stays as it is.

An adapter is two more leaves in the parameter tree, `lora_a` and `lora_b`, beside `kernel`; a projection that finds them adds
x A B (`layers.Projection`). So a tree with adapters is used like any other: to train, to generate, to evaluate. In training B
is kept without its factor alpha / rank; `combine` multiplies it in.
"""

import math
import re
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..errors import ConfigError
from ..model import SmolVLMForConditionalGeneration
from ..parameters import AxisNames, abstract_params, flatten_params, logical_axes, summed_dimensions, unflatten_params
from .config import LoraConfig

__all__ = ["adapter_axes", "adapter_shapes", "init_adapters", "matched", "merge", "product"]


def matched(model: SmolVLMForConditionalGeneration, config: LoraConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """Paths of the kernels that `config.targets` names. Raises ConfigError if it is no regular expression or names none."""
    try:
        pattern = re.compile(config.targets)
    except re.error as error:
        raise ConfigError(f"lora.targets {config.targets!r} is not a regular expression: {error}") from error
    shapes = flatten_params(abstract_params(model))
    kernels = {path: shapes[path] for path in summed_dimensions(model)}
    name = lambda path: path.removesuffix("/kernel").removeprefix("model/")
    found = {path: leaf for path, leaf in kernels.items() if pattern.fullmatch(name(path))}
    if not found:
        raise ConfigError(f"lora.targets {config.targets!r} matches no projection; the first is {name(next(iter(kernels)))}")
    return found


def _factors(path: str, shape: tuple, summed: int, rank) -> dict[str, tuple]:
    """The two leaves beside a kernel, with the kernel's dimensions (or axis names) and the rank's. summed: leading dimensions
    of the kernel that its projection sums over."""
    holder = path.removesuffix("kernel")
    return {f"{holder}lora_a": (*shape[:summed], rank), f"{holder}lora_b": (rank, *shape[summed:])}


def adapter_shapes(model: SmolVLMForConditionalGeneration, config: LoraConfig, dtype=jnp.float32) -> dict:
    """The nested tree of adapters as ShapeDtypeStructs."""
    flat: dict[str, Any] = {}
    summed = summed_dimensions(model)
    for path, leaf in matched(model, config).items():
        factors = _factors(path, leaf.shape, summed[path], config.rank)
        flat |= {p: jax.ShapeDtypeStruct(s, dtype) for p, s in factors.items()}
    return unflatten_params(flat)


def adapter_axes(model: SmolVLMForConditionalGeneration, config: LoraConfig) -> dict:
    """The same tree with logical axis names: a factor lies as its kernel's dimensions lie, the rank is whole."""
    axes, summed = flatten_params(logical_axes(model)), summed_dimensions(model)
    flat: dict[str, Any] = {}
    for path in matched(model, config):
        flat |= {p: AxisNames(names) for p, names in _factors(path, axes[path], summed[path], None).items()}
    return unflatten_params(flat)


def init_adapters(model: SmolVLMForConditionalGeneration, config: LoraConfig, seed: int = 0, dtype=jnp.float32) -> dict:
    """A normal with the variance of 1 / fan-in, B zero: the model is the base at first."""

    def make(path, leaf):
        if path.endswith("lora_b"):
            return jnp.zeros(leaf.shape, dtype)
        key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(path.encode()))
        return (jax.random.normal(key, leaf.shape) / math.sqrt(math.prod(leaf.shape[:-1]))).astype(dtype)

    flat = flatten_params(adapter_shapes(model, config, dtype))
    return unflatten_params({path: make(path, leaf) for path, leaf in flat.items()})


def product(a, b, scale: float, shape) -> np.ndarray | jax.Array:
    """scale x A B in the kernel's shape, for numpy and jax arrays alike; computed in A's dtype."""
    return (a.reshape(-1, a.shape[-1]) @ b.reshape(b.shape[0], -1)).reshape(shape) * scale


def merge(params: dict) -> dict:
    """A tree as `combine` returns it, with every adapter added into its kernel, in float32, and gone."""
    flat = flatten_params(params)
    out = {}
    for path, leaf in flat.items():
        if path.rsplit("/", 1)[-1].startswith("lora_"):
            continue
        a = flat.get(path.removesuffix("kernel") + "lora_a") if path.endswith("/kernel") else None
        if a is not None:
            b = flat[path.removesuffix("kernel") + "lora_b"]
            delta = product(a.astype(jnp.float32), b.astype(jnp.float32), 1.0, leaf.shape)
            leaf = (leaf.astype(jnp.float32) + delta).astype(leaf.dtype)
        out[path] = leaf
    return unflatten_params(out)
