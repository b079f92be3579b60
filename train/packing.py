"""Several conversations in one row: which go together, and the arrays that keep them apart. numpy only."""

from collections.abc import Sequence

import numpy as np

from .samples import IGNORE, Sample

__all__ = ["make_batch", "plan_rows"]


def plan_rows(
    lengths: Sequence[int], tiles: Sequence[int], row_length: int, row_tiles: int, *, alone: bool = False
) -> list[list[int]]:
    """Rows of sample numbers: the longest first, each into the first row with room for its tokens and tiles.

    Every sample stands in one row, whole; each must fit into an empty one. Within a row, and of rows, the order is that of the
    samples. alone: one sample a row.
    """
    if alone:
        return [[number] for number in range(len(lengths))]
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []
    for number in sorted(range(len(lengths)), key=lambda n: (-lengths[n], n)):
        length, count = lengths[number], tiles[number]
        place = next((i for i, (tokens, slots) in enumerate(room) if length <= tokens and count <= slots), None)
        if place is None:
            place = len(rows)
            rows.append([])
            room.append((row_length, row_tiles))
        rows[place].append(number)
        room[place] = (room[place][0] - length, room[place][1] - count)
    return sorted(sorted(row) for row in rows)


def make_batch(
    rows: Sequence[Sequence[Sample]], length: int, tile_room: int, tile_size: int, pad_token_id: int
) -> dict[str, np.ndarray]:
    """Rows of samples as one batch.

    Returns input_ids, labels, segment_ids int32 (b, length): segments are numbered from 1 in each row, 0 is padding. With
    tile_room, also pixel_values uint8 (tile_room, T, T, 3), the tiles of all rows in the order of their image tokens, and
    tile_mask bool (tile_room,).
    """
    b = len(rows)
    ids = np.full((b, length), pad_token_id, np.int32)
    labels = np.full((b, length), IGNORE, np.int32)
    segments = np.zeros((b, length), np.int32)
    for row, samples in enumerate(rows):
        place = 0
        for number, sample in enumerate(samples, 1):
            span = slice(place, place + len(sample))
            ids[row, span], labels[row, span], segments[row, span] = sample.input_ids, sample.labels, number
            labels[row, place] = IGNORE  # nothing stands before a first token that could predict it
            place += len(sample)
    batch = {"input_ids": ids, "labels": labels, "segment_ids": segments}
    if tile_room:
        pixels = np.zeros((tile_room, tile_size, tile_size, 3), np.uint8)
        place = 0
        for samples in rows:
            for sample in samples:
                pixels[place : place + len(sample.tiles)] = sample.tiles if len(sample.tiles) else pixels[:0]
                place += len(sample.tiles)
        batch["pixel_values"] = pixels
        batch["tile_mask"] = np.arange(tile_room) < place
    return batch
