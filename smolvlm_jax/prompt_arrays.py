"""The arguments of `generate` as arrays for the device: checked on the host, repeated, padded to buckets.

Shapes are rounded up to a few buckets, so that prompts of all lengths and pictures of all sizes share a handful of compiled
programs: prompt length and number of tiles to 2^k or 3·2^(k-1). On a CPU, where padding costs more than a compilation, prompts
beyond 1,024 tokens take eighths of a power of two.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.linen import Module
from jax.sharding import Mesh

from .decoding import RowSettings
from .errors import InputError
from .field_types import check_kind
from .generation_config import GenerationConfig
from .model import SmolVLMForConditionalGeneration, check_unpacked
from .pictures import Tiles, check_counts, flat_tiles, padded_tiles, repeated_tiles
from .restrictions import recent_tokens

__all__ = ["PromptArrays", "bucket", "check_model", "padded_length", "prompt_arrays"]


def bucket(n: int, smallest: int = 32) -> int:
    """The smallest size of the form 2^k or 3·2^(k-1) that holds `n`.

    At most a third of it is padding, and there are few sizes up to 8,192.

    Args:
        n: what is to be held.
        smallest: the first size, a power of 2.
    """
    power = max(smallest, 1 << max(n - 1, 0).bit_length())
    return power * 3 // 4 if power > max(smallest, 2) and n <= power * 3 // 4 else power


def padded_length(tokens: int) -> int:
    """The length to which a batch of prompts is padded.

    Args:
        tokens: of the longest prompt.

    Returns:
        `bucket(tokens)`; on a CPU, beyond 1,024 tokens, the next eighth of a power of two.
    """
    if jax.default_backend() != "cpu" or tokens <= 1024:
        return bucket(tokens)
    step = 1 << (tokens - 1).bit_length() - 4
    return -(-tokens // step) * step


@dataclass(frozen=True)
class PromptArrays:
    """A batch of prompts, ready for the device.

    Attributes:
        input_ids: int32 (b, t), as given, each row as often as it is continued; (b, 0) for prompts given as embeddings.
        inputs: arguments of the model, left-padded to a bucket: attention_mask, input_ids or inputs_embeds or both, pictures;
            and `recent`, what `restrictions.restrict` reads.
        settings: what may differ from row to row.
        config: with the limits of this batch.
        length: columns of the padded prompts.
    """

    input_ids: np.ndarray
    inputs: dict[str, Any]
    settings: RowSettings
    config: GenerationConfig
    length: int


@dataclass(frozen=True)
class _Prompts:
    """Prompts as given. Of ids and embeddings one may be None.

    Attributes:
        ids: int32 (b, t).
        embeds: (b, t, d).
        mask: int32 (b, t).
    """

    ids: np.ndarray | None
    embeds: np.ndarray | None
    mask: np.ndarray

    def repeated(self, times: int) -> "_Prompts":
        """Every row so many times, one after the other."""
        again = lambda x: None if x is None else np.repeat(x, times, axis=0)
        return _Prompts(again(self.ids), again(self.embeds), np.repeat(self.mask, times, axis=0))

    def aligned(self, length: int, fill: int) -> dict[str, np.ndarray]:
        """Rows moved to the right end of `length` columns, whichever side their padding was on. Padding becomes `fill`."""
        t = self.mask.shape[1]
        order = np.argsort(self.mask, axis=1, kind="stable")  # padding first, tokens in order
        mask = np.take_along_axis(self.mask, order, 1)
        grow = max(length - t, 0)
        found = {"attention_mask": np.pad(mask, ((0, 0), (grow, 0))).astype(np.int32)}
        if self.ids is not None:
            ids = np.where(mask == 1, np.take_along_axis(self.ids, order, 1), fill)
            found["input_ids"] = np.pad(ids, ((0, 0), (grow, 0)), constant_values=fill).astype(np.int32)
        if self.embeds is not None:
            embeds = np.take_along_axis(self.embeds, order[..., None], 1)
            found["inputs_embeds"] = np.pad(embeds, ((0, 0), (grow, 0), (0, 0)))
        return {name: value[:, -length:] for name, value in found.items()}


def check_model(model: Any, params: Any, mesh: Any) -> None:
    """Raise InputError for what is no model, no parameters or no mesh."""
    check_kind("model", model, Module, "a model and its parameters: model, params = load(source); generate(model, params, …)")
    check_kind("params", params, Mapping, "the parameters that load(source) gave with the model")
    if set(params) == {"params"}:
        raise InputError('params has the parameters one level down: pass params["params"]')
    if mesh is not None:
        check_kind("mesh", mesh, Mesh, "what make_mesh(data=…, fsdp=…, tensor=…) gives")


def prompt_arrays(
    model: SmolVLMForConditionalGeneration,
    config: GenerationConfig,
    *,
    input_ids: Any,
    inputs_embeds: Any,
    attention_mask: Any,
    pixel_values: Any,
    pixel_attention_mask: Any,
    num_tiles: Any,
    image_hidden_states: Any,
    seed: int | Sequence[int],
    pad_tiles: bool,
) -> PromptArrays:
    """The arguments of `generate`, where they are described; `pad_tiles`: tiles are padded to a bucket too.

    Raises:
        InputError: they contradict each other, or the model cannot read them.
    """
    prompts = _checked(model, config, input_ids, inputs_embeds, attention_mask)
    config = config.for_prompt(prompts.mask.shape[1])
    tiles, features = None, image_hidden_states
    if pixel_values is not None:
        tiles = flat_tiles(model.config, np.asarray(pixel_values), pixel_attention_mask, num_tiles)
    pictures, count = (features, num_tiles) if tiles is None else (tiles.pixels, tiles.count)
    shown = None if prompts.ids is None else np.where(prompts.mask == 1, prompts.ids, -1)
    if pictures is not None:
        check_counts(model.config, shown, pictures, count)
    elif shown is not None and prompts.embeds is None:
        slots = int((shown == model.config.image_token_id).sum())
        if slots:  # the forward itself reads their embeddings, as the reference does; nobody means that
            raise InputError(
                f"the prompt has {slots} image tokens (id {model.config.image_token_id}), and no pictures are given: pass all "
                "that the processor returned, pixel_values too, generate(model, params, **inputs)"
            )
    times = config.num_return_sequences
    if times > 1:
        if not config.do_sample:
            raise InputError(f"num_return_sequences={times} needs do_sample=True: greedy answers would be the same")
        if pictures is not None:
            if shown is None:
                raise InputError("num_return_sequences above 1 with pictures needs input_ids, which say whose they are")
            places = repeated_tiles(model.config, shown, pictures, times)
            features = None if features is None else jnp.asarray(features)[places]
            if tiles is not None:
                mask = None if tiles.mask is None else tiles.mask[places]
                tiles = Tiles(tiles.pixels[places], len(places), mask)
        prompts = prompts.repeated(times)
    room = model.config.text_config.max_position_embeddings - prompts.mask.sum(axis=1)
    limits = np.minimum(room, min(config.max_new_tokens or 0, room.max()))
    config = config.replace(max_new_tokens=int(limits.max()))
    length = padded_length(int(prompts.mask.sum(axis=1).max()))
    inputs: dict[str, Any] = dict(prompts.aligned(length, config.fill_token_id))
    if tiles is not None and tiles.count:
        inputs |= padded_tiles(tiles, bucket(int(tiles.count), 1) if pad_tiles else int(tiles.count))
    if features is not None:
        inputs["image_hidden_states"] = features
    rows = len(prompts.mask)
    given = np.zeros((rows, 0), np.int32) if prompts.ids is None else prompts.ids
    recent = recent_tokens(inputs["input_ids"] if prompts.ids is not None else given, config.bad_words)
    if recent is not None:
        inputs["recent"] = recent
    return PromptArrays(given, inputs, _row_settings(seed, limits, times), config, length)


def _default_mask(ids: np.ndarray, config: GenerationConfig) -> np.ndarray:
    """As the reference infers it: pad tokens are padding, unless the pad token is a stop token as well."""
    pad = config.pad_token_id
    if pad is None or pad in config.stop_tokens:
        return np.ones_like(ids)
    return (ids != pad).astype(ids.dtype)


def _checked(model: Any, config: GenerationConfig, input_ids: Any, inputs_embeds: Any, attention_mask: Any) -> _Prompts:
    """Prompts and their mask. Raises InputError for what the model cannot read."""
    if input_ids is None and inputs_embeds is None:
        raise InputError("pass input_ids or inputs_embeds: generate(model, params, **inputs) with what a processor returned")
    text = model.config.text_config
    ids = embeds = None
    if input_ids is not None:
        check_unpacked("input_ids", input_ids)
        try:
            ids = np.asarray(input_ids)
        except ValueError as error:
            raise InputError("input_ids has rows of unlike length: pad them to one, with an attention_mask") from error
        if ids.ndim != 2 or not ids.size or not np.issubdtype(ids.dtype, np.integer):
            raise InputError(f"input_ids must be integers of shape (batch, length), got {ids.dtype} {ids.shape}")
        if ids.min() < 0 or ids.max() >= text.vocab_size:
            raise InputError(f"input_ids must lie in [0, {text.vocab_size}), got {ids.min()} … {ids.max()}")
    if inputs_embeds is not None:
        embeds = np.asarray(inputs_embeds)
        if embeds.ndim != 3 or not embeds.size or embeds.shape[2] != text.hidden_size:
            raise InputError(f"inputs_embeds must have shape (batch, length, {text.hidden_size}), got {embeds.shape}")
        if ids is not None and ids.shape != embeds.shape[:2]:
            raise InputError(f"input_ids has shape {ids.shape}, inputs_embeds {embeds.shape}")
    shape = ids.shape if ids is not None else embeds.shape[:2]  # type: ignore[union-attr]
    if attention_mask is not None:
        mask = np.asarray(attention_mask) != 0
    else:
        mask = np.ones(shape, bool) if ids is None or embeds is not None else _default_mask(ids, config)
    if mask.shape != shape:
        raise InputError(f"attention_mask has shape {mask.shape}, the prompts {shape}")
    if not mask.any(axis=1).all():
        raise InputError(f"row {int(np.argmin(mask.any(axis=1)))} of the batch is empty")
    longest, positions = int(mask.sum(axis=1).max()), text.max_position_embeddings
    if longest >= positions:
        raise InputError(f"prompt too long: {longest} tokens leave no room for an answer in the model's {positions} positions")
    return _Prompts(None if ids is None else ids.astype(np.int32), embeds, mask.astype(np.int32))


def _row_settings(seed: int | Sequence[int], limits: np.ndarray, times: int) -> RowSettings:
    """An int gives row r stream r of its random numbers; a sequence gives each prompt the first streams of a seed of its own.

    Args:
        seed: as in `generate`.
        limits: (b,), on each row's new tokens; they are no part of the program where all are the same.
        times: rows of each prompt.
    """
    rows = len(limits)
    limit = None if (limits == limits[0]).all() else jnp.asarray(limits, jnp.int32)
    if np.asarray(seed).dtype.kind not in "iu":
        raise InputError(f"seed is {seed!r:.60}; it needs a whole number, or one for each prompt")
    if np.ndim(seed) == 0:
        seeds, streams = np.full(rows, int(seed) % 2**32), np.arange(rows)  # type: ignore[arg-type]
    else:
        seeds, streams = np.repeat(np.asarray(seed), times), np.tile(np.arange(times), rows // times)
        if len(seeds) != rows:
            raise InputError(f"{len(seeds) // times} seeds for {rows // times} prompts")
    return RowSettings(jnp.asarray(seeds, jnp.uint32), jnp.asarray(streams, jnp.uint32), limit=limit)
