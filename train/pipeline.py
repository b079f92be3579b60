"""Training data as a stream of batches with a position: shuffled, mixed, sharded over processes, read ahead by workers.

Grain shuffles and mixes records, element i of an endless sequence being a function of i alone, and prepares them in worker
processes. Rows are packed here, in the main process. The position is two numbers, records taken and rows returned since, so it
does not depend on the number of workers; to resume, one window of rows is read again.
"""

import math
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import numpy as np

from ..errors import CheckpointError, ConfigError, import_extra, sizes_apart
from ..processing.options import check_options
from ..terminal import say
from .config import DataConfig
from .packing import BatchShape, make_batch, plan_rows
from .plain import require_same, to_dict
from .records import Records, open_records
from .samples import Prepare, Sample, Skipped
from .worker import end_with_parent, unstopped

__all__ = ["TrainingData", "check_position", "dataset"]

_SHOWN = 20  # skipped records that are described at the end
_SHOWN_COLUMNS = 100
_IDLE = 1000  # skipped records in a row after which the run fails
_REASONS = ("faulty", "too_long")  # for which records are skipped
_MUCH_PADDING, _MANY_EMPTY = 0.25, 0.5  # shares of tokens and of places of tiles that are worth a remark


# What `TrainingData.state` consists of.
_POSITION = {"samples": int, "rows": int, "seed": int, "processes": int, "records": list, "packing": bool, "counts": dict}
# And what checkpoints of older versions do not have.
_LATER = {"contents": list, "settings": dict, "model": str}
# Settings that do not decide which row comes when, or that the position has itself.
_FREE = ("train", "batch_size", "workers", "packing")


def check_position(position: Any) -> None:
    """Raise CheckpointError unless this is a position as `TrainingData.state` returns it."""
    if not isinstance(position, dict):
        raise CheckpointError(f"its data position is {position!r:.80}")
    for name, kind in {**_POSITION, **{name: kind for name, kind in _LATER.items() if name in position}}.items():
        value = position.get(name)
        whole = [value] if kind is int else value.values() if name == "counts" and isinstance(value, dict) else ()
        if type(value) is not kind or not all(isinstance(n, int) and 0 <= n < 2**62 for n in whole):
            raise CheckpointError(f"{name} of its data position is {value!r:.80}")


def dataset(config: DataConfig, seed: int) -> tuple[Any, list[Records]]:
    """(the endless sequence of records as a Grain dataset, the records of each source).

    Sources are shuffled anew in each pass and mixed by their weights.

    Raises:
        ConfigError: no source is named.
        InputError: a source does not exist or cannot be read.
    """
    grain = import_extra("grain", "training data", "train")
    from absl import flags  # comes with Grain

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # Grain's workers read flags, which a program without absl's main() never parses
    if not config.train:
        raise ConfigError("data.train names no source: give a path, or a list of them")
    sources = [open_records(source) for source in config.train]
    parts = []
    for number, records in enumerate(sources):
        part = grain.MapDataset.source(records)
        if config.shuffle:
            part = part.seed(seed + number).shuffle()
        parts.append(part.repeat(None))
    return parts[0] if len(parts) == 1 else grain.MapDataset.mix(parts, _shares(config)), sources


def _shares(config: DataConfig) -> list[float]:
    """How often each source is drawn from."""
    weights = [source.weight for source in config.train]
    return [weight / sum(weights) for weight in weights]


def _deciding(config: DataConfig) -> dict[str, Any]:
    """The settings that decide which row comes when, as plain data."""
    settings = to_dict(config)
    columns = [source["columns"] for source in settings["train"]]
    kept = {name: value for name, value in settings.items() if name not in _FREE}
    return {**kept, "shares of the sources": _shares(config), "columns of the sources": columns}


class TrainingData:
    """Batches of one process, `accumulation` at a time, stacked.

    Iterate, call `state()` after each batch, and `close()` at the end: worker processes hold shared memory.

    Args:
        config: what is learned from.
        processor: directory of the processor's files.
        seed: of the shuffling.
        accumulation: batches that are stacked.
        index: of this process among all; it takes every `count`-th record.
        count: of processes.
        model: digest of what is trained, which belongs to a position as the data do.

    Attributes:
        processor: reads the conversations.
        shape: of a batch.
        sources: the opened records.
        counts: sums over the batches so far.
        told: the first of the records that were skipped.

    Raises:
        ConfigError: the rows of a batch cannot be divided over the processes, or no source is named, or
            a step takes more than the machine has memory.
    """

    def __init__(
        self,
        config: DataConfig,
        processor: str,
        *,
        seed: int,
        accumulation: int = 1,
        index: int = 0,
        count: int = 1,
        model: str = "",
    ):
        if config.batch_size % count:
            raise ConfigError(f"data.batch_size {config.batch_size} is not a multiple of the {count} processes of the run")
        self.config, self.accumulation = config, accumulation
        self._index, self._count, self._seed, self._model = index, count, seed, model
        self._prepare = Prepare(processor, config)
        self.processor = own = self._prepare.processor
        check_options(own)
        self._pad = own.tokenizer.pad_token_id
        self.shape = BatchShape.of(
            config,
            rows=config.batch_size // count,
            image_seq_len=own.image_seq_len,
            tile_size=own.image_processor.to_dict()["max_image_size"]["longest_edge"],
        )
        needed = accumulation * sum(math.prod(shape) * np.dtype(kind).itemsize for shape, kind in self.shape.arrays().values())
        if needed > (there := os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")):
            take, has, _ = sizes_apart(needed, there)
            raise ConfigError(
                f"the arrays of a step take {take}, and this machine has {has}: lower "
                "accumulation, data.batch_size, data.length or data.tiles_per_row"
            )
        self._dataset, self.sources = dataset(config, seed)
        self._records = [len(records) for records in self.sources]
        self._contents = [records.contents() for records in self.sources]
        self._settings = _deciding(config)
        self._taken = self._skip = 0
        self._stream: Iterator | None = None
        self.counts: Counter[str] = Counter()
        self.told: list[str] = []
        self._unread: set[str] = set()
        self._most_tiles = 0  # of a row so far
        # Of records read since the run began, some of which are of a window that is not begun: how many were skipped; and the
        # first of each since this start.
        self._skipped: Counter[str] = Counter()
        self._examples: dict[str, str] = {}
        self._example = "the first"
        self._remarked: set[str] = set()
        self._generator: Iterator | None = None

    # ---- position

    def state(self) -> dict[str, Any]:
        """The position after the last batch: plain numbers, for a checkpoint."""
        counts = {name: int(value) for name, value in self.counts.items()}
        return {
            "samples": self._taken,
            "rows": self._skip,
            "seed": self._seed,
            "processes": self._count,
            "records": self._records,
            "packing": self.config.packing,
            "counts": counts,
            "contents": self._contents,
            "settings": self._settings,
            "model": self._model,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continue after the batch for which `state()` was returned.

        Raises:
            CheckpointError: the same position would mean other data.
        """
        now = self.state()
        require_same("the checkpoint's data position", state, now, "seed", "processes", "packing")
        if state["records"] != self._records:
            counts = [", ".join(f"{n:,}" for n in numbers) for numbers in (state["records"], self._records)]
            raise CheckpointError(
                f"the checkpoint was trained on data.train of {counts[0]} records, and now it has {counts[1]}: put those back, "
                "or choose another output directory"
            )
        for source, before, found in zip(self.config.train, state.get("contents", ()), self._contents, strict=False):
            if before != found:
                raise CheckpointError(
                    f"{source.path} does not hold the records that the checkpoint was trained on, though as many: put "
                    "those back, or choose another output directory"
                )
        if state.get("model", self._model) != self._model:
            raise CheckpointError(
                "the model that training started from does not hold what it held when the checkpoint was made: put it back, or "
                "choose another output directory"
            )
        settings = state.get("settings", {})
        require_same("the data of the checkpoint", settings, self._settings, *(n for n in self._settings if n in settings))
        self.close()
        self._taken, self._skip = state["samples"], state["rows"]
        self.counts = Counter(state["counts"])
        self._skipped = Counter({name: self.counts[name] for name in _REASONS if self.counts[name]})
        self._example = "such as"

    # ---- batches

    def __iter__(self):
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        if self._generator is None:
            self._generator = self._rows()
        batches, shape = [], self.shape
        for _ in range(self.accumulation):
            rows = [next(self._generator) for _ in range(shape.rows)]
            batches.append(make_batch(rows, shape, self._pad))
            self.counts["tokens"] += sum(len(sample) for row in rows for sample in row)
            self.counts["room"] += shape.rows * shape.length
            self._most_tiles = max(self._most_tiles, *(sum(len(sample.tiles) for sample in row) for row in rows), 0)
            self.counts["tiles"] += sum(len(sample.tiles) for row in rows for sample in row)
            self.counts["tile_room"] += shape.rows * shape.tiles
            self.counts["samples"] += sum(len(row) for row in rows)
        if self.accumulation == 1:
            return batches[0]
        return {name: np.stack([batch[name] for batch in batches]) for name in batches[0]}

    def _rows(self) -> Iterator[list[Sample]]:
        """Rows of samples. A window of samples is packed together, so the position refers to its beginning."""
        while True:
            samples, seen = self._window()
            plan = plan_rows(samples, self.shape, alone=not self.config.packing)
            if self._skip and self._skip >= len(plan):
                raise CheckpointError(
                    f"the checkpoint was made after row {self._skip} of a window of data that now has {len(plan)}: the data, "
                    "or how it is prepared, is no longer what it was; put it back, or choose another output"
                )
            for number in range(self._skip + 1, len(plan) + 1):
                self._skip = number
                if number == len(plan):  # counted with the window's last row, so that resuming counts nothing twice
                    self._skip = 0
                    self._taken += seen.pop("records")
                    self.counts += seen
                yield [samples[n] for n in plan[number - 1]]

    def _window(self) -> tuple[list[Sample], Counter]:
        """The next samples, and counts of the records read for them."""
        starting = self._stream is None and bool(self.config.workers)
        if self._stream is None:
            self._stream = self._read(self._taken)
        seen: Counter[str] = Counter()
        samples: list[Sample] = []
        unlike: set[str] = set()  # descriptions of the records that were skipped since the last sample
        tokens = idle = 0
        want = self.config.window_rows * self.config.length if self.config.packing else 1
        while tokens < want:
            with unstopped() if starting else nullcontext():
                item = next(self._stream)
            starting = False
            seen["records"] += 1
            if isinstance(item, Skipped):
                idle += 1
                seen[item.reason] += 1
                told = f"{item.reason}: {item.detail}"
                self.told = list(dict.fromkeys([*self.told, told]))[:_SHOWN]  # a record comes again in each pass
                self._skipped[item.reason] += 1
                self._examples.setdefault(item.reason, item.detail)
                unlike.add(item.detail)
                if len(unlike) == sum(self._records):
                    first = min(unlike, key=lambda detail: (len(detail.partition(": ")[0]), detail))
                    raise ConfigError(f"none of the {len(unlike):,} records makes a sample; the first, {first}")
                if idle > _IDLE:
                    raise ConfigError(f"{_IDLE:,} records in a row make no sample; the last, {item.detail}")
                continue
            idle = 0
            unlike.clear()
            self._name_unread(item.unread)
            samples.append(item)
            tokens += len(item)
            seen["dropped_pictures"] += item.dropped
        return samples, seen

    def _name_unread(self, columns: tuple[str, ...]) -> None:
        """Say once, in one process of the run, which columns of the records nothing is learned from."""
        new = sorted(set(columns) - self._unread)
        if new and len(self._unread) < _SHOWN_COLUMNS:
            self._unread.update(new)
            if self._index == 0:
                say(f"nothing reads these columns of the training data: {', '.join(new)}")

    def _read(self, start: int):
        """Samples of this process from its record number `start` on, read ahead."""
        import grain

        own = self._dataset[self._index + start * self._count :: self._count].map(self._prepare)
        # Prepared samples wait in memory, megabytes each where pictures are split.
        ahead = 2 * self.shape.rows
        if not self.config.workers:
            return iter(own.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=ahead)))
        options = grain.MultiprocessingOptions(num_workers=self.config.workers, per_worker_buffer_size=2)
        reading = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
        return iter(own.to_iter_dataset(reading).mp_prefetch(options, worker_init_fn=end_with_parent))

    def close(self) -> None:
        """Stop the workers and release their shared memory. Iterating afterwards starts them again."""
        stream, self._stream, self._generator = self._stream, None, None
        if stream is not None and hasattr(stream, "close"):
            stream.close()

    def figures(self) -> dict[str, Any]:
        """For the log: shares of padding among tokens and tiles so far, samples taken, and records left out and why."""
        counts = self.counts
        share = lambda used, room: 1 - counts[used] / counts[room] if counts[room] else 0.0
        padding = {"padding": share("tokens", "room"), "tile_padding": share("tiles", "tile_room")}
        return padding | {name: counts[name] for name in ("samples", "too_long", "faulty", "dropped_pictures")}

    def remarks(self) -> list[str]:
        """What to tell the user of the data so far, each of it once: records that were skipped and why, and where much padding
        comes from."""
        config, found = self.config, {}
        if self._examples:
            room = f"data.length {config.length:,}" + (
                "" if config.tiles_per_row is None else f", {config.tiles_per_row} tiles"
            )
            words = {"too_long": f"too long for a row ({room})", "faulty": "faulty"}
            examples = {name: f", {self._example} {detail}" for name, detail in self._examples.items()}
            parts = [f"{n:,} {words[name]}{examples.get(name, '')}" for name, n in sorted(self._skipped.items())]
            read = self._skipped.total() + self.counts["samples"]
            found["skipped"] = f"skipped so far, of {read:,} records read: {'; '.join(parts)}"
        figures, causes = self.figures(), []
        if figures["padding"] > _MUCH_PADDING:
            why = "raise data.window_rows or change data.length" if config.packing else "data.packing is off"
            causes.append(f"{figures['padding']:.0%} of the tokens of a row ({why})")
        if self.shape.tiles and figures["tile_padding"] > _MANY_EMPTY:
            least = f"no row so far has more: data.tiles_per_row={self._most_tiles} would do"
            causes.append(f"{figures['tile_padding']:.0%} of its {self.shape.tiles} places for tiles ({least})")
        if causes:
            found["padding"] = f"padding, which is computed and not learned from: {' and '.join(causes)}"
        new = {name: text for name, text in found.items() if name not in self._remarked}
        self._remarked.update(new)
        return list(new.values())
