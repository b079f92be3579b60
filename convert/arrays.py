"""A checksum for each array of a checkpoint: of its dtype, its shape and its bytes in C order, in our layout. It does not
depend on how the array is cut into chunks, shards or devices."""

import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from .leaves import Leaf, own
from .regions import byte_size

__all__ = ["Checksum", "Digests", "checksum", "mismatches"]

Digests = Mapping[str, str]  # parameter -> "crc32:…"
_BLOCK = 8 << 20


class Checksum:
    """The checksum of one array whose values arrive in C order.

    Args:
        shape: of the array.
        dtype: of the array.
    """

    def __init__(self, shape: Sequence[int], dtype: np.dtype):
        self._crc = zlib.crc32(f"{dtype.name} {','.join(map(str, shape))}\n".encode())

    def add(self, values: np.ndarray) -> None:
        """The next values, a contiguous array."""
        self._crc = zlib.crc32(values.reshape(-1).view(np.uint8), self._crc)

    @property
    def text(self) -> str:
        return f"crc32:{self._crc:08x}"


def checksum(array: Any, dtype: np.dtype | None = None) -> str:
    """Of a whole array, of any strides, as it is in `dtype`; copied a block at a time where it has to be."""
    array = np.asarray(array)
    dtype = array.dtype if dtype is None else dtype
    found = Checksum(array.shape, dtype)
    if array.flags.c_contiguous and array.dtype == dtype:
        found.add(array)
        return found.text
    rows = max(1, _BLOCK // max(1, byte_size(array.shape[1:], dtype)))
    for start in range(0, len(array), rows):
        found.add(own(array[start : start + rows], dtype))
    return found.text


def mismatches(leaves: Mapping[str, Leaf], digests: Digests, progress: Callable[[int], object]) -> list[str]:
    """The parameters that are not what their checksums say, one of which each has to have. `progress` is told of bytes read."""
    found = []
    for path, leaf in leaves.items():
        if checksum(leaf.borrow()) != digests.get(path):
            found.append(path)
        progress(leaf.nbytes)
    return found
