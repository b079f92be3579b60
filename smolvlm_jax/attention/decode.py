"""A decode step's attention on TPU in one kernel, which reads the visible columns of a layer's KV cache and writes the new one.

The cache's columns lie one after the other (`cache.ColumnBuffers`), keys and values of all heads side by side, so that the
smallest piece that can be read is a tile of 8 columns (32 of int8), and a chunk of a row is contiguous. The kernel goes
through a list of chunks (`work`), copies each into the core's memory while it computes with those before it, and knows no
other columns: not those of the ring that are not visible, not those of rows that have finished. All heads share one product:
the queries are in one matrix with zeros where the keys belong to another head. Two chunks are computed with at a time, without
a branch between them, so that the products of one hide the exponentials of the other. It is used in bfloat16 only, because
its products are those of the matrix unit. Figures in docs/design.md.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ..sharding import on_each_device
from .decode_limits import LANES, ceil, decode_pieces
from .int8 import UNIT, joined_bytes, power_above, rotation, rounded, turn, two_bytes
from .pallas import pallas_tpu
from .work import Pieces, WorkList

__all__ = ["decode_attention"]

_NONE = -1e30  # a score that does not count
_LOG2_E = 1.4426950408889634
_WRITES = 8  # new columns under way to the cache at a time, a power of two
_PREPARED = 4  # rows that are made ready at a time


def decode_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    pairs: jax.Array,
    scales: jax.Array | None,
    start: jax.Array,
    work: WorkList,
    *,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Write one column into a layer's cache and attend to what each row sees; a donated cache is updated in place.

    On a mesh every device takes its rows, and its heads where they divide. A row that takes no part in the list gets zeros, and
    its column is not written.

    Args:
        q: queries (b, n, 1, h).
        k: new keys (b, k, 1, h).
        v: new values (b, k, 1, h).
        pairs: the layer's keys and values (b, s, L, 2·k/s·h), bfloat16 or int8.
        scales: float32 (b, s, R, L) with int8, else None.
        start: int () in [0, L), the column of the new key and value.
        work: what is read.
        interpret: Pallas's parameters to run the kernel in Python, where there is no TPU.

    Returns:
        The output (b, n, 1, h), the updated pairs, the updated scales.
    """
    local = functools.partial(_one_device, interpret=interpret)
    if scales is None:
        out, pairs = on_each_device(local, q, pairs, k, v, start, *work)
        return out, pairs, None
    out, pairs, scales = on_each_device(local, q, pairs, k, v, start, *work, scales)
    return turn(out).astype(q.dtype), pairs, scales


class _Shape(NamedTuple):
    """Sizes of one device's part: rows, query heads, key heads, a head, lanes of a column; and the pieces."""

    rows: int
    queries: int
    heads: int
    size: int
    lanes: int
    pieces: Pieces

    @property
    def padded(self) -> int:
        """Rows of the matrix of queries."""
        return ceil(self.queries, 16)

    @property
    def keys(self) -> int:
        """Lanes of keys: values begin here."""
        return self.heads * self.size

    @property
    def key_tiles(self) -> int:
        """Lanes of the tiles that keys are in."""
        return ceil(self.keys, LANES)

    @property
    def before(self) -> int:
        """Lanes before the tiles that values are in."""
        return self.keys // LANES * LANES


def _one_device(q, pairs, k, v, start, items, total, *scales, interpret):
    """The kernel on the arrays of one device."""
    pallas, tpu = pallas_tpu()
    b, n, _, h = q.shape
    kv, (_, _, length, lanes) = k.shape[1], pairs.shape
    pieces = decode_pieces(length, lanes, h, pairs.dtype)
    assert pieces is not None
    shape = _Shape(b, n, kv, h, lanes, pieces)
    group, chunk, align, slots = pieces.group, pieces.chunk, pieces.align, pieces.slots
    column = jnp.concatenate([k, v], 1).reshape(b, 2 * kv, h)
    column = jnp.pad(column, ((0, 0), (0, ceil(2 * kv, 8) - 2 * kv), (0, 0)))
    near, far = [q.reshape(b, n, h)], [pairs.reshape(b, length // group, group, lanes), *(x[:, 0] for x in scales)]
    near += [column, jnp.asarray(rotation(h), q.dtype)] if scales else [column]  # entries are powers of 2, or nearly
    rows = shape.padded * (2 if scales else 1)
    # Without this, XLA copies whole layers into the core's memory and out again; the kernel fetches what it needs.
    if interpret:
        held, place = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in far], pallas.ANY
    else:
        far = [tpu.with_memory_space_constraint(x, tpu.HBM) for x in far]
        held, place = [tpu.HBM(x.shape, x.dtype) for x in far], tpu.HBM
    here = lambda: pallas.BlockSpec(memory_space=tpu.VMEM)
    there = lambda: pallas.BlockSpec(memory_space=place)
    of_scales = [
        tpu.VMEM((count, x.shape[2], size), x.dtype) for x in scales for count, size in ((slots, chunk), (_WRITES, align))
    ]
    of_scales += [tpu.VMEM((b, x, LANES), jnp.float32) for _ in scales for x in (shape.padded, column.shape[1])]
    out, *kept = pallas.pallas_call(
        functools.partial(_kernel, pallas, tpu, shape, bool(scales)),
        out_shape=(jax.ShapeDtypeStruct((b, n, h), jnp.float32 if scales else q.dtype), *held),
        grid_spec=tpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(1,),
            in_specs=[*(here() for _ in near), *(there() for _ in far)],
            out_specs=[here(), *(there() for _ in far)],
            scratch_shapes=[
                tpu.VMEM((slots, chunk // group, group, lanes), pairs.dtype),
                tpu.VMEM((_WRITES, group, lanes), pairs.dtype),
                tpu.VMEM((b, rows, LANES), jnp.int8 if scales else q.dtype),
                tpu.VMEM((b, lanes), jnp.float32),
                tpu.VMEM((shape.key_tiles // LANES, rows * pairs.dtype.itemsize // 4, LANES), jnp.int32),
                tpu.VMEM(((lanes - shape.before) // LANES, shape.padded, LANES), jnp.int32),
                tpu.SemaphoreType.DMA((slots,)),
                tpu.SemaphoreType.DMA((_WRITES,)),
                *of_scales,
            ],
        ),
        input_output_aliases={3 + len(near) + i: 1 + i for i in range(len(far))},
        # Of a ring that is half visible: XLA fetches weights meanwhile.
        cost_estimate=pallas.CostEstimate(
            flops=2 * b * n * h * length,
            transcendentals=b * n * length // 2,
            bytes_accessed=kept_bytes(pairs, *scales) // 2,
        ),
        # The bounds of every copy follow from the list; checking them takes as long as starting the copy.
        compiler_params=tpu.CompilerParams(disable_bounds_checks=True),
        interpret=interpret,
        name="decode_attention",
    )(start.reshape(1).astype(jnp.int32), items[0], total[0], *near, *far)
    return out.reshape(b, n, 1, h), kept[0].reshape(pairs.shape), *(x[:, None] for x in kept[1:])


def kept_bytes(*arrays: jax.Array) -> int:
    """Bytes of arrays."""
    return sum(x.size * x.dtype.itemsize for x in arrays)


def _kernel(pallas, tpu, shape: _Shape, quantized: bool, start, work, total, q, new, *refs) -> None:
    """All items of the list, some at a time.

    start (1,), work (10, N) and total (1,) are scalars; q (b, n, h); new (b, R, h), the new keys and behind them the new values
    of all heads; of int8 also the rotation (h, h). In main memory: the pairs (b, L / group, group, lanes), and of int8
    the scales (b, R, L). Output (b, n, h).
    """
    if quantized:
        matrix, pairs, scales, out, new_pairs, new_scales, chunks, tiles, queries, columns, key_masks, *more = refs
        value_masks, arrived, left, scale_chunks, scale_tiles, bounds, fresh = more
    else:
        pairs, out, new_pairs, chunks, tiles, queries, columns, key_masks, value_masks, arrived, left = refs
    length, group, align, size, slots, together = shape.pieces
    h, n, padded, lanes = shape.size, shape.queries, shape.padded, shape.lanes
    iota = functools.partial(jax.lax.broadcasted_iota, jnp.int32)
    bits = lambda unit: unit.bit_length() - 1
    ring_group, ring_align = start[0] >> bits(group), pallas.multiple_of(start[0] & -align, align)
    span = lambda at, n: pallas.ds(pallas.multiple_of(at * align, align), pallas.multiple_of(n * align, align))

    def fetch(item, slot):
        """Start the copies of an item; of one behind the last there are none."""
        row, low, at, before, after = work[0, item] >> 1, *(work[i, item] for i in range(1, 5))

        def copy(source, target):
            tpu.make_async_copy(source, target, arrived.at[slot]).start()

        @pallas.when(before > 0)
        def _():
            copy(pairs.at[row, pallas.ds(at, before)], chunks.at[slot, pallas.ds(low, before)])
            if quantized:
                first, some = work[7, item], work[8, item]
                copy(scales.at[row, :, span(first, some)], scale_chunks.at[slot, :, span(0, some)])

        @pallas.when(after > 0)
        def _():
            copy(pairs.at[row, pallas.ds(0, after)], chunks.at[slot, pallas.ds(low + before, after)])

        if quantized:
            some, more = work[8, item], work[9, item]

            @pallas.when(more > 0)
            def _():
                copy(scales.at[row, :, span(0, more)], scale_chunks.at[slot, :, span(some, more)])

    def arrive(item, slot):
        """Wait for all copies of an item."""
        many = work[3, item] + work[4, item]

        @pallas.when(many > 0)
        def _():
            place = chunks.at[slot, pallas.ds(0, many)]
            tpu.make_async_copy(place, place, arrived.at[slot]).wait()
            if quantized:
                place = scale_chunks.at[slot, :, span(0, work[8, item] + work[9, item])]
                tpu.make_async_copy(place, place, arrived.at[slot]).wait()

    def write(number, row, go: bool):
        """Start the copies of a row's new column, or wait for those of the same place."""
        place = number & (_WRITES - 1)
        copies = [(tiles.at[place], new_pairs.at[row, ring_group])]
        if quantized:
            copies += [(scale_tiles.at[place], new_scales.at[row, :, pallas.ds(ring_align, align)])]
        for ends in copies:
            copy = tpu.make_async_copy(*ends, left.at[place])
            copy.start() if go else copy.wait()

    out[...] = jnp.zeros_like(out)  # rows that take no part
    if not quantized:
        chunks[...] = jnp.zeros_like(chunks)  # what a weight of zero is multiplied with must be finite
    for item in range(slots - together):
        fetch(item, item)

    # For each query its head; by a product, since for a division Pallas asks the chip at hand.
    per_head = n // shape.heads
    head_of = lambda row: (row * -(-(2**16) // per_head)) >> 16

    def own(first, rows: int):
        """Of a tile with this first lane, counted from a query's first head, the lanes that are the query's own head's."""
        lane, head = iota((rows, LANES), 1) + first, head_of(iota((rows, LANES), 0) % padded)
        return (lane >= head * h) & (lane < head * h + h)

    # As bits, which select among numbers of any length in one instruction.
    short = jnp.int8 if quantized else jnp.int16
    for i, first in enumerate(range(0, shape.key_tiles, LANES)):
        key_masks[i] = tpu.bitcast(jnp.where(own(first, queries.shape[1]), -1, 0).astype(short), jnp.int32)
    for i, first in enumerate(range(shape.before - shape.keys, lanes - shape.keys, LANES)):
        value_masks[i] = jnp.where(own(first, padded), -1, 0)

    def chosen(x, mask):
        """Of x the bits of a mask."""
        return tpu.bitcast(tpu.bitcast(x, jnp.int32) & mask, x.dtype)

    @pallas.loop(0, -(-shape.rows // _PREPARED))
    def _(first):
        """Queries as often side by side as a tile has room, of int8 two rows for each; new columns along lanes."""
        which = [jnp.minimum(first * _PREPARED + j, shape.rows - 1) for j in range(_PREPARED)]
        # Mosaic knows no arrays without rows.
        filled = lambda x: x if n == padded else jnp.concatenate([x, jnp.zeros((padded - n, h), jnp.float32)], 0)
        parts = [x for row in which for x in (filled(q[row].astype(jnp.float32)), new[row].astype(jnp.float32))]
        if quantized:
            turned, at = _product(jnp.concatenate(parts, 0).astype(q.dtype), matrix[...], 0), 0
            for number, part in enumerate(parts):
                parts[number], at = turned[at : at + len(part)], at + len(part)
        for row, x, column in zip(which, parts[::2], parts[1::2], strict=True):
            x = jnp.concatenate([x] * (LANES // h), 1)
            if quantized:
                bound, inverse = power_above(jnp.broadcast_to(jnp.abs(x).max(1, keepdims=True), x.shape))
                bounds[row] = bound * (UNIT * h**-0.5 * _LOG2_E)
                x = jnp.concatenate(two_bytes(x, inverse), 0)
                column, scale = rounded(column)
                fresh[row] = jnp.broadcast_to(scale, (len(column), LANES))
                column = column.astype(jnp.float32)
            queries[row] = x.astype(queries.dtype)
            columns[pallas.ds(row, 1)] = jnp.concatenate([column[j : j + 1] for j in range(2 * shape.heads)], 1)

    tile_row = iota((group, lanes), 0)
    here = tile_row == (start[0] & (group - 1))

    def visible(column, new_at, live):
        """Which columns of a chunk the row sees, apart from the chunk's end."""
        age = new_at - column
        return jnp.where(age < 0, age + length, age) < live

    def spread(scale):
        """Rows (heads, C) of key heads, for each query; of padding, whatever is at hand."""
        blocks = []
        for first in range(0, padded, 8):
            heads = sorted({min(row // per_head, shape.heads - 1) for row in range(first, first + 8)})
            rows = jnp.broadcast_to(scale[heads[0]][None], (8, scale.shape[1]))
            for j in heads[1:]:
                rows = jnp.where(iota(rows.shape, 0) < j * per_head - first, rows, scale[j][None])
            blocks.append(rows)
        return jnp.concatenate(blocks, 0)

    def clear(slot, first, stop):
        """Zeros for groups of a chunk, which may hold what is left of another row."""

        @pallas.loop(first, stop)
        def _(i):
            chunks[slot, i] = jnp.zeros((group, lanes), chunks.dtype)

    def put(item, slot, written):
        """The new column, where an item ends with it: into the chunk, and on its way to the cache."""
        row, new_at = work[0, item] >> 1, work[5, item]

        @pallas.when(new_at < size)
        def _():
            @pallas.when(written >= _WRITES)
            def _():
                write(written, row, False)

            place, at = written & (_WRITES - 1), new_at >> bits(group)
            old = chunks[slot, at].astype(jnp.int32 if quantized else jnp.float32)
            if not quantized:
                old = jnp.where(visible(at * group + tile_row, new_at, work[6, item]), old, 0)
            tile = jnp.where(here, columns[pallas.ds(row, 1)].astype(old.dtype), old).astype(chunks.dtype)
            chunks[slot, at] = tile
            tiles[place] = tile
            if quantized:
                part = pallas.ds(pallas.multiple_of(new_at & -align, align), align)
                lane = iota((scale_tiles.shape[1], align), 1)
                piece = jnp.where(lane == (start[0] & (align - 1)), fresh[row], scale_chunks[slot, :, part])
                scale_chunks[slot, :, part] = piece
                scale_tiles[place] = piece
            write(written, row, True)

        return written + (new_at < size).astype(jnp.int32)

    def tidy(item, slot):
        """No column before the first that the row sees, and none behind its last."""
        low, end = work[1, item], work[1, item] + work[3, item] + work[4, item]

        @pallas.when((work[0, item] & 1) == 1)
        def _():
            kept = visible(low * group + tile_row, work[5, item], work[6, item])
            chunks[slot, low] = jnp.where(kept, chunks[slot, low].astype(jnp.float32), 0).astype(chunks.dtype)
            clear(slot, 0, low)

        @pallas.when(work[5, item] < size)
        def _():
            clear(slot, end, size // group)

    def scores_of(item, slot):
        """Scores (padded, size) of a chunk in powers of 2, and of int8 the scales of the values for each query."""
        new_at, end = work[5, item], (work[1, item] + work[3, item] + work[4, item]) * group
        wide = jnp.concatenate([chosen(queries[work[0, item] >> 1], key_masks[i]) for i in range(len(key_masks))], 1)
        products = _product(wide, chunks[slot].reshape(size, lanes)[:, : shape.key_tiles], 1)
        column = iota((8, size), 1)
        seen = visible(column, new_at, work[6, item]) & (column < end)
        hidden = jnp.concatenate([jnp.where(seen, 0.0, _NONE)] * (padded // 8), 0)
        if not quantized:
            return products * (h**-0.5 * _LOG2_E) + hidden, None
        of = scale_chunks[slot]
        of = jnp.concatenate([jnp.where(seen, of[j : j + 8], 0.0) for j in range(0, len(of), 8)], 0)
        of_keys, of_values = (spread(of[j * shape.heads : (j + 1) * shape.heads]) for j in range(2))
        bound = jnp.concatenate([bounds[work[0, item] >> 1]] * (size // LANES), 1)
        return joined_bytes(products[:padded], products[padded:]) * (of_keys * bound) + hidden, of_values

    def weighed(slot, weights, of_values):
        """The sum of a chunk's values."""
        values = chunks[slot].reshape(size, lanes)[:, shape.before :]
        if not quantized:
            return _product(weights.astype(values.dtype), values, 0)
        bound, inverse = power_above(of_values.max(1, keepdims=True))
        products = _product(jnp.concatenate(two_bytes(weights * of_values, inverse), 0), values, 0)
        return joined_bytes(products[:padded], products[padded:]) * (bound * UNIT)

    def step(number, carry):
        """Some items. What they have in common stands side by side, so that one's products hide another's exponentials."""
        most, weight, summed, written, slot = carry
        behind = jnp.where(slot == 0, slots - together, slot - together)
        items = [(number * together + j, slot + j) for j in range(together)]
        for j, (item, _) in enumerate(items):
            fetch(item + slots - together, behind + j)
        for each in items:
            arrive(*each)
        for each in items:
            written = put(*each, written)
            if not quantized:
                tidy(*each)
        scores = [scores_of(*each) for each in items]
        weights, fades, firsts = [], [], [(work[0, item] & 1) == 1 for item, _ in items]
        # Selected, not multiplied by zero: what another row leaves may be NaN.
        for is_first, (found, _) in zip(firsts, scores, strict=True):
            old = jnp.where(is_first, _NONE, most)
            most = jnp.maximum(old, found.max(1, keepdims=True))
            weights.append(jnp.exp2(found - most))
            fades.append(jnp.exp2(old - most))
        sums = [weighed(slot, x, y) for (_, slot), x, (_, y) in zip(items, weights, scores, strict=True)]
        for (item, _), is_first, fade, x, more in zip(items, firsts, fades, weights, sums, strict=True):
            weight, summed = (jnp.where(is_first, 0.0, y) for y in (weight, summed))
            weight = fade * weight + x.sum(1, keepdims=True)
            # Behind the list's end there may be anything.
            summed = fade * summed + jnp.where(work[6, item] > 0, more, 0)
            tiles_of = enumerate(range(0, lanes - shape.before, LANES))
            mine = [chosen(summed[:, at : at + LANES], value_masks[i]) for i, at in tiles_of]
            found = sum(mine[1:], mine[0]) / weight
            shift = h
            while shift < LANES:  # to the first lanes, wherever the head's are
                found, shift = found + tpu.roll(found, shift, 1), 2 * shift
            out[work[0, item] >> 1] = found[:n, :h].astype(out.dtype)  # of a row's items the last one counts
        return most, weight, summed, written, jnp.where(slot == slots - together, 0, slot + together)

    zero = jnp.zeros((padded, 1), jnp.float32)
    nothing = (zero, zero, jnp.zeros((padded, lanes - shape.before), jnp.float32))
    steps = (total[0] + together - 1) >> bits(together)
    *_, written, _ = jax.lax.fori_loop(0, steps, step, (*nothing, jnp.int32(0), jnp.int32(0)))
    for number in range(_WRITES):

        @pallas.when(number < written)
        def _(number=number):
            write(number, 0, False)


def _product(x, y, axis: int):
    """x (r, c) times y, whose dimension `axis` is c, in int32 or float32."""
    dtype = jnp.int32 if x.dtype == jnp.int8 else jnp.float32
    return jax.lax.dot_general(x, y, (((1,), (axis,)), ((), ())), preferred_element_type=dtype)
