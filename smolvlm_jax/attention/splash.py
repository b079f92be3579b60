"""Attention of whole prompts and pictures on TPU in one kernel, jax's splash attention.

It keeps no scores in memory, skips blocks that the mask forbids, and has a gradient. For one layer of the 500M and eight rows
of 2,048 tokens on a v5e chip, the compiler counts 1.3 GB read and written by attention and its gradient, and 22 GB with the
einsums. It is used in bfloat16 only, because it multiplies float32 in bfloat16 too.
"""

import functools

import jax
import jax.numpy as jnp

from ..sharding import on_each_device
from .forms import Mask, SegmentMask

__all__ = ["fits_splash", "splash_attention"]

# Fewest queries for which the kernel is used: below, the scores are small.
SHORTEST = 512
# Columns of a tile in the core's memory; the length of a row is padded to a multiple.
_LANES = 128
# Queries and keys that a step of the kernel takes; the first that divides the length is used.
_BLOCKS = (1024, 896, 768, 640, 512, 384, 256, 128)
# Keys of a block that are computed with at a time, where they divide it: one half's products hide the other's exponentials.
_COMPUTED = 512


@functools.cache
def _library():
    """jax's kernels and masks, or None if this jax has none, because they are experimental. Imported when first needed."""
    try:
        from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask
    except ImportError:
        return None
    return splash_attention_kernel, splash_attention_mask


def fits_splash(q: jax.Array, k: jax.Array, mask: Mask) -> bool:
    """Whether these are whole rows in bfloat16, long enough, with a mask that the kernel can make itself."""
    known = mask is None or isinstance(mask, SegmentMask)
    return known and q.dtype == jnp.bfloat16 and q.shape[2] == k.shape[2] >= SHORTEST and _library() is not None


def splash_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array | None,
    *,
    causal: bool,
    interpret: bool = False,
) -> jax.Array:
    """Attention by segments. On a mesh every device takes its rows, and its heads where they divide.

    Args:
        q: queries (b, n, t, h).
        k: keys (b, k, t, h).
        v: values (b, k, t, h).
        segment_ids: int32 (b, t): a query sees the keys of its own segment. None for one segment.
        causal: whether a query sees only keys at or before its own position.
        interpret: run the kernel in Python, where there is no TPU.

    Returns:
        (b, n, t, h).
    """
    if segment_ids is None:
        segment_ids = jnp.zeros((q.shape[0], q.shape[2]), jnp.int32)
    local = functools.partial(_one_device, causal=causal, interpret=interpret)
    return on_each_device(local, q, k, v, segment_ids)


def _one_device(q, k, v, segment_ids, causal: bool, interpret: bool) -> jax.Array:
    """The kernel on the arrays of one device."""
    kernels, masks = _library()
    n, t, h = q.shape[1:]
    more = -t % _LANES
    if more:  # the padding is a segment of its own
        q, k, v = (jnp.pad(x, ((0, 0), (0, 0), (0, more), (0, 0))) for x in (q, k, v))
        segment_ids = jnp.pad(segment_ids, ((0, 0), (0, more)), constant_values=-1)
    length = t + more
    block = next(size for size in _BLOCKS if length % size == 0)
    names = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")
    mask = (masks.CausalMask if causal else masks.FullMask)((length, length))
    kernel = kernels.make_splash_mha(
        masks.MultiHeadMask([mask] * n),
        block_sizes=kernels.BlockSizes(
            **{f"block_{name}": block for name in names} | {"block_kv_compute": _COMPUTED if block % _COMPUTED == 0 else block},
            # Positions along lanes: rotary embedding and projections then divide heads between rows of tiles.
            **dict.fromkeys(("q_layout", "k_layout", "v_layout"), kernels.QKVLayout.SEQ_MINOR),
        ),
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )
    scaled = (q.astype(jnp.float32) * h**-0.5).astype(q.dtype)  # exact where h is a power of four, as in most models
    row = lambda q, k, v, ids: kernel(q, k, v, segment_ids=kernels.SegmentIds(ids, ids))
    return jax.vmap(row)(scaled, k, v, segment_ids)[:, :, :t]
