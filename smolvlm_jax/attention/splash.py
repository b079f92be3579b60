"""Attention on TPU in one kernel, jax's splash attention: no scores in memory, forbidden blocks left out, gradient included.

On a v5e chip one layer of the 500M, eight rows of 2,048 tokens, reads and writes 1.3 GB for attention and its gradient by the
compiler's count, the einsums 22 GB. The kernel is bfloat16's alone: in float32 it would multiply in bfloat16.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from ..sharding import attention_axes

__all__ = ["fits_splash", "splash_attention"]

# Queries below which the scores are small change.
SHORTEST = 512
_LANES = 128


@functools.cache
def _library():
    """jax's kernels and masks, or None of a jax without them: they are experimental there. Imported when first needed."""
    try:
        from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask
    except ImportError:
        return None
    return splash_attention_kernel, splash_attention_mask


def fits_splash(q: jax.Array, k: jax.Array) -> bool:
    """Whether the kernel is for these: bfloat16, as many keys as queries, enough of them."""
    return q.dtype == jnp.bfloat16 and q.shape[2] == k.shape[2] >= SHORTEST and _library() is not None


def splash_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array | None,
    *,
    causal: bool,
    interpret: bool = False,
) -> jax.Array:
    """q (b, n, t, h), k and v (b, k, t, h), segment_ids int32 (b, t) or None -> (b, n, t, h). A query sees the keys of its own
    segment, up to itself if `causal`. On a mesh every device takes its rows, and its heads where they divide.

    interpret: run the kernel in Python, where there is no TPU.
    """
    if segment_ids is None:
        segment_ids = jnp.zeros((q.shape[0], q.shape[2]), jnp.int32)

    def local(q, k, v, segment_ids):
        return _one_device(q, k, v, segment_ids, causal, interpret)

    axes = attention_axes(k)
    if axes is None:
        return local(q, k, v, segment_ids)
    mesh, rows, heads = axes
    spec = PartitionSpec(rows, heads, None, None)
    return jax.shard_map(
        local, mesh=mesh, in_specs=(spec, spec, spec, PartitionSpec(rows, None)), out_specs=spec, check_vma=False
    )(q, k, v, segment_ids)


def _one_device(q, k, v, segment_ids, causal: bool, interpret: bool) -> jax.Array:
    kernels, masks = _library()
    n, t, h = q.shape[1:]
    more = -t % _LANES
    if more:  # the rest is a segment that nobody is in
        q, k, v = (jnp.pad(x, ((0, 0), (0, 0), (0, more), (0, 0))) for x in (q, k, v))
        segment_ids = jnp.pad(segment_ids, ((0, 0), (0, more)), constant_values=-1)
    length = t + more
    block = next(size for size in (1024, 768, 512, 384, 256, 128) if length % size == 0)
    names = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")
    mask = (masks.CausalMask if causal else masks.FullMask)((length, length))
    kernel = kernels.make_splash_mha(
        masks.MultiHeadMask([mask] * n),
        block_sizes=kernels.BlockSizes(**{f"block_{name}": block for name in names}),
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )
    scaled = (q.astype(jnp.float32) * h**-0.5).astype(q.dtype)  # exact where h is a power of four, as it mostly is
    row = lambda q, k, v, ids: kernel(q, k, v, segment_ids=kernels.SegmentIds(ids, ids))
    return jax.vmap(row)(scaled, k, v, segment_ids)[:, :, :t]
