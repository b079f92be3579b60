"""The first half of an encoder's layer in one kernel: norm, projections, attention, output projection, residual.

A step of the grid takes one tile with all its patches. Scores are made transposed, keys × queries. Of the product of values and
weights, (h, s) times (s, t), only the h rows of the values then pass through the matrix unit, where the untransposed product
would pass all t queries and use h of the unit's 128 columns. The sum of a softmax comes out of the same product, from rows of
ones beneath the values. Exponentials are powers of two, with the factor between them in the queries. The scores of the next
block of queries are issued before the exponentials of this one, so that the matrix unit has work meanwhile.

Queries, keys and values are made transposed too, (h, p): a head is a slice of rows, whose number need be no multiple of 128.
The projections take their kernels (d, n, h) as (n, h, d), which is how a TPU stores them: nothing is laid out anew.
With weights in 8 bits the four projections are products of int8 (see `int8`), and scores and values stay in bfloat16.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from ..attention.pallas import pallas_tpu
from ..quantization import SCALE
from .int8 import in_8_bits, int8_product
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
        weights: the layer's parameters `layer_norm1` and `self_attn`, of the heads that `shape` counts, in floats or in 8 bits.
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
    quantized = f"kernel{SCALE}" in attention["out_proj"]
    body, dtype = (_kernel_int8, jnp.int8) if quantized else (_kernel, x.dtype)
    kernels = [jnp.einsum("dnh->nhd", attention[name]["kernel"].astype(dtype)) for name in names]
    biases = [attention[name]["bias"].astype(jnp.float32) for name in names]
    flat = lambda leaf: leaf.astype(jnp.float32).reshape(1, d)
    inputs = [
        *(flat(weights["layer_norm1"][name]) for name in ("scale", "bias")),
        *(kernel.reshape(groups, size, d) for kernel in kernels),
        *(bias.reshape(groups, size, 1) for bias in biases),
        attention["out_proj"]["kernel"].astype(dtype).reshape(groups * size, d),
        flat(attention["out_proj"]["bias"]),
    ]
    scratch = [(heads, h, padded), (heads, rows, h), (heads, shape.value_rows, rows), (groups, size, padded)]
    scratch = [tpu.VMEM(sizes, x.dtype) for sizes in scratch]
    if quantized:
        inputs += [attention[name][f"kernel{SCALE}"].reshape(groups, size, 1) for name in names]
        inputs += [flat(attention["out_proj"][f"kernel{SCALE}"])]
        scratch += [tpu.VMEM((d, padded), dtype), tpu.VMEM((1, padded), jnp.float32)]
    else:
        scratch += [tpu.VMEM((rows, d), dtype)]
    tile = pallas.BlockSpec((1, rows, d), lambda i: (i, 0, 0))
    scores = i * shape.heads * p * p
    return pallas.pallas_call(
        functools.partial(body, shape=shape, blocks=blocks, whole=whole),
        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
        grid=(i,),
        in_specs=[tile, *(resident(pallas, leaf.shape) for leaf in inputs)],
        out_specs=tile,
        scratch_shapes=scratch,
        compiler_params=tpu.CompilerParams(dimension_semantics=("parallel",), vmem_limit_bytes=blocks.memory),
        cost_estimate=pallas.CostEstimate(
            flops=8 * i * p * d * groups * size + 4 * scores * h,
            transcendentals=scores,
            bytes_accessed=2 * 2 * x.size + 4 * d * groups * size * jnp.dtype(dtype).itemsize,
        ),
        interpret=interpret,
        name="encoder_attention",
    )(x, *inputs)


def _kernel(
    x, scale, shift, wq, wk, wv, bq, bk, bv, wo, bo, out, q, k, v, attended, normed,
    *, shape: LayerShape, blocks: Blocks, whole: bool,
) -> None:  # fmt: skip
    """One tile.

    With r and c for p rounded up to whole tiles of memory, as rows and as columns, G groups of g heads: x, out (1, r, d);
    wq, wk, wv (G, g·h, d); bq, bk, bv (G, g·h, 1); wo (n·h, d). Scratch: q (g, h, c), k (g, r, h) and v (g, h + ones, r) of a
    group; attended (G, g·h, c), the output of attention; normed (r, d), the normed patches.
    """
    for start, count in starts(shape.block_patches, blocks.rows):
        normed[start : start + count] = _normed(x, scale, shift, start, count, shape).astype(normed.dtype)

    def project(group, these):
        return [_product(w[group], normed[these], _SECONDS) + b[group] for w, b in ((wq, bq), (wk, bk), (wv, bv))]

    _attend_in_groups(project, q, k, v, attended, shape, blocks)
    for start, count in starts(shape.block_patches, blocks.rows):
        these = slice(start, start + count)
        heads = attended[...].reshape(-1, attended.shape[-1])[:, these]
        mixed = _product(heads, wo[...], _FIRSTS)
        if whole:
            mixed = mixed + bo[...] + x[0, these].astype(jnp.float32)
        out[0, these] = mixed.astype(out.dtype)


def _kernel_int8(
    x, scale, shift, wq, wk, wv, bq, bk, bv, wo, bo, sq, sk, sv, so, out, q, k, v, attended, normed, steps,
    *, shape: LayerShape, blocks: Blocks, whole: bool,
) -> None:  # fmt: skip
    """The same with int8 weights and their scales: sq, sk, sv (G, g·h, 1), so (1, d). Of the normed patches there are int8
    (d, c), transposed, because their scales are needed along lanes: steps (1, c)."""
    for start, count in starts(shape.block_patches, blocks.rows):
        these = slice(start, start + count)
        normed[:, these], steps[:, these] = in_8_bits(_normed(x, scale, shift, start, count, shape).T, 0)

    def project(group, these):
        made = ((wq, bq, sq), (wk, bk, sk), (wv, bv, sv))
        return [int8_product(w[group], normed[:, these]) * s[group] * steps[:, these] + b[group] for w, b, s in made]

    _attend_in_groups(project, q, k, v, attended, shape, blocks)
    for start, count in starts(shape.block_patches, blocks.rows):
        these = slice(start, start + count)
        heads = attended[...].reshape(-1, attended.shape[-1])[:, these]
        values, step = in_8_bits(heads.astype(jnp.float32).T)
        mixed = int8_product(values, wo[...]) * step * so[...]
        if whole:
            mixed = mixed + bo[...] + x[0, these].astype(jnp.float32)
        out[0, these] = mixed.astype(out.dtype)


def _normed(x, scale, shift, start: int, count: int, shape: LayerShape) -> jax.Array:
    """Some of a tile's patches after the norm (count, d), float32."""
    some = norm(x[0, start : start + count], scale[...], shift[...], shape.eps)
    if start + count > shape.patches:  # memory beyond the patches holds anything, and nothing times NaN is NaN
        row = jax.lax.broadcasted_iota(jnp.int32, some.shape, 0)
        some = jnp.where(row < shape.patches - start, some, 0.0)
    return some


def _attend_in_groups(project, q, k, v, attended, shape: LayerShape, blocks: Blocks) -> None:
    """Attention of all heads into `attended`; `project` makes queries, keys and values, (g·h, …), of a group and some
    patches."""
    h, rows = shape.head_size, shape.block_patches
    v[:, h:] = jnp.ones((blocks.heads, shape.value_rows - h, rows), v.dtype)

    def attend(group, _):
        for start, count in starts(rows, blocks.keys):
            these = slice(start, start + count)
            queries, keys, values = project(group, these)
            queries = queries * (h**-0.5 * math.log2(math.e))
            for j in range(blocks.heads):
                head = slice(j * h, (j + 1) * h)
                q[j, :, these] = queries[head].astype(q.dtype)
                k[j, these] = keys[head].T.astype(k.dtype)
                v[j, :h, these] = values[head].astype(v.dtype)
        _attend(q, k, v, attended.at[group], shape, blocks)
        return 0

    jax.lax.fori_loop(0, shape.heads // blocks.heads, attend, 0)


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
