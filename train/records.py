"""Conversations by number, wherever they are stored. No jax in this module.

Grain asks for element i in any order and from any process, so a source here is a sequence: it knows its length, finds an
element without reading those before it, and can be pickled to a worker.

JSON lines are read here. All other formats are read by Hugging Face's `datasets`, which is imported only where it is needed.
"""

import bisect
import dataclasses
import io
import itertools
import json
import os
import re
import sys
from abc import ABC, abstractmethod
from array import array
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import InputError, import_extra
from ..records.conversations import Conversation, read_conversation
from .config import DataSource

__all__ = ["Element", "Records", "messages_of", "open_records", "read_element"]

_LINES = (".jsonl", ".ndjson")
_COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
# Ending -> the name of its reader in `datasets`.
_FORMATS = {".parquet": "parquet", ".pq": "parquet", ".arrow": "arrow", ".csv": "csv", ".json": "json"}


# A decoded record, or the error if it cannot be decoded; the folder that its relative paths start from; and its place.
Element = tuple[Any, str, str]


def messages_of(element: Element) -> list[dict[str, Any]]:
    """The messages of `read_element`."""
    return read_element(element).messages


def read_element(element: Element) -> Conversation:
    """The conversation of an element, ending with the assistant's turn.

    Raises:
        InputError: it cannot be read, or is no such conversation.
    """
    record, folder, _ = element
    if isinstance(record, InputError):
        raise record
    return read_conversation(record, folder=folder, last="assistant")


class Records(ABC):
    """A sequence of records. Subclasses set the length and read a row.

    Args:
        rows: how many there are.
        limit: use only the first so many.
        path: what to name where there are none.
    """

    def __init__(self, rows: int, limit: int | None, path: str | os.PathLike):
        self._length = rows if limit is None else min(limit, rows)
        if not self._length:
            raise InputError(f"{path}: no records")

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Element:
        index = int(index)
        if not 0 <= index < self._length:
            raise IndexError(index)
        return self._row(index)

    @abstractmethod
    def _row(self, index: int) -> Element: ...


class LineRecords(Records):
    """JSON lines: one record a line, blank lines aside, found by byte offsets that are noted once.

    `datasets` gives all rows of a column one type, which changes or refuses conversations whose rows have unlike shapes:
    content as a string beside content as a list, keys that are absent beside keys that are null.
    """

    def __init__(self, files: list[Path], limit: int | None = None):
        self._files = [os.path.abspath(file) for file in files]
        self._opened: dict[int, int | bytes] = {}
        self._starts = [_line_starts(file) for file in self._files]
        self._ends = list(itertools.accumulate(len(starts) - 1 for starts in self._starts))
        super().__init__(self._ends[-1], limit, ", ".join(self._files))

    def __getstate__(self):
        return {**self.__dict__, "_opened": {}}

    def _row(self, index: int) -> Element:
        number = bisect.bisect_right(self._ends, index)
        row = index - (self._ends[number - 1] if number else 0)
        file, (start, end) = self._files[number], self._starts[number][row : row + 2]
        if number not in self._opened:
            self._opened[number] = _unpacked(file) if file.endswith(_COMPRESSED) else os.open(file, os.O_RDONLY)
        opened = self._opened[number]
        # Threads share the handle, so no seeking.
        line = opened[start:end] if isinstance(opened, bytes) else os.pread(opened, end - start, start)
        try:
            record = json.loads(line.decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:
            record = InputError(f"not valid JSON: {error}")
        return record, os.path.dirname(file), f"{os.path.basename(file)}:{row + 1}"


def _unpacked(file: str) -> bytes:
    fsspec = import_extra("fsspec", "reading compressed files", "train")  # comes with `datasets`
    try:
        with fsspec.open(file, "rb", compression="infer") as opened:
            return opened.read()
    except (ValueError, OSError, EOFError) as error:
        raise InputError(f"{file} cannot be unpacked: {error}") from error


def _line_starts(file: str) -> array:
    """The offset of each line that is not blank, and the file's length."""
    starts, place = array("q"), 0
    with io.BytesIO(_unpacked(file)) if file.endswith(_COMPRESSED) else open(file, "rb") as lines:
        for line in lines:
            if line.strip():
                starts.append(place)
            place += len(line)
    starts.append(place)
    return starts


class DatasetRecords(Records):
    """Rows of a `datasets.Dataset`, as they are stored: pictures stay the bytes or the path that the dataset has."""

    def __init__(self, dataset, folder: str, name: str, limit: int | None = None):
        self._rows = dataset.with_format("arrow")
        self._features = type(dataset.features)(_without_media(dataset.features))
        self._folder, self._name = folder, name
        super().__init__(len(dataset), limit, name)

    def _row(self, index: int) -> Element:
        row = self._features.decode_example(self._rows[index].to_pylist()[0])
        return _plain(row), self._folder, f"{self._name}:{index + 1}"


def _without_media(feature):
    """The features of a dataset with pictures, videos and sounds left undecoded; columns of JSON are decoded."""
    if isinstance(feature, dict):
        return {name: _without_media(value) for name, value in feature.items()}
    if isinstance(feature, list):
        return [_without_media(value) for value in feature]
    if hasattr(feature, "feature"):
        return dataclasses.replace(feature, feature=_without_media(feature.feature))
    return dataclasses.replace(feature, decode=False) if type(feature).__name__ in ("Image", "Video", "Audio") else feature


def _plain(value):
    """Arrow gives every struct every key: keys without a value are removed again."""
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items() if v is not None}
    if isinstance(value, list):
        return [_plain(v) for v in value]
    return value


def open_records(source: DataSource | str) -> Records:
    """Open one source of the mixture; see `DataSource` for what its path may be.

    Raises:
        InputError: there is nothing, or nothing that can be read.
    """
    source = DataSource(source) if isinstance(source, str) else source
    path = Path(source.path)
    if path.is_file():
        return _open_file(path, source)
    if path.is_dir():
        return _open_directory(path, source)
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", source.path) or _ending(path) in (*_LINES, *_FORMATS):
        raise InputError(f"no training data at {path}: no such file or directory")
    return _open_named(source)


def _ending(path: Path) -> str:
    """The ending that says what a file holds, compressed or not."""
    inner = Path(path.stem) if path.suffix in _COMPRESSED else path
    return inner.suffix.lower()


def _open_file(path: Path, source: DataSource) -> Records:
    _refuse_splits(path, source)
    ending = _ending(path)
    if ending in _LINES:
        return LineRecords([path], source.limit)
    if ending not in _FORMATS:
        known = ", ".join((*_LINES, *_FORMATS))
        raise InputError(f"{path} is no file of conversations: its name ends in none of {known}, compressed or not")
    return _read_files(_FORMATS[ending], [str(path)], source)


def _open_directory(path: Path, source: DataSource) -> Records:
    several = (path / "dataset_dict.json").is_file()
    if several or (path / "state.json").is_file():
        if not several:
            _refuse_splits(path, source)
        with _reading(path) as datasets:
            found = datasets.load_from_disk(path / source.split if several else path)
        return DatasetRecords(found, os.path.abspath(path), path.name, source.limit)
    files = [p for p in sorted(path.rglob("*")) if not p.name.startswith((".", "_"))]
    # Pictures beside conversations do not make an image folder of a directory, as they would by `datasets`' rules.
    lines = [p for p in files if _ending(p) in _LINES and p.name != "metadata.jsonl"]
    if not lines or any(_ending(p) in (".parquet", ".pq") for p in files):
        return _open_named(source)
    named = [p for p in lines if p.name.startswith(source.split) or source.split in p.relative_to(path).parts[:-1]]
    if not named:
        _refuse_splits(path, source)
    return LineRecords(named or lines, source.limit)


def _refuse_splits(path: Path, source: DataSource) -> None:
    if source.split != "train" or source.name is not None:
        raise InputError(f"{path} has neither splits nor configurations: leave out split and name")


def _open_named(source: DataSource) -> Records:
    """A directory of files in splits, or a dataset of the Hub. Only the files of the split that is asked for are read."""
    with _reading(source.path, "holds no training data") as datasets:
        builder = datasets.load_dataset_builder(source.path, source.name)
    splits = builder.config.data_files or {}
    if source.split not in splits:
        raise InputError(f"{source.path} has no split {source.split}; it has {', '.join(map(str, splits)) or 'none'}")
    return _read_files(builder.name, list(splits[source.split]), source)


def _read_files(reader: str, files: list[str], source: DataSource) -> Records:
    with _reading(source.path) as datasets:
        found = _load(datasets, reader, files)
    name = os.path.basename(files[0] if len(files) == 1 else source.path)
    return DatasetRecords(found, os.path.dirname(os.path.abspath(files[0])), name, source.limit)


def _load(datasets, reader: str, files: list[str]):
    if reader == "arrow":
        try:  # mapped into memory where they are; everything else is converted into the cache of `datasets`
            return datasets.concatenate_datasets([datasets.Dataset.from_file(file) for file in files])
        except (OSError, ValueError):
            pass  # not local, or not a stream
    return datasets.load_dataset(reader, data_files=files, split="train")


@contextmanager
def _reading(path: str | os.PathLike, problem: str = "cannot be read") -> Iterator[Any]:
    """`datasets`, whose errors become one InputError that names the path."""
    datasets = import_extra("datasets", "reading anything but JSON lines", "train")
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    try:
        yield datasets
    except (datasets.exceptions.DatasetsError, OSError, ValueError, KeyError) as error:
        raise InputError(f"{path} {problem}: {' '.join(str(error).split())}") from error
