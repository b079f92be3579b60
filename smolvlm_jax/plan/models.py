"""The model that a plan is about, without its weights."""

import os
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from ..convert.opened import open_checkpoint
from ..model import SmolVLMForConditionalGeneration
from ..parameters import abstract_params, logical_axes, with_scales
from ..sharding import parameter_shardings
from ..sizes import PUBLISHED, published_config

__all__ = ["abstract_weights", "describe", "in_8_bits"]


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
    if name := _published(source):
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


def in_8_bits(source: str | os.PathLike) -> bool:
    """Whether a checkpoint's weights are stored in 8 bits; a published size's are not."""
    if _published(source):
        return False
    with open_checkpoint(source) as opened:
        return opened.quantized is not None


def _published(source: str | os.PathLike) -> str | None:
    """The name of a published size, or None for a checkpoint."""
    name = str(source).removeprefix("shape:").rsplit("/", 1)[-1]
    return name if name in PUBLISHED else None


def abstract_weights(model: SmolVLMForConditionalGeneration, mesh: Mesh, dtype: Any, *, quantized: bool = False) -> Any:
    """The parameters as ShapeDtypeStructs, in a dtype, or matrices in 8 bits, and placed as `load` places them."""
    shapes, axes = abstract_params(model, dtype), logical_axes(model)
    if quantized:
        shapes, axes = with_scales(model, shapes), with_scales(model, axes)
    shardings = parameter_shardings(shapes, axes, mesh)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)
