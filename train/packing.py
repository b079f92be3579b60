"""Several conversations in one row: which go together, and the arrays that keep them apart. numpy only."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .config import IGNORE, DataConfig
from .samples import Sample

__all__ = ["BatchShape", "make_batch", "plan_rows"]


@dataclass(frozen=True, kw_only=True)
class BatchShape:
    """The shape of a batch: the one description that `make_batch` fills and the memory estimate compiles for.

    Attributes:
        rows: rows of the batch.
        length: tokens of a row.
        tiles: room for tiles of a row.
        tile_size: pixels of a tile's side.
    """

    rows: int
    length: int
    tiles: int
    tile_size: int

    @classmethod
    def of(cls, config: DataConfig, *, rows: int, image_seq_len: int, tile_size: int) -> "BatchShape":
        """From the configuration; room for tiles is by default what a row of image tokens alone could hold."""
        most = -(-config.length // image_seq_len)
        tiles = most if config.tiles_per_row is None else config.tiles_per_row
        return cls(rows=rows, length=config.length, tiles=tiles, tile_size=tile_size)

    def arrays(self) -> dict[str, tuple[tuple[int, ...], type]]:
        """Shape and dtype of each array by name; see `make_batch`."""
        b, n, side = self.rows, self.tiles, self.tile_size
        arrays: dict[str, tuple[tuple[int, ...], type]] = {}
        for name in ("input_ids", "labels", "segment_ids"):
            arrays[name] = ((b, self.length), np.int32)
        if n:
            arrays |= {"pixel_values": ((b, n, side, side, 3), np.uint8), "tile_mask": ((b, n), np.bool_)}
        return arrays


def plan_rows(samples: Sequence[Sample], shape: BatchShape, *, alone: bool = False) -> list[list[int]]:
    """Distribute samples over rows: the longest first, each into the first row with room for its tokens and tiles.

    Every sample is in one row, whole; each must fit into an empty one. Within a row, and of rows, the order is that of the
    samples. alone: one sample a row.

    Returns:
        For each row the numbers of its samples.
    """
    if alone:
        return [[number] for number in range(len(samples))]
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []
    for number in sorted(range(len(samples)), key=lambda n: (-len(samples[n]), n)):
        length, count = len(samples[number]), len(samples[number].tiles)
        place = next((i for i, (tokens, slots) in enumerate(room) if length <= tokens and count <= slots), None)
        if place is None:
            place = len(rows)
            rows.append([])
            room.append((shape.length, shape.tiles))
        rows[place].append(number)
        room[place] = (room[place][0] - length, room[place][1] - count)
    return sorted(sorted(row) for row in rows)


def make_batch(rows: Sequence[Sequence[Sample]], shape: BatchShape, pad_token_id: int) -> dict[str, np.ndarray]:
    """Rows of samples as one batch.

    Returns:
        input_ids, labels, segment_ids int32 (b, length): segments are numbered from 1 in each row, 0 is padding. With room for
        tiles also pixel_values uint8 (b, n, T, T, 3), the tiles of each row in the order of its image tokens, then padding; and
        tile_mask bool (b, n), true for real tiles.
    """
    batch: dict[str, np.ndarray] = {name: np.zeros(*entry) for name, entry in shape.arrays().items()}
    batch["input_ids"][:] = pad_token_id
    batch["labels"][:] = IGNORE
    for row, samples in enumerate(rows):
        place = tile = 0
        for number, sample in enumerate(samples, 1):
            span = slice(place, place + len(sample))
            batch["input_ids"][row, span] = sample.input_ids
            batch["labels"][row, span] = sample.labels
            batch["labels"][row, place] = IGNORE  # no token stands before the first one that could predict it
            batch["segment_ids"][row, span] = number
            place += len(sample)
            if len(sample.tiles):
                own = slice(tile, tile + len(sample.tiles))
                batch["pixel_values"][row, own], batch["tile_mask"][row, own] = sample.tiles, True
                tile += len(sample.tiles)
    return batch
