"""Compile the engine's programs for a TPU slice that is not there, and print what the compiler says of each as JSON.

JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 python tests/engine/tpu_programs.py SIZE TOPOLOGY RING SLOTS PROGRAM [N]
"""

import functools
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies

from smolvlm_jax import SmolVLMForConditionalGeneration, abstract_params, logical_axes, make_mesh, published_config
from smolvlm_jax.decoding import decode_step
from smolvlm_jax.engine.compiled import Programs
from smolvlm_jax.engine.settings import EngineConfig
from smolvlm_jax.sharding import activate, parameter_shardings


def shard_bytes(tree) -> int:
    return sum(int(np.prod(x.sharding.shard_shape(x.shape))) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def main(size: str, topology: str, ring: str, slots: str, program: str, *numbers: str) -> dict:
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    mesh = make_mesh(data=-1, devices=devices)
    model = SmolVLMForConditionalGeneration(published_config(size), dtype=jnp.bfloat16)
    shapes = abstract_params(model)
    shardings = parameter_shardings(shapes, logical_axes(model), mesh)
    params = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16, sharding=s), shapes, shardings)
    config = EngineConfig(
        ring_lengths=(int(ring),),
        slots=(int(slots),),
        prefill_tokens=min(2048, int(ring)),
        encoder_tiles=8,
        chunk=16,
        run_ahead=1,
    )
    programs = Programs(model, params, config.resolve(model, mesh), mesh)
    with activate(mesh):
        if program == "step":  # the body of the decode loop: what a loop costs, the compiler counts once
            state = programs.ring(int(ring))
            out = jax.tree.map(lambda x: x.sharding, state)
            step = jax.jit(
                functools.partial(decode_step, model, programs.rules(greedy=True)), donate_argnums=1, out_shardings=(out, None)
            )
            lowered = step.lower(params, state)
        else:
            lowered = programs.lower(program, *map(int, numbers))  # ("decode", L, 1): greedy
        compiled = lowered.compile()
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
    text = compiled.as_text()
    return {
        "weights": shard_bytes(params),
        "cache": shard_bytes(programs.ring(int(ring)).cache),
        "ring": shard_bytes(programs.ring(int(ring))),
        "aliased": memory.alias_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "bytes_accessed": cost["bytes accessed"],
        "kernels": text.count('custom_call_target="tpu_custom_call"'),
        "collectives": {
            n: text.count(f" {n}(") + text.count(f" {n}-start(") for n in ("all-gather", "all-reduce", "all-to-all")
        },
    }


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
