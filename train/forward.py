"""From a batch to its loss: tiles encoded a few at a time, features merged row by row, a loss that never holds all logits.

A batch has its tiles by row, pixel_values (b, n, T, T, 3), each row's own tiles first. So nothing about pictures crosses rows,
and therefore hosts and devices: features reach their image tokens by indices within the row.

In a flat batch of tiles with one order over all rows, the gather of features into image tokens and its gradient each cross the
devices: 204 MB in the step of full-500m-fsdp (832 tiles, v5e:2x4). By the TPU compiler that step, flat and by row: collectives
850 and 645 MB, temporaries 8.9 and 8.1 GB, in all 9.9 and 9.1 GB a chip.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from ..merge import merge_image_features
from ..model import SmolVLMForConditionalGeneration
from ..quantization import dequantized
from ..sharding import constrain
from .lora import product
from .loss import chunked_loss, next_token_targets, row_axes

__all__ = ["Batch", "image_features", "output_kernel", "token_losses"]

Batch = Mapping[str, Any]  # arrays by name


def token_losses(
    model: SmolVLMForConditionalGeneration,
    params: dict,
    batch: Batch,
    *,
    tile_chunk: int | None = None,
    loss_chunk: int = 256,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Sum of cross-entropies over labelled tokens, their number, and how many of them the model ranks first.

    Args:
        model: the model.
        params: its parameters; adapters may stand beside kernels.
        batch: input_ids and labels int (b, t), labels -100 where nothing is learned; attention_mask or segment_ids (b, t);
            pixel_values uint8 (b, n, T, T, 3) with tile_mask bool (b, n), or no pictures. The other layouts that the model
            accepts (float pixels, flat tiles) are passed to it as they are.
        tile_chunk: tiles that one device encodes at a time; default: all.
        loss_chunk: tokens of one device whose logits exist at a time.

    Returns:
        () float32, () int32, () int32.
    """
    inputs: dict[str, Any] = {name: value for name, value in batch.items() if name != "labels"}
    mask = inputs.pop("tile_mask", None)
    if mask is None:
        last_hidden = lambda m: m.model(**inputs).last_hidden_state
    else:
        ids = inputs.pop("input_ids")
        features = image_features(model, params, inputs.pop("pixel_values"), mask, tile_chunk)

        def last_hidden(m: SmolVLMForConditionalGeneration) -> jax.Array:
            embeds = _merge_rows(m.model.embed(ids), ids == model.config.image_token_id, features, mask.sum(1))
            return m.model(inputs_embeds=embeds, **inputs).last_hidden_state

    hidden: Any = model.apply({"params": params}, method=last_hidden)
    targets = next_token_targets(batch["labels"], batch.get("segment_ids"))
    kernel = output_kernel(model, params)
    tied = model.config.tie_word_embeddings
    return chunked_loss(hidden, kernel, targets, chunk=loss_chunk, tied=tied, dtype=model.dtype)


def _merge_rows(embeds: jax.Array, slots: jax.Array, features: jax.Array, counts: jax.Array) -> jax.Array:
    """Each row's features (b, n, tokens, d) in its own image tokens; counts (b,): how many of the n tiles are real."""
    one = lambda e, s, f, count: merge_image_features(e[None], s[None], f, count)[0]
    return jax.vmap(one)(embeds, slots, features, counts)


def image_features(
    model: SmolVLMForConditionalGeneration, params: dict, tiles: jax.Array, mask: jax.Array, chunk: int | None = None
) -> jax.Array:
    """Image tokens (b, n, tokens, d) of tiles uint8 (b, n, T, T, 3).

    Args:
        model: the model.
        params: its parameters.
        tiles: each row's own tiles, real ones first.
        mask: bool (b, n), which are real.
        chunk: tiles that a device encodes at a time. The encoder's activations are those of one chunk, and a chunk without a
            real tile on any device costs nothing: the first tiles of all rows come first.
    """
    b, n = mask.shape
    rest = tiles.shape[2:]
    encode = lambda x: model.apply({"params": params}, x, method="get_image_features")[0]
    ways = math.prod(row_axes(b).values())
    rows = b // ways
    size = rows * n if chunk is None else next(k for k in range(min(chunk, rows * n), 0, -1) if rows * n % k == 0)
    steps = rows * n // size
    if steps == 1:
        features = encode(tiles.reshape(b * n, *rest))
        return features.reshape(b, n, *features.shape[1:])

    def spread(x: jax.Array) -> jax.Array:
        """(b, n, …) -> (steps, ways · size, …): in each step every device takes some of its own tiles, so nothing moves."""
        x = x.reshape(ways, rows, n, *x.shape[2:]).swapaxes(1, 2)
        return x.reshape(ways, steps, size, *x.shape[3:]).swapaxes(0, 1).reshape(steps, ways * size, *x.shape[3:])

    parts = (constrain(spread(tiles), None, "tile", *[None] * 3), spread(mask.astype(bool)))
    shape = jax.eval_shape(encode, jax.ShapeDtypeStruct((ways * size, *rest), tiles.dtype))

    def part(carry, xs):
        x, real = xs
        return carry, jax.lax.cond(real.any(), encode, lambda _: jnp.zeros(shape.shape, shape.dtype), x)

    features = jax.lax.scan(part, None, parts)[1]
    features = features.reshape(steps, ways, size, *shape.shape[1:]).swapaxes(0, 1)
    return features.reshape(ways, n, rows, *shape.shape[1:]).swapaxes(1, 2).reshape(b, n, *shape.shape[1:])


def output_kernel(model: SmolVLMForConditionalGeneration, params) -> jax.Array:
    """The head's kernel (d, v), or where it is tied the embedding (v, d); an adapter on it is added in."""
    if model.config.tie_word_embeddings:
        return dequantized(params["model"]["text_model"]["embed_tokens"], model.dtype)["embedding"]
    head = dequantized(params["lm_head"], model.dtype)
    if "lora_a" not in head:
        return head["kernel"]
    return head["kernel"] + product(head["lora_a"], head["lora_b"], 1.0, head["kernel"].shape)
