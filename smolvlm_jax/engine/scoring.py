"""How probable given continuations of prompts are: many of them in packed rows, each row run through the decoder once."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from .compiled import Programs
from .counters import Counters
from .feed import Feed
from .packing import Pack, Placed
from .programs import Targets, target_columns
from .requests import Score
from .rings import RequestState
from .tiles import TileFeatures

__all__ = ["Scorer"]

# Seconds to wait for another request before a row that still has room is run: a row costs the same however full it is.
_PATIENCE = 0.5


@dataclass(frozen=True)
class _Pass:
    """Packed rows under way on the device.

    Attributes:
        found: what `programs.score` returns.
        owners: (number of the request, where it stands, the first of its targets).
        since: when it was dispatched.
    """

    found: tuple[jax.Array, jax.Array]
    owners: list[tuple[int, Placed, int]]
    since: float


class Scorer:
    """Scores the requests of one call.

    Args:
        programs: of the engine.
        params: of the model.
        tiles: the engine's features.
        stats: the engine's counters.
        clock: seconds, without those of compilation.
    """

    def __init__(self, programs: Programs, params: Any, tiles: TileFeatures, stats: Counters, clock: Callable[[], float]):
        self._programs, self._params, self._tiles = programs, params, tiles
        self._stats, self._clock, self._config = stats, clock, programs.config
        self._waiting: list[tuple[int, RequestState]] = []
        self._under_way: list[_Pass] = []
        self._ready: dict[int, Score] = {}
        self._arrived = self._given = 0
        self._last_read = clock()

    def run(self, feed: Feed) -> Iterator[Score]:
        """Scores in the order of the requests, until there are none left."""
        while True:
            yield from self._receive(feed)
            run = bool(self._waiting) and (self._enough() or feed.exhausted or not self._under_way)
            if run:
                self._dispatch()
            while len(self._under_way) > (self._config.run_ahead if run else 0):
                self._read(self._under_way.pop(0))
            yield from self._next()
            if feed.exhausted and not (self._waiting or self._under_way):
                return

    def _next(self) -> Iterator[Score]:
        """Scores whose turn it is."""
        while self._given in self._ready:
            self._given += 1
            yield self._ready.pop(self._given - 1)

    # ---- requests to rows

    def _enough(self) -> bool:
        """Whether what waits fills the rows of two passes, or is as much as may be read ahead."""
        states = [state for _, state in self._waiting]
        return (
            sum(len(state.prepared.input_ids) for state in states) >= 2 * self._config.lanes * self._config.prefill_tokens
            or len(states) >= self._config.lookahead
            or sum(state.prepared.nbytes for state in states) >= self._config.lookahead_bytes // 2
        )

    def _receive(self, feed: Feed) -> Iterator[Score]:
        """Take what has arrived. While the device has nothing to do, wait for an arrival, and a while for more of them."""
        while not self._enough():
            idle = not self._under_way
            state = feed.take(wait=idle and not self._waiting, patience=_PATIENCE if idle else 0.0)
            if state is None:
                return
            self._arrived += 1
            if state.error is None:
                self._waiting.append((self._arrived - 1, state))
            else:
                self._stats.errors += 1
                self._ready[self._arrived - 1] = state.score()
                yield from self._next()

    def _dispatch(self) -> None:
        """Run one packed row per lane. The request that waits longest is part of it, and others that fit are added."""
        lanes = range(self._config.lanes)
        pack = Pack(len(lanes), {t: t for t in self._programs.buckets}, self._config.prefill_tokens)
        numbers: list[int] = []
        for number, state in list(self._waiting):
            lane = min(lanes, key=pack.fill.__getitem__)
            length = pack.length_with(lane, len(state.prepared.input_ids), None)
            if length is None:
                continue
            if not self._tiles.hold(state):
                break
            self._waiting.remove((number, state))
            pack.add(lane, state, None, length)
            numbers.append(number)
        begin = self._clock()
        if self._tiles.new:
            self._tiles.look_ahead(state for _, state in self._waiting)
            self._tiles.encode()
        t = pack.length
        targets, firsts = _targets(pack, t)
        tokens = pack.tokens(self._tiles.place, self._programs.places(t))
        found = self._programs.get("score", t)(self._params, self._tiles.pool, tokens, targets)
        for array in found:
            array.copy_to_host_async()
        if not self._under_way:
            self._stats.device_idle_seconds += begin - self._last_read
        self._under_way.append(_Pass(found, list(zip(numbers, pack.placed, firsts, strict=True)), begin))
        self._stats.prompt_tokens += sum(pack.fill)
        self._stats.prefill_columns += t * len(lanes)
        for placed in pack.placed:
            self._stats.tiles += len(placed.state.prepared.tiles)
            self._tiles.release(placed.state)
            placed.state.forget_pixels()

    # ---- rows to scores

    def _read(self, done: _Pass) -> None:
        """Wait for a pass, and make scores of it."""
        logprobs, best = jax.device_get(done.found)
        now = self._clock()
        self._stats.prefill_seconds += now - max(done.since, self._last_read)
        self._last_read = now
        for number, placed, first in done.owners:
            own = placed.lane, slice(first, first + len(placed.state.continuation))
            self._ready[number] = placed.state.score(logprobs[own].tolist(), greedy=bool(best[own].all()))
            self._stats.requests += 1
            self._stats.scored_tokens += len(placed.state.continuation)


def _targets(pack: Pack, t: int) -> tuple[Targets, list[int]]:
    """What is scored in packed rows of `t` tokens, and where in `Targets` each of the placed requests has its first token."""
    shape = len(pack.fill), target_columns(t)
    column, token = np.zeros(shape, np.int32), np.full(shape, -1, np.int32)
    used, firsts = [0] * len(pack.fill), []
    for p in pack.placed:
        wanted, at = p.state.continuation, used[p.lane]
        own = p.lane, slice(at, at + len(wanted))
        # The last token of the prompt predicts the first of the continuation, whose own last token is not in the row.
        column[own] = p.start + p.length - len(wanted) + np.arange(len(wanted))
        token[own] = wanted
        firsts.append(at)
        used[p.lane] += len(wanted)
    return Targets(column, token, np.asarray(max(used), np.int32)), firsts
