"""Ray Data: `dataset.map_batches(SmolVLMPreprocessor, …).map_batches(SmolVLMPredictor, …)`.

The first runs on CPU workers, as many as there are cores, and turns rows into arrays; the second holds the model on an
accelerator. Rows are read like those of a batch job's Parquet input, in the same layouts; pictures and videos may be arrays of
uint8 too. Ray itself is not imported here; it imports this module.
"""

import io
import pickle
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from ..child import PlainUnpickler
from ..engine.requests import Request, Result
from ..errors import InputError
from ..generation_config import SamplingParams
from ..media_options import PictureOptions
from ..records.columns import CHATS, MEDIA
from ..records.record import Record, check_names, id_from, record_from
from .logprobs import LOGPROBS, logprob_columns
from .sinks import COLUMNS
from .workers import Preparer, Setup, longest_prompt

__all__ = ["PREPARED", "SmolVLMPredictor", "SmolVLMPreprocessor"]

# The column that the first adds for the second: bytes of a Request, as a worker process sends it. A data set may bring a column
# of this name, so it is read like the message of such a process.
PREPARED = "smolvlm_prepared"
_DROPPED = (*CHATS, "body", *MEDIA, PREPARED)


class SmolVLMPreprocessor:
    """Rows to arrays, on a CPU. Adds the column PREPARED and drops pictures, videos and messages, which are in it.

    Args:
        model: Bundled name or directory, for its processor.
        adapter: A PEFT adapter for the model.
        prompt: For rows without one of their own.
        columns: Our name of a column -> its name in the dataset.
        options: Fields of SamplingParams, which a row may set for itself, and of PictureOptions. The seed of a row follows
            from `seed` and the row's `id`.

    Raises:
        InputError: an option is unknown or out of range, or an argument of SmolVLMPredictor.
    """

    def __init__(
        self,
        model: str | None = None,
        *,
        adapter: str | None = None,
        prompt: str | None = None,
        columns: Mapping[str, str] | None = None,
        **options,
    ):
        from ..locate import adapted, resolve

        if "logprobs" in options:
            raise InputError("logprobs is an argument of SmolVLMPredictor, which adds the columns")
        names = [field.name for field in fields(PictureOptions) if field.name in options]
        pictures = PictureOptions(**{name: options.pop(name) for name in names})
        self._columns = tuple((columns or {}).items())
        check_names(self._columns)
        parse = _Parse(prompt, self._columns)
        source, base = adapted(model, adapter)
        directory = str(resolve(source, base=base))
        self._prepare = Preparer(Setup(directory, parse, SamplingParams(**options), pictures, longest_prompt(directory)))

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Prepare a batch.

        Args:
            batch: as Ray gives it: each column an array of n.

        Returns:
            The batch with one more column, and without those that are in it.

        Raises:
            InputError: a column has the name of one of the answers'.
        """
        mapped = {column for _, column in self._columns}
        if clash := [name for name in COLUMNS[1:] if name in batch and name not in mapped]:
            raise _taken(clash[0])
        dropped = {*_DROPPED, *(column for name, column in self._columns if name in _DROPPED)}
        kept = {name: values for name, values in batch.items() if name not in dropped}
        prepared = [pickle.dumps(self._prepare(row), protocol=5) for row in _rows(batch)]
        return {**kept, PREPARED: np.array(prepared, object)}


class SmolVLMPredictor:
    """Rows to answers, on an accelerator. Adds text, error, finish_reason, prompt_tokens, new_tokens, tiles and seconds.

    Rows that SmolVLMPreprocessor has prepared are answered as they are; others are prepared first. At the end of every batch
    the engine waits for its last answers, so make batches a few times larger than its slots.

    Args:
        model: Bundled name, directory or Hub id.
        adapter: A PEFT adapter that is merged into the model.
        logprobs: "mean" adds mean_logprob and min_logprob, "tokens" token_logprobs too, as in a batch job.
        engine: Fields of EngineConfig, and dtype, mesh and keep_special_tokens of `load_engine`.
        options: Of SmolVLMPreprocessor, for rows that it has not prepared.

    Raises:
        InputError: an option is unknown or out of range.
    """

    def __init__(
        self,
        model: str | None = None,
        *,
        adapter: str | None = None,
        logprobs: str | None = None,
        engine: Mapping[str, Any] | None = None,
        **options,
    ):
        from ..engine.loading import load_engine
        from ..locate import adapted

        if logprobs is not None and logprobs not in LOGPROBS:
            raise InputError(f"logprobs is one of {', '.join(LOGPROBS)}, got {logprobs!r:.80}")
        self._logprobs = LOGPROBS[logprobs] if logprobs else ()
        self._model, self._options = model, {"adapter": adapter, **options}
        self._preprocess: SmolVLMPreprocessor | None = None
        source, base = adapted(model, adapter)
        self._engine = load_engine(source, base=base, **(engine or {}))

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Answer a batch.

        Args:
            batch: as Ray gives it: each column an array of n.

        Returns:
            The batch with the answers in place of what was asked.

        Raises:
            InputError: a column has the name of one of the answers'.
        """
        if clash := [name for name in self._logprobs if name in batch]:
            raise _taken(clash[0])
        if PREPARED not in batch:
            self._preprocess = self._preprocess or SmolVLMPreprocessor(self._model, **self._options)
            batch = self._preprocess(batch)
        prepared = (PlainUnpickler(io.BytesIO(data)).load() for data in batch[PREPARED])
        requests = (self._asked(number, request) for number, request in enumerate(prepared))
        rows: list[Result] = sorted(self._engine.generate(requests), key=lambda result: result.id)
        out = {name: values for name, values in batch.items() if name != PREPARED}
        for name in COLUMNS[1:]:
            values = [getattr(row, name) for row in rows]
            out[name] = np.array(values, object if name in ("text", "error") else None)
        found = [logprob_columns(self._logprobs, row.logprobs) for row in rows]
        return {**out, **{name: _objects([values[name] for values in found]) for name in self._logprobs}}

    def _asked(self, number: int, request: Request) -> Request:
        """The request under its row's number, asking for what the columns need."""
        return replace(request, id=number, params=replace(request.params, logprobs=0 if self._logprobs else None))


def _taken(column: str) -> InputError:
    return InputError(f"the rows have a column {column!r}, which the answers would replace: rename it, or drop it")


def _objects(values: list[Any]) -> np.ndarray:
    """One object for each value, lists of equal length too."""
    out = np.empty(len(values), object)
    out[:] = values
    return out


@dataclass(frozen=True)
class _Parse:
    """From a row of plain values to its record."""

    prompt: str | None
    columns: tuple[tuple[str, str], ...]

    def __call__(self, row: dict[str, Any]) -> Record:
        return record_from(row, "", prompt=self.prompt, columns=self.columns)

    def identify(self, row: dict[str, Any]) -> str | int:
        """As in Parser."""
        return id_from(row, "", self.columns)


def _rows(batch: dict[str, np.ndarray]) -> Iterator[dict[str, Any]]:
    """One dictionary of plain values for each row."""
    for number in range(len(next(iter(batch.values()), ()))):
        yield {name: _plain(values[number]) for name, values in batch.items() if name != PREPARED}


def _plain(value: Any) -> Any:
    """Values of Arrow and numpy as Python's, but for pixels; a missing number arrives as not-a-number and becomes None."""
    if isinstance(value, np.ndarray) and value.ndim >= 3 and value.dtype == np.uint8:
        return value
    if isinstance(value, np.datetime64):  # which would become a number of nanoseconds
        return str(value).replace("T", " ")
    if isinstance(value, (np.ndarray, np.generic)):
        value = value.tolist()
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and value != value else value
