"""Weights in 8 bits as leaves: quantized as they are written, dequantized as they are read."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..errors import CheckpointError, first_few
from ..quantization import SCALE, dequantize, fits, scale_for, scale_shape, values_at
from .leaves import INT8, Leaf, own, widest
from .regions import Region, whole

__all__ = ["DequantizedLeaf", "dequantized_leaves", "quantization", "quantized_leaves"]

_FLOAT32 = np.dtype(np.float32)
_BLOCK = 1 << 20  # values


def _rows(array: np.ndarray) -> int:
    """Rows of a block."""
    return max(1, _BLOCK // max(1, array[0].size))


class _Quantized(Leaf):
    """A parameter in 8 bits, made of another when it is read: whole along what its scale spans."""

    def __init__(self, leaf: Leaf, spanned: Sequence[int]):
        self.path, self.shape, self.dtype = leaf.path, leaf.shape, INT8
        self._leaf, self.spanned = leaf, tuple(spanned)

    def both(self, region: Region | None) -> tuple[np.ndarray, np.ndarray]:
        """Values and scale of a region, of which only the part counts that is not spanned."""
        parts = whole(self.shape) if region is None else region
        wide = tuple(whole(self.shape)[axis] if axis in self.spanned else part for axis, part in enumerate(parts))
        found = self._leaf.read(wide)
        largest = np.zeros(scale_shape(found.shape, self.spanned), np.float32)
        values = np.empty(found.shape, INT8)
        # block by block: float32 copies of the whole would be most of a conversion's memory
        blocks = [slice(start, start + _rows(found)) for start in range(0, len(found), _rows(found))]
        of = lambda block: slice(None) if 0 in self.spanned else block
        for block in blocks:
            here = np.abs(found[block].astype(np.float32)).max(self.spanned, keepdims=True)
            np.maximum(largest[of(block)], here, out=largest[of(block)])
        if not np.isfinite(largest).all():
            raise CheckpointError(f"{self.path} has values that are NaN or infinite, for which int8 has no numbers")
        scale = scale_for(largest, np)
        for block in blocks:
            values[block] = values_at(found[block].astype(np.float32), scale[of(block)], np)
        return values, scale

    def read(self, region: Region | None = None, dtype: np.dtype | None = None) -> np.ndarray:
        parts = whole(self.shape) if region is None else region
        cut = tuple(part if axis in self.spanned else slice(None) for axis, part in enumerate(parts))
        return own(self.both(region)[0][cut], dtype)


class _Scale(Leaf):
    """The scale of a parameter in 8 bits."""

    def __init__(self, leaf: _Quantized):
        self.path, self.shape, self.dtype = leaf.path + SCALE, scale_shape(leaf.shape, leaf.spanned), _FLOAT32
        self._leaf = leaf

    def read(self, region: Region | None = None, dtype: np.dtype | None = None) -> np.ndarray:
        return own(self._leaf.both(region)[1], dtype)


class DequantizedLeaf(Leaf):
    """A parameter that is stored in 8 bits, as numbers of the dtype that the checkpoint's other parameters have.

    Attributes:
        values, scale: as they are stored.
    """

    def __init__(self, values: Leaf, scale: Leaf, dtype: np.dtype):
        self.path, self.shape, self.dtype = values.path, values.shape, dtype
        self.values, self.scale = values, scale

    def _exact(self, region: Region | None) -> np.ndarray:
        parts = whole(self.shape) if region is None else region
        of_scale = tuple(slice(0, 1) if size == 1 else part for part, size in zip(parts, self.scale.shape, strict=True))
        return dequantize(self.values.read(region), self.scale.read(of_scale, _FLOAT32))

    def read(self, region: Region | None = None, dtype: np.dtype | None = None) -> np.ndarray:
        return own(self._exact(region), dtype or self.dtype)

    def borrow(self) -> np.ndarray:
        """In float32: it is rounded once, by whoever asks for another dtype."""
        return self._exact(None)


def quantized_leaves(leaves: Mapping[str, Leaf], spanned: Mapping[str, Sequence[int]]) -> dict[str, Leaf]:
    """The leaves of a checkpoint with weights in 8 bits, each scale after its values.

    Args:
        leaves: of a checkpoint whose weights are not.
        spanned: of each parameter that becomes 8 bits, the dimensions that its scale spans.
    """
    out: dict[str, Leaf] = {}
    for path, leaf in leaves.items():
        out[path] = leaf
        if path in spanned:
            out[path] = values = _Quantized(leaf, spanned[path])
            out[path + SCALE] = _Scale(values)
    return out


def dequantized_leaves(stored: Mapping[str, Leaf], where: Any) -> dict[str, Leaf] | None:
    """The parameters of a checkpoint whose weights are in 8 bits; None if they are not.

    Args:
        stored: its leaves.
        where: the directory, for messages.

    Raises:
        CheckpointError: values without a scale, a scale without values, or one that does not fit.
    """
    scales = {path for path in stored if path.endswith(SCALE)}
    if not scales and not any(leaf.dtype == INT8 for leaf in stored.values()):
        return None
    dtype = widest(stored.values())
    out: dict[str, Leaf] = {}
    problems = [f"{path} belongs to nothing in int8" for path in scales if not _holds(stored, path.removesuffix(SCALE))]
    for path, leaf in stored.items():
        scale = stored.get(path + SCALE)
        if path in scales:
            continue
        out[path] = leaf
        if leaf.dtype != INT8:
            continue
        if scale is None:
            problems.append(f"{path} is int8 and has no {path.rpartition('/')[2]}{SCALE}")
        elif scale.dtype != _FLOAT32 or not fits(scale.shape, leaf.shape):
            problems.append(f"{scale.path} {scale.dtype.name} {scale.shape} does not fit {path} {leaf.shape}")
        else:
            out[path] = DequantizedLeaf(leaf, scale, dtype)
    if problems:
        listed = "\n  ".join(first_few(sorted(problems)))
        raise CheckpointError(f"{where}: {len(problems)} arrays of weights in 8 bits do not fit together\n  {listed}")
    return out


def _holds(stored: Mapping[str, Leaf], path: str) -> bool:
    return path in stored and stored[path].dtype == INT8


def quantization(leaves: Mapping[str, Leaf]) -> dict[str, Any]:
    """What a manifest says of weights in 8 bits; nothing if there are none."""
    count = sum(leaf.dtype == INT8 for leaf in leaves.values())
    return {"quantization": {"weights": INT8.name, "arrays": count}} if count else {}
