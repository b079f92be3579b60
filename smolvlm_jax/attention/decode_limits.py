"""What the decode kernel for TPUs can take, and in which pieces it reads a ring. The kernel itself is in `decode`."""

from typing import Any

import jax
import jax.numpy as jnp

from .pallas import pallas_tpu
from .work import Pieces, WorkList

__all__ = ["LANES", "ceil", "decode_pieces", "fits_decode"]

LANES = 128
# Bytes of a chunk, and its columns at most: long enough that a copy's latency is small beside it.
_CHUNK_BYTES = 3 * 2**17
_MOST_COLUMNS = 1024
# Bytes of the core's memory that a kernel may take for what it holds of all rows; of the list, in the memory for scalars.
_MOST_ROW_BYTES = 3 * 2**22
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
    group, align = (32, LANES) if dtype == jnp.int8 else (8, 8)
    if length % align or lanes % LANES or head < 16 or LANES % head:
        return None
    columns = min(_CHUNK_BYTES // (lanes * dtype.itemsize), _MOST_COLUMNS, -(-length // LANES) * LANES)
    return Pieces(length, group, align, max(columns // LANES, 1) * LANES)


def fits_decode(q: jax.Array, work: WorkList | None, pairs: jax.Array) -> bool:
    """Whether this is one query a row in bfloat16, with a list for this kernel, and not too many rows. Arguments as in
    `decode.decode_attention`."""
    if work is None or q.dtype != jnp.bfloat16 or q.shape[2] != 1:
        return False
    devices, _, items = work.items.shape
    held = q.shape[0] // devices * _row_bytes(q.shape[1] // pairs.shape[1], q.shape[3], pairs)
    return held <= _MOST_ROW_BYTES and 4 * 16 * items <= _MOST_LIST_BYTES


def _row_bytes(n: int, h: int, pairs: jax.Array) -> int:
    """What the kernel holds of a row in the core's memory, of n queries of size h."""
    queries, lanes = ceil(n, 16) * LANES, pairs.shape[3]
    columns = ceil(lanes // h, 8) * LANES
    if pairs.dtype != jnp.int8:
        # Queries as they come and side by side, and the output; new columns, and those along lanes.
        return 2 * (3 * queries + ceil(columns, 16 * LANES)) + 4 * lanes
    # Also their bounds and scales. The output is float32, and a query two bytes.
    return 12 * queries + 2 * ceil(columns, 16 * LANES) + 4 * columns + 4 * lanes


def ceil(n: int, unit: int) -> int:
    """The next multiple of `unit`."""
    return -(-n // unit) * unit
