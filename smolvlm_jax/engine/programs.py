"""The four device programs of the engine: encode tiles, prefill packed prompts, insert a row into a ring, decode a chunk.

All are pure functions over fixed shapes. Lanes are the shards of the batch axis: a mesh with D data shards prefills D packed
rows at once and inserts one row per shard, each into slots of its own, so that no key or value ever changes its device.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from ..cache import KVCache
from ..model import SmolVLMForConditionalGeneration
from ..sampling import RowSampling, choose_rows
from ..sharding import constrain, partition_spec

__all__ = ["Prefilled", "RingState", "Rows", "decode", "encode", "insert", "prefill"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Rows:
    """What requests bring with them, each (b,): how to sample, the limit on new tokens, whether stop tokens count."""

    sampling: RowSampling
    limit: jax.Array
    ignore_eos: jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RingState:
    """A ring of b slots. token (b,): drawn last, not yet in the cache; position (b,): where it stands; drawn (b,): how many
    tokens the row has; finished bool (b,); seen bool (b, v): tokens the row has met."""

    cache: KVCache
    token: jax.Array
    position: jax.Array
    drawn: jax.Array
    finished: jax.Array
    seen: jax.Array
    rows: Rows

    @classmethod
    def create(cls, model: SmolVLMForConditionalGeneration, slots: int, length: int) -> "RingState":
        """An empty ring: every slot finished."""
        text = model.config.text_config
        zeros = lambda dtype: jnp.zeros((slots,), dtype)
        ones = lambda: jnp.ones((slots,), jnp.float32)
        sampling = RowSampling(zeros(bool), ones(), zeros(jnp.int32), ones(), zeros(jnp.float32), ones(), zeros(jnp.uint32))
        return cls(
            cache=KVCache.create(text, slots, length, model.dtype),
            token=zeros(jnp.int32),
            position=zeros(jnp.int32),
            drawn=zeros(jnp.int32),
            finished=jnp.ones((slots,), bool),
            seen=jnp.zeros((slots, text.vocab_size), bool),
            rows=Rows(sampling, zeros(jnp.int32), zeros(bool)),
        )

    def specs(self, mesh: Mesh) -> "RingState":
        """A PartitionSpec for every array: rows over the data axes, heads over the tensor axis where they divide."""
        heads = ("act_kv_heads", None, None)
        spec = lambda x: PartitionSpec() if not x.ndim else _row_spec(mesh, x, *(heads if x.ndim == 4 else ()))
        return jax.tree.map(spec, self)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Prefilled:
    """D packed rows of T tokens, run through the decoder: keys and values (D, k, T, h) per layer, and for each of S segments
    a row its first new token (D, S), the tokens it holds, seen (D, S, v), and its `Rows` (D, S)."""

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]
    token: jax.Array
    seen: jax.Array
    rows: Rows

    def specs(self, mesh: Mesh) -> "Prefilled":
        heads = ("act_kv_heads", None, None)
        return jax.tree.map(lambda x: _row_spec(mesh, x, *(heads if x.ndim == 4 else ())), self)


def _row_spec(mesh: Mesh, x, *names: str | None) -> PartitionSpec:
    return partition_spec(("batch", *(names or (None,) * (x.ndim - 1))), x.shape, mesh, quiet=True)


def _stops(model: SmolVLMForConditionalGeneration, rows: Rows, token: jax.Array, drawn: jax.Array) -> jax.Array:
    """Which rows end with this token, their `drawn`-th."""
    config = model.generation_config
    ends = drawn >= rows.limit
    if config is not None and config.eos_token_id:
        is_stop = (token[..., None] == jnp.asarray(config.eos_token_id)).any(-1)
        ends = ends | (is_stop & ~rows.ignore_eos)
    return ends


def encode(model: SmolVLMForConditionalGeneration, params, pool: jax.Array, tiles: jax.Array, slots: jax.Array) -> jax.Array:
    """Tiles uint8 (N, T, T, 3) -> their features at places `slots` (N,) of the pool (P, tokens, d); a place of P or more
    is nowhere, for tiles that pad the batch."""
    features, _ = model.apply({"params": params}, tiles, method="get_image_features")
    features = constrain(features.astype(pool.dtype), None, None, None)
    return pool.at[slots].set(features, mode="drop")


def prefill(
    model: SmolVLMForConditionalGeneration,
    params,
    pool: jax.Array,
    input_ids: jax.Array,
    segment_ids: jax.Array,
    places: jax.Array,
    num_tiles: jax.Array,
    last: jax.Array,
    rows: Rows,
) -> Prefilled:
    """Run D rows of packed prompts and draw the first token of each.

    input_ids, segment_ids (D, T); places (F,): where in the pool the tiles lie that the image tokens of all rows want, in
    order, the first `num_tiles` of them real; last (D, S): the column of each segment's last token; rows: each (D, S).
    """
    d, t = input_ids.shape
    s = last.shape[1]

    def forward(module, **inputs):
        out = module.model(**inputs)
        hidden = jnp.take_along_axis(out.last_hidden_state, last[..., None], axis=1)
        return module.head(hidden), out.past_key_values

    logits, cache = model.apply(
        {"params": params},
        input_ids=input_ids,
        segment_ids=segment_ids,
        image_hidden_states=pool[places],
        num_tiles=num_tiles,
        cache_length=t,
        method=forward,
    )
    seen = jnp.zeros((d, s + 1, logits.shape[-1]), bool)
    seen = seen.at[jnp.arange(d)[:, None], segment_ids, input_ids].set(True)[:, 1:]
    flat = jax.tree.map(lambda x: x.reshape(d * s, *x.shape[2:]), rows.sampling)
    token = choose_rows(logits.reshape(d * s, -1), seen.reshape(d * s, -1), flat, jnp.zeros((d * s,), jnp.int32))
    return Prefilled(cache.keys, cache.values, token.reshape(d, s), seen, rows)


def insert(
    model: SmolVLMForConditionalGeneration,
    mesh: Mesh | None,
    state: RingState,
    prompt: Prefilled,
    row: jax.Array,
    segment: jax.Array,
    start: jax.Array,
    length: jax.Array,
) -> RingState:
    """Put one segment per lane into a slot per lane; all arguments (D,). row: the slot within the lane, -1 for none;
    segment: its number from 0 on; start, length: the columns it takes in the packed row."""
    local = partial(_insert_local, model)
    if mesh is None:
        return local(state, prompt, row, segment, start, length)
    lanes = _row_spec(mesh, row)
    specs = state.specs(mesh)
    return jax.shard_map(
        local, mesh=mesh, in_specs=(specs, prompt.specs(mesh), lanes, lanes, lanes, lanes), out_specs=specs, check_vma=False
    )(state, prompt, row, segment, start, length)


def _insert_local(model, state: RingState, prompt: Prefilled, row, segment, start, length) -> RingState:
    """`insert` as one shard sees it: its slots, its packed row.

    The prompt is rolled so that it ends just before the column that the next step writes. Slices and a roll, no gather: both
    are plain copies on every backend.
    """
    row, segment, start, length = (x[0] for x in (row, segment, start, length))
    columns = state.cache.length
    shift = state.cache.index % columns - length
    wanted = row >= 0
    at = jnp.maximum(row, 0)

    def place(buffer, packed):
        cut = jax.lax.dynamic_slice_in_dim(jnp.pad(packed[0], ((0, 0), (0, columns), (0, 0))), start, columns, axis=1)
        new = jnp.roll(cut, shift, axis=1)[None].astype(buffer.dtype)
        old = jax.lax.dynamic_slice_in_dim(buffer, at, 1, axis=0)
        return jax.lax.dynamic_update_slice_in_dim(buffer, jnp.where(wanted, new, old), at, axis=0)

    def put(array, value):
        return array.at[at].set(jnp.where(wanted, value, array[at]))

    token = prompt.token[0, segment]
    rows = jax.tree.map(lambda x: x[0, segment], prompt.rows)
    drawn = jnp.ones((), jnp.int32)
    visible = jnp.roll(jnp.arange(columns) < length, shift)
    cache = replace(
        state.cache,
        keys=tuple(map(place, state.cache.keys, prompt.keys)),
        values=tuple(map(place, state.cache.values, prompt.values)),
        visible=put(state.cache.visible, visible),
    )
    return RingState(
        cache=cache,
        token=put(state.token, token),
        position=put(state.position, length),
        drawn=put(state.drawn, drawn),
        finished=put(state.finished, _stops(model, rows, token, drawn)),
        seen=put(state.seen, prompt.seen[0, segment].at[token].set(True)),
        rows=jax.tree.map(put, state.rows, rows),
    )


def decode_step(model: SmolVLMForConditionalGeneration, greedy: bool, params, state: RingState) -> RingState:
    """One token for every row that has not finished; the others stand still, and write a column that nobody sees.

    greedy: all rows that matter take the best token without penalty. Then nothing of the general case is compiled, which a
    compiler would plan memory for, and `seen` is left as it is: it matters to rows with a penalty only.
    """
    live = ~state.finished
    out = model.apply(
        {"params": params},
        input_ids=state.token[:, None],
        attention_mask=live[:, None],
        position_ids=state.position[:, None],
        past_key_values=state.cache,
    )
    logits, seen = out.logits[:, -1], state.seen
    if greedy:
        token = logits.astype(jnp.float32).argmax(-1).astype(jnp.int32)
    else:
        token = choose_rows(logits, seen, state.rows.sampling, state.drawn)
        seen = seen.at[jnp.arange(token.shape[0]), token].max(live)
    token = jnp.where(live, token, state.token)
    drawn = state.drawn + live
    return replace(
        state,
        cache=out.past_key_values,
        token=token,
        position=state.position + live,
        drawn=drawn,
        finished=state.finished | _stops(model, state.rows, token, drawn),
        seen=seen,
    )


def decode(
    model: SmolVLMForConditionalGeneration, chunk: int, greedy: bool, params, state: RingState, steps: jax.Array
) -> tuple[RingState, jax.Array]:
    """Up to `steps` <= chunk steps, fewer if all rows finish before.

    Returns the state and a report int32 (b, 2 + chunk): tokens drawn by the row so far, whether it has finished, and the
    tokens of this chunk, of which the row's own come first.
    """

    def body(carry: tuple[jax.Array, RingState, jax.Array]) -> tuple[jax.Array, RingState, jax.Array]:
        step, state, out = carry
        state = decode_step(model, greedy, params, state)
        return step + 1, state, jax.lax.dynamic_update_slice(out, state.token[:, None], (0, step))

    out = jnp.zeros((state.token.shape[0], chunk), jnp.int32)
    going = lambda carry: (carry[0] < steps) & ~carry[1].finished.all()
    _, state, out = jax.lax.while_loop(going, body, (jnp.zeros((), jnp.int32), state, out))
    report: Any = jnp.concatenate([state.drawn[:, None], state.finished[:, None].astype(jnp.int32), out], axis=1)
    return state, report
