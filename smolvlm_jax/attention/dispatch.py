"""One attention for encoder and decoder: grouped heads, a boolean mask, softmax in float32; its form chosen here alone.

On accelerators and on meshes two einsums, which their compilers fuse and partition well, and for long rows the same a block
of queries at a time (`blockwise`), whose scores never fill the memory; on TPU in bfloat16 one kernel for whole prompts and
pictures (`splash`) and another for decode steps (`decode_attention`). XLA's CPU backend is another matter: in float32, where
large score matrices leave the caches, or where one query meets a whole KV cache, other forms of the same sum are up to twice
as fast (figures in docs/design.md). The choice follows the platform that a program is compiled for, not the process that
compiles it: a program for TPU is the same wherever it was lowered.
"""

import math
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp

from ..cache import KVCache
from ..precision import matmul_precision
from .blockwise import blockwise_attention
from .decode import decode_attention
from .splash import splash_attention
from .trial import use_decode_kernel, use_splash_kernel

__all__ = ["SegmentMask", "attention", "cached_attention"]

# Scores of one head, queries × keys, from which on the heads are taken one at a time.
LARGE = 2**17
# The same elsewhere, from which on queries are taken in blocks, and what a block holds: 4 MB in float32. Smaller blocks read
# keys and values more often and need less memory.
BLOCK = 2**20


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SegmentMask:
    """Who sees whom within whole rows, as an array and as what the array was made of, which a kernel takes instead.

    array: bool (b or 1, t, t). segment_ids: int32 (b, t) or None; a query sees the keys of its own segment, 0 being padding,
    which in the array sees nothing and in a kernel itself: nobody reads it. causal: and none behind itself.
    """

    array: jax.Array
    segment_ids: jax.Array | None
    causal: bool = field(metadata={"static": True})


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: jax.Array | SegmentMask | None = None,
    *,
    return_weights: bool = False,
) -> tuple[jax.Array, jax.Array | None]:
    """Scaled dot-product attention.

    q (b, n, t, h); k and v (b, k, s, h) with n a multiple of k, query head j reading key/value head j // (n / k);
    mask boolean, broadcastable to (b, t, s), True where a query may look, or a SegmentMask. Returns the output (b, n, t, h)
    in q's dtype and, on request, the weights (b, n, t, s) after softmax.

    Scores and softmax are float32. A masked score becomes the lowest finite float32, not -inf: a query that may look
    nowhere (padding) gets finite values, which nothing reads.
    """
    parts = mask if isinstance(mask, SegmentMask) else None
    fused = (mask is None or parts is not None) and not return_weights and use_splash_kernel(q, k)
    if parts is not None:
        mask = parts.array
    if return_weights:
        return _by_einsum(q, k, v, mask)
    default = _by_blocks if q.shape[2] * k.shape[2] > BLOCK and q.shape[2] > 1 else lambda *inputs: _by_einsum(*inputs)[0]
    if fused:
        ids, causal = (None, False) if parts is None else (parts.segment_ids, parts.causal)
        on_tpu = lambda q, k, v, _, ids: splash_attention(q, k, v, ids, causal=causal)
        return jax.lax.platform_dependent(q, k, v, mask, ids, tpu=on_tpu, default=lambda *inputs: default(*inputs[:4])), None
    on_cpu = _form_on_cpu(q, k)
    if on_cpu is None:
        return default(q, k, v, mask), None
    return jax.lax.platform_dependent(q, k, v, mask, cpu=on_cpu, default=default), None


def cached_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    cache: KVCache,
    layer: int,
    start: jax.Array,
    mask: jax.Array,
    *,
    return_weights: bool = False,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array], jax.Array | None]:
    """Write new columns into a layer's cache and attend to all that it holds.

    q (b, n, t, h); the new k and v (b, k, t, h), which go to column `start`; mask bool (b, t, L) over the cache's columns, as
    `KVCache.advance` returns it. Returns the output (b, n, t, h), the layer's updated keys and values (b, k, L, h), and on
    request the weights (b, n, t, L).
    """

    def plain(q, k, v, keys, values, mask, start):
        keys, values = KVCache.write(keys, values, start, k, v)
        out, weights = attention(q, keys.astype(q.dtype), values.astype(q.dtype), mask, return_weights=return_weights)
        return out, keys, values, weights

    inputs = (q, k, v, cache.keys[layer], cache.values[layer], mask, start)
    if not return_weights and use_decode_kernel(q, cache.keys[layer]):
        kernel = lambda *inputs: (*decode_attention(*inputs), None)
        out, keys, values, weights = jax.lax.platform_dependent(*inputs, tpu=kernel, default=plain)
    else:
        out, keys, values, weights = plain(*inputs)
    return out, (keys, values), weights


def _form_on_cpu(q: jax.Array, k: jax.Array):
    """What to compute instead of the einsums where the platform is a CPU, or None."""
    mesh = jax.sharding.get_abstract_mesh()
    if q.dtype != jnp.float32 or not (mesh.empty or mesh.size == 1):
        return None
    if q.shape[2] == 1:
        return _one_query
    return _head_by_head if q.shape[2] * k.shape[2] >= LARGE else None


def _softmax(scores: jax.Array, mask: jax.Array | None, size: int) -> jax.Array:
    """Weights of float32 scores (…, s), of which a mask of the same rank says which count."""
    scores = scores * (size**-0.5)
    if mask is not None:
        scores = jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
    return jax.nn.softmax(scores, axis=-1)


def _by_einsum(q, k, v, mask) -> tuple[jax.Array, jax.Array]:
    b, n, t, h = q.shape
    kv = k.shape[1]
    precision = matmul_precision(q.dtype)
    grouped = q.reshape(b, kv, n // kv, t, h)
    scores = jnp.einsum("bkgth,bksh->bkgts", grouped, k, precision=precision, preferred_element_type=jnp.float32)
    weights = _softmax(scores, None if mask is None else mask[:, None, None], h).astype(q.dtype)
    out = jnp.einsum("bkgts,bksh->bkgth", weights, v, precision=precision)
    return out.reshape(b, n, t, h), weights.reshape(b, n, t, k.shape[2])


def _by_blocks(q, k, v, mask) -> jax.Array:
    block = 2 ** max(int(math.log2(BLOCK / k.shape[2])), 3)
    return blockwise_attention(q, k, v, mask, min(block, q.shape[2]))


def _one_query(q, k, v, mask) -> jax.Array:
    """t = 1, float32: multiply and reduce, which read keys and values where they lie; products of matrices this thin want
    a transposed copy of the keys."""
    b, n, _, h = q.shape
    kv = k.shape[1]
    grouped = q.reshape(b, kv, n // kv, 1, h)
    scores = (grouped * k[:, :, None]).sum(-1)  # (b, k, g, s)
    weights = _softmax(scores, None if mask is None else mask[:, None], h)
    return (weights[..., None] * v[:, :, None]).sum(-2).reshape(b, n, 1, h)


def _head_by_head(q, k, v, mask) -> jax.Array:
    """float32: one row's head after the other as plain products of two matrices; its scores stay in the caches."""
    b, n, t, h = q.shape
    kv, s = k.shape[1:3]
    queries, keys, values = q.reshape(b * n, t, h), k.reshape(b * kv, s, h), v.reshape(b * kv, s, h)
    if mask is not None:
        mask = jnp.broadcast_to(mask, (b, *mask.shape[1:]))
    precision = matmul_precision(q.dtype)

    def head(i):
        j = i // (n // kv)
        scores = jnp.matmul(queries[i], keys[j].T, precision=precision)
        weights = _softmax(scores, None if mask is None else mask[i // n], h)
        return jnp.matmul(weights, values[j], precision=precision)

    return jax.lax.map(head, jnp.arange(b * n)).reshape(b, n, t, h)
