"""The batch job: records in, one row for each out, in parts that are whole or not there.

The input is cut into units, of which this shard has every `num_shards`-th. Worker processes prepare records, the engine
answers them, rows are appended to the part's working file; a part whose rows are all there gets its name. Nothing is drained
between parts: the engine sees one long stream of requests.
"""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from ..engine.requests import Request, Result
from ..errors import InputError
from ..records.sources import Source, Unit
from .parts import Part, clean_up
from .pool import WorkerPool
from .progress import Tally
from .sinks import COLUMNS, Sink

__all__ = ["BatchJob", "Shard"]

_FLUSH_SECONDS = 1.0
EMPTY = "the answer is empty, and no stop token ended it"


@dataclass(frozen=True)
class Shard:
    """Which units this runner works on: those whose number modulo `count` is `index`."""

    index: int = 0
    count: int = 1
    size: int = 1000

    def __post_init__(self):
        if self.size < 1:
            raise InputError(f"shard_size must be at least 1, got {self.size}")
        if not 0 <= self.index < self.count:
            raise InputError(f"shard index {self.index} is not below the number of shards, {self.count}")


@dataclass
class _Open:
    """A part under way. row_share: which part of the job one of its rows is, an estimate until all are read. expected: number
    of its rows, known then."""

    part: Part
    row_share: float
    expected: int | None = None
    finishing: bool = False


class BatchJob:
    """One shard of a job. make_engine: called once the first record is prepared; makes an Engine, or what has its
    generate(), stats, summary() and processor.

    stop(), from any thread, ends admission: `run` then returns as soon as what is in flight has its rows. `park` leaves at
    once. Either way finished rows are in working files, from which another run goes on.
    """

    def __init__(
        self,
        source: Source,
        folder: Path,
        sink: Sink,
        shard: Shard,
        pool: WorkerPool,
        make_engine: Callable[[], Any],
        quiet: bool = False,
    ):
        self._source, self._folder, self._sink, self._shard = source, Path(folder), sink, shard
        self._pool, self._make_engine, self._engine = pool, make_engine, None
        self._open: dict[int, _Open] = {}
        self._lock = threading.Lock()  # guards _open and the decision to finish a part
        self._stopping, self._all_read = threading.Event(), False
        self._flushed = time.monotonic()
        self._began = 0.0
        self.tally = Tally(self._statistics, quiet)
        self.parts = 0

    @property
    def stopping(self) -> bool:
        return self._stopping.is_set()

    def stop(self) -> None:
        self._stopping.set()

    def park(self) -> None:
        """Stop, and put all finished rows on the disk now. Rows that come later are dropped."""
        self._stopping.set()
        with self._lock:
            parts = [entry.part for entry in self._open.values() if not entry.finishing]
        for part in parts:
            part.close()

    def run(self) -> dict[str, Any]:
        """Work until every record of the shard has its row, or until stopped. Returns the summary."""
        requests = self._requests()
        clean_up(self._folder, self._sink)
        try:
            first = next(requests, None)
            if first is not None:  # a finished shard needs no model
                self._engine = self._make_engine()
                self._began = time.perf_counter()
                with contextlib.closing(self._engine.generate(chain([first], requests))) as results:
                    for result in results:
                        self._answered(result)
        finally:
            if self._open:
                self.park()
            self.tally.close()
        return self.summary()

    def summary(self) -> dict[str, Any]:
        complete = self._all_read and not self._open
        place = {"shard_index": self._shard.index, "num_shards": self._shard.count, "complete": complete, "parts": self.parts}
        engine = {} if self._engine is None else self._engine.summary()
        return {**place, **self.tally.summary(), "worker_deaths": self._pool.deaths, "engine": engine}

    def _statistics(self) -> dict[str, float]:
        """The engine's counters so far; it adds up its seconds only in the end."""
        if self._engine is None:
            return {}
        stats = self._engine.stats
        return {**stats, "seconds": stats["seconds"] or time.perf_counter() - self._began}

    # ---- records to requests

    def _requests(self) -> Iterator[Request]:
        """Prepared records. Those that could not be prepared get their row here."""
        for (unit, position), made in self._pool.map(self._tasks(), self._stopping):
            if made.error is not None:
                self._write(unit, position, _row(made.id, error=made.error))
            else:
                yield Request((unit, position, made.id), prepared=made.prepared, params=made.params)

    def _tasks(self) -> Iterator[tuple[tuple[int, int], Any]]:
        """((unit, position), payload) of every row that has no answer yet."""
        for unit in self._source.units(self._shard.size):
            if self.stopping:
                return
            if unit.index % self._shard.count != self._shard.index:
                continue
            part = Part.open(self._folder, unit.index, self._sink)
            if part is None:
                self._count_finished(unit)
                continue
            share = unit.share * self._shard.count
            entry = _Open(part, share / self._shard.size)
            with self._lock:
                self._open[unit.index] = entry
            for row in part.taken_over:
                self.tally.add(row, entry.row_share, reused=True)
            part.taken_over.clear()
            count, done = 0, set(part.done)
            for row in unit.rows():
                count += 1
                if row.position not in done:
                    yield (unit.index, row.position), row.payload
            with self._lock:
                entry.expected, exact = count, share / max(count, 1)
                self.tally.advance((exact - entry.row_share) * len(part.done))
                entry.row_share = exact
            self._finish_if_whole(unit.index)
        self._all_read = True

    def _count_finished(self, unit: Unit) -> None:
        self.parts += 1
        path = Part.path_of(self._folder, unit.index, self._sink)
        try:
            for row in self._sink.read(path):
                self.tally.add(row, 0.0, reused=True)
        except (ValueError, LookupError) as error:
            raise InputError(f"{path} is damaged ({error}): remove it, and its records are answered again") from error
        self.tally.advance(unit.share * self._shard.count, reused=True)

    # ---- results to rows

    def _answered(self, result: Result) -> None:
        unit, position, key = result.id
        error, reason, text = result.error, result.finish_reason, result.text
        if error is None and not text and reason != "stop" and self._says_nothing(result):
            error = EMPTY
        if error is not None:
            text, reason = None, "error"
        self._write(
            unit,
            position,
            _row(
                key,
                text=text,
                error=error,
                finish_reason=reason,
                prompt_tokens=result.prompt_tokens,
                new_tokens=result.new_tokens,
                tiles=result.tiles,
                seconds=round(result.seconds, 6),
            ),
        )

    def _says_nothing(self, result: Result) -> bool:
        """Whether there is no token in the answer but special ones: a sign of a broken model rather than of a short limit."""
        return not self._engine.processor.decode(list(result.token_ids), skip_special_tokens=True)

    def _write(self, unit: int, position: int, row: dict[str, Any]) -> None:
        entry = self._open[unit]
        if entry.part.add(position, row):
            self.tally.add(row, entry.row_share)
        self._finish_if_whole(unit)
        now = time.monotonic()
        if now - self._flushed > _FLUSH_SECONDS:
            self._flushed = now
            with self._lock:
                parts = [entry.part for entry in self._open.values()]
            for part in parts:
                part.flush()

    def _finish_if_whole(self, unit: int) -> None:
        """Rows come from two threads; the one that brings the last of a unit finishes it."""
        with self._lock:
            entry = self._open.get(unit)
            if entry is None or entry.finishing or entry.expected is None or len(entry.part.done) < entry.expected:
                return
            entry.finishing = True
        entry.part.finish()
        with self._lock:
            del self._open[unit]
            self.parts += 1


def _row(key: str | int, **values: Any) -> dict[str, Any]:
    blank = dict(text=None, error=None, finish_reason="error", prompt_tokens=0, new_tokens=0, tiles=0, seconds=0.0)
    row = {"id": key, **blank, **values}
    assert tuple(row) == COLUMNS
    return row
