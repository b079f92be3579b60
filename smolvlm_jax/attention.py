"""One attention for encoder and decoder: grouped heads, a boolean mask, softmax in float32."""

import jax
import jax.numpy as jnp

from .layers import matmul_precision

__all__ = ["attention"]


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: jax.Array | None = None,
    *,
    return_weights: bool = False,
) -> tuple[jax.Array, jax.Array | None]:
    """Scaled dot-product attention.

    q (b, n, t, h); k and v (b, k, s, h) with n a multiple of k, query head j reading key/value head j // (n / k);
    mask boolean, broadcastable to (b, t, s), True where a query may look. Returns the output (b, n, t, h) in q's dtype
    and, on request, the weights (b, n, t, s) after softmax.

    Scores and softmax are float32. A masked score becomes the lowest finite float32, not -inf: a query that may look
    nowhere (padding) gets finite values, which nothing reads.
    """
    b, n, t, h = q.shape
    kv = k.shape[1]
    precision = matmul_precision(q.dtype)
    grouped = q.reshape(b, kv, n // kv, t, h)
    scores = jnp.einsum("bkgth,bksh->bkgts", grouped, k, precision=precision, preferred_element_type=jnp.float32)
    scores = scores * (h**-0.5)
    if mask is not None:
        scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(q.dtype)
    out = jnp.einsum("bkgts,bksh->bkgth", weights, v, precision=precision)
    full = weights.reshape(b, n, t, k.shape[2]) if return_weights else None
    return out.reshape(b, n, t, h), full
