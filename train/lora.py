"""Low-rank adapters (LoRA, arXiv:2106.09685): two thin factors beside a projection's kernel, which does not change.

An adapter is two more leaves in the parameter tree, `lora_a` and `lora_b`, beside `kernel`; a projection that finds them adds
x A B (`layers.Projection`). So a tree with adapters is used like any other: to train, to generate, to evaluate. In training B
is kept without its factor alpha / rank; `partition.combine` multiplies it in.
"""

import math
import re
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..arguments import nearest
from ..errors import ConfigError
from ..model import SmolVLMForConditionalGeneration
from ..parameters import AxisNames, abstract_params, flatten_params, logical_axes, summed_dimensions, unflatten_params
from .config import LoraConfig

__all__ = ["adapter_axes", "adapter_shapes", "init_adapters", "matched", "product"]


def matched(model: SmolVLMForConditionalGeneration, config: LoraConfig) -> list[str]:
    """The paths of the kernels that `config.targets` matches.

    Raises:
        ConfigError: one of them is no regular expression, or matches no projection.
    """
    names = {path: path.removesuffix("/kernel").removeprefix("model/") for path in summed_dimensions(model)}
    found: set[str] = set()
    for target in (config.targets,) if isinstance(config.targets, str) else config.targets:
        try:
            pattern = re.compile(rf"(.*/)?{target}" if re.fullmatch(r"\w+", target) else target)
        except re.error as error:
            raise ConfigError(f"lora.targets {target!r} is not a regular expression: {error}") from error
        matching = {path for path, name in names.items() if pattern.fullmatch(name)}
        if not matching:
            last = sorted({name.rpartition("/")[2] for name in names.values()})
            hint = nearest(target, last) or f"; names are {', '.join(last)}, and the first whole path is {min(names.values())}"
            raise ConfigError(f"lora.targets {target!r} matches no projection{hint}")
        found |= matching
    return [path for path in names if path in found]


def _factors(model: SmolVLMForConditionalGeneration, config: LoraConfig, tree: dict, rank: Any) -> dict[str, tuple]:
    """For each adapter leaf its shape or axis names, from `tree` with those of the kernels and from what the rank has."""
    summed, kernels = summed_dimensions(model), flatten_params(tree)
    factors: dict[str, tuple] = {}
    for path in matched(model, config):
        inside, kernel, holder = summed[path], kernels[path], path.removesuffix("kernel")
        dimensions = kernel if isinstance(kernel, tuple) else kernel.shape
        factors[f"{holder}lora_a"] = (*dimensions[:inside], rank)
        factors[f"{holder}lora_b"] = (rank, *dimensions[inside:])
    return factors


def adapter_shapes(model: SmolVLMForConditionalGeneration, config: LoraConfig, dtype=jnp.float32) -> dict:
    """The nested tree of adapters as ShapeDtypeStructs."""
    factors = _factors(model, config, abstract_params(model), config.rank)
    return unflatten_params({path: jax.ShapeDtypeStruct(shape, dtype) for path, shape in factors.items()})


def adapter_axes(model: SmolVLMForConditionalGeneration, config: LoraConfig) -> dict:
    """The same tree with logical axis names: those of the kernel's dimensions, and none for the rank."""
    factors = _factors(model, config, logical_axes(model), None)
    return unflatten_params({path: AxisNames(names) for path, names in factors.items()})


def init_adapters(model: SmolVLMForConditionalGeneration, config: LoraConfig, seed: int = 0, dtype=jnp.float32) -> dict:
    """Initial adapters: A normal with variance 1 / fan-in, B zero, so that the model equals the base at first."""

    def make(path, leaf):
        if path.endswith("lora_b"):
            return jnp.zeros(leaf.shape, dtype)
        key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(path.encode()))
        return (jax.random.normal(key, leaf.shape) / math.sqrt(math.prod(leaf.shape[:-1]))).astype(dtype)

    flat = flatten_params(adapter_shapes(model, config, dtype))
    return unflatten_params({path: make(path, leaf) for path, leaf in flat.items()})


def product(a, b, scale: float, shape) -> np.ndarray | jax.Array:
    """scale · A B in the kernel's shape, for numpy and jax arrays alike; computed in A's dtype."""
    return (a.reshape(-1, a.shape[-1]) @ b.reshape(b.shape[0], -1)).reshape(shape) * scale
