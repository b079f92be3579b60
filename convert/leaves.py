"""A parameter that is somewhere else: it knows its shape and dtype, and is read whole or a region at a time.

The writers of orbax and of safetensors, `load()` and `verify` all consume leaves, and do not ask where they come from.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping

import numpy as np

from .blocks import copy_into
from .rules import Match, Region, rearrange, torch_region
from .tensors import TensorReader

__all__ = ["ArrayLeaf", "Leaf", "TorchLeaf", "whole"]


def whole(shape: tuple[int, ...]) -> Region:
    """The region that is everything."""
    return tuple(slice(0, size) for size in shape)


class Leaf(ABC):
    """path: our name, "model/text_model/…/kernel". shape, dtype: as it is stored, in our layout."""

    path: str
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize

    @abstractmethod
    def read(self, region: Region | None = None, dtype: np.dtype | None = None) -> np.ndarray:
        """The parameter or a region of it, as a contiguous array of its own, cast to `dtype` if given."""

    def borrow(self) -> np.ndarray:
        """The whole parameter, perhaps a strided view, valid until the next leaf is borrowed."""
        return self.read()

    def read_into(self, target: np.ndarray) -> None:
        """Fill an array of the leaf's shape, cast to its dtype: how an export avoids a second copy in memory."""
        copy_into(target, self.borrow())


def own(view: np.ndarray, dtype: np.dtype | None) -> np.ndarray:
    out = np.empty(view.shape, view.dtype if dtype is None else dtype)
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
        slices, part, cut = torch_region(self.match.pattern, self.shape, region)
        tensor = self._tensors.read(self.match.torch, slices)
        return own(rearrange(tensor, self.match.pattern, part)[cut], dtype)

    def borrow(self) -> np.ndarray:
        return rearrange(self._tensors.borrow(self.match.torch), self.match.pattern, self.shape)


class ArrayLeaf(Leaf):
    """A parameter that is in memory already, on the host or on devices."""

    def __init__(self, path: str, array):
        self.path, self.shape, self.dtype = path, tuple(array.shape), np.dtype(array.dtype)
        self._array = array

    def read(self, region: Region | None = None, dtype: np.dtype | None = None) -> np.ndarray:
        return own(self.borrow()[... if region is None else region], dtype)

    def borrow(self) -> np.ndarray:
        return np.asarray(self._array)


def total_bytes(leaves: Mapping[str, Leaf], dtype: np.dtype | None = None) -> int:
    """Bytes of all leaves, as stored or in `dtype`."""
    return sum(leaf.nbytes // leaf.dtype.itemsize * (dtype or leaf.dtype).itemsize for leaf in leaves.values())
