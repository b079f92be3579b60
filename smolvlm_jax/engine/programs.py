"""The device programs of the engine: encode tiles, prefill packed prompts, insert a row into a ring, decode a chunk of steps,
score given continuations.

All are pure functions over fixed shapes. Lanes are the shards of the batch axis: a mesh with D data shards prefills D packed
rows at once and inserts one row per shard, each into slots of its own, so that no key or value ever changes its device.
"""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from ..cache import CacheFormat, HeadBuffers, KVCache
from ..decoding import Decoded, DecodeState, Rows, RowSettings, Rules, decode, measured, next_token, tokens_seen
from ..generation_config import Sampling, SamplingParams
from ..logprobs import TokenLogprobs, token_logprobs
from ..model import SmolVLMForConditionalGeneration
from ..restrictions import longest_prefix, packed_recent
from ..sharding import constrain, partition_spec

__all__ = [
    "Packed",
    "PackedTokens",
    "Prefilled",
    "Targets",
    "decode_chunk",
    "empty_ring",
    "encode",
    "insert",
    "prefill",
    "score",
    "specs",
    "target_columns",
]

# Tokens of a packed row whose logits exist at a time where continuations are scored.
_SCORED = 128


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PackedTokens:
    """D rows of T tokens, in each of which several prompts stand side by side.

    Attributes:
        input_ids: int32 (D, T).
        segment_ids: int32 (D, T), the prompt that a token belongs to, from 1 on; 0 = padding.
        places: int32 (F,), where in the pool the tiles are that the image tokens of all rows want, in order.
        num_tiles: int32 (), how many of `places` are real.
    """

    input_ids: Any
    segment_ids: Any
    places: Any
    num_tiles: Any

    def inputs(self, pool: jax.Array) -> dict[str, Any]:
        """As arguments of the model; pool (P, tokens, d)."""
        return {
            "input_ids": self.input_ids,
            "segment_ids": self.segment_ids,
            "image_hidden_states": pool[self.places],
            "num_tiles": self.num_tiles,
        }


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Packed:
    """Packed rows of up to S prompts that are to be continued.

    Attributes:
        tokens: the rows.
        start: int32 (D, S), the first column of each prompt.
        length: int32 (D, S), its number of tokens; 1 where there is none.
        settings: (D, S) each.
    """

    tokens: PackedTokens
    start: Any
    length: Any
    settings: RowSettings


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Targets:
    """What is scored in D packed rows: tokens, and where each is predicted.

    Attributes:
        column: int32 (D, M), the columns whose logits are wanted, those of all continuations of a row first.
        token: int32 (D, M), the token that follows each; -1 where there is nothing to score.
        count: int32 (), how many columns of M the row with the most continuations wants.
    """

    column: Any
    token: Any
    count: Any


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Prefilled:
    """D packed rows of up to T tokens, run through the decoder.

    Attributes:
        layers: keys and values (D, k, T, h) of each layer.
        rows: of each of the S prompts in a packed row, after its first token, (D, S, …).
        start: int32 (D, S), the first column of each prompt.
        logprobs: of the first tokens, (D, S); None where the rules want none.
    """

    layers: tuple[HeadBuffers, ...]
    rows: Rows
    start: jax.Array
    logprobs: TokenLogprobs | None = None


def empty_ring(
    model: SmolVLMForConditionalGeneration, rules: Rules, slots: int, length: int, stored: CacheFormat
) -> DecodeState:
    """A ring of so many slots and columns, stored in this format, every slot finished."""
    text = model.config.text_config
    settings = RowSettings.of([(SamplingParams(), Sampling())] * slots)
    seen = jnp.zeros((slots, text.vocab_size), bool)
    width = longest_prefix(rules.bad_words)
    recent = jnp.full((slots, width), -1, jnp.int32) if width else None
    rows = Rows.start(jnp.zeros((slots,), jnp.int32), jax.tree.map(jnp.asarray, settings), seen=seen, recent=recent)
    rows = replace(rows, finished=jnp.ones((slots,), bool))
    return DecodeState(rows, KVCache.create(text, slots, length, model.dtype, stored=stored))


def specs(tree, mesh: Mesh):
    """A PartitionSpec for every array of a ring or of `Prefilled`: the first dimension over the data axes, of keys and values
    the second, which is that of the heads, over the tensor axis where it divides."""

    def spec(x) -> PartitionSpec:
        names = ("batch", "act_kv_heads", None, None) if x.ndim == 4 else ("batch", *(None,) * (x.ndim - 1))
        return partition_spec(names[: x.ndim], x.shape, mesh, quiet=True)

    return jax.tree.map(spec, tree)


def encode(model: SmolVLMForConditionalGeneration, params, pool: jax.Array, tiles: jax.Array, places: jax.Array) -> jax.Array:
    """Encode tiles into the pool of features.

    Args:
        model: static.
        params: of the model.
        pool: (P, tokens, d).
        tiles: uint8 (N, T, T, 3).
        places: int32 (N,), where in the pool the features go. A place of P or more is dropped: for tiles that pad the batch.

    Returns:
        The pool.
    """
    features = model.apply({"params": params}, tiles, method="get_image_features")[0]
    features = constrain(features.astype(pool.dtype), None, None, None)
    return pool.at[places].set(features, mode="drop")


def prefill(
    model: SmolVLMForConditionalGeneration, rules: Rules, columns: int, params, pool: jax.Array, packed: Packed
) -> Prefilled:
    """Run packed prompts and draw the first token of each. Model, rules, and the columns of the keys and values that are
    returned, are static; pool (P, tokens, d)."""
    tokens = packed.tokens
    d = tokens.input_ids.shape[0]
    s = packed.start.shape[1]
    last = packed.start + packed.length - 1

    def forward(module, **inputs):
        out = module.model(**inputs)
        hidden = jnp.take_along_axis(out.last_hidden_state, last[..., None], axis=1)
        return module.head(hidden), out.past_key_values

    out: Any = model.apply({"params": params}, **tokens.inputs(pool), cache_length=columns, method=forward)
    logits, cache = out
    seen = tokens_seen(tokens.input_ids, tokens.segment_ids, segments=s, vocabulary=logits.shape[-1])
    recent = packed_recent(tokens.input_ids, packed.start, packed.length, rules.bad_words)
    rows = Rows.start(packed.length - 1, packed.settings, seen=seen, recent=recent)
    flat = jax.tree.map(lambda x: x.reshape(d * s, *x.shape[2:]), rows)
    flat_logits = logits.reshape(d * s, -1)
    flat = next_token(rules, flat, flat_logits)
    each = (flat, measured(rules, flat, flat_logits))
    rows, logprobs = jax.tree.map(lambda x: x.reshape(d, s, *x.shape[1:]), each)
    return Prefilled(cache.layers, rows, packed.start, logprobs)


def insert(mesh: Mesh | None, state: DecodeState, prompt: Prefilled, slot: jax.Array, segment: jax.Array) -> DecodeState:
    """Put one prompt per lane into a slot per lane.

    Args:
        mesh: static.
        state: of the ring.
        prompt: the packed rows.
        slot: int32 (D,), within the lane; -1 for none.
        segment: int32 (D,), the number of the prompt in its row, from 0 on.
    """
    if mesh is None:
        return _insert_local(state, prompt, slot, segment)
    ring = specs(state, mesh)
    return jax.shard_map(
        _insert_local,
        mesh=mesh,
        in_specs=(ring, *(specs(x, mesh) for x in (prompt, slot, segment))),
        out_specs=ring,
        check_vma=False,
    )(state, prompt, slot, segment)


def _insert_local(state: DecodeState, prompt: Prefilled, slot: jax.Array, segment: jax.Array) -> DecodeState:
    """`insert` as one shard sees it: its slots, its packed row."""
    slot, segment = slot[0], segment[0]
    row, start = jax.tree.map(lambda x: x[0, segment], (prompt.rows, prompt.start))
    wanted = slot >= 0
    at = jnp.maximum(slot, 0)
    put = lambda array, value: array.at[at].set(jnp.where(wanted, value, array[at]))
    cache = state.cache.insert(at, prompt.layers, start, row.position, wanted=wanted)
    return DecodeState(jax.tree.map(put, state.rows, row), cache)


def decode_chunk(
    model: SmolVLMForConditionalGeneration,
    rules: Rules,
    chunk: int,
    params,
    state: DecodeState,
    steps: jax.Array,
    *,
    first: int | None = None,
) -> tuple[DecodeState, jax.Array, TokenLogprobs | None]:
    """Up to `steps` <= chunk steps, fewer if all rows finish before.

    Args:
        model, rules, chunk: static.
        params: of the model.
        state: of the ring.
        steps: int32 ().
        first: static; if given, only so many rows, the first ones, are decoded: the others must have finished.

    Returns:
        The state; a report int32 (b, 1 + chunk) of the b rows that were decoded: how many tokens the row has drawn so far, and
        the tokens of this chunk, of which the row's own come first; and the log-probabilities (b, chunk) of these tokens, None
        where the rules want none.
    """
    every = state
    if first is not None:  # cut out and put back: two copies of these rows a chunk
        state = jax.tree.map(lambda x: x[:first] if x.ndim else x, every)
    tokens = jnp.zeros((state.rows.token.shape[0], chunk), jnp.int32)
    logprobs = None if rules.logprobs is None else TokenLogprobs.zeros(tokens.shape, rules.logprobs)
    decoded = decode(model, rules, params, Decoded(state, tokens, jnp.zeros((), jnp.int32), logprobs), steps)
    state = decoded.state
    report = jnp.concatenate([state.rows.drawn[:, None], decoded.tokens], axis=1)
    if first is not None:
        state = jax.tree.map(lambda x, new: x.at[:first].set(new) if x.ndim else new, every, state)
    return state, report, decoded.logprobs


def target_columns(t: int) -> int:
    """The length M of `Targets` for rows of `t` tokens: whole blocks of logits."""
    return -(-t // _block(t)) * _block(t)


def _block(t: int) -> int:
    return min(_SCORED, t)


def score(
    model: SmolVLMForConditionalGeneration, params, pool: jax.Array, tokens: PackedTokens, targets: Targets
) -> tuple[jax.Array, jax.Array]:
    """The log-probabilities of given tokens in packed rows, by logits that exist a block of columns at a time.

    Returns:
        float32 (D, M), of the targets; bool (D, M), whether they are what greedy decoding would take. Entries without a target
        have no meaning.
    """
    hidden: Any = model.apply(
        {"params": params}, **tokens.inputs(pool), method=lambda module, **inputs: module.model(**inputs).last_hidden_state
    )
    width = _block(hidden.shape[1])

    def block(index, found):
        at = index * width
        column, token = (jax.lax.dynamic_slice_in_dim(x, at, width, axis=1) for x in (targets.column, targets.token))
        here = jnp.take_along_axis(hidden, column[..., None], axis=1)
        logits: Any = model.apply({"params": params}, here, method="head")
        new = token_logprobs(logits, token).chosen, logits.argmax(-1).astype(jnp.int32) == token
        return tuple(jax.lax.dynamic_update_slice_in_dim(x, y, at, axis=1) for x, y in zip(found, new, strict=True))

    nothing = jnp.zeros(targets.token.shape, jnp.float32), jnp.zeros(targets.token.shape, bool)
    return jax.lax.fori_loop(0, -(-targets.count // width), block, nothing)
