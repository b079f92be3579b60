"""`KVCache`: keys and values of each layer, written at a column that all rows share; and the only place that lays them out.

The buffers are a ring of L columns. Step t writes the key and value of every row into column t mod L, by one update at a scalar
position; with one scatter per row a TPU would read and write the buffers four times. Which columns a row may see is a boolean
per row and column, so that rows of different lengths can share the buffers, padding is never visible, and a finished row can be
replaced while the others go on. Keys are stored after rotation, so their column does not matter.

There are three layouts, the first and the last with keys and values as they are or in 8 bits (`int8`):

* heads before columns (`HeadBuffers`), for any use on any platform;
* the same with keys and values in one array (`PairBuffers`), for decoding on NVIDIA's GPUs: a step writes both by one kernel;
* columns before heads, keys and values side by side (`ColumnBuffers`), for decoding on TPUs: its kernel reads what is visible
  and nothing else. It takes the visible columns of a row for the last ones. The caller that asks for this layout has to
  guarantee this:

  *a row whose newest column is visible sees its last columns, some number of them, without a gap.*

  `generate` keeps it by moving prompts to the right end, `insert` by placing a prompt just before the next column, and both by
  never going on with a row that has skipped a column. A cache that the model's forward makes, for masks that may have gaps, has
  the first layout.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from .attention import LayerCache, pages_decode
from .attention.decode_limits import decode_pieces
from .attention.int8 import dequantize, quantize
from .attention.work import WorkList, work_list
from .config import SmolVLMTextConfig
from .errors import InputError
from .sharding import constrain, shards

__all__ = ["CacheFormat", "ColumnBuffers", "HeadBuffers", "KVCache", "PairBuffers", "check_kv_cache_dtype"]

# Of an array (b, heads or shards, …, …): its place among the dimensions.
_COLUMNS, _COLUMNS_OF_SCALES = 2, 3
_BUFFER = ("batch", "act_kv_heads", None, None)


def check_kv_cache_dtype(name: str | None) -> bool:
    """Whether a setting asks for an int8 cache; None does not. Raises InputError for any other name."""
    if name not in (None, "int8"):
        raise InputError(f"kv_cache_dtype is 'int8', or None for the model's own, got {name!r:.80}")
    return name is not None


@dataclass(frozen=True)
class CacheFormat:
    """How keys and values are stored; static.

    Attributes:
        dtype: of keys and values. In int8 each has a float32 scale for each row, head and column.
        shards: None for `HeadBuffers`; for `ColumnBuffers`, over how many devices the heads are spread.
        paired: without shards, for `PairBuffers`.
    """

    dtype: Any
    shards: int | None = None
    paired: bool = False

    @classmethod
    def choose(
        cls, config: SmolVLMTextConfig, length: int, dtype: Any, *, quantized: bool = False, mesh: Mesh | None = None
    ) -> "CacheFormat":
        """The best format for decoding where the promise above is kept.

        Args:
            config: of the decoder.
            length: columns of the ring.
            dtype: that the model computes in.
            quantized: whether to store int8.
            mesh: where the cache is; its devices' platform counts, else the default one.
        """
        kept = jnp.dtype(jnp.int8 if quantized else dtype)
        platform = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
        heads = config.num_key_value_heads
        if platform == "gpu" and not quantized:
            # Devices that divide the pairs but not the heads would take keys without their values.
            alike = shards("act_kv_heads", 2 * heads, mesh) == shards("act_kv_heads", heads, mesh)
            return cls(kept, paired=alike and pages_decode(length, config.head_dim, kept))
        if platform != "tpu" or jnp.dtype(dtype) != jnp.bfloat16:
            return cls(kept)
        split = shards("act_kv_heads", heads, mesh)
        fits = decode_pieces(length, 2 * heads // split * config.head_dim, config.head_dim, kept)
        return cls(kept, None if fits is None else split)

    @property
    def quantized(self) -> bool:
        return self.dtype == jnp.int8

    def column_bytes(self, config: SmolVLMTextConfig) -> int:
        """Bytes of a row's column, in all layers."""
        head = config.head_dim * jnp.dtype(self.dtype).itemsize + 4 * self.quantized
        return 2 * config.num_hidden_layers * config.num_key_value_heads * head


class _Layout:
    """What all layouts do alike."""

    def write(self: Any, k: jax.Array, v: jax.Array, start: jax.Array) -> Any:
        """The buffers with new keys and values (b, k, t, h) from column `start` on."""

        def put(axis, buffer, new):
            at = [0] * 4
            at[axis] = start
            return constrain(jax.lax.dynamic_update_slice(buffer, new, at), *_BUFFER)

        return _each(put, self, self.like(k, v))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class HeadBuffers(_Layout):
    """Keys and values of a layer, heads before columns.

    Attributes:
        keys: (b, k, L, h), after rotation.
        values: (b, k, L, h).
        key_scales: float32 (b, k, L, 1), of int8 keys.
        value_scales: the same of values.
    """

    keys: jax.Array
    values: jax.Array
    key_scales: jax.Array | None = None
    value_scales: jax.Array | None = None

    @classmethod
    def of(cls, k: jax.Array, v: jax.Array, dtype: Any) -> "HeadBuffers":
        """The buffers of keys and values (b, k, t, h)."""
        if dtype != jnp.int8:
            return cls(k.astype(dtype), v.astype(dtype))
        (k, of_keys), (v, of_values) = quantize(k), quantize(v)
        return cls(k, v, of_keys, of_values)

    @property
    def columns(self) -> tuple[int, ...]:
        """Which dimension of each array has the columns."""
        return (_COLUMNS,) * len(jax.tree.leaves(self))

    def like(self, k: jax.Array, v: jax.Array) -> "HeadBuffers":
        """Keys and values (b, k, t, h) laid out as these are."""
        return self.of(k, v, self.keys.dtype)

    def read(self, dtype: Any) -> tuple[jax.Array, jax.Array]:
        """Keys and values (b, k, L, h)."""
        if self.key_scales is None or self.value_scales is None:
            return self.keys.astype(dtype), self.values.astype(dtype)
        return dequantize(self.keys, self.key_scales).astype(dtype), dequantize(self.values, self.value_scales).astype(dtype)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PairBuffers(_Layout):
    """Keys and values of a layer in one array, heads before columns, each head's keys before its values.

    Attributes:
        heads: (b, 2·k, L, h).
    """

    heads: jax.Array

    @classmethod
    def of(cls, k: jax.Array, v: jax.Array, dtype: Any) -> "PairBuffers":
        """The buffers of keys and values (b, k, t, h)."""
        b, heads, t, h = k.shape
        return cls(jnp.stack([k, v], 2).astype(dtype).reshape(b, 2 * heads, t, h))

    @property
    def columns(self) -> tuple[int, ...]:
        """Which dimension of each array has the columns."""
        return (_COLUMNS,)

    def like(self, k: jax.Array, v: jax.Array) -> "PairBuffers":
        """Keys and values (b, k, t, h) laid out as these are."""
        return self.of(k, v, self.heads.dtype)

    def read(self, dtype: Any) -> tuple[jax.Array, jax.Array]:
        """Keys and values (b, k, L, h)."""
        return self.heads[:, ::2].astype(dtype), self.heads[:, 1::2].astype(dtype)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ColumnBuffers(_Layout):
    """Keys and values of a layer, columns before heads: of a column first the keys of all heads, then their values.

    Attributes:
        pairs: (b, s, L, 2·k/s·h): s shards, each with its own heads.
        scales: float32 (b, s, R, L), of int8 pairs: those of the keys, then those of the values; R is 2·k/s, rounded up to 8.
        size: h.
    """

    pairs: jax.Array
    scales: jax.Array | None
    size: int = field(metadata={"static": True})

    @classmethod
    def of(cls, k: jax.Array, v: jax.Array, dtype: Any, shards: int) -> "ColumnBuffers":
        """The buffers of keys and values (b, k, t, h)."""
        b, heads, t, h = k.shape
        apart = lambda x: x.reshape(b, shards, heads // shards, t, h)
        both = jnp.concatenate([apart(k), apart(v)], 2)  # (b, s, 2·k/s, t, h)
        scales = None
        if dtype == jnp.int8:
            both, scales = quantize(both)
            scales = jnp.pad(scales[..., 0], ((0, 0), (0, 0), (0, -both.shape[2] % 8), (0, 0)))
        return cls(both.astype(dtype).swapaxes(2, 3).reshape(b, shards, t, 2 * heads // shards * h), scales, h)

    @property
    def columns(self) -> tuple[int, ...]:
        """Which dimension of each array has the columns."""
        return (_COLUMNS,) if self.scales is None else (_COLUMNS, _COLUMNS_OF_SCALES)

    def like(self, k: jax.Array, v: jax.Array) -> "ColumnBuffers":
        """Keys and values (b, k, t, h) laid out as these are."""
        return self.of(k, v, self.pairs.dtype, self.pairs.shape[1])

    def read(self, dtype: Any) -> tuple[jax.Array, jax.Array]:
        """Keys and values (b, k, L, h)."""
        b, s, length, _ = self.pairs.shape
        both = self.pairs.reshape(b, s, length, -1, self.size).swapaxes(2, 3)
        if self.scales is not None:
            both = dequantize(both, self.scales[:, :, : both.shape[2], :, None])
        keys, values = jnp.split(both.astype(dtype), 2, 2)
        return keys.reshape(b, -1, length, self.size), values.reshape(b, -1, length, self.size)

    def work(self, live: jax.Array, start: jax.Array) -> WorkList | None:
        """What the decode kernel reads when rows see `live` (b,) columns up to `start`; None if it cannot read these."""
        _, _, length, lanes = self.pairs.shape
        pieces = decode_pieces(length, lanes, self.size, self.pairs.dtype)
        devices = shards("batch", len(live))
        return None if pieces is None else work_list(live.reshape(devices, -1), start, pieces)


Buffers = HeadBuffers | PairBuffers | ColumnBuffers


def _each(function: Callable[..., jax.Array], buffers: Any, *others: Any) -> Any:
    """The buffers with `function(axis, x, *xs)` in place of each array x, whose columns are dimension `axis`; xs are the arrays
    of the others in this place."""
    arrays, tree = jax.tree.flatten(buffers)
    rest = [jax.tree.leaves(other) for other in others]
    return jax.tree.unflatten(tree, [function(*each) for each in zip(buffers.columns, arrays, *rest, strict=True)])


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KVCache:
    """Keys and values of all layers, and which of their columns each row may see.

    Attributes:
        layers: the buffers of each layer.
        visible: bool (b, L).
        index: int32 (), columns written so far, not mod L.
    """

    layers: tuple[Buffers, ...]
    visible: jax.Array
    index: jax.Array

    @classmethod
    def create(
        cls, config: SmolVLMTextConfig, batch: int, length: int, dtype: Any = jnp.float32, *, stored: CacheFormat | None = None
    ) -> "KVCache":
        """An empty cache.

        Args:
            config: of the decoder.
            batch: rows b.
            length: columns L.
            dtype: of keys and values.
            stored: their format. Default: `HeadBuffers` of this dtype.

        Returns:
            The cache, in which no column is visible.
        """
        empty = jnp.zeros((batch, config.num_key_value_heads, 0, config.head_dim), dtype)
        start = cls.from_prompt([(empty, empty)] * config.num_hidden_layers, jnp.zeros((batch, 0), bool), 0)
        return start.stored_as(stored or CacheFormat(jnp.dtype(dtype)), length)

    @classmethod
    def from_prompt(cls, keys_values: Sequence[tuple[jax.Array, jax.Array]], valid: jax.Array, length: int) -> "KVCache":
        """A cache that holds a prompt.

        Args:
            keys_values: keys and values (b, k, t, h) of each layer.
            valid: bool (b, t), which columns are no padding.
            length: columns L, at least t.

        Returns:
            The cache, whose next column is t.
        """
        layers = tuple(HeadBuffers(k, v) for k, v in keys_values)
        return cls(layers, valid, jnp.asarray(valid.shape[1], jnp.int32))._grown(length)

    def stored_as(self, stored: CacheFormat, length: int) -> "KVCache":
        """The same in another format, from `HeadBuffers` that are not quantized.

        Args:
            stored: the format. Asking for `ColumnBuffers` gives the promise of this module.
            length: columns, at least as many as there are.

        Returns:
            The cache.
        """

        def convert(layer: Any) -> Buffers:
            if stored.shards is None:
                layout = PairBuffers if stored.paired else HeadBuffers
                return layout.of(layer.keys, layer.values, stored.dtype)
            return ColumnBuffers.of(layer.keys, layer.values, stored.dtype, stored.shards)

        return replace(self, layers=tuple(map(convert, self.layers)))._grown(length)

    def _grown(self, length: int) -> "KVCache":
        more = length - self.length
        pad = lambda axis, x: jnp.pad(x, [(0, more * (axis == i)) for i in range(x.ndim)])
        layers = tuple(_each(pad, layer) for layer in self.layers)
        return replace(self, layers=layers, visible=pad(1, self.visible))

    @property
    def length(self) -> int:
        """Columns L of the ring."""
        return self.visible.shape[1]

    def get_seq_length(self) -> jax.Array:
        """`index` under transformers' name.

        Returns:
            int32 (), columns written so far.
        """
        return self.index

    def advance(self, valid: jax.Array) -> tuple["KVCache", jax.Array, list[LayerCache]]:
        """Account for t new columns. More than one column at a time must not cross the end of the ring.

        Args:
            valid: bool (b, t), which of the new columns are no padding.

        Returns:
            The cache with new `visible` and `index`, whose `layers` are still to be replaced; the mask (b, t, L) of the new
            queries: every visible earlier column, and of the new columns those at or before the query; and what each layer's
            attention gets.
        """
        _, t = valid.shape
        start = self.index % self.length
        visible = jax.lax.dynamic_update_slice(self.visible, valid, (0, start))
        offset = (jnp.arange(self.length) - start) % self.length  # position of a column among the new ones
        query = jnp.arange(t)
        causal = (offset[None, :] >= t) | (offset[None, :] <= query[:, None])
        work = None
        if t == 1 and isinstance(self.layers[0], ColumnBuffers):
            work = self.layers[0].work(jnp.where(valid[:, 0], visible.sum(1, dtype=jnp.int32), 0), start)
        after = replace(self, visible=visible, index=self.index + t)
        return after, visible[:, None, :] & causal[None], [LayerCache(layer, start, work) for layer in self.layers]

    def insert(
        self, row: jax.Array, prompt: Sequence[HeadBuffers], start: jax.Array, length: jax.Array, *, wanted: jax.Array
    ) -> "KVCache":
        """Put a prompt into a row, so that it ends just before the column that the next step writes.

        Slices and a roll, no gather: both are plain copies on every backend.

        Args:
            row: int ().
            prompt: keys and values (1, k, T, h) of each layer, several prompts side by side.
            start: int (), the prompt's first column there.
            length: int (), its columns.
            wanted: bool (); if not, nothing changes.

        Returns:
            The cache.
        """
        columns = self.length
        shift = self.index % columns - length

        @jax.jit  # traced once for all layers; the compiler inlines the calls
        def put(layer, packed, row, start, shift, wanted):
            def cut(packed):
                padded = jnp.pad(packed, ((0, 0), (0, 0), (0, columns), (0, 0)))
                return jax.lax.dynamic_slice_in_dim(padded, start, columns, axis=_COLUMNS)

            def place(axis, buffer, new):
                new = jnp.roll(new, shift, axis)
                old = jax.lax.dynamic_slice_in_dim(buffer, row, 1, axis=0)
                return jax.lax.dynamic_update_slice_in_dim(buffer, jnp.where(wanted, new, old), row, axis=0)

            return _each(place, layer, layer.like(cut(packed.keys), cut(packed.values)))

        visible = jnp.where(wanted, jnp.roll(jnp.arange(columns) < length, shift), self.visible[row])
        return replace(
            self,
            layers=tuple(put(*each, row, start, shift, wanted) for each in zip(self.layers, prompt, strict=True)),
            visible=self.visible.at[row].set(visible),
        )
