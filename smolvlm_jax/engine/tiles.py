"""Tiles of requests on their way into the encoder, and their features on the device."""

from collections.abc import Iterable
from typing import Any

import jax
import numpy as np

from ..pictures import encoder_batches
from .compiled import Programs
from .counters import Counters
from .feature_pool import FeaturePlaces
from .rings import RequestState

__all__ = ["TileFeatures"]


class TileFeatures:
    """The device's pool of features, identical tiles once, and what is still to be encoded.

    Attributes:
        pool: (P, tokens, d) on the device, from the first use on.
        new: tiles by their digests that have a place in the pool and no features there yet.
    """

    def __init__(self, programs: Programs, params: Any, stats: Counters):
        self._programs, self._params, self._stats = programs, params, stats
        self._capacity = programs.config.feature_places
        self.reset()

    def reset(self) -> None:
        """Forget everything, also what is on the device."""
        self._places = FeaturePlaces(self._capacity)
        self._pool: jax.Array | None = None
        self.new: dict[bytes, np.ndarray] = {}

    @property
    def pool(self) -> jax.Array:
        """The features on the device."""
        if self._pool is None:
            self._pool = self._programs.get("pool")()
        return self._pool

    def place(self, digest: bytes) -> int:
        """Where in the pool a tile's features are, or will be once it is encoded."""
        return self._places.place(digest)

    def hold(self, state: RequestState, spare: int = 0) -> bool:
        """Hold a place for each of the request's tiles, noting in `new` what must be encoded; False, and nothing held, if that
        leaves less than `spare` places."""
        prepared = state.prepared
        if state.held or not prepared.digests:
            return True
        unique = dict(zip(prepared.digests, prepared.tiles, strict=True))
        found = self._places.hold(unique, spare=spare)
        if found is None:
            return False
        state.held = list(unique)
        self.new.update((digest, unique[digest]) for digest in found)
        return True

    def release(self, state: RequestState) -> None:
        """The request's tiles have been read."""
        for digest in state.held:
            self._places.release(digest)
        state.held.clear()

    def look_ahead(self, waiting: Iterable[RequestState]) -> None:
        """Fill the encoder's last batch with tiles of requests that wait, as long as half of the places stay free for those
        that come first."""
        most = self._programs.encoder_batches()[0]
        for state in waiting:
            if len(self.new) % most == 0 or len(self.new) + len(state.prepared.tiles) > -(-len(self.new) // most) * most:
                return
            if not self.hold(state, self._capacity // 2):
                return

    def encode(self) -> None:
        """Encode what is new in batches of the sizes there are programs for, the largest first: only the last may need
        padding."""
        left = list(self.new)
        for size in encoder_batches(len(left), self._programs.encoder_batches()):
            now, left = left[:size], left[size:]
            batch = np.zeros((size, *self._programs.model.config.vision_config.tile_shape), np.uint8)
            batch[: len(now)] = np.stack([self.new[digest] for digest in now])
            nowhere = [self._capacity] * (size - len(now))
            places = np.asarray([self.place(digest) for digest in now] + nowhere, np.int32)
            self._pool = self._programs.get("encode", size)(self._params, self.pool, batch, places)
            self._stats.encoded_tiles += len(now)
            self._stats.encoder_rows += size
        self.new = {}
