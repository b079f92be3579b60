"""Conversations by number, wherever they are stored: JSON lines, Parquet, a Hugging Face dataset directory. No jax in here.

Grain asks for element i in any order and from any process, so a source here is a sequence: it knows its length, finds an
element without reading those before it, and can be pickled to a worker. An element is a decoded record; `messages_of` makes
chat messages of it, by the rules of the batch job.
"""

import bisect
import itertools
import json
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InputError, MissingExtraError
from ..records.record import record_from
from .config import Source

__all__ = ["Records", "messages_of", "open_records"]

_JSONL, _PARQUET, _ARROW = (".jsonl", ".ndjson"), (".parquet", ".pq"), (".arrow",)


class Records:
    """Files read as one sequence. Subclasses open a file (`_open`), count it (`_count`) and read a row of it (`_row`)."""

    def __init__(self, files: list[Path], limit: int | None = None):
        self.files = [os.path.abspath(file) for file in files]
        self._ends = list(itertools.accumulate(self._count(file) for file in self.files))
        total = self._ends[-1] if self._ends else 0
        self._length = total if limit is None else min(limit, total)
        self._opened: dict[int, Any] = {}
        self._lock = threading.Lock()
        if not self._length:
            raise InputError(f"{', '.join(self.files)}: no records")

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> tuple[dict, str, str]:
        """(record, the folder that its relative paths start from, where it stands). A faulty line is an InputError."""
        index = int(index)
        if not 0 <= index < self._length:
            raise IndexError(index)
        number = bisect.bisect_right(self._ends, index)
        row = index - (self._ends[number - 1] if number else 0)
        with self._lock:  # Grain reads with several threads
            if number not in self._opened:
                self._opened[number] = self._open(number)
        file = self.files[number]
        return self._row(number, self._opened[number], row), os.path.dirname(file), f"{os.path.basename(file)}:{row + 1}"

    def __getstate__(self):
        return {k: v for k, v in self.__dict__.items() if k not in ("_opened", "_lock")}

    def __setstate__(self, state):
        self.__dict__.update(state, _opened={}, _lock=threading.Lock())


class JsonlRecords(Records):
    """One record a line, blank lines aside, found by byte offsets that are noted once."""

    def _count(self, file: str) -> int:
        starts, place = [], 0
        with open(file, "rb") as lines:
            for line in lines:
                if line.strip():
                    starts.append(place)
                place += len(line)
        self.__dict__.setdefault("_starts", []).append(np.array(starts, np.int64))
        return len(starts)

    def _open(self, number: int):
        return os.open(self.files[number], os.O_RDONLY)

    def _row(self, number: int, handle: int, row: int) -> dict:
        starts = self._starts[number]
        end = starts[row + 1] if row + 1 < len(starts) else os.fstat(handle).st_size
        line = os.pread(handle, int(end - starts[row]), int(starts[row]))  # threads share the handle, so no seeking
        try:
            return json.loads(line.decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:
            raise InputError(f"not valid JSON: {error}") from error


class ParquetRecords(Records):
    """One record a row. The row group read last is kept, which shuffled reading makes little of: write small row groups."""

    def _count(self, file: str) -> int:
        parquet = _pyarrow().parquet
        try:
            with parquet.ParquetFile(file) as opened:
                groups = [opened.metadata.row_group(i).num_rows for i in range(opened.metadata.num_row_groups)]
        except (_pyarrow().ArrowException, OSError) as error:
            raise InputError(f"{file} is no Parquet file that can be read: {error}") from error
        self.__dict__.setdefault("_groups", []).append(list(itertools.accumulate(groups)))
        return sum(groups)

    def _open(self, number: int):
        return {"file": _pyarrow().parquet.ParquetFile(self.files[number]), "group": (None, None)}

    def _row(self, number: int, handle: dict, row: int) -> dict:
        ends = self._groups[number]
        group = bisect.bisect_right(ends, row)
        with self._lock:
            kept, table = handle["group"]
            if kept != group:
                table = handle["file"].read_row_group(group)
                handle["group"] = (group, table)
        place = row - (ends[group - 1] if group else 0)
        return _plain(table.slice(place, 1).to_pylist()[0])


class ArrowRecords(Records):
    """What `Dataset.save_to_disk` writes: Arrow streams, mapped into memory."""

    def _table(self, file: str):
        pyarrow = _pyarrow()
        try:
            source = pyarrow.memory_map(file)
            try:
                return pyarrow.ipc.open_stream(source).read_all()
            except pyarrow.ArrowInvalid:
                return pyarrow.ipc.open_file(source).read_all()
        except (pyarrow.ArrowException, OSError) as error:
            raise InputError(f"{file} is no Arrow file that can be read: {error}") from error

    def _count(self, file: str) -> int:
        return self._table(file).num_rows

    def _open(self, number: int):
        return self._table(self.files[number])

    def _row(self, number: int, handle, row: int) -> dict:
        return _plain(handle.slice(row, 1).to_pylist()[0])


def _pyarrow():
    try:
        import pyarrow.parquet

        return pyarrow
    except ImportError as error:
        raise MissingExtraError("reading Parquet and Arrow", "parquet") from error


def _plain(value):
    """Arrow gives every struct every key: the ones without a value are left out again."""
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items() if v is not None}
    if isinstance(value, list):
        return [_plain(v) for v in value]
    return value


def open_records(source: Source | str) -> Records:
    """Open one source of the mixture.

    Its path: a .jsonl or .parquet file; a directory that `Dataset.save_to_disk` wrote (of a DatasetDict, the train split is
    taken); or a directory with such files in it or below, as datasets are published, of which those named train are taken if
    there are any. Raises InputError where nothing is found.
    """
    source = Source(source) if isinstance(source, str) else source
    path = Path(source.path)
    if path.is_file():
        return _kind([path])([path], source.limit)
    if not path.is_dir():
        raise InputError(f"no training data at {path}: no such file or directory")
    if (path / "dataset_dict.json").is_file() and (path / "train").is_dir():
        path = path / "train"
    if (path / "state.json").is_file():
        try:
            named = json.loads((path / "state.json").read_text(encoding="utf-8"))["_data_files"]
            files = [path / entry["filename"] for entry in named]
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path / 'state.json'} is not a dataset's: {error!r}") from error
        return ArrowRecords(files, source.limit)
    for endings in (_PARQUET, _JSONL, _ARROW):
        found = sorted(p for p in path.rglob("*") if p.suffix in endings and not p.name.startswith((".", "_")))
        found = [p for p in found if p.name.startswith("train") or "train" in p.relative_to(path).parts[:-1]] or found
        if found:
            return _kind(found)(found, source.limit)
    raise InputError(f"{path} holds no training data: no {', '.join((*_JSONL, *_PARQUET, *_ARROW))} file")


def _kind(files: list[Path]) -> type[Records]:
    for endings, kind in ((_JSONL, JsonlRecords), (_PARQUET, ParquetRecords), (_ARROW, ArrowRecords)):
        if files[0].suffix in endings:
            return kind
    raise InputError(f"{files[0]} is no file of conversations: its name ends in none of {', '.join((*_JSONL, *_PARQUET))}")


_NEXT = {"role": "user", "content": [{"type": "text", "text": "."}]}


def messages_of(record: Any, folder: str = "") -> list[dict[str, Any]]:
    """Chat messages of a record, ending with the assistant's turn.

    The batch job's records with assistant turns in their messages; or those without messages ({"prompt", "image", …}) with
    an "answer". Content items {"type": "image"} that carry no picture take the record's `images` in order, as datasets for
    other trainers have it. Raises InputError for anything else.
    """
    if not isinstance(record, Mapping):
        raise InputError(f"a record is a JSON object, this is a {type(record).__name__}")
    answer = record.get("answer")
    record = {name: value for name, value in record.items() if name not in ("id", "custom_id")}
    body = record.get("body") if isinstance(record.get("body"), Mapping) else record
    given = body.get("messages")
    if isinstance(given, str):
        try:
            given = json.loads(given)
        except (ValueError, RecursionError) as error:
            raise InputError(f"messages is not valid JSON: {error}") from error
    if isinstance(given, list) and all(isinstance(m, Mapping) for m in given):
        given = _with_pictures(given, record.get("images") or [])
        # The batch job's reader refuses records whose last turn is the assistant's: there, nothing would be left to answer.
        record = {"messages": [*given, _NEXT]}
    read = record_from(record, "", folder=folder)
    if read.error is not None:
        raise InputError(read.error)
    messages = read.messages if given is None else read.messages[:-1]
    if answer is not None:
        if not isinstance(answer, str):
            raise InputError(f"answer is a {type(answer).__name__}; it needs a string")
        messages = [*messages, {"role": "assistant", "content": [{"type": "text", "text": answer}]}]
    if messages[-1].get("role") != "assistant":
        raise InputError("the last message is not the assistant's, so there is nothing to learn: add its turn, or an answer")
    return messages


def _with_pictures(messages: list[Mapping], images: list) -> list[Mapping]:
    left = list(images)
    out = []
    for message in messages:
        content = message.get("content")
        if isinstance(content, list):
            filled = []
            for item in content:
                bare = isinstance(item, Mapping) and item.get("type") == "image" and not set(item) - {"type", "text"}
                if bare:
                    if not left:
                        raise InputError("an image item without a picture, and no images left in the record")
                    item = {"type": "image", "image": left.pop(0)}
                filled.append(item)
            message = {**message, "content": filled}
        out.append(message)
    return out
