"""One training step, a pure function: state and batch in, state and metrics out."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ..model import SmolVLMForConditionalGeneration
from ..sharding import activate, batch_sharding, replicated
from .forward import Batch, token_losses
from .partition import Partition, join
from .state import TrainState, make_optimizer, state_shardings

__all__ = ["Step", "batch_placement", "jit_step", "make_step", "place"]


def jit_step(model: SmolVLMForConditionalGeneration, partition: Partition, mesh: Mesh) -> Any:
    """The jitted step: (state, base, batch) -> (state, metrics). The old state is donated; the new one is placed like it.

    base: the frozen parameters under LoRA, else {}. A batch whose input_ids have three dimensions is a stack of batches; a loop
    goes through them, so that the activations of only one exist at a time. The loss is the mean over the labelled tokens of all
    of them, so that each weighs by its number of labels.
    """
    config = partition.config
    optimizer = make_optimizer(config)
    shardings = state_shardings(partition, mesh)
    trained_shardings, _ = partition.split(shardings.params)

    def sums(params, kept, base, batch):
        tree = partition.combine(base, join(kept, params))
        loss, count, hits = token_losses(model, tree, batch, tile_chunk=config.tile_chunk, loss_chunk=config.loss_chunk)
        return loss, (count, hits)

    def measure(params, kept, base, batch):
        (loss, (count, hits)), gradients = jax.value_and_grad(sums, has_aux=True)(params, kept, base, batch)
        # With this constraint gradients are reduced over devices straight into the shards that each of them keeps.
        return (loss, count, hits), jax.lax.with_sharding_constraint(gradients, trained_shardings)

    def accumulated(params, kept, base, stack):
        first = jax.tree.map(lambda x: x[0], stack)
        shapes = jax.eval_shape(lambda: measure(params, kept, base, first))
        zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        add = lambda carry, batch: (jax.tree.map(jnp.add, carry, measure(params, kept, base, batch)), None)
        return jax.lax.scan(add, zero, stack)[0]

    def step(state: TrainState, base: dict, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        params, kept = partition.split(state.params)
        total = accumulated if batch["input_ids"].ndim == 3 else measure
        (loss, count, hits), gradients = total(params, kept, base, batch)
        tokens = jnp.maximum(count, 1)
        loss = loss / tokens
        gradients = jax.tree.map(lambda g: g / tokens, gradients)
        norm = optax.tree.norm(gradients)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        updates, opt_state = optimizer.update(gradients, state.opt_state, params)
        new = optax.apply_updates(params, updates)
        keep = lambda new, old: jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old)
        after = TrainState(
            state.step + 1,
            join(kept, keep(new, params)),
            keep(opt_state, state.opt_state),
            state.skipped + jnp.where(finite, 0, 1),
        )
        return after, {
            "loss": loss,
            "token_accuracy": hits / tokens,
            "gradient_norm": norm,
            "tokens": count,
            "skipped": after.skipped,
        }

    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, replicated(mesh)))


def make_step(model: SmolVLMForConditionalGeneration, partition: Partition, mesh: Mesh) -> "Step":
    """A jitted step on a mesh.

    The old state is donated. A step whose loss or gradient is not finite leaves parameters and moments as they were and is
    counted. Loss and gradient of a batch in which nothing is learned are 0.
    """
    return Step(jit_step(model, partition, mesh), mesh)


class Step:
    """A jitted step on a mesh: step(state, batch, base={}) -> (state, metrics).

    The batch holds the numpy arrays of this host's rows, as `make_batch` returns them or a stack of them; the rows of all hosts
    together are the batch.

    Args:
        jitted: what `jit_step` returned.
        mesh: where.
    """

    def __init__(self, jitted: Any, mesh: Mesh):
        self._jitted, self.mesh = jitted, mesh

    def __call__(self, state: TrainState, batch: Batch, base: dict | None = None) -> tuple[TrainState, dict[str, jax.Array]]:
        with activate(self.mesh):
            return self._jitted(state, base or {}, place(batch, self.mesh))

    def trace(self, state: TrainState, batch: Batch, base: dict | None = None) -> tuple[Any, dict[str, jax.Array]]:
        """(the program of a step with these arguments, as `jit(…).trace(…)` gives it; the batch on the mesh)."""
        with activate(self.mesh):
            arrays = place(batch, self.mesh)
            return self._jitted.trace(state, base or {}, arrays), arrays

    def compile(self, traced: Any) -> Any:
        """Compile a program of `trace`, which the next call with such arguments then runs, and return the compiler's figures of
        its memory; None where it has none."""
        with activate(self.mesh):
            return traced.lower().compile().memory_analysis()


def batch_placement(mesh: Mesh, shape: Sequence[int], *, stacked: bool) -> NamedSharding:
    """Where an array of a batch is kept: rows over the data axes of the mesh; of a stack of batches, the second dimension."""
    sharding = batch_sharding(mesh, shape[stacked:])
    return NamedSharding(mesh, PartitionSpec(None, *sharding.spec)) if stacked else sharding


def place(batch: Mapping[str, Any], mesh: Mesh) -> dict[str, jax.Array]:
    """Put a host's batch, or stack of batches, on the mesh."""
    stacked = np.ndim(batch["input_ids"]) == 3
    hosts = jax.process_count()

    def put(value):
        shape = np.shape(value)
        if len(shape) > stacked:
            shape = (*shape[:stacked], shape[stacked] * hosts, *shape[stacked + 1 :])
        sharding = batch_placement(mesh, shape, stacked=stacked)
        return jax.make_array_from_process_local_data(sharding, np.asarray(value), shape)

    return {name: put(value) for name, value in batch.items()}
