"""Loss, learning rate and accuracy over steps as a PNG, drawn with Pillow so that no plotting library is needed."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from ..io import whole_file

__all__ = ["draw_curves"]

_PANELS = (
    ("loss", "loss"),
    ("learning rate", "learning_rate"),
    ("token accuracy", "token_accuracy"),
    ("exact match", "exact_match"),
)
_WIDTH, _HEIGHT = 720, 240
_LEFT, _TOP, _RIGHT, _BOTTOM = 76, 34, 20, 34
_INK, _GRID, _LINE = (40, 40, 40), (225, 225, 225), (33, 102, 172)


def draw_curves(lines: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw a panel for each quantity that occurs in the lines of `read_metrics`."""
    panels = []
    for title, name in _PANELS:
        points = [(line["step"], line[name]) for line in lines if isinstance(line.get(name), (int, float))]
        if points:
            panels.append((title, points))
    picture = Image.new("RGB", (_WIDTH, max(1, len(panels)) * _HEIGHT), "white")
    draw = ImageDraw.Draw(picture)
    for number, (title, points) in enumerate(panels):
        _panel(draw, number * _HEIGHT, title, points)
    with whole_file(path) as file:
        picture.save(file, "PNG")


def _panel(draw: ImageDraw.ImageDraw, top: int, title: str, points: list[tuple[int, float]]) -> None:
    font, small = ImageFont.load_default(15), ImageFont.load_default(12)
    box = (_LEFT, top + _TOP, _WIDTH - _RIGHT, top + _HEIGHT - _BOTTOM)
    steps, values = [p[0] for p in points], [p[1] for p in points]
    low_x, high_x = min(steps), max(max(steps), min(steps) + 1)
    low_y, high_y = min(0.0, *values) if len(values) > 1 else min(0.0, values[0]), max(values)
    high_y = high_y if high_y > low_y else low_y + 1
    x = lambda step: box[0] + (step - low_x) / (high_x - low_x) * (box[2] - box[0])
    y = lambda value: box[3] - (value - low_y) / (high_y - low_y) * (box[3] - box[1])
    draw.text((_LEFT, top + 8), f"{title}: {values[-1]:.4g} at step {steps[-1]}", _INK, font)
    for tick in _ticks(low_y, high_y):
        draw.line((box[0], y(tick), box[2], y(tick)), _GRID)
        draw.text((box[0] - 8, y(tick)), f"{tick:.3g}", _INK, small, anchor="rm")
    for tick in _ticks(low_x, high_x):
        draw.text((x(tick), box[3] + 6), f"{tick:.6g}", _INK, small, anchor="mt")
    draw.rectangle(box, outline=_INK)
    line = [(x(step), y(value)) for step, value in points]
    if len(line) > 1:
        draw.line(line, _LINE, 2, joint="curve")
    for at in line if len(line) <= 60 else ():
        draw.ellipse((at[0] - 2.5, at[1] - 2.5, at[0] + 2.5, at[1] + 2.5), _LINE)


def _ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers in a range."""
    raw = (high - low) / count
    power = 10 ** math.floor(math.log10(raw))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= raw)
    first = math.ceil(low / step - 1e-9)
    return [n * step for n in range(first, math.floor(high / step + 1e-9) + 1)]
