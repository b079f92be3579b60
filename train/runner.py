"""A run from its config to its results: model, data, mesh, training, evaluation, curves, and the checkpoint that goes home."""

import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from ..checkpoint import default_dtype, load, resolve
from ..errors import CheckpointError, ConfigError
from ..io import read_json, write_json
from ..model import SmolVLMForConditionalGeneration
from ..parameters import flatten_params, init_params, logical_axes, unflatten_params
from ..processing import SmolVLMProcessor
from ..sharding import make_mesh, parameter_shardings
from ..sizes import published_config
from .config import MeshConfig, TrainConfig, to_dict
from .curves import draw_curves
from .evaluate import Answer, ask, held_out, write_page
from .export import export
from .loop import fit
from .lora import combine, init_adapters
from .metrics import read_metrics
from .parts import join
from .pipeline import TrainingData
from .processes import everyones, on_host
from .state import TrainState, split_trained, state_axes, state_params

__all__ = ["TrainResult", "describe", "open_mesh", "open_model", "run"]


@dataclass(frozen=True)
class TrainResult:
    """directory: of the run; model: the exported Hugging Face directory, or None; metrics: the last line of the log; state: the
    last state, of which `params` are the model's or the adapters."""

    directory: Path
    model: Path | None
    metrics: dict[str, Any]
    state: TrainState


def open_mesh(config: MeshConfig):
    """The mesh of a run, over all devices of all processes."""
    devices = jax.devices()
    if config.devices is not None:
        if config.devices > len(devices):
            raise ConfigError(f"mesh.devices is {config.devices}, but there are {len(devices)}")
        devices = devices[: config.devices]
    return make_mesh(config.data, config.fsdp, config.tensor, devices)


def describe(config: TrainConfig) -> SmolVLMForConditionalGeneration:
    """The model a config asks for, without its weights."""
    compute = jnp.dtype(config.dtype) if config.dtype else default_dtype()
    if config.model.startswith("shape:"):
        shape = published_config(config.model.removeprefix("shape:"))
    else:
        from ..convert.source import open_source

        source = open_source(resolve(config.model))
        shape = source.model_config
        source.close()
    return SmolVLMForConditionalGeneration(shape, dtype=compute, remat=config.remat, scan_layers=config.scan_layers)


def open_model(config: TrainConfig, mesh) -> tuple[SmolVLMForConditionalGeneration, dict, dict]:
    """(model, parameters of the state, frozen base): under LoRA the base is everything but the adapters and the parts trained
    whole, else it is empty."""
    trained_dtype = jnp.dtype(config.param_dtype)
    if config.model.startswith("shape:"):
        model = describe(config)
        params = init_params(model, config.seed, trained_dtype, mesh)
    else:
        loaded, params = load(config.model, mesh=mesh)
        model = loaded.clone(
            dtype=jnp.dtype(config.dtype) if config.dtype else default_dtype(),
            remat=config.remat,
            scan_layers=config.scan_layers,
        )
    if config.lora is None:
        return model, _cast(params, trained_dtype), {}
    whole, frozen = split_trained(params, config)
    frozen = _cast(frozen, jnp.dtype(config.frozen_dtype) if config.frozen_dtype else jnp.dtype(model.dtype))
    shardings = parameter_shardings(state_params(model, config), state_axes(model, config), mesh)
    make = lambda whole: join(whole, init_adapters(model, config.lora, config.seed, trained_dtype))
    return model, jax.jit(make, out_shardings=shardings)(_cast(whole, trained_dtype)), frozen


def _cast(params: dict, dtype) -> dict:
    """One leaf after the other, so that the two copies never exist side by side."""
    flat = flatten_params(params)
    del params
    return unflatten_params({path: flat.pop(path).astype(dtype) for path in list(flat)})


def run(config: TrainConfig, *, progress: bool | None = None) -> TrainResult:
    """Train as `config` says; a run that was cut off goes on where its newest checkpoint stands.

    OUTPUT gets config.json, run.json (the config), metrics.jsonl, checkpoints/, curves.png, with evaluation samples.html and
    evaluation.json, and model/, the Hugging Face directory. progress: show a bar; default: when stderr is a terminal.
    Raises ConfigError, CheckpointError, InputError; loop.Preempted after SIGTERM.
    """
    if config.distributed and not jax.distributed.is_initialized():
        # TPU pods, Slurm and the like are recognised by jax; elsewhere three variables say who is who.
        given = {name: os.environ.get(f"JAX_{name.upper()}") for name in ("num_processes", "process_id")}
        jax.distributed.initialize(**{name: int(value) for name, value in given.items() if value})
    if config.data.generated is not None:
        from .recipes import generated

        return generated(config, progress)
    main = jax.process_index() == 0
    directory = Path(config.output).absolute()
    processor_directory = _processor_directory(config)
    directory.mkdir(parents=True, exist_ok=True)
    _record(config, directory, main)
    mesh = open_mesh(config.mesh)
    evaluator = _Evaluator(config, processor_directory, directory, mesh) if config.evaluation else None
    data = TrainingData(
        config.data,
        os.fspath(processor_directory),
        config.seed,
        config.accumulation,
        jax.process_index(),
        jax.process_count(),
    )
    try:
        model, *weights = open_model(config, mesh)
        base = weights.pop()
        if evaluator is not None:
            evaluator.prepare(model, base, config)
        state = fit(
            model, weights.pop(), _FromRecords(data), config, mesh, directory, base=base, evaluate=evaluator, progress=progress
        )
    finally:
        data.close()
    metrics = read_metrics(directory)
    if main:
        draw_curves(metrics, directory / "curves.png")
        for line in data.told:
            print(f"smolvlm-jax: skipped, {line}", file=sys.stderr)
    exported = None
    if config.export:
        trained = on_host(state.params)
        scale = 1.0 if config.lora is None else config.lora.scale
        exported = directory / "model"
        if main:
            export(config.model, trained, exported, scale=scale)
    return TrainResult(directory, exported, metrics[-1] if metrics else {}, state)


def _processor_directory(config: TrainConfig) -> Path:
    if config.model.startswith("shape:"):
        raise ConfigError(f"model {config.model!r} is a shape without tokenizer: name a checkpoint to train")
    return resolve(config.model)


# What a checkpoint of a run was made with and cannot be continued without.
_FIXED = ("model", "lora", "learning_rates", "param_dtype", "seed")


def _record(config: TrainConfig, directory: Path, main: bool) -> None:
    """Write run.json; refuse to go on with a run of another model or other trained parts."""
    path, now = directory / "run.json", to_dict(config)
    if path.is_file() and (directory / "checkpoints").is_dir():
        before = read_json(path)
        for name in _FIXED:
            if before.get(name) != now[name]:
                raise CheckpointError(
                    f"{directory} holds a run with {name} {before.get(name)!r}, this one has {now[name]!r}: "
                    "continue with the same, or choose another output"
                )
    if main:
        write_json(path, now)


class _FromRecords:
    """TrainingData as the loop wants it."""

    def __init__(self, data: TrainingData):
        self._data = data

    def take(self, step: int):
        return (next(self._data),)

    def state(self) -> dict[str, Any]:
        return self._data.state()

    def restore(self, state: dict[str, Any]) -> None:
        self._data.restore(state)

    def figures(self) -> dict[str, Any]:
        counts = self._data.counts
        return {**self._data.padding(), **{n: counts[n] for n in ("samples", "too_long", "faulty", "dropped_pictures")}}

    def close(self) -> None:
        """The loop's thread may still be reading: `run` closes the data when it has left."""


class _Evaluator:
    """Called by the loop with the state; writes the page of examples and returns figures.

    The processes of a job share the questions out: each answers its own on its own devices, with a whole copy of the weights.
    """

    def __init__(self, config: TrainConfig, processor: Path, directory: Path, mesh):
        self._config, self._directory = config, directory
        if jax.process_count() > 1:
            mesh = make_mesh(1, -1, 1, jax.local_devices())
        self._mesh = mesh if mesh.size > 1 else None
        self._processor = SmolVLMProcessor.from_pretrained(processor)
        self._tasks = held_out(config.evaluation)

    def prepare(self, model, base: dict, config: TrainConfig) -> None:
        self._model, self._base = model.clone(remat="none", scan_layers=False), base
        self._scale = 1.0 if config.lora is None else config.lora.scale

    def __call__(self, state: TrainState, step: int) -> dict[str, float]:
        started = time.perf_counter()
        config, tasks = self._config, self._tasks
        params = combine(self._base, state.params, self._scale)
        count = jax.process_count()
        if count > 1:
            params = on_host(params)
            if self._mesh is not None:
                axes = join(logical_axes(self._model), state_axes(self._model, config))
                params = jax.device_put(params, parameter_shardings(params, axes, self._mesh))
            tasks = tasks[jax.process_index() :: count]
        own = ask(self._model, params, self._processor, tasks, config.evaluation, config.data, self._mesh)
        texts = everyones([answer.got for answer in own])
        got = [texts[i % count][i // count] for i in range(len(self._tasks))]
        answers = [Answer(messages, wanted, text) for (messages, wanted), text in zip(self._tasks, got, strict=True)]
        share = sum(answer.right for answer in answers) / len(answers)
        if jax.process_index() == 0:
            self._show(answers, share, step)
        return {"exact_match": share, "evaluation_s": time.perf_counter() - started}

    def _show(self, answers: list[Answer], share: float, step: int) -> None:
        name = Path(self._config.evaluation.path).name
        write_page(answers, self._directory / "samples.html", f"{name} at step {step}", self._config.evaluation.show)
        rows = [{"wanted": a.wanted, "got": a.got} for a in answers]
        write_json(self._directory / "evaluation.json", {"step": step, "exact_match": share, "answers": rows})
