"""A run from its configuration to its results: model, data, mesh, training, evaluation, curves and the exported checkpoint."""

import os
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from ..checkpoint import default_dtype, load, resolve
from ..compilation_cache import check_cache
from ..convert.digest import files_digest
from ..convert.hosts import join_job
from ..convert.opened import Checkpoint, open_checkpoint
from ..errors import ChangedError, CheckpointError, ConfigError, InputError
from ..field_types import check_kind
from ..locate import adapted, stack
from ..model import SmolVLMForConditionalGeneration
from ..parameters import flatten_params, init_params, quantize_params, unflatten_params
from ..processing.options import limits_of
from ..quantization import SCALE, dequantized, is_quantized
from ..retrieval_model import require_text
from ..signals import raised
from ..staging import check_new
from ..storage import AnyPath, StorePath, place
from ..terminal import say
from .adapter import export_adapter
from .checks import check_model, check_vocabulary, question_room
from .claim import made_directory, nothing_left, only_run
from .config import TrainConfig
from .continued import earlier, note_export, remarks, write_settings
from .curves import draw_curves
from .devices import check_rows, open_mesh
from .evaluate import Evaluator, check_tasks, held_out, held_out_records
from .export import export
from .held_out import HeldOutLoss
from .look import described, first_warnings
from .loop import fit
from .lora import init_adapters
from .metrics import read_metrics
from .mirror import Mirror, mirrored
from .partition import Partition, join
from .pipeline import TrainingData
from .processes import on_host
from .progress import Display
from .samples import Prepare
from .state import TrainState, shortened_warmup
from .stopping import Preempted

__all__ = ["TrainResult", "divide", "open_model", "run"]


@dataclass(frozen=True)
class TrainResult:
    """What a run returns.

    Attributes:
        directory: of the run, or its place in a store.
        model: the exported Hugging Face directory, or None.
        metrics: the last line of the log.
        state: the last state, whose `params` are the model's or the adapters.
    """

    directory: AnyPath
    model: AnyPath | None
    metrics: dict[str, Any]
    state: TrainState


def open_model(config: TrainConfig, mesh: Mesh) -> tuple[SmolVLMForConditionalGeneration, dict[str, Any]]:
    """The model to train, and all its parameters, on the mesh."""
    loaded, params = load(config.model, mesh=mesh, attention=config.attention, adapter=config.adapter, check=config.check)
    require_text(loaded)
    dtype = jnp.dtype(config.dtype) if config.dtype else default_dtype()
    model = loaded.clone(dtype=dtype, remat=config.remat, scan_layers=config.scan_layers)
    return model, _random_params(model, config.seed, mesh) if config.weights == "random" else params


def divide(
    params: dict, model: SmolVLMForConditionalGeneration, partition: Partition, mesh: Mesh
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(parameters of the state, with new adapters, frozen base) from all parameters of the model."""
    config = partition.config
    dtype = jnp.dtype(config.param_dtype)
    if config.lora is None:
        return _cast(dequantized(params, dtype), dtype), {}
    whole, frozen = partition.split(params)
    whole = dequantized(whole, dtype)
    if partition.in_8_bits:
        frozen = _cast(quantize_params(model, frozen), model.dtype)
    else:
        kept = jnp.dtype(config.frozen_dtype or model.dtype)
        frozen = _cast(dequantized(frozen, kept), kept)
    make = lambda whole: join(whole, init_adapters(model, config.lora, config.seed, dtype))
    return jax.jit(make, out_shardings=partition.shardings(mesh))(_cast(whole, dtype)), frozen


def _random_params(model: SmolVLMForConditionalGeneration, seed: int, mesh: Mesh) -> dict[str, Any]:
    """Random float32 parameters. The patch filters have zero mean: they see edges, not the brightness of the background."""
    params = init_params(model, seed, mesh=mesh)
    embedding = params["model"]["vision_model"]["embeddings"]["patch_embedding"]
    embedding["kernel"] -= embedding["kernel"].mean((0, 1, 2), keepdims=True)
    return params


def _cast(params: dict, dtype) -> dict:
    """One leaf after the other, so that the two copies never exist side by side. Weights in 8 bits and their scales stay so."""
    flat = flatten_params(params)
    del params
    fixed = {name for path in flat if path.endswith(SCALE) for name in (path, path.removesuffix(SCALE))}
    return unflatten_params({path: flat.pop(path) if path in fixed else flat.pop(path).astype(dtype) for path in list(flat)})


def run(config: TrainConfig, *, progress: bool | None = None) -> TrainResult:
    """Train as `config` says; a run that was interrupted continues from its newest checkpoint.

    OUTPUT receives config.json, run.json (the configuration), metrics.jsonl, checkpoints/, curves.png, with evaluation
    samples.html and evaluation.json, and model/, the Hugging Face directory.

    Args:
        config: the run.
        progress: show a bar (True) or nothing (False); default: a bar where stderr is a terminal, else a line now and then.

    Returns:
        The directory, the exported model, the last metrics, and the last state.

    Raises:
        ConfigError: the configuration does not fit the model, the data or the devices.
        CheckpointError: OUTPUT holds a run with another model, other trained parts or other data; it has checkpoints, and
            none of them is whole.
        StorageError: another run is in OUTPUT.
        InputError: there is no such data, or OUTPUT cannot be a directory.
        ChangedError: the data, or the checkpoint that training starts from, is no longer what it was when the run began.
        Preempted: after SIGTERM or SIGINT, once a checkpoint is written (see `loop`).
        SystemExit, KeyboardInterrupt: after the same while it is not training yet, or no more.
    """
    check_kind("config", config, TrainConfig, "run(TrainConfig(…)), or run(load_recipe(name, overrides))")
    if not config.model:
        raise ConfigError("model is not named: model=NAME, a directory or a name that `smolvlm-jax models` lists")
    if config.model.startswith("shape:"):
        raise ConfigError(f"model {config.model!r} is a shape without tokenizer: name a checkpoint to train")
    with ExitStack() as context:
        display = context.enter_context(Display(config.steps, progress))
        if config.distributed:
            display.doing("waiting for the other processes of the job")
            join_job()
        main = jax.process_index() == 0
        if not main:
            display.mute()
        mesh = open_mesh(config.mesh)
        check_rows(config, mesh)
        check_cache()
        if jax.process_count() == 1:  # of several, jax answers signals
            context.enter_context(raised())
        display.doing(f"opening {config.model}")
        model, base = adapted(config.model, config.adapter)
        parts = stack(model, base=base)
        files = resolve(model, base=base)
        started = open_checkpoint(model, base=base)  # how its files are now
        started.close()
        check_model(config, started.model_config)
        output = place(config.output)
        mirror = None
        if isinstance(output, StorePath):
            if jax.process_count() > 1:
                raise ConfigError(
                    f"output {output} is in an object store, where only one process can write checkpoints: in a job of several "
                    "name a directory that all of them see, such as a mounted bucket"
                )
            display.doing(f"reading {output}")
            mirror = context.enter_context(mirrored(output))
            directory = mirror.directory
        else:
            directory = output.absolute()
            context.enter_context(made_directory(directory))
        if main:
            context.enter_context(only_run(directory) if mirror is None else nullcontext())
            context.enter_context(nothing_left(directory))
        return _train(config, mesh, directory, files, started, display, mirror, named=len(parts) == 1)


def _train(
    config: TrainConfig,
    mesh: Mesh,
    directory: Path,
    files: Path,
    started: Checkpoint,
    display: Display,
    mirror: Mirror | None,
    *,
    named: bool,
) -> TrainResult:
    """The run, in a directory that no other run is in, and that may be sent to a store. named: whether what it starts from is a
    model by itself."""
    main = jax.process_index() == 0
    output = directory if mirror is None else mirror.path
    before = earlier(config, directory, output)
    if config.export and main:
        for name in ("model", *([] if config.lora is None else ["adapter"])):
            _check_export(output / name, begun=before is not None)
    display.doing("opening the data")
    kept = None if config.evaluation is None else held_out_records(config.evaluation)
    tasks = [] if config.evaluation is None else held_out(config.evaluation, kept, limits_of(config.data.pictures))
    data = TrainingData(
        config.data,
        os.fspath(files),
        seed=config.seed,
        accumulation=config.accumulation,
        index=jax.process_index(),
        count=jax.process_count(),
        model=files_digest((file.name, file) for file in started.files),
    )
    text = started.model_config.text_config
    check_vocabulary(data.processor.tokenizer, text)
    if main:
        told = check_tasks(tasks, data.processor, config.data, question_room(config, text))
        if told and len(told) == len(tasks):
            raise ConfigError(f"none of the {len(told):,} questions of evaluation.path can be asked; the first, {told[0]}")
        if told:
            say(
                f"evaluation data: {len(told):,} of {len(tasks):,} questions cannot be asked, and count as wrong answers; the "
                f"first, {told[0]}"
            )
    for warning in first_warnings(data.sources, data.processor, config.data):
        display.remark(warning)
    display.doing(f"loading {config.model}")
    model, params = open_model(config, mesh)
    partition = Partition.of(model, config, quantized=is_quantized(params))
    params, base = divide(params, model, partition, mesh)
    for line in described(partition, mesh, [len(records) for records in data.sources]):
        display.remark(line)
    if line := shortened_warmup(config):
        display.remark(line)
    evaluate = None
    if kept is not None and config.evaluation is not None:
        loss = HeldOutLoss(
            model,
            partition,
            base=base,
            records=kept,
            count=config.evaluation.samples,
            data=config.data,
            prepare=Prepare(files, config.data),
            shape=data.shape,
            mesh=mesh,
        )
        evaluate = Evaluator(
            model, partition, base=base, processor=data.processor, tasks=tasks, loss=loss, directory=directory, mesh=mesh
        )
    weights = [params]  # emptied by the call, so that the loop can free the parameters that its state replaces
    del params

    def begin(first: int | None) -> None:
        if main and (before is None or first != config.steps):  # the steps of a finished run were not made with these
            write_settings(directory, before, config)
        if evaluate is not None and first != config.steps:
            display.remark(evaluate.description)
        if first is not None and before is not None:
            for line in remarks(before, config, first, output / "model"):
                display.remark(line)

    options: dict[str, Any] = {"mirror": mirror, "base": base, "evaluate": evaluate, "display": display, "begin": begin}
    try:
        state = fit(model, weights.pop(), data, partition, mesh, directory, **options)
    except Preempted as stop:
        display.close()
        if main:
            draw_curves(read_metrics(directory), directory / "curves.png")
        display.remark(
            f"stopped at step {stop.step:,} of {config.steps:,}, which is saved in {output}: run the same command again to go "
            "on"
        )
        raise
    display.finish()
    metrics = read_metrics(directory)
    if main:
        draw_curves(metrics, directory / "curves.png")
        for line in data.told:
            say(f"skipped, {line}")
    exported = None
    if config.export:
        trained = on_host(state.params)
        exported = output / "model"
        if main:
            display.doing(f"writing {exported}")
            try:
                with started.unchanged():
                    pass
            except ChangedError as error:
                raise ChangedError(
                    f"{exported} is not written, since {config.model} is no longer what training started from: put it "
                    f"back, and run the same command again ({error})"
                ) from error
            export(config.model, trained, exported, scale=partition.scale, adapter=config.adapter)
            if config.lora is not None:
                _export_adapter(config, trained, output / "adapter", named)
            note_export(directory, int(state.step))
    if mirror is not None:
        display.doing(f"sending what is left to {output}")
    return TrainResult(output, exported, metrics[-1] if metrics else {}, state)


def _export_adapter(config: TrainConfig, trained: dict, destination: AnyPath, named: bool) -> None:
    """Write the adapters alone, or say why they cannot be."""
    assert config.lora is not None
    try:
        if not named:
            raise InputError("what they belong to, a base with another adapter in it, has no name")
        export_adapter(config.model, trained, destination, config.lora)
    except InputError as error:
        say(f"the adapters are in the exported model alone: {error}")


def _check_export(destination: AnyPath, *, begun: bool) -> None:
    """Raise CheckpointError if an export would not be written, or would replace what this run has not made."""
    if not begun and destination.exists():
        raise CheckpointError(f"{destination} exists, and the export of this run goes there: choose another output, or move it")
    check_new(destination, force=True)
