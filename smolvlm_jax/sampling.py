"""Logits processors and the choice of a token: pure functions of scores (b, v) float32, in transformers' order and arithmetic.

A filtered score is -inf. Settings are numbers, or arrays (b, 1) with a value for each row.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .generation_config import Sampling

__all__ = ["RowSampling", "choose", "min_p", "processed", "repetition_penalty", "row_keys", "top_k", "top_p"]

# Entries summed at once before running sums are taken: the lanes of a TPU.
_BLOCK = 128


def repetition_penalty(scores: jax.Array, seen: jax.Array, penalty) -> jax.Array:
    """Divide positive scores of the tokens in `seen`, bool (b, v), by the penalty, and multiply negative ones."""
    return jnp.where(seen, jnp.where(scores < 0, scores * penalty, scores / penalty), scores)


def top_k(scores: jax.Array, k: int) -> jax.Array:
    """Keep everything that scores at least as much as the k-th best; ties stay."""
    kth = jax.lax.top_k(scores, min(k, scores.shape[-1]))[0][:, -1:]
    return jnp.where(scores < kth, -jnp.inf, scores)


def top_p(scores: jax.Array, p: float) -> jax.Array:
    """Keep the smallest set of best tokens whose probability reaches p.

    The token that crosses p stays, so that at least one always does. Of tokens with equal scores the later ones are kept
    first. What to drop is found as a score and a number of its equals: to put a sorted row back into its order would cost a
    TPU more than many decode steps.

    Args:
        scores: (b, v).
        p: a number.

    Returns:
        Scores, -inf where they are dropped.
    """
    return _without_tail(scores, 1 - p, jnp.sort(scores, axis=-1))


def _without_tail(scores: jax.Array, tail, ascending: jax.Array) -> jax.Array:
    """`top_p` with the probability that is dropped, a number or (b, 1), and the scores of each row sorted."""
    drop = jnp.minimum(_leading(jax.nn.softmax(ascending, axis=-1), tail), scores.shape[-1] - 1)
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


def row_keys(seed: jax.Array, stream: jax.Array) -> jax.Array:
    """One random key for each row, from its seed uint32 (b,) and the number of its random stream, uint32 (b,)."""
    return jax.vmap(lambda own, number: jax.random.fold_in(jax.random.key(own), number))(seed, stream)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RowSampling:
    """`Sampling` with a value for each row, (b,): `do_sample` bool, `top_k` int32, the others float32.

    `tail` is 1 - top_p, taken before it is rounded to float32, as it is of a number.
    """

    do_sample: jax.Array
    temperature: jax.Array
    top_k: jax.Array
    tail: jax.Array
    min_p: jax.Array
    repetition_penalty: jax.Array

    @classmethod
    def of(cls, rows: Sequence[Sampling]) -> "RowSampling":
        """The settings of b rows as numpy arrays."""
        column: Any = lambda value_of, dtype: np.asarray([value_of(row) for row in rows], dtype)
        return cls(
            do_sample=column(lambda row: row.do_sample, np.bool_),
            temperature=column(lambda row: row.temperature, np.float32),
            top_k=column(lambda row: row.top_k, np.int32),
            tail=column(lambda row: 1 - row.top_p, np.float32),
            min_p=column(lambda row: row.min_p, np.float32),
            repetition_penalty=column(lambda row: row.repetition_penalty, np.float32),
        )


def choose(
    logits: jax.Array,
    settings: Sampling | RowSampling,
    *,
    seen: Any,
    keys: Callable[[], jax.Array],
    drawn: jax.Array,
) -> jax.Array:
    """The next token of each row.

    Of numbers (`Sampling`) only what they ask for is compiled. Arrays (`RowSampling`) give each row settings of its own,
    and what no row asks for is skipped at run time: sorting the vocabulary costs more than a decode step of a small model.
    A row draws the same token either way.

    Args:
        logits: (b, v) of any dtype.
        settings: of all rows, or of each.
        seen: bool (b, v), the tokens that the repetition penalty counts; None where there is no penalty.
        keys: gives the rows' random keys (b,), as `row_keys` makes them. Called where tokens are drawn at random.
        drawn: int32 (b,), how many tokens each row has drawn before.

    Returns:
        Tokens, int32 (b,).
    """
    scores = logits.astype(jnp.float32)

    def penalized(scores):
        return repetition_penalty(scores, seen, _column(settings.repetition_penalty))

    scores = _if_any(settings.repetition_penalty != 1, penalized, lambda scores: scores, scores)
    best = scores.argmax(-1).astype(jnp.int32)

    def draw(scores):
        scores = _filtered(scores / _column(settings.temperature), settings)
        steps = jax.vmap(jax.random.fold_in)(keys(), drawn)
        tokens = jax.vmap(jax.random.categorical)(steps, scores).astype(jnp.int32)
        return jnp.where(settings.do_sample, tokens, best)

    return _if_any(settings.do_sample, draw, lambda scores: best, scores)


def processed(scores: jax.Array, settings: Sampling, *, seen: Any) -> jax.Array:
    """The scores that `choose` takes the best of, or draws from: (b, v) float32, -inf where tokens are dropped."""
    scores = scores.astype(jnp.float32)
    if settings.repetition_penalty != 1:
        scores = repetition_penalty(scores, seen, settings.repetition_penalty)
    return _filtered(scores / settings.temperature, settings) if settings.do_sample else scores


def _column(value):
    """A number as it is, an array (b,) as (b, 1)."""
    return value[:, None] if getattr(value, "ndim", 0) else value


def _if_any(wanted: bool | jax.Array, function: Callable, otherwise: Callable, scores: jax.Array) -> jax.Array:
    """function(scores) if any row wants it: decided by the compiler for a bool, at run time for an array."""
    if isinstance(wanted, bool):
        return function(scores) if wanted else otherwise(scores)
    return jax.lax.cond(wanted.any(), function, otherwise, scores)


def _filtered(scores: jax.Array, settings: Sampling | RowSampling) -> jax.Array:
    if isinstance(settings, Sampling):
        scores = top_k(scores, settings.top_k) if settings.top_k else scores
        scores = top_p(scores, settings.top_p) if settings.top_p < 1 else scores
        return min_p(scores, settings.min_p) if settings.min_p > 0 else scores
    k, tail, least = (_column(values) for values in (settings.top_k, settings.tail, settings.min_p))
    ascending = jnp.sort(scores, axis=-1)  # for top-k, which has no `jax.lax.top_k` with a k for each row, and for top-p
    kth = jnp.take_along_axis(ascending, scores.shape[-1] - jnp.clip(k, 1, scores.shape[-1]), axis=-1)
    scores, ascending = (jnp.where((k > 0) & (x < kth), -jnp.inf, x) for x in (scores, ascending))
    scores = jnp.where(tail > 0, _without_tail(scores, tail, ascending), scores)
    return jnp.where(least > 0, min_p(scores, least), scores)
