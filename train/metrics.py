"""Metrics of a run: lines of JSON, a progress bar, and TensorBoard if it is asked for."""

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from ..errors import import_extra
from ..io import errors_name
from ..terminal import on_terminal

__all__ = ["Log", "figures", "read_metrics"]

_SHOWN = ("loss", "token_accuracy", "exact_match", "padding", "tile_padding", "skipped")


class Log:
    """Appends to metrics.jsonl, shows a progress bar on stderr, and feeds the loggers.

    Args:
        directory: of the run.
        steps: of the whole run.
        first: steps that are done already.
        progress: show the bar; default: when stderr is a terminal.
        loggers: names of further loggers.
        main: whether this is the first process of its job, the only one that writes.
    """

    def __init__(self, directory: Path, *, steps: int, first: int, progress: bool | None, loggers: Sequence[str], main: bool):
        from tqdm import tqdm

        self._path = directory / "metrics.jsonl"
        self._file = _appending(self._path) if main else None
        show = main and (on_terminal() if progress is None else progress)
        self._bar = tqdm(total=steps, initial=first, unit="step", disable=not show, dynamic_ncols=True)
        self._board = _tensorboard(directory / "tensorboard") if main and "tensorboard" in loggers else None

    def advance(self) -> None:
        """Move the bar by one step."""
        self._bar.update()

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Write one line; numbers that are not finite become strings, since JSON has none."""
        if self._file is None:
            return
        plain = {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        with errors_name(self._path):
            self._file.write(json.dumps({"step": step, **plain}) + "\n")
            self._file.flush()
        self._bar.set_postfix({name: text for name, text in figures(plain).items() if text or name != "skipped"})
        if self._board is not None:
            for name, value in values.items():
                if isinstance(value, (int, float)):
                    self._board.add_scalar(name, value, step)

    def close(self) -> None:
        self._bar.close()
        if self._file is not None:
            with suppress(OSError):  # a line that could not be written: `write` has said so
                self._file.close()
        if self._board is not None:
            self._board.close()


def _appending(path: Path) -> IO[str]:
    """The file, after its last whole line: one that a killed run left half is ended."""
    half = path.is_file() and path.stat().st_size > 0 and not path.read_bytes().endswith(b"\n")
    file = path.open("a", encoding="utf-8")
    if half:
        file.write("\n")
    return file


def figures(values: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a step's metrics that are shown, floats rounded."""
    found = {name: values[name] for name in _SHOWN if name in values}
    return {name: f"{value:.4f}" if isinstance(value, float) else value for name, value in found.items()}


def _tensorboard(directory: Path):
    return import_extra("tensorboardX", "the TensorBoard logger", "tensorboard").SummaryWriter(str(directory))


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
