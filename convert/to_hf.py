"""Write parameters as a Hugging Face directory: safetensors shards with an index, one tensor at a time.

The library's writer needs a whole shard in memory. A safetensors file is a header, known from names and shapes alone, followed
by the tensors: the header is written first, then the tensors are streamed.
"""

import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import InputError
from ..io import write_json
from .blocks import count_nonfinite
from .leaves import Leaf
from .regions import byte_size
from .rules import rearrange, torch_name, torch_shape
from .safetensors_file import INDEX, SINGLE, make_header

__all__ = ["HFWriter", "parse_size", "plan_shards", "write_hf"]

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_size(text: str | int) -> int:
    """ "4GB", "500MiB" or a number of bytes. Raises InputError."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", str(text))
    number = float(found.group(1)) * _UNITS.get(found.group(2).upper(), 0) if found else 0
    size = int(number) if math.isfinite(number) else 0
    if size < 1:
        raise InputError(f"{str(text)[:80]!r} is not a size: write a number of bytes, or one with KB, MB, GB, KiB, MiB or GiB")
    return size


@dataclass(frozen=True)
class Planned:
    """One tensor to be written."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    pattern: str
    leaf: Leaf

    @property
    def nbytes(self) -> int:
        return byte_size(self.shape, self.dtype)


def _natural(name: str) -> list:
    """Layer 2 before layer 10."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]


def plan_tensors(leaves: Mapping[str, Leaf], dtype: np.dtype | None, base: bool) -> list[Planned]:
    """The tensors in the order of their names, with `base` without the leading `model.`."""
    planned = []
    for path, leaf in leaves.items():
        name, pattern = torch_name(path)
        name = name.removeprefix("model.") if base else name
        planned.append(Planned(name, torch_shape(pattern, leaf.shape), np.dtype(dtype or leaf.dtype), pattern, leaf))
    return sorted(planned, key=lambda tensor: _natural(tensor.name))


def plan_shards(tensors: Sequence[Planned], max_bytes: int) -> dict[str, list[Planned]]:
    """File name -> its tensors, each file at most `max_bytes` unless a single tensor is larger."""
    shards: list[list[Planned]] = [[]]
    filled = 0
    for tensor in tensors:
        if shards[-1] and filled + tensor.nbytes > max_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += tensor.nbytes
    if len(shards) == 1:
        return {SINGLE: shards[0]}
    count = len(shards)
    return {f"model-{number:05d}-of-{count:05d}.safetensors": shard for number, shard in enumerate(shards, 1)}


class HFWriter:
    """Writes shards through one buffer, of the size of the largest tensor.

    Attributes:
        nonfinite: after writing, the number of NaN and infinite values by tensor.
    """

    def __init__(self, progress: Callable[[int], object]):
        self.nonfinite: dict[str, int] = {}
        self._progress = progress
        self._buffer = np.empty(0, np.uint8)

    def write_shard(self, path: Path, tensors: Sequence[Planned]) -> None:
        """Write one file."""
        # Wide dtypes first, as the library orders them: so every tensor starts on a multiple of its item size.
        tensors = sorted(tensors, key=lambda tensor: -tensor.dtype.itemsize)
        with open(path, "wb", buffering=0) as file:
            self._write(file, memoryview(make_header((tensor.name, tensor.shape, tensor.dtype) for tensor in tensors)))
            for tensor in tensors:
                self._write(file, memoryview(self._filled(tensor)))
                self._progress(tensor.nbytes)
            os.fsync(file.fileno())

    def _filled(self, tensor: Planned) -> np.ndarray:
        """The buffer's part that holds a tensor, filled."""
        if self._buffer.size < tensor.nbytes:
            self._buffer = np.empty(0, np.uint8)
            self._buffer = np.empty(tensor.nbytes, np.uint8)
        values = self._buffer[: tensor.nbytes].view(tensor.dtype)
        tensor.leaf.read_into(rearrange(values.reshape(tensor.shape), tensor.pattern, tensor.leaf.shape))
        bad = count_nonfinite(values)
        if bad:
            self.nonfinite[tensor.name] = bad
        return self._buffer[: tensor.nbytes]

    @staticmethod
    def _write(file, data: memoryview) -> None:
        while len(data):
            data = data[file.write(data) :]


def write_hf(
    directory: Path,
    leaves: Mapping[str, Leaf],
    *,
    dtype: np.dtype | None = None,
    max_shard_bytes: int = 4 * 10**9,
    base: bool = False,
    progress: Callable[[int], object] = lambda count: None,
) -> dict[str, int]:
    """Write the weights into an existing directory, with an index if there is more than one shard.

    Args:
        directory: where to.
        leaves: our path -> parameter.
        dtype: of what is written; default: each parameter keeps its own.
        max_shard_bytes: of a file, unless a single tensor is larger.
        base: name the tensors as a checkpoint of the base class does, without the leading `model.`.
        progress: told of the bytes written.

    Returns:
        The number of NaN and infinite values by tensor.
    """
    writer = HFWriter(progress)
    shards = plan_shards(plan_tensors(leaves, dtype, base), max_shard_bytes)
    for name, tensors in shards.items():
        writer.write_shard(directory / name, tensors)
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(tensor.nbytes for tensors in shards.values() for tensor in tensors)},
            "weight_map": {tensor.name: name for name, tensors in shards.items() for tensor in tensors},
        }
        write_json(directory / INDEX, index, sort_keys=True)
    return writer.nonfinite
