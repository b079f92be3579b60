"""`KVCache`: one pair of buffers per layer, written at a column that all rows share.

The buffers are a ring of L columns. Writing step t puts every row's key and value into column t mod L by one
`dynamic_update_slice` at a scalar position; per-row scatters would make a TPU read and write the buffers four times over.
What a row may see is a boolean per column, so rows of unlike length live side by side, padding is simply never visible, and
a finished row can be replaced while its neighbours go on. Keys are stored after rotation: where they lie does not matter.
"""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp

from .config import SmolVLMTextConfig
from .sharding import constrain

__all__ = ["KVCache"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KVCache:
    """Keys and values (b, k, L, h) per layer; `visible` bool (b, L); `index` int32, columns written so far (not mod L)."""

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]
    visible: jax.Array
    index: jax.Array

    @classmethod
    def create(cls, config: SmolVLMTextConfig, batch: int, length: int, dtype=jnp.float32) -> "KVCache":
        """An empty cache for `batch` rows and `length` columns."""
        shape = (batch, config.num_key_value_heads, length, config.head_dim)
        layers = range(config.num_hidden_layers)
        return cls(
            keys=tuple(jnp.zeros(shape, dtype) for _ in layers),
            values=tuple(jnp.zeros(shape, dtype) for _ in layers),
            visible=jnp.zeros((batch, length), bool),
            index=jnp.zeros((), jnp.int32),
        )

    @property
    def length(self) -> int:
        """Columns L of the ring."""
        return self.visible.shape[1]

    def get_seq_length(self) -> jax.Array:
        """Columns written so far, as transformers calls it."""
        return self.index

    def advance(self, valid: jax.Array) -> tuple["KVCache", jax.Array]:
        """Make room for t new columns whose validity is `valid` bool (b, t).

        Returns the cache with `visible` and `index` moved on, and the mask (b, t, L) the new queries see: every visible
        earlier column, and of the new ones those at or before the query. A chunk of more than one column must not cross
        the end of the ring.
        """
        _, t = valid.shape
        start = self.index % self.length
        visible = jax.lax.dynamic_update_slice(self.visible, valid, (0, start))
        offset = (jnp.arange(self.length) - start) % self.length  # place of a column within the new chunk
        query = jnp.arange(t)
        causal = (offset[None, :] >= t) | (offset[None, :] <= query[:, None])
        return replace(self, visible=visible, index=self.index + t), visible[:, None, :] & causal[None]

    @staticmethod
    def write(keys: jax.Array, values: jax.Array, start: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
        """A layer's buffers (b, k, L, h) with new keys and values (b, k, t, h) from column `start` on."""
        put = lambda buffer, new: constrain(
            jax.lax.dynamic_update_slice(buffer, new.astype(buffer.dtype), (0, 0, start, 0)),
            "batch",
            "act_kv_heads",
            None,
            None,
        )
        return put(keys, k), put(values, v)
