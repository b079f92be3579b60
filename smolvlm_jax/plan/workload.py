"""From the costs of the engine's programs to records a second. Imports no jax."""

from collections.abc import Sequence

from .chips import Chip
from .figures import Cost, Rate
from .settings import Workload

__all__ = ["rate_of", "record_seconds", "slow_seconds"]

# Of its peak and of its bandwidth, what a GPU is taken to reach at the lower bound: its compiler estimates none.
GPU_PEAK_SHARE = 0.4
GPU_BANDWIDTH_SHARE = 0.7


def record_seconds(
    costs: Sequence[Cost], seconds: Sequence[float], work: Workload, *, lanes: int, slots: int, tiles: int, row: int
) -> dict[str, float]:
    """The chips' time for one record, by kind of program, when there are always records waiting.

    Args:
        costs: of the programs that the workload runs.
        seconds: that a call of each takes; of a decode program, a step.
        work: what a record is.
        lanes: shards of the batch.
        slots: rows that decode together, on all chips.
        tiles: that a call of the encoder takes, on all chips.
        row: tokens of a packed row, one for each lane in a call of prefill.
    """
    # A prompt is never divided between rows.
    calls = {
        "encode": work.tiles / tiles,
        "prefill": 1 / (lanes * max(row // work.prompt, 1)),
        "insert": 1 / lanes,
        "decode": (work.new - 1) / slots,
    }
    found: dict[str, float] = {}
    for cost, taken in zip(costs, seconds, strict=True):
        kind = cost.name.split()[0]
        found[kind] = found.get(kind, 0.0) + calls[kind] * taken
    return found


def rate_of(costs: Sequence[Cost], chip: Chip, work: Workload, **shape: int) -> Rate | None:
    """Records a second between two bounds; None where a program's time is not known.

    Args:
        costs: of the programs that the workload runs.
        chip: that they run on.
        work: what a record is.
        **shape: lanes, slots, tiles and row, as `record_seconds` takes them.
    """
    floors = [cost.floor_seconds for cost in costs if cost.floor_seconds is not None]
    slow = [seconds for cost in costs if (seconds := slow_seconds(cost, chip)) is not None]
    if len(floors) < len(costs):
        return None
    best = record_seconds(costs, floors, work, **shape)
    worst = record_seconds(costs, slow, work, **shape) if len(slow) == len(costs) else None
    slower = worst or best
    total = sum(slower.values())
    return Rate(
        low=None if worst is None else 1 / total,
        high=1 / sum(best.values()),
        shares={kind: value / total for kind, value in slower.items()},
        assumptions=(
            f"{work.tiles} tiles, {work.prompt:,} prompt tokens and {work.new:,} new tokens a record, all tiles different",
            f"all {shape['slots']:,} slots taken, and records prepared faster than the chips take them",
            "high: every program at the chip's peak or its bandwidth, whichever takes longer",
            "low: not known, for the chip's clock is not" if worst is None else low_assumption(chip),
        ),
    )


def slow_seconds(cost: Cost, chip: Chip) -> float | None:
    """The time of a program at the lower bound."""
    if chip.platform == "tpu":
        return cost.estimated_seconds
    return max(cost.flops / (GPU_PEAK_SHARE * chip.flops), cost.bytes / (GPU_BANDWIDTH_SHARE * chip.bandwidth))


def low_assumption(chip: Chip) -> str:
    """What the lower bound rests on."""
    if chip.platform == "tpu":
        return "low: every program takes the compiler's cycles or its bytes over the bandwidth, whichever takes longer"
    return f"low: every program reaches {GPU_PEAK_SHARE:.0%} of the peak or {GPU_BANDWIDTH_SHARE:.0%} of the bandwidth"
