"""Loss, learning rate and accuracy over steps as a PNG, drawn by matplotlib."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import MissingExtraError
from ..io import whole_file
from ..terminal import say

__all__ = ["draw_curves"]

_PANELS = ("loss", "learning_rate", "token_accuracy", "exact_match")


def draw_curves(lines: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw a panel for each quantity that occurs in the lines of `read_metrics`.

    Without matplotlib nothing is drawn, and a line says so: a run does not fail at its end.
    """
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it would say that it builds a cache of its fonts
    try:
        from matplotlib.figure import Figure
    except ImportError:
        say(str(MissingExtraError("drawing curves.png", "train")))
        return
    points = {name: [(x["step"], x[name]) for x in lines if isinstance(x.get(name), (int, float))] for name in _PANELS}
    shown = [name for name in _PANELS if points[name]] or ["loss"]
    figure = Figure(figsize=(7.2, 2.4 * len(shown)), layout="constrained")
    for name, axes in zip(shown, figure.subplots(len(shown), squeeze=False)[:, 0], strict=True):
        axes.plot(*zip(*points[name], strict=True), marker="." if len(points[name]) <= 60 else None)
        axes.set(title=name.replace("_", " "), ylim=(min(0, *axes.get_ylim()), None))
        axes.grid(alpha=0.4)
    with whole_file(path) as file:
        figure.savefig(file, format="png")
