"""Metrics of a run: lines of JSON, one a step, and TensorBoard if it is asked for."""

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from ..errors import import_extra
from ..io import errors_name, write_text
from .progress import Display

__all__ = ["Log", "read_metrics"]


class Log:
    """Appends to metrics.jsonl, and shows the figures on the display and to the loggers.

    Of steps after `first`, which an earlier run may have written and this one repeats, no line is left.

    Args:
        directory: of the run.
        first: steps that are done already.
        display: shows the figures.
        loggers: names of further loggers.
        main: whether this is the first process of its job, the only one that writes.
    """

    def __init__(self, directory: Path, *, first: int, display: Display, loggers: Sequence[str], main: bool):
        self._path, self._display = directory / "metrics.jsonl", display
        self._file = _appending(self._path, first) if main else None
        self._board = _tensorboard(directory / "tensorboard", first) if main and "tensorboard" in loggers else None

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Write the line of a step; numbers that are not finite become strings, since JSON has none."""
        if self._file is None:
            return
        plain = {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        with errors_name(self._path):
            self._file.write(json.dumps({"step": step, **plain}) + "\n")
            self._file.flush()
        self._display.figures(values)
        if self._board is not None:
            for name, value in values.items():
                if isinstance(value, (int, float)):
                    self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Close the file and the loggers."""
        if self._file is not None:
            with suppress(OSError):  # a line that could not be written: `write` has said so
                self._file.close()
        if self._board is not None:
            self._board.close()


def _appending(path: Path, first: int) -> IO[str]:
    """The file, with one whole line for each of the steps up to `first` that it has a line of, and nothing else."""
    if path.is_file():
        kept = [line for line in read_metrics(path.parent) if line["step"] <= first]
        text = "".join(json.dumps(line) + "\n" for line in kept)
        if path.read_bytes() != text.encode():
            write_text(path, text)
    return path.open("a", encoding="utf-8")


def _tensorboard(directory: Path, first: int):
    board = import_extra("tensorboardX", "the TensorBoard logger", "tensorboard")
    return board.SummaryWriter(str(directory), purge_step=first + 1 if first else None)


def read_metrics(directory: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl, one per step, in order.

    Lines of one step (training, evaluation) are merged; where an interrupted run repeated a step, the last line counts.
    """
    lines: dict[int, dict] = {}
    path = Path(directory) / "metrics.jsonl"
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []:
        try:
            line = json.loads(text)
        except ValueError:
            continue  # half a line: the run was killed while writing it
        if not isinstance(line, dict) or not isinstance(line.get("step"), int):
            continue  # a damaged file
        lines[line["step"]] = {**lines.get(line["step"], {}), **line}
    return [lines[step] for step in sorted(lines)]
