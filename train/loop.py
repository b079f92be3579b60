"""The training loop: restore, step, log, evaluate, checkpoint, and stop cleanly when the process is told to."""

import contextlib
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from ..errors import ConfigError
from ..model import SmolVLMForConditionalGeneration
from .checkpoints import Checkpoints
from .metrics import Log
from .mirror import Mirror
from .partition import Partition
from .pipeline import TrainingData, check_position
from .prefetch import prefetch
from .processes import everyones
from .state import TrainState, abstract_state, create_state, learning_rate, state_shardings
from .step import make_step

__all__ = ["Preempted", "fit"]


class Preempted(SystemExit):
    """The process was told to stop (SIGTERM) and has saved a checkpoint; exit code 143."""

    def __init__(self, step: int):
        super().__init__(143)
        self.step = step


def fit(
    model: SmolVLMForConditionalGeneration,
    params: dict,
    data: TrainingData,
    partition: Partition,
    mesh: Mesh,
    directory: Path,
    *,
    mirror: Mirror | None = None,
    base: dict | None = None,
    evaluate: Callable[[TrainState, int], dict[str, float]] | None = None,
    progress: bool | None = None,
) -> TrainState:
    """Train from `params`, or from the newest checkpoint under `directory` if there is one, to the configuration's last step.

    Metrics are appended to `directory`/metrics.jsonl.

    Args:
        model: the model, with the dtype, remat and loop over layers to train with.
        params: the state's parameters, as `partition.params` describes them.
        data: the batches; closed on every way out.
        partition: what is trained.
        mesh: where.
        directory: of the run.
        mirror: where in a store the directory is sent to.
        base: the frozen parameters, under LoRA.
        evaluate: (state, step) -> figures for the log, called every `evaluation.every` steps and at the end; the checkpoint of
            that step is kept or not by these figures.
        progress: show a bar; default: when stderr is a terminal.

    Raises:
        Preempted: after SIGTERM, once a checkpoint is written.
        ConfigError: the run has more steps than `steps` already.
    """
    config = partition.config
    main = jax.process_index() == 0
    if main:
        model.config.save_pretrained(directory)  # so that the run can be loaded and exported while it continues
    with contextlib.ExitStack() as stack:
        stack.callback(data.close)
        checkpoints = stack.enter_context(Checkpoints(directory, config.keep, mirror=mirror))
        restored = checkpoints.restore(abstract_state(partition, mesh), check_position)
        if restored is None:
            create = jax.jit(lambda p: create_state(p, partition), out_shardings=state_shardings(partition, mesh))
            state = create(params)
        else:
            state, positions = restored
            data.restore(positions[jax.process_index() % len(positions)])
        del params  # the state has its own
        first = int(state.step)
        if first > config.steps:
            raise ConfigError(
                f"steps is {config.steps}, and the run in {mirror.path if mirror else directory} is at step {first}: choose at "
                "least as many, or another output"
            )
        step = make_step(model, partition, mesh)
        log = Log(directory, steps=config.steps, first=first, progress=progress, loggers=config.loggers, main=main)
        stack.callback(log.close)
        stopping = stack.enter_context(_told_to_stop())
        every = 0 if evaluate is None or config.evaluation is None else config.evaluation.every
        source = prefetch(lambda _: (next(data), data.state(), data.figures()), first, config.steps, depth=2)
        stack.callback(source.close)
        pending: list[dict[str, Any]] = []
        started, last = time.perf_counter(), first
        schedule = learning_rate(config)
        for index, (batch, position, figures) in zip(range(first, config.steps), source, strict=True):
            state, metrics = step(state, batch, base)
            pending.append(metrics)
            log.advance()
            done = index + 1
            ends = done == config.steps
            if done % config.log_every == 0 or ends:
                line = _means(pending)  # waits for the device
                seconds, started = time.perf_counter() - started, time.perf_counter()
                line |= {"learning_rate": float(schedule(done)), "step_s": seconds / (done - last)}
                line |= {"tokens_s": line["tokens"] * (done - last) / seconds} | figures
                log.write(done, line)
                pending, last = [], done
            found = None
            if evaluate is not None and (ends or (every and done % every == 0)):
                found = evaluate(state, done)
                log.write(done, found)
                started += found.get("evaluation_s", 0.0)
            stop = bool(stopping) or checkpoints.preempted(done)
            if done % config.checkpoint_every == 0 or ends or stop or found:
                checkpoints.save(done, state, everyones(position), found)
            if stop and not ends:
                raise Preempted(done)  # leaving `checkpoints` waits until this one is written
    return state


def _means(pending: list[dict[str, Any]]) -> dict[str, Any]:
    means = {name: float(np.mean([float(m[name]) for m in pending])) for name in pending[0]}
    means["skipped"] = int(pending[-1]["skipped"])
    return means


@contextlib.contextmanager
def _told_to_stop() -> Iterator[list]:
    """A list that stays empty until SIGTERM arrives.

    In a job of several processes jax's own handler is used instead, since all processes have to agree on a step; outside the
    main thread no handler can be set.
    """
    told: list[int] = []
    try:
        before = signal.signal(signal.SIGTERM, lambda number, _: told.append(number)) if jax.process_count() == 1 else None
    except ValueError:
        before = None
    try:
        yield told
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)
