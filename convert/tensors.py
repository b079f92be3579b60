"""The tensors of one or several safetensors files, read lazily: names and shapes at once, values a slice at a time.

Our own reader rather than the library's, for two reasons: the library maps whole files into memory, so a pass over 9 GB
shows as 9 GB resident; and a header from the outside is checked here in one place before a byte of data is believed.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import BinaryIO

import ml_dtypes
import numpy as np

from ..errors import CheckpointError
from ..io import MAX_TEXT, parse_json, read_json
from .rules import Region

__all__ = ["DTYPES", "INDEX", "SafetensorsReader", "TensorReader", "checked_path", "open_tensors", "read_header"]

INDEX = "model.safetensors.index.json"

# safetensors name -> numpy dtype, for the dtypes that weights come in
DTYPES: Mapping[str, np.dtype] = {
    "F32": np.dtype(np.float32),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
}
# the other dtypes of the format, which no weight of these models has: the message names them
_OTHER = {"F64": 8, "I64": 8, "U64": 8, "I32": 4, "U32": 4, "I16": 2, "U16": 2, "I8": 1, "U8": 1, "BOOL": 1}


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies: `start` counts bytes from the beginning of the file."""

    file: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def checked_path(directory: Path, name: str, root: Path | None = None) -> Path:
    """`directory / name`, which must exist and, with symbolic links followed, lie inside `root` (default: `directory`).

    A snapshot of the Hub's cache consists of links into the `blobs` folder beside it, so there the root is the folder of the
    repository.
    """
    path = directory / name
    if root is None:
        root = directory
        if directory.parent.name == "snapshots" and directory.parent.parent.name.startswith("models--"):
            root = directory.parent.parent
    try:
        real = path.resolve(strict=True)
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"cannot open {path}: {getattr(error, 'strerror', None) or error}") from error
    if not real.is_relative_to(root.resolve()):
        raise CheckpointError(f"{path} points outside its directory, to {real}: copy the file itself there")
    if not real.is_file():
        raise CheckpointError(f"{path} is not a regular file")
    return path


def read_header(path: Path) -> dict[str, Entry]:
    """Names, dtypes, shapes and places of the tensors of a safetensors file, in the order in which they lie there.

    Raises CheckpointError unless the header is well formed and the tensors fill the file without gap or overlap.
    """
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            start = file.read(8)
            length = int.from_bytes(start, "little")
            if len(start) < 8:
                raise CheckpointError(f"{path} is not a safetensors file: it has {size} bytes")
            if length > MAX_TEXT or length > size - 8:
                raise CheckpointError(
                    f"{path} is not a safetensors file: it announces a header of {length:,} bytes "
                    f"(the file has {size:,}, the limit is {MAX_TEXT:,})"
                )
            text = file.read(length)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    try:
        header = parse_json(text, unique_keys=True)
        header.pop("__metadata__", None)
        entries = [_entry(path, name, item, 8 + length) for name, item in header.items()]
    except ValueError as error:
        raise CheckpointError(f"{path} has a broken safetensors header: {error}") from error
    entries.sort(key=lambda item: (item[1].start, item[1].nbytes))
    end = 8 + length
    for name, entry in entries:
        if entry.start != end:
            fault = (
                "overlaps the tensor before it" if entry.start < end else f"leaves {entry.start - end} unused bytes before it"
            )
            raise CheckpointError(f"{path} has a broken safetensors header: {name} {fault}")
        end += entry.nbytes
    if end != size:
        fault = f"the file ends {end - size} bytes early" if end > size else f"{size - end} bytes follow the last tensor"
        raise CheckpointError(f"{path} is damaged: {fault} (an incomplete download or copy?)")
    return dict(entries)


def _natural(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**48


def _entry(path: Path, name: str, item, base: int) -> tuple[str, Entry]:
    if not isinstance(item, dict) or set(item) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{name} lacks dtype, shape or data_offsets")
    dtype, shape, offsets = item["dtype"], item["shape"], item["data_offsets"]
    if dtype in _OTHER or dtype not in DTYPES:
        raise ValueError(f"{name} has dtype {dtype}, which is none of {', '.join(DTYPES)} (a quantised checkpoint?)")
    if not isinstance(shape, list) or not all(_natural(n) for n in shape):
        raise ValueError(f"{name} has the shape {shape}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_natural(n) for n in offsets):
        raise ValueError(f"{name} has the offsets {offsets}")
    entry = Entry(path, DTYPES[dtype], tuple(shape), base + offsets[0])
    if offsets[1] - offsets[0] != entry.nbytes:
        raise ValueError(f"{name} has {offsets[1] - offsets[0]} bytes, its shape {shape} in {dtype} needs {entry.nbytes}")
    return name, entry


class TensorReader(ABC):
    """What every reader of PyTorch tensors offers.

    directory: where they came from, for messages. files: what was read, for checksums. shapes, dtypes: by name, in the
    order in which reading is fastest.
    """

    directory: Path
    files: Sequence[Path]
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, np.dtype]

    @abstractmethod
    def read(self, name: str, region: Region | None = None) -> np.ndarray:
        """A tensor, or the part of it that `region` names, as an array of its own."""

    def borrow(self, name: str) -> np.ndarray:
        """A whole tensor, valid until the next one is borrowed: readers that can reuse memory do."""
        return self.read(name)

    @abstractmethod
    def close(self) -> None:
        """Release files and memory."""


class SafetensorsReader(TensorReader):
    """Tensors of one or several safetensors files."""

    def __init__(self, directory: Path, files: Sequence[Path]):
        self.directory, self.files = directory, list(files)
        self.entries: dict[str, Entry] = {}
        self._handles: dict[Path, BinaryIO] = {}
        self._scratch = np.empty(0, np.uint8)
        self.bytes_read = 0
        for file in self.files:
            for name, entry in read_header(file).items():
                if name in self.entries:
                    raise CheckpointError(f"tensor {name} stands in both {self.entries[name].file.name} and {file.name}")
                self.entries[name] = entry
        self.shapes = {name: entry.shape for name, entry in self.entries.items()}
        self.dtypes = {name: entry.dtype for name, entry in self.entries.items()}

    def read(self, name: str, region: Region | None = None) -> np.ndarray:
        entry = self.entries[name]
        region = tuple(slice(0, n) for n in entry.shape) if region is None else region
        out = np.empty([part.stop - part.start for part in region], entry.dtype)
        self._fill(entry, region, memoryview(out.reshape(-1).view(np.uint8)))
        return out

    def borrow(self, name: str) -> np.ndarray:
        entry = self.entries[name]
        if self._scratch.size < entry.nbytes:
            self._scratch = np.empty(0, np.uint8)  # let go of the smaller one first
            self._scratch = np.empty(entry.nbytes, np.uint8)
        bytes_ = self._scratch[: entry.nbytes]
        self._fill(entry, tuple(slice(0, n) for n in entry.shape), memoryview(bytes_))
        return bytes_.view(entry.dtype).reshape(entry.shape)

    def _fill(self, entry: Entry, region: Region, out: memoryview) -> None:
        """Read exactly the bytes of a region: one read per contiguous run."""
        shape, item = entry.shape, entry.dtype.itemsize
        strides = [math.prod(shape[axis + 1 :]) * item for axis in range(len(shape))]
        last = max((axis for axis, part in enumerate(region) if (part.start, part.stop) != (0, shape[axis])), default=-1)
        if last < 0:
            offsets, run = [0], entry.nbytes
        else:
            first = region[last].start * strides[last]
            run = (region[last].stop - region[last].start) * strides[last]
            ranges = [range(part.start * s, part.stop * s, s) for part, s in zip(region[:last], strides[:last], strict=True)]
            offsets = (sum(place) + first for place in product(*ranges))
        handle = self._handle(entry.file)
        for number, offset in enumerate(offsets):
            self._read_into(handle, entry.file, out[number * run : (number + 1) * run], entry.start + offset)

    def _handle(self, file: Path) -> BinaryIO:
        if file not in self._handles:
            self._handles[file] = open(file, "rb", buffering=0)  # noqa: SIM115  closed with the reader
        return self._handles[file]

    def _read_into(self, handle: BinaryIO, file: Path, out: memoryview, offset: int) -> None:
        while len(out):
            try:
                handle.seek(offset)
                count = handle.readinto(out)
            except OSError as error:
                raise CheckpointError(f"cannot read {file}: {error.strerror or error}") from error
            if not count:
                raise CheckpointError(f"{file} became shorter while it was read")
            self.bytes_read += count
            out, offset = out[count:], offset + count

    def close(self) -> None:
        for handle in self._handles.values():
            handle.close()
        self._handles = {}
        self._scratch = np.empty(0, np.uint8)


def open_tensors(directory: Path) -> TensorReader:
    """The weights of a Hugging Face directory: safetensors if there are any, else `pytorch_model*.bin`."""
    index, single = directory / INDEX, directory / "model.safetensors"
    if index.exists() and single.exists():
        raise CheckpointError(f"{directory} has both {single.name} and {index.name}: remove the one that is out of date")
    if index.exists():
        return _indexed(directory, index)
    names = [single.name] if single.exists() else sorted(path.name for path in directory.glob("*.safetensors"))
    if names:
        return SafetensorsReader(directory, [checked_path(directory, name) for name in names])
    if any(directory.glob("pytorch_model*.bin*")):
        from .torch_bin import open_bin

        return open_bin(directory)
    raise CheckpointError(f"{directory} has neither *.safetensors, nor pytorch_model*.bin, nor an orbax checkpoint")


def index_files(directory: Path, index: Path) -> tuple[dict[str, str], list[Path]]:
    """The weight map of an index file and the files it names, all inside the directory."""
    what = "an index of checkpoint shards"
    weight_map = read_json(checked_path(directory, index.name), what=what, unique_keys=True).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError(f"{index} is not {what}: it has no weight_map from names to files")
    names = sorted(set(weight_map.values()))
    for name in names:
        if Path(name).name != name:
            raise CheckpointError(f"{index} names a file outside its directory: {name}")
    return weight_map, [checked_path(directory, name) for name in names]


def check_index(index: Path, weight_map: Mapping[str, str], found: Mapping[str, str]) -> None:
    """Raise one CheckpointError unless index and files name the same tensors in the same places."""
    problems = [f"missing   {name}, which {file} should hold" for name, file in weight_map.items() if name not in found]
    problems += [
        f"surplus   {name} in {file}, which the index does not have there"
        for name, file in found.items()
        if weight_map.get(name) != file
    ]
    if problems:
        raise CheckpointError(f"{index} and its shards disagree\n  " + "\n  ".join(sorted(problems)))


def _indexed(directory: Path, index: Path) -> SafetensorsReader:
    weight_map, files = index_files(directory, index)
    reader = SafetensorsReader(directory, files)
    check_index(index, weight_map, {name: entry.file.name for name, entry in reader.entries.items()})
    return reader
