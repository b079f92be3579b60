"""One query a row against keys and values that stand in one array: cuDNN's attention over pages.

A decode step writes new keys and values by one kernel where they go into one array, by two where they go into two. cuDNN takes
keys and values as arrays of their own, and half of an array would first be copied. But it also takes pages of columns, in any
order, with a table that says which of them are a row's keys, and one for its values. Here both point into the same array.

jax has no public function for this, so the operation is called by the name and the settings by which XLA knows it.
"""

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..sharding import on_each_device
from .cudnn import fits_one_query

__all__ = ["fits_paged", "paged_step"]

# Columns of a page.
_PAGE = 128


def fits_paged(q: jax.Array, pairs: jax.Array) -> bool:
    """Whether this is one query a row in 16 bits and a cache of whole pages. Arguments as in `paged_step`."""
    whole = pairs.shape[2] % _PAGE == 0 and q.shape[1] % (pairs.shape[1] // 2) == 0
    return whole and fits_one_query(q, pairs)


def paged_step(q: jax.Array, pairs: jax.Array, mask: jax.Array) -> jax.Array:
    """Attention of one query a row to a cache of pairs, by cuDNN.

    Args:
        q: (b, n, 1, h).
        pairs: (b, 2·k, L, h), of each key head its keys and then its values; L a multiple of _PAGE.
        mask: bool (b, 1, L), which columns a row sees.

    Returns:
        (b, n, 1, h).
    """
    return on_each_device(_one_device, q, pairs, mask)


def _one_device(q: jax.Array, pairs: jax.Array, mask: jax.Array) -> jax.Array:
    """The operation on the arrays of one device. Each key head is taken for a row of its own, as in `cudnn.cudnn_step`."""
    (b, n, _, h), (_, heads, length, _) = q.shape, pairs.shape
    kv, pages = heads // 2, length // _PAGE
    rows = b * kv
    seen = jnp.broadcast_to(mask[:, None], (b, kv, 1, length)).reshape(rows, 1, 1, length)
    bias = jnp.where(seen, 0, 0.7 * jnp.finfo(q.dtype).min).astype(q.dtype)
    keys = (2 * pages * jnp.arange(rows, dtype=jnp.int32)[:, None] + jnp.arange(pages, dtype=jnp.int32)).reshape(
        rows, 1, pages, 1
    )
    out = _call(
        q.reshape(rows, 1, n // kv, h),
        pairs.reshape(2 * rows * pages, _PAGE, 1, h),
        bias,
        np.full(rows, length, np.int32),
        keys,
        keys + pages,
    )
    return out.reshape(b, n, 1, h)


def _call(q: jax.Array, pages: jax.Array, bias: jax.Array, lengths: Any, keys: Any, values: Any) -> jax.Array:
    """cuDNN's operation.

    Args:
        q: (r, 1, g, h).
        pages: (p, _PAGE, 1, h).
        bias: of the scores, (r, 1, 1, L).
        lengths: int32 (r,), columns of each row, from the first on.
        keys: int32 (r, 1, L / _PAGE, 1), which pages are the keys of a row, in order.
        values: the same of its values.

    Returns:
        (r, g, 1, h).
    """
    rows, _, group, size = q.shape
    result = jax.ShapeDtypeStruct((rows, group, 1, size), q.dtype)
    call: Any = jax.ffi.ffi_call(
        "__cudnn$fmhaScaleBiasSoftmax",
        (result, jax.ShapeDtypeStruct((0,), jnp.uint8)),  # and room to work in, which XLA makes as large as it has to be
        custom_call_api_version=2,
        legacy_backend_config=_settings(size**-0.5),
        output_layouts=((0, 2, 1, 3), None),
        vmap_method="sequential",
    )
    return call(q, pages, pages, bias, np.ones_like(lengths), lengths, keys, values)[0]


def _settings(scale: float) -> str:
    """XLA's GpuBackendConfig: queries (b, t, n, h), keys and values (b, s, n, h), scores (b, n, t, s)."""

    def product(contracted: tuple[int, int], batch: tuple[tuple[int, int], tuple[int, int]]) -> dict[str, list[str]]:
        sides = zip(("lhs", "rhs"), contracted, batch, strict=True)
        each = [
            (f"{side}_contracting_dimensions", [str(over)], f"{side}_batch_dimensions", list(map(str, by)))
            for side, over, by in sides
        ]
        return {name: value for a, over, b, by in each for name, value in ((a, over), (b, by))}

    attention = {
        "fmha_scale": scale,
        "is_flash_attention": True,
        "is_paged_attention": True,
        "mask_type": "NO_MASK",  # beside the rows' lengths
        "bmm1_dot_dimension_numbers": product((3, 3), ((0, 2), (0, 2))),
        "bmm2_dot_dimension_numbers": product((3, 1), ((0, 1), (0, 2))),
    }
    return json.dumps({"operation_queue_id": "0", "cudnn_fmha_backend_config": attention})
