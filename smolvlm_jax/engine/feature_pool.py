"""Which place of the device's feature pool holds which tile. Identical tiles share one, and stay until the place is needed."""

from collections import OrderedDict

__all__ = ["FeaturePlaces"]


class FeaturePlaces:
    """`capacity` places. A place is held while a request that is not yet prefilled needs it; afterwards it keeps its tile,
    for the next request with the same one, until a new tile takes the place that was left longest ago."""

    def __init__(self, capacity: int):
        self.capacity = capacity
        self._place: dict[bytes, int] = {}
        self._holders: dict[bytes, int] = {}
        self._idle: OrderedDict[bytes, None] = OrderedDict()  # encoded, held by nobody, oldest first
        self._free = list(range(capacity - 1, -1, -1))

    @property
    def room(self) -> int:
        """Places that a new tile could take now."""
        return len(self._free) + len(self._idle)

    def cost(self, digests) -> int:
        """How much `room` holding these tiles, each named once, would take."""
        return sum(digest not in self._holders for digest in digests)

    def place(self, digest: bytes) -> int:
        return self._place[digest]

    def hold(self, digest: bytes) -> bool:
        """Hold the tile's place, if it has one."""
        if digest not in self._place:
            return False
        self._holders[digest] = self._holders.get(digest, 0) + 1
        self._idle.pop(digest, None)
        return True

    def take(self, digest: bytes) -> int:
        """A place for a new tile, held once. There must be room."""
        if not self._free:
            old, _ = self._idle.popitem(last=False)
            self._free.append(self._place.pop(old))
        self._place[digest] = self._free.pop()
        self._holders[digest] = 1
        return self._place[digest]

    def release(self, digest: bytes) -> None:
        self._holders[digest] -= 1
        if not self._holders[digest]:
            del self._holders[digest]
            self._idle[digest] = None
