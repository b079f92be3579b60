"""The host's view of the rings: the requests that are being answered, and the slot of a ring that each has."""

from __future__ import annotations

import bisect
import math
import operator
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from ..decoding import DecodeState
from ..generation_config import Sampling
from .finish import Ending
from .requests import Prepared, Request, Result, Score

__all__ = ["RequestState", "Ring", "Slot"]


class Slot(NamedTuple):
    """A slot of a ring: the number of its row there."""

    ring: Ring
    row: int


@dataclass(eq=False)
class RequestState:
    """A request from its arrival to its result.

    Attributes:
        request: as it was asked, with the limit on new tokens that its prompt leaves room for.
        prepared: its arrays; empty where there is an error.
        sampling: how its tokens are drawn, with the checkpoint's defaults.
        ending: its answer, and whether that has ended.
        error: why it cannot be answered.
        held: digests of the tiles whose places in the feature pool it holds.
        slot: None before it has one, and after it needs none any more.
        started: when it was admitted, by `time.perf_counter`.
        continuation: what is to be scored; the prompt's ids are then followed by all of it but its last token.
        steps_left: decode steps that it can still take at most, those that are not under way yet.
    """

    request: Request
    prepared: Prepared
    sampling: Sampling
    ending: Ending
    error: str | None = None
    held: list[bytes] = field(default_factory=list)
    slot: Slot | None = None
    started: float = 0.0
    continuation: tuple[int, ...] = ()
    steps_left: int = field(init=False)

    def __post_init__(self):
        self.steps_left = self.request.params.max_new_tokens - 1

    @property
    def columns(self) -> int:
        """Columns of a cache that the prompt and the answer so far take."""
        return len(self.prepared.input_ids) + len(self.ending.tokens)

    def forget_pixels(self) -> None:
        """Drop the tiles, which are features on the device by now, and whatever they were made of."""
        self.prepared = self.prepared.without_pixels()
        self.request = replace(self.request, messages=None, prepared=self.prepared)

    def leave(self) -> None:
        """Give the slot back, if there is one. A request's end may be known twice: from its limit, and from its tokens."""
        if self.slot is not None:
            slot, self.slot = self.slot, None
            slot.ring.give(slot.row)

    def result(self) -> Result:
        """The answer, or the error."""
        failed = self.error is not None
        asked = None if failed else self.request.params.logprobs
        measured = self.ending.logprobs
        return Result(
            id=self.request.id,
            text=None if failed else self.ending.text(),
            error=self.error,
            finish_reason="error" if failed else str(self.ending.reason),
            prompt_tokens=len(self.prepared.input_ids),
            new_tokens=len(self.ending.tokens),
            tiles=len(self.prepared.tiles),
            token_ids=tuple(self.ending.tokens),
            seconds=0.0 if failed else time.perf_counter() - self.started,
            logprobs=None if asked is None else tuple(value for value, _ in measured),
            top_logprobs=tuple(best for _, best in measured) if asked else None,
        )

    def score(self, logprobs: Sequence[float] = (), *, greedy: bool = False) -> Score:
        """How probable the continuation is, from the log-probabilities of its tokens; or the error."""
        failed = self.error is not None
        return Score(
            id=self.request.id,
            loglikelihood=None if failed else math.fsum(logprobs),
            is_greedy=None if failed else greedy,
            error=self.error,
            prompt_tokens=len(self.prepared.input_ids) - max(len(self.continuation) - 1, 0),
            tiles=len(self.prepared.tiles),
            token_ids=self.continuation,
            logprobs=tuple(logprobs),
        )


class Ring:
    """Slots of one length class. The slots of lane d are d·n, …, d·n + n - 1.

    Attributes:
        length: columns of the cache.
        lanes: shards of the batch.
        owner: the request in each slot.
        state: on the device, from the first request on.
    """

    def __init__(self, length: int, *, slots: int, lanes: int):
        self.length, self.lanes = length, lanes
        self.per_lane = slots // lanes
        self.owner: list[RequestState | None] = [None] * slots
        self.state: DecodeState | None = None
        self._free = [list(range(self.per_lane - 1, -1, -1)) for _ in range(lanes)]

    @property
    def slots(self) -> int:
        return len(self.owner)

    def free(self, lane: int) -> int:
        """Free slots of a lane."""
        return len(self._free[lane])

    @property
    def idle(self) -> int:
        """Free slots of all lanes."""
        return sum(map(len, self._free))

    def live(self) -> list[tuple[int, RequestState]]:
        """The slots that are taken, and by which request."""
        return [(slot, state) for slot, state in enumerate(self.owner) if state is not None]

    def take(self, lane: int, state: RequestState) -> int:
        """Give the request a slot of the lane; returns the slot's number within the lane."""
        row = self._free[lane].pop()
        slot = lane * self.per_lane + row
        self.owner[slot], state.slot = state, Slot(self, slot)
        return row

    def give(self, slot: int) -> None:
        """Take a slot back."""
        self.owner[slot] = None
        lane, row = divmod(slot, self.per_lane)
        bisect.insort(self._free[lane], row, key=operator.neg)  # the lowest is taken first

    def steps(self, *, chunk: int, wanted: int) -> int:
        """Steps to run next, at most `chunk`: until `wanted` more slots are certain to be free, with 0 until all are."""
        left = sorted(state.steps_left for _, state in self.live())
        return min(chunk, left[wanted - 1] if wanted else left[-1])

    def columns(self) -> int:
        """Columns of the cache that the rows of live requests use."""
        return sum(state.columns for _, state in self.live())
