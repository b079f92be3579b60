"""Which place of the device's feature pool holds which tile. Identical tiles share one."""

from collections import OrderedDict
from collections.abc import Collection

__all__ = ["FeaturePlaces"]


class FeaturePlaces:
    """Places for the features of tiles, found by the tiles' digests.

    A place is held while a request that is not yet prefilled needs it. Afterwards it keeps its tile for later requests with an
    identical one. A new tile takes a free place, or else the one that was released longest ago.

    Attributes:
        capacity: the number of places.
    """

    def __init__(self, capacity: int):
        self.capacity = capacity
        self._place: dict[bytes, int] = {}
        self._holders: dict[bytes, int] = {}
        self._idle: OrderedDict[bytes, None] = OrderedDict()  # encoded and not held, oldest first
        self._free = list(range(capacity - 1, -1, -1))

    @property
    def room(self) -> int:
        """The number of places that new tiles can take now."""
        return len(self._free) + len(self._idle)

    def place(self, digest: bytes) -> int:
        """The place of a tile that has one."""
        return self._place[digest]

    def hold(self, digests: Collection[bytes], *, spare: int = 0) -> list[bytes] | None:
        """Hold a place for each of these tiles, if that leaves `spare` places for new ones.

        Args:
            digests: each tile once.
            spare: a number of places.

        Returns:
            Those that had no place and must be encoded. None, and nothing held, if there is too little room.
        """
        if sum(digest not in self._holders for digest in digests) + spare > self.room:
            return None
        new = [digest for digest in digests if digest not in self._place]
        # Tiles that have a place come first: a new one may take the place of a tile that is not held.
        for digest in digests:
            self._holders[digest] = self._holders.get(digest, 0) + 1
            self._idle.pop(digest, None)
        for digest in new:
            if not self._free:
                old, _ = self._idle.popitem(last=False)
                self._free.append(self._place.pop(old))
            self._place[digest] = self._free.pop()
        return new

    def release(self, digest: bytes) -> None:
        """Hold the place of this tile once less."""
        self._holders[digest] -= 1
        if not self._holders[digest]:
            del self._holders[digest]
            self._idle[digest] = None
