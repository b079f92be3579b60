"""Compare two checkpoints, tensor by tensor and stage by stage, in any two of the formats that can be opened."""

import dataclasses
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..io import say
from .chunks import chunk_regions
from .leaves import Leaf, own
from .progress import Progress
from .rules import torch_name
from .source import Source, open_source

__all__ = ["Report", "TensorRow", "compare_tensors", "verify"]

_BLOCK = 8 << 20


@dataclass(frozen=True)
class TensorRow:
    """One tensor on both sides. status: "equal" (bit for bit), "rounded" (equal once the wider is rounded to the narrower
    dtype), "different", "misshapen", "only in A" or "only in B".

    different: how many values differ. max_abs, mean_abs: of the differences, in float64; NaN where a value is NaN on one side.
    where: index of the largest difference, in our layout.
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

    @property
    def good(self) -> bool:
        return self.status in ("equal", "rounded")


@dataclass
class Report:
    """The outcome of `verify`. stages: a `stages.StageReport`, or None if stages were not asked for. notes: what else a reader
    should know, such as settings that differ."""

    a: str
    b: str
    tensors: list[TensorRow]
    notes: list[str] = field(default_factory=list)
    stages: Any = None

    @property
    def same(self) -> bool:
        """Whether every tensor agrees, and every stage if stages were run."""
        return all(row.good for row in self.tensors) and (self.stages is None or self.stages.same)

    def to_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON: what is infinite or NaN is a string there."""
        return _strict(
            {
                "a": self.a,
                "b": self.b,
                "same": self.same,
                "notes": self.notes,
                "tensors": [dataclasses.asdict(row) for row in self.tensors],
                "stages": None if self.stages is None else self.stages.to_dict(),
            }
        )


def _strict(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def compare_leaves(a: Leaf, b: Leaf) -> TensorRow:
    """Compare two parameters of one path, block by block."""
    facts = dict(name=torch_name(a.path)[0], path=a.path, shapes=(a.shape, b.shape), dtypes=(a.dtype.name, b.dtype.name))
    if a.shape != b.shape:
        return TensorRow(status="misshapen", **facts)
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
        size = int(np.prod(a.shape))
        return TensorRow(status="different", different=different, max_abs=largest, mean_abs=total / size, where=where, **facts)
    return TensorRow(status="equal" if a.dtype == b.dtype else "rounded", **facts)


def compare_tensors(a: Source, b: Source, progress: Progress | None = None) -> list[TensorRow]:
    """All tensors of both, in A's order, then those that only B has."""
    rows = []
    for path, leaf in a.leaves.items():
        other = b.leaves.get(path)
        if other is None:
            rows.append(TensorRow(torch_name(path)[0], path, "only in A", (leaf.shape, None), (leaf.dtype.name, None)))
        else:
            rows.append(compare_leaves(leaf, other))
        if progress is not None:
            progress.add(leaf.nbytes)
    for path, leaf in b.leaves.items():
        if path not in a.leaves:
            rows.append(TensorRow(torch_name(path)[0], path, "only in B", (None, leaf.shape), (None, leaf.dtype.name)))
    return rows


def compare_settings(a: Source, b: Source) -> list[str]:
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


def verify(
    a: str | os.PathLike,
    b: str | os.PathLike,
    *,
    stages: bool = False,
    revision: str | None = None,
    position_ids: str = "intended",
    quiet: bool = False,
    notify: Callable[[str], None] = say,
) -> Report:
    """Compare two checkpoints: directories of Hugging Face or orbax, safetensors files, Hub ids (`revision` is theirs).

    stages: also run the models over built-in prompts and a built-in picture, and compare every stage; `position_ids` is the
    rule our encoder follows there. Raises CheckpointError or ConfigError if one of them cannot be opened.
    """
    from ..checkpoint import resolve_file

    opened: list[Source] = []
    try:
        places = [resolve_file(name, revision) for name in (a, b)]
        for place in places:
            opened.append(open_source(Path(place)))
        left, right = opened
        with Progress("comparing", sum(leaf.nbytes for leaf in left.leaves.values()), quiet) as progress:
            report = Report(str(a), str(b), compare_tensors(left, right, progress), compare_settings(left, right))
        if stages:
            from .stages import compare_stages

            report.stages = compare_stages(left, right, places, position_ids=position_ids, notify=notify)
        return report
    finally:
        for source in opened:
            source.close()
