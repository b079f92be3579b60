"""`SmolVLMModel` and `SmolVLMForConditionalGeneration`: encoder, connector and decoder put together, as pure functions."""

import functools
import inspect
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from .cache import KVCache
from .config import SmolVLMConfig
from .connector import SmolVLMConnector
from .decoder import SmolVLMBaseModelOutputWithPast, SmolVLMTextModel
from .errors import InputError
from .generation_config import GenerationConfig
from .habits import ANY, Neutral, unasked
from .layers import Execution, Projection, dimensions
from .merge import merge_image_features
from .outputs import MultimodalOutput
from .pictures import check_counts, flat_tiles
from .sharding import constrain
from .unbound import says_what_to_type
from .vision import SmolVLMVisionTransformer, normalize_tiles, patch_mask

__all__ = [
    "ImageFeatures",
    "SmolVLMBaseModelOutputWithPast",
    "SmolVLMCausalLMOutputWithPast",
    "SmolVLMForConditionalGeneration",
    "SmolVLMModel",
    "causal_lm_loss",
]


# Arguments of transformers' forward that have no counterpart here.
NEUTRAL: dict[str, Neutral] = {
    "mm_encoder_outputs": Neutral((), "features that are encoded already are image_hidden_states"),
    "mm_token_type_ids": Neutral(ANY),  # the ids say which tokens are image tokens
    **dict.fromkeys(("token_type_ids", "cache_position", "num_items_in_batch"), Neutral()),
}


@functools.cache
def _keywords() -> frozenset[str]:
    of_the_decoder = inspect.signature(SmolVLMTextModel.__call__).parameters
    own = inspect.signature(SmolVLMModel.__call__).parameters  # never among **text, but what a misspelt name may mean
    return frozenset({*of_the_decoder, *own}) - {"self", "text"}


class ImageFeatures(NamedTuple):
    """Image tokens of all pictures of a batch.

    Attributes:
        image_hidden_states: (N, tokens, d), padding last.
        num_tiles: int (), how many of the N are real.
    """

    image_hidden_states: jax.Array
    num_tiles: jax.Array

    @property
    def pooler_output(self) -> jax.Array:
        """`image_hidden_states` under transformers' name, there a list with an array for each sample."""
        return self.image_hidden_states

    def __getitem__(self, key: Any) -> Any:
        return getattr(self, key) if isinstance(key, str) else tuple.__getitem__(self, key)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class SmolVLMCausalLMOutputWithPast(MultimodalOutput):
    """What `SmolVLMForConditionalGeneration` returns. Fields that were not asked for are None.

    Attributes:
        loss: float32 ().
        logits: (b, t or logits_to_keep, v).
        past_key_values: this and the fields below as in `SmolVLMBaseModelOutputWithPast`.
    """

    loss: jax.Array | None = None
    logits: jax.Array
    past_key_values: KVCache | None = None
    hidden_states: tuple[jax.Array, ...] | None = None
    attentions: tuple[jax.Array, ...] | None = None
    image_hidden_states: jax.Array | None = None


def causal_lm_loss(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Mean cross-entropy of each next label, as the reference computes it.

    Args:
        logits: (b, t, v); the loss is computed in float32.
        labels: int (b, t), each compared with the logits one position to the left; -100 = ignored. Image and padding tokens
            count unless the caller sets them to -100.

    Returns:
        float32 (), NaN if every label is ignored.
    """
    logits = logits[:, :-1].astype(jnp.float32)
    target = labels[:, 1:]
    keep = target != -100
    picked = jnp.take_along_axis(logits, jnp.where(keep, target, 0)[..., None], axis=-1)[..., 0]
    losses = jax.nn.logsumexp(logits, axis=-1) - picked
    return jnp.where(keep, losses, 0).sum() / keep.sum()


class _Configured(nn.Module):
    """Fields of both models.

    Attributes:
        config: the model's configuration.
        dtype: of activations and matrix products; parameters keep their own and are cast where they are used. With float16
            the encoder still computes in float32.
        vision_position_ids: rule for the encoder's position ids, "intended" or "transformers-4.56" (see
            `vision.position_buckets`).
        remat: recompute each layer in the backward pass: True or "full" all of it, "dots" all but the matrix products with
            weights.
        scan_layers: run the layers in a loop over their stacked weights, where only the last hidden states are asked for: on
            accelerators training then compiles faster and needs less memory.
        attention: "auto", or the form of attention to use wherever it fits. "einsum" does without the kernels for TPUs.
        position_ids: former name of `vision_position_ids`, accepted with a warning.
    """

    config: SmolVLMConfig
    dtype: Any = jnp.float32
    vision_position_ids: str = "intended"
    remat: bool | str = False
    scan_layers: bool = False
    attention: str = "auto"
    position_ids: str | None = None

    def __post_init__(self) -> None:
        if self.position_ids is not None:
            warnings.warn("the model's field position_ids is now called vision_position_ids", UserWarning, stacklevel=4)
            object.__setattr__(self, "vision_position_ids", self.position_ids)
            object.__setattr__(self, "position_ids", None)
        super().__post_init__()

    @property
    def execution(self) -> Execution:
        """How the model is computed, as its parts take it."""
        return Execution(self.dtype, self.remat, self.scan_layers, self.attention)


_DIMENSIONS = {"input_ids": "(batch, length)", "labels": "(batch, length)", "inputs_embeds": "(batch, length, width)"}


def check_unpacked(name: str, value: Any) -> None:
    """Raise InputError for inputs in place of token ids: all that a processor returned, or a text."""
    if isinstance(value, Mapping):
        raise InputError(f"{name} is a {type(value).__name__}: pass what the processor returned by name, **inputs")
    if isinstance(value, str) or (isinstance(value, (list, tuple)) and value and isinstance(value[0], (str, dict))):
        raise InputError(
            f"{name} is text, of which a processor makes arrays: inputs = processor.encode_chat(messages), or "
            "processor(text=…, images=…, return_tensors='np'); then pass **inputs"
        )


def _check_arrays(given: Mapping[str, Any]) -> None:
    """Raise InputError for an argument that is no array, or has other dimensions."""
    for name, value in given.items():
        if value is None:
            continue
        check_unpacked(name, value)
        if not isinstance(value, (np.ndarray, jax.Array)):
            raise InputError(
                f"{name} is a {type(value).__module__}.{type(value).__name__}; pass an array of numpy or jax, as "
                "return_tensors='np' or 'jax' gives them"
            )
        wanted = _DIMENSIONS.get(name)
        if wanted is not None and value.ndim != wanted.count(",") + 1:
            raise InputError(f"{name} has shape {value.shape}; it needs {wanted}")
        if name in ("input_ids", "labels") and not jnp.issubdtype(value.dtype, jnp.integer):
            raise InputError(f"{name} is {value.dtype}; it needs integers")


@says_what_to_type
class SmolVLMModel(_Configured):
    """Encoder, connector and decoder, without the output head. Fields as in `SmolVLMForConditionalGeneration`."""

    def setup(self) -> None:
        vision, execution = self.config.vision_config, self.execution
        # Activations of the encoder exceed float16's range on ordinary pictures.
        encoding = replace(execution, dtype=jnp.float32) if jnp.dtype(self.dtype) == jnp.float16 else execution
        self.vision_model = SmolVLMVisionTransformer(vision, encoding, self.vision_position_ids)
        self.connector = SmolVLMConnector(self.config, execution)
        self.text_model = SmolVLMTextModel(self.config.text_config, execution)

    def embed(self, input_ids: jax.Array) -> jax.Array:
        """Look up tokens; image tokens are not yet replaced.

        Args:
            input_ids: int (b, t).

        Returns:
            Embeddings (b, t, d).
        """
        return self.text_model.embed_tokens(input_ids)

    def encode(self, tiles: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """Encoder and connector.

        Args:
            tiles: uint8 or normalised floats (i, H, W, 3).
            mask: bool (i, H, W), which pixels are real. Default: all.

        Returns:
            Image tokens (i, tokens, d).
        """
        if tiles.dtype == jnp.uint8:
            tiles = normalize_tiles(tiles, self.dtype)
        patches = None if mask is None else patch_mask(mask, self.config.vision_config.patch_size)
        return self.connector(self.vision_model(tiles, patch_attention_mask=patches).last_hidden_state)

    def get_image_features(
        self,
        pixel_values: jax.Array,
        pixel_attention_mask: jax.Array | None = None,
        num_tiles: jax.Array | int | None = None,
    ) -> ImageFeatures:
        """Encode pictures.

        Args:
            pixel_values: as in `SmolVLMForConditionalGeneration.__call__`, like the others.
            pixel_attention_mask: which pixels are real.
            num_tiles: how many of the tiles are real.

        Returns:
            Image tokens (N, tokens, d), and how many of the N are real.

        Raises:
            InputError: the pixels have another shape.
        """
        if pixel_values.dtype != jnp.uint8:
            pixel_values = jnp.asarray(pixel_values, self.dtype)
        tiles = flat_tiles(self.config, pixel_values, pixel_attention_mask, num_tiles)
        return ImageFeatures(self.encode(tiles.pixels, tiles.mask), jnp.asarray(tiles.count))

    def __call__(
        self,
        input_ids: jax.Array | None = None,
        *,
        inputs_embeds: jax.Array | None = None,
        pixel_values: jax.Array | None = None,
        pixel_attention_mask: jax.Array | None = None,
        image_hidden_states: jax.Array | None = None,
        num_tiles: jax.Array | int | None = None,
        return_dict: bool | None = None,
        **text: Any,
    ) -> Any:
        """Run the model up to its last hidden states.

        Args:
            input_ids: as in `SmolVLMForConditionalGeneration.__call__`, like the others.
            inputs_embeds: instead of `input_ids`.
            pixel_values: tiles.
            pixel_attention_mask: which of their pixels are real.
            image_hidden_states: features that are encoded already.
            num_tiles: how many tiles are real.
            return_dict: False for a tuple.
            **text: arguments of `SmolVLMTextModel.__call__`.

        Returns:
            A SmolVLMBaseModelOutputWithPast, or the tuple of what was asked for.

        Raises:
            InputError: if arguments contradict each other, or nothing reads one of them.
        """
        text = unasked(type(self).__name__, text, NEUTRAL, _keywords() | {"cache"})
        if (cache := text.pop("cache", None)) is not None:
            if text.get("past_key_values") is not None:
                raise InputError("cache is another name for past_key_values: pass one of them")
            text["past_key_values"] = cache
        if self.is_initializing():  # `init` needs no inputs, and makes every parameter whatever they are
            # One image token of pixels: the class defaults have tiles whose side scale_factor does not divide.
            side = self.config.vision_config.patch_size * self.config.scale_factor
            self.encode(jnp.zeros((1, side, side, self.config.vision_config.num_channels), jnp.uint8))
            example = jnp.zeros((1, 1), jnp.int32)
            self.embed(example)
            input_ids = example if input_ids is None and inputs_embeds is None else input_ids
        if (input_ids is None) == (inputs_embeds is None):
            raise InputError("pass exactly one of input_ids and inputs_embeds")
        given = {"input_ids": input_ids, "inputs_embeds": inputs_embeds, "pixel_values": pixel_values}
        _check_arrays({**given, "pixel_attention_mask": pixel_attention_mask, "attention_mask": text.get("attention_mask")})
        if pixel_values is not None and image_hidden_states is not None:
            raise InputError("pass at most one of pixel_values and image_hidden_states")
        embeds: Any = inputs_embeds if input_ids is None else self.embed(input_ids)
        features, count = image_hidden_states, num_tiles
        if pixel_values is not None:
            found = self.get_image_features(pixel_values, pixel_attention_mask, num_tiles)
            features, count = found.image_hidden_states, found.num_tiles
        if features is not None:
            check_counts(self.config, input_ids, features, count)
            if input_ids is None:
                slots = (embeds == self.embed(jnp.asarray(self.config.image_token_id))).all(-1)
            else:
                slots = input_ids == self.config.image_token_id
            embeds = merge_image_features(embeds, slots, features, count)
        out = replace(self.text_model(embeds, **text), image_hidden_states=features)
        return out.to_tuple() if return_dict is False else out


@says_what_to_type
class SmolVLMForConditionalGeneration(_Configured):
    """The whole model: pictures and text in, logits out. `apply` is a pure function of its arguments.

        model = SmolVLMForConditionalGeneration(config)
        params = init_params(model, seed=0)
        out = model.apply({"params": params}, input_ids=ids, pixel_values=pixels)

    Attributes:
        generation_config: the checkpoint's defaults for `generate`. The other fields are described in `_Configured`.
    """

    generation_config: GenerationConfig | None = None

    def setup(self) -> None:
        self.model = SmolVLMModel(
            self.config, self.dtype, self.vision_position_ids, self.remat, self.scan_layers, self.attention
        )
        if not self.config.tie_word_embeddings:
            text = self.config.text_config
            self.lm_head = Projection(
                "btd,dv->btv", dimensions(text), initializer_range=text.initializer_range, dtype=self.dtype
            )

    def get_image_features(self, *pictures: Any, **named: Any) -> ImageFeatures:
        """As `SmolVLMModel.get_image_features`.

        Args:
            *pictures: its arguments.
            **named: likewise.

        Returns:
            Image tokens (N, tokens, d), and how many of the N are real.
        """
        return self.model.get_image_features(*pictures, **named)

    def head(self, hidden: jax.Array) -> jax.Array:
        """The output head, or the embedding where it is tied to that.

        Args:
            hidden: hidden states (b, t, d).

        Returns:
            Logits (b, t, v).
        """
        tied = self.config.tie_word_embeddings
        logits = self.model.text_model.embed_tokens.attend(hidden) if tied else self.lm_head(hidden)
        return constrain(logits, "batch", None, "act_vocab")

    def __call__(
        self,
        input_ids: jax.Array | None = None,
        *,
        labels: jax.Array | None = None,
        logits_to_keep: int | jax.Array = 0,
        return_dict: bool | None = None,
        **inputs: Any,
    ) -> Any:
        """Forward pass; argument names are transformers'. All but the first are keywords; those that only a part of the model
        reads are declared there, in `SmolVLMModel` and `SmolVLMTextModel`.

        Called with concrete arrays, counts of tiles and image tokens that disagree are an error. Under tracing the values are
        unknown, and the result is defined: surplus tiles are ignored, slots without a tile keep the embedding of the image
        token. Image tokens without any pictures keep it too, as in the reference.

        Args:
            input_ids: int (b, t).
            attention_mask: (b, t), 1 = real; with a cache, (b, t) or (b, past + t).
            position_ids: int (b, t). Default: the column number, plus the columns in the cache. For left-padded rows pass
                `cumsum(mask) - 1`, as `generate` does.
            segment_ids: int (b, t), several prompts packed into one row, numbered from 1 on, 0 = padding: a token sees its own
                segment only, and positions restart with each segment.
            inputs_embeds: (b, t, d), instead of `input_ids`.
            pixel_values: tiles, flat over the batch, the first `num_tiles` of them real: uint8 (N, T, T, 3), or normalised
                floats (N, H, W, 3). Or floats (b, images, 3, H, W) as the reference's processor makes them, all-zero pictures
                being padding. The k-th block of image tokens, rows in order, receives the k-th real tile.
            pixel_attention_mask: which pixels of float tiles are real: (N, H, W), or (b, images, H, W).
            image_hidden_states: (N, tokens, d), features already encoded, instead of `pixel_values`.
            num_tiles: int (), how many flat tiles or features are real. Default: all.
            past_key_values: a cache, to which the new columns are appended; also called `cache`.
            use_cache: without a cache, return a new one.
            cache_length: columns of the new cache; implies `use_cache`. Default: the prompt's and 256 more.
            labels: int (b, t), for the loss; -100 = ignored. The loss is NaN if all are, as the reference's is.
            logits_to_keep: logits of which positions: 0 all, n the last n, or a 1-D array of positions.
            output_attentions: also return attention weights.
            output_hidden_states: also return hidden states.
            return_dict: False for a tuple of what was asked for.

        Returns:
            A SmolVLMCausalLMOutputWithPast, or the tuple.

        Raises:
            InputError: if arguments contradict each other, or nothing reads one of them.
        """
        _check_arrays({"labels": labels})
        out = self.model(input_ids, **inputs)
        hidden = out.last_hidden_state
        if labels is not None and labels.shape != hidden.shape[:2]:
            raise InputError(f"labels have shape {labels.shape}, the tokens {hidden.shape[:2]}")
        if not isinstance(logits_to_keep, int):
            hidden = jnp.take(hidden, logits_to_keep, axis=1)
        elif logits_to_keep:
            hidden = hidden[:, -logits_to_keep:]
        logits = self.head(hidden)
        found = SmolVLMCausalLMOutputWithPast(
            loss=None if labels is None else causal_lm_loss(logits, labels),
            logits=logits,
            past_key_values=out.past_key_values,
            hidden_states=out.hidden_states,
            attentions=out.attentions,
            image_hidden_states=out.image_hidden_states,
        )
        return found.to_tuple() if return_dict is False else found
