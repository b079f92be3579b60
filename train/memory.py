"""What a run's step needs on accelerators that are not here: the TPU compiler's own figures, ahead of time.

    python -m smolvlm_jax.train.memory full-500m-fsdp [key=value …]

Needs libtpu (pip install 'smolvlm-jax[test]' on Linux brings it) and no TPU: `topology` of the recipe says which chips to
compile for, and nothing is allocated. The work is done in a process of its own, where the compiler looks for no chips.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

from ..errors import ConfigError, MissingExtraError
from .config import TrainConfig

__all__ = ["abstract_inputs", "compiled_memory", "main", "memory_of"]


def abstract_inputs(config: TrainConfig, model, mesh) -> tuple:
    """(state, base, batches) of a step as ShapeDtypeStructs that carry their shardings."""
    import jax
    import jax.numpy as jnp

    from ..parameters import abstract_params, logical_axes
    from ..sharding import batch_sharding, parameter_shardings
    from .state import create_state, make_optimizer, split_trained, state_params, state_shardings

    optimizer = make_optimizer(config)
    place = lambda tree, shardings: jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings
    )
    state = jax.eval_shape(lambda p: create_state(p, optimizer, config), state_params(model, config))
    state = place(state, state_shardings(model, optimizer, mesh, config))
    base: dict = {}
    if config.lora is not None:
        dtype = jnp.dtype(config.frozen_dtype) if config.frozen_dtype else jnp.dtype(model.dtype)
        frozen = split_trained(abstract_params(model, dtype), config)[1]
        base = place(frozen, parameter_shardings(frozen, split_trained(logical_axes(model), config)[1], mesh))
    b, t = config.data.batch_size, config.data.length
    most = -(-t // model.config.image_seq_len)
    tiles = b * (most if config.data.tiles_per_row is None else config.data.tiles_per_row)
    side = model.config.vision_config.image_size
    shapes = dict.fromkeys(("input_ids", "labels", "segment_ids"), ((b, t), jnp.int32))
    if tiles:
        shapes |= {"pixel_values": ((tiles, side, side, 3), jnp.uint8), "tile_mask": ((tiles,), jnp.bool_)}
    batch = {n: jax.ShapeDtypeStruct(s, d, sharding=batch_sharding(mesh, s)) for n, (s, d) in shapes.items()}
    if config.accumulation > 1:
        from jax.sharding import NamedSharding, PartitionSpec

        stack = lambda x: jax.ShapeDtypeStruct(
            (config.accumulation, *x.shape), x.dtype, sharding=NamedSharding(mesh, PartitionSpec(None, *x.sharding.spec))
        )
        batch = {name: stack(x) for name, x in batch.items()}
    return state, base, (batch,)


def compiled_memory(config: TrainConfig) -> dict[str, Any]:
    """Compile the step of a config for its topology, in this process. Returns bytes of one chip: arguments (state, base,
    batch), temporaries, and total, which counts what the step writes in place of its arguments once; and seconds.

    `total_bytes` is what has to fit. Where it does not the compiler refuses, and `error` holds its message.
    """
    import jax
    import jax.numpy as jnp
    from jax.experimental import topologies

    from ..model import SmolVLMForConditionalGeneration
    from ..sharding import activate, make_mesh, replicated
    from ..sizes import PUBLISHED, published_config
    from .runner import describe
    from .state import make_optimizer, state_shardings
    from .step import pure_step

    if config.topology is None:
        raise ConfigError("the recipe names no topology: add topology=v5e:2x4, say")
    try:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=config.topology).devices
    except Exception as error:
        if "libtpu" in str(error) and "lockfile" not in str(error):
            raise MissingExtraError("the TPU compiler", "test") from error
        raise ConfigError(f"topology {config.topology!r}: {str(error).splitlines()[0]}") from error
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor, devices[: config.mesh.devices])
    name = config.model.removeprefix("shape:").rsplit("/", 1)[-1]
    shape = published_config(name) if name in PUBLISHED else describe(config).config
    model = SmolVLMForConditionalGeneration(
        shape, dtype=jnp.dtype(config.dtype or "bfloat16"), remat=config.remat, scan_layers=config.scan_layers
    )
    optimizer = make_optimizer(config)
    shardings = state_shardings(model, optimizer, mesh, config)
    step = jax.jit(
        pure_step(model, optimizer, config, shardings), donate_argnums=0, out_shardings=(shardings, replicated(mesh))
    )
    started = time.perf_counter()
    inputs = abstract_inputs(config, model, mesh)
    with activate(mesh):
        lowered = step.lower(*inputs)
        try:
            found = lowered.compile().memory_analysis()
        except jax.errors.JaxRuntimeError as error:
            return {"error": str(error), "seconds": time.perf_counter() - started}
    total = (
        found.argument_size_in_bytes + found.output_size_in_bytes + found.temp_size_in_bytes - found.alias_size_in_bytes
    ) + found.generated_code_size_in_bytes
    return {
        "argument_bytes": found.argument_size_in_bytes,
        "temporary_bytes": found.temp_size_in_bytes,
        "output_bytes": found.output_size_in_bytes,
        "alias_bytes": found.alias_size_in_bytes,
        "code_bytes": found.generated_code_size_in_bytes,
        "total_bytes": total,
        "seconds": time.perf_counter() - started,
    }


def memory_of(recipe: str, overrides: Sequence[str] = (), timeout: float | None = None) -> dict[str, Any]:
    """`compiled_memory` of a recipe in a child process, so that the TPU compiler and this process's devices do not meet."""
    command = [sys.executable, "-m", "smolvlm_jax.train.memory", recipe, *overrides, "--json"]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    environment.pop("XLA_FLAGS", None)
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=timeout)
    if done.returncode:
        raise ConfigError(f"compiling {recipe}: {done.stderr.strip().splitlines()[-1] if done.stderr else done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def main(arguments: list[str] | None = None) -> int:
    import argparse

    parser = argparse.ArgumentParser(prog="python -m smolvlm_jax.train.memory", description=__doc__.split("\n")[0])
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--json", action="store_true", help="figures only, here and now")
    options = parser.parse_args(arguments)
    if options.json:
        from .recipes import load_recipe

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
