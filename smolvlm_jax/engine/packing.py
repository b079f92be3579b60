"""From requests that are admitted together to the arrays of one prefill."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import jax
import numpy as np

from ..decoding import RowSettings
from ..generation_config import Sampling, SamplingParams
from .programs import Packed, PackedTokens
from .rings import RequestState, Ring

__all__ = ["Pack", "Placed"]


_NO_PROMPT = (SamplingParams(max_new_tokens=1), Sampling())


@dataclass(frozen=True)
class Placed:
    """Where the prompt of a request stands in a prefill.

    Attributes:
        state: the request.
        ring: where it decodes; None if it wants one token only, which the prefill draws.
        row: its slot within the lane; -1 without a ring.
        lane: the packed row.
        segment: the prompt's number in the packed row.
        start: its first column there.
    """

    state: RequestState
    ring: Ring | None
    row: int
    lane: int
    segment: int
    start: int

    @property
    def length(self) -> int:
        return len(self.state.prepared.input_ids)


class Pack:
    """Prompts side by side in packed rows, one row per lane.

    Attributes:
        length: of the packed rows.
        placed: the prompts.
        fill: how many tokens each row holds so far.
    """

    def __init__(self, lanes: int, segments: dict[int, int], limit: int):
        """Args:
        lanes: the number of packed rows.
        segments: lengths of rows that there are programs for, ascending, and the prompts that each holds at most.
        limit: several prompts share a row of up to so many tokens.
        """
        self._segments, self._limit = segments, limit
        self.fill = [0] * lanes
        self._count = [0] * lanes
        self.length = 0
        self.placed: list[Placed] = []

    def length_with(self, lane: int, tokens: int, ring: Ring | None) -> int | None:
        """The length of the packed rows if a prompt of so many tokens joined this lane; None if it does not fit."""
        longest = max(*self.fill, self.fill[lane] + tokens)
        most = max(*self._count, self._count[lane] + 1)
        below = 0
        for size, segments in self._segments.items():
            if size >= longest and segments >= most:
                break
            below = size
        else:
            return None
        if size <= self._limit:
            return size
        # Long rows hold one prompt each, in rings that are longer than the next smaller row.
        rings = [p.ring for p in self.placed] + [ring]
        return size if most == 1 and all(r is None or r.length > below for r in rings) else None

    def add(self, lane: int, state: RequestState, ring: Ring | None, length: int) -> None:
        """Place a request, which takes a slot of the ring. length: as `length_with` says."""
        row = -1 if ring is None else ring.take(lane, state)
        self.placed.append(Placed(state, ring, row, lane, self._count[lane], self.fill[lane]))
        self.fill[lane] += len(state.prepared.input_ids)
        self._count[lane] += 1
        self.length = length

    def tokens(self, place_of: Callable[[bytes], int], places: int) -> PackedTokens:
        """The rows.

        Args:
            place_of: a tile's digest to its place in the pool of features.
            places: the length of the array of places.
        """
        ids = np.zeros((len(self.fill), self.length), np.int32)
        segment_ids = np.zeros_like(ids)
        wanted: list[int] = []
        for p in sorted(self.placed, key=lambda p: (p.lane, p.segment)):
            prepared = p.state.prepared
            columns = slice(p.start, p.start + p.length)
            ids[p.lane, columns] = prepared.input_ids
            segment_ids[p.lane, columns] = p.segment + 1
            wanted += [place_of(digest) for digest in prepared.digests]
        at = np.zeros((places,), np.int32)
        at[: len(wanted)] = wanted
        return PackedTokens(ids, segment_ids, at, np.asarray(len(wanted), np.int32))

    def arrays(self, place_of: Callable[[bytes], int], places: int) -> Packed:
        """The rows, with what is known of each prompt; arguments as in `tokens`."""
        lanes, segments = len(self.fill), self._segments[self.length]
        start, length = np.zeros((lanes, segments), np.int32), np.ones((lanes, segments), np.int32)
        requests = [_NO_PROMPT] * (lanes * segments)
        for p in self.placed:
            start[p.lane, p.segment], length[p.lane, p.segment] = p.start, p.length
            requests[p.lane * segments + p.segment] = p.state.request.params, p.state.sampling
        settings = jax.tree.map(lambda x: x.reshape(lanes, segments), RowSettings.of(requests))
        return Packed(self.tokens(place_of, places), start, length, settings)

    def rounds(self, ring: Ring) -> list[tuple[np.ndarray, ...]]:
        """Arguments (slot, segment), each (lanes,), of `programs.insert`: one prompt per lane at a time."""
        queues = [[p for p in self.placed if p.ring is ring and p.lane == lane] for lane in range(len(self.fill))]
        turns = itertools.zip_longest(*([(p.row, p.segment) for p in queue] for queue in queues), fillvalue=(-1, 0))
        return [tuple(np.asarray(column, np.int32) for column in zip(*turn, strict=True)) for turn in turns]
