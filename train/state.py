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
from .lora import adapter_axes, adapter_shapes
from .parts import join, part_of, split, trained

__all__ = ["TrainState", "create_state", "learning_rate", "make_optimizer", "state_axes", "state_params", "state_shardings"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """step () int32; params: the whole model, or under LoRA the adapters and whatever else is trained; opt_state, of the
    parameters that are trained; `skipped` () int32 counts steps that were not finite and changed nothing else."""

    step: jax.Array
    params: Any
    opt_state: Any
    skipped: jax.Array


def learning_rate(config: TrainConfig) -> optax.Schedule:
    """Linear warm-up, then `config.schedule`; the same again from each restart on. A run shorter than a restart does not
    reach it."""
    cycles = [(0, config.learning_rate), *((start, peak) for start, peak in config.restarts if start < config.steps)]
    ends = [start for start, _ in cycles[1:]] + [config.steps]
    schedules = []
    for (start, peak), end in zip(cycles, ends, strict=True):
        warmup = min(config.warmup, max(end - start - 1, 1))
        rise, after = optax.linear_schedule(0.0, peak, warmup), _after_warmup(config, peak, max(end - start - warmup, 1))
        schedules.append(optax.join_schedules([rise, after], [warmup]) if config.warmup > 0 else after)
    return optax.join_schedules(schedules, ends[:-1])


def _after_warmup(config: TrainConfig, peak: float, steps: int) -> optax.Schedule:
    if config.schedule == "cosine":
        return optax.cosine_decay_schedule(peak, steps, alpha=config.final_fraction)
    if config.schedule == "linear":
        return optax.linear_schedule(peak, peak * config.final_fraction, steps)
    return optax.constant_schedule(peak)


def make_optimizer(config: TrainConfig) -> optax.GradientTransformation:
    """Clipped AdamW, each part of the model at its own share of the learning rate. Only matrices decay: norms and biases have
    nothing to gain from being small."""
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            learning_rate(config),
            b1=config.beta1,
            b2=config.beta2,
            eps=config.epsilon,
            weight_decay=config.weight_decay,
            mask=lambda params: jax.tree.map(lambda p: p.ndim > 1, params),
        ),
        optax.stateless(lambda updates, _: jax.tree_util.tree_map_with_path(_at_own_rate(config), updates)),
    )


def _at_own_rate(config: TrainConfig):
    def scale(path, update):
        factor = config.peak(part_of("/".join(key.key for key in path))) / config.learning_rate
        return update if factor == 1 else update * factor

    return scale


def split_trained(params, config: TrainConfig) -> tuple[dict, dict]:
    """(what the optimiser sees, what stays)."""
    return split(params, lambda path: trained(config, path))


def create_state(params, optimizer: optax.GradientTransformation, config: TrainConfig | None = None) -> TrainState:
    """A state at step 0. Call it under jit with `state_shardings` to make it where it will live."""
    seen = params if config is None else split_trained(params, config)[0]
    # Two counters of their own: the step donates the state, and a buffer can be donated once only.
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(seen), jnp.zeros((), jnp.int32))


def state_params(model: SmolVLMForConditionalGeneration, config: TrainConfig | None = None):
    """Shapes and dtypes of `TrainState.params`."""
    if config is None:
        return abstract_params(model)
    tree = abstract_params(model, jnp.dtype(config.param_dtype))
    if config.lora is None:
        return tree
    return join(split_trained(tree, config)[0], adapter_shapes(model, config.lora, jnp.dtype(config.param_dtype)))


def state_axes(model: SmolVLMForConditionalGeneration, config: TrainConfig | None = None):
    """Logical axes of `TrainState.params`."""
    axes = logical_axes(model)
    if config is None or config.lora is None:
        return axes
    return join(split_trained(axes, config)[0], adapter_axes(model, config.lora))


def state_shardings(
    model: SmolVLMForConditionalGeneration,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    config: TrainConfig | None = None,
) -> TrainState:
    """A sharding for every leaf of the state: moments lie where their parameters lie, counters everywhere."""
    abstract = state_params(model, config)
    params = parameter_shardings(abstract, state_axes(model, config), mesh)
    everywhere = replicated(mesh)
    seen, placed = (tree if config is None else split_trained(tree, config)[0] for tree in (abstract, params))
    moments = optax.tree_map_params(
        optimizer,
        lambda _, sharding: sharding,
        jax.eval_shape(optimizer.init, seen),
        placed,
        transform_non_params=lambda _: everywhere,
    )
    return TrainState(everywhere, params, moments, everywhere)
