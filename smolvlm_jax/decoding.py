"""The decode core, which `generate`, `stream` and the engine's programs share: state, next token, stops, decode loop.

A program is compiled for its `Rules`. What they and the state leave out is not part of the program: with greedy rules nothing
of sampling is compiled, without a repetition penalty there is no `seen`, and without `logprobs` nothing of log-probabilities.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .cache import KVCache
from .generation_config import GenerationConfig, Sampling, SamplingParams
from .logprobs import TokenLogprobs, token_logprobs
from .model import SmolVLMForConditionalGeneration
from .restrictions import follow, restrict
from .sampling import RowSampling, choose, row_keys

__all__ = [
    "DecodeState",
    "Decoded",
    "RowSettings",
    "Rows",
    "Rules",
    "allowed",
    "decode",
    "decode_step",
    "measured",
    "next_logits",
    "next_token",
    "tokens_seen",
]


@dataclass(frozen=True)
class Rules:
    """What a program is compiled for; hashable, so that it can be a static argument.

    Attributes:
        sampling: the settings of all rows, which become constants of the program; None if each row has its own.
        stop_tokens: tokens that end a row.
        min_new_tokens: no stop token is drawn before so many others; 0 for no such limit.
        min_length: the same, with the prompt counted.
        bad_words: as in `restrictions.restrict`.
        logprobs: how many alternatives to each token are named with its log-probability; None: there are none of these.
    """

    sampling: Sampling | None
    stop_tokens: tuple[int, ...] = ()
    min_new_tokens: int = 0
    min_length: int = 0
    bad_words: tuple[tuple[int, ...], ...] = ()
    logprobs: int | None = None

    @classmethod
    def of(cls, config: GenerationConfig) -> "Rules":
        """The rules of rows with these settings, whose prompts are not padded: see `GenerationConfig.for_prompt`."""
        return cls(
            config.sampling,
            config.stop_tokens,
            config.min_new_tokens,
            config.min_length,
            config.bad_words,
            config.logprobs,
        )

    @property
    def penalize(self) -> bool:
        """Whether any row may have a repetition penalty."""
        return self.sampling is None or self.sampling.repetition_penalty != 1


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RowSettings:
    """What may differ from row to row; None where it does not.

    Attributes:
        seed: uint32 (b,), of the row's random numbers.
        stream: uint32 (b,), which of a seed's random streams the row draws from; None: the first.
        sampling: (b,) each; None if the program's rules have it.
        limit: int32 (b,), the number of new tokens at which the row ends.
        ignore_eos: bool (b,), whether the row goes on after a stop token.
    """

    seed: jax.Array
    stream: jax.Array | None = None
    sampling: RowSampling | None = None
    limit: jax.Array | None = None
    ignore_eos: jax.Array | None = None

    @classmethod
    def of(cls, requests: Sequence[tuple[SamplingParams, Sampling]]) -> "RowSettings":
        """Numpy arrays for requests with settings of their own: each its parameters, and the sampling resolved from them."""
        column: Any = lambda name, dtype: np.asarray([getattr(params, name) for params, _ in requests], dtype)
        return cls(
            seed=column("seed", np.uint32),
            sampling=RowSampling.of([sampling for _, sampling in requests]),
            limit=column("max_new_tokens", np.int32),
            ignore_eos=column("ignore_eos", np.bool_),
        )

    def keys(self) -> jax.Array:
        """The rows' random keys (b,)."""
        return row_keys(self.seed, jnp.zeros_like(self.seed) if self.stream is None else self.stream)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Rows:
    """b rows that are decoded, apart from their keys and values.

    Attributes:
        token: int32 (b,), drawn last and not yet in the cache.
        position: int32 (b,), the token's position.
        drawn: int32 (b,), how many tokens the row has drawn.
        finished: bool (b,); a finished row does not change any more.
        seen: bool (b, v), tokens of the prompt and the answer so far; None where no row has a repetition penalty.
        settings: what each row asks for.
        recent: int32 (b, w), the last tokens of the prompt and the answer; None where no forbidden sequence needs them.
    """

    token: jax.Array
    position: jax.Array
    drawn: jax.Array
    finished: jax.Array
    seen: jax.Array | None
    settings: RowSettings
    recent: jax.Array | None = None

    @classmethod
    def start(
        cls, last: jax.Array, settings: RowSettings, *, seen: jax.Array | None, recent: jax.Array | None = None
    ) -> "Rows":
        """Rows whose prompt ends at position `last` (b,), before their first token is drawn."""
        zeros = jnp.zeros_like(last)
        return cls(zeros, last, zeros, jnp.zeros(last.shape, bool), seen, settings, recent)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DecodeState:
    """Everything that a decode step reads and writes."""

    rows: Rows
    cache: KVCache


def tokens_seen(input_ids: jax.Array, segment_ids: jax.Array, *, segments: int, vocabulary: int) -> jax.Array:
    """Which tokens stand in which prompt.

    Args:
        input_ids: (b, t).
        segment_ids: (b, t), the prompt in its row that a token belongs to, from 1 on; 0 for padding.
        segments: the number of prompts in a row, s.
        vocabulary: its size, v.

    Returns:
        bool (b, s, v).
    """
    seen = jnp.zeros((input_ids.shape[0], segments + 1, vocabulary), bool)
    return seen.at[jnp.arange(input_ids.shape[0])[:, None], segment_ids, input_ids].set(True)[:, 1:]


def _stops(rules: Rules, settings: RowSettings, token: jax.Array, drawn: jax.Array) -> jax.Array:
    """Which rows end with this token, their `drawn`-th: bool (b,)."""
    ends = jnp.zeros(token.shape, bool) if settings.limit is None else drawn >= settings.limit
    if rules.stop_tokens:
        is_stop = (token[:, None] == jnp.asarray(rules.stop_tokens)).any(-1)
        ends |= is_stop if settings.ignore_eos is None else is_stop & ~settings.ignore_eos
    return ends


def _early(rules: Rules, rows: Rows) -> jax.Array | None:
    """Which rows may not end yet: bool (b,), None where any may."""
    if not rules.stop_tokens or not (rules.min_new_tokens or rules.min_length):
        return None
    early = (rows.drawn < rules.min_new_tokens) | (rows.position + 1 < rules.min_length)
    ignored = rows.settings.ignore_eos
    return early if ignored is None else early & ~ignored


def allowed(rules: Rules, rows: Rows, logits: jax.Array) -> jax.Array:
    """Logits (b, v) with what the rules do not admit at -inf."""
    return restrict(
        logits,
        early=_early(rules, rows),
        stop_tokens=rules.stop_tokens,
        bad_words=rules.bad_words,
        recent=rows.recent,
    )


def next_token(rules: Rules, rows: Rows, logits: jax.Array) -> Rows:
    """Draw a token from logits (b, v) for every row that has not finished, and decide which rows end with it."""
    live = ~rows.finished
    sampling: Any = rules.sampling or rows.settings.sampling
    token = choose(allowed(rules, rows, logits), sampling, seen=rows.seen, keys=rows.settings.keys, drawn=rows.drawn)
    token = jnp.where(live, token, rows.token)
    drawn = rows.drawn + live
    seen = rows.seen
    if rules.penalize and seen is not None:
        seen = seen.at[jnp.arange(token.shape[0]), token].max(live)
    return Rows(
        token=token,
        position=rows.position + live,
        drawn=drawn,
        finished=rows.finished | _stops(rules, rows.settings, token, drawn),
        seen=seen,
        settings=rows.settings,
        recent=follow(rows.recent, token, live),
    )


def measured(rules: Rules, rows: Rows, logits: jax.Array) -> TokenLogprobs | None:
    """Log-probabilities (b,) of the tokens that rows have just drawn from logits (b, v); None if the rules want none."""
    return None if rules.logprobs is None else token_logprobs(logits, rows.token, rules.logprobs)


def decode_step(
    model: SmolVLMForConditionalGeneration, rules: Rules, params, state: DecodeState
) -> tuple[DecodeState, TokenLogprobs | None]:
    """One token for every row that has not finished, with its log-probability if the rules want it. The others write a column
    of the cache that is not visible."""
    logits, cache = next_logits(model, params, state)
    rows = next_token(rules, state.rows, logits)
    return DecodeState(rows, cache), measured(rules, rows, logits)


def next_logits(model: SmolVLMForConditionalGeneration, params, state: DecodeState) -> tuple[jax.Array, KVCache]:
    """Logits (b, v) of what follows the last tokens, and the cache with these."""
    rows = state.rows
    out: Any = model.apply(
        {"params": params},
        input_ids=rows.token[:, None],
        attention_mask=~rows.finished[:, None],
        position_ids=rows.position[:, None],
        past_key_values=state.cache,
    )
    return out.logits[:, -1], out.past_key_values


class Decoded(NamedTuple):
    """A state and the tokens that led to it.

    Attributes:
        state: after the last step.
        tokens: int32 (b, n), with a column for every step. What a row has there after it has finished is of no meaning.
        columns: int32 (), how many columns are written.
        logprobs: of the tokens, (b, n); None where the rules want none.
    """

    state: DecodeState
    tokens: jax.Array
    columns: jax.Array
    logprobs: TokenLogprobs | None = None


def decode(model: SmolVLMForConditionalGeneration, rules: Rules, params, decoded: Decoded, end: jax.Array) -> Decoded:
    """Decode until `end` <= n columns of the tokens are written, or all rows have finished. Model and rules are static."""

    def going(decoded: Decoded) -> jax.Array:
        return (decoded.columns < end) & ~decoded.state.rows.finished.all()

    def body(decoded: Decoded) -> Decoded:
        state, step = decode_step(model, rules, params, decoded.state)
        tokens = jax.lax.dynamic_update_slice(decoded.tokens, state.rows.token[:, None], (0, decoded.columns))
        logprobs = decoded.logprobs.put(step, decoded.columns) if decoded.logprobs is not None and step is not None else None
        return Decoded(state, tokens, decoded.columns + 1, logprobs)

    return jax.lax.while_loop(going, body, decoded)
