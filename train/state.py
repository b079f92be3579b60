"""`TrainState` and the optimiser: what a step maps to its successor, and how it lies on a mesh."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from ..model import SmolVLMForConditionalGeneration
from ..parameters import abstract_params, logical_axes
from ..sharding import parameter_shardings, replicated
from .config import TrainConfig

__all__ = ["TrainState", "create_state", "make_optimizer", "state_shardings"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """step () int32, params, opt_state; `skipped` () int32 counts steps that were not finite and changed nothing else."""

    step: jax.Array
    params: Any
    opt_state: Any
    skipped: jax.Array


def learning_rate(config: TrainConfig) -> optax.Schedule:
    """Linear warm-up, then cosine; the same again from each restart on. A run shorter than a restart does not reach it."""
    cycles = [(0, config.learning_rate), *((start, peak) for start, peak in config.restarts if start < config.steps)]
    ends = [start for start, _ in cycles[1:]] + [config.steps]
    schedules = []
    for (start, peak), end in zip(cycles, ends, strict=True):
        schedules.append(
            optax.warmup_cosine_decay_schedule(
                init_value=0.0,
                peak_value=peak,
                warmup_steps=min(config.warmup_steps, max(end - start - 1, 1)),
                decay_steps=end - start,
                end_value=peak * config.final_fraction,
            )
        )
    return optax.join_schedules(schedules, ends[:-1])


def make_optimizer(config: TrainConfig) -> optax.GradientTransformation:
    """Clipped AdamW. Only matrices decay: norms and biases have nothing to gain from being small."""
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            learning_rate(config),
            b1=config.beta1,
            b2=config.beta2,
            weight_decay=config.weight_decay,
            mask=lambda params: jax.tree.map(lambda p: p.ndim > 1, params),
        ),
    )


def create_state(params, optimizer: optax.GradientTransformation) -> TrainState:
    """A state at step 0. Call it under jit with `state_shardings` to make it where it will live."""
    # Two counters of their own: the step donates the state, and a buffer can be donated once only.
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), jnp.zeros((), jnp.int32))


def state_shardings(model: SmolVLMForConditionalGeneration, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """A sharding for every leaf of the state: moments lie where their parameters lie, counters everywhere."""
    abstract = abstract_params(model)
    params = parameter_shardings(abstract, logical_axes(model), mesh)
    everywhere = replicated(mesh)
    moments = optax.tree_map_params(
        optimizer,
        lambda _, sharding: sharding,
        jax.eval_shape(optimizer.init, abstract),
        params,
        transform_non_params=lambda _: everywhere,
    )
    return TrainState(everywhere, params, moments, everywhere)
