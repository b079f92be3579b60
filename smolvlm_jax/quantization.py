"""Weights in 8 bits: int8 values, and beside them a scale for each channel of the result.

Of a projection's `kernel` that is one float32 number for each of its columns, `kernel_scale`; of the table of tokens, whose
rows are the columns of a tied output head, one for each row, `embedding_scale`. A scale has its parameter's dimensions, of
which those that it spans are 1, so that values times scale is the parameter, to half a scale. A module that finds a scale
beside its parameter multiplies its result by it (`layers.Projection`, `layers.Embedding`): products are of the int8 values,
which every dtype of the computation holds exactly.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

__all__ = ["SCALE", "dequantize", "dequantized", "fits", "is_quantized", "quantize", "scale_for", "scale_shape", "values_at"]

SCALE = "_scale"  # behind the name of a parameter: the name of its scale
_LARGEST = 127


def scale_shape(shape: Sequence[int], spanned: Sequence[int]) -> tuple[int, ...]:
    """The shape of a parameter's scale, which spans some dimensions."""
    return tuple(1 if axis in spanned else size for axis, size in enumerate(shape))


def fits(scale: Sequence[int], shape: Sequence[int]) -> bool:
    """Whether `scale` can be the shape of the scale of a parameter of `shape`."""
    return len(scale) == len(shape) and all(a in (1, b) for a, b in zip(scale, shape, strict=True))


def scale_for(largest: Any, xp: Any = jnp) -> Any:
    """The scale of numbers whose absolute values are at most `largest`, float32: a 127th, or 1 if all are 0."""
    scale = largest / xp.float32(_LARGEST)
    return xp.where(scale < xp.finfo(xp.float32).tiny, xp.float32(1), scale)


def values_at(x: Any, scale: Any, xp: Any = jnp) -> Any:
    """Float32 numbers in 8 bits, int8, of jax or (`xp`) numpy."""
    return xp.round(x / scale).astype(xp.int8)


def quantize(x: jax.Array, spanned: Sequence[int]) -> tuple[jax.Array, jax.Array]:
    """A parameter of any float dtype -> int8 values and float32 scale, which spans some dimensions."""
    x = x.astype(jnp.float32)
    scale = scale_for(jnp.abs(x).max(tuple(spanned), keepdims=True))
    return values_at(x, scale), scale


def dequantize(values: Any, scale: Any) -> Any:
    """The parameter in float32, of numpy or jax arrays."""
    return values.astype(scale.dtype) * scale


def is_quantized(params: Mapping[str, Any]) -> bool:
    """Whether a tree of parameters has any in 8 bits."""
    return any(is_quantized(x) if isinstance(x, Mapping) else name.endswith(SCALE) for name, x in params.items())


def dequantized(params: Mapping[str, Any], dtype: Any = jnp.float32) -> dict[str, Any]:
    """A tree of parameters without scales: those in 8 bits become `dtype`, the others stay as they are."""
    tree: dict[str, Any] = {}
    for name, x in params.items():
        if isinstance(x, Mapping):
            tree[name] = dequantized(x, dtype)
        elif f"{name}{SCALE}" in params:
            tree[name] = dequantize(x, params[f"{name}{SCALE}"]).astype(dtype)
        elif not name.endswith(SCALE):
            tree[name] = x
    return tree
