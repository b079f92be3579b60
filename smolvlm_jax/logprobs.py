"""Log-probabilities of tokens by the model's own distribution.

It is the log-softmax of the model's logits in float32, before anything that a request asks for: forbidden words, the
repetition penalty, temperature and filters decide which token is drawn, not what its log-probability is. In transformers it
is `compute_transition_scores(sequences, out.logits, normalize_logits=True)`, with the `logits` of `output_logits`. The
`scores` of `output_scores` are something else: what a token is drawn from, after all settings, -inf where one was dropped.
The two agree for greedy decoding without penalties and restrictions.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

__all__ = ["TokenLogprobs", "token_logprobs"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TokenLogprobs:
    """Log-probabilities of tokens (…), and the most probable tokens in their places.

    Attributes:
        chosen: float32 (…), of the tokens themselves.
        top: float32 (…, k), of the k most probable tokens, best first; None if no alternatives were asked for.
        top_tokens: int32 (…, k), which tokens these are, of equals the smaller id first; None likewise.
    """

    chosen: Any
    top: Any = None
    top_tokens: Any = None

    @classmethod
    def zeros(cls, shape: tuple[int, ...], alternatives: int) -> "TokenLogprobs":
        """Room for tokens of this shape."""
        if not alternatives:
            return cls(jnp.zeros(shape, jnp.float32))
        more = (*shape, alternatives)
        return cls(jnp.zeros(shape, jnp.float32), jnp.zeros(more, jnp.float32), jnp.zeros(more, jnp.int32))

    def put(self, step: "TokenLogprobs", column: Any) -> "TokenLogprobs":
        """Of tokens (b, n): with those of one step, (b,), in a column."""
        write = lambda whole, new: jax.lax.dynamic_update_slice_in_dim(whole, new[:, None], column, axis=1)
        return jax.tree.map(write, self, step)


def token_logprobs(logits: jax.Array, tokens: jax.Array, alternatives: int = 0) -> TokenLogprobs:
    """The log-probabilities of tokens, each among all that might stand in its place.

    Args:
        logits: (…, v) of any dtype, as the model gives them.
        tokens: int (…).
        alternatives: how many of the most probable tokens to name too; no more than v are.
    """
    scores = logits.astype(jnp.float32)
    best = scores.max(-1, keepdims=True)
    # The largest is subtracted before, and not added to the logarithm, where it would cost digits.
    norm = jnp.log(jnp.exp(scores - best).sum(-1, keepdims=True))
    # A comparison instead of a gather: the vocabulary may be split over devices.
    here = jax.lax.broadcasted_iota(jnp.int32, scores.shape, scores.ndim - 1) == tokens[..., None]
    chosen = jnp.where(here, scores - best, 0).sum(-1) - norm[..., 0]
    if not alternatives:
        return TokenLogprobs(chosen)
    top, top_tokens = jax.lax.top_k(scores, min(alternatives, scores.shape[-1]))
    return TokenLogprobs(chosen, top - best - norm, top_tokens.astype(jnp.int32))
