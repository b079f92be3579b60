"""The memory that a run's step needs on accelerators that are not present: the TPU compiler's figures, ahead of time.

    python -m smolvlm_jax.train.memory full-500m-fsdp [key=value …]

Needs libtpu (pip install 'smolvlm-jax[test]' on Linux brings it) and no TPU: `topology` of the recipe names the chips to
compile for, and nothing is allocated. The work is done in a child process, in which the compiler looks for no chips.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from ..checkpoint import default_dtype
from ..convert.opened import open_checkpoint
from ..errors import ConfigError, MissingExtraError
from ..model import SmolVLMForConditionalGeneration
from ..sharding import activate, make_mesh
from ..sizes import PUBLISHED, published_config
from .config import TrainConfig
from .packing import BatchShape
from .partition import Partition
from .recipes import load_recipe
from .state import TrainState, abstract_state
from .step import batch_placement, jit_step

__all__ = ["abstract_inputs", "compiled_memory", "describe", "main", "memory_of"]

# Our names of the compiler's figures.
_SIZES = {"argument": "argument", "temporary": "temp", "output": "output", "alias": "alias", "code": "generated_code"}


def describe(config: TrainConfig) -> SmolVLMForConditionalGeneration:
    """The model that a configuration names, without its weights; a published size, as NAME or "shape:NAME", needs no files."""
    name = config.model.removeprefix("shape:").rsplit("/", 1)[-1]
    if name in PUBLISHED:
        shape = published_config(name)
    else:
        with open_checkpoint(config.model) as source:
            shape = source.model_config
    dtype = jnp.dtype(config.dtype) if config.dtype else default_dtype()
    return SmolVLMForConditionalGeneration(
        shape, dtype=dtype, remat=config.remat, scan_layers=config.scan_layers, attention=config.attention
    )


def abstract_inputs(model, partition: Partition, mesh) -> tuple[TrainState, dict, dict]:
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
        sharding = batch_placement(mesh, whole, stacked=bool(stack))
        batch[name] = jax.ShapeDtypeStruct(whole, dtype, sharding=sharding)
    return abstract_state(partition, mesh), partition.abstract_base(mesh), batch


def compiled_memory(config: TrainConfig) -> dict[str, Any]:
    """Compile the step of a config for its topology, in this process.

    Returns:
        Bytes of one chip: `argument_bytes` (state, base, batch), `temporary_bytes`, `output_bytes`, `alias_bytes` (outputs
        written in place of arguments), `code_bytes`, and `total_bytes`, which has to fit; and `seconds`. Where it does not fit
        the compiler refuses, and `error` holds its message.

    Raises:
        ConfigError: the recipe names no topology, or one that is not known.
        MissingExtraError: the compiler is not installed.
    """
    if config.topology is None:
        raise ConfigError("the recipe names no topology: add topology=v5e:2x4, say")
    try:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=config.topology).devices
    except Exception as error:
        if "libtpu" in str(error) and "lockfile" not in str(error):
            raise MissingExtraError("the TPU compiler", "test") from error
        raise ConfigError(f"topology {config.topology!r}: {str(error).splitlines()[0]}") from error
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor, devices[: config.mesh.devices])
    model = describe(replace(config, dtype=config.dtype or "bfloat16"))
    partition = Partition.of(model, config)
    started = time.perf_counter()
    # Outside the mesh: the optimiser's zeros would be put on its devices, which do not exist.
    inputs, step = abstract_inputs(model, partition, mesh), jit_step(model, partition, mesh)
    with activate(mesh):
        lowered = step.lower(*inputs)
        try:
            found = lowered.compile().memory_analysis()
        except jax.errors.JaxRuntimeError as error:
            return {"error": str(error), "seconds": time.perf_counter() - started}
    sizes = {f"{ours}_bytes": getattr(found, f"{theirs}_size_in_bytes") for ours, theirs in _SIZES.items()}
    total = sum(sizes.values()) - 2 * sizes["alias_bytes"]  # what is written in place of arguments is counted twice in the sum
    return {**sizes, "total_bytes": total, "seconds": time.perf_counter() - started}


def memory_of(recipe: str, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """`compiled_memory` of a recipe in a child process, so that the TPU compiler does not interfere with this one's devices."""
    command = [sys.executable, "-m", "smolvlm_jax.train.memory", recipe, *overrides, "--json"]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    environment.pop("XLA_FLAGS", None)
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise ConfigError(f"compiling {recipe}: {done.stderr.strip().splitlines()[-1] if done.stderr else done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m smolvlm_jax.train.memory", description=__doc__.split("\n")[0])
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--json", action="store_true", help="in this process, figures as JSON")
    options = parser.parse_args(arguments)
    if options.json:
        print(json.dumps(compiled_memory(load_recipe(options.recipe, options.overrides))))
        return 0
    found = memory_of(options.recipe, options.overrides)
    if "error" in found:
        print(f"{options.recipe}: does not fit: {found['error'].splitlines()[0]}")
        return 1
    gb = {name: found[f"{name}_bytes"] / 1e9 for name in ("argument", "temporary", "total")}
    print(
        f"{options.recipe}: {gb['total']:.2f} GB a chip, of which state and batch {gb['argument']:.2f}, temporaries "
        f"{gb['temporary']:.2f}; compiled in {found['seconds']:.0f} s"
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
