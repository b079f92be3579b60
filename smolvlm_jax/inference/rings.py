"""The host's picture of the rings: which request sits in which slot, and how many steps it can still take."""

import time
from dataclasses import dataclass, field

from .feed import Arrival
from .finish import Ending

__all__ = ["Active", "Ring"]


@dataclass(eq=False)
class Active:
    """A request that is being answered. left: decode steps it can still take at most, counting those under way."""

    arrival: Arrival
    ending: Ending
    left: int
    started: float = field(default_factory=time.perf_counter)
    done: bool = False


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
        self.owner[lane * self.per_lane + row] = active
        return row

    def give(self, slot: int) -> None:
        self.owner[slot] = None
        lane, row = divmod(slot, self.per_lane)
        self._free[lane].append(row)

    def steps(self, chunk: int, wanted: bool) -> int:
        """Steps to run next: to the next certain end of a row if its slot is wanted, else to the last one."""
        left = [active.left for active in self.owner if active is not None]
        return min(chunk, min(left) if wanted else max(left))

    def columns(self) -> int:
        """Columns of the cache that the rows of live requests use."""
        return sum(len(a.arrival.prepared.input_ids) + len(a.ending.tokens) for _, a in self.live())
