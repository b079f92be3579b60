"""The list of a decode step: every column that a row sees, once, and hardly any other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from smolvlm_jax.attention.decode_limits import decode_pieces
from smolvlm_jax.attention.work import work_list

LANES, HEAD, HEADS, LAYERS = 384, 64, 3, 30  # of the 256M
WEIGHTS = 269e6  # bytes of its decoder in bfloat16


def listed(live, start, length, dtype=jnp.bfloat16):
    pieces = decode_pieces(length, LANES, HEAD, dtype)
    make = jax.jit(work_list, static_argnums=2)
    items, total = make(jnp.asarray(live)[None], jnp.asarray(start), pieces)
    return pieces, np.asarray(items[0]), int(total[0, 0])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.int8])
def test_what_a_row_sees_is_read_once(dtype):
    rng = np.random.default_rng(0)
    rows, length = 9, 1536
    for start in (0, 1, 127, 700, 1535):
        live = np.asarray([0, 1, 8, length, length - 1, *rng.integers(0, length, rows - 5)])
        pieces, items, total = listed(live, start, length, dtype)
        assert not items[[3, 4], total:].any() and items.shape[1] >= total + pieces.slots
        assert (items[0, total:] == items[0, total - 1] // 2 * 2).all() and not items[6, total:].any(), (
            "what follows sees nothing"
        )
        assert (items[5, total:] >= pieces.chunk).all()
        tiles = length // pieces.group
        for row, count in enumerate(live):
            read = np.zeros(tiles, int)
            mine = [i for i in range(total) if items[0, i] >> 1 == row]
            assert [items[0, i] & 1 for i in mine] == [1, *[0] * (len(mine) - 1)][: len(mine)], "the first is marked"
            assert [items[5, i] < pieces.chunk for i in mine] == [*[False] * (len(mine) - 1), True][: len(mine)], "the last one"
            for i in mine:
                _, low, at, before, after, new, seen, *_ = items[:, i]
                np.add.at(read, np.r_[at : at + before, 0:after], 1)
                assert (
                    low >= 0 and low + before + after <= pieces.chunk // pieces.group and at + before <= tiles and seen == count
                )
                if new < pieces.chunk:  # the new column stands where the kernel will write it
                    place = new // pieces.group - low
                    assert [*range(at, at + before), *range(after)][place] == start // pieces.group
            wanted = np.unique((start - np.arange(count)) % length // pieces.group)
            assert read[wanted].all() and read.max(initial=0) <= 1
            # Nothing else, but where the ring has come round within an aligned piece: then all of that.
            assert read.sum() - len(wanted) < pieces.align // pieces.group


@pytest.mark.parametrize(("rows", "length", "most"), [(64, 2048, 1.05), (98, 1024, 1.05), (24, 4096, 1.05), (256, 256, 1.2)])
def test_bytes_follow_what_is_visible(rows, length, most):
    """Tiles that are read, and those of new columns that are written, beside weights and visible columns."""
    rng = np.random.default_rng(0)
    for share in (0.25, 0.5, 1):
        live = np.full(rows, length) if share == 1 else np.clip(rng.integers(1, int(2 * share * length) + 1, rows), 1, length)
        moved = {}
        for dtype, size in ((jnp.bfloat16, 2), (jnp.int8, 1)):
            pieces, items, total = listed(live, int(rng.integers(length)), length, dtype)
            moved[dtype] = (items[[3, 4]].sum() + rows) * pieces.group * LANES * size
            if size == 1:
                moved[dtype] += (items[[8, 9], :total].sum() + rows) * pieces.align * 8 * 4  # scales, in rows of 8
        bf16, int8 = (WEIGHTS + int(moved[dtype]) * LAYERS for dtype in (jnp.bfloat16, jnp.int8))
        assert bf16 <= most * (WEIGHTS + int(live.sum()) * LANES * 2 * LAYERS)
        assert length < 2048 or int8 <= 0.75 * bf16
    assert listed(np.zeros(rows, int), 3, length)[2] == 0, "rows that have finished cost nothing"
