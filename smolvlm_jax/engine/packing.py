"""From requests that are admitted together to the arrays of one prefill."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..generation_config import Sampling, SamplingParams
from ..sampling import RowSampling
from .programs import Rows
from .rings import Active, Ring

__all__ = ["Pack", "Placed"]


@dataclass(frozen=True)
class Placed:
    """Where a request's prompt stands: lane, number of its segment in the lane, first column. ring is None for a request that
    wants one token only, and row its slot within the lane."""

    active: Active
    ring: Ring | None
    row: int
    lane: int
    segment: int
    start: int

    @property
    def length(self) -> int:
        return len(self.active.arrival.prepared.input_ids)


class Pack:
    """Prompts laid side by side in `lanes` rows. `buckets`: lengths of rows there are programs for, and the segments each
    has; several prompts share a row of up to `limit` tokens."""

    def __init__(self, lanes: int, buckets: dict[int, int], limit: int):
        self._buckets, self._limit = buckets, limit
        self.fill = [0] * lanes
        self.count = [0] * lanes
        self.length = 0
        self.placed: list[Placed] = []

    def bucket(self, lane: int, tokens: int, ring_length: int | None) -> int | None:
        """The row length if a prompt of so many tokens joined this lane; None if it does not fit."""
        fill, count = list(self.fill), list(self.count)
        fill[lane] += tokens
        count[lane] += 1
        most, below = (max(fill), max(count)), 0
        for size, segments in self._buckets.items():
            if size >= most[0] and segments >= most[1]:
                break
            below = size
        else:
            return None
        if size <= self._limit:
            return size
        # Long rows hold one prompt each, in rings that are longer than the next smaller row.
        rings = [p.ring.length for p in self.placed if p.ring is not None] + [ring_length or size]
        return size if most[1] == 1 and all(length > below for length in rings) else None

    def add(self, lane: int, active: Active, ring: Ring | None, row: int, length: int) -> None:
        tokens = len(active.arrival.prepared.input_ids)
        self.placed.append(Placed(active, ring, row, lane, self.count[lane], self.fill[lane]))
        self.fill[lane] += tokens
        self.count[lane] += 1
        self.length = length

    def arrays(self, segments: int, place_of, places: int) -> tuple:
        """The inputs of `programs.prefill` after the pool: input_ids, segment_ids, places, num_tiles, last, rows."""
        lanes = len(self.fill)
        ids = np.zeros((lanes, self.length), np.int32)
        segment_ids = np.zeros_like(ids)
        last = np.zeros((lanes, segments), np.int32)
        rows = [[(SamplingParams(max_new_tokens=1), Sampling())] * segments for _ in range(lanes)]
        wanted: list[int] = []
        for p in sorted(self.placed, key=lambda p: (p.lane, p.segment)):
            prepared = p.active.arrival.prepared
            columns = slice(p.start, p.start + p.length)
            ids[p.lane, columns] = prepared.input_ids
            segment_ids[p.lane, columns] = p.segment + 1
            last[p.lane, p.segment] = p.start + p.length - 1
            rows[p.lane][p.segment] = p.active.arrival.request.params, p.active.sampling
            wanted += [place_of(digest) for digest in prepared.digests]
        at = np.zeros((places,), np.int32)
        at[: len(wanted)] = wanted
        return ids, segment_ids, at, np.asarray(len(wanted), np.int32), last, _rows(rows)

    def rounds(self, ring: Ring) -> list[tuple[np.ndarray, ...]]:
        """Arguments (row, segment, start, length), each (lanes,), of `programs.insert`: one prompt per lane at a time."""
        queues = [[p for p in self.placed if p.ring is ring and p.lane == lane] for lane in range(len(self.fill))]
        out = []
        for turn in range(max(map(len, queues))):
            now = [queue[turn] if turn < len(queue) else None for queue in queues]
            column = lambda name, none: np.asarray([none if p is None else getattr(p, name) for p in now], np.int32)  # noqa: B023
            out.append((column("row", -1), column("segment", 0), column("start", 0), column("length", 0)))
        return out


def _rows(settings: Sequence[Sequence[tuple[SamplingParams, Sampling]]]) -> Rows:
    """`Rows` of host arrays with the shape of the nested sequence."""

    def column(name, dtype, which=1):
        return np.asarray([[getattr(pair[which], name) for pair in row] for row in settings], dtype)

    sampling = RowSampling(
        do_sample=column("do_sample", bool),
        temperature=column("temperature", np.float32),
        top_k=column("top_k", np.int32),
        top_p=column("top_p", np.float32),
        min_p=column("min_p", np.float32),
        repetition_penalty=column("repetition_penalty", np.float32),
        seed=column("seed", np.uint32, 0),
    )
    return Rows(sampling, column("max_new_tokens", np.int32, 0), column("ignore_eos", bool, 0))
