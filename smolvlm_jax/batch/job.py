"""The batch job: records to requests, results to rows, rows to parts that are complete or absent.

The input is cut into units, of which this shard has every `num_shards`-th. Worker processes prepare records, the engine
answers them, and rows are appended to the working file of the unit's part; a part with all its rows gets its name. The
engine sees one long stream of requests, across parts.

Two threads work here. The engine's feeding thread reads units and asks for requests; the thread that runs the job reads
results and writes all rows. A record that could not be prepared is a request with an error, so its row comes as a result too.
"""

import contextlib
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

from ..engine.counters import Counters
from ..engine.requests import Request, Result
from ..errors import InputError, first_few
from ..progress import Progress
from ..records.columns import ASKS
from ..records.request import OVERRIDES
from ..records.sources import Source, Unit
from ..storage import AnyPath, StorePath
from ..terminal import say
from .logprobs import logprob_columns
from .manifest import Manifest
from .parts import Part, clean_up, part_name
from .pool import WorkerPool
from .progress import Tally
from .remarks import like_settings
from .sinks import Sink

__all__ = ["BatchJob", "Shard"]

_CHECK_SECONDS, _CHECK_STORE_SECONDS = 1.0, 10.0  # a request each, where the output is in an object store
_SHOWN_COLUMNS = 100
EMPTY = "the answer is empty, and no stop token ended it"


@dataclass(frozen=True)
class Shard:
    """The units that this process works on.

    Attributes:
        index: Units are its own whose number modulo `count` is this.
        count: Number of shards.
        size: Rows of a unit.
    """

    index: int = 0
    count: int = 1
    size: int = 1000

    def __post_init__(self):
        if self.size < 1:
            raise InputError(f"shard_size must be at least 1, got {self.size}")


class BatchJob:
    """One shard of a job.

    Args:
        source: Of the records.
        folder: For the parts; it exists.
        sink: Writes a part.
        shard: The units to work on.
        pool: Prepares records.
        make_engine: Called once there is a record without an answer; makes an Engine, or an object with its generate(), stats,
            summary() and processor.
        quiet: Make no remarks.
        manifest: Of the job; None if nothing else uses the folder.
        progress: Is told what the job is doing.
    """

    def __init__(
        self,
        source: Source,
        folder: AnyPath,
        sink: Sink,
        shard: Shard,
        pool: WorkerPool,
        make_engine: Callable[[], Any],
        quiet: bool = False,
        manifest: Manifest | None = None,
        progress: Progress | None = None,
    ):
        self._source, self._folder, self._sink, self._shard = source, folder, sink, shard
        self._pool, self._make_engine, self._manifest = pool, make_engine, manifest
        self._engine: Any = None
        self._open: dict[int, Part] = {}
        self._payloads: dict[tuple[int, int], Any] = {}  # of the records that are being prepared
        self._lock = threading.Lock()  # guards _open, which the reading of a unit, a finished part and park() use
        self._stopping, self._all_read = threading.Event(), False
        self._settled, self._unanswered = threading.Event(), False  # whether any record has no answer yet
        self._checked = time.monotonic()
        self._check_seconds = _CHECK_STORE_SECONDS if isinstance(folder, StorePath) else _CHECK_SECONDS
        self._began = 0.0
        self._found, self._finished = 0, 0  # parts that earlier runs and this one finished
        self._units = 0  # of the whole input, as far as it has been read
        self._quiet = quiet
        self._added: list[str] = []  # files that came to the input while the job ran
        self._unread: set[str] = set()  # columns of records that nothing reads
        self.notes: Counter[str] = Counter()  # of the records that this run prepared, for remarks
        self._own: dict[tuple[int, int], dict[str, Any]] = {}  # the user's own columns of the records that are under way
        self.tally = Tally(self._statistics)
        self._progress = progress or Progress(show=False)
        self._progress.follow(self.tally.figures)

    def stop(self) -> None:
        """From any thread: ask for no more requests. `run` returns as soon as those under way have their rows."""
        self._stopping.set()

    def park(self) -> None:
        """From any thread: stop, and write all finished rows to the disk now, from which another run goes on. Later rows are
        dropped."""
        self._stopping.set()
        for part in self._parts():
            part.close()

    def run(self) -> dict[str, Any]:
        """Work until every record of the shard has its row, or until stopped.

        Returns:
            The summary.
        """
        requests = self._requests()
        self._progress.tell("waiting for the first record")
        clean_up(self._folder, self._sink)
        try:
            first = self._first(requests)
            if first is not None:
                self._progress.tell("answering")
                self._began = time.perf_counter()
                with contextlib.closing(self._engine.generate(chain([first], requests))) as results:
                    for result in results:
                        self._answered(result)
                        self._finish_parts()
            self._finish_parts()
            self._check()
            self._look_for_added()
        finally:
            if self._open:
                self.park()
        return self.summary()

    def kept(self) -> str:
        """What is saved, in words."""
        return f"{self.tally.records:,} records are saved in {self._folder}"

    def _first(self, requests: Iterator[Request]) -> Request | None:
        """The first request; the engine is made while it is prepared. A finished shard has none, and needs no model."""
        with ThreadPoolExecutor(1) as thread:
            first = thread.submit(next, requests, None)
            first.add_done_callback(lambda _: self._settled.set())
            self._settled.wait()
            try:
                if self._unanswered:
                    self._progress.tell("loading jax")
                    self._engine = self._make_engine()
                    self._progress.tell("waiting for the first record")
            except BaseException:
                self._stopping.set()
                raise
            found = first.result()
        if found is not None:
            self._resuming()
        return found

    @property
    def answering(self) -> bool:
        """Whether requests are under way, whose answers a stop would lose."""
        return self._engine is not None

    def summary(self) -> dict[str, Any]:
        """Figures of the job so far, as JSON."""
        return {
            "shard_index": self._shard.index,
            "num_shards": self._shard.count,
            "complete": self._all_read and not self._open,
            "parts": self._found + self._finished,
            "missing_parts": len(self.missing_parts()),
            "unread_columns": sorted(self._unread),
            "unread_files": dict(sorted(self._source.unread.items())),
            "added_files": first_few(self._added),
            **self.tally.summary(),
            "worker_deaths": self._pool.deaths,
            "engine": {} if self._engine is None else self._engine.summary(),
        }

    def part_paths(self) -> list[AnyPath]:
        """Where the parts of the whole input are, or will be, once the input has been read."""
        return [Part.path_of(self._folder, number, self._sink) for number in range(self._units if self._all_read else 0)]

    def missing_parts(self) -> list[int]:
        """The parts of the whole input that no host has finished, once the input has been read."""
        there = {path.name for path in self._folder.glob("part-*")} if self._all_read else set()
        return [n for n in range(self._units) if self._all_read and f"{part_name(n)}{self._sink.ending}" not in there]

    def _statistics(self) -> Counters:
        """The engine's counters so far; it adds up its seconds only in the end."""
        if self._engine is None:
            return Counters()
        stats, compiling = self._engine.stats, self._engine.summary().get("compile_seconds", 0.0)
        return replace(stats, seconds=stats.seconds or max(0.0, time.perf_counter() - self._began - compiling))

    def _resuming(self) -> None:
        """Say what earlier runs have left, as far as it has been read."""
        if self.tally.records and not self._quiet:
            first = min(self._open, default=0)
            say(f"resuming from {part_name(first)}: {self.tally.records:,} records have their answers from other runs")

    def _check(self) -> None:
        """Raise JobError if another job has taken the folder over."""
        if self._manifest is not None:
            self._manifest.check()

    def _look_for_added(self) -> None:
        if self._all_read and not self._open:
            self._added = self._source.added()
        if self._added and not self._quiet:
            names = ", ".join(first_few(self._added))
            say(f"these files were added to the input after the job had begun, and are no part of it: {names}")

    # ---- records to requests

    def _requests(self) -> Iterator[Request]:
        """Prepared records, and in their place records that could not be prepared."""
        for (unit, position), request in self._pool.map(self._tasks(), self._stopping):
            self._source.check(self._payloads.pop((unit, position)))
            self.notes.update(request.notes)
            new = sorted(set(request.unread) - self._unread)
            if new and len(self._unread) < _SHOWN_COLUMNS:
                self._unread.update(new)
                self._tell_of_columns(new, request.own)
            self._own[unit, position] = request.own
            yield replace(request, id=(unit, position, request.id), own={})

    def _tell_of_columns(self, names: list[str], own: Mapping[str, Any]) -> None:
        """Say what becomes of columns that nothing reads."""
        if self._quiet:
            return
        if kept := [name for name in names if name in own]:
            say(f"these columns of the records are copied to their rows: {', '.join(kept)}")
        if left := [name for name in names if name not in own]:
            say(f"nothing reads these columns of the records, and rows do not keep them: {', '.join(left)}")
        if settings := like_settings(names):
            ours = ", ".join((*OVERRIDES, *ASKS))
            say(f"not read as settings or questions: {', '.join(settings)}; those of a record are {ours}")

    def _tasks(self) -> Iterator[tuple[tuple[int, int], Any]]:
        """((unit, position), payload) of every row that has no answer yet."""
        for unit in self._source.units(self._shard.size):
            if self._stopping.is_set():
                return
            self._units += 1
            if unit.index % self._shard.count != self._shard.index:
                continue
            self._check()
            part = Part.open(self._folder, unit.index, self._sink, self._manifest.key if self._manifest else "")
            if part is None:
                self._count_finished(unit)
                continue
            share = unit.share * self._shard.count
            part.row_share = share / self._shard.size
            with self._lock:
                self._open[unit.index] = part
            count = 0
            for row in unit.rows():
                count += 1
                answer = part.taken_over.pop(row.position, None)
                if answer is None:
                    self._payloads[unit.index, row.position] = row.payload
                    self._unanswered = True
                    self._settled.set()
                    yield (unit.index, row.position), row.payload
                else:
                    self.tally.add(answer, part.row_share, reused=True)
            with self._lock:
                part.forget(part.taken_over)  # what is left there is of no record
                exact = share / max(count, 1)
                self.tally.advance((exact - part.row_share) * len(part.done))
                part.row_share, part.expected = exact, count
        self._all_read = True

    def _count_finished(self, unit: Unit) -> None:
        self._found += 1
        path = Part.path_of(self._folder, unit.index, self._sink)
        try:
            for row in self._sink.read(path):
                self.tally.add(row, 0.0, reused=True)
        except (ValueError, LookupError, TypeError) as error:
            raise InputError(f"{path} is damaged ({error}): remove it, and its records are answered again") from error
        self.tally.advance(unit.share * self._shard.count, reused=True)

    # ---- results to rows

    def _answered(self, result: Result) -> None:
        """Write the row of a result."""
        unit, position, key = result.id
        error = result.error
        if error is None and not result.text and result.finish_reason != "stop":
            # No token but special ones is a sign of a broken model rather than of a short limit.
            said = self._engine.processor.decode(list(result.token_ids), skip_special_tokens=True)
            error = None if said else EMPTY
        row = {
            "id": key,
            "text": result.text if error is None else None,
            "error": error,
            "finish_reason": result.finish_reason if error is None else "error",
            "prompt_tokens": result.prompt_tokens,
            "new_tokens": result.new_tokens,
            "tiles": result.tiles,
            "seconds": round(result.seconds, 6),
            **logprob_columns(self._sink.logprobs, result.logprobs if error is None else None),
            **self._own.pop((unit, position), {}),
        }
        part = self._open[unit]
        with self._lock:  # together: the estimate of a row's share is corrected for the rows that the part has by then
            added, share = part.add(position, row), part.row_share
        if added:
            self.tally.add(row, share)
        if time.monotonic() - self._checked > self._check_seconds:
            self._check()
            self._checked = time.monotonic()

    def _parts(self) -> list[Part]:
        with self._lock:
            return list(self._open.values())

    def _finish_parts(self) -> None:
        """Give parts whose rows are all there their names."""
        for part in self._parts():
            if part.expected is not None and len(part.done) >= part.expected:
                with self._lock:  # park() leaves a part alone that is being finished
                    del self._open[part.index]
                with contextlib.nullcontext() if self._manifest is None else self._manifest.held(part.path):
                    part.finish()
                self._finished += 1
