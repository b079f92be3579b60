"""Which columns of a ring the decode kernel reads: a list for one step, which all layers share.

A row's visible columns are its last ones, up to the column that is written in this step. The list has an item for each chunk
of a row: of rows that take part, and from the tile of the first visible column to the tile of the new one, so that a step
costs what is visible. A row that has finished has no items.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

__all__ = ["Pieces", "WorkList", "work_list"]


class Pieces(NamedTuple):
    """In which pieces a ring is read and written; static.

    Attributes:
        length: columns of the ring, a multiple of `align`.
        group: columns of a tile, the smallest piece.
        align: columns that chunks begin at a multiple of: a tile, or of int8 a tile of the scales.
        chunk: columns of an item, a multiple of `align`.
        slots: chunks in the core's memory at a time, a multiple of `together`.
        together: items that the kernel computes with at a time, a power of two.
    """

    length: int
    group: int
    align: int
    chunk: int
    slots: int = 6
    together: int = 2


class WorkList(NamedTuple):
    """The list of each of D devices that share the rows.

    Attributes:
        items: int32 (D, 10, N). Of an item: twice the row, plus 1 if it is the row's first; where in the chunk the first tile
            that is read goes; the ring's tile that it is; how many tiles are read from there, and how many more from the
            ring's beginning; the new column's place, counted from the chunk's first column; the row's visible columns; for the
            scales, the first aligned piece, how many are read from there, and how many more from the ring's beginning. Behind
            the last item there are at least `slots` that read nothing, of the last item's row, which see nothing.
        total: int32 (D, 1), how many items there are.
    """

    items: jax.Array
    total: jax.Array


def work_list(live: jax.Array, start: jax.Array, pieces: Pieces) -> WorkList:
    """The list of a step.

    Args:
        live: int (D, b), how many columns each row sees, the new one included; 0: the row takes no part.
        start: int (), the column that is written.
        pieces: of the ring.
    """
    return WorkList(*jax.vmap(lambda rows: _of_one_device(rows, start, pieces))(live))


def _of_one_device(live: jax.Array, start: jax.Array, pieces: Pieces) -> tuple[jax.Array, jax.Array]:
    length, group, align, chunk, slots, _ = pieces
    rows = live.shape[0]
    # A row's columns are counted from the first aligned piece that holds a visible one, oldest first.
    inside = start % align + 1
    blocks = jnp.where(live > 0, jnp.minimum(1 + _up(jnp.maximum(live - inside, 0), align), length // align), 0)
    new = blocks * align - align + start % align
    oldest = new - live + 1  # negative where the ring has come round: then the last piece begins with the newest column's end
    first = jnp.where(oldest < 0, 0, oldest // group)
    last = jnp.where(oldest < 0, length // group, new // group + 1)
    begin = (start // align - blocks + 1) * align
    chunks = _up(blocks * align, chunk)
    end = jnp.cumsum(chunks)

    item = jnp.arange(rows * -(-length // chunk) + slots)
    real = item < end[-1]
    of_row = jnp.minimum((end[None] <= jnp.minimum(item, end[-1] - 1)[:, None]).sum(1), rows - 1)
    # A product with a mask: small, and no gather, which is slow on a TPU.
    mine = of_row[:, None] == jnp.arange(rows)[None]
    pick = lambda x: jnp.where(mine, x[None], 0).sum(1)
    number = item - pick(end - chunks)
    skipped = number * chunk

    def span(low, high, unit):
        """`low` and `high` count units of the chunk: where the ring has them, how many up to its end, how many after."""
        many = length // unit
        at = ((pick(begin) + skipped) // unit + low) % many
        size = jnp.where(real, high - low, 0)
        before = jnp.minimum(size, many - at)
        return at, before, size - before

    low = jnp.maximum(pick(first) - skipped // group, 0)
    at, before, after = span(low, jnp.minimum(pick(last) - skipped // group, chunk // group), group)
    scale_at, scale_before, scale_after = span(0, jnp.minimum(pick(blocks) - skipped // align, chunk // align), align)
    head = of_row * 2 + (real & (number == 0))
    new_at, seen = jnp.where(real, pick(new) - skipped, chunk), jnp.where(real, pick(live), 0)
    fields = (head, low, at, before, after, new_at, seen, scale_at, scale_before, scale_after)
    return jnp.stack(fields).astype(jnp.int32), end[-1:].astype(jnp.int32)


def _up(x: jax.Array, unit: int) -> jax.Array:
    """Units that hold x."""
    return (x + unit - 1) // unit
