"""`generate()` and `stream()`: one jitted prefill, then a decode loop that stays on the device until every row has stopped.

Shapes are rounded up to a few buckets, so that prompts of all lengths and pictures of all sizes share a handful of compiled
programs: prompt length and number of tiles to 2^k or 3·2^(k-1), cache length to a multiple of 64, off the CPU of 128.
"""

import functools
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from .cache import KVCache
from .errors import InputError
from .generation_config import GenerationConfig
from .model import SmolVLMForConditionalGeneration
from .pictures import check_counts, flat_tiles, padded_tiles
from .sampling import choose, row_keys
from .sharding import activate, batch_sharding

__all__ = ["bucket", "generate", "stream"]


def bucket(n: int, smallest: int = 32) -> int:
    """The next size of the form 2^k or 3·2^(k-1), from `smallest`, a power of 2, on.

    At most a third of it is padding, and the sizes up to 8,192 are few.
    """
    power = max(smallest, 1 << max(n - 1, 0).bit_length())
    return power * 3 // 4 if power > max(smallest, 2) and n <= power * 3 // 4 else power


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _State:
    """Everything a decode step reads and writes."""

    token: jax.Array  # (b,) the token drawn last
    position: jax.Array  # (b,) its position
    finished: jax.Array  # bool (b,)
    out: jax.Array  # (b, room) new tokens
    step: jax.Array  # () how many of them are there
    cache: KVCache
    keys: jax.Array  # (b,)
    seen: jax.Array | None  # bool (b, v), for the repetition penalty


def _emit(state: _State, logits: jax.Array, config: GenerationConfig) -> _State:
    """Draw a token for every row from logits (b, v) and note it; rows that have stopped get the fill token."""
    token = choose(logits, state.seen, state.keys, state.step, config)
    token = jnp.where(state.finished, config.fill_token_id, token)
    finished = state.finished
    if config.eos_token_id:
        finished = finished | (token[:, None] == jnp.asarray(config.eos_token_id)).any(-1)
    seen = state.seen
    if seen is not None:
        seen = seen.at[jnp.arange(token.shape[0]), token].set(True)
    out = jax.lax.dynamic_update_slice(state.out, token[:, None], (0, state.step))
    return replace(state, token=token, position=state.position + 1, finished=finished, out=out, step=state.step + 1, seen=seen)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _prefill(model, config: GenerationConfig, cache_length: int, params, inputs: dict[str, Any], keys: jax.Array) -> _State:
    """Run the prompt, left-padded to one length, and draw the first token."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    b, t = ids.shape
    positions = jnp.maximum(jnp.cumsum(mask, axis=-1) - 1, 0)
    out = model.apply({"params": params}, **inputs, position_ids=positions, logits_to_keep=1, cache_length=cache_length)
    seen = None
    if config.repetition_penalty != 1.0:
        vocabulary = model.config.text_config.vocab_size
        seen = jnp.zeros((b, vocabulary), bool).at[jnp.arange(b)[:, None], ids].max(mask.astype(bool))
    state = _State(
        token=ids[:, -1],
        position=positions[:, -1],
        finished=jnp.zeros((b,), bool),
        out=jnp.full((b, cache_length - t), config.fill_token_id, jnp.int32),
        step=jnp.zeros((), jnp.int32),
        cache=out.past_key_values,
        keys=keys,
        seen=seen,
    )
    return _emit(state, out.logits[:, -1], config)


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=(3,))
def _decode(model, config: GenerationConfig, params, state: _State, limit: jax.Array) -> _State:
    """Decode until `limit` tokens are out or every row has stopped. `stream` asks for one more token at a time, `generate`
    for all of them: the same program."""

    def body(state: _State) -> _State:
        out = model.apply(
            {"params": params},
            input_ids=state.token[:, None],
            position_ids=state.position[:, None],
            past_key_values=state.cache,
        )
        return _emit(replace(state, cache=out.past_key_values), out.logits[:, -1], config)

    return jax.lax.while_loop(lambda s: (s.step < limit) & ~s.finished.all(), body, state)


def _settings(model, generation_config: GenerationConfig | None, overrides: dict[str, Any]) -> GenerationConfig:
    config = generation_config if generation_config is not None else model.generation_config
    return (config or GenerationConfig()).replace(**overrides)


def _default_mask(ids: np.ndarray, config: GenerationConfig) -> np.ndarray:
    """As the reference infers it: pad tokens are padding, provided that the pad token is no stop token."""
    pad = config.pad_token_id
    if pad is None or pad in config.eos_token_id:
        return np.ones_like(ids)
    return (ids != pad).astype(ids.dtype)


def _align(ids: np.ndarray, mask: np.ndarray, length: int, fill: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows moved to the right end of `length` columns, whichever side their padding was on."""
    t = ids.shape[1]
    order = np.argsort(mask, axis=1, kind="stable")  # padding first, tokens in order
    ids, mask = np.take_along_axis(ids, order, 1), np.take_along_axis(mask, order, 1)
    ids = np.where(mask == 1, ids, fill)
    grow = ((0, 0), (length - t, 0))
    return np.pad(ids, grow, constant_values=fill).astype(np.int32), np.pad(mask, grow).astype(np.int32)


def _scope(mesh: Mesh | None):
    return activate(mesh) if mesh is not None else nullcontext()


def _start(model, params, config: GenerationConfig, given: dict[str, Any], seed, mesh: Mesh | None) -> _State:
    """Check what the caller gave on the host, pad it to buckets, run the prefill."""
    pixel_values, pixel_attention_mask = given["pixel_values"], given["pixel_attention_mask"]
    num_tiles, image_hidden_states = given["num_tiles"], given["image_hidden_states"]
    ids = np.asarray(given["input_ids"])
    if ids.ndim != 2 or not ids.size or not np.issubdtype(ids.dtype, np.integer):
        raise InputError(f"input_ids must be integers of shape (batch, length), got {ids.dtype} {ids.shape}")
    text = model.config.text_config
    if ids.min() < 0 or ids.max() >= text.vocab_size:
        raise InputError(f"input_ids must lie in [0, {text.vocab_size}), got {ids.min()} … {ids.max()}")
    mask = _default_mask(ids, config) if given["attention_mask"] is None else np.asarray(given["attention_mask"]) != 0
    mask = mask.astype(np.int32)
    if mask.shape != ids.shape:
        raise InputError(f"attention_mask has shape {mask.shape}, input_ids {ids.shape}")
    if not mask.any(axis=1).all():
        raise InputError(f"row {int(np.argmin(mask.any(axis=1)))} of the batch is empty")
    longest = int(mask.sum(axis=1).max())
    limit = text.max_position_embeddings
    if longest + config.max_new_tokens > limit:
        raise InputError(
            f"prompt too long: {longest} tokens and {config.max_new_tokens} new ones do not fit the model's {limit} positions"
        )
    tiles = None
    if pixel_values is not None:
        tiles = flat_tiles(model.config, np.asarray(pixel_values), pixel_attention_mask, num_tiles)
    pictures, count = (image_hidden_states, num_tiles) if tiles is None else (tiles.pixels, tiles.count)
    if pictures is not None:
        check_counts(model.config, np.where(mask == 1, ids, -1), pictures, count)

    length = bucket(longest)
    ids, mask = _align(ids, mask, max(length, ids.shape[1]), config.fill_token_id)
    inputs: dict[str, Any] = {"input_ids": ids[:, -length:], "attention_mask": mask[:, -length:]}
    if tiles is not None and tiles.count:
        inputs |= padded_tiles(tiles, bucket(int(tiles.count), 1))
    if image_hidden_states is not None:
        inputs["image_hidden_states"] = image_hidden_states
    keys = row_keys(seed, len(ids))
    if mesh is not None:
        inputs = {k: jax.device_put(v, batch_sharding(mesh, np.shape(v))) for k, v in inputs.items()}
    tile = 64 if jax.default_backend() == "cpu" else 128  # a TPU's tiles have 128 columns, which the decode kernel wants whole
    cache_length = -(-(length + config.max_new_tokens) // tile) * tile
    with _scope(mesh):
        return _prefill(model, _static(config), cache_length, params, inputs, keys)


def _static(config: GenerationConfig) -> GenerationConfig:
    """The part of the settings that programs depend on."""
    return config.replace(max_new_tokens=1)


def generate(
    model: SmolVLMForConditionalGeneration,
    params,
    input_ids,
    attention_mask=None,
    pixel_values=None,
    pixel_attention_mask=None,
    *,
    num_tiles=None,
    image_hidden_states=None,
    generation_config: GenerationConfig | None = None,
    seed: int | Sequence[int] = 0,
    mesh: Mesh | None = None,
    **overrides,
) -> np.ndarray:
    """Continue prompts; returns int32 (b, t + new): each row's prompt as given, then its new tokens.

    input_ids, attention_mask: (b, t), padded on either side; without a mask, pad tokens are taken for padding.
    pixel_values, pixel_attention_mask, num_tiles, image_hidden_states: as in the model's forward; a processor's output can be
    passed as it is: `generate(model, params, **inputs, max_new_tokens=64)`.
    generation_config, overrides: any argument of `GenerationConfig`; the defaults are those of the checkpoint.
    seed: an int, or one for each row. mesh: where `params` were placed.

    Generation ends when every row has drawn a stop token or max_new_tokens are out; shorter rows are filled with the pad
    token. Rows do not influence each other. Raises InputError for counts of pictures and image tokens that disagree, and for
    prompts longer than the model's positions.
    """
    config = _settings(model, generation_config, overrides)
    given = dict(
        input_ids=input_ids,
        attention_mask=attention_mask,
        pixel_values=pixel_values,
        pixel_attention_mask=pixel_attention_mask,
        num_tiles=num_tiles,
        image_hidden_states=image_hidden_states,
    )
    state = _start(model, params, config, given, seed, mesh)
    with _scope(mesh):
        state = _decode(model, _static(config), params, state, jnp.asarray(config.max_new_tokens, jnp.int32))
    new = np.asarray(state.out)[:, : int(state.step)]
    return np.concatenate([np.asarray(input_ids).astype(np.int32), new], axis=1)


def stream(
    model: SmolVLMForConditionalGeneration,
    params,
    input_ids,
    attention_mask=None,
    pixel_values=None,
    pixel_attention_mask=None,
    *,
    num_tiles=None,
    image_hidden_states=None,
    generation_config: GenerationConfig | None = None,
    seed: int | Sequence[int] = 0,
    mesh: Mesh | None = None,
    **overrides,
) -> Iterator[np.ndarray]:
    """Yield the tokens that `generate` would return, int32 (b,) for each step, as soon as they are drawn.

    Arguments as in `generate`. Ends after the step in which the last row stops; rows that stopped before yield the pad token.
    Mistakes are raised by the call itself, not by the first step.
    """
    config = _settings(model, generation_config, overrides)
    given = dict(
        input_ids=input_ids,
        attention_mask=attention_mask,
        pixel_values=pixel_values,
        pixel_attention_mask=pixel_attention_mask,
        num_tiles=num_tiles,
        image_hidden_states=image_hidden_states,
    )
    return _steps(model, params, config, _start(model, params, config, given, seed, mesh), mesh)


def _steps(model, params, config: GenerationConfig, state: _State, mesh: Mesh | None) -> Iterator[np.ndarray]:
    for step in range(1, config.max_new_tokens + 1):
        yield np.asarray(state.token)
        if step == config.max_new_tokens or bool(state.finished.all()):
            return
        with _scope(mesh):
            state = _decode(model, _static(config), params, state, jnp.asarray(step + 1, jnp.int32))
