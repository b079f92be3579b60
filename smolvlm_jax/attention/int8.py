"""Keys and values in 8 bits: a scale for each vector of a head, by its largest absolute value after a rotation.

Some entries of a key are far larger than the others, in every column the same ones, and would take most of the 8 bits. A
Hadamard matrix spreads each entry over all (figures in docs/design.md). It is its own inverse, and products of rotated queries
and keys are those of the queries and keys.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from ..precision import matmul_precision

__all__ = [
    "UNIT",
    "dequantize",
    "joined_bytes",
    "nearest",
    "power_above",
    "quantize",
    "rotation",
    "rounded",
    "turn",
    "two_bytes",
]

_LARGEST = 127
# The unit of `joined_bytes`, as a part of the bound.
UNIT = 1 / (2 * _LARGEST * _LARGEST)


@functools.cache
def rotation(size: int) -> np.ndarray:
    """A symmetric orthogonal matrix (size, size), float32: along its diagonal Hadamard matrices of the largest power of 2 that
    divides `size`, with fixed random signs on both sides, so that what all entries of a vector share is spread too."""
    power = size & -size
    block = np.ones((1, 1), np.float32)
    while len(block) < power:
        block = np.block([[block, block], [block, -block]])
    signs = np.where(np.random.default_rng(0).random(size) < 0.5, np.float32(-1), np.float32(1))
    whole = np.kron(np.eye(size // power, dtype=np.float32), block / np.sqrt(np.float32(power)))
    return signs[:, None] * whole * signs


def turn(x: jax.Array) -> jax.Array:
    """Vectors (…, h), rotated, in float32. The rotation is its own inverse."""
    matrix = jnp.asarray(rotation(x.shape[-1]), x.dtype)
    return jnp.einsum("...h,hg->...g", x, matrix, precision=matmul_precision(x.dtype), preferred_element_type=jnp.float32)


def rounded(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Vectors (…, h) -> int8 (…, h) and float32 scales (…, 1), whose product is x to half a scale."""
    x = x.astype(jnp.float32)
    scale = jnp.abs(x).max(-1, keepdims=True) * (1 / _LARGEST)
    return jnp.round(x / jnp.where(scale == 0, 1.0, scale)).astype(jnp.int8), scale


def quantize(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`rounded` after `turn`."""
    return rounded(turn(x))


def dequantize(x: jax.Array, scale: jax.Array) -> jax.Array:
    """What `quantize` was given, as nearly as 8 bits tell, in float32."""
    return turn(x.astype(jnp.float32) * scale)


def power_above(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The smallest powers of 2 above numbers that are not negative, float32, and their inverses: exact, and no division. NaN of
    NaN and infinity."""
    exponent = jax.lax.bitcast_convert_type(x, jnp.int32) >> 23
    power, inverse = (jax.lax.bitcast_convert_type(y << 23, jnp.float32) for y in (exponent + 1, 253 - exponent))
    return power + (x - x), inverse


def two_bytes(x: jax.Array, inverse: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Numbers in two arrays of int8 of their shape: 127ths of a bound, and 254ths of those.

    Products of int8 with int8 are exact on a chip's matrix units; with two they are nearer than those of bfloat16.

    Args:
        x: float32.
        inverse: of the bound, 1 over more than any |x|, broadcastable to x.
    """
    x = x * (inverse * _LARGEST)
    high = nearest(x)
    return high.astype(jnp.int8), nearest((x - high.astype(jnp.float32)) * (2 * _LARGEST)).astype(jnp.int8)


def nearest(x: jax.Array) -> jax.Array:
    """Small float32 numbers to the nearest int32, in two instructions: behind 1.5·2^23 there is no room for a fraction."""
    return jax.lax.bitcast_convert_type(x + np.float32(1.5 * 2**23), jnp.int32) - 0x4B400000


def joined_bytes(high: jax.Array, low: jax.Array) -> jax.Array:
    """Sums, int32, of such arrays -> float32, to be multiplied by the bound and `UNIT`."""
    return high.astype(jnp.float32) * (2 * _LARGEST) + low.astype(jnp.float32)
