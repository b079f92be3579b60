"""A decode step's attention on TPU in one kernel, which reads the visible columns of a layer's KV cache and writes the new one.

The cache's columns lie one after the other (`cache.ColumnBuffers`), keys and values of all heads side by side, so that the
smallest piece that can be read is a tile of 8 columns (32 of int8), and a chunk of a row is contiguous. The kernel goes
through a list of chunks (`work`), copies each into the core's memory while it computes with those before it, and knows no
other columns: not those of the ring that are not visible, not those of rows that have finished. All heads share one product:
the queries stand in a matrix that has zeros where the keys are another head's. It is used in bfloat16 only, because its
products are those of the matrix unit. Figures in docs/design.md.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ..sharding import on_each_device
from .int8 import UNIT, joined_bytes, power_above, rounded, turn, two_bytes
from .pallas import pallas_tpu
from .work import Pieces, WorkList

__all__ = ["decode_attention", "decode_pieces", "fits_decode"]

_LANES = 128
_NONE = -1e30  # a score that does not count
# Bytes of a chunk, and its columns at most: long enough that a copy's latency is small beside it.
_CHUNK_BYTES = 3 * 2**17
_MOST_COLUMNS = 1024
_WRITES = 8  # new columns under way to the cache at a time
# Bytes of the core's memory that a kernel may take for what it holds of all rows; of the list, in the memory for scalars.
_MOST_ROW_BYTES = 2**23
_MOST_LIST_BYTES = 2**18


def decode_pieces(length: int, lanes: int, head: int, dtype: Any) -> Pieces | None:
    """The pieces in which the kernel reads a ring, or None if it cannot.

    Args:
        length: columns of the ring.
        lanes: numbers of a column in one buffer, keys and values of its heads.
        head: numbers of a head.
        dtype: of the buffer, bfloat16 or int8.
    """
    dtype = jnp.dtype(dtype)
    if dtype not in (jnp.bfloat16, jnp.int8) or pallas_tpu() is None:
        return None
    group, align = (32, _LANES) if dtype == jnp.int8 else (8, 8)
    if length % align or lanes % _LANES or head < 16 or _LANES % head:
        return None
    columns = min(_CHUNK_BYTES // (lanes * dtype.itemsize), _MOST_COLUMNS, -(-length // _LANES) * _LANES)
    return Pieces(length, group, align, max(columns // _LANES, 1) * _LANES)


def fits_decode(q: jax.Array, work: WorkList | None) -> bool:
    """Whether this is one query a row in bfloat16, with a list for this kernel, and not too many rows."""
    if work is None or q.dtype != jnp.bfloat16 or q.shape[2] != 1:
        return False
    devices, _, items = work.items.shape
    rows, heads = q.shape[0] // devices, _ceil(q.shape[1], 16)
    held = rows * _LANES * 2 * (2 * heads + _ceil(2 * q.shape[1], 16))
    return held <= _MOST_ROW_BYTES and 4 * 16 * items <= _MOST_LIST_BYTES


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
    out, pairs, scales = on_each_device(local, turn(q).astype(q.dtype), pairs, turn(k), turn(v), start, *work, scales)
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
        return _ceil(self.queries, 16)

    @property
    def keys(self) -> int:
        """Lanes of keys: values begin here."""
        return self.heads * self.size

    @property
    def key_tiles(self) -> int:
        """Lanes of the tiles that keys are in."""
        return _ceil(self.keys, _LANES)

    @property
    def before(self) -> int:
        """Lanes before the tiles that values are in."""
        return self.keys // _LANES * _LANES


def _one_device(q, pairs, k, v, start, items, total, *scales, interpret):
    """The kernel on the arrays of one device."""
    pallas, tpu = pallas_tpu()
    b, n, _, h = q.shape
    kv, (_, _, length, lanes) = k.shape[1], pairs.shape
    pieces = decode_pieces(length, lanes, h, pairs.dtype)
    assert pieces is not None
    shape = _Shape(b, n, kv, h, lanes, pieces)
    group, chunk, align = pieces.group, pieces.chunk, pieces.align
    column = jnp.concatenate([k, v], 1).reshape(b, 2 * kv, h)
    column = jnp.pad(column, ((0, 0), (0, _ceil(2 * kv, 8) - 2 * kv), (0, 0)))
    column, *fresh = rounded(column) if scales else (column,)
    new = [column.astype(q.dtype), *fresh]
    kept = [pairs.reshape(b, length // group, group, lanes), *(x[:, 0] for x in scales)]
    # Without this, XLA copies whole layers into the core's memory and out again; the kernel fetches what it needs.
    if interpret:
        held, far = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in kept], pallas.ANY
    else:
        kept = [tpu.with_memory_space_constraint(x, tpu.HBM) for x in kept]
        held, far = [tpu.HBM(x.shape, x.dtype) for x in kept], tpu.HBM
    near = lambda: pallas.BlockSpec(memory_space=tpu.VMEM)
    distant = lambda: pallas.BlockSpec(memory_space=far)
    of_scales = [
        (tpu.VMEM((count, x.shape[2], size), x.dtype))
        for x in scales
        for count, size in ((pieces.slots, chunk), (_WRITES, align))
    ]
    if scales:
        of_scales.append(tpu.VMEM((shape.padded, _LANES), jnp.float32))
    wide = ((2 * shape.padded, shape.key_tiles), jnp.int8) if scales else ((shape.padded, shape.key_tiles), q.dtype)
    moved = kept_bytes(pairs, *scales)
    out, *kept = pallas.pallas_call(
        functools.partial(_kernel, pallas, tpu, shape, bool(scales)),
        out_shape=(jax.ShapeDtypeStruct((b, n, h), q.dtype), *held),
        grid_spec=tpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(1,),
            in_specs=[near(), *(near() for _ in new), *(distant() for _ in kept)],
            out_specs=[near(), *(distant() for _ in kept)],
            scratch_shapes=[
                tpu.VMEM((pieces.slots, chunk // group, group, lanes), pairs.dtype),
                tpu.VMEM((_WRITES, group, lanes), pairs.dtype),
                tpu.VMEM(*wide),
                tpu.SemaphoreType.DMA((pieces.slots,)),
                tpu.SemaphoreType.DMA((_WRITES,)),
                *of_scales,
            ],
        ),
        input_output_aliases={4 + len(new) + i: 1 + i for i in range(len(kept))},
        # Of a ring that is half visible: XLA fetches weights meanwhile.
        cost_estimate=pallas.CostEstimate(
            flops=2 * b * n * h * length, transcendentals=b * n * length // 2, bytes_accessed=moved // 2
        ),
        interpret=interpret,
        name="decode_attention",
    )(start.reshape(1).astype(jnp.int32), items[0], total[0], q.reshape(b, n, h), *new, *kept)
    return out.reshape(b, n, 1, h), kept[0].reshape(pairs.shape), *(x[:, None] for x in kept[1:])


def kept_bytes(*arrays: jax.Array) -> int:
    """Bytes of arrays."""
    return sum(x.size * x.dtype.itemsize for x in arrays)


def _ceil(n: int, unit: int) -> int:
    """The next multiple of `unit`."""
    return -(-n // unit) * unit


def _kernel(pallas, tpu, shape: _Shape, quantized: bool, start, work, total, q, new, *refs) -> None:
    """All items of the list, one after the other.

    start (1,), work (10, N) and total (1,) are scalars; q (b, n, h); new (b, R, h), the new keys and behind them the new values
    of all heads. In main memory: the pairs (b, L / group, group, lanes), and of int8 the scales (b, R, L). Output (b, n, h).
    """
    if quantized:
        fresh, pairs, scales, out, new_pairs, new_scales, chunks, tiles, wide, arrived, left, *more = refs
        scale_chunks, scale_tiles, bounds = more
    else:
        pairs, out, new_pairs, chunks, tiles, wide, arrived, left = refs
    length, group, align, size, slots = shape.pieces
    h, n, padded, lanes = shape.size, shape.queries, shape.padded, shape.lanes
    iota = functools.partial(jax.lax.broadcasted_iota, jnp.int32)
    bits = lambda unit: unit.bit_length() - 1
    ring_group, ring_align = start[0] >> bits(group), pallas.multiple_of(start[0] & -align, align)

    def read(item, go: bool):
        """Start the copies of an item, or wait for them."""
        slot = jax.lax.rem(item, slots)
        head, low, at, before, after = (work[i, item] for i in range(5))
        row = head >> 1
        copies = [
            (before, lambda: (pairs.at[row, pallas.ds(at, before)], chunks.at[slot, pallas.ds(low, before)])),
            (after, lambda: (pairs.at[row, pallas.ds(0, after)], chunks.at[slot, pallas.ds(low + before, after)])),
        ]
        if quantized:
            first, some, more = (work[i, item] for i in range(7, 10))
            span = lambda at, n: pallas.ds(pallas.multiple_of(at * align, align), pallas.multiple_of(n * align, align))
            copies += [
                (some, lambda: (scales.at[row, :, span(first, some)], scale_chunks.at[slot, :, span(0, some)])),
                (more, lambda: (scales.at[row, :, span(0, more)], scale_chunks.at[slot, :, span(some, more)])),
            ]
        for count, ends in copies:

            @pallas.when(count > 0)
            def _(ends=ends):
                copy = tpu.make_async_copy(*ends(), arrived.at[slot])
                copy.start() if go else copy.wait()

    def write(number, row, go: bool):
        """Start the copies of a row's new column, or wait for those of the same place."""
        place = jax.lax.rem(number, _WRITES)
        copies = [(tiles.at[place], new_pairs.at[row, ring_group])]
        if quantized:
            copies += [(scale_tiles.at[place], new_scales.at[row, :, pallas.ds(ring_align, align)])]
        for ends in copies:
            copy = tpu.make_async_copy(*ends, left.at[place])
            copy.start() if go else copy.wait()

    out[...] = jnp.zeros_like(out)  # rows that take no part
    wide[...] = jnp.zeros_like(wide)
    if not quantized:
        chunks[...] = jnp.zeros_like(chunks)  # what a weight of zero is multiplied with must be finite
    for item in range(slots - 1):
        read(item, True)

    # For each query its head; by a product, since for a division Pallas asks the chip at hand.
    per_head = n // shape.heads
    lane, head_of = iota((padded, _LANES), 1), (iota((padded, _LANES), 0) * -(-(2**16) // per_head)) >> 16
    own = lambda first: (lane + first >= head_of * h) & (lane + first < head_of * h + h)  # of a tile with this first lane
    tile_row = iota((group, lanes), 0)
    here = tile_row == (start[0] & (group - 1))

    def visible(column, new_at, live):
        """Which columns of a chunk the row sees, apart from the chunk's end."""
        age = new_at - column
        return jnp.where(age < 0, age + length, age) < live

    def spread(scale):
        """Rows (heads, C) of key heads, for each query."""
        rows = jnp.broadcast_to(scale[:1], (padded, scale.shape[1]))
        number = (iota(rows.shape, 0) * -(-(2**16) // per_head)) >> 16
        for j in range(1, shape.heads):
            rows = jnp.where(number < j, rows, scale[j : j + 1])
        return rows

    def clear(slot, first, stop):
        """Zeros for groups of a chunk, which may hold what is left of another row."""

        @pallas.loop(first, stop)
        def _(i):
            chunks[slot, i] = jnp.zeros((group, lanes), chunks.dtype)

    def attend(item, carry):
        most, total_weight, summed, written = carry
        slot, row, is_first = jax.lax.rem(item, slots), work[0, item] >> 1, (work[0, item] & 1) == 1
        low, end, new_at, live = work[1, item], work[1, item] + work[3, item] + work[4, item], work[5, item], work[6, item]
        is_last = new_at < size
        read(item + slots - 1, True)
        read(item, False)

        @pallas.when(is_first)
        def _():
            """The queries of the row, and no column before the first that it sees."""
            x = jnp.concatenate([q[row].astype(jnp.float32)] * (_LANES // h), 1)
            if quantized:
                x = jnp.concatenate([x, jnp.zeros((padded - n, _LANES), jnp.float32)], 0)
                bound, inverse = power_above(jnp.broadcast_to(jnp.abs(x).max(1, keepdims=True), x.shape))
                bounds[...] = bound * (UNIT * h**-0.5)
                both = two_bytes(x, inverse).astype(jnp.int32)
                for first in range(0, shape.key_tiles, _LANES):
                    mine = jnp.concatenate([own(first).astype(jnp.int32)] * 2, 0)
                    wide[:, first : first + _LANES] = (both * mine).astype(jnp.int8)
            else:
                for first in range(0, shape.key_tiles, _LANES):
                    wide[:n, first : first + _LANES] = jnp.where(own(first)[:n], x, 0).astype(wide.dtype)
                kept = visible(low * group + tile_row, new_at, live)
                chunks[slot, low] = jnp.where(kept, chunks[slot, low].astype(jnp.float32), 0).astype(chunks.dtype)
                clear(slot, 0, low)

        @pallas.when(is_last)
        def _():
            """The new column, and no column after it that the row does not see."""

            @pallas.when(written >= _WRITES)
            def _():
                write(written, row, False)

            place, at = jax.lax.rem(written, _WRITES), new_at >> bits(group)
            old, column = (x.astype(jnp.int32 if quantized else jnp.float32) for x in (chunks[slot, at], new[row]))
            joined = jnp.concatenate([column[j : j + 1] for j in range(2 * shape.heads)], 1)
            kept = visible(at * group + tile_row, new_at, live)
            tile = jnp.where(here, joined, jnp.where(kept, old, 0)).astype(chunks.dtype)
            chunks[slot, at] = tile
            tiles[place] = tile
            if quantized:
                span = pallas.ds(pallas.multiple_of(new_at & -align, align), align)
                lane = iota((scale_tiles.shape[1], align), 1)
                piece = jnp.where(lane == (start[0] & (align - 1)), fresh[row], scale_chunks[slot, :, span])
                scale_chunks[slot, :, span] = piece
                scale_tiles[place] = piece
            else:
                clear(slot, end, size // group)
            write(written, row, True)

        kv = chunks[slot].reshape(size, lanes)
        if quantized:
            of = scale_chunks[slot]
            column = iota(of.shape, 1)
            of = jnp.where(visible(column, new_at, live) & (column < end * group), of, -1.0)  # a scale is never negative
            of_keys, of_values = (spread(of[j * shape.heads : (j + 1) * shape.heads]) for j in range(2))
            scores = joined_bytes(_product(wide[...], kv[:, : shape.key_tiles], 1, jnp.int32)) * (of_keys * bounds[:, :1])
            scores = jnp.where(of_keys < 0, _NONE, scores)
        else:
            scores = _product(wide[...], kv[:, : shape.key_tiles], 1) * h**-0.5
            column = iota((padded, size), 1)
            scores = jnp.where(visible(column, new_at, live) & (column < end * group), scores, _NONE)
        # Selected, not multiplied by zero: what another row leaves may be NaN.
        old, total_weight, summed = (jnp.where(is_first, x, y) for x, y in ((_NONE, most), (0.0, total_weight), (0.0, summed)))
        most = jnp.maximum(old, scores.max(1, keepdims=True))
        weights = jnp.exp(scores - most)
        fade = jnp.exp(old - most)
        total_weight = fade * total_weight + weights.sum(1, keepdims=True)
        if quantized:
            bound, inverse = power_above(jnp.maximum(of_values.max(1, keepdims=True), 0))
            both = two_bytes(weights * of_values, inverse)
            more = joined_bytes(_product(both, kv[:, shape.before :], 0, jnp.int32)) * (bound * UNIT)
        else:
            more = _product(weights.astype(kv.dtype), kv[:, shape.before :], 0)
        summed = fade * summed + more

        @pallas.when(is_last)
        def _():
            """Of each query its own head's lanes, wherever they stand, moved to the first ones."""
            y = summed / total_weight
            tiles_of = range(shape.before, lanes, _LANES)
            apart = [jnp.where(own(t - shape.keys), y[:, t - shape.before : t - shape.before + _LANES], 0) for t in tiles_of]
            y = sum(apart[1:], apart[0])
            shift = h
            while shift < _LANES:
                y, shift = y + tpu.roll(y, shift, 1), 2 * shift
            out[row] = y[:n, :h].astype(out.dtype)

        return most, total_weight, summed, written + is_last.astype(jnp.int32)

    zero = jnp.zeros((padded, 1), jnp.float32)
    begin = (zero, zero, jnp.zeros((padded, lanes - shape.before), jnp.float32), jnp.int32(0))
    *_, written = jax.lax.fori_loop(0, total[0], attend, begin)
    for number in range(_WRITES):

        @pallas.when(number < written)
        def _(number=number):
            write(number, 0, False)


def _product(x, y, axis: int, dtype: Any = jnp.float32):
    """x (r, c) times y, whose dimension `axis` is c."""
    return jax.lax.dot_general(x, y, (((1,), (axis,)), ((), ())), preferred_element_type=dtype)
