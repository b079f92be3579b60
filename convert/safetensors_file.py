"""The safetensors format: its header, read and written, and a reader that fetches regions of tensors.

Our own reader rather than the library's, for two reasons: the library maps whole files into memory, so that a pass over 9 GB
shows as 9 GB resident; and the header of a file from elsewhere is checked here, in one place, before any of its data is used.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from ..errors import CheckpointError
from ..io import parse_json
from .readers import TensorReader, check_names, plain_name
from .regions import Region, byte_size, region_shape, whole

__all__ = ["DTYPES", "INDEX", "MAX_JSON", "SINGLE", "SafetensorsReader", "make_header", "read_header"]

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_JSON = 16_000_000  # bytes of a header or an index: those of 100,000 tensors. Parsed, it can take 25 times its size
_MAX_DIMENSIONS = 8

# safetensors name -> numpy dtype, for the dtypes of weights; the format has others, which no weight of these models has
DTYPES: Mapping[str, np.dtype] = {
    "F32": np.dtype(np.float32),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Entry:
    """Where a tensor is: `start` counts bytes from the beginning of the file."""

    file: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def nbytes(self) -> int:
        return byte_size(self.shape, self.dtype)


def make_header(tensors: Iterable[tuple[str, tuple[int, ...], np.dtype]]) -> bytes:
    """What a file of these tensors (name, shape, dtype) begins with, if their values follow in this order."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, shape, dtype in tensors:
        end = start + byte_size(shape, dtype)
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format asks for data that starts on a multiple of eight
    return len(text).to_bytes(8, "little") + text


def read_header(path: Path) -> dict[str, Entry]:
    """Names, dtypes, shapes and places of the tensors of a safetensors file, in the order of their places.

    Raises:
        CheckpointError: the header is not well formed, or its tensors do not fill the file without gap and overlap.
    """
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            start = file.read(8)
            length = int.from_bytes(start, "little")
            if len(start) < 8:
                raise CheckpointError(f"{path} is not a safetensors file: it has {size} bytes")
            if length > MAX_JSON or length > size - 8:
                raise CheckpointError(
                    f"{path} is not a safetensors file: it announces a header of {length:,} bytes "
                    f"(the file has {size:,}, the limit is {MAX_JSON:,})"
                )
            text = file.read(length)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    try:
        header = parse_json(text, unique_keys=True)
        header.pop("__metadata__", None)
        check_names(path, header)
        entries = [(name, _entry(path, name, item, 8 + length)) for name, item in header.items()]
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


def _brief(value: Any) -> str:
    return str(value)[:80]


def _naturals(value: Any) -> bool:
    """Whether a value is a list of sizes or offsets that can exist."""
    return isinstance(value, list) and all(type(number) is int and 0 <= number < 2**48 for number in value)


def _entry(path: Path, name: str, item: Any, base: int) -> Entry:
    if not isinstance(item, dict) or set(item) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{name} lacks dtype, shape or data_offsets")
    dtype, shape, offsets = item["dtype"], item["shape"], item["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"{name} has dtype {_brief(dtype)}, which is none of {', '.join(DTYPES)} (a quantised checkpoint?)")
    if not _naturals(shape) or len(shape) > _MAX_DIMENSIONS:
        raise ValueError(f"{name} has the shape {_brief(shape)}")
    if not _naturals(offsets) or len(offsets) != 2:
        raise ValueError(f"{name} has the offsets {_brief(offsets)}")
    entry = Entry(path, DTYPES[dtype], tuple(shape), base + offsets[0])
    if offsets[1] - offsets[0] != entry.nbytes:
        raise ValueError(f"{name} has {offsets[1] - offsets[0]} bytes, its shape {shape} in {dtype} needs {entry.nbytes}")
    return entry


class SafetensorsReader(TensorReader):
    """Tensors of safetensors files. `bytes_read` counts what was read of their values."""

    def __init__(self, files: Sequence[Path]):
        self.entries: dict[str, Entry] = {}
        self.bytes_read = 0
        self._handles: dict[Path, Any] = {}
        self._scratch = np.empty(0, np.uint8)
        super().__init__(files)

    def _list(self, file: Path) -> Iterator[tuple[str, tuple[int, ...], np.dtype]]:
        for name, entry in read_header(file).items():
            plain = plain_name(name)
            self.entries[plain] = entry
            yield plain, entry.shape, entry.dtype

    def read(self, name: str, region: Region | None = None) -> np.ndarray:
        entry = self.entries[name]
        region = whole(entry.shape) if region is None else region
        out = np.empty(region_shape(region), entry.dtype)
        self._fill(entry, region, memoryview(out.reshape(-1).view(np.uint8)))
        return out

    def borrow(self, name: str) -> np.ndarray:
        entry = self.entries[name]
        if self._scratch.size < entry.nbytes:
            self._scratch = np.empty(0, np.uint8)  # release the smaller one first
            self._scratch = np.empty(entry.nbytes, np.uint8)
        data = self._scratch[: entry.nbytes]
        self._fill(entry, whole(entry.shape), memoryview(data))
        return data.view(entry.dtype).reshape(entry.shape)

    def _fill(self, entry: Entry, region: Region, out: memoryview) -> None:
        """Read exactly the bytes of a region: one read per contiguous run."""
        shape = entry.shape
        strides = [byte_size(shape[axis + 1 :], entry.dtype) for axis in range(len(shape))]
        last = max((axis for axis, part in enumerate(region) if (part.start, part.stop) != (0, shape[axis])), default=-1)
        offsets: Iterable[int] = [0]
        run = entry.nbytes
        if last >= 0:
            first = region[last].start * strides[last]
            run = (region[last].stop - region[last].start) * strides[last]
            ranges = [range(part.start * s, part.stop * s, s) for part, s in zip(region[:last], strides[:last], strict=True)]
            offsets = (sum(place) + first for place in product(*ranges))
        for number, offset in enumerate(offsets):
            self._read_into(entry.file, out[number * run : (number + 1) * run], entry.start + offset)

    def _read_into(self, file: Path, out: memoryview, offset: int) -> None:
        while len(out):
            try:
                if file not in self._handles:
                    self._handles[file] = open(file, "rb", buffering=0)  # noqa: SIM115  closed with the reader
                handle = self._handles[file]
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
