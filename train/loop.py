"""The training loop: restore, step, log, evaluate, checkpoint, and leave in good order when told to stop."""

import contextlib
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import Mesh

from ..model import SmolVLMForConditionalGeneration
from .checkpoints import Checkpoints
from .config import TrainConfig
from .data import prefetch
from .metrics import Log
from .processes import everyones
from .state import TrainState, create_state, learning_rate, make_optimizer, state_shardings
from .step import make_step

__all__ = ["Batches", "Preempted", "fit", "train"]


class Preempted(SystemExit):
    """The process was told to stop (SIGTERM) and has saved where it stands; exit code 143."""

    def __init__(self, step: int):
        super().__init__(143)
        self.step = step


class Batches(Protocol):
    """What the loop learns from. `state()` is the position behind the batches taken last."""

    def take(self, step: int) -> Sequence[dict[str, np.ndarray]]: ...

    def state(self) -> dict[str, Any]: ...

    def restore(self, state: dict[str, Any]) -> None: ...

    def figures(self) -> dict[str, Any]: ...

    def close(self) -> None: ...


class Made:
    """Batches that are a function of the step."""

    def __init__(self, make: Callable[[int], Sequence[dict[str, np.ndarray]]]):
        self._make = make

    def take(self, step: int) -> Sequence[dict[str, np.ndarray]]:
        return self._make(step)

    def state(self) -> dict[str, Any]:
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        pass

    def figures(self) -> dict[str, Any]:
        return {}

    def close(self) -> None:
        pass


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
    return fit(model, params, Made(make_batches), config, mesh, directory, progress=progress)


def fit(
    model: SmolVLMForConditionalGeneration,
    params,
    batches: Batches,
    config: TrainConfig,
    mesh: Mesh,
    directory: Path,
    *,
    base: dict | None = None,
    evaluate: Callable[[TrainState, int], dict[str, float]] | None = None,
    progress: bool | None = None,
) -> TrainState:
    """As `train`, from any source of batches, which is closed on every way out.

    base: parameters that stay as they are, beside those of the state (LoRA). evaluate(state, step): figures for the log,
    called every config.evaluation.every steps and at the end; the checkpoint of its step knows them.
    Raises Preempted after SIGTERM, once a checkpoint is written.
    """
    directory = Path(directory).absolute()
    main = jax.process_index() == 0
    if main:
        model.config.save_pretrained(directory)  # so that the run can be loaded and exported while it goes on
    optimizer = make_optimizer(config)
    shardings = state_shardings(model, optimizer, mesh, config)
    with contextlib.ExitStack() as stack:
        stack.callback(batches.close)
        checkpoints = stack.enter_context(Checkpoints(directory, config.keep))
        create = lambda p: create_state(p, optimizer, config)
        latest = checkpoints.latest()
        if latest is None:
            state = jax.jit(create, out_shardings=shardings)(params)
        else:
            state, positions = checkpoints.restore(latest, jax.eval_shape(create, params), shardings)
            batches.restore(positions[jax.process_index() % len(positions)])
        del params  # the state has its own
        first = int(state.step)
        step = make_step(model, optimizer, mesh, config)
        log = Log(directory, config.steps, first, progress, config.loggers, main)
        stack.callback(log.close)
        stopping = stack.enter_context(_told_to_stop())
        every = 0 if evaluate is None or config.evaluation is None else config.evaluation.every

        def ahead(index: int):
            taken = batches.take(index)
            return taken, batches.state(), batches.figures()

        source = prefetch(ahead, first, config.steps, depth=2)
        stack.callback(source.close)
        pending: list[dict[str, Any]] = []
        started, last = time.perf_counter(), first
        schedule = learning_rate(config)
        for index, (taken, position, figures) in zip(range(first, config.steps), source, strict=True):
            state, metrics = step(state, taken, base)
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
                checkpoints.wait()
                raise Preempted(done)
    return state


def _means(pending: list[dict[str, Any]]) -> dict[str, Any]:
    means = {name: float(np.mean([float(m[name]) for m in pending])) for name in pending[0]}
    means["skipped"] = int(pending[-1]["skipped"])
    return means


@contextlib.contextmanager
def _told_to_stop() -> Iterator[list]:
    """A list that is empty until SIGTERM arrives. A job of several processes is told by jax's own handler instead, which all
    of them agree on; outside the main thread no handler can be set."""
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
