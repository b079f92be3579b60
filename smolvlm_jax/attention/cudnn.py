"""Attention on NVIDIA's GPUs by cuDNN's flash attention, which keeps no scores, in neither pass.

jax calls it as one operation with a gradient. It is used in bfloat16 and float16 only, which is what it computes in. Where
queries and keys belong to several segments, cuDNN takes the mask as a bias that all heads share: one number for each query and
key, where the einsums keep one in float32 for each head. In a decode step it is one kernel where the einsums are three, and
writes no scores to memory. It is available where jax's CUDA plugin is installed, also in a process that only compiles for GPUs.
"""

import functools
import importlib.util

import jax
import jax.numpy as jnp

from ..sharding import on_each_device
from .forms import Mask, SegmentMask

__all__ = ["cudnn_attention", "cudnn_step", "fits_cudnn", "fits_cudnn_step", "fits_one_query"]

# Fewest queries for which it is used: below, the scores are small.
SHORTEST = 128
# The largest head that every card from Ampere on can do.
_LARGEST_HEAD = 128


@functools.cache
def _installed() -> bool:
    """Whether jax's CUDA plugin is here, without which the operation cannot even be traced."""
    return any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13))


def fits_cudnn(q: jax.Array, k: jax.Array, mask: Mask) -> bool:
    """Whether these are whole rows in 16 bits, long enough, with heads that cuDNN takes and a mask that it can be given."""
    (*_, t, size), known = q.shape, mask is None or isinstance(mask, SegmentMask)
    sizes = SHORTEST <= t == k.shape[2] and size % 8 == 0 and size <= _LARGEST_HEAD
    even = mask is None or t % 2 == 0  # a bias must have an even number of queries
    return known and sizes and even and q.dtype in (jnp.bfloat16, jnp.float16) and q.dtype == k.dtype and _installed()


def cudnn_attention(q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask) -> jax.Array:
    """Attention by cuDNN. On a mesh every device takes its rows, and its heads where they divide.

    Args:
        q: queries (b, n, t, h).
        k: keys (b, k, t, h) with n a multiple of k.
        v: values (b, k, t, h).
        mask: None or a SegmentMask.

    Returns:
        (b, n, t, h).
    """
    if isinstance(mask, SegmentMask) and mask.segment_ids is not None:
        seen = jnp.broadcast_to(mask.array, (q.shape[0], *mask.array.shape[1:]))
        return on_each_device(lambda q, k, v, seen: _one_device(q, k, v, seen[:, None], causal=False), q, k, v, seen)
    causal = isinstance(mask, SegmentMask) and mask.causal
    return on_each_device(functools.partial(_one_device, seen=None, causal=causal), q, k, v)


def _one_device(q: jax.Array, k: jax.Array, v: jax.Array, seen: jax.Array | None, causal: bool) -> jax.Array:
    """The operation on the arrays of one device; seen: bool (b, 1, t, t)."""
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    out = jax.nn.dot_product_attention(q, k, v, mask=seen, is_causal=causal, implementation="cudnn")
    return out.swapaxes(1, 2)


def fits_cudnn_step(q: jax.Array, k: jax.Array, mask: Mask) -> bool:
    """Whether this is one query a row in 16 bits and a cache that is long enough, with a mask of its columns."""
    return isinstance(mask, jax.Array) and fits_one_query(q, k)


def fits_one_query(q: jax.Array, k: jax.Array) -> bool:
    """The same of queries (b, n, t, h) and what a cache keeps, (b, …, L, h), of which only shapes and dtypes count."""
    (*_, t, size), length = q.shape, k.shape[2]
    sizes = t == 1 and length >= SHORTEST and length % 8 == 0 and size % 8 == 0 and size <= _LARGEST_HEAD
    return sizes and q.dtype in (jnp.bfloat16, jnp.float16) and q.dtype == k.dtype and _installed()


def cudnn_step(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
    """Attention of one query a row to a cache. Arguments as in `cudnn_attention`, with t = 1 and a mask bool (b, 1, L)."""
    return on_each_device(_one_step, q, k, v, mask)


def _one_step(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
    """The operation on the arrays of one device.

    cuDNN wants columns before heads. A cache has them behind, which with a single head is the same: each key head is taken for
    a row of its own, and its query heads for the heads of that row, so that nothing of the cache is moved.
    """
    (b, n, _, h), (_, kv, length, _) = q.shape, k.shape
    rows = lambda x: x.reshape(b * kv, length, 1, h)
    seen = jnp.broadcast_to(mask[:, None], (b, kv, 1, length)).reshape(b * kv, 1, 1, length)
    grouped = q.reshape(b * kv, 1, n // kv, h)
    out = jax.nn.dot_product_attention(grouped, rows(k), rows(v), mask=seen, implementation="cudnn")
    return out.reshape(b, n, 1, h)
