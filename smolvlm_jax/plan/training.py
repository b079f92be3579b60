"""What a training step needs on a chip: the recipe's own step compiled, its memory by kind."""

from dataclasses import replace
from typing import Any

import jax
from jax.sharding import Mesh

from ..errors import ConfigError, InputError
from ..sharding import activate
from ..train.checks import check_length
from ..train.config import MeshConfig, TrainConfig
from ..train.devices import check_rows, open_mesh
from ..train.packing import BatchShape
from ..train.partition import Partition
from ..train.recipes import load_recipe
from ..train.state import TrainState, abstract_state
from ..train.step import batch_placement, jit_step
from .figures import Cost, Memory, excess
from .flops import flops
from .measure import Measurer, TooLarge, held_bytes
from .models import describe, given_mesh, in_8_bits
from .settings import PlanConfig

__all__ = ["abstract_inputs", "measure_step", "recipe_of", "training_mesh", "training_model"]


def recipe_of(config: PlanConfig) -> TrainConfig:
    """The recipe that a plan is about, its model, dtype and attention replaced by the plan's where they are given."""
    assert config.recipe is not None
    recipe = load_recipe(config.recipe, config.overrides)
    recipe = recipe if config.model is None else replace(recipe, model=config.full_name)
    attention = recipe.attention if config.attention == "auto" else config.attention
    return replace(recipe, dtype=config.dtype or recipe.dtype or "bfloat16", attention=attention)


def training_model(recipe: TrainConfig) -> Any:
    """The model of a recipe, without its weights."""
    return describe(
        recipe.model,
        dtype=recipe.dtype or "bfloat16",
        remat=recipe.remat,
        scan_layers=recipe.scan_layers,
        attention=recipe.attention,
    )


def training_mesh(config: PlanConfig, recipe: TrainConfig, devices: Any) -> Mesh:
    """The mesh of the plan, or else that of the recipe.

    Raises:
        InputError: these are not its devices.
        ConfigError: they cannot share the recipe's batch.
    """
    if config.mesh is not None:
        mesh = given_mesh(config, devices)
        recipe = replace(recipe, mesh=MeshConfig(**mesh.shape))
    else:
        try:
            mesh = open_mesh(recipe.mesh, devices)
        except (ConfigError, InputError) as error:
            raise InputError(f"{error}: give --mesh, or other chips with --on") from error
    check_rows(recipe, mesh)
    return mesh


def abstract_inputs(model: Any, partition: Partition, mesh: Mesh) -> tuple[TrainState, dict, dict]:
    """(state, base, batch) of a step as ShapeDtypeStructs that carry their shardings."""
    config, vision = partition.config, model.config.vision_config
    shape = BatchShape.of(
        config.data,
        rows=config.data.batch_size,
        image_seq_len=model.config.image_seq_len,
        tile_size=vision.image_size,
    )
    stack = (config.accumulation,) if config.accumulation > 1 else ()
    batch = {}
    for name, (dimensions, dtype) in shape.arrays().items():
        whole = (*stack, *dimensions)
        batch[name] = jax.ShapeDtypeStruct(whole, dtype, sharding=batch_placement(mesh, whole, stacked=bool(stack)))
    return abstract_state(partition, mesh), partition.abstract_base(mesh), batch


def measure_step(recipe: TrainConfig, mesh: Mesh, measurer: Measurer) -> tuple[Cost, Memory]:
    """Compile the step of a recipe.

    Raises:
        ConfigError: a row is longer than the model's positions.
        InputError: it does not fit; the message says by how much, and what to lower.
    """
    model = training_model(recipe)
    check_length(recipe.data, model.config.text_config)
    quantized = in_8_bits(recipe.model)
    partition = Partition.of(model, recipe, quantized=quantized)
    # Outside the mesh: the optimiser's zeros would be put on its devices, which may not exist.
    inputs, step = abstract_inputs(model, partition, mesh), jit_step(model, partition, mesh)
    plain = training_model(replace(recipe, attention="einsum", scan_layers=False, remat="none"))
    plain_step = jit_step(plain, Partition.of(plain, recipe, quantized=quantized), mesh)
    state, base, batch = inputs
    name = f"step of {recipe.data.batch_size} × {recipe.data.length}"
    with activate(mesh):
        held = {
            "weights": held_bytes((state.params, base)),
            "optimizer": held_bytes((state.opt_state, state.step, state.skipped)),
            "batch": held_bytes(batch),
        }
        work = flops(plain_step, *inputs) / mesh.size
        usable = measurer.chip.usable if measurer.chip else None
        try:
            cost = measurer.cost(name, step.lower(*inputs), flops=work, input_bytes=held["batch"])
        except TooLarge as error:
            raise InputError(_too_large(recipe, error.needed, error.usable or usable)) from error
    kinds = {
        **held,
        "temporaries": cost.temporary_bytes,
        "results": cost.output_bytes - cost.alias_bytes,
        "code": cost.code_bytes,
    }
    memory = Memory(kinds=kinds, largest=cost.name, usable=usable)
    if usable is not None and memory.total > usable:
        raise InputError(_too_large(recipe, memory.total, usable))
    return cost, memory


def _too_large(recipe: TrainConfig, needed: int | None, usable: int | None) -> str:
    lower = ["data.batch_size (with accumulation)", "data.length"]
    if recipe.remat != "full":
        lower.insert(0, "memory with remat=full")
    if not recipe.scan_layers:
        lower.append("memory with scan_layers=true")
    return f"the step does not fit: {excess(needed, usable)}; lower {', '.join(lower)}, or give mesh.fsdp more chips"
