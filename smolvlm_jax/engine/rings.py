"""The host's picture of the rings: which request sits in which slot, and how many steps it can still take."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from ..generation_config import Sampling
from .feed import Arrival
from .finish import Ending

__all__ = ["Active", "Ring"]


@dataclass(eq=False)
class Active:
    """A request that is being answered. left: decode steps it can still take at most, counting those under way. seat: the
    ring and the slot that it has, None when it needs none any more."""

    arrival: Arrival
    sampling: Sampling
    ending: Ending
    left: int
    seat: tuple[Ring, int] | None = None
    started: float = field(default_factory=time.perf_counter)
    done: bool = False

    def leave(self) -> None:
        """Give the slot back, if the request still has one: that it ends may be known twice, by its limit and by its tokens."""
        if self.seat is not None:
            (ring, slot), self.seat = self.seat, None
            ring.give(slot)


class Ring:
    """Slots of one length class. The slots of lane d are d·n, …, d·n + n - 1."""

    def __init__(self, length: int, slots: int, lanes: int):
        self.length, self.lanes = length, lanes
        self.per_lane = slots // lanes
        self.owner: list[Active | None] = [None] * slots
        self.state = None  # on the device, from the first request on
        self._free = [list(range(self.per_lane - 1, -1, -1)) for _ in range(lanes)]

    @property
    def slots(self) -> int:
        return len(self.owner)

    def free(self, lane: int) -> int:
        return len(self._free[lane])

    @property
    def idle(self) -> int:
        return sum(map(len, self._free))

    def live(self) -> list[tuple[int, Active]]:
        return [(slot, active) for slot, active in enumerate(self.owner) if active is not None]

    def take(self, lane: int, active: Active) -> int:
        """Give the request a slot of the lane; returns the slot's number within the lane."""
        row = self._free[lane].pop()
        slot = lane * self.per_lane + row
        self.owner[slot], active.seat = active, (self, slot)
        return row

    def give(self, slot: int) -> None:
        self.owner[slot] = None
        lane, row = divmod(slot, self.per_lane)
        self._free[lane].append(row)

    def steps(self, chunk: int, wanted: int) -> int:
        """Steps to run next: until `wanted` more slots are certain to be free, or with 0 until all are."""
        left = sorted(active.left for active in self.owner if active is not None)
        return min(chunk, left[wanted - 1] if wanted else left[-1])

    def columns(self) -> int:
        """Columns of the cache that the rows of live requests use."""
        return sum(len(a.arrival.prepared.input_ids) + len(a.ending.tokens) for _, a in self.live())
