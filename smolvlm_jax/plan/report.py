"""A plan as text, and as a chart. Imports no jax."""

import html
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ..errors import InputError, import_extra
from .figures import Cost, Plan

__all__ = ["chart", "check_chart", "to_text"]

_COLORS = ("#4c72b0", "#dd8452", "#55a868", "#c44e52", "#8172b3", "#937860", "#8c8c8c")


def to_text(plan: Plan) -> str:
    """The whole plan as tables for a terminal."""
    mesh = ", ".join(f"{axis}={size}" for axis, size in plan.mesh.items() if size > 1) or "one device"
    shapes = ", ".join(f"{name} {_shape(value)}" for name, value in plan.shapes.items())
    lines = [f"{plan.model} on {plan.chips} × {plan.chip} ({mesh})", shapes, "", *_memory(plan), "", *_programs(plan)]
    if plan.rate is not None:
        rate = plan.rate
        shares = ", ".join(f"{kind} {share:.0%}" for kind, share in rate.shares.items())
        span = "at most" if rate.low is None else f"{_figure(rate.low)} to"
        lines += ["", f"{span} {_figure(rate.high)} records/s on {plan.chips} chip{'s' * (plan.chips > 1)}"]
        lines += [
            f"  {text}" for text in (f"time at {'this' if rate.low is None else 'the lower'} rate: {shares}", *rate.assumptions)
        ]
    elif plan.step_seconds is not None:
        low, high = plan.step_seconds
        lines += ["", f"{low:.3g} to {high:.3g} s a step"]
    lines += ["", f"compiled in {plan.seconds:.0f} s; figures are the compiler's, no program has run"]
    return "\n".join(lines)


def _memory(plan: Plan) -> list[str]:
    memory, total = plan.memory, plan.memory.total
    rows = [(kind, _gigabytes(size), _share(size, memory.usable)) for kind, size in memory.kinds.items()]
    rows.append(("all", _gigabytes(total), _share(total, memory.usable)))
    if memory.usable is not None:
        rows.append(("the chip, for programs", _gigabytes(memory.usable), ""))
        rows.append(("left", _gigabytes(memory.usable - total), _share(memory.usable - total, memory.usable)))
    return [*_table(("memory of a chip", "GB", ""), rows), f"largest program: {memory.largest}"]


def _programs(plan: Plan) -> list[str]:
    header = ("program", "GFLOP", "GB moved", "Mcycles", "temp. GB", "floor ms", "est. ms", "collectives", "compiled s")
    return _table(header, [_program(cost) for cost in plan.programs])


def _program(cost: Cost) -> tuple[str, ...]:
    collectives = ", ".join(f"{c.count} {kind} {c.nbytes / 1e6:.1f} MB" for kind, c in cost.collectives.items())
    milliseconds = lambda seconds: "-" if seconds is None else f"{1e3 * seconds:.3g}"
    return (
        cost.name + (" (a step)" if cost.name.startswith("decode") else ""),
        f"{cost.flops / 1e9:,.1f}",
        f"{cost.bytes / 1e9:.3f}",
        "-" if cost.cycles is None else f"{cost.cycles / 1e6:.2f}",
        f"{cost.temporary_bytes / 1e9:.3f}",
        milliseconds(cost.floor_seconds),
        milliseconds(cost.estimated_seconds),
        collectives or "none",
        f"{cost.seconds:.1f}",
    )


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Columns, the first to the left, the others to the right."""
    lines = [tuple(header), *map(tuple, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    place = lambda i, text: text.ljust(widths[i]) if i == 0 else text.rjust(widths[i])
    return ["  ".join(place(i, text) for i, text in enumerate(line)).rstrip() for line in lines]


def _shape(value) -> str:
    return "/".join(map(str, value)) if isinstance(value, (tuple, list)) else str(value)


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.3f}"


def _share(size: int, usable: int | None) -> str:
    return "" if not usable else f"{size / usable:.1%}"


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def check_chart(path: Path) -> None:
    """Raises what `chart` would raise for the format of this file, before there is a plan."""
    if path.suffix.lower() == ".svg":
        return
    known = _new_figure().canvas.get_supported_filetypes()
    if path.suffix.lower().removeprefix(".") not in known:
        raise InputError(f"cannot draw {path}: charts are .svg, or .{', .'.join(sorted(known))}")


def _new_figure() -> Any:
    figures = import_extra("matplotlib.figure", "a chart that is no .svg", "train")
    return figures.Figure(figsize=(8, 2.4), layout="constrained")


def chart(plan: Plan, path: Path) -> None:
    """Draw the memory of a chip by kind: an SVG by hand, any other format of matplotlib's with the extra `train`.

    Raises:
        InputError: the file cannot be written, or its format is not known.
        MissingExtraError: matplotlib is not installed.
    """
    check_chart(path)
    try:
        if path.suffix.lower() == ".svg":
            path.write_text(_svg(plan), encoding="utf-8")
        else:
            _matplotlib(plan, path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error


def _title(plan: Plan) -> str:
    return f"{plan.model} on {plan.chips} × {plan.chip}: {plan.memory.total / 1e9:.2f} GB of a chip"


def _svg(plan: Plan) -> str:
    memory = plan.memory
    width, height = 640, 74 + 22 * len(memory.kinds)
    scale = (width - 40) / max(memory.total, memory.usable or 0, 1)
    parts, at = [], 20.0
    for n, (kind, size) in enumerate(memory.kinds.items()):
        color = _COLORS[n % len(_COLORS)]
        parts.append(f'<rect x="{at:.1f}" y="34" width="{size * scale:.1f}" height="18" fill="{color}"/>')
        y = 74 + 22 * n
        parts.append(f'<rect x="20" y="{y - 11}" width="12" height="12" fill="{color}"/>')
        parts.append(f'<text x="40" y="{y}">{html.escape(kind)}: {size / 1e9:.3f} GB</text>')
        at += size * scale
    if memory.usable:
        parts.append(f'<rect x="20" y="34" width="{memory.usable * scale:.1f}" height="18" fill="none" stroke="#222"/>')
        parts.append(f'<text x="40" y="{height}">outline: {memory.usable / 1e9:.2f} GB for programs</text>')
    extent = f'width="{width}" height="{height + 20}"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {extent} font-family="sans-serif" font-size="13">'
        '<rect width="100%" height="100%" fill="#fff"/>'
        f'<text x="20" y="22">{html.escape(_title(plan))}</text>{"".join(parts)}</svg>\n'
    )


def _matplotlib(plan: Plan, path: Path) -> None:
    figure = _new_figure()
    axes = figure.subplots()
    at = 0.0
    for n, (kind, size) in enumerate(plan.memory.kinds.items()):
        axes.barh(0, size / 1e9, left=at, color=_COLORS[n % len(_COLORS)], label=f"{kind} {size / 1e9:.2f}")
        at += size / 1e9
    if plan.memory.usable:
        axes.axvline(plan.memory.usable / 1e9, color="#222", linestyle="--", label="the chip")
    axes.set_yticks([])
    axes.set_xlabel("GB")
    axes.set_title(_title(plan), fontsize=10)
    axes.legend(ncols=4, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.3))
    figure.savefig(path)
