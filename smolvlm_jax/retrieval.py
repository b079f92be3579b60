"""Retrieval of pages with ColSmolVLM: prompts, `embed`, and the score of a query and a page.

    model, params = load("vidore/colSmol-256M")
    pages = embed(model, params, **processor(text=[PAGE_PROMPT], images=[[page]], return_tensors="np", pixel_format="uint8"))
    queries = embed(model, params, **processor(text=[query_prompt("total of the invoice")], return_tensors="np"))
    scores = max_sim(queries, pages)

The prompts are those of colpali-engine's ColIdefics3Processor.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .errors import InputError
from .pictures import check_counts, flat_tiles, padded_tiles
from .precision import matmul_precision
from .prompt_arrays import bucket
from .retrieval_model import ColIdefics3
from .sharding import activate, batch_sharding

__all__ = ["PAGE_PROMPT", "embed", "max_sim", "query_prompt"]

PAGE_PROMPT = "<|im_start|>User:<image>Describe the image.<end_of_utterance>\nAssistant:"
_QUERY_END = "<end_of_utterance>" * 10


def query_prompt(text: str) -> str:
    """The prompt of a query: its text and ten tokens more, whose vectors the model makes from all of it.

    Args:
        text: the query.

    Returns:
        The prompt, which the processor tokenizes as it is.
    """
    return text + _QUERY_END


@functools.partial(jax.jit, static_argnames=("model", "images_only"))
def _vectors(model, params, images_only: bool, inputs: dict[str, Any]) -> jax.Array:
    return model.apply({"params": params}, images_only=images_only, **inputs)


def embed(
    model: ColIdefics3,
    params: Any,
    input_ids: Any,
    attention_mask: Any = None,
    pixel_values: Any = None,
    pixel_attention_mask: Any = None,
    *,
    num_tiles: Any = None,
    images_only: bool = False,
    mesh: jax.sharding.Mesh | None = None,
) -> jax.Array:
    """The vectors of prompts: one for each token, of length 1, and zeros at padding.

    Shapes are rounded up to a few buckets, as in `generate`.

    Args:
        model: a retrieval model, as `load` returns it.
        params: of the model.
        input_ids: int (b, t), padded on either side.
        attention_mask: (b, t), 1 = real. Default: all are.
        pixel_values, pixel_attention_mask, num_tiles: as in the model's forward; a processor's output can be passed as it is.
        images_only: zeros for the tokens that stand for no picture too, if there are pictures.
        mesh: where `params` were placed.

    Returns:
        (b, t, e) in the model's dtype.

    Raises:
        InputError: the model is no retrieval model, or pictures and image tokens disagree in number.
    """
    if not isinstance(model, ColIdefics3):
        raise InputError("this model makes text and no vectors: embed() is for retrieval models, such as ColSmolVLM")
    ids = np.asarray(input_ids)
    mask = np.ones_like(ids) if attention_mask is None else np.asarray(attention_mask)
    if ids.ndim != 2 or mask.shape != ids.shape:
        raise InputError(f"input_ids and attention_mask must have one shape (batch, length), got {ids.shape} and {mask.shape}")
    length = bucket(ids.shape[1])
    grow = ((0, 0), (0, length - ids.shape[1]))
    inputs: dict[str, Any] = {"input_ids": np.pad(ids, grow).astype(np.int32), "attention_mask": np.pad(mask, grow)}
    if pixel_values is not None:
        tiles = flat_tiles(model.config, np.asarray(pixel_values), pixel_attention_mask, num_tiles)
        check_counts(model.config, np.where(mask != 0, ids, -1), tiles.pixels, tiles.count)
        if tiles.count:
            inputs |= padded_tiles(tiles, bucket(int(tiles.count), 1))
    if mesh is not None:
        inputs = {name: jax.device_put(x, batch_sharding(mesh, np.shape(x))) for name, x in inputs.items()}
    with activate(mesh):
        return _vectors(model, params, images_only, inputs)[:, : ids.shape[1]]


def max_sim(queries: jax.Array, pages: jax.Array) -> jax.Array:
    """Late interaction: for each vector of a query its largest product with a vector of the page, summed over the query.

    Vectors of zeros, as `embed` makes them of padding, add nothing to a query; a page's count like any other vector, as in
    colpali-engine's `score_multi_vector`.

    Args:
        queries: (q, t, e).
        pages: (p, s, e).

    Returns:
        float32 (q, p).

    Raises:
        InputError: the shapes do not fit each other.
    """
    queries, pages = jnp.asarray(queries), jnp.asarray(pages)
    if queries.ndim != 3 or pages.ndim != 3 or queries.shape[-1] != pages.shape[-1]:
        raise InputError(f"queries (q, t, e) and pages (p, s, e) have the shapes {queries.shape} and {pages.shape}")
    products = jnp.einsum(
        "qte,pse->qpts", queries, pages, precision=matmul_precision(queries.dtype), preferred_element_type=jnp.float32
    )
    return products.max(-1).sum(-1)
