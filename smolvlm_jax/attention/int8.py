"""Keys and values in 8 bits: a scale for each vector of a head, by its largest absolute value."""

import jax
import jax.numpy as jnp

__all__ = ["dequantize", "quantize"]

_LARGEST = 127


def quantize(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Vectors (…, h) -> int8 (…, h) and float32 scales (…, 1), whose product is x to half a scale."""
    x = x.astype(jnp.float32)
    scale = jnp.abs(x).max(-1, keepdims=True) * (1 / _LARGEST)
    return jnp.round(x / jnp.where(scale == 0, 1.0, scale)).astype(jnp.int8), scale


def dequantize(x: jax.Array, scale: jax.Array) -> jax.Array:
    """What `quantize` was given, rounded, in float32."""
    return x.astype(jnp.float32) * scale
