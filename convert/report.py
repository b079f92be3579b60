"""A verification as text and as one self-contained HTML page, with a chart of where the runs diverge."""

import math
from collections import Counter
from pathlib import Path

from ..io import render_page
from .verify import Report

__all__ = ["to_html", "to_text"]

_SHOWN = 10  # rows of a table on a terminal
_FLOOR = -9  # log10 of what is drawn as "no difference"


def _number(value: float | None) -> str:
    return "–" if value is None else "0" if value == 0 else f"{value:.2e}"


def summary(report: Report) -> list[str]:
    """The result in a few lines."""
    counts = Counter(row.status for row in report.tensors)
    words = {
        "equal": "bit-equal",
        "rounded": "equal after rounding to the narrower dtype",
        "quantized": "within half a step of 8 bits",
    }
    lines = [
        f"{'the same' if report.same else 'NOT the same'}: {report.a} (A) and {report.b} (B)",
        f"tensors: {len(report.tensors)}, " + ", ".join(f"{n} {words.get(status, status)}" for status, n in counts.items()),
    ]
    lines += [f"damaged: {line}" for line in report.damage]
    lines += [f"note: {note}" for note in report.notes]
    if report.stages is not None:
        lines += [f"note: {note}" for note in report.stages.notes]
        lines.append(f"position ids: {report.stages.position_rule}")
        lines.append(f"reference of the stages: {report.stages.runs[0]}")
        for run in report.stages.runs[1:]:
            row = report.stages.first_parting(run)
            tolerance = f"tolerance {report.stages.tolerances[run]:.0e} of the largest value"
            where = "agrees at every stage" if row is None else f"parts at {row.prompt} / {row.stage}"
            lines.append(f"  {run}: {where} ({tolerance})")
    return lines


def _tensor_table(report: Report) -> list[list[str]]:
    """A head, and a row for each tensor that differs."""
    rows = [
        [
            row.name,
            row.status,
            " / ".join("–" if shape is None else "×".join(map(str, shape)) for shape in dict.fromkeys(row.shapes)),
            " / ".join(str(dtype or "–") for dtype in dict.fromkeys(row.dtypes)),
            str(row.different),
            _number(row.max_abs),
            "–" if row.where is None else str(list(row.where)),
        ]
        for row in report.tensors
        if not row.good
    ]
    return [["tensor", "status", "shape (ours)", "dtype", "values", "largest difference", "at"], *rows]


def _stage_table(report: Report) -> list[list[str]]:
    """A head, and a row for each stage; nothing if there are none."""
    if report.stages is None:
        return []
    runs = report.stages.runs[1:]
    rows = [
        [
            row.prompt,
            row.stage,
            "×".join(map(str, row.shape)),
            _number(row.scale),
            *(_number(row.relative[run]) + (" ✗" if run in row.differing else "") for run in runs),
        ]
        for row in report.stages.rows
    ]
    return [["prompt", "stage", "shape", "largest value", *runs], *rows]


def to_text(report: Report) -> str:
    """For the terminal: the result, the first tensors that differ, the stages from the first that differs on, ten of each."""
    lines = summary(report)
    different = [i for i, row in enumerate(_stage_table(report)) if i and any("✗" in cell for cell in row)]
    for name, whole, first in (("tensors", _tensor_table(report), 1), ("stages", _stage_table(report), (different or [1])[0])):
        table = whole[:1] + whole[first : first + _SHOWN]
        if table[1:]:
            widths = [max(map(len, column)) for column in zip(*table, strict=True)]
            lines.append("")
            lines += ["  ".join(map(str.ljust, row, widths)).rstrip() for row in table]
            if len(whole) > len(table):
                lines.append(f"… {len(whole) - len(table):,} more {name}: --report FILE or --json FILE has all of them")
    return "\n".join(lines) + "\n"


def _depth(difference: float | None) -> float:
    """Where the chart has a relative difference, on a logarithmic scale: 0 is the upper end, 10; 1 the lower."""
    power = _FLOOR if not difference else max(_FLOOR, min(1.0, math.log10(difference)))
    return (1.0 - power) / (1.0 - _FLOOR)


def to_html(report: Report) -> str:
    """One page that refers to nothing outside itself."""
    verdict, *remarks = summary(report)
    return render_page(
        Path(__file__).with_name("report.html"),
        report=report,
        verdict=verdict,
        remarks=remarks,
        stages=report.stages,
        stage_table=_stage_table(report),
        tensor_table=_tensor_table(report),
        depth=_depth,
        floor=_FLOOR,
    )
