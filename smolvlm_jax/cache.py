"""`KVCache`: one pair of buffers per layer, written at a column that all rows share.

The buffers are a ring of L columns. Step t writes the key and value of every row into column t mod L, by one
`dynamic_update_slice` at a scalar position (`attention.cached_attention`); with one scatter per row a TPU would read and write
the buffers four times. Which columns a row may see is a boolean per row and column, so that rows of different lengths can
share the buffers, padding is never visible, and a finished row can be replaced while the others go on. Keys are stored after
rotation, so their column does not matter.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp

from .config import SmolVLMTextConfig

__all__ = ["KVCache"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KVCache:
    """Keys and values of all layers, and which of their columns each row may see.

    Attributes:
        keys: (b, k, L, h) per layer, after rotation.
        values: (b, k, L, h) per layer.
        visible: bool (b, L).
        index: int32 (), columns written so far, not mod L.
    """

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]
    visible: jax.Array
    index: jax.Array

    @classmethod
    def create(cls, config: SmolVLMTextConfig, batch: int, length: int, dtype=jnp.float32) -> "KVCache":
        """An empty cache.

        Args:
            config: of the decoder.
            batch: rows b.
            length: columns L.
            dtype: of keys and values.
        """
        empty = jnp.zeros((batch, config.num_key_value_heads, 0, config.head_dim), dtype)
        return cls.from_prompt([(empty, empty)] * config.num_hidden_layers, jnp.zeros((batch, 0), bool), length)

    @classmethod
    def from_prompt(cls, keys_values: Sequence[tuple[jax.Array, jax.Array]], valid: jax.Array, length: int) -> "KVCache":
        """A cache that holds a prompt.

        Args:
            keys_values: keys and values (b, k, t, h) of each layer.
            valid: bool (b, t), which columns are no padding.
            length: columns L, at least t.
        """
        grow = ((0, 0), (0, length - valid.shape[1]))
        pad = lambda x: jnp.pad(x, ((0, 0), *grow, (0, 0)))
        return cls(
            keys=tuple(pad(k) for k, _ in keys_values),
            values=tuple(pad(v) for _, v in keys_values),
            visible=jnp.pad(valid, grow),
            index=jnp.asarray(valid.shape[1], jnp.int32),
        )

    @property
    def length(self) -> int:
        """Columns L of the ring."""
        return self.visible.shape[1]

    def get_seq_length(self) -> jax.Array:
        """Columns written so far, as transformers calls it."""
        return self.index

    def advance(self, valid: jax.Array) -> tuple["KVCache", jax.Array]:
        """Account for t new columns. More than one column at a time must not cross the end of the ring.

        Args:
            valid: bool (b, t), which of the new columns are no padding.

        Returns:
            The cache with new `visible` and `index`, and the mask (b, t, L) of the new queries: every visible earlier column,
            and of the new columns those at or before the query.
        """
        _, t = valid.shape
        start = self.index % self.length
        visible = jax.lax.dynamic_update_slice(self.visible, valid, (0, start))
        offset = (jnp.arange(self.length) - start) % self.length  # position of a column among the new ones
        query = jnp.arange(t)
        causal = (offset[None, :] >= t) | (offset[None, :] <= query[:, None])
        return replace(self, visible=visible, index=self.index + t), visible[:, None, :] & causal[None]
