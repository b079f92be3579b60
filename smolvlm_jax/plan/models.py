"""The model that a plan is about, without its weights."""

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from ..arguments import parse_mesh
from ..convert.opened import open_checkpoint
from ..errors import InputError, MissingFileError
from ..model import SmolVLMForConditionalGeneration
from ..parameters import abstract_params, logical_axes, with_scales
from ..retrieval_model import model_of, require_text
from ..sharding import make_mesh, parameter_shardings
from ..sizes import PUBLISHED, published_config
from .settings import SHORT_NAMES, PlanConfig

__all__ = ["abstract_weights", "describe", "given_mesh", "in_8_bits"]


def given_mesh(config: PlanConfig, devices: Sequence[Any]) -> Mesh:
    """The mesh of a plan on these devices; all of them to data where it names none.

    Raises:
        InputError: it has another number of devices.
    """
    sizes = parse_mesh(config.mesh) or {"data": len(devices)}
    try:
        return make_mesh(**sizes, devices=devices)
    except InputError as error:
        raise InputError(f"--mesh {config.mesh}: {error}; --on {config.on or 'here'} has {len(devices)}") from error


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
        InputError: its model makes no text.
    """
    if name := _published(source):
        config = published_config(name)
    else:
        try:
            with open_checkpoint(source) as opened:
                config = opened.model_config
        except MissingFileError as error:
            if "/" in str(source) or os.path.exists(source):
                raise
            raise MissingFileError(f"{error}; not a size ({', '.join(SHORT_NAMES)})") from error
    if layers is not None:
        config = config.replace(
            vision_config=replace(config.vision_config, num_hidden_layers=layers[0]),
            text_config=replace(config.text_config, num_hidden_layers=layers[1]),
        )
    model = model_of(config, dtype=jnp.dtype(dtype), **fields)
    require_text(model)
    return model


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
