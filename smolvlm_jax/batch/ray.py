"""Ray Data: `dataset.map_batches(SmolVLMPreprocessor, …).map_batches(SmolVLMPredictor, …)`.

The first runs on CPU workers, as many as there are cores, and turns rows into arrays; the second holds the model on an
accelerator. Rows mean what the rows of a batch job's Parquet input mean: `messages`, or `prompt` with `image`, `images`,
`video` or `videos`, and sampling arguments. Ray itself is not imported here: it imports this.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from ..engine.requests import Prepared, Request, Result
from ..generation_config import SamplingParams
from ..records.record import FIELDS, record_from
from .sinks import COLUMNS
from .workers import Made, Preparer, Setup

__all__ = ["PREPARED", "SmolVLMPredictor", "SmolVLMPreprocessor"]

# The column of bytes that goes from one to the other.
PREPARED = "smolvlm_prepared"
_MEDIA = ("messages", "body", "image", "images", "video", "videos", PREPARED)
_PICTURES = ("max_tiles", "do_upscale", "do_image_splitting")


class SmolVLMPreprocessor:
    """Rows to arrays, on a CPU. Adds the column PREPARED and drops pictures, videos and messages, which are in it.

    model: bundled name or directory, for its processor. prompt: for rows without one of their own. columns: name here -> name
    in the dataset. Other keywords are fields of SamplingParams, defaults that a row may override, and max_tiles, do_upscale
    and do_image_splitting. The seed of a row follows from `seed` and the row's `id`.
    """

    def __init__(self, model: str = "tiny", *, prompt: str | None = None, columns: Mapping[str, str] | None = None, **options):
        from ..checkpoint import resolve

        pictures = {name: options.pop(name) for name in _PICTURES if name in options}
        self._columns = tuple((columns or {}).items())
        self._prompt = prompt
        parse = lambda row: record_from(row, "", prompt=self._prompt, columns=self._columns)
        self._prepare = Preparer(Setup(str(resolve(model)), parse, SamplingParams(**options), pictures))

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """A batch as Ray gives it, each column an array of n, with one more column."""
        dropped = {*_MEDIA, *(column for name, column in self._columns if name in _MEDIA)}
        kept = {name: values for name, values in batch.items() if name not in dropped}
        return {**kept, PREPARED: _objects(_pack(self._prepare(row)) for row in _rows(batch, self._columns))}


class SmolVLMPredictor:
    """Rows to answers, on an accelerator. Adds text, error, finish_reason, prompt_tokens, new_tokens, tiles and seconds.

    Rows that SmolVLMPreprocessor has seen are answered as they are; others are prepared first, with `prompt`, `columns` and
    sampling arguments as there. engine: fields of EngineConfig, and dtype, mesh and keep_special_tokens of load_engine.

    The engine runs dry at the end of every batch, so make batches a few times larger than its slots.
    """

    def __init__(self, model: str = "tiny", *, engine: Mapping[str, Any] | None = None, **options):
        from ..engine.loading import load_engine

        self._model, self._options, self._preprocess = model, options, None
        self._engine = load_engine(model, **(engine or {}))

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """A batch as Ray gives it, with the answers in place of what was asked."""
        if PREPARED not in batch:
            self._preprocess = self._preprocess or SmolVLMPreprocessor(self._model, **self._options)
            batch = self._preprocess(batch)
        made = [_unpack(data) for data in batch[PREPARED]]
        rows: list[Result | None] = [
            None if one.error is None else Result(number, None, one.error, "error", 0, 0, 0) for number, one in enumerate(made)
        ]
        requests = (
            Request(number, prepared=one.prepared, params=one.params) for number, one in enumerate(made) if one.error is None
        )
        for result in self._engine.generate(requests):
            rows[result.id] = result
        out = {name: values for name, values in batch.items() if name != PREPARED}
        for name in COLUMNS[1:]:
            values = (getattr(row, name) for row in rows)
            out[name] = _objects(values) if name in ("text", "error") else np.asarray(list(values))
        return out


def _rows(batch: dict[str, np.ndarray], columns: tuple[tuple[str, str], ...]) -> Iterator[dict[str, Any]]:
    """One dictionary of plain values for each row, of the columns that records are made of."""
    names = [name for name in batch if name in {*FIELDS, *(column for _, column in columns)}]
    for number in range(len(next(iter(batch.values()), ()))):
        yield {name: _plain(batch[name][number]) for name in names}


def _plain(value: Any) -> Any:
    """Arrow's and numpy's values as Python's; not-a-number, which is how a missing number arrives, as None."""
    if isinstance(value, np.ndarray):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and value != value else value


def _objects(values) -> np.ndarray:
    values = list(values)
    out = np.empty(len(values), object)
    out[:] = values
    return out


def _pack(made: Made) -> bytes:
    """A header of JSON, a line end, ids, tiles, digests."""
    header: dict[str, Any] = {"error": made.error}
    parts: list[bytes] = []
    if made.prepared is not None:
        ids, tiles = np.ascontiguousarray(made.prepared.input_ids, np.int32), np.ascontiguousarray(made.prepared.tiles)
        header |= {"ids": len(ids), "tiles": tiles.shape, "params": vars(made.params)}
        parts = [ids.tobytes(), tiles.tobytes(), *made.prepared.digests]
    return b"".join([json.dumps(header).encode(), b"\n", *parts])


def _unpack(data: bytes) -> Made:
    head, _, body = bytes(data).partition(b"\n")
    header = json.loads(head)
    if header["error"] is not None:
        return Made("", SamplingParams(), None, header["error"])
    shape = tuple(header["tiles"])
    ids, size = 4 * header["ids"], int(np.prod(shape))
    digests = body[ids + size :]
    width = len(digests) // shape[0] if shape[0] else 1
    prepared = Prepared(
        np.frombuffer(body, np.int32, header["ids"]),
        np.frombuffer(body, np.uint8, size, ids).reshape(shape),
        tuple(digests[start : start + width] for start in range(0, len(digests), width)),
    )
    return Made("", SamplingParams(**header["params"]), prepared)
