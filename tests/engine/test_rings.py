"""The host's picture of the slots."""

import numpy as np
import pytest

from smolvlm_jax.engine import Prepared, Request, SamplingParams
from smolvlm_jax.engine.finish import Ending
from smolvlm_jax.engine.rings import RequestState, Ring
from smolvlm_jax.generation_config import Sampling


def waiting(left: int) -> RequestState:
    """A request that can take so many decode steps."""
    request = Request(0, prepared=Prepared.of(np.ones((1,), np.int32)), params=SamplingParams(left + 1))
    return RequestState(request, request.prepared, Sampling(), Ending(request.params, frozenset(), str))


def filled(rng, slots, lanes):
    """A ring with some rows, and them."""
    ring = Ring(256, slots=slots, lanes=lanes)
    rows = []
    for lane in range(lanes):
        for _ in range(rng.integers(0, slots // lanes + 1)):
            rows.append(waiting(int(rng.integers(1, 50))))
            ring.take(lane, rows[-1])
    return ring, rows


@pytest.mark.parametrize("seed", range(5))
def test_the_lowest_free_slot_of_a_lane_is_taken(seed):
    rng = np.random.default_rng(seed)
    ring = Ring(256, slots=12, lanes=2)
    for _ in range(200):
        lane = int(rng.integers(2))
        taken = [slot for slot, _ in ring.live() if slot // 6 == lane]
        if taken and (len(taken) == 6 or rng.random() < 0.5):
            ring.give(int(rng.choice(taken)))
        else:
            free = set(range(6)) - {slot % 6 for slot in taken}
            assert ring.take(lane, waiting(3)) == min(free)
        assert ring.idle == 12 - len(ring.live())


@pytest.mark.parametrize("seed", range(20))
def test_a_chunk_ends_as_soon_as_enough_rows_have(seed):
    rng = np.random.default_rng(seed)
    ring, rows = filled(rng, 24, 4)
    if not rows:
        return
    for wanted in range(len(rows) + 1):
        steps = ring.steps(chunk=16, wanted=wanted)
        ended = lambda steps: sum(row.steps_left <= steps for row in rows)
        assert 1 <= steps <= 16
        assert steps == 16 or ended(steps) >= (wanted or len(rows)), "no chunk shorter than it must be"
        assert ended(steps - 1) < (wanted or len(rows)), "and none longer"


@pytest.mark.parametrize("seed", range(5))
def test_slots_are_given_and_taken_back_once(seed):
    rng = np.random.default_rng(seed)
    ring, rows = filled(rng, 24, 4)
    slots = [row.slot.row for row in rows]
    assert len(set(slots)) == len(rows) and [ring.owner[slot] for slot in slots] == rows
    assert ring.idle == 24 - len(rows) and {active for _, active in ring.live()} == set(rows)
    gone = [row for row in rows if rng.random() < 0.5]
    for row in gone * 2:
        row.leave()
    assert ring.idle == 24 - len(rows) + len(gone) and not any(active in gone for active in ring.owner if active)
    taken = [waiting(1) for _ in gone]
    for active, row in zip(taken, gone, strict=True):
        lane = next(lane for lane in range(4) if ring.free(lane))
        ring.take(lane, active)
        assert row.slot is None
    assert ring.idle == 24 - len(rows)
