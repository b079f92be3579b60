"""`SmolVLMModel` and `SmolVLMForConditionalGeneration`: encoder, connector and decoder put together, as pure functions."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from .cache import KVCache
from .config import SmolVLMConfig
from .connector import SmolVLMConnector
from .decoder import SmolVLMTextModel
from .errors import ConfigError, InputError
from .generation_config import GenerationConfig
from .layers import Projection
from .merge import check_counts, merge_image_features, real_tiles_first
from .sharding import constrain
from .vision import SmolVLMVisionTransformer, normalize_tiles, patch_mask

__all__ = [
    "SmolVLMBaseModelOutputWithPast",
    "SmolVLMCausalLMOutputWithPast",
    "SmolVLMForConditionalGeneration",
    "SmolVLMModel",
    "causal_lm_loss",
]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SmolVLMBaseModelOutputWithPast:
    """What `SmolVLMModel` returns. Fields that were not asked for are None.

    last_hidden_state (b, t, d); past_key_values KVCache; hidden_states: input of each decoder layer and the normed output;
    attentions: (b, n, t, s) per decoder layer; image_hidden_states (tiles, tokens, d), padding tiles last.
    """

    last_hidden_state: jax.Array
    past_key_values: KVCache | None = None
    hidden_states: tuple[jax.Array, ...] | None = None
    attentions: tuple[jax.Array, ...] | None = None
    image_hidden_states: jax.Array | None = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SmolVLMCausalLMOutputWithPast:
    """What `SmolVLMForConditionalGeneration` returns: logits (b, t or logits_to_keep, v), loss () float32, and the rest."""

    logits: jax.Array
    loss: jax.Array | None = None
    past_key_values: KVCache | None = None
    hidden_states: tuple[jax.Array, ...] | None = None
    attentions: tuple[jax.Array, ...] | None = None
    image_hidden_states: jax.Array | None = None


def causal_lm_loss(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Mean cross-entropy of each next label, as the reference computes it: logits (b, t, v) in float32, labels (b, t) shifted
    left by one, -100 ignored, NaN if nothing is left. Image and padding tokens count unless the caller sets them to -100."""
    logits = logits[:, :-1].astype(jnp.float32)
    target = labels[:, 1:]
    keep = target != -100
    picked = jnp.take_along_axis(logits, jnp.where(keep, target, 0)[..., None], axis=-1)[..., 0]
    losses = jax.nn.logsumexp(logits, axis=-1) - picked
    return jnp.where(keep, losses, 0).sum() / keep.sum()


class SmolVLMModel(nn.Module):
    """Encoder, connector and decoder without the output head.

    dtype: what activations and matrix products are computed in; parameters keep theirs and are cast at use. With float16 the
    encoder still computes in float32.
    position_ids: rule for the encoder's position ids, "intended" or "transformers-4.56" (see `vision.position_buckets`).
    remat: recompute each layer in the backward pass instead of keeping its activations: True or "full" all of it, "dots" all
    but the matrix products with weights.
    scan_layers: layers in a loop over their stacked weights, where nothing but the last hidden states is asked for: training
    on accelerators compiles faster and needs less memory.
    """

    config: SmolVLMConfig
    dtype: Any = jnp.float32
    position_ids: str = "intended"
    remat: bool | str = False
    scan_layers: bool = False

    def setup(self):
        vision = self.config.vision_config
        side, scale = vision.num_patches_per_side, self.config.scale_factor
        if side % scale:  # true of the class defaults: such a config can be written down, but not run
            raise ConfigError(f"a tile has {side} × {side} patches, which scale_factor {scale} does not divide")
        # Activations of the encoder leave float16's range on ordinary pictures.
        encoder_dtype = jnp.float32 if jnp.dtype(self.dtype) == jnp.float16 else self.dtype
        self.vision_model = SmolVLMVisionTransformer(vision, encoder_dtype, self.position_ids, self.remat, self.scan_layers)
        self.connector = SmolVLMConnector(self.config, self.dtype)
        self.text_model = SmolVLMTextModel(self.config.text_config, self.dtype, self.remat, self.scan_layers)

    def embed(self, input_ids: jax.Array) -> jax.Array:
        """Token embeddings (b, t, d), image tokens not yet replaced."""
        return self.text_model.embed_tokens(input_ids)

    def encode(self, tiles: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """Flat tiles -> image tokens (i, tokens, d). Tiles uint8 (i, T, T, 3), or normalised floats (i, H, W, 3) with an
        optional pixel mask (i, H, W)."""
        if tiles.dtype == jnp.uint8:
            tiles = normalize_tiles(tiles, self.dtype)
        patches = None if mask is None else patch_mask(mask, self.config.vision_config.patch_size)
        return self.connector(self.vision_model(tiles, patches)["last_hidden_state"])

    def get_image_features(
        self,
        pixel_values: jax.Array,
        pixel_attention_mask: jax.Array | None = None,
        num_tiles: jax.Array | int | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """Image tokens of all pictures and how many pictures are real.

        pixel_values: float (b, images, 3, H, W), the reference's layout, in which all-zero pictures are padding and are
        moved behind the real ones; or uint8 (N, T, T, 3), flat tiles of which the first `num_tiles` (default: all) are real.
        Returns (features (N or b·images, tokens, d), count of real tiles).
        """
        if pixel_values.dtype == jnp.uint8:
            if pixel_values.ndim != 4 or pixel_values.shape[-1] != self.config.vision_config.num_channels:
                raise InputError(f"uint8 tiles have shape (tiles, T, T, 3), got {pixel_values.shape}")
            return self.encode(pixel_values), jnp.asarray(pixel_values.shape[0] if num_tiles is None else num_tiles)
        if pixel_values.ndim != 5:
            raise InputError(f"float pixel_values have shape (batch, images, 3, height, width), got {pixel_values.shape}")
        pixels = jnp.asarray(pixel_values, self.dtype).reshape(-1, *pixel_values.shape[2:])
        order, count = real_tiles_first(pixels)
        tiles = jnp.einsum("ichw->ihwc", pixels[order])
        mask = pixel_attention_mask
        if mask is not None:
            mask = jnp.asarray(mask).reshape(-1, *mask.shape[2:])[order]
        return self.encode(tiles, mask), count

    def __call__(
        self,
        input_ids: jax.Array | None = None,
        attention_mask: jax.Array | None = None,
        position_ids: jax.Array | None = None,
        past_key_values: KVCache | None = None,
        inputs_embeds: jax.Array | None = None,
        pixel_values: jax.Array | None = None,
        pixel_attention_mask: jax.Array | None = None,
        image_hidden_states: jax.Array | None = None,
        use_cache: bool | None = None,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        num_tiles: jax.Array | int | None = None,
        cache_length: int | None = None,
        segment_ids: jax.Array | None = None,
    ) -> SmolVLMBaseModelOutputWithPast:
        """See `SmolVLMForConditionalGeneration.__call__`."""
        if self.is_initializing():
            input_ids, pixel_values = self._example(input_ids, inputs_embeds, pixel_values, image_hidden_states)
        if (input_ids is None) == (inputs_embeds is None):
            raise InputError("pass exactly one of input_ids and inputs_embeds")
        if pixel_values is not None and image_hidden_states is not None:
            raise InputError("pass at most one of pixel_values and image_hidden_states")
        check_counts(self.config, input_ids, pixel_values, image_hidden_states, num_tiles)

        embeds = self.embed(input_ids) if inputs_embeds is None else inputs_embeds
        features, count = image_hidden_states, num_tiles
        if pixel_values is not None:
            features, count = self.get_image_features(pixel_values, pixel_attention_mask, num_tiles)
        if features is not None:
            if input_ids is None:
                slots = (embeds == self.embed(jnp.asarray(self.config.image_token_id))).all(-1)
            else:
                slots = input_ids == self.config.image_token_id
            embeds = merge_image_features(embeds, slots, features, count)

        length = None
        if past_key_values is None and (use_cache or cache_length is not None):
            t = embeds.shape[1]
            length = t + 256 if cache_length is None else cache_length
            if length < t:
                raise InputError(f"a cache of {length} columns does not hold a prompt of {t} tokens")
        if self.scan_layers and output_hidden_states:
            raise InputError("a model with scan_layers keeps no hidden states: ask model.clone(scan_layers=False)")
        out = self.text_model(embeds, attention_mask, position_ids, past_key_values, length, output_attentions, segment_ids)
        return SmolVLMBaseModelOutputWithPast(
            last_hidden_state=out["last_hidden_state"],
            past_key_values=out["cache"],
            hidden_states=out["hidden_states"] if output_hidden_states else None,
            attentions=out["attentions"],
            image_hidden_states=features,
        )

    def _example(self, input_ids, inputs_embeds, pixel_values, image_hidden_states):
        """Inputs that touch every parameter, so that `init` needs none and a text-only `init` still makes the encoder."""
        vision = self.config.vision_config
        if pixel_values is None:
            shape = (1, vision.image_size, vision.image_size, vision.num_channels)
            if input_ids is None and inputs_embeds is None and image_hidden_states is None:
                ids = jnp.full((1, self.config.image_seq_len), self.config.image_token_id, jnp.int32)
                return ids, jnp.zeros(shape, jnp.uint8)
            self.encode(jnp.zeros(shape, jnp.uint8))
        if input_ids is None:
            self.embed(jnp.zeros((1, 1), jnp.int32))
        return input_ids, pixel_values


class SmolVLMForConditionalGeneration(nn.Module):
    """The whole model: pictures and text in, logits out.

        model = SmolVLMForConditionalGeneration(config)
        params = init_params(model, seed=0)
        out = model.apply({"params": params}, input_ids=ids, pixel_values=pixels)

    `apply` is a pure function of its arguments; fields as in `SmolVLMModel`, and the checkpoint's defaults for `generate`.
    """

    config: SmolVLMConfig
    dtype: Any = jnp.float32
    position_ids: str = "intended"
    remat: bool | str = False
    scan_layers: bool = False
    generation_config: GenerationConfig | None = None

    def setup(self):
        text = self.config.text_config
        self.model = SmolVLMModel(self.config, self.dtype, self.position_ids, self.remat, self.scan_layers)
        if not self.config.tie_word_embeddings:
            shape, axes = (text.hidden_size, text.vocab_size), ("embed", "vocab")
            self.lm_head = Projection("btd,dv->btv", shape, axes, False, text.initializer_range, self.dtype)

    def get_image_features(self, pixel_values, pixel_attention_mask=None, num_tiles=None):
        """See `SmolVLMModel.get_image_features`."""
        return self.model.get_image_features(pixel_values, pixel_attention_mask, num_tiles)

    def head(self, hidden: jax.Array) -> jax.Array:
        """Hidden states (b, t, d) -> logits (b, t, v), with the tied embedding where there is no head of its own."""
        tied = self.config.tie_word_embeddings
        logits = self.model.text_model.embed_tokens.attend(hidden) if tied else self.lm_head(hidden)
        return constrain(logits, "batch", None, "act_vocab")

    def __call__(
        self,
        input_ids: jax.Array | None = None,
        attention_mask: jax.Array | None = None,
        position_ids: jax.Array | None = None,
        past_key_values: KVCache | None = None,
        inputs_embeds: jax.Array | None = None,
        pixel_values: jax.Array | None = None,
        pixel_attention_mask: jax.Array | None = None,
        image_hidden_states: jax.Array | None = None,
        labels: jax.Array | None = None,
        use_cache: bool | None = None,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        logits_to_keep: int | jax.Array = 0,
        num_tiles: jax.Array | int | None = None,
        cache_length: int | None = None,
        segment_ids: jax.Array | None = None,
    ) -> SmolVLMCausalLMOutputWithPast:
        """Forward pass; argument names are transformers'.

        input_ids: int (b, t). attention_mask: (b, t), 1 = real; with a cache, (b, t) or (b, past + t).
        position_ids: (b, t); default: column number, plus what the cache holds. For left-padded rows pass
        `cumsum(mask) - 1`, as `generate` does.
        past_key_values: a KVCache; the new columns are appended. use_cache: without one, return a new cache with
        `cache_length` columns (default: the prompt and 256 more).
        pixel_values: float (b, images, 3, T, T) as the reference's processor makes them, all-zero pictures being padding;
        or uint8 tiles (N, T, T, 3), flat over the batch, the first `num_tiles` of them real. The k-th block of image tokens,
        rows in order, receives the k-th real tile. pixel_attention_mask: (b, images, T, T).
        image_hidden_states: features (N, tokens, d) already encoded, instead of pixels.
        segment_ids: int (b, t), several prompts packed into one row, numbered from 1 on, 0 = padding: a token sees its own
        segment alone, and positions restart with each segment.
        labels: int (b, t), -100 = ignored. logits_to_keep: 0 all, n the last n, or a 1-D array of positions.

        Called with concrete arrays, counts of tiles and image tokens that disagree raise InputError. Under tracing the
        values are unknown, and the result is defined: surplus tiles are ignored, slots without a tile keep the embedding
        of the image token.
        """
        out = self.model(
            input_ids,
            attention_mask,
            position_ids,
            past_key_values,
            inputs_embeds,
            pixel_values,
            pixel_attention_mask,
            image_hidden_states,
            use_cache,
            output_attentions,
            output_hidden_states,
            num_tiles,
            cache_length,
            segment_ids,
        )
        hidden = out.last_hidden_state
        if not isinstance(logits_to_keep, int):
            hidden = jnp.take(hidden, logits_to_keep, axis=1)
        elif logits_to_keep:
            hidden = hidden[:, -logits_to_keep:]
        logits = self.head(hidden)
        return SmolVLMCausalLMOutputWithPast(
            logits=logits,
            loss=None if labels is None else causal_lm_loss(logits, labels),
            past_key_values=out.past_key_values,
            hidden_states=out.hidden_states,
            attentions=out.attentions,
            image_hidden_states=out.image_hidden_states,
        )
