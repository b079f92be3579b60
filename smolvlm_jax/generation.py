"""`generate()` and `stream()`: one jitted prefill, then a decode loop that stays on the device until every row has stopped.

Shapes are rounded up to a few buckets, so that prompts of all lengths and pictures of all sizes share a handful of compiled
programs: prompt length and number of tiles to 2^k or 3·2^(k-1), cache length to a multiple of 64, off the CPU of 128.
"""

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from .cache import CacheFormat, check_kv_cache_dtype
from .decoding import Decoded, DecodeState, Rows, RowSettings, Rules, decode, next_token, tokens_seen
from .errors import InputError
from .generation_config import GenerationConfig
from .model import SmolVLMForConditionalGeneration
from .pictures import check_counts, flat_tiles, padded_tiles
from .sharding import activate, batch_sharding

__all__ = ["bucket", "generate", "stream"]

_Arguments = ParamSpec("_Arguments")
_Out = TypeVar("_Out")


def bucket(n: int, smallest: int = 32) -> int:
    """The smallest size of the form 2^k or 3·2^(k-1) that holds `n`.

    At most a third of it is padding, and there are few sizes up to 8,192.

    Args:
        n: what is to be held.
        smallest: the first size, a power of 2.
    """
    power = max(smallest, 1 << max(n - 1, 0).bit_length())
    return power * 3 // 4 if power > max(smallest, 2) and n <= power * 3 // 4 else power


@functools.partial(jax.jit, static_argnames=("model", "rules", "cache_length", "stored"))
def _prefill(
    model, rules: Rules, cache_length: int, params, inputs: dict[str, Any], settings: RowSettings, stored: CacheFormat
) -> Decoded:
    """Run the prompts, left-padded to one length, and draw the first token of each."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    positions = jnp.maximum(jnp.cumsum(mask, axis=-1) - 1, 0)
    out = model.apply({"params": params}, **inputs, position_ids=positions, logits_to_keep=1, cache_length=ids.shape[1])
    seen = tokens_seen(ids, mask, segments=1, vocabulary=out.logits.shape[-1])[:, 0] if rules.penalize else None
    rows = next_token(rules, Rows.start(positions[:, -1], settings, seen=seen), out.logits[:, -1])
    tokens = jnp.zeros((len(ids), cache_length - ids.shape[1]), jnp.int32).at[:, 0].set(rows.token)
    cache = out.past_key_values.stored_as(stored, cache_length)  # whose promise `_align` keeps
    return Decoded(DecodeState(rows, cache), tokens, jnp.ones((), jnp.int32))


_decode = jax.jit(decode, static_argnames=("model", "rules"), donate_argnames="decoded")


def _default_mask(ids: np.ndarray, config: GenerationConfig) -> np.ndarray:
    """As the reference infers it: pad tokens are padding, unless the pad token is a stop token as well."""
    pad = config.pad_token_id
    if pad is None or pad in config.stop_tokens:
        return np.ones_like(ids)
    return (ids != pad).astype(ids.dtype)


def _align(ids: np.ndarray, mask: np.ndarray, length: int, fill: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows moved to the right end of `length` columns, whichever side their padding was on. Padding becomes `fill`."""
    t = ids.shape[1]
    order = np.argsort(mask, axis=1, kind="stable")  # padding first, tokens in order
    ids, mask = np.take_along_axis(ids, order, 1), np.take_along_axis(mask, order, 1)
    ids = np.where(mask == 1, ids, fill)
    grow = ((0, 0), (length - t, 0))
    return np.pad(ids, grow, constant_values=fill).astype(np.int32), np.pad(mask, grow).astype(np.int32)


@dataclass
class _Run:
    """Prompts after their prefill: what `generate` and `stream` continue. input_ids: int32 (b, t), as given."""

    model: SmolVLMForConditionalGeneration
    params: Any
    config: GenerationConfig
    mesh: Mesh | None
    input_ids: np.ndarray
    decoded: Decoded

    def decode(self, end: int) -> None:
        """Decode until `end` columns are written, or every row has stopped: one program for any `end`."""
        rules, limit = Rules.of(self.config), np.asarray(end, np.int32)
        with activate(self.mesh):
            self.decoded = _decode(self.model, rules, self.params, self.decoded, limit)


def _checked(model, config: GenerationConfig, input_ids, attention_mask) -> tuple[np.ndarray, np.ndarray]:
    """Ids and mask, int32 (b, t) both. Raises InputError for what the model cannot read."""
    ids = np.asarray(input_ids)
    if ids.ndim != 2 or not ids.size or not np.issubdtype(ids.dtype, np.integer):
        raise InputError(f"input_ids must be integers of shape (batch, length), got {ids.dtype} {ids.shape}")
    text = model.config.text_config
    if ids.min() < 0 or ids.max() >= text.vocab_size:
        raise InputError(f"input_ids must lie in [0, {text.vocab_size}), got {ids.min()} … {ids.max()}")
    mask = _default_mask(ids, config) if attention_mask is None else np.asarray(attention_mask) != 0
    if mask.shape != ids.shape:
        raise InputError(f"attention_mask has shape {mask.shape}, input_ids {ids.shape}")
    if not mask.any(axis=1).all():
        raise InputError(f"row {int(np.argmin(mask.any(axis=1)))} of the batch is empty")
    longest, positions = int(mask.sum(axis=1).max()), text.max_position_embeddings
    if longest >= positions:
        raise InputError(f"prompt too long: {longest} tokens leave no room for an answer in the model's {positions} positions")
    return ids.astype(np.int32), mask.astype(np.int32)


def _row_settings(seed: int | Sequence[int], limits: np.ndarray) -> RowSettings:
    """An int gives row r stream r of its random numbers; a sequence gives each row the first stream of a seed of its own.

    Args:
        seed: as in `generate`.
        limits: (b,), on each row's new tokens; they are no part of the program where all are the same.
    """
    rows = len(limits)
    limit = None if (limits == limits[0]).all() else jnp.asarray(limits, jnp.int32)
    if isinstance(seed, int):
        return RowSettings(jnp.full(rows, seed % 2**32, jnp.uint32), jnp.arange(rows, dtype=jnp.uint32), limit=limit)
    return RowSettings(jnp.asarray(seed, jnp.uint32), jnp.zeros(rows, jnp.uint32), limit=limit)


def _start(
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
    kv_cache_dtype: str | None = None,
    **overrides,
) -> _Run:
    """Check the arguments of `generate` and `stream` on the host, pad them to buckets, run the prefill."""
    quantized = check_kv_cache_dtype(kv_cache_dtype)
    config = (generation_config or model.generation_config or GenerationConfig()).replace(**overrides)
    given, mask = _checked(model, config, input_ids, attention_mask)
    room = model.config.text_config.max_position_embeddings - mask.sum(axis=1)
    limits = np.minimum(room, min(config.max_new_tokens, room.max()))
    config = config.replace(max_new_tokens=int(limits.max()))
    tiles = None
    if pixel_values is not None:
        tiles = flat_tiles(model.config, np.asarray(pixel_values), pixel_attention_mask, num_tiles)
    pictures, count = (image_hidden_states, num_tiles) if tiles is None else (tiles.pixels, tiles.count)
    if pictures is not None:
        check_counts(model.config, np.where(mask == 1, given, -1), pictures, count)

    length = bucket(int(mask.sum(axis=1).max()))
    ids, mask = _align(given, mask, max(length, given.shape[1]), config.fill_token_id)
    inputs: dict[str, Any] = {"input_ids": ids[:, -length:], "attention_mask": mask[:, -length:]}
    if tiles is not None and tiles.count:
        inputs |= padded_tiles(tiles, bucket(int(tiles.count), 1))
    if image_hidden_states is not None:
        inputs["image_hidden_states"] = image_hidden_states
    settings = _row_settings(seed, limits)
    if mesh is not None:
        put = lambda x: jax.device_put(x, batch_sharding(mesh, np.shape(x)))
        inputs, settings = {name: put(x) for name, x in inputs.items()}, jax.tree.map(put, settings)
    tile = 64 if jax.default_backend() == "cpu" else 128  # a TPU's tiles have 128 columns, which the decode kernel wants whole
    cache_length = -(-(length + config.max_new_tokens) // tile) * tile
    text = model.config.text_config
    stored = CacheFormat.choose(text, cache_length, model.dtype, quantized=quantized, mesh=mesh)
    with activate(mesh):
        decoded = _prefill(model, Rules.of(config), cache_length, params, inputs, settings, stored)
    return _Run(model, params, config, mesh, given, decoded)


def _takes_prompts(
    start: Callable[_Arguments, _Run],
) -> Callable[[Callable[[_Run], _Out]], Callable[_Arguments, _Out]]:
    """Give a function of a `_Run` the signature of `start`, which makes the run of the arguments."""

    def decorate(function: Callable[[_Run], _Out]) -> Callable[_Arguments, _Out]:
        @functools.wraps(function)
        def call(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Out:
            return function(start(*args, **kwargs))

        returns = inspect.signature(function).return_annotation
        call.__signature__ = inspect.signature(start).replace(return_annotation=returns)  # type: ignore[attr-defined]
        return call

    return decorate


@_takes_prompts(_start)
def generate(run: _Run) -> np.ndarray:
    """Continue prompts until every row has drawn a stop token, max_new_tokens are drawn, or the model's positions are used up.

    Rows do not influence each other.

    Args:
        model: as `load` returns it.
        params: of the model.
        input_ids: int (b, t), padded on either side.
        attention_mask: (b, t), 1 = real. Default: pad tokens are padding.
        pixel_values, pixel_attention_mask, num_tiles, image_hidden_states: as in the model's forward. A processor's output can
            be passed as it is: `generate(model, params, **inputs, max_new_tokens=64)`.
        generation_config: how to continue. Default: what the checkpoint says.
        seed: an int, or one for each row.
        mesh: where `params` were placed.
        kv_cache_dtype: "int8" stores keys and values in 8 bits. Default: as the model computes.
        **overrides: fields of `GenerationConfig` that differ from `generation_config`.

    Returns:
        int32 (b, t + new): each row's prompt as given, then its new tokens; rows that stop early are filled with the pad
        token.

    Raises:
        InputError: for settings out of range, pictures and image tokens that disagree in number, and prompts that leave none of
            the model's positions.
    """
    run.decode(run.config.max_new_tokens)
    tokens, drawn, columns = jax.device_get((run.decoded.tokens, run.decoded.state.rows.drawn, run.decoded.columns))
    own = np.arange(columns) < drawn[:, None]
    return np.concatenate([run.input_ids, np.where(own, tokens[:, :columns], np.int32(run.config.fill_token_id))], axis=1)


@_takes_prompts(_start)
def stream(run: _Run) -> Iterator[np.ndarray]:
    """Yield the tokens that `generate` would return, int32 (b,) for each step, as soon as they are drawn.

    Arguments as in `generate`. Ends after the step in which the last row stops; rows that stopped before yield the pad token.
    Mistakes are raised by the call itself, not by the first step.
    """
    for step in range(1, run.config.max_new_tokens + 1):
        if step > 1:
            run.decode(step)
        rows = run.decoded.state.rows
        token, drawn, finished = jax.device_get((rows.token, rows.drawn, rows.finished))
        yield np.where(drawn == step, token, np.int32(run.config.fill_token_id))
        if finished.all():
            return
