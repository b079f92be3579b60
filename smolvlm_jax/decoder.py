"""The Llama-style text decoder: rotary grouped-query attention, SwiGLU, RMSNorm."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from .attention.dispatch import SegmentMask, attention, cached_attention
from .cache import KVCache
from .config import SmolVLMTextConfig
from .errors import InputError
from .layers import (
    Embedding,
    Projection,
    RMSNorm,
    activation,
    apply_rotary,
    rematerialized,
    rotary_tables,
    scan_layers,
    stackable,
)
from .sharding import constrain

__all__ = ["SmolVLMTextModel", "segment_positions"]


def segment_positions(segment_ids: jax.Array) -> jax.Array:
    """Positions that restart at 0 wherever the segment changes: int (b, t) -> int32 (b, t)."""
    columns = jnp.arange(segment_ids.shape[1], dtype=jnp.int32)[None]
    starts = jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    return columns - jax.lax.cummax(jnp.where(starts, columns, 0), axis=1)


class TextAttention(nn.Module):
    config: SmolVLMTextConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, rotary, mask, cache, layer: int, start, return_weights: bool):
        """x (b, t, d) -> (output (b, t, d), this layer's (keys, values), weights).

        Without a cache the new keys and values (b, k, t, h) come back; with one, its updated buffers.
        """
        c = self.config
        d, n, kv, h = c.hidden_size, c.num_attention_heads, c.num_key_value_heads, c.head_dim
        shared = dict(initializer_range=c.initializer_range, dtype=self.dtype)
        q = Projection("btd,dnh->bnth", (d, n, h), ("embed", "heads", None), name="q_proj", **shared)(x)
        k = Projection("btd,dkh->bkth", (d, kv, h), ("embed", "kv_heads", None), name="k_proj", **shared)(x)
        v = Projection("btd,dkh->bkth", (d, kv, h), ("embed", "kv_heads", None), name="v_proj", **shared)(x)
        q = constrain(apply_rotary(q, *rotary), "batch", "act_heads", None, None)
        k = constrain(apply_rotary(k, *rotary), "batch", "act_kv_heads", None, None)
        if cache is None:
            out, weights = attention(q, k, v, mask, return_weights=return_weights)
        else:
            out, (k, v), weights = cached_attention(q, k, v, cache, layer, start, mask, return_weights=return_weights)
        out = Projection("bnth,nhd->btd", (n, h, d), ("heads", None, "embed"), name="o_proj", **shared)(out)
        return out, (k, v), weights


class TextMLP(nn.Module):
    config: SmolVLMTextConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        d, f = self.config.hidden_size, self.config.intermediate_size
        shared = dict(initializer_range=self.config.initializer_range, dtype=self.dtype)
        gate = Projection("btd,df->btf", (d, f), ("embed", "mlp"), name="gate_proj", **shared)(x)
        up = Projection("btd,df->btf", (d, f), ("embed", "mlp"), name="up_proj", **shared)(x)
        x = constrain(activation(self.config.hidden_act)(gate) * up, "batch", None, "act_mlp")
        return Projection("btf,fd->btd", (f, d), ("mlp", "embed"), name="down_proj", **shared)(x)


class TextLayer(nn.Module):
    config: SmolVLMTextConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, rotary, mask, cache, layer: int, start, return_weights: bool):
        d, eps = self.config.hidden_size, self.config.rms_norm_eps
        normed = RMSNorm(d, eps, self.dtype, name="input_layernorm")(x)
        out, keys_values, weights = TextAttention(self.config, self.dtype, name="self_attn")(
            normed, rotary, mask, cache, layer, start, return_weights
        )
        x = constrain(x + out, "batch", None, None)
        normed = RMSNorm(d, eps, self.dtype, name="post_attention_layernorm")(x)
        x = x + TextMLP(self.config, self.dtype, name="mlp")(normed)
        return constrain(x, "batch", None, None), keys_values, weights


class SmolVLMTextModel(nn.Module):
    """Embeddings in, final hidden states out."""

    config: SmolVLMTextConfig
    dtype: Any = jnp.float32
    remat: bool | str = False
    scan_layers: bool = False

    def setup(self):
        c = self.config
        self.embed_tokens = Embedding(c.vocab_size, c.hidden_size, ("vocab", "embed"), c.initializer_range, self.dtype)
        layer = rematerialized(TextLayer, self.remat, static_argnums=(5, 7))
        self.layers = [layer(c, self.dtype) for _ in range(c.num_hidden_layers)]
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps, self.dtype)

    def __call__(
        self,
        inputs_embeds: jax.Array,
        attention_mask: jax.Array | None = None,
        position_ids: jax.Array | None = None,
        cache: KVCache | None = None,
        cache_length: int | None = None,
        output_attentions: bool = False,
        segment_ids: jax.Array | None = None,
    ) -> dict[str, Any]:
        """Run the layers.

        inputs_embeds (b, t, d); attention_mask (b, t), or (b, …+t) of which the last t columns count; position_ids (b, t)
        or (1, t), by default the column number, as the reference's bare forward has it. With `cache` the new columns are
        appended to it. Without one but with `cache_length` a new cache of that many columns is returned, made after the
        layers have attended to the prompt alone. segment_ids int (b, t), only without `cache`: several prompts packed into a
        row, numbered from 1 on, 0 being padding; a token sees its own segment alone, and positions restart with each.
        Returns a mapping with `last_hidden_state`, `hidden_states` (input of each layer, then the normed output; None of
        `scan_layers`), `attentions`, `cache`.
        """
        b, t, _ = inputs_embeds.shape
        valid = jnp.ones((b, t), bool) if attention_mask is None else attention_mask[:, -t:].astype(bool)
        offset = 0 if cache is None else cache.index
        if segment_ids is not None:
            if cache is not None:
                raise InputError("segment_ids are for whole prompts; they cannot be continued with a cache")
            valid = valid & (segment_ids > 0)
        if position_ids is None:
            position_ids = (offset + jnp.arange(t))[None] if segment_ids is None else segment_positions(segment_ids)
        rotary = rotary_tables(position_ids, self.config.head_dim, self.config.rope_theta, self.dtype)
        if cache is None:
            start = None
            causal = jnp.tril(jnp.ones((t, t), bool))[None]
            mask = causal if attention_mask is None and segment_ids is None else causal & valid[:, None, :]
            if segment_ids is not None:
                mask = mask & (segment_ids[:, :, None] == segment_ids[:, None, :])
            ids = None
            if attention_mask is not None or segment_ids is not None:
                ids = jnp.where(valid, 1 if segment_ids is None else segment_ids, 0).astype(jnp.int32)
            mask, after = SegmentMask(mask, ids, causal=True), None
        else:
            start = cache.index % cache.length
            after, mask = cache.advance(valid)

        x = constrain(inputs_embeds.astype(self.dtype), "batch", None, None)
        if self.scan_layers and cache is None and cache_length is None and not output_attentions and not self.is_initializing():
            weights = {name: tree for name, tree in self.variables["params"].items() if name.startswith("layers_")}
            if stackable(weights):
                layer = TextLayer(self.config, self.dtype, parent=None)
                x = scan_layers(layer, weights, self.remat, x, rotary, mask, None, 0, None, False)
                return {"last_hidden_state": self.norm(x), "hidden_states": None, "attentions": None, "cache": None}
        states, attentions, keys, values = [], [], [], []
        for l, layer in enumerate(self.layers):
            states.append(x)
            x, (k, v), weights = layer(x, rotary, mask, cache, l, start, output_attentions)
            keys.append(k)
            values.append(v)
            attentions.append(weights)
        x = self.norm(x)
        states.append(x)

        if cache is not None:
            after = replace(after, keys=tuple(keys), values=tuple(values))
        elif cache_length is not None:
            grow = ((0, 0), (0, 0), (0, cache_length - t), (0, 0))
            after = KVCache(
                keys=tuple(jnp.pad(k, grow) for k in keys),
                values=tuple(jnp.pad(v, grow) for v in values),
                visible=jnp.pad(valid, ((0, 0), (0, cache_length - t))),
                index=jnp.asarray(t, jnp.int32),
            )
        return {
            "last_hidden_state": x,
            "hidden_states": tuple(states),
            "attentions": tuple(attentions) if output_attentions else None,
            "cache": after,
        }
