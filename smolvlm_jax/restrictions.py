"""Tokens that a row may not draw: stop tokens before it is long enough, and the last words of sequences that are forbidden."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

__all__ = ["follow", "longest_prefix", "packed_recent", "recent_tokens", "restrict"]

Words = tuple[tuple[int, ...], ...]
"""Sequences of tokens that are not to be written."""


def longest_prefix(bad_words: Words) -> int:
    """How many tokens before the next one decide whether it completes one of the words."""
    return max((len(word) - 1 for word in bad_words), default=0)


def recent_tokens(input_ids: np.ndarray, bad_words: Words) -> np.ndarray | None:
    """The last tokens of prompts (b, t), which stand at the right, as `restrict` takes them; None where no word needs them.

    Returns:
        int32 (b, w), -1 where a prompt is shorter.
    """
    width = longest_prefix(bad_words)
    if not width:
        return None
    padded = np.pad(np.asarray(input_ids, np.int32), ((0, 0), (width, 0)), constant_values=-1)
    return padded[:, -width:]


def packed_recent(input_ids: jax.Array, start: jax.Array, length: jax.Array, bad_words: Words) -> jax.Array | None:
    """`recent_tokens` of prompts that stand side by side in rows.

    Args:
        input_ids: int (d, t).
        start: int (d, s), the first column of each prompt.
        length: int (d, s), its number of tokens.
        bad_words: sequences.

    Returns:
        int32 (d, s, w); None where no word needs them.
    """
    width = longest_prefix(bad_words)
    if not width:
        return None
    columns = (start + length)[..., None] + jnp.arange(-width, 0)
    tokens = jax.vmap(lambda row, at: row[at])(input_ids, jnp.maximum(columns, 0))
    return jnp.where(columns < start[..., None], -1, tokens)


def follow(recent: jax.Array | None, token: jax.Array, live: jax.Array) -> jax.Array | None:
    """`recent` (b, w) with the tokens (b,) that the rows `live`, bool (b,), have drawn."""
    if recent is None:
        return None
    return jnp.where(live[:, None], jnp.concatenate([recent[:, 1:], token[:, None]], axis=1), recent)


def restrict(
    logits: jax.Array,
    *,
    early: jax.Array | None,
    stop_tokens: Sequence[int],
    bad_words: Words,
    recent: jax.Array | None,
) -> jax.Array:
    """Scores with what may not be drawn at -inf, as transformers' processors of these names make them.

    Args:
        logits: (b, v).
        early: bool (b,), which rows are still too short to end; None if there is no such limit.
        stop_tokens: forbidden in these.
        bad_words: sequences; the last token of one is forbidden where the tokens before it have been written.
        recent: (b, w), the last tokens of each row; None if no word has more than one token.

    Returns:
        (b, v) float32, or `logits` as they are if nothing is asked for.
    """
    if early is None and not bad_words:
        return logits
    scores = logits.astype(jnp.float32)
    v = scores.shape[-1]
    single = np.isin(np.arange(v), [word[0] for word in bad_words if len(word) == 1])
    banned = jnp.broadcast_to(jnp.asarray(single), scores.shape)
    if early is not None:
        banned = banned | (early[:, None] & jnp.asarray(np.isin(np.arange(v), stop_tokens)))
    for word in bad_words:
        if len(word) > 1 and recent is not None:
            written = (recent[:, 1 - len(word) :] == jnp.asarray(word[:-1])).all(-1)
            banned = banned.at[:, word[-1]].max(written)
    return jnp.where(banned, -jnp.inf, scores)
