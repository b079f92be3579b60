"""Figures of a running job: how far it is, and the summary."""

import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from ..engine.counters import Counters
from ..progress import Figures
from .summary import OTHERS, error_kind

__all__ = ["Tally"]

_COUNTED = ("tiles", "prompt_tokens", "new_tokens")
_SHOWN_ERRORS, _KINDS = 10, 1000


class Tally:
    """Counts rows of this run and of earlier runs.

    Rows of earlier runs are counted by the thread that reads the input, new rows by the one that reads results.

    Args:
        statistics: Gives the counters of the engine.

    Attributes:
        reasons: How many rows ended for which finish reason.
        new: Records, tiles and tokens of this run alone.
        errors: The first ten errors.
        kinds: How many errors are of which kind, a thousand kinds at most.
    """

    def __init__(self, statistics: Callable[[], Counters]):
        self._statistics, self._lock = statistics, threading.RLock()
        self._begin = time.perf_counter()
        self.reasons: Counter = Counter()
        self.new: Counter = Counter()  # of this run alone
        self.errors: list[dict[str, Any]] = []
        self.kinds: Counter[str] = Counter()
        self._share, self._reused = 0.0, 0.0
        self._last = 0.0, 0.0  # the engine's seconds at the last row of this run, and when that was

    @property
    def records(self) -> int:
        """Number of rows."""
        return sum(self.reasons.values())

    def add(self, row: dict[str, Any], share: float, reused: bool = False) -> None:
        """Count a row.

        Args:
            row: As it is written.
            share: The share of the job that it is.
            reused: Whether an earlier run wrote it.
        """
        with self._lock:
            self.reasons[row["finish_reason"]] += 1
            if row["error"] is not None:
                kind = error_kind(row["error"])
                self.kinds[kind if kind in self.kinds or len(self.kinds) < _KINDS else OTHERS] += 1
                if len(self.errors) < _SHOWN_ERRORS:
                    self.errors.append({"id": row["id"], "error": row["error"]})
            if not reused:
                self.new.update(records=1, **{name: row[name] for name in _COUNTED})
                self._last = self._statistics().seconds, time.perf_counter()
            self.advance(share, reused)

    def advance(self, share: float, reused: bool = False) -> None:
        """Correct the share of the job that is done, by a positive or negative amount."""
        with self._lock:
            self._share = min(1.0, max(0.0, self._share + share))
            if reused:
                self._reused += share

    def figures(self) -> Figures:
        """How far the job is. The time that is left follows from the rows of this run alone, and from the time that the engine
        took for them, without that of loading and compiling."""
        with self._lock:
            share, own = self._share, self._share - self._reused
            seconds, when = self._last
            rates, errors = self.rates(), self.reasons["error"]
        left = None
        if when and own > 0:
            left = max(0.0, seconds * (1 - share) / own - (time.perf_counter() - when))
        words = []
        if self.new["records"]:
            words = [f"{rates[name]:.3g} {name.split('_')[0]}/s" for name in ("records_per_second", "tiles_per_second")]
            words.append(f"{rates['new_tokens_per_second']:.3g} tokens/s")
            if rates["device_idle_share"] is not None:
                words.append(f"device idle {rates['device_idle_share']:.0%}")
        if errors:
            words.append(f"{errors:,} error{'s' * (errors != 1)}")
        return Figures(share, left, ", ".join(words))

    def rates(self) -> dict[str, float | None]:
        """Figures of this run a second, and the share of the engine's time in which the device was idle."""
        seconds = time.perf_counter() - self._begin
        counters = self._statistics()
        return {
            "seconds": seconds,
            **{f"{name}_per_second": self.new[name] / max(seconds, 1e-9) for name in ("records", "tiles", "new_tokens")},
            "device_idle_share": counters.device_idle_seconds / counters.seconds if counters.seconds else None,
        }

    def summary(self) -> dict[str, Any]:
        """The figures of docs/batch.md: records, answers, errors and finish reasons of all rows, the rest of this run alone."""
        records, errors = self.records, self.reasons["error"]
        return {
            "records": records,
            "answers": records - errors,
            "errors": errors,
            "error_share": errors / records if records else 0.0,
            "finish_reasons": dict(sorted(self.reasons.items())),
            "error_kinds": dict(self.kinds.most_common(_SHOWN_ERRORS)),
            "first_errors": self.errors,
            "new_records": self.new["records"],
            **{name: self.new[name] for name in _COUNTED},
            **self.rates(),
        }
