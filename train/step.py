"""One training step, a pure function: state and batches in, state and metrics out."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ..model import SmolVLMForConditionalGeneration
from ..sharding import activate, batch_sharding, replicated
from .config import TrainConfig
from .forward import Batch, token_losses
from .lora import combine
from .parts import join
from .state import TrainState, split_trained, state_shardings

__all__ = ["make_step", "place", "pure_step", "token_losses"]


def pure_step(
    model: SmolVLMForConditionalGeneration, optimizer: optax.GradientTransformation, config: TrainConfig, shardings: TrainState
) -> Callable[[TrainState, Any, Sequence[Batch]], tuple[TrainState, dict[str, jax.Array]]]:
    """The step before jit: (state, base, batches) -> (state, metrics). base: the frozen parameters under LoRA, else {}.

    A batch whose input_ids have three dimensions is a stack of batches, which a loop goes through, so that the activations of
    only one exist at a time; batches of a sequence may differ in shape. The loss is the mean over the labelled tokens of all of
    them: a long batch and a short one weigh by what they teach.
    """
    scale = 1.0 if config.lora is None else config.lora.scale
    trained_shardings = split_trained(shardings.params, config)[0]

    def sums(params, kept, base, batch):
        tree = combine(base, join(kept, params), scale)
        loss, count, hits = token_losses(model, tree, batch, tile_chunk=config.tile_chunk, loss_chunk=config.loss_chunk)
        return loss, (count, hits)

    def measure(params, kept, base, batch):
        (loss, (count, hits)), gradients = jax.value_and_grad(sums, has_aux=True)(params, kept, base, batch)
        # Said here, so that gradients are summed over devices straight into the parts that each of them keeps.
        return (loss, count, hits), jax.lax.with_sharding_constraint(gradients, trained_shardings)

    def step(state: TrainState, base, batches: Sequence[Batch]) -> tuple[TrainState, dict[str, jax.Array]]:
        params, kept = split_trained(state.params, config)
        add = lambda a, b: jax.tree.map(jnp.add, a, b)
        total, gradients = None, None
        for batch in batches:
            if batch["input_ids"].ndim == 3:
                first = jax.tree.map(lambda x: x[0], batch)
                zero = jax.tree.map(
                    lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(lambda b=first: measure(params, kept, base, b))
                )
                more = jax.lax.scan(lambda carry, b: (add(carry, measure(params, kept, base, b)), None), zero, batch)[0]
            else:
                more = measure(params, kept, base, batch)
            total, gradients = more if total is None else add((total, gradients), more)
        loss, count, hits = total
        tokens = jnp.maximum(count, 1)
        loss = loss / tokens
        gradients = jax.tree.map(lambda g: g / tokens, gradients)
        norm = optax.tree.norm(gradients)
        fine = jnp.isfinite(loss) & jnp.isfinite(norm)
        updates, opt_state = optimizer.update(gradients, state.opt_state, params)
        new = optax.apply_updates(params, updates)
        keep = lambda new, old: jax.tree.map(lambda a, b: jnp.where(fine, a, b), new, old)
        after = TrainState(
            state.step + 1,
            join(kept, keep(new, params)),
            keep(opt_state, state.opt_state),
            state.skipped + jnp.where(fine, 0, 1),
        )
        return after, {
            "loss": loss,
            "token_accuracy": hits / tokens,
            "gradient_norm": norm,
            "tokens": count,
            "skipped": after.skipped,
        }

    return step


def make_step(
    model: SmolVLMForConditionalGeneration,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    config: TrainConfig | None = None,
) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
    """A jitted step on a mesh: run(state, batches, base={}). The old state is donated. Batches are arrays of this host: its
    rows, of which all hosts' together are the batch.

    A step whose loss or gradient is not finite leaves parameters and moments as they were and is counted.
    """
    config = TrainConfig(steps=1) if config is None else config
    shardings = state_shardings(model, optimizer, mesh, config)
    step = pure_step(model, optimizer, config, shardings)
    jitted = jax.jit(step, donate_argnums=0, out_shardings=(shardings, replicated(mesh)))

    def run(state: TrainState, batches: Sequence[Batch], base: Any = None):
        with activate(mesh):
            return jitted(state, base or {}, tuple(place(batch, mesh) for batch in batches))

    return run


def place(batch: Mapping[str, Any], mesh: Mesh) -> dict[str, jax.Array]:
    """Spread a host batch over the data axes of the mesh; a stack of batches along its second dimension."""
    stacked = np.ndim(batch["input_ids"]) == 3
    hosts = jax.process_count()

    def put(value):
        shape = np.shape(value)
        if hosts > 1 and len(shape) > stacked:
            shape = (*shape[:stacked], shape[stacked] * hosts, *shape[stacked + 1 :])
        sharding = batch_sharding(mesh, shape[stacked:])
        if stacked:
            sharding = NamedSharding(mesh, PartitionSpec(None, *sharding.spec))
        if hosts == 1:
            return jax.device_put(value, sharding)
        return jax.make_array_from_process_local_data(sharding, np.asarray(value), shape)

    return {k: put(v) for k, v in batch.items()}
