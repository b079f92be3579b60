"""From a batch to its loss: tiles encoded a few at a time, features put where they belong, a loss without logits."""

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from ..model import SmolVLMForConditionalGeneration
from ..sharding import constrain
from .lora import product
from .loss import chunked_loss, next_token_targets

__all__ = ["Batch", "image_features", "output_kernel", "token_losses"]

Batch = Mapping[str, jax.Array]
_NOT_INPUTS = ("labels", "tile_mask")


def token_losses(
    model: SmolVLMForConditionalGeneration, params, batch: Batch, *, tile_chunk: int | None = None, loss_chunk: int = 256
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Sum of cross-entropies over labelled tokens, their number, and how many of them the model ranks first.

    batch: input_ids and labels int (b, t), labels -100 wherever nothing is to be learned; attention_mask or segment_ids (b, t);
    pixel_values uint8 (N, T, T, 3) with num_tiles (), or with tile_mask bool (N,) where padding may stand between real tiles
    (each host brings its own); or no pictures. Other layouts of pixel_values go to the model as they are.
    """
    inputs = {k: v for k, v in batch.items() if k not in _NOT_INPUTS}
    pixels = inputs.get("pixel_values")
    if pixels is not None and pixels.dtype == jnp.uint8:
        del inputs["pixel_values"]
        features, inputs["num_tiles"] = image_features(model, params, batch, tile_chunk)
        inputs["image_hidden_states"] = features
    hidden = model.apply({"params": params}, method=lambda m: m.model(**inputs).last_hidden_state)
    targets = next_token_targets(batch["labels"], batch.get("segment_ids"))
    kernel = output_kernel(model, params)
    tied = model.config.tie_word_embeddings
    return chunked_loss(hidden, kernel, targets, chunk=loss_chunk, tied=tied, dtype=model.dtype)


def image_features(
    model: SmolVLMForConditionalGeneration, params, batch: Batch, chunk: int | None = None
) -> tuple[jax.Array, jax.Array]:
    """Image tokens (N, tokens, d) of a flat batch of tiles, real ones first, and the number of real ones.

    chunk: tiles that a device encodes at a time. Chunks without a real tile on any device cost nothing, and the memory of the
    encoder's attention is one chunk's.
    """
    tiles = batch["pixel_values"]
    count = len(tiles)
    mask = batch.get("tile_mask")
    number = batch.get("num_tiles", count) if mask is None else mask.sum()
    real = jnp.arange(count) < number if mask is None else mask.astype(bool)
    encode = lambda x: model.apply({"params": params}, x, method="get_image_features")[0]
    ways = _ways(count)
    steps, chunk = _steps(count // ways, chunk)
    if steps == 1:
        features = encode(tiles)
    else:
        # Every device takes the next few of its own tiles in each step, so that nothing moves.
        spread = lambda x: x.reshape(ways, steps, chunk, *x.shape[1:]).swapaxes(0, 1).reshape(steps, -1, *x.shape[1:])
        parts = (constrain(spread(tiles), None, "tile", *[None] * 3), spread(real))
        shape = jax.eval_shape(encode, jax.ShapeDtypeStruct((ways * chunk, *tiles.shape[1:]), tiles.dtype))

        def part(carry, xs):
            x, here = xs
            return carry, jax.lax.cond(here.any(), encode, lambda _: jnp.zeros(shape.shape, shape.dtype), x)

        features = jax.lax.scan(part, None, parts)[1]
        features = features.reshape(steps, ways, chunk, *features.shape[2:]).swapaxes(0, 1)
        features = features.reshape(count, *features.shape[3:])
    if mask is not None:
        features = features[jnp.argsort(~real, stable=True)]
    return features, number


def _ways(count: int) -> int:
    """Into how many devices' parts the tiles of a batch fall."""
    mesh = jax.sharding.get_abstract_mesh()
    ways = 1 if mesh.empty else math.prod(mesh.shape.get(axis, 1) for axis in ("data", "fsdp"))
    return ways if count % ways == 0 else 1


def _steps(count: int, chunk: int | None) -> tuple[int, int]:
    """(steps, tiles a step) with at most `chunk` tiles a step: the largest number that divides."""
    if chunk is None or chunk >= count:
        return 1, count
    size = next(n for n in range(chunk, 0, -1) if count % n == 0)
    return count // size, size


def output_kernel(model: SmolVLMForConditionalGeneration, params) -> jax.Array:
    """The head's kernel (d, v), or where it is tied the embedding (v, d); an adapter on it is added in."""
    if model.config.tie_word_embeddings:
        return params["model"]["text_model"]["embed_tokens"]["embedding"]
    head = params["lm_head"]
    if "lora_a" not in head:
        return head["kernel"]
    return head["kernel"] + product(head["lora_a"], head["lora_b"], 1.0, head["kernel"].shape)
