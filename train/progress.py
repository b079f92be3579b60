"""What a run shows while it works: a bar on a terminal, elsewhere a line whenever fifteen seconds would pass without one.

A thread keeps the clock going: a step that compiles, and an evaluation, may take minutes.
"""

import threading
import time
from collections.abc import Mapping
from typing import Any

from ..progress import clock_text
from ..terminal import columns, draw, on_terminal, said_at, say

__all__ = ["LINE_SECONDS", "LONG_SECONDS", "Display", "shown_figures"]

LINE_SECONDS = 15.0
# A step that takes longer is named, with a clock.
LONG_SECONDS = 10.0
_TICK_SECONDS = 1.0
# The first line comes sooner: Python has been importing before, for seconds on a busy machine.
_FIRST_SECONDS = 9.0
# Figure of the log -> its name on the bar and how it is written.
_SHOWN = {
    "loss": ("loss", lambda value: f"{value:.4f}"),
    "held_out_loss": ("held out", lambda value: f"{value:.4f}"),
    "exact_match": ("exact", lambda value: f"{value:.1%}"),
    "learning_rate": ("rate", lambda value: f"{value:.2g}"),
    "tokens_s": ("tokens/s", lambda value: f"{value:,.0f}" if value >= 100 else f"{value:.3g}"),
    "padding": ("padding", lambda value: f"{value:.0%}"),
    "skipped": ("steps not finite", lambda value: f"{value}" if value else ""),
}


def shown_figures(values: Mapping[str, Any]) -> str:
    """Those of a step's figures that are shown, in words."""
    found = {name: write(values[key]) for key, (name, write) in _SHOWN.items() if isinstance(values.get(key), (int, float))}
    return ", ".join(f"{name} {text}" for name, text in found.items() if text)


class Display:
    """Shows how far a run is. A context manager: leaving it ends the bar.

    Args:
        steps: of the whole run.
        show: a bar (True), nothing (False), or what fits standard error (None).
    """

    def __init__(self, steps: int, show: bool | None = None):
        self.quiet = show is False
        self._bars = not self.quiet and (show is True or on_terminal())
        self._lines = not self.quiet and not self._bars
        self._steps, self._done, self._first = steps, 0, 0
        self._doing, self._since, self._after = "", time.monotonic(), 0.0
        self._figures, self._told = "", False
        self._began: float | None = None  # when the first step of this run was done
        self._silent_since = time.monotonic() - max(LINE_SECONDS - _FIRST_SECONDS, 0)
        self._lock, self._ended, self._bar = threading.RLock(), threading.Event(), None
        if not self.quiet:
            threading.Thread(target=self._tick, daemon=True).start()

    def __enter__(self) -> "Display":
        return self

    def __exit__(self, *error) -> None:
        self.close()

    def mute(self) -> None:
        """Show nothing from now on: this is not the first process of its job."""
        self.close()
        self.quiet, self._bars, self._lines = True, False, False

    def remark(self, line: str) -> None:
        """Say something once, unless the run is quiet."""
        if not self.quiet:
            with self._lock:
                if self._bar is not None:
                    self._bar.clear()
                say(line)

    def doing(self, what: str, *, after: float = 0.0) -> None:
        """Show what is going on, until something else is or a step is done. "": the steps.

        Args:
            what: in words.
            after: seconds that it goes on before it is shown.
        """
        with self._lock:
            if what != self._doing:
                self._doing, self._since = what, time.monotonic()
            self._after = after
            if not after:
                self._refresh()

    def begin(self, first: int) -> None:
        """The steps begin. first: how many are done already."""
        with self._lock:
            self._first = self._done = first
            if self._bars:
                from tqdm import tqdm

                draw("")
                # tqdm shows nothing on a terminal that does not know its size, unless it is told both numbers.
                form = "{desc}{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
                self._bar = tqdm(total=self._steps, initial=first, unit="step", bar_format=form, ncols=columns(), nrows=20)

    def advance(self) -> None:
        """A step is done."""
        with self._lock:
            self._done += 1
            now = time.monotonic()
            if self._began is None:
                self._began, self._first = now, self._done
            if self._doing:
                self._doing, self._since = "", now
            if self._bar is not None:
                self._bar.update()

    def figures(self, values: Mapping[str, Any]) -> None:
        """Show the figures of the last step."""
        with self._lock:
            self._figures = shown_figures(values)
            self._refresh()
            if self._lines and not (self._told and self._done < self._steps):
                self._told = True  # the first figures, and the last; between them the clock decides
                self._line()

    def finish(self) -> None:
        """The steps have ended: the bar stands as it is, and what is done afterwards is shown below it."""
        with self._lock:
            if self._bar is not None:
                self._bar.set_description_str("", refresh=False)
                self._bar.close()
                self._bar = None
            self._figures = ""

    def close(self) -> None:
        """Show nothing more."""
        self._ended.set()
        with self._lock:
            self.finish()
            if self._bars:
                draw("")

    def _tick(self) -> None:
        while not self._ended.wait(_TICK_SECONDS):
            self._show()

    def _show(self) -> None:
        with self._lock:
            if self._ended.is_set():
                return
            self._refresh()
            silent = time.monotonic() - max(self._silent_since, said_at())
            if self._lines and silent >= LINE_SECONDS - 2 * _TICK_SECONDS:
                self._line()

    def _refresh(self) -> None:
        state = self._state()
        if self._bar is not None:
            self._bar.ncols = columns()
            self._bar.set_description_str(f"{state}: " if state else "", refresh=False)
            self._bar.set_postfix_str(self._figures, refresh=False)
            self._bar.refresh()
        elif self._bars and not self._ended.is_set():
            draw(state)

    def _state(self) -> str:
        seconds = time.monotonic() - self._since
        if not self._doing or seconds < self._after:
            return ""
        return f"{self._doing} ({clock_text(seconds)})" if seconds >= _TICK_SECONDS else self._doing

    def _line(self) -> None:
        words = [f"step {self._done:,} of {self._steps:,}"] if self._done or self._began else []
        words += [state] if (state := self._state()) else []
        words += [self._figures] if self._figures else []
        done = self._done - self._first
        if self._began is not None and done > 0 and self._done < self._steps:
            left = (time.monotonic() - self._began) / done * (self._steps - self._done)
            words.append(f"about {_duration(left)} left")
        if words:
            say(", ".join(words))


def _duration(seconds: float) -> str:
    minutes = seconds / 60
    return f"{seconds:.0f} s" if minutes < 2 else f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.1f} h"
