"""One training step, a pure function: state and batches in, state and metrics out."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from ..model import SmolVLMForConditionalGeneration
from ..sharding import activate, batch_sharding, replicated
from .state import TrainState, state_shardings

__all__ = ["make_step", "token_losses"]

Batch = Mapping[str, jax.Array]


def token_losses(model: SmolVLMForConditionalGeneration, params, batch: Batch) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Sum of cross-entropies over labelled tokens, their number, and how many of them the model ranks first.

    batch: input_ids, attention_mask, labels int (b, t), with -100 wherever nothing is to be learned; pixel_values uint8
    (N, T, T, 3) and num_tiles (), or neither.
    """
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    logits = model.apply({"params": params}, **inputs).logits[:, :-1].astype(jnp.float32)
    target = batch["labels"][:, 1:]
    keep = target != -100
    safe = jnp.where(keep, target, 0)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, safe)
    hits = (logits.argmax(-1) == safe) & keep
    return jnp.where(keep, losses, 0).sum(), keep.sum(), hits.sum()


def make_step(
    model: SmolVLMForConditionalGeneration, optimizer: optax.GradientTransformation, mesh: Mesh
) -> Callable[[TrainState, Sequence[Batch]], tuple[TrainState, dict[str, jax.Array]]]:
    """A jitted step on a mesh. The old state is donated.

    It takes several batches, which may differ in shape; the loss is the mean over the labelled tokens of all of them, so a
    long batch and a short one weigh by what they teach. A step whose loss or gradient is not finite leaves parameters and
    moments as they were and is counted.
    """

    def loss_fn(params, batches):
        sums = [token_losses(model, params, batch) for batch in batches]
        loss, count, hits = (sum(part) for part in zip(*sums, strict=True))
        return loss / jnp.maximum(count, 1), hits / jnp.maximum(count, 1)

    def step(state: TrainState, batches: Sequence[Batch]) -> tuple[TrainState, dict[str, jax.Array]]:
        (loss, accuracy), gradients = jax.value_and_grad(loss_fn, has_aux=True)(state.params, batches)
        norm = optax.tree.norm(gradients)
        fine = jnp.isfinite(loss) & jnp.isfinite(norm)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        keep = lambda new, old: jax.tree.map(lambda a, b: jnp.where(fine, a, b), new, old)
        new = TrainState(
            state.step + 1, keep(params, state.params), keep(opt_state, state.opt_state), state.skipped + jnp.where(fine, 0, 1)
        )
        return new, {"loss": loss, "token_accuracy": accuracy, "gradient_norm": norm, "skipped": new.skipped}

    shardings = state_shardings(model, optimizer, mesh)
    jitted = jax.jit(step, donate_argnums=0, out_shardings=(shardings, replicated(mesh)))

    def run(state: TrainState, batches: Sequence[Batch]):
        with activate(mesh):
            return jitted(state, tuple(place(batch, mesh) for batch in batches))

    return run


def place(batch: Mapping[str, Any], mesh: Mesh) -> dict[str, jax.Array]:
    """Spread a host batch over the data axes of the mesh."""
    return {k: jax.device_put(v, batch_sharding(mesh, jnp.shape(v))) for k, v in batch.items()}
