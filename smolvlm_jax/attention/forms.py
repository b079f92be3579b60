"""The forms of attention that need no kernel: einsums, whole or for a block of queries at a time, one query against a whole
cache, one head after the other.

XLA compiles all of them for every platform, but they are not equally fast there. Its compilers for accelerators fuse and
partition two einsums well. Its CPU backend does not: in float32, where large score matrices leave the processor's caches, or
where one query meets a whole KV cache, the last two forms are up to twice as fast (figures in docs/design.md).
"""

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp

from ..precision import matmul_precision
from .blockwise import blockwise_attention

__all__ = ["LARGE", "Mask", "SegmentMask", "by_einsum", "grouped", "masked_softmax"]

# Scores of one head, queries × keys, from which on a CPU takes the heads one at a time.
LARGE = 2**17
# Scores of one head from which on queries are taken in blocks, and what a block holds: 4 MB in float32. Smaller blocks read
# keys and values more often and need less memory.
BLOCK = 2**20


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SegmentMask:
    """Which query sees which key within whole rows: as an array, and as the description from which a kernel makes it.

    Attributes:
        array: bool (b or 1, t, t).
        segment_ids: int32 (b, t), or None for one segment. A query sees the keys of its own segment only. Segment 0 is
            padding: in the array it sees nothing, in a kernel it sees itself. Neither result is read.
        causal: whether a query sees only keys at or before its own position.
    """

    array: jax.Array
    segment_ids: jax.Array | None
    causal: bool = field(metadata={"static": True})


Mask = jax.Array | SegmentMask | None


def _visible(mask: Mask) -> jax.Array | None:
    """The mask as a boolean array (b or 1, t or 1, s)."""
    return mask.array if isinstance(mask, SegmentMask) else mask


def _softmax(scores: jax.Array, mask: jax.Array | None, size: int) -> jax.Array:
    """Weights of float32 scores (…, s); `mask`, of the same rank, says which scores count."""
    scores = scores * (size**-0.5)
    if mask is not None:
        scores = jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
    return jax.nn.softmax(scores, axis=-1)


def grouped(q: jax.Array, heads: int) -> jax.Array:
    """Queries (b, n, t, h) by the key head that they read, (b, k, n / k, t, h)."""
    b, n, t, h = q.shape
    return q.reshape(b, heads, n // heads, t, h)


def masked_softmax(scores: jax.Array, mask: Mask, size: int) -> jax.Array:
    """Weights of float32 products of queries and keys, (b, k, g, t, s), with heads of `size`."""
    seen = _visible(mask)
    return _softmax(scores, None if seen is None else seen[:, None, None], size)


def einsum_and_weights(q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask) -> tuple[jax.Array, jax.Array]:
    """Two einsums: the output (b, n, t, h) and the weights (b, n, t, s)."""
    b, n, t, h = q.shape
    kv, precision = k.shape[1], matmul_precision(q.dtype)
    scores = jnp.einsum("bkgth,bksh->bkgts", grouped(q, kv), k, precision=precision, preferred_element_type=jnp.float32)
    weights = masked_softmax(scores, mask, h).astype(q.dtype)
    out = jnp.einsum("bkgts,bksh->bkgth", weights, v, precision=precision)
    return out.reshape(b, n, t, h), weights.reshape(b, n, t, k.shape[2])


def by_einsum(q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask) -> jax.Array:
    """Two einsums, without the weights."""
    return einsum_and_weights(q, k, v, mask)[0]


def fits_whole(q: jax.Array, k: jax.Array, mask: Mask) -> bool:
    """Whether the scores of a head are small enough to exist as a whole."""
    return q.shape[2] == 1 or q.shape[2] * k.shape[2] <= BLOCK


def by_blocks(q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask) -> jax.Array:
    """The einsums for a block of queries at a time (see `blockwise`)."""
    block = 2 ** max((BLOCK // k.shape[2]).bit_length() - 1, 3)
    return blockwise_attention(q, k, v, _visible(mask), min(block, q.shape[2]))


def _exact_on_one_device(q: jax.Array) -> bool:
    mesh = jax.sharding.get_abstract_mesh()
    return q.dtype == jnp.float32 and (mesh.empty or mesh.size == 1)


def fits_one_query(q: jax.Array, k: jax.Array, mask: Mask) -> bool:
    """Whether this is a decode step in float32 on one device."""
    return q.shape[2] == 1 and _exact_on_one_device(q)


def one_query(q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask) -> jax.Array:
    """t = 1: multiply and reduce, which reads keys and values in place; XLA's products of such thin matrices would first
    make a transposed copy of the keys."""
    b, n, _, h = q.shape
    kv = k.shape[1]
    mask = _visible(mask)
    scores = (grouped(q, kv) * k[:, :, None]).sum(-1)  # (b, k, g, s)
    weights = _softmax(scores, None if mask is None else mask[:, None], h)
    return (weights[..., None] * v[:, :, None]).sum(-2).reshape(b, n, 1, h)


def fits_head_by_head(q: jax.Array, k: jax.Array, mask: Mask) -> bool:
    """Whether the scores of a head are large, in float32 on one device."""
    return q.shape[2] > 1 and q.shape[2] * k.shape[2] >= LARGE and _exact_on_one_device(q)


def head_by_head(q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask) -> jax.Array:
    """One head of one row after the other, as plain products of two matrices; its scores stay in the processor's caches."""
    b, n, t, h = q.shape
    kv, s = k.shape[1:3]
    queries, keys, values = (q * h**-0.5).reshape(b * n, t, h), k.reshape(b * kv, s, h), v.reshape(b * kv, s, h)
    mask = _visible(mask)
    if mask is not None:
        mask = jnp.broadcast_to(mask, (b, *mask.shape[1:]))
    precision = matmul_precision(q.dtype)

    def head(i):
        j = i // (n // kv)
        scores = jnp.matmul(queries[i], keys[j].T, precision=precision)
        if mask is not None:
            scores = jnp.where(mask[i // n], scores, jnp.finfo(jnp.float32).min)
        # The softmax is divided by its sum after the product: of h numbers a query instead of s.
        weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(-1, keepdims=True)))
        return jnp.matmul(weights, values[j], precision=precision) / weights.sum(-1, keepdims=True)

    return jax.lax.map(head, jnp.arange(b * n)).reshape(b, n, t, h)
