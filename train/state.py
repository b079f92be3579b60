"""`TrainState` and the optimiser: what a training step updates, and how it is placed on a mesh."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from ..sharding import replicated
from .config import TrainConfig
from .partition import Partition, part_of, with_shardings

__all__ = [
    "TrainState",
    "abstract_state",
    "create_state",
    "learning_rate",
    "make_optimizer",
    "shortened_warmup",
    "state_shardings",
]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """Everything that a training step changes.

    Attributes:
        step: () int32, steps taken.
        params: the whole model, or under LoRA the adapters and the parts that are trained whole.
        opt_state: optimiser state of the parameters that are trained.
        skipped: () int32, steps whose loss or gradient was not finite; they change nothing but the two counters.
    """

    step: jax.Array
    params: Any
    opt_state: Any
    skipped: jax.Array


def learning_rate(config: TrainConfig) -> optax.Schedule:
    """Linear warm-up, then `config.schedule`; the same again from each restart on.

    A run that ends before a restart does not reach it.
    """
    schedules, cycles = [], _cycles(config)
    for _, peak, steps in cycles:
        warmup = _warmup(config, steps)
        rise, after = optax.linear_schedule(0.0, peak, warmup), _after_warmup(config, peak, max(steps - warmup, 1))
        schedules.append(optax.join_schedules([rise, after], [warmup]) if config.warmup > 0 else after)
    return optax.join_schedules(schedules, [start for start, _, _ in cycles[1:]])


def shortened_warmup(config: TrainConfig) -> str:
    """In words, that the steps have no room for the warm-up; "" where they have."""
    for start, _, steps in _cycles(config):
        if config.warmup > (warmup := _warmup(config, steps)):
            where = f" from the restart at step {start:,} on" if start else ""
            share = " (warmup_fraction=0.03 makes it a share of the steps)" if config.warmup_fraction is None else ""
            return f"the warm-up takes {warmup:,} of the {steps:,} steps{where}, not {config.warmup:,}: they are too few{share}"
    return ""


def _cycles(config: TrainConfig) -> list[tuple[int, float, int]]:
    """(first step, peak, number of steps) of each cycle of the schedule that the run reaches."""
    starts = [(0, config.learning_rate), *((start, peak) for start, peak in config.restarts if start < config.steps)]
    ends = [start for start, _ in starts[1:]] + [config.steps]
    return [(start, peak, end - start) for (start, peak), end in zip(starts, ends, strict=True)]


def _warmup(config: TrainConfig, steps: int) -> int:
    """Steps of the warm-up of a cycle of so many; the peak is reached in it."""
    return min(config.warmup, max(steps - 1, 1))


def _after_warmup(config: TrainConfig, peak: float, steps: int) -> optax.Schedule:
    if config.schedule == "cosine":
        return optax.cosine_decay_schedule(peak, steps, alpha=config.final_fraction)
    if config.schedule == "linear":
        return optax.linear_schedule(peak, peak * config.final_fraction, steps)
    return optax.constant_schedule(peak)


def make_optimizer(config: TrainConfig) -> optax.GradientTransformation:
    """AdamW with clipped gradients, each part of the model at its own learning rate.

    Weight decay applies to matrices only, not to norms and biases.
    """

    def at_own_rate(path, update):
        factor = config.peak(part_of("/".join(key.key for key in path))) / config.learning_rate
        return update if factor == 1 else update * factor

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
        optax.stateless(lambda updates, _: jax.tree_util.tree_map_with_path(at_own_rate, updates)),
    )


def create_state(params: dict, partition: Partition) -> TrainState:
    """A state at step 0. Call it under jit with `state_shardings` to create it where it will be kept.

    Args:
        params: arrays with the paths of `partition.params`.
        partition: what is trained.
    """
    trained, _ = partition.split(params)
    opt_state = make_optimizer(partition.config).init(trained)
    # Two counters of their own: the step donates the state, and a buffer can be donated only once.
    return TrainState(jnp.zeros((), jnp.int32), params, opt_state, jnp.zeros((), jnp.int32))


def state_shardings(partition: Partition, mesh: Mesh) -> TrainState:
    """A TrainState of shardings, one for each leaf: moments are placed like their parameters, counters are replicated."""
    params = partition.shardings(mesh)
    everywhere: Any = replicated(mesh)
    optimizer = make_optimizer(partition.config)
    moments = optax.tree_map_params(
        optimizer,
        lambda _, sharding: sharding,
        jax.eval_shape(optimizer.init, partition.split(partition.params)[0]),
        partition.split(params)[0],
        transform_non_params=lambda _: everywhere,
    )
    return TrainState(everywhere, params, moments, everywhere)


def abstract_state(partition: Partition, mesh: Mesh) -> TrainState:
    """The state as ShapeDtypeStructs that carry their shardings. Nothing is allocated."""
    state = jax.eval_shape(lambda params: create_state(params, partition), partition.params)
    return with_shardings(state, state_shardings(partition, mesh))
