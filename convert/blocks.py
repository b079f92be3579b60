"""Copies that stay fast when the two arrays lie in different order, and the search for values that are not finite."""

import math
from itertools import product
from typing import Any

import ml_dtypes
import numpy as np

__all__ = ["aligned", "copy_into", "count_nonfinite"]

_ALIGNMENT = 64  # bytes: a host buffer that begins at a multiple of it is used by jax's CPU backend as it is
_RUN = 16  # values of the target that are written side by side: a cache line of float32
_SMALL = 4096  # values below which an array is copied in one piece
_MASKS = {
    np.dtype(np.float32): (np.uint32, 0x7F800000),
    np.dtype(np.float16): (np.uint16, 0x7C00),
    np.dtype(ml_dtypes.bfloat16): (np.uint16, 0x7F80),
}


def aligned(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """An array that is not initialised and begins at a multiple of 64 bytes.

    Args:
        shape: of the array.
        dtype: of the array.
    """
    dtype = np.dtype(dtype)
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + _ALIGNMENT, np.uint8)
    first = -memory.ctypes.data % _ALIGNMENT
    return memory[first : first + size].view(dtype).reshape(shape)


def _fastest(array: np.ndarray) -> int:
    """The axis along which neighbours are nearest in memory."""
    axes = [axis for axis, size in enumerate(array.shape) if size > 1]
    return min(axes, key=lambda axis: abs(array.strides[axis])) if axes else 0


def copy_into(target: np.ndarray, source: np.ndarray) -> None:
    """`target[...] = source`, casting if the dtypes differ.

    A transposed copy is made in strips, so that each cache line of the target is written once: numpy's own walks one of the two
    arrays with a stride.
    """
    with np.errstate(over="ignore"):  # a value too large for float16 becomes infinite, which the writers count
        _copy(target, source)


def _copy(target: np.ndarray, source: np.ndarray) -> None:
    quick, slow = _fastest(target), _fastest(source)
    if quick == slow or target.size <= _SMALL:
        np.copyto(target, source, casting="unsafe")
        return
    others = [axis for axis in range(target.ndim) if axis not in (quick, slow)]
    index: list = [slice(None)] * target.ndim
    for place in product(*(range(target.shape[axis]) for axis in others)):
        for axis, number in zip(others, place, strict=True):
            index[axis] = number
        for start in range(0, target.shape[quick], _RUN):
            index[quick] = slice(start, start + _RUN)
            # Cast in the source's order, in long runs.
            np.copyto(target[tuple(index)], source[tuple(index)].astype(target.dtype, copy=False))


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
