"""Loss, learning rate and accuracy over steps as a PNG, drawn by matplotlib."""

import functools
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import MissingExtraError
from ..io import whole_file
from ..terminal import say

__all__ = ["draw_curves"]

# Title of a panel -> the figures of the log that are drawn in it, and what they are called there.
_PANELS = {
    "loss": {"loss": "training", "held_out_loss": "held out"},
    "learning_rate": {"learning_rate": ""},
    "token_accuracy": {"token_accuracy": "training", "held_out_accuracy": "held out"},
    "exact_match": {"exact_match": ""},
}


def draw_curves(lines: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw a panel for each quantity that occurs in the lines of `read_metrics`.

    Without matplotlib nothing is drawn, and a line says so, once: a run does not fail for it.
    """
    Figure = _figure_class()
    if Figure is None:
        return
    names = [name for panel in _PANELS.values() for name in panel]
    points = {name: [(x["step"], x[name]) for x in lines if isinstance(x.get(name), (int, float))] for name in names}
    shown = [title for title, panel in _PANELS.items() if any(points[name] for name in panel)] or ["loss"]
    figure = Figure(figsize=(7.2, 2.4 * len(shown)), layout="constrained")
    for title, axes in zip(shown, figure.subplots(len(shown), squeeze=False)[:, 0], strict=True):
        drawn = [name for name in _PANELS[title] if points[name]]
        for name in drawn:
            marker = "." if len(points[name]) <= 60 else None
            axes.plot(*zip(*points[name], strict=True), marker=marker, label=_PANELS[title][name])
        axes.set(title=title.replace("_", " "), ylim=(min(0, *axes.get_ylim()), None))
        axes.grid(alpha=0.4)
        if len(drawn) > 1:
            axes.legend()
    with whole_file(path) as file:
        figure.savefig(file, format="png")


@functools.cache
def _figure_class() -> Any:
    """matplotlib's, or None."""
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it would say that it builds a cache of its fonts
    try:
        from matplotlib.figure import Figure
    except ImportError:
        say(str(MissingExtraError("drawing curves.png", "train")))
        return None
    return Figure
