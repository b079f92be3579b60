"""Regions of arrays: one slice with explicit start and stop per dimension."""

import math
from collections.abc import Sequence

import numpy as np

__all__ = ["Region", "bounds", "byte_size", "concrete", "region_shape", "relative", "whole"]

Region = tuple[slice, ...]


def whole(shape: Sequence[int]) -> Region:
    """The region that is everything."""
    return tuple(slice(0, size) for size in shape)


def region_shape(region: Region) -> tuple[int, ...]:
    """The shape of a region's values."""
    return tuple(part.stop - part.start for part in region)


def bounds(region: Region) -> tuple[tuple[int, int], ...]:
    """A region as something to look up by, because slices have no hash before Python 3.12."""
    return tuple((part.start, part.stop) for part in region)


def relative(region: Region, outer: Region) -> Region:
    """A region that lies inside `outer`, in the coordinates of `outer`."""
    return tuple(slice(part.start - edge.start, part.stop - edge.start) for part, edge in zip(region, outer, strict=True))


def concrete(index: Sequence[slice], shape: Sequence[int]) -> Region:
    """An index of jax, whose slices may be open, as a region."""
    return tuple(slice(*part.indices(size)[:2]) for part, size in zip(index, shape, strict=True))


def byte_size(shape: Sequence[int], dtype: np.dtype) -> int:
    """Bytes of an array."""
    return math.prod(shape) * dtype.itemsize
