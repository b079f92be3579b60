"""Logits processors: pure functions of scores (b, v) float32, in the order and with the arithmetic of transformers.

A filtered score is -inf. Arguments are numbers, or arrays (b, 1) with a value for each row.
"""

import jax
import jax.numpy as jnp

from .generation_config import GenerationConfig

__all__ = ["choose", "min_p", "repetition_penalty", "row_keys", "top_k", "top_p"]


def repetition_penalty(scores: jax.Array, seen: jax.Array, penalty) -> jax.Array:
    """Divide positive scores of tokens seen before (bool (b, v)), multiply negative ones."""
    return jnp.where(seen, jnp.where(scores < 0, scores * penalty, scores / penalty), scores)


def top_k(scores: jax.Array, k: int) -> jax.Array:
    """Keep everything that scores at least as much as the k-th best; ties stay."""
    kth = jax.lax.top_k(scores, min(k, scores.shape[-1]))[0][:, -1:]
    return jnp.where(scores < kth, -jnp.inf, scores)


def top_p(scores: jax.Array, p) -> jax.Array:
    """Keep the smallest set of best tokens whose probability reaches p; the token that crosses p stays, one always does."""
    order = jnp.argsort(scores, axis=-1, stable=True)
    ascending = jnp.take_along_axis(scores, order, axis=-1)
    removed = jnp.cumsum(jax.nn.softmax(ascending, axis=-1), axis=-1) <= 1 - p
    removed = removed.at[:, -1].set(False)
    rows = jnp.arange(scores.shape[0])[:, None]
    return jnp.where(jnp.zeros_like(removed).at[rows, order].set(removed), -jnp.inf, scores)


def min_p(scores: jax.Array, p) -> jax.Array:
    """Drop tokens less probable than p times the most probable one, after whatever was filtered before."""
    probabilities = jax.nn.softmax(scores, axis=-1)
    return jnp.where(probabilities < p * probabilities.max(-1, keepdims=True), -jnp.inf, scores)


def row_keys(seed, rows: int) -> jax.Array:
    """One random key per row. An int gives row r the key fold_in(seed, r); a sequence gives each row a seed of its own, so
    that a request draws the same tokens whatever stands beside it."""
    if isinstance(seed, int):
        return jax.vmap(lambda row: jax.random.fold_in(jax.random.key(seed), row))(jnp.arange(rows))
    return jax.vmap(lambda own: jax.random.fold_in(jax.random.key(own), 0))(jnp.asarray(seed, jnp.uint32))


def choose(logits: jax.Array, seen: jax.Array | None, keys: jax.Array, step: jax.Array, config: GenerationConfig) -> jax.Array:
    """The next token of each row, int32 (b,).

    logits (b, v) of any dtype; seen bool (b, v) where `config.repetition_penalty` is not 1, else None; keys (b,) from
    `row_keys`; step (): how many tokens were drawn before.
    """
    scores = logits.astype(jnp.float32)
    if config.repetition_penalty != 1.0:
        scores = repetition_penalty(scores, seen, config.repetition_penalty)
    if not config.do_sample:
        return scores.argmax(-1).astype(jnp.int32)
    scores = scores / config.temperature
    if config.top_k:
        scores = top_k(scores, config.top_k)
    if config.top_p < 1:
        scores = top_p(scores, config.top_p)
    if config.min_p > 0:
        scores = min_p(scores, config.min_p)
    drawn = jax.vmap(lambda key, row: jax.random.categorical(jax.random.fold_in(key, step), row))(keys, scores)
    return drawn.astype(jnp.int32)
