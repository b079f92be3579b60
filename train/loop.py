"""The training loop: restore, step, log, evaluate, checkpoint, and stop cleanly when the process is told to."""

import contextlib
import functools
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from ..errors import ConfigError
from ..model import SmolVLMForConditionalGeneration
from .checkpoints import Checkpoints
from .curves import draw_curves
from .metrics import Log, read_metrics
from .mirror import Mirror
from .needs import compile_step
from .partition import Partition
from .pipeline import TrainingData, check_position
from .prefetch import prefetch
from .processes import everyones
from .progress import LONG_SECONDS, Display
from .state import TrainState, abstract_state, create_state, learning_rate, state_shardings
from .step import make_step
from .steps import newest_step
from .stopping import Preempted, told_to_stop

__all__ = ["Evaluate", "Preempted", "fit"]

# (state, step, what shows how far it is, whether to give up) -> figures for the log; None if it gave up.
Evaluate = Callable[[TrainState, int, Display, Callable[[], bool]], dict[str, float] | None]


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
    evaluate: Evaluate | None = None,
    display: Display | None = None,
    begin: Callable[[int | None], None] = lambda first: None,
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
        evaluate: called every `evaluation.every` steps and at the end; the checkpoint of that step is kept or not by what it
            returns.
        display: shows how far the run is; default: nothing does.
        begin: called with the step that the run goes on from, None where it begins, before anything is written.

    Raises:
        Preempted: after SIGTERM or SIGINT, once a checkpoint is written.
        ConfigError: the run has more steps than `steps` already.
    """
    config = partition.config
    main = jax.process_index() == 0
    display = Display(config.steps, False) if display is None else display
    with contextlib.ExitStack() as stack:
        saved = functools.partial(newest_step, directory / "checkpoints") if mirror is None else mirror.newest
        stopping = stack.enter_context(told_to_stop(display.remark, saved))
        stack.callback(data.close)
        checkpoints = stack.enter_context(Checkpoints(directory, config.keep, mirror=mirror))
        display.doing("looking for checkpoints")
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
        if restored is not None:
            display.remark(f"resuming from step {first:,} of {config.steps:,}")
        begin(None if restored is None else first)
        if main:
            model.config.save_pretrained(directory)  # so that the run can be loaded and exported while it continues
        step = make_step(model, partition, mesh)
        log = Log(directory, first=first, display=display, loggers=config.loggers, main=main)
        stack.callback(log.close)
        display.begin(first)
        display.doing("reading the first batch")
        every = 0 if evaluate is None or config.evaluation is None else config.evaluation.every
        source = prefetch(lambda _: (next(data), data.state(), data.figures()), first, config.steps, depth=2)
        stack.callback(source.close)
        pending: list[dict[str, Any]] = []
        running: deque[jax.Array] = deque()  # a figure of each step that the devices may not have finished
        started, last = time.perf_counter(), first
        schedule = learning_rate(config)
        for index, (batch, position, figures) in zip(range(first, config.steps), source, strict=True):
            done = index + 1
            if index == first:
                compile_step(step, state, batch, base or {}, partition, display)
            display.doing(f"computing step {done:,} of {config.steps:,}", after=LONG_SECONDS)
            state, metrics = step(state, batch, base)
            pending.append(metrics)
            running.append(metrics["loss"])
            _wait(running, done, config.steps, display, left=1)  # the next one is queued meanwhile
            ends = done == config.steps
            stop = bool(stopping) or checkpoints.preempted(done)
            line: dict[str, Any] = {}
            if done % config.log_every == 0 or ends or stop:
                _wait(running, done, config.steps, display)
                line = _means(pending)
                seconds, started = time.perf_counter() - started, time.perf_counter()
                line |= {"learning_rate": float(schedule(done)), "step_s": seconds / (done - last)}
                line |= {"tokens_s": line["tokens"] * (done - last) / seconds} | figures
                pending, last = [], done
                for remark in data.remarks():
                    display.remark(remark)
            found = None
            if evaluate is not None and (ends or (every and done % every == 0)) and not (stop and not ends):
                _wait(running, done, config.steps, display)
                paused = time.perf_counter()
                found = evaluate(state, done, display, functools.partial(_told, stopping, last=ends))
                line |= found or {}
                started += time.perf_counter() - paused
                stop = stop or bool(stopping)
            if line:  # one for each step, with what was evaluated
                log.write(done, line)
            if found and main and not ends:
                draw_curves(read_metrics(directory), directory / "curves.png")
            if done % config.checkpoint_every == 0 or ends or stop or found:
                display.doing(f"writing the checkpoint of step {done:,}", after=LONG_SECONDS)
                checkpoints.save(done, state, everyones(position), found)
            if stop and not ends:
                display.doing("writing the checkpoint")
                raise Preempted(done, *stopping[:1])  # leaving `checkpoints` waits until this one is written
            display.doing(f"reading the data of step {done + 1:,}", after=LONG_SECONDS)
        display.finish()
        display.doing("writing the last checkpoint")
    return state


def _wait(running: deque[jax.Array], done: int, steps: int, display: Display, left: int = 0) -> None:
    """Wait until the devices have finished all but `left` of the steps that were begun, the last of them `done`."""
    while len(running) > left:
        display.doing(f"computing step {done + 1 - len(running):,} of {steps:,}", after=LONG_SECONDS)
        jax.block_until_ready(running.popleft())
        display.advance()


def _told(stopping: list[int], last: bool) -> bool:
    """Whether an evaluation is to be given up: the process was told to stop, and the run goes on after this step."""
    return bool(stopping) and not last


def _means(pending: list[dict[str, Any]]) -> dict[str, Any]:
    means = {name: float(np.mean([float(m[name]) for m in pending])) for name in pending[0]}
    means["skipped"] = int(pending[-1]["skipped"])
    return means
