"""The Llama-style text decoder: rotary grouped-query attention, SwiGLU, RMSNorm."""

from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
from flax import linen as nn

from .activations import activation
from .attention import Attended, LayerCache, SegmentMask, attention, cached_attention
from .cache import KVCache
from .config import SmolVLMTextConfig
from .errors import InputError
from .layers import (
    Embedding,
    Execution,
    Part,
    RMSNorm,
    apply_rotary,
    dimensions,
    rotary_tables,
    run_layers,
    scaled,
)
from .outputs import MultimodalOutput
from .sharding import constrain
from .unbound import says_what_to_type

__all__ = ["SmolVLMBaseModelOutputWithPast", "SmolVLMTextModel", "segment_positions"]

# Columns beyond the prompt of a cache whose length is not given.
_SPARE_COLUMNS = 256


def segment_positions(segment_ids: jax.Array) -> jax.Array:
    """Positions that restart at 0 wherever the segment changes: int (b, t) -> int32 (b, t)."""
    columns = jnp.arange(segment_ids.shape[1], dtype=jnp.int32)[None]
    starts = jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    return columns - jax.lax.cummax(jnp.where(starts, columns, 0), axis=1)


class TextAttention(Part):
    """Causal attention with rotary positions; several query heads share a key/value head."""

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        *,
        rotary: tuple[jax.Array, jax.Array],
        mask: jax.Array | SegmentMask,
        cache: LayerCache | None = None,
    ) -> Attended:
        """See `TextLayer.__call__`."""
        heads, kv = self.config.num_attention_heads, self.config.num_key_value_heads
        if (whole := self.fused(x, "qkv_proj")) is None:
            q = apply_rotary(self.project("btd,dnh->bnth", "q_proj")(x), *rotary)
            k = apply_rotary(self.project("btd,dkh->bkth", "k_proj")(x), *rotary)
            v = self.project("btd,dkh->bkth", "v_proj")(x)
        else:
            whole = jnp.einsum("btnh->bnth", whole)
            turned = apply_rotary(whole[:, : heads + kv], *rotary)
            q, k, v = turned[:, :heads], turned[:, heads:], whole[:, heads + kv :]
        q = constrain(scaled(q, self.config.query_multiplier), "batch", "act_heads", None, None)
        k = constrain(k, "batch", "act_kv_heads", None, None)
        form, weighed = self.execution.attention, self.return_weights
        if cache is None:
            found = attention(q, k, v, mask, form=form, return_weights=weighed)._replace(keys_values=(k, v))
        else:
            found = cached_attention(q, k, v, cache, mask, form=form, return_weights=weighed)
        return found._replace(output=self.project("bnth,nhd->btd", "o_proj")(found.output))


class TextMLP(Part):
    """SwiGLU."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        if (whole := self.fused(x, "gate_up_proj")) is not None:
            gate, up = jnp.split(whole, 2, axis=-1)
        else:
            gate = self.project("btd,df->btf", "gate_proj")(x)
            up = self.project("btd,df->btf", "up_proj")(x)
        x = constrain(activation(self.config.hidden_act)(gate) * up, "batch", None, "act_mlp")
        return self.project("btf,fd->btd", "down_proj")(x)


class TextLayer(Part):
    """Attention and MLP, each after a norm and added to its input."""

    @nn.compact
    def __call__(self, x: jax.Array, **attending) -> Attended:
        """Run the layer.

        Args:
            x: (b, t, d).
            **attending: `rotary`, tables of cosine and sine; `mask`, a SegmentMask, or with a cache bool (b, t, L); `cache`,
                this layer's part of the cache.
        """
        norm = partial(RMSNorm, self.config.hidden_size, self.config.rms_norm_eps, self.execution.dtype)
        attend = TextAttention(self.config, self.execution, self.return_weights, name="self_attn")
        attended = attend(norm(name="input_layernorm")(x), **attending)
        share = self.config.residual_multiplier
        x = constrain(x + scaled(attended.output, share), "batch", None, None)
        x = x + scaled(TextMLP(self.config, self.execution, name="mlp")(norm(name="post_attention_layernorm")(x)), share)
        return attended._replace(output=constrain(x, "batch", None, None))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SmolVLMBaseModelOutputWithPast(MultimodalOutput):
    """What the decoder returns, and with it `SmolVLMModel`. Fields that were not asked for are None.

    Attributes:
        last_hidden_state: (b, t, d) after the final norm.
        past_key_values: the cache.
        hidden_states: input of each decoder layer, then `last_hidden_state`.
        attentions: (b, n, t, s) per decoder layer.
        image_hidden_states: (tiles, tokens, d), padding tiles last.
    """

    last_hidden_state: jax.Array
    past_key_values: KVCache | None = None
    hidden_states: tuple[jax.Array, ...] | None = None
    attentions: tuple[jax.Array, ...] | None = None
    image_hidden_states: jax.Array | None = None


@says_what_to_type
class SmolVLMTextModel(nn.Module):
    """Embeddings in, final hidden states out.

    Attributes:
        config: of the decoder.
        execution: how it is computed.
    """

    config: SmolVLMTextConfig
    execution: Execution = Execution()

    def setup(self) -> None:
        c, sizes = self.config, dimensions(self.config)
        self.embed_tokens = Embedding(sizes["v"], sizes["d"], c.initializer_range, self.execution.dtype)
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps, self.execution.dtype)

    @nn.compact
    def __call__(
        self,
        inputs_embeds: jax.Array,
        *,
        attention_mask: jax.Array | None = None,
        position_ids: jax.Array | None = None,
        past_key_values: KVCache | None = None,
        use_cache: bool | None = None,
        cache_length: int | None = None,
        segment_ids: jax.Array | None = None,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
    ) -> SmolVLMBaseModelOutputWithPast:
        """Run the layers.

        Args:
            inputs_embeds: (b, t, d).
            attention_mask: 1 = real, (b, t), or with a cache (b, past + t), of which the last t columns are read.
            position_ids: int (b, t) or (1, t). Default: the column number, plus the columns in the cache, as in the
                reference's bare forward; with `segment_ids` they restart with each segment.
            past_key_values: a cache, to which the new columns are appended.
            use_cache: without a cache, return a new one, made after the layers have attended to the prompt alone.
            cache_length: columns of the new cache; implies `use_cache`. Default: the prompt's and 256 more.
            segment_ids: int (b, t), several prompts packed into a row, numbered from 1 on, 0 = padding: a token sees its own
                segment only. Not together with a cache.
            output_attentions: also return attention weights.
            output_hidden_states: also return hidden states.

        Returns:
            The last hidden states (b, t, d), and what was asked for besides.

        Raises:
            InputError: if arguments contradict each other.
        """
        b, t, _ = inputs_embeds.shape
        cache = past_key_values
        if self.execution.scan_layers and output_hidden_states:
            raise InputError("a model with scan_layers keeps no hidden states: ask model.clone(scan_layers=False)")
        columns = t + _SPARE_COLUMNS if use_cache and cache_length is None else cache_length
        if cache is None and columns is not None and columns < t:
            raise InputError(f"a cache of {columns} columns does not hold a prompt of {t} tokens")
        if segment_ids is not None and cache is not None:
            raise InputError("segment_ids are for whole prompts; they cannot be continued with a cache")
        valid = jnp.ones((b, t), bool) if attention_mask is None else attention_mask[:, -t:].astype(bool)
        if segment_ids is not None:
            valid = valid & (segment_ids > 0)
        if position_ids is None:
            offset = 0 if cache is None else cache.index
            position_ids = (offset + jnp.arange(t))[None] if segment_ids is None else segment_positions(segment_ids)
        c, dtype = self.config, self.execution.dtype
        rotary = rotary_tables(position_ids, c.head_dim, c.rope_theta, dtype, c.rope_scaling)
        x = scaled(inputs_embeds.astype(dtype), c.embedding_multiplier)
        x = constrain(x, "batch", None, None)
        run = partial(run_layers, self, TextLayer, x, return_weights=output_attentions, rotary=rotary)
        after = None
        if cache is None:
            mask = whole_rows_mask(valid, segment_ids, padded=attention_mask is not None)
            out = run(mask=mask, last_only=columns is None and not output_hidden_states)
            if columns is not None:
                after = KVCache.from_prompt(out.keys_values, valid, columns)
        else:
            after, visible, caches = cache.advance(valid)
            out = run(mask=visible, caches=caches)
            after = replace(after, layers=out.keys_values)
        last = self.norm(out.hidden)
        states = (*out.inputs, last) if output_hidden_states else None
        return SmolVLMBaseModelOutputWithPast(last, after, states, out.weights)


def whole_rows_mask(valid: jax.Array, segment_ids: jax.Array | None, *, padded: bool) -> SegmentMask:
    """Causal attention within rows, where padding is seen by no query and, with `segment_ids`, each segment is alone.

    Args:
        valid: bool (b, t), which columns are no padding.
        segment_ids: int (b, t) or None.
        padded: whether `valid` may have a False; if not, and without segments, the mask is the same for all rows.
    """
    t = valid.shape[1]
    mask = jnp.tril(jnp.ones((t, t), bool))[None]
    if segment_ids is None and not padded:
        return SegmentMask(mask, None, causal=True)
    mask = mask & valid[:, None, :]
    if segment_ids is not None:
        mask = mask & (segment_ids[:, :, None] == segment_ids[:, None, :])
    ids = jnp.where(valid, 1 if segment_ids is None else segment_ids, 0).astype(jnp.int32)
    return SegmentMask(mask, ids, causal=True)
