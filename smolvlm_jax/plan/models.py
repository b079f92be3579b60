"""The model that a plan is about, without its weights."""

import os
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from ..convert.opened import open_checkpoint
from ..model import SmolVLMForConditionalGeneration
from ..parameters import abstract_params, logical_axes
from ..sharding import parameter_shardings
from ..sizes import PUBLISHED, published_config

__all__ = ["abstract_weights", "describe"]


def describe(
    source: str | os.PathLike, *, dtype: Any, layers: tuple[int, int] | None = None, **fields: Any
) -> SmolVLMForConditionalGeneration:
    """The model of a checkpoint, of which only the configuration is read.

    Args:
        source: a published size, as NAME, OWNER/NAME or "shape:NAME", which needs no files; else what `load` takes.
        dtype: of the computation.
        layers: how many of encoder and decoder to keep. Default: all.
        **fields: of the model.

    Raises:
        CheckpointError: the checkpoint cannot be read.
    """
    name = str(source).removeprefix("shape:").rsplit("/", 1)[-1]
    if name in PUBLISHED:
        config = published_config(name)
    else:
        with open_checkpoint(source) as opened:
            config = opened.model_config
    if layers is not None:
        config = config.replace(
            vision_config=replace(config.vision_config, num_hidden_layers=layers[0]),
            text_config=replace(config.text_config, num_hidden_layers=layers[1]),
        )
    return SmolVLMForConditionalGeneration(config, dtype=jnp.dtype(dtype), **fields)


def abstract_weights(model: SmolVLMForConditionalGeneration, mesh: Mesh, dtype: Any) -> Any:
    """The parameters as ShapeDtypeStructs, in a dtype and placed as `load` places them."""
    shapes = abstract_params(model, dtype)
    shardings = parameter_shardings(shapes, logical_axes(model), mesh)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)
