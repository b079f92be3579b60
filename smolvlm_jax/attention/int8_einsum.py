"""Attention to keys and values in 8 bits by einsums of the bytes: what `int8.dequantize` would restore never exists.

Queries are rotated as keys were, so that products with the bytes are those of queries and keys over the keys' scales; weights
are multiplied by the values' scales before they meet the bytes, and the result is rotated back.
"""

import jax
import jax.numpy as jnp

from ..precision import matmul_precision
from .forms import Mask, grouped, masked_softmax
from .int8 import turn

__all__ = ["attend_bytes"]


def attend_bytes(
    q: jax.Array, keys: jax.Array, key_scales: jax.Array, values: jax.Array, value_scales: jax.Array, mask: Mask
) -> jax.Array:
    """Attention to what `int8.quantize` made of keys and values.

    Args:
        q: queries (b, n, t, h).
        keys: int8 (b, k, s, h), n a multiple of k.
        key_scales: float32 (b, k, s, 1).
        values: int8 (b, k, s, h).
        value_scales: float32 (b, k, s, 1).
        mask: as in `attention`.

    Returns:
        (b, n, t, h) in the dtype of the queries.
    """
    dtype, precision = q.dtype, matmul_precision(q.dtype)
    each = lambda scales: scales[..., 0][:, :, None, None]  # (b, k, 1, 1, s)
    turned = grouped(turn(q).astype(dtype), keys.shape[1])
    scores = jnp.einsum(
        "bkgth,bksh->bkgts", turned, keys.astype(dtype), precision=precision, preferred_element_type=jnp.float32
    )
    weights = masked_softmax(scores * each(key_scales), mask, q.shape[-1]) * each(value_scales)
    out = jnp.einsum(
        "bkgts,bksh->bkgth",
        weights.astype(dtype),
        values.astype(dtype),
        precision=precision,
        preferred_element_type=jnp.float32,
    )
    return turn(out).astype(dtype).reshape(q.shape)
