"""Merging image features into text embeddings."""

import jax
import jax.numpy as jnp

__all__ = ["merge_image_features"]


def merge_image_features(
    embeds: jax.Array, slots: jax.Array, features: jax.Array, count: jax.Array | int | None = None
) -> jax.Array:
    """Put image tokens into their slots: the m-th slot of the batch, rows in order, receives the m-th feature row.

    Args:
        embeds: (b, t, d).
        slots: bool (b, t), where the image tokens go. Slots beyond the last real feature row keep their embedding.
        features: (i, tokens, d).
        count: how many of the i are real. Default: all.

    Returns:
        (b, t, d).
    """
    i, tokens, d = features.shape
    flat = features.reshape(i * tokens, d).astype(embeds.dtype)
    order = jnp.cumsum(slots.reshape(-1)).reshape(slots.shape) - 1
    limit = i * tokens if count is None else count * tokens
    taken = jnp.take(flat, jnp.where(slots, order, 0), axis=0, mode="clip")
    return jnp.where((slots & (order < limit))[..., None], taken, embeds)
