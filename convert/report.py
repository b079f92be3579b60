"""A verification as text and as one self-contained HTML page, with a chart of where the runs diverge."""

import math
from html import escape

from .stages import StageReport
from .verify import Report

__all__ = ["to_html", "to_text"]

_COLOURS = ("#0b6e99", "#c2410c", "#4d7c0f", "#7e22ce")
_FLOOR = -9.0  # log10 of what is drawn as "no difference"


def _number(value: float | None) -> str:
    return "–" if value is None else "0" if value == 0 else f"{value:.2e}"


def summary(report: Report) -> list[str]:
    """The result in a few lines."""
    counts: dict[str, int] = {}
    for row in report.tensors:
        counts[row.status] = counts.get(row.status, 0) + 1
    words = {"equal": "bit-equal", "rounded": "equal after rounding to the narrower dtype"}
    lines = [
        f"{'the same' if report.same else 'NOT the same'}: {report.a} (A) and {report.b} (B)",
        f"tensors: {len(report.tensors)}, " + ", ".join(f"{n} {words.get(status, status)}" for status, n in counts.items()),
    ]
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


def _offenders(report: Report) -> list[list[str]]:
    return [
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


_TENSOR_HEAD = ["tensor", "status", "shape (ours)", "dtype", "values", "largest difference", "at"]


def _stage_rows(stages: StageReport) -> tuple[list[str], list[list[str]]]:
    head = ["prompt", "stage", "shape", "largest value", *stages.runs[1:]]
    rows = [
        [
            row.prompt,
            row.stage,
            "×".join(map(str, row.shape)),
            _number(row.scale),
            *(_number(row.relative[run]) + (" ✗" if run in row.parted else "") for run in stages.runs[1:]),
        ]
        for row in stages.rows
    ]
    return head, rows


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in [head, *rows]]


def to_text(report: Report) -> str:
    """For the terminal: the result, the tensors that differ, the stages."""
    lines = summary(report)
    offenders = _offenders(report)
    if offenders:
        lines += ["", *_table(_TENSOR_HEAD, offenders)]
    if report.stages is not None:
        lines += ["", *_table(*_stage_rows(report.stages))]
    return "\n".join(lines) + "\n"


def _log(value: float | None) -> float:
    return _FLOOR if not value else max(_FLOOR, min(1.0, math.log10(value)))


def picture(stages: StageReport) -> str:
    """An SVG chart: stages from left to right, the relative difference of each run upwards on a logarithmic scale."""
    rows = stages.rows
    step, left, height, line = 14, 60, 240, 13
    top = 10 + line * len(stages.runs)
    width = max(left + step * len(rows) + 20, 320)
    y = lambda value: top + height * (1.0 - _log(value)) / (1.0 - _FLOOR)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {top + height + 170}" width="{width}" '
        'font-family="sans-serif" font-size="10">'
    ]
    for power in range(int(_FLOOR), 2):
        at = y(10.0**power)
        label = "0" if power == int(_FLOOR) else f"1e{power}"
        parts.append(f'<line x1="{left}" y1="{at:.1f}" x2="{width - 20}" y2="{at:.1f}" stroke="#ddd"/>')
        parts.append(f'<text x="{left - 6}" y="{at + 3:.1f}" text-anchor="end">{label}</text>')
    for tolerance in sorted(set(stages.tolerances.values())):
        at = y(tolerance)
        parts.append(
            f'<line x1="{left}" y1="{at:.1f}" x2="{width - 20}" y2="{at:.1f}" stroke="#b91c1c" stroke-dasharray="4 3"/>'
        )
    for i, (run, colour) in enumerate(zip(stages.runs[1:], _COLOURS * len(stages.runs), strict=False)):
        dashes = f' stroke-dasharray="{3 * i} {3 * i}"' if i else ""  # two runs that agree lie on one line
        points = " ".join(f"{left + step * (j + 0.5):.1f},{y(row.relative[run]):.1f}" for j, row in enumerate(rows))
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1.5"{dashes}/>')
        first = stages.first_parting(run)
        if first is not None:
            x = left + step * (rows.index(first) + 0.5)
            at = y(first.relative[run])
            parts.append(f'<circle cx="{x:.1f}" cy="{at:.1f}" r="5" fill="none" stroke="{colour}" stroke-width="2"/>')
            parts.append(f'<line x1="{x:.1f}" y1="{top}" x2="{x:.1f}" y2="{top + height}" stroke="{colour}" opacity="0.3"/>')
    for i, row in enumerate(rows):
        x, at = left + step * (i + 0.5) + 3, top + height + 8
        text = escape(f"{row.prompt} · {row.stage}")
        parts.append(f'<text transform="translate({x:.1f},{at}) rotate(-90)" text-anchor="end">{text}</text>')
    for i, (run, colour) in enumerate(zip(stages.runs[1:], _COLOURS * len(stages.runs), strict=False)):
        parts.append(f'<text x="{left}" y="{line * (i + 1)}" fill="{colour}">{escape(run)}</text>')
    return "".join(parts) + "</svg>"


_STYLE = (
    "body{font:14px/1.5 sans-serif;margin:2em auto;max-width:75em;padding:0 1em}table{border-collapse:collapse;margin:1em 0}"
    "td,th{border:1px solid #ccc;padding:2px 8px;text-align:left;font-variant-numeric:tabular-nums}"
    ".bad{color:#b91c1c}.good{color:#166534}.wide{overflow-x:auto}"
)


def _html_table(head: list[str], rows: list[list[str]]) -> str:
    cells = lambda row, tag: "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in row)
    body = "".join(f"<tr{' class=bad' if any('✗' in cell for cell in row) else ''}>{cells(row, 'td')}</tr>" for row in rows)
    return f"<div class=wide><table><tr>{cells(head, 'th')}</tr>{body}</table></div>"


def to_html(report: Report) -> str:
    """One page that refers to nothing outside itself."""
    verdict, *rest = summary(report)
    parts = [
        "<!doctype html><html lang=en><head><meta charset=utf-8><title>Verification of two checkpoints</title>",
        f"<style>{_STYLE}</style></head><body><h1 class={'good' if report.same else 'bad'}>{escape(verdict)}</h1>",
        "".join(f"<p>{escape(line)}</p>" for line in rest),
    ]
    if report.stages is not None:
        parts += [
            "<h2>Where they part</h2><p>Largest difference from the reference over the reference's largest value, by stage; "
            "the dashed line is the tolerance, a circle marks the first stage beyond it.</p>",
            f"<div class=wide>{picture(report.stages)}</div>",
            _html_table(*_stage_rows(report.stages)),
        ]
    offenders = _offenders(report)
    if offenders:
        parts += ["<h2>Tensors that differ</h2>", _html_table(_TENSOR_HEAD, offenders)]
    return "".join(parts) + "</body></html>\n"
