"""Logits processors: pure functions of scores (b, v) float32, in the order and with the arithmetic of transformers.

A filtered score is -inf. Arguments are numbers, or arrays (b, 1) with a value for each row.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from .generation_config import GenerationConfig

__all__ = ["RowSampling", "choose", "choose_rows", "min_p", "repetition_penalty", "row_keys", "top_k", "top_p"]

# Entries summed at once before running sums are taken: the lanes of a TPU.
_BLOCK = 128


def repetition_penalty(scores: jax.Array, seen: jax.Array, penalty) -> jax.Array:
    """Divide positive scores of tokens seen before (bool (b, v)), multiply negative ones."""
    return jnp.where(seen, jnp.where(scores < 0, scores * penalty, scores / penalty), scores)


def top_k(scores: jax.Array, k: int) -> jax.Array:
    """Keep everything that scores at least as much as the k-th best; ties stay."""
    kth = jax.lax.top_k(scores, min(k, scores.shape[-1]))[0][:, -1:]
    return jnp.where(scores < kth, -jnp.inf, scores)


def top_p(scores: jax.Array, p, ascending: jax.Array | None = None) -> jax.Array:
    """Keep the smallest set of best tokens whose probability reaches p; the token that crosses p stays, one always does. Of
    tokens that score the same the later ones are kept first.

    ascending: the scores of each row, sorted, if they are at hand. What to drop is found as a score and a place among its
    equals: putting a sorted row back into its order would cost a TPU more than many decode steps.
    """
    if ascending is None:
        ascending = jnp.sort(scores, axis=-1)
    drop = jnp.minimum(_leading(jax.nn.softmax(ascending, axis=-1), 1 - p), scores.shape[-1] - 1)
    edge = jnp.take_along_axis(ascending, drop, axis=-1)
    equal = scores == edge
    first = _leading(equal.astype(jnp.int32), drop - (scores < edge).sum(-1, keepdims=True))
    dropped = (scores < edge) | (equal & (jnp.arange(scores.shape[-1]) < first))
    return jnp.where(dropped, -jnp.inf, scores)


def _leading(values: jax.Array, limit) -> jax.Array:
    """How many leading entries of each row sum to at most `limit`: non-negative (b, v), () or (b, 1) -> int32 (b, 1).

    Sums of blocks first, then the entries of the one block where the limit is passed: running sums over a whole vocabulary
    take several passes over memory.
    """
    b, v = values.shape
    blocks = jnp.pad(values, ((0, 0), (0, -v % _BLOCK))).reshape(b, -1, _BLOCK)
    ends = jnp.cumsum(blocks.sum(-1), axis=-1)
    whole = (ends <= limit).sum(-1, keepdims=True)
    before = jnp.where(whole > 0, jnp.take_along_axis(ends, jnp.maximum(whole - 1, 0), axis=-1), 0)
    last = jnp.minimum(whole, blocks.shape[1] - 1)
    inside = jnp.cumsum(jnp.take_along_axis(blocks, last[..., None], axis=1)[:, 0], axis=-1)
    return jnp.minimum(whole * _BLOCK + (before + inside <= limit).sum(-1, keepdims=True), v)


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


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RowSampling:
    """Sampling arguments that differ from row to row, each (b,): `do_sample` bool, `top_k` int32 (0: off), `seed` uint32, the
    others float32."""

    do_sample: jax.Array
    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    min_p: jax.Array
    repetition_penalty: jax.Array
    seed: jax.Array


def choose_rows(logits: jax.Array, seen: jax.Array, rows: RowSampling, step: jax.Array) -> jax.Array:
    """`choose` with arguments of its own for each row, and the number of tokens drawn before, step (b,), likewise.

    A row draws what `choose` draws for it alone with `seed=[its seed]`. What no row asks for is skipped at run time: sorting
    the vocabulary costs more than a decode step of a small model.
    """
    scores = logits.astype(jnp.float32)
    column = lambda values: values[:, None]

    def penalized(scores):
        return repetition_penalty(scores, seen, column(rows.repetition_penalty))

    scores = jax.lax.cond((rows.repetition_penalty != 1).any(), penalized, lambda scores: scores, scores)
    best = scores.argmax(-1).astype(jnp.int32)

    def draw(scores):
        scores = scores / column(rows.temperature)
        ascending = jnp.sort(scores, axis=-1)
        kth = jnp.take_along_axis(ascending, column(scores.shape[-1] - jnp.clip(rows.top_k, 1, scores.shape[-1])), axis=-1)
        scores, ascending = (jnp.where((column(rows.top_k) > 0) & (x < kth), -jnp.inf, x) for x in (scores, ascending))
        scores = jnp.where(column(rows.top_p) < 1, top_p(scores, column(rows.top_p), ascending), scores)
        scores = jnp.where(column(rows.min_p) > 0, min_p(scores, column(rows.min_p)), scores)
        keys = jax.vmap(jax.random.fold_in)(row_keys(rows.seed, scores.shape[0]), step)
        drawn = jax.vmap(jax.random.categorical)(keys, scores)
        return jnp.where(rows.do_sample, drawn.astype(jnp.int32), best)

    return jax.lax.cond(rows.do_sample.any(), draw, lambda scores: best, scores)
