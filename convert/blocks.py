"""Copies that stay fast when the two arrays lie in different order, and the search for values that are not finite."""

from itertools import product

import ml_dtypes
import numpy as np

__all__ = ["copy_into", "count_nonfinite"]

_SIDE = 64  # a block of 64 × 64 values and its transpose fit the first-level cache together
_MASKS = {
    np.dtype(np.float32): (np.uint32, 0x7F800000),
    np.dtype(np.float16): (np.uint16, 0x7C00),
    np.dtype(ml_dtypes.bfloat16): (np.uint16, 0x7F80),
}


def _fastest(array: np.ndarray) -> int:
    """The axis along which neighbours are nearest in memory."""
    axes = [axis for axis, size in enumerate(array.shape) if size > 1]
    return min(axes, key=lambda axis: abs(array.strides[axis])) if axes else 0


def _pieces(size: int) -> list[slice]:
    """An axis cut into blocks."""
    step = size if size <= 2 * _SIDE else _SIDE
    return [slice(start, min(start + step, size)) for start in range(0, size, step)]


def copy_into(target: np.ndarray, source: np.ndarray) -> None:
    """`target[...] = source`, casting if the dtypes differ.

    A transposed copy is made block by block: numpy's own walks one of the two arrays with a stride, at a quarter of the speed.
    """
    with np.errstate(over="ignore"):  # a value too large for float16 becomes infinite, which the writers count
        _copy(target, source)


def _copy(target: np.ndarray, source: np.ndarray) -> None:
    quick, slow = _fastest(target), _fastest(source)
    if quick == slow or target.size <= _SIDE * _SIDE:
        np.copyto(target, source, casting="unsafe")
        return
    others = [axis for axis in range(target.ndim) if axis not in (quick, slow)]
    index: list = [slice(None)] * target.ndim
    kept = sorted((quick, slow))
    for place in product(*(range(target.shape[axis]) for axis in others)):
        for axis, number in zip(others, place, strict=True):
            index[axis] = number
        for row in _pieces(target.shape[quick]):
            # Cast in the source's order, in long runs: in blocks the casts of short floats would take longer than the copy.
            index[quick], index[slow] = row, slice(None)
            part, here = source[tuple(index)].astype(target.dtype, copy=False), target[tuple(index)]
            for column in _pieces(target.shape[slow]):
                across = tuple(column if axis == slow else slice(None) for axis in kept)
                np.copyto(here[across], part[across])


def count_nonfinite(array: np.ndarray) -> int:
    """How many values of a contiguous array are NaN or infinite: an exponent of all ones, tested on the bits."""
    if array.dtype not in _MASKS:  # integers
        return 0
    kind, mask = _MASKS[array.dtype]
    bits = array.reshape(-1).view(kind)
    count = 0
    for start in range(0, bits.size, 1 << 16):
        exponents = bits[start : start + (1 << 16)] & kind(mask)
        if exponents.max() == mask:
            count += int((exponents == mask).sum())
    return count
