"""The first half of an encoder's layer in one kernel: norm, projections, attention, output projection, residual.

A step of the grid takes one tile with all its patches. Scores are made transposed, keys × queries. Of the product of values and
weights, (h, s) times (s, t), only the h rows of the values then pass through the matrix unit, where the untransposed product
would pass all t queries and use h of the unit's 128 columns. The sum of a softmax comes out of the same product, from rows of
ones beneath the values. Exponentials are powers of two, with the factor between them in the queries. The scores of the next
block of queries are issued before the exponentials of this one, so that the matrix unit has work meanwhile.

Queries, keys and values are made transposed too, (h, p): a head is a slice of rows, whose number need be no multiple of 128.
The projections take their kernels (d, n, h) as (n, h, d), which is how a TPU stores them: nothing is laid out anew.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from ..attention.pallas import pallas_tpu
from .shape import Blocks, LayerShape, norm, resident, starts

__all__ = ["attention_block"]

# What the score of a key becomes that is no patch.
_LOWEST = -1e30
# Dimensions summed over in x yᵀ and in xᵀ y.
_SECONDS, _FIRSTS = (((1,), (1,)), ((), ())), (((0,), (0,)), ((), ()))
_product = functools.partial(jax.lax.dot_general, preferred_element_type=jnp.float32)


def attention_block(
    x: jax.Array, weights: dict[str, Any], shape: LayerShape, blocks: Blocks, *, whole: bool = True, interpret: bool = False
) -> jax.Array:
    """x + out_proj(attention(norm(x))) on one device.

    Args:
        x: (i, p, d) in bfloat16.
        weights: the layer's parameters `layer_norm1` and `self_attn`, of the heads that `shape` counts.
        shape: of the layer.
        blocks: what the kernel takes at a time.
        whole: whether these are all heads. If not, the result is their part of out_proj's product, without its bias and x.
        interpret: run the kernel in Python, where there is no TPU.

    Returns:
        (i, p, d).
    """
    pallas, tpu = pallas_tpu()
    i, p, d = x.shape
    h, heads, padded, rows = shape.head_size, blocks.heads, shape.padded_patches, shape.block_patches
    groups, size = shape.heads // heads, heads * h
    names, attention = ("q_proj", "k_proj", "v_proj"), weights["self_attn"]
    kernels = [jnp.einsum("dnh->nhd", attention[name]["kernel"].astype(x.dtype)) for name in names]
    biases = [attention[name]["bias"].astype(jnp.float32) for name in names]
    flat = lambda leaf: leaf.astype(jnp.float32).reshape(1, d)
    inputs = [
        *(flat(weights["layer_norm1"][name]) for name in ("scale", "bias")),
        *(kernel.reshape(groups, size, d) for kernel in kernels),
        *(bias.reshape(groups, size, 1) for bias in biases),
        attention["out_proj"]["kernel"].astype(x.dtype).reshape(groups * size, d),
        flat(attention["out_proj"]["bias"]),
    ]
    scratch = [(rows, d), (heads, h, padded), (heads, rows, h), (heads, shape.value_rows, rows), (groups, size, padded)]
    tile = pallas.BlockSpec((1, rows, d), lambda i: (i, 0, 0))
    scores = i * shape.heads * p * p
    return pallas.pallas_call(
        functools.partial(_kernel, shape=shape, blocks=blocks, whole=whole),
        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
        grid=(i,),
        in_specs=[tile, *(resident(pallas, leaf.shape) for leaf in inputs)],
        out_specs=tile,
        scratch_shapes=[tpu.VMEM(sizes, x.dtype) for sizes in scratch],
        compiler_params=tpu.CompilerParams(dimension_semantics=("parallel",), vmem_limit_bytes=blocks.memory),
        cost_estimate=pallas.CostEstimate(
            flops=8 * i * p * d * groups * size + 4 * scores * h,
            transcendentals=scores,
            bytes_accessed=2 * (2 * x.size + 4 * d * groups * size),
        ),
        interpret=interpret,
        name="encoder_attention",
    )(x, *inputs)


def _kernel(
    x,
    scale,
    shift,
    wq,
    wk,
    wv,
    bq,
    bk,
    bv,
    wo,
    bo,
    out,
    normed,
    q,
    k,
    v,
    attended,
    *,
    shape: LayerShape,
    blocks: Blocks,
    whole: bool,
) -> None:
    """One tile.

    With r and c for p rounded up to whole tiles of memory, as rows and as columns, G groups of g heads: x, out (1, r, d);
    wq, wk, wv (G, g·h, d); bq, bk, bv (G, g·h, 1); wo (n·h, d). Scratch: normed (r, d), the normed patches; q (g, h, c),
    k (g, r, h) and v (g, h + ones, r) of a group; attended (G, g·h, c), the output of attention.
    """
    h, rows = shape.head_size, shape.block_patches
    for start, count in starts(rows, blocks.rows):
        some = norm(x[0, start : start + count], scale[...], shift[...], shape.eps)
        if start + count > shape.patches:  # memory beyond the patches holds anything, and nothing times NaN is NaN
            row = jax.lax.broadcasted_iota(jnp.int32, some.shape, 0)
            some = jnp.where(row < shape.patches - start, some, 0.0)
        normed[start : start + count] = some.astype(normed.dtype)
    v[:, h:] = jnp.ones((blocks.heads, shape.value_rows - h, rows), v.dtype)

    def attend(group, _):
        for start, count in starts(rows, blocks.keys):
            these = slice(start, start + count)
            made = ((wq, bq), (wk, bk), (wv, bv))
            queries, keys, values = (_product(w[group], normed[these], _SECONDS) + b[group] for w, b in made)
            queries = queries * (h**-0.5 * math.log2(math.e))
            for j in range(blocks.heads):
                head = slice(j * h, (j + 1) * h)
                q[j, :, these] = queries[head].astype(q.dtype)
                k[j, these] = keys[head].T.astype(k.dtype)
                v[j, :h, these] = values[head].astype(v.dtype)
        _attend(q, k, v, attended.at[group], shape, blocks)
        return 0

    jax.lax.fori_loop(0, shape.heads // blocks.heads, attend, 0)
    for start, count in starts(rows, blocks.rows):
        these = slice(start, start + count)
        heads = attended[...].reshape(-1, attended.shape[-1])[:, these]
        mixed = _product(heads, wo[...], _FIRSTS)
        if whole:
            mixed = mixed + bo[...] + x[0, these].astype(jnp.float32)
        out[0, these] = mixed.astype(out.dtype)


def _attend(q, k, v, out, shape: LayerShape, blocks: Blocks) -> None:
    """Attention of a group of heads; out (g·h, c), the others as in `_kernel`."""
    h, chunks = shape.head_size, starts(shape.block_patches, blocks.keys)

    def score(work, chunk, highest):
        """Scores (s, t) of a chunk of keys, and the highest so far of each query (1, t)."""
        (j, start, count), (first, length) = work, chunk
        some = jnp.dot(k[j, first : first + length], q[j, :, start : start + count], preferred_element_type=jnp.float32)
        if first + length > shape.patches:
            key = jax.lax.broadcasted_iota(jnp.int32, some.shape, 0)
            some = jnp.where(key < shape.patches - first, some, _LOWEST)
        largest = some.max(0, keepdims=True)
        return some, largest if highest is None else jnp.maximum(highest, largest)

    work = [(j, *queries) for queries in starts(shape.padded_patches, blocks.queries) for j in range(blocks.heads)]
    scores, highest = [], None
    for chunk in chunks:
        some, highest = score(work[0], chunk, highest)
        scores.append(some)
    for now, following in zip(work, [*work[1:], None], strict=True):
        j, start, count = now
        next_scores, next_highest = [], None
        total: Any = None
        for chunk, some in zip(chunks, scores, strict=True):
            if following is not None:
                next_some, next_highest = score(following, chunk, next_highest)
                next_scores.append(next_some)
            first, length = chunk
            weights = jnp.exp2(some - highest).astype(v.dtype)
            part = jnp.dot(v[j, :, first : first + length], weights, preferred_element_type=jnp.float32)
            total = part if total is None else total + part
        out[j * h : (j + 1) * h, start : start + count] = (total[:h] / total[h : h + 1]).astype(out.dtype)
        scores, highest = next_scores, next_highest
