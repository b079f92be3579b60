"""Products of the encoder's layers with weights in 8 bits: both factors int8, on chips that multiply these twice as fast.

What a product is given has a scale for each row, a token, of which the kernels know no more than they hold at a time: for the
second product of the MLP the scale is that of a block of its columns.
"""

import jax
import jax.numpy as jnp

from ..attention.int8 import nearest

__all__ = ["in_8_bits", "int8_product"]

_LARGEST = 127
# The least that the largest of some numbers is taken to be: of zeros there is no scale.
_TINY = 1e-30


def in_8_bits(x: jax.Array, axis: int = -1) -> tuple[jax.Array, jax.Array]:
    """Numbers in 8 bits, by the largest along an axis.

    Args:
        x: float32.
        axis: that shares a scale.

    Returns:
        int8 of x's shape, and float32 scales, 1 along the axis, whose product is x to half a scale. A scale is NaN where x is.
    """
    largest = jnp.maximum(jnp.abs(x).max(axis, keepdims=True), _TINY)
    return nearest(x * (_LARGEST / largest)).astype(jnp.int8), largest * (1 / _LARGEST)


def int8_product(x: jax.Array, weights: jax.Array) -> jax.Array:
    """int8 (…, k) times int8 (k, m) -> float32 (…, m). The sums are exact in int32, and rounded once."""
    dimensions = (((x.ndim - 1,), (0,)), ((), ()))
    return jax.lax.dot_general(x, weights, dimensions, preferred_element_type=jnp.int32).astype(jnp.float32)
