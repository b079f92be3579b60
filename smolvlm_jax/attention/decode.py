"""A decode step's attention on TPU in one kernel, which reads a layer's KV cache once and writes the new column.

A TPU stores the columns of the cache along its lanes, 128 to a tile, so that writing one column means reading and writing a
whole tile; done on its own, for a cache of 256 columns this moves as many bytes as attention reads. Here the tile is in the
core's memory already. Scores, softmax and the weighted sum stay there as well, where XLA's products of three query rows at a
time are not bound by memory, but by everything else (figures in docs/design.md). It is used in bfloat16 only, because its
products are those of the matrix unit.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from ..sharding import on_each_device

__all__ = ["decode_attention", "fits_decode"]

_LANES = 128  # columns of a tile
# Bytes of keys that a step of the kernel's grid takes, unless one head alone has more. Two such blocks of keys and two of
# values are in the core's memory at a time, which is 16 MB on the smallest chips.
_BLOCK = 3 * 2**19
_LARGEST_HEAD = 2**21
# Heads of a row in one step. They are unrolled: enough that several overlap, few enough to compile fast.
_MOST_HEADS = 8


@functools.cache
def _pallas():
    """Pallas and its part for TPUs, or None if this jax has none. Imported when first needed."""
    try:
        from jax.experimental import pallas
        from jax.experimental.pallas import tpu
    except ImportError:
        return None
    return pallas, tpu


def fits_decode(q: jax.Array, keys: jax.Array) -> bool:
    """Whether this is one query a row in bfloat16, against whole tiles of columns, with no head too large."""
    (*_, t, size), length = q.shape, keys.shape[2]
    whole = length % _LANES == 0 and size % 16 == 0 and 2 * size * length <= _LARGEST_HEAD  # tiles are 16 × 128
    return t == 1 and whole and q.dtype == keys.dtype == jnp.bfloat16 and _pallas() is not None


def decode_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    mask: jax.Array,
    start: jax.Array,
    *,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Write one column into a layer's cache and attend to what it holds; the cache is updated in place where it is donated.

    On a mesh every device takes its rows, and its heads where they divide.

    Args:
        q: queries (b, n, 1, h).
        k: new keys (b, k, 1, h).
        v: new values (b, k, 1, h).
        keys: the cache's keys (b, k, L, h).
        values: the cache's values (b, k, L, h).
        mask: bool (b, 1, L), the columns that count, the new one included.
        start: int () in [0, L), the column of the new key and value.
        interpret: run the kernel in Python, where there is no TPU; or Pallas's parameters for that.

    Returns:
        The output (b, n, 1, h), the updated keys, the updated values.
    """
    local = functools.partial(_one_device, interpret=interpret)
    return on_each_device(local, q, k, v, keys, values, mask, start)


def _one_device(q, k, v, keys, values, mask, start, interpret):
    """The kernel on the arrays of one device."""
    pallas, tpu = _pallas()
    b, n, _, h = q.shape
    kv, length = keys.shape[1:3]
    group = n // kv
    q = q.reshape(b, kv, group, h)
    bias = jnp.where(mask, 0.0, jnp.finfo(jnp.float32).min / 2)

    heads = _divisor(kv, min(_MOST_HEADS, _BLOCK // (2 * h * length)))
    batch = _divisor(b, _BLOCK // (2 * h * length * heads))
    block = lambda last: pallas.BlockSpec((batch, heads, *last), lambda i, j, _: (i, j, 0, 0))
    # A shift, because for a division Pallas asks the chip at hand, and there may be none.
    number = lambda at: jax.lax.shift_right_logical(at[0], _LANES.bit_length() - 1)
    tile = pallas.BlockSpec((batch, heads, h, _LANES), lambda i, j, at: (i, j, 0, number(at)))
    # XLA stores the cache with columns along lanes already, so these transpositions move nothing.
    upright = [x.swapaxes(2, 3) for x in (keys, values)]
    like = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype)
    held = like
    if not interpret:
        # Without this, XLA copies whole layers into the core's memory and out again; the kernel fetches what it needs.
        upright = [tpu.with_memory_space_constraint(x, tpu.HBM) for x in upright]
        held = lambda x: tpu.HBM(x.shape, x.dtype)
    moved = 2 * (2 * keys.size + 2 * b * kv * h * _LANES + 2 * q.size + 2 * k.size) + 4 * bias.size
    out, *upright = pallas.pallas_call(
        functools.partial(_kernel, pallas),
        out_shape=(like(q), *map(held, upright)),
        grid_spec=tpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(b // batch, kv // heads),
            in_specs=[
                block((group, h)),
                block((1, h)),
                block((1, h)),
                pallas.BlockSpec((batch, 1, length), lambda i, j, _: (i, 0, 0)),
                *(block((h, length)) for _ in upright),
            ],
            out_specs=[block((group, h)), tile, tile],
        ),
        input_output_aliases={5: 1, 6: 2},
        compiler_params=tpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
        cost_estimate=pallas.CostEstimate(flops=4 * b * n * h * length, transcendentals=b * n * length, bytes_accessed=moved),
        interpret=interpret,
        name="decode_attention",
    )(start.reshape(1).astype(jnp.int32), q, k.astype(q.dtype), v.astype(q.dtype), bias, *upright)
    return out.reshape(b, n, 1, h), *(x.swapaxes(2, 3) for x in upright)


def _divisor(n: int, most: int) -> int:
    """The largest divisor of n that is at most `most`, and at least 1."""
    return max(d for d in range(1, n + 1) if n % d == 0 and d <= max(most, 1))


def _kernel(pallas, start, q, k, v, bias, keys, values, out, new_keys, new_values) -> None:
    """One step of the grid, a block of rows and heads.

    start (1,); q and out (B, K, g, h); k and v (B, K, 1, h); bias float32 (B, 1, L); keys and values (B, K, h, L);
    new_keys and new_values (B, K, h, 128), the tile that holds the new column. Scores and sums take the new column from k
    and v, not from the tile, so that nothing waits for the write.
    """
    batch, heads, size, length = keys.shape
    iota = functools.partial(jax.lax.broadcasted_iota, jnp.int32)
    lane = start[0] & (_LANES - 1)
    tile = pallas.ds(pallas.multiple_of(start[0] - lane, _LANES), _LANES)
    is_new = iota((1, length), 1) == start[0]
    is_new_lane = iota((size, _LANES), 1) == lane
    diagonal = iota((size, size), 0) == iota((size, size), 1)

    def attend(i, j):
        x = q[i, j]
        new = k[i, j].astype(jnp.float32), v[i, j].astype(jnp.float32)
        scores = _product(x, keys[i, j], 0)
        scores = jnp.where(is_new, (x.astype(jnp.float32) * new[0]).sum(1, keepdims=True), scores) * size**-0.5 + bias[i]
        weights = jnp.exp(scores - scores.max(1, keepdims=True))
        weights = (weights / weights.sum(1, keepdims=True)).astype(x.dtype)
        of_new = jnp.where(is_new, weights.astype(jnp.float32), 0).sum(1, keepdims=True)
        of_old = jnp.where(is_new, jnp.zeros_like(weights), weights)
        out[i, j] = (_product(of_old, values[i, j], 1) + of_new * new[1]).astype(out.dtype)
        for row, old, place in zip(new, (keys, values), (new_keys, new_values), strict=True):
            column = jnp.where(diagonal, row, 0).sum(1, keepdims=True)  # (1, h) to (h, 1)
            place[i, j] = jnp.where(is_new_lane, column, old[i, j, :, tile].astype(jnp.float32)).astype(place.dtype)

    # Two rows at a time where they are short, so that the softmax of one overlaps the products of the other.
    @pallas.loop(0, batch, unroll=2 if length <= 512 and batch % 2 == 0 else 1)
    def _(i):
        for j in range(heads):
            attend(i, j)


def _product(x, y, axis: int):
    """x (r, c) times y, whose dimension `axis` is c, in float32."""
    return jax.lax.dot_general(x, y, (((1,), (axis,)), ((), ())), preferred_element_type=jnp.float32)
