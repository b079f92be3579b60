"""Conversations by number, wherever they are stored. No jax in this module.

Grain asks for element i in any order and from any process, so a source here is a sequence: it knows its length, finds an
element without reading those before it, and can be pickled to a worker.

Files of lines, and what batch jobs turn into such (JSON, tables, WebDataset), are read as batch jobs read them. All other
formats are read by Hugging Face's `datasets`, which is imported only where it is needed. splits.py chooses among the files of a
directory.
"""

import bisect
import dataclasses
import hashlib
import itertools
import json
import os
import re
import sys
from abc import ABC, abstractmethod
from array import array
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import InputError, import_extra
from ..records.arrow import checked_pages, damage_of, is_empty
from ..records.columns import renamed, require_pdfs
from ..records.conversations import Conversation, read_conversation
from ..records.kinds import is_media
from ..records.sources import LINES
from ..records.sources.identity import Inputs
from ..records.sources.jsonl import MAX_LINE, JsonlSource, Opened, from_offset, open_lines
from ..records.sources.plain import ending_of
from ..staging import folder_of_copies, local_copy, reading
from ..storage import StorePath, place
from ..terminal import say
from .config import DataSource
from .splits import choose_files

__all__ = ["Element", "Records", "messages_of", "open_records", "read_element"]

_LINES = {ending: kind for kind in LINES for ending in kind.endings}
# Ending -> the name of its reader in `datasets`.
_FORMATS = {".parquet": "parquet", ".pq": "parquet", ".arrow": "arrow"}


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

    Attributes:
        columns: pairs (our name of a column, its name in the data).
        origin: (a local directory, the URL that it is a copy of), if the records are in a store.
    """

    columns: tuple[tuple[str, str], ...] = ()
    origin: tuple[str, str] | None = None

    def __init__(self, rows: int, limit: int | None, path: str | os.PathLike):
        self._length = rows if limit is None else min(limit, rows)
        if not self._length:
            raise _no_records(path)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Element:
        index = int(index)
        if not 0 <= index < self._length:
            raise IndexError(index)
        record, folder, where = self._row(index)
        if self.columns and isinstance(record, Mapping):
            try:
                record = renamed(record, self.columns, parts=True)
                require_pdfs(record, self.columns)
            except InputError as error:
                record = error
        if self.origin is not None:
            folder = self.origin[1] + folder.removeprefix(self.origin[0])
        return record, folder, where

    @abstractmethod
    def _row(self, index: int) -> Element: ...

    @abstractmethod
    def contents(self) -> str:
        """A digest of what the files of records hold, wherever they stand. Pictures that records name are not part of it.

        Raises:
            ChangedError: a file is no longer what it was when the records were opened.
        """


class LineRecords(Records):
    """Files of lines: one record a line, blank lines aside, found by byte offsets that are noted once.

    `datasets` gives all rows of a column one type, which changes or refuses conversations whose rows have unlike shapes:
    content as a string beside content as a list, keys that are absent beside keys that are null.

    Raises:
        ChangedError: also where an element is read, if the file is no longer what it was.
    """

    def __init__(self, files: Sequence[Path], limit: int | None = None):
        self._inputs = Inputs([os.path.abspath(file) for file in files])
        self._opened: dict[int, Opened] = {}
        self._starts = [self._line_starts(number) for number in range(len(files))]
        self._ends = list(itertools.accumulate(len(starts) - 1 for starts in self._starts))
        super().__init__(self._ends[-1], limit, ", ".join(self._inputs.paths))

    def __getstate__(self):
        return {**self.__dict__, "_opened": {}}

    def contents(self) -> str:
        return _digest(self._inputs)

    def _row(self, index: int) -> Element:
        number = bisect.bisect_right(self._ends, index)
        row = index - (self._ends[number - 1] if number else 0)
        start, end = self._starts[number][row : row + 2]
        opened, kind, path = self._file(number), self._kind(number), self._inputs.paths[number]
        # Threads share the handle, so no seeking.
        read = None  # too long
        if end - start <= MAX_LINE:
            line = os.pread(opened.lines.fileno(), end - start, start)
            read = kind.completed(line if start else line.removeprefix(b"\xef\xbb\xbf"), opened.whole)
        if opened.original is not None:
            self._inputs.check(number, opened.original)
        try:
            record = kind.decode(row + 1, read)
        except InputError as error:
            record = error
        return record, os.path.dirname(path), f"{os.path.basename(path)}:{row + 1}"

    def _kind(self, number: int):
        return _LINES.get(ending_of(self._inputs.paths[number]), JsonlSource)

    def _file(self, number: int) -> Opened:
        if number not in self._opened:
            self._opened[number] = open_lines(self._kind(number), self._inputs, number)
        return self._opened[number]

    def _line_starts(self, number: int) -> array:
        """The offset of each line that is not blank, and the file's length."""
        starts, place, opened = array("q"), 0, self._file(number)
        file, begun = from_offset(opened.lines), False  # begun: a line of which a part has been read
        while part := file.readline(MAX_LINE):
            if not begun and (part.strip() or len(part) == MAX_LINE):
                starts.append(place)
            begun = not part.endswith(b"\n")
            place += len(part)
        starts.append(place)
        if opened.original is not None:
            self._inputs.check(number, opened.original)
        return starts


class DatasetRecords(Records):
    """Rows of a `datasets.Dataset`, as they are stored: pictures stay the bytes or the path that the dataset has.

    Its files are mapped into memory: what is truncated would end the process where it is read.

    Args:
        dataset: of the rows.
        folder: that relative paths start from.
        name: of the place of a row.
        limit: as in Records.
        made_of: the local files whose rows these are, if what is mapped are copies.
        remote: names of other such files, which have their revision in them.

    Raises:
        ChangedError: also where an element is read, if one of the files is no longer what it was.
    """

    def __init__(
        self,
        dataset,
        folder: str,
        name: str,
        limit: int | None = None,
        *,
        made_of: Inputs | None = None,
        remote: Sequence[str] = (),
    ):
        self._rows = dataset.with_format("arrow")
        self._features = type(dataset.features)(_without_media(dataset.features))
        self._inputs = Inputs(sorted({file["filename"] for file in dataset.cache_files}))
        self._made_of, self._remote = made_of or self._inputs, remote
        self._folder, self._name = folder, name
        super().__init__(len(dataset), limit, name)

    def contents(self) -> str:
        return _digest(self._made_of, self._remote)

    def _row(self, index: int) -> Element:
        self._inputs.check_all()
        row = self._features.decode_example(self._rows[index].to_pylist()[0])
        return {name: _plain(value) for name, value in row.items()}, self._folder, f"{self._name}:{index + 1}"


def _no_records(path: object) -> InputError:
    return InputError(f"no records in {path}: name data that has some")


def _digest(inputs: Inputs, remote: Sequence[str] = ()) -> str:
    found = json.dumps([inputs.fingerprint(), inputs.sizes, *remote])
    return hashlib.blake2b(found.encode(), digest_size=16).hexdigest()


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
    """Arrow gives every struct every key: keys without a value are removed again, but for those of the record."""
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items() if v is not None}
    if isinstance(value, list):
        return [_plain(v) for v in value]
    return value


def open_records(source: DataSource | str, splits: Sequence[str] = ()) -> Records:
    """Open one source of the mixture; see `DataSource` for what its path may be.

    Args:
        source: what to open.
        splits: in place of the source's split, what is taken of data in several splits: the first of these that there is.

    Raises:
        InputError: there is nothing, nothing that can be read, or it is not clear which of the files are meant.
        ChangedError: a file changes while it is opened.
    """
    source = DataSource(source) if isinstance(source, str) else source
    path = place(source.path)
    if isinstance(path, StorePath):
        records = _open_stored(path, source, splits or (source.split,))
    else:
        records = _open(source, splits or (source.split,))
    records.columns = source.columns
    return records


def _open_stored(path: StorePath, source: DataSource, splits: Sequence[str]) -> Records:
    """A file or directory in a store: a local copy of its records, whose pictures and videos stay where they are."""
    with reading(path):
        single, several = bool(path.key) and path.is_file(), path.is_dir()
    folder = path.parent if single else path
    if not single and not several:
        raise InputError(f"no records at {path}: no such object, and nothing below it")
    local = local_copy(folder, lambda found: [e for e in found if (e.name == path.name if single else not is_media(e.name))])
    records = _open(dataclasses.replace(source, path=str(local / path.name if single else local)), splits)
    records.origin = (str(local), str(folder))
    return records


def _open(source: DataSource, splits: Sequence[str]) -> Records:
    path = Path(source.path)
    if path.is_file():
        return _open_file(path, source)
    if path.is_dir():
        return _open_directory(path, source, splits)
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", source.path) or ending_of(source.path) in (*_LINES, *_FORMATS):
        raise InputError(f"no records at {path}: no such file or directory")
    return _open_named(source, splits)


def _open_file(path: Path, source: DataSource) -> Records:
    _refuse_splits(path, source)
    ending = ending_of(path.name)
    if ending in _LINES:
        return LineRecords([path], source.limit)
    if ending not in _FORMATS:
        known = ", ".join((*_LINES, *_FORMATS))
        raise InputError(f"{path} is no file of conversations: its name ends in none of {known}, compressed or not")
    return _read_files(_FORMATS[ending], [str(path)], source)


def _open_directory(path: Path, source: DataSource, splits: Sequence[str]) -> Records:
    if (path / "dataset_dict.json").is_file():
        split = next((split for split in splits if (path / split).is_dir()), splits[0])
        return _open_saved(path / split, path, source)
    if (path / "state.json").is_file():
        _refuse_splits(path, source)
        return _open_saved(path, path, source)
    hidden = lambda place: any(part.startswith((".", "_")) for part in place.relative_to(path).parts)
    files = [p for p in sorted(path.rglob("*")) if not hidden(p) and p.is_file()]
    # Pictures beside conversations do not make an image folder of a directory, as they would by `datasets`' rules.
    found = [p for p in files if ending_of(p.name) in (*_LINES, *_FORMATS) and p.name != "metadata.jsonl"]
    # JSON beside other files of records is about them.
    data = [p for p in found if ending_of(p.name) != ".json"] or found
    if not data or source.name is not None or _describes_files(path, data):
        return _open_named(source, splits)
    chosen = choose_files(path, data, splits, explicit=source.split != "train" and splits == (source.split,))
    readers = sorted({_FORMATS.get(ending_of(p.name), "lines") for p in chosen})
    if len(readers) > 1:
        raise InputError(f"{path} holds files of unlike kinds ({', '.join(p.name for p in chosen[:10])}): name those to read")
    if others := len(found) - len(data):
        say(f"{path}: {others} .json not read, beside {len(data)} other files of records")
    return (
        LineRecords(chosen, source.limit) if readers == ["lines"] else _read_files(readers[0], [str(p) for p in chosen], source)
    )


def _describes_files(path: Path, data: Sequence[Path]) -> bool:
    """Whether a dataset's card says which of its files are which split, in the form that `datasets` reads, for files that it
    reads."""
    card = path / "README.md"
    if not card.is_file() or not all(ending_of(p.name) in _FORMATS for p in data):
        return False
    return "data_files:" in card.read_text(encoding="utf-8", errors="replace")


def _open_saved(path: Path, whole: Path, source: DataSource) -> Records:
    """What `save_to_disk` wrote, or one split of it."""
    with _reading(whole) as datasets:
        found = datasets.load_from_disk(path)
    return DatasetRecords(found, os.path.abspath(whole), whole.name, source.limit)


def _refuse_splits(path: Path, source: DataSource) -> None:
    if source.split != "train" or source.name is not None:
        raise InputError(f"{path} has neither splits nor configurations: leave out split and name")


def _open_named(source: DataSource, splits: Sequence[str]) -> Records:
    """A directory of files in splits, or a dataset of the Hub. Only the files of the split that is asked for are read."""
    with _reading(source.path, "holds no conversations") as datasets:
        builder = datasets.load_dataset_builder(source.path, source.name)
    found = builder.config.data_files or {}
    split = next((split for split in splits if split in found), None)
    if split is None:
        raise InputError(f"{source.path} has no split {' or '.join(splits)}; it has {', '.join(map(str, found)) or 'none'}")
    return _read_files(builder.name, list(found[split]), source)


def _read_files(reader: str, files: list[str], source: DataSource) -> Records:
    inputs = Inputs([os.path.abspath(file) for file in files if os.path.isfile(file)])
    remote = [file for file in files if not os.path.isfile(file)]  # of the Hub
    if reader == "parquet":  # of which `datasets` reads none without rows
        files = [file for file in files if file in remote or not is_empty(file)]
        if not files:
            raise _no_records(source.path)
    with _reading(source.path) as datasets:
        try:
            found = _load(datasets, reader, files)
        except Exception:
            inputs.check_all()  # before a file is blamed on damage
            for file in inputs.paths if reader == "parquet" else ():
                if damage := damage_of(file):
                    raise InputError(f"{file} is damaged: {damage}") from None
            raise
    inputs.check_all()
    name = os.path.basename(files[0] if len(files) == 1 else source.path)
    folder = os.path.dirname(os.path.abspath(files[0]))
    return DatasetRecords(found, folder, name, source.limit, made_of=inputs, remote=remote)


def _load(datasets, reader: str, files: list[str]):
    if reader == "arrow":
        try:  # mapped into memory where they are; everything else is converted into the cache of `datasets`
            return datasets.concatenate_datasets([datasets.Dataset.from_file(file) for file in files])
        except (OSError, ValueError):
            pass  # not local, or not a stream
    options = {"fragment_scan_options": checked_pages()} if reader == "parquet" else {}
    made = folder_of_copies(files[0])
    cache = {} if made is None else {"cache_dir": str(made / "datasets")}
    return datasets.load_dataset(reader, data_files=files, split="train", **options, **cache)


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
