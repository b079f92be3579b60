"""What a command is doing, since when, and how much is left: on a terminal a line that ticks, in a log a line now and then.

Imports nothing heavy.
"""

import threading
import time
from collections.abc import Callable
from typing import NamedTuple

from .terminal import draw, on_terminal, said_at, say

__all__ = ["Figures", "Progress", "clock_text"]

_TICK_SECONDS = 0.5
# In a log: less than the 15 seconds after which a silent program looks like one that hangs.
_LOG_SECONDS = 14.0
# The first line comes sooner: Python has been importing before, for seconds on a busy machine.
_FIRST_SECONDS = 9.0


class Figures(NamedTuple):
    """How far a job is.

    Attributes:
        share: of the job that is done, from 0 to 1; None: unknown.
        seconds_left: as far as anybody can say; None: unknown.
        words: anything else.
    """

    share: float | None = None
    seconds_left: float | None = None
    words: str = ""


def clock_text(seconds: float) -> str:
    """Seconds as m:ss or h:mm:ss."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class Progress:
    """Says on standard error what a command is doing, from a thread of its own, so that the clock ticks during a compilation.

    On a terminal that is one line, drawn anew twice a second. Elsewhere it is a line whenever nothing has been said for 14
    seconds, the first one after 9. A context manager that ends the line.

    Args:
        show: Whether to say anything.
        log_seconds: Seconds of silence after which a line is logged, where there is no terminal.
    """

    def __init__(self, show: bool = True, *, log_seconds: float = _LOG_SECONDS):
        self._begin = time.monotonic()
        self._doing, self._since = "", self._begin
        self._figures: Callable[[], Figures] = Figures
        self._terminal, self._log_seconds = on_terminal(), log_seconds
        self._silent_since = self._begin - max(log_seconds - _FIRST_SECONDS, 0)
        self._ended, self._paused = threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None
        if show:
            self._thread = threading.Thread(target=self._tick, daemon=True, name="progress")
            self._thread.start()

    def tell(self, doing: str, done: int | None = None, total: int | None = None) -> None:
        """From any thread: what is being done from now on.

        Args:
            doing: In words, such as "loading the weights".
            done: Which one of `total` it is, or how many of them are done.
            total: How many there are.
        """
        text = doing if total is None else f"{doing} {done:,} of {total:,}"
        if text != self._doing:
            self._doing, self._since = text, time.monotonic()
        self._paused.clear()

    def follow(self, figures: Callable[[], Figures]) -> None:
        """Ask for figures whenever a line is shown."""
        self._figures = figures

    def pause(self) -> None:
        """Take the line away, until the next `tell`: an answer appears, or somebody is asked for something."""
        self._paused.set()
        if self._thread is not None and self._terminal:
            draw("")

    def line(self) -> str:
        """What is shown: "12.3 % [1:05<7:20] decoding 3 answers, 0.4 records/s"."""
        figures, now = self._figures(), time.monotonic()
        share = "" if figures.share is None else f"{figures.share:.1%} "
        left = "" if figures.seconds_left is None else f"<{clock_text(figures.seconds_left)}"
        doing = self._doing
        if now - self._since >= 1 and doing:
            doing += f" ({clock_text(now - self._since)})"
        return f"{share}[{clock_text(now - self._begin)}{left}] " + ", ".join(filter(None, (doing, figures.words)))

    def close(self) -> None:
        """End the line."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join(timeout=2)
            self._thread = None
            if self._terminal:
                draw("")

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _tick(self) -> None:
        while not self._ended.wait(_TICK_SECONDS):
            if self._paused.is_set() or not self._doing:
                continue
            if self._terminal:
                draw(self.line())
            elif time.monotonic() - max(self._silent_since, said_at()) >= self._log_seconds:
                say(self.line())
