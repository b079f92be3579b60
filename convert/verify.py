"""Compare two checkpoints, tensor by tensor and stage by stage, in any two of the formats that can be opened."""

import dataclasses
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from ..errors import InputError
from ..habits import named_arguments
from ..locate import is_hub_id
from ..progress import Progress
from ..terminal import say
from .chunks import chunk_regions
from .leaves import Leaf, own, total_bytes
from .opened import Checkpoint, open_checkpoint
from .progress import ByteCount
from .quantized import DequantizedLeaf
from .rules import torch_name

__all__ = ["Report", "TensorRow", "compare_tensors", "verify"]

_BLOCK = 8 << 20
# Of a channel in 8 bits, the largest difference in steps that rounding explains, with that of the arithmetic in float32.
HALF_STEP = 0.5001


@dataclass(frozen=True)
class TensorRow:
    """One tensor on both sides.

    Attributes:
        name, path: as PyTorch and as we call it.
        status: "equal" (bit for bit), "rounded" (equal once the wider is rounded to the narrower dtype), "quantized"
            (one side is in 8 bits, and every value is within half a step of it), "different", "misshapen", "only in A" or
            "only in B".
        shapes, dtypes: in A and in B, in our layout.
        different: how many values differ.
        max_abs, mean_abs: of the differences, in float64; NaN where a value is NaN on one side only.
        where: index of the largest difference, in our layout.
        steps: largest difference over the step of its channel, where one side is in 8 bits.
        relative: there, the root mean square of the differences over that of the values.
    """

    name: str
    path: str
    status: str
    shapes: tuple[tuple[int, ...] | None, tuple[int, ...] | None]
    dtypes: tuple[str | None, str | None]
    different: int = 0
    max_abs: float = 0.0
    mean_abs: float = 0.0
    where: tuple[int, ...] | None = None
    steps: float = 0.0
    relative: float = 0.0

    @property
    def good(self) -> bool:
        return self.status in ("equal", "rounded", "quantized")


@dataclass
class Report:
    """The outcome of `verify`.

    Attributes:
        a, b: the names of the checkpoints.
        tensors: one row for each.
        notes: what else a reader should know, such as settings that differ.
        damage: what of A or B is not what its own checksums say, a line for each array.
        stages: a `stages.StageReport`, or None if stages were not asked for.
    """

    a: str
    b: str
    tensors: list[TensorRow]
    notes: list[str] = field(default_factory=list)
    damage: list[str] = field(default_factory=list)
    stages: Any = None

    @property
    def same(self) -> bool:
        """Whether every tensor agrees, nothing is damaged, and every stage agrees if stages were run."""
        return all(row.good for row in self.tensors) and not self.damage and (self.stages is None or self.stages.same)

    def to_dict(self) -> dict[str, Any]:
        """Everything, for JSON, where numbers that are infinite or NaN become strings."""
        stages = None if self.stages is None else self.stages.to_dict()
        return _strict({**asdict(self), "same": self.same, "stages": stages})


def _strict(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def compare_leaves(path: str, a: Leaf | None, b: Leaf | None) -> TensorRow:
    """Compare the parameter of one path on both sides, block by block."""
    row = TensorRow(
        name=torch_name(path)[0],
        path=path,
        status="equal",
        shapes=(None if a is None else a.shape, None if b is None else b.shape),
        dtypes=(_dtype_name(a), _dtype_name(b)),
    )
    if a is None or b is None:
        return replace(row, status="only in B" if a is None else "only in A")
    if a.shape != b.shape:
        return replace(row, status="misshapen")
    if isinstance(a, DequantizedLeaf) and not isinstance(b, DequantizedLeaf):
        return _compare_steps(row, b, a)
    if isinstance(b, DequantizedLeaf) and not isinstance(a, DequantizedLeaf):
        return _compare_steps(row, a, b)
    narrow = min(a.dtype, b.dtype, key=lambda dtype: dtype.itemsize)
    left, right = a.borrow(), b.borrow()
    rows = max(1, _BLOCK // max(1, a.nbytes // a.shape[0]))
    different, total, largest, where = 0, 0.0, -1.0, None
    for region in chunk_regions(a.shape, (rows, *a.shape[1:])):
        x, y = own(left[region], narrow), own(right[region], narrow)
        bits = x.view(f"u{narrow.itemsize}") != y.view(f"u{narrow.itemsize}")
        if not bits.any():
            continue
        gap = np.abs(own(left[region], np.dtype(np.float64)) - own(right[region], np.dtype(np.float64)))
        gap = np.where(bits, gap, 0.0)  # NaN against the same NaN is no difference
        different += int(bits.sum())
        total += float(gap.sum())
        place = np.unravel_index(int(np.argmax(gap)), gap.shape)  # argmax finds a NaN before any number
        if not gap[place] <= largest:
            largest = float(gap[place])
            where = tuple(int(part.start + number) for part, number in zip(region, place, strict=True))
    if different:
        mean = total / math.prod(a.shape)
        return replace(row, status="different", different=different, max_abs=largest, mean_abs=mean, where=where)
    return row if a.dtype == b.dtype else replace(row, status="rounded")


def _dtype_name(leaf: Leaf | None) -> str | None:
    return None if leaf is None else "int8" if isinstance(leaf, DequantizedLeaf) else leaf.dtype.name


def _compare_steps(row: TensorRow, exact: Leaf, ours: DequantizedLeaf) -> TensorRow:
    """Compare a parameter with the same in 8 bits, in steps of its channels."""
    wide = np.dtype(np.float32)
    x, step = exact.read(dtype=wide), ours.scale.read(dtype=wide)
    gap = np.abs(ours.read(dtype=wide) - x)
    steps = gap / step
    worst, total = float(steps.max()), float(np.square(x, dtype=np.float64).sum())
    return replace(
        row,
        status="quantized" if worst <= HALF_STEP else "different",
        different=int((gap != 0).sum()),
        max_abs=float(gap.max()),
        mean_abs=float(gap.mean(dtype=np.float64)),
        where=tuple(int(number) for number in np.unravel_index(int(np.argmax(steps)), x.shape)),
        steps=worst,
        relative=math.sqrt(float(np.square(gap, dtype=np.float64).sum()) / total) if total else 0.0,
    )


def _drift(rows: Sequence[TensorRow]) -> list[str]:
    """What rounding to 8 bits has changed, in words."""
    found = [row for row in rows if "int8" in row.dtypes and row.steps]
    if not found:
        return []
    worst, mean = max(row.steps for row in found), sum(row.relative for row in found) / len(found)
    most = max(found, key=lambda row: row.relative)
    return [
        f"{len(found)} tensors are in 8 bits on one side: values differ by at most {worst:.3f} of a channel's step (the bound "
        f"is 0.5); root mean square of the differences over that of the values: {mean:.2%} on average, {most.relative:.2%} at "
        f"most ({most.name})"
    ]


def compare_tensors(a: Checkpoint, b: Checkpoint, progress: Callable[[int], object]) -> list[TensorRow]:
    """All tensors of both, in A's order, then those that only B has. `progress` is told of the bytes of A."""
    rows = []
    for path in dict.fromkeys([*a.leaves, *b.leaves]):
        left = a.leaves.get(path)
        rows.append(compare_leaves(path, left, b.leaves.get(path)))
        progress(0 if left is None else left.nbytes)
    return rows


def compare_settings(a: Checkpoint, b: Checkpoint) -> list[str]:
    """Differences of config and companion files, in words."""
    notes = []
    for part in ("text_config", "vision_config", None):
        left = getattr(a.model_config, part) if part else a.model_config
        right = getattr(b.model_config, part) if part else b.model_config
        for item in dataclasses.fields(left):
            if not item.compare or item.name in ("text_config", "vision_config"):
                continue
            x, y = getattr(left, item.name), getattr(right, item.name)
            if x != y:
                notes.append(f"config {part + '.' if part else ''}{item.name}: A has {x!r}, B has {y!r}")
    for name in sorted({*a.companions, *b.companions}):
        if name not in a.companions or name not in b.companions:
            notes.append(f"{name}: only in {'A' if name in a.companions else 'B'}")
        elif a.companions[name].read_bytes() != b.companions[name].read_bytes():
            notes.append(f"{name}: differs")
    return notes


def check_sides(a: Checkpoint, b: Checkpoint, report: Report) -> None:
    """Compare both with their own checksums, where they have any."""
    for side, opened in (("A", a), ("B", b)):
        damage = opened.damage()
        if damage:
            report.damage += [f"{side}: {line}" for line in damage]
        elif damage is None and opened.kind == "orbax":
            report.notes.append(f"{side} has no checksums of its arrays")


@named_arguments
def verify(
    a: str | os.PathLike,
    b: str | os.PathLike,
    *,
    stages: bool = False,
    revision: str | None = None,
    position_ids: str | None = None,
    quiet: bool = False,
    notify: Callable[[str], None] = say,
    progress: Progress | None = None,
) -> Report:
    """Compare two checkpoints, and each with its own checksums.

    Args:
        a, b: as the source of `convert`.
        stages: also run the models over built-in prompts and a built-in picture, and compare every stage.
        revision: branch, tag or commit of Hub ids.
        position_ids: with `stages`, the rule for the encoder's position ids in our runs, "intended" (default) or
            "transformers-4.56".
        quiet: show no progress.
        notify: called with a line before each run.
        progress: where progress is shown, which this call closes; default: one of its own, unless `quiet`.

    Returns:
        What was compared; `same` says whether everything agrees.

    Raises:
        CheckpointError, ConfigError: one of them cannot be opened.
        InputError: `stages` is asked for, and they describe different models; `position_ids` is given without `stages`;
            there is a revision, and neither is a Hub id.
    """
    if position_ids is not None and not stages:
        raise InputError("position_ids is of the runs that stages compares: add --stages (stages=True), or leave it out")
    if revision is not None and not (is_hub_id(a) or is_hub_id(b)):
        raise InputError(f"neither {a} nor {b} has a revision {revision!r}: only models of the Hub have revisions")
    of = {side: revision if is_hub_id(side) else None for side in (a, b)}
    shown = Progress(show=not quiet) if progress is None else progress
    shown.tell(f"reading {a} and {b}")
    with shown, open_checkpoint(a, revision=of[a]) as left, open_checkpoint(b, revision=of[b]) as right:
        settings = compare_settings(left, right)
        if stages:
            from .stages import check_comparable, compare_stages

            check_comparable(left, right, settings)
        with left.unchanged(), right.unchanged():
            bar = ByteCount(shown, "comparing the tensors", total_bytes(left.leaves))
            report = Report(left.name, right.name, compare_tensors(left, right, bar.update), settings)
            report.notes += _drift(report.tensors)
            shown.tell("comparing the tensors with their checksums")
            check_sides(left, right, report)
        if stages:

            def running(line: str) -> None:
                shown.tell(line)
                notify(line)

            report.stages = compare_stages(left, right, position_ids=position_ids or "intended", notify=running)
        return report
