"""The training loop: restore, step, log, checkpoint."""

import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from ..errors import CheckpointError
from ..model import SmolVLMForConditionalGeneration
from .config import TrainConfig
from .data import prefetch
from .state import TrainState, create_state, learning_rate, make_optimizer, state_shardings
from .step import make_step

__all__ = ["train"]


def train(
    model: SmolVLMForConditionalGeneration,
    params,
    make_batches: Callable[[int], Sequence[dict[str, np.ndarray]]],
    config: TrainConfig,
    mesh: Mesh,
    directory: Path,
    *,
    progress: bool | None = None,
) -> TrainState:
    """Train from `params`, or from the newest checkpoint under `directory` if there is one, to `config.steps`.

    `make_batches(step)` returns the batches of a step and depends on nothing but its argument, so a run that was cut off
    continues with the data it would have seen. Metrics are appended to `metrics.jsonl` and shown on a bar (not when piped).
    """
    import orbax.checkpoint as ocp
    from tqdm import tqdm

    directory = Path(directory).absolute()
    model.config.save_pretrained(directory)  # so that the run can be loaded and exported while it goes on
    optimizer = make_optimizer(config)
    shardings = state_shardings(model, optimizer, mesh)
    options = ocp.CheckpointManagerOptions(max_to_keep=config.keep, save_interval_steps=config.checkpoint_every)
    schedule = learning_rate(config)
    with ocp.CheckpointManager(directory / "checkpoints", options=options) as manager:
        state = jax.jit(lambda p: create_state(p, optimizer), out_shardings=shardings)(params)
        latest = manager.latest_step()
        if latest is not None:
            state = _restore(manager, latest, state, shardings)
        first = int(state.step)
        step = make_step(model, optimizer, mesh)
        log = (directory / "metrics.jsonl").open("a", encoding="utf-8")
        show = sys.stderr.isatty() if progress is None else progress
        bar = tqdm(total=config.steps, initial=first, unit="step", disable=not show)
        pending: list[dict[str, Any]] = []
        started, last = time.perf_counter(), first
        with log, bar:
            for index, batches in zip(range(first, config.steps), prefetch(make_batches, first, config.steps), strict=True):
                state, metrics = step(state, batches)
                pending.append(metrics)
                bar.update()
                done = index + 1
                if done % config.log_every == 0 or done == config.steps:
                    seconds, started = time.perf_counter() - started, time.perf_counter()
                    means = {k: float(np.mean([float(m[k]) for m in pending])) for k in pending[0]}
                    line = {"step": done, **means, "learning_rate": float(schedule(done)), "step_s": seconds / (done - last)}
                    line["skipped"] = int(pending[-1]["skipped"])
                    log.write(json.dumps({k: v if math.isfinite(v) else str(v) for k, v in line.items()}) + "\n")
                    log.flush()
                    bar.set_postfix(loss=f"{means['loss']:.4f}", accuracy=f"{means['token_accuracy']:.4f}")
                    pending, last = [], done
                if done % config.checkpoint_every == 0 or done == config.steps:
                    manager.save(done, args=ocp.args.StandardSave(state), force=True)
        manager.wait_until_finished()
    return state


def _restore(manager, step: int, state: TrainState, shardings) -> TrainState:
    import orbax.checkpoint as ocp

    target = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, shardings)
    try:
        return manager.restore(step, args=ocp.args.StandardRestore(target))
    except (ValueError, KeyError) as error:
        where = manager.directory
        raise CheckpointError(
            f"the checkpoint of step {step} under {where} belongs to another model or optimiser: "
            f"continue with the configuration it was made with, or start in another directory ({error})"
        ) from error
