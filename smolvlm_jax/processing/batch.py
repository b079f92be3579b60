"""The mapping that every processor returns, and the kinds of arrays that it may hold."""

import importlib
import numbers
from collections.abc import Mapping
from typing import Any, Self

import numpy as np

from ..dtypes import FLOATS, dtype_name, full_name
from ..errors import HabitError, InputError
from ..habits import torch_name
from .choices import as_name
from .pytree import register_mapping

RETURN_TENSORS = ("np", "jax")
# Entries that describe the batch and are not computed with: strings, and objects without arrays.
_DESCRIPTIONS = ("image_hashes", "video_metadata")
# What transformers' BatchEncoding has beyond its entries.
_OF_ENCODINGS = frozenset({
    "char_to_token", "char_to_word", "encodings", "is_fast", "n_sequences", "sequence_ids", "token_to_chars",
    "token_to_sequence", "token_to_word", "tokens", "word_ids", "word_to_chars", "word_to_tokens", "words",
})  # fmt: skip
# Entries that are lists whatever a call asks for: samples may have different numbers of pictures.
_LISTS = (*_DESCRIPTIONS, "rows", "cols")


class BatchFeature(dict[str, Any]):
    """A dict whose keys are attributes too: `batch["input_ids"]` is `batch.input_ids`, and `model(**batch)` works.

    To jax it is a pytree, whose leaves are those of its values; `video_metadata` and `image_hashes` belong to its structure. So
    `jax.device_put(batch)`, `jax.tree.map` and jitted functions of a batch work, and return a BatchFeature.
    """

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            if name in _OF_ENCODINGS:
                raise HabitError(
                    f"this batch has no {name!r}: tokenizer.encoding(text) has tokens, word_ids, offsets and their like, and "
                    "return_offsets_mapping=True gives offsets"
                ) from None
            raise AttributeError(f"this batch has no {name!r}; it has {sorted(self)}") from None

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, (int, slice)):
            raise HabitError(
                f"a batch has no row {key!r}: batch['input_ids'][{key!r}] has the ids of one, and tokenizer.encoding(text) the "
                "tokens and offsets"
            )
        return super().__getitem__(key)

    def __setattr__(self, name: str, value: Any) -> None:
        self[name] = value

    def copy(self) -> Self:
        """A shallow copy.

        Returns:
            The copy.
        """
        return type(self)(self)

    @property
    def data(self) -> dict[str, Any]:
        """The entries as a plain dict, under transformers' name."""
        return dict(self)

    def convert_to_tensors(self, tensor_type: Any = None, prepend_batch_axis: bool = False) -> Self:
        """Turn every entry that makes one array into one, in place.

        Args:
            tensor_type: "np" or "jax"; None leaves the batch as it is.
            prepend_batch_axis: the batch is one sample: give each entry a first dimension of 1.

        Returns:
            The batch itself.

        Raises:
            InputError: another kind, or rows of different lengths.
        """
        batch = {name: [value] for name, value in self.items()} if prepend_batch_axis else self
        self.update(as_tensors(batch, tensor_type))
        return self

    def to(self, device: Any = None, dtype: Any = None, *, non_blocking: bool | None = None) -> Self:
        """A copy on a device, with floats in another dtype: what `jax.device_put` and `astype` do, in one call.

        Args:
            device: a jax device or sharding, or the name of a platform ("cpu", "gpu", "cuda", "tpu"); None leaves arrays where
                they are. A dtype in its place is taken for `dtype`.
            dtype: of floating-point entries, as in `load`.
            non_blocking: without effect: jax does not wait for copies.

        Returns:
            The copy.

        Raises:
            InputError: there is no such device or dtype.
        """
        if dtype is None and _is_dtype(device):
            device, dtype = None, device
        kind = None if dtype is None else importlib.import_module("jax.numpy").dtype(dtype_name(dtype))
        place = None if device is None else _device(device)

        def moved(value: Any) -> Any:
            if not hasattr(value, "dtype"):
                return value
            # bfloat16 is a floating-point dtype of jax, not of numpy
            if kind is not None and (np.issubdtype(value.dtype, np.floating) or "float" in str(value.dtype)):
                value = value.astype(kind)
            return value if place is None else importlib.import_module("jax").device_put(value, place)

        return type(self)({name: moved(value) for name, value in self.items()})

    def __repr__(self) -> str:
        def show(value: Any) -> str:
            shape = getattr(value, "shape", None)
            return f"{value.dtype}{list(shape)}" if shape is not None else repr(value)

        return f"BatchFeature({', '.join(f'{key}: {show(value)}' for key, value in self.items())})"


register_mapping(BatchFeature, descriptions=_DESCRIPTIONS)


def check_return_tensors(return_tensors: object) -> str | None:
    """`return_tensors` as one of None, "np" and "jax". Raises InputError for anything else."""
    name = None if return_tensors is None else as_name(return_tensors)
    if name not in (None, *RETURN_TENSORS):
        raise InputError(f"return_tensors is {name!r:.80}; it is 'np', 'jax' or None: write \"np\" or \"jax\"")
    return name


def as_tensors(batch: Mapping[str, Any], return_tensors: object) -> BatchFeature:
    """A batch with its numbers as arrays.

    Args:
        batch: entries by name; lists of numbers, nested alike, become int64 arrays, apart from rows, cols and what only
            describes the batch.
        return_tensors: "np", "jax", or None, which changes nothing.

    Raises:
        InputError: another kind, or rows that make no array.
    """
    kind = check_return_tensors(return_tensors)
    if kind is None:
        return BatchFeature(batch)
    return BatchFeature({name: value if name in _LISTS else _array(name, value, kind) for name, value in batch.items()})


def _array(name: str, value: Any, kind: str) -> Any:
    if isinstance(value, list):
        try:
            found = np.asarray(value)
        except ValueError as error:
            raise InputError(f"{name}: rows of different lengths do not make one array; pass padding=True") from error
        if found.dtype.kind in "iub" or not found.size:
            value = found.astype(np.int64)
        elif found.dtype.kind == "f":
            value = found
    if kind == "np" or not isinstance(value, (np.ndarray, np.generic, numbers.Number)):
        return value
    if np.asarray(value).dtype == object:
        raise InputError(f"{name}: samples with different numbers of tiles do not make one array; leave do_pad on")
    return importlib.import_module("jax.numpy").asarray(value)


def _is_dtype(value: Any) -> bool:
    """Whether a first argument of `to` is a dtype and not a device."""
    return isinstance(value, (np.dtype, type)) or type(value).__name__ == "dtype" or full_name(value) in FLOATS


def _device(value: Any) -> Any:
    """A jax device or sharding: the value itself, or the first device of a platform."""
    value = torch_name(value)
    if not isinstance(value, str):
        return value
    try:
        return importlib.import_module("jax").devices(value.partition(":")[0])[int(value.partition(":")[2] or 0)]
    except (RuntimeError, IndexError, ValueError) as error:
        raise InputError(f"there is no device {value!r} here; jax.devices() lists those there are") from error
