"""Where image features meet text: which tiles are real, which slot gets which, and the checks that their counts agree."""

import jax
import jax.numpy as jnp
import numpy as np

from .config import SmolVLMConfig
from .errors import InputError

__all__ = ["check_counts", "merge_image_features", "real_tiles_first"]


def real_tiles_first(pixels: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Order that moves all-zero tiles (i, …) behind the others, and the number of the others.

    An all-zero picture is padding: a real one cannot be all zero after normalisation. If every one is, the first counts.
    """
    real = jnp.any(jnp.asarray(pixels) != 0, axis=tuple(range(1, pixels.ndim)))
    real = real.at[0].set(real[0] | ~real.any())
    return jnp.argsort(~real, stable=True), real.sum()


def merge_image_features(embeds: jax.Array, slots: jax.Array, features: jax.Array, count=None) -> jax.Array:
    """Put image tokens into their slots.

    embeds (b, t, d); slots bool (b, t); features (i, tokens, d); count: how many of the i are real (default all). The m-th
    slot of the whole batch, rows in order, receives the m-th feature row; slots beyond the last real one keep their embedding.
    """
    i, tokens, d = features.shape
    flat = features.reshape(i * tokens, d).astype(embeds.dtype)
    order = jnp.cumsum(slots.reshape(-1)).reshape(slots.shape) - 1
    limit = i * tokens if count is None else count * tokens
    taken = jnp.take(flat, jnp.where(slots, order, 0), axis=0, mode="clip")
    return jnp.where((slots & (order < limit))[..., None], taken, embeds)


def _concrete(*values) -> bool:
    return not any(isinstance(v, jax.core.Tracer) for v in values)


def count_real_tiles(pixel_values, num_tiles=None) -> int:
    """Real tiles in either layout, counted on the host."""
    if pixel_values.dtype == np.uint8:
        return int(pixel_values.shape[0] if num_tiles is None else num_tiles)
    flat = np.asarray(pixel_values).reshape(-1, int(np.prod(pixel_values.shape[2:])))
    return max(1, int((flat != 0).any(axis=1).sum())) if len(flat) else 0


def check_counts(config: SmolVLMConfig, input_ids, pixel_values, image_hidden_states=None, num_tiles=None) -> None:
    """Raise InputError unless every tile has its image tokens. Image tokens without any pictures are allowed, as in the
    reference, and keep their plain embedding. Says nothing about traced values, nor about prompts given as embeddings."""
    if input_ids is None or (pixel_values is None and image_hidden_states is None):
        return
    if not _concrete(input_ids, pixel_values, image_hidden_states, num_tiles):
        return
    slots = int((np.asarray(input_ids) == config.image_token_id).sum())
    if pixel_values is not None:
        tiles, per_tile = count_real_tiles(pixel_values, num_tiles), config.image_seq_len
        if pixel_values.dtype != np.uint8:
            side = config.vision_config.patch_size * config.scale_factor
            per_tile = (pixel_values.shape[-2] // side) * (pixel_values.shape[-1] // side)
    else:
        tiles = int(image_hidden_states.shape[0] if num_tiles is None else num_tiles)
        per_tile = image_hidden_states.shape[1]
    if slots != tiles * per_tile:
        raise InputError(
            f"{tiles} tiles make {tiles * per_tile} image features ({per_tile} each), but the prompt has {slots} image tokens "
            f"(id {config.image_token_id}): pass the pictures that the prompt was made with"
        )
