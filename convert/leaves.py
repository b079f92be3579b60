"""Parameters that are not in memory: each knows its shape and dtype, and is read as a whole or a region at a time.

The writers of orbax and safetensors, `load` and `verify` take leaves, wherever these read from.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from ..quantization import SCALE
from .blocks import aligned, copy_into
from .readers import TensorReader
from .regions import Region, byte_size, whole
from .rules import Match, rearrange, torch_region, torch_shape

__all__ = ["INT8", "ArrayLeaf", "Leaf", "TorchLeaf", "dtype_of", "own", "total_bytes", "widest"]

INT8 = np.dtype(np.int8)  # of values that have a scale beside them (quantized.py); every other parameter is of floats


class Leaf(ABC):
    """One parameter.

    Attributes:
        path: our name, "model/text_model/…/kernel".
        shape, dtype: as it is stored, in our layout.
    """

    path: str
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        return byte_size(self.shape, self.dtype)

    @abstractmethod
    def read(self, region: Region | None = None, dtype: np.dtype | None = None) -> np.ndarray:
        """The parameter or a region of it, as a contiguous array of its own, cast to `dtype` if given."""

    def borrow(self) -> np.ndarray:
        """The whole parameter, perhaps a strided view, valid until the next leaf is borrowed."""
        return self.read()

    def read_into(self, target: np.ndarray) -> None:
        """Fill an array of the leaf's shape, cast to its dtype, without a second copy of the parameter in memory."""
        copy_into(target, self.borrow())


def own(view: np.ndarray, dtype: np.dtype | None) -> np.ndarray:
    """A contiguous copy, cast to `dtype` if given, aligned as jax wants arrays that it takes without another copy."""
    out = aligned(view.shape, view.dtype if dtype is None else dtype)
    copy_into(out, view)
    return out


class TorchLeaf(Leaf):
    """A parameter made of a PyTorch tensor."""

    def __init__(self, match: Match, shape: tuple[int, ...], tensors: TensorReader):
        self.path, self.shape, self.dtype = match.path, tuple(shape), tensors.dtypes[match.torch]
        self.match, self._tensors = match, tensors

    def read(self, region: Region | None = None, dtype: np.dtype | None = None) -> np.ndarray:
        if region is None or region == whole(self.shape):
            return own(self.borrow(), dtype)
        (rows, *columns), part, cut = torch_region(self.match.pattern, self.shape, region)
        first = self._first_row
        tensor = self._tensors.read(self.match.torch, (slice(rows.start + first, rows.stop + first), *columns))
        return own(rearrange(tensor, self.match.pattern, part)[cut], dtype)

    def borrow(self) -> np.ndarray:
        tensor = self._tensors.borrow(self.match.torch)
        if self.match.parts > 1:
            tensor = tensor[self._first_row :][: len(tensor) // self.match.parts]
        return rearrange(tensor, self.match.pattern, self.shape)

    @property
    def _first_row(self) -> int:
        """Where the parameter begins in its tensor."""
        return self.match.part * torch_shape(self.match.pattern, self.shape)[0]


class ArrayLeaf(Leaf):
    """A parameter that is in memory already, on the host or on devices."""

    def __init__(self, path: str, array: Any):
        self.path, self.shape, self.dtype = path, tuple(array.shape), np.dtype(array.dtype)
        self._array = array

    def read(self, region: Region | None = None, dtype: np.dtype | None = None) -> np.ndarray:
        return own(self.borrow()[... if region is None else region], dtype)

    def borrow(self) -> np.ndarray:
        return np.asarray(self._array)


def dtype_of(leaf: Leaf, wanted: np.dtype | None) -> np.dtype:
    """The dtype of a parameter where all are to be in `wanted`, if that is given: values in 8 bits and scales keep theirs."""
    return leaf.dtype if wanted is None or _is_fixed(leaf) else wanted


def total_bytes(leaves: Mapping[str, Leaf], dtype: np.dtype | None = None) -> int:
    """Bytes of all leaves, as stored or in `dtype`."""
    return sum(byte_size(leaf.shape, dtype_of(leaf, dtype)) for leaf in leaves.values())


def widest(leaves: Iterable[Leaf]) -> np.dtype:
    """The dtype of leaves, of those whose dtype may be another; the widest if they have several."""
    found = {leaf.dtype for leaf in leaves if not _is_fixed(leaf)}
    return max(found, key=lambda dtype: (dtype.itemsize, dtype.name), default=np.dtype(np.float32))


def _is_fixed(leaf: Leaf) -> bool:
    return leaf.dtype == INT8 or leaf.path.endswith(SCALE)
