"""Attention for a block of queries at a time: the scores of a long row never exist as a whole, in neither pass.

The gradient is written by hand (Dao, FlashAttention-2, 2023, section 2.3.2): weights are computed again from each query's
maximum and sum, and the gradients of keys and values are summed in float32. Automatic differentiation of the loop would keep
the weights of every block.
"""

from functools import partial

import jax
import jax.numpy as jnp

from ..precision import matmul_precision

__all__ = ["blockwise_attention"]


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def blockwise_attention(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None, block: int) -> jax.Array:
    """Scaled dot-product attention, `block` queries at a time.

    Args:
        q: queries (b, n, t, h).
        k: keys (b, k, s, h).
        v: values (b, k, s, h).
        mask: bool (b or 1, t or 1, s), True where a query may look; or None.
        block: queries at a time.

    Returns:
        (b, n, t, h) in q's dtype.
    """
    return _forward(q, k, v, mask, block)[0]


def _forward(q, k, v, mask, block):
    """The output, and what the gradient needs."""
    precision = matmul_precision(q.dtype)

    def some(_, xs):
        queries, seen = xs
        scores = _scores(queries, k, seen)
        highest = scores.max(-1, keepdims=True)
        weights = jnp.exp(scores - highest)
        total = weights.sum(-1, keepdims=True)
        out = jnp.einsum("bkgts,bksh->bkgth", (weights / total).astype(q.dtype), v, precision=precision)
        return None, (out, highest, total)

    _, (out, highest, total) = jax.lax.scan(some, None, (_split(q, k, block), _split_mask(mask, q, k, block)))
    out = _join(out, q.shape)
    return out, (q, k, v, mask, out, highest, total)


def _backward(block, kept, grad):
    """Gradients of q, k, v and (none) the mask."""
    q, k, v, mask, out, highest, total = kept
    h = q.shape[-1]
    precision = matmul_precision(q.dtype)
    product = partial(jnp.einsum, precision=precision, preferred_element_type=jnp.float32)

    def some(sums, xs):
        queries, seen, highest, total, out, grad = xs
        weights = jnp.exp(_scores(queries, k, seen) - highest) / total
        through = jnp.sum(grad.astype(jnp.float32) * out.astype(jnp.float32), axis=-1, keepdims=True)
        scores = weights * (product("bkgth,bksh->bkgts", grad, v) - through) * (h**-0.5)
        if seen is not None:
            scores = jnp.where(seen, scores, 0)
        scores, weights = scores.astype(q.dtype), weights.astype(q.dtype)
        to_keys = sums[0] + product("bkgts,bkgth->bksh", scores, queries)
        to_values = sums[1] + product("bkgts,bkgth->bksh", weights, grad)
        return (to_keys, to_values), product("bkgts,bksh->bkgth", scores, k).astype(q.dtype)

    xs = (_split(q, k, block), _split_mask(mask, q, k, block), highest, total, _split(out, k, block), _split(grad, k, block))
    zeros = (jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32))
    (to_keys, to_values), to_queries = jax.lax.scan(some, zeros, xs)
    return _join(to_queries, q.shape), to_keys.astype(k.dtype), to_values.astype(v.dtype), None


blockwise_attention.defvjp(_forward, _backward)


def _scores(queries, k, seen):
    """Scores float32 (b, k, g, block, s) of queries (b, k, g, block, h), the lowest finite number where a key is masked."""
    scores = jnp.einsum(
        "bkgth,bksh->bkgts", queries, k, precision=matmul_precision(k.dtype), preferred_element_type=jnp.float32
    )
    scores = scores * (k.shape[-1] ** -0.5)
    return scores if seen is None else jnp.where(seen, scores, jnp.finfo(jnp.float32).min)


def _split(x, k, block):
    """(b, n, t, h) -> (blocks, b, k, g, block, h); the last block is padded with zeros."""
    b, n, t, h = x.shape
    x = jnp.pad(x, ((0, 0), (0, 0), (0, -t % block), (0, 0)))
    return jnp.moveaxis(x.reshape(b, k.shape[1], n // k.shape[1], -1, block, h), 3, 0)


def _join(x, shape):
    """The inverse of `_split`: (blocks, b, k, g, block, h) -> (b, n, t, h)."""
    b, n, t, h = shape
    return jnp.moveaxis(x, 0, 3).reshape(b, n, -1, h)[:, :, :t]


def _split_mask(mask, q, k, block):
    """(b, t, s) -> (blocks, b, 1, 1, block, s)."""
    if mask is None:
        return None
    one_head = jnp.broadcast_to(mask[:, None], (mask.shape[0], 1, q.shape[2], k.shape[2]))
    return _split(one_head, one_head, block)
