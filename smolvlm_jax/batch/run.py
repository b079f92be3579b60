"""`run_batch`: a batch job from its configuration, with workers, engine, manifest and summary."""

import functools
import os
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ..compilation_cache import check_cache, keep_compiled_programs
from ..convert.digest import model_digest
from ..documents.forms import require_docling
from ..engine.loading import check_settings, is_docling, load_engine
from ..errors import InputError, SmolVLMError, describe, device_errors
from ..field_types import check_kind
from ..generation_config import GenerationConfig
from ..io import write_json
from ..locate import adapted, resolve, stack
from ..processing.options import check_options, limits_of
from ..progress import Progress
from ..records.sources import LINES, Source, counted, open_source, takes_in
from ..records.sources.files import FileSource
from ..records.sources.parquet import ParquetSource
from ..records.sources.plain import ending_of
from ..storage import AnyPath, is_store, place
from ..terminal import say
from .arrow_columns import arrow_types
from .config import BatchConfig
from .documents import write_documents
from .gallery import Reader, write_gallery
from .hosts import shard_of
from .job import BatchJob, Shard
from .manifest import Manifest
from .own import Own, check_columns, look, require_records, unnamed
from .parts import part_name
from .pool import WorkerPool, default_workers
from .remarks import remarks
from .signals import stop_on_signals
from .sinks import SINKS, ParquetSink, Sink, open_sink
from .workers import Setup, longest_prompt

__all__ = ["run_batch"]

# Endings of files of records, and their kinds.
_KINDS: tuple[type[FileSource], ...] = (*LINES, ParquetSource)
_FILES = {ending: kind.name for kind in _KINDS for ending in kind.endings}


def run_batch(config: BatchConfig, notify: Callable[[str], None] = say) -> dict[str, Any]:
    """Answer every record of this process's shard that has no row yet. Called again, it continues where it stopped.

    SIGTERM and SIGINT stop the job if this is called from the main thread; finished rows are kept.

    Args:
        config: The job.
        notify: Called with remarks for the user, unless `config.quiet`.

    Returns:
        The summary: "complete" (whether every record of the shard has a row), "records", "answers", "errors", "error_share",
        "finish_reasons" and the other figures of docs/batch.md. It is also written to the output directory, unless a signal
        stopped the job: then "signal" holds its number.

    Raises:
        SmolVLMError: for what is wrong with the configuration, the input, the model, or an output that another job wrote.
        JobError: a SmolVLMError too: the device is out of memory or fails, workers do not start, or another job has replaced
            the manifest. Finished rows are kept.
        OSError: if the output cannot be written; finished rows are kept.
    """
    check_kind("config", config, BatchConfig, "run_batch(BatchConfig(input=…, output=…, model=…))")
    notify = (lambda line: None) if config.quiet else notify
    with Progress(show=not config.quiet) as progress:
        return _run(config, notify, progress)


def _run(config: BatchConfig, notify: Callable[[str], None], progress: Progress) -> dict[str, Any]:
    progress.tell("looking at the input")
    _require_current_directory(config)
    index, count = shard_of(config.shard_index, config.num_shards)
    if config.shard_index is None and count > 1:
        notify(f"this is shard {index} of {count}, as the launcher's environment says")
    shard, sink, folder = (
        Shard(index, count, config.shard_size),
        open_sink(config.format, config.logprobs),
        place(config.output),
    )
    model, base = adapted(config.model, config.adapter)
    parts = stack(model, base=base)  # once: of the Hub's one commit, though a branch may move on meanwhile
    model, base = parts[0], parts[1] if len(parts) > 1 else None
    directory = resolve(model, base=base)
    source = open_source(config.input, config.source, prompt=config.prompt, columns=config.columns)
    if takes_in(os.fspath(config.input), str(folder / f"{part_name(0)}{sink.ending}"), deep=source.media is not None):
        raise InputError(f"OUTPUT ({folder}) is where INPUT is read from, so answers would be input: choose another directory")
    own = Own(config.keep, sink.columns, config.columns)
    records, whole = look(source)
    if not records:  # or the first ones are too large to look at
        require_records(source, os.fspath(config.input))
    if source.media is not None:
        config.pictures.require_use(source.media, repr(os.fspath(config.input)))
        if config.pictures.files is False:
            raise InputError(f"--no-files (files) forbids to read the files that {os.fspath(config.input)!r} consists of")
        if config.keep:
            raise InputError(f"--keep {','.join(config.keep)}: {os.fspath(config.input)!r} holds files, which have no columns")
    check_columns(records, own)
    if config.format == ParquetSink.name:
        sink = open_sink(config.format, config.logprobs, arrow_types(source, records, own))
    if source.unread:
        notify(f"of {config.input}, these files are of kinds that are not read: {counted(source.unread)}")
    if left := Counter(map(ending_of, unnamed(source, records, whole=whole))):
        source.unread.update(left)
        instead = "; --source media reads the pictures instead of the records" if left.total() == len(source.beside) else ""
        notify(f"of {config.input}, no record ({source.name}) names these files, which are not read: {counted(left)}{instead}")
    longest = longest_prompt(directory, config.ring_lengths)
    sampling = replace(config.sampling, logprobs=0 if config.logprobs else None)
    defaults = GenerationConfig.from_pretrained(directory)
    setup = Setup(
        str(directory), source.parse, sampling, config.pictures, longest, config.record_memory, own, defaults.sampling
    )
    check_options(setup.processor())
    if idle := sampling.without_effect(defaults):
        notify(f"{', '.join(idle)}: without effect on records that do not set do_sample; --do-sample sets it for all")
    keep = is_docling(directory) if config.keep_special_tokens is None else config.keep_special_tokens
    if config.document is not None:
        _require_documents(config, directory, keep)
    given = {
        name: value for name in ("slots", "ring_lengths", "kv_cache_dtype") if (value := getattr(config, name)) is not None
    }
    # Before anything is written; needs jax, which otherwise starts beside the workers.
    if given or config.mesh is not None or config.attention != "auto":
        with device_errors("--slots or --ring-lengths"):
            check_settings(directory, mesh=config.mesh, attention=config.attention, **given)
    if config.compilation_cache is not None:
        check_cache(place(config.compilation_cache))
    if (kind := _FILES.get(os.path.splitext(folder.name.lower())[1], config.format)) != config.format:
        other = f"--format {kind} writes {kind}" if kind in SINKS else f"--format is one of {', '.join(SINKS)}"
        notify(f"OUTPUT ({folder}) is a directory, with parts of the answers in {config.format}; {other}")
    manifest = Manifest(folder, _facts(config, parts, directory, source, keep))
    manifest.agree(config.force, notify)
    engine = functools.partial(_engine, config, model, base=base, keep_special_tokens=keep, report=progress.tell)
    workers = default_workers() if config.workers is None else config.workers
    with WorkerPool(setup, workers, config.record_timeout) as pool:
        job = BatchJob(source, folder, sink, shard, pool, engine, config.quiet, manifest, progress)
        quiet, failures = warnings.catch_warnings(), device_errors("--slots or --ring-lengths")
        with stop_on_signals(job, notify=notify) as signals, failures, quiet:
            # the job remarks on these itself, with the number of records
            warnings.filterwarnings("ignore", ".* has no effect without do_sample=True")
            summary = job.run()
    for remark in remarks(job.notes, config.prompt):
        notify(remark)
    if not summary["complete"] and signals:
        notify(f"stopped: {job.kept()}; run the same command again to go on")
        return {**summary, "signal": signals[0]}
    if config.document is not None:
        progress.tell("making documents")
        summary = {**summary, "documents": _documents(config.document, job, folder, sink, notify)}
    if config.gallery and (page := _gallery(config, folder, sink, source, shard, notify)) is not None:
        summary = {**summary, "gallery": page}
    with manifest.held():
        write_json(folder / f"_summary-{index}-of-{count}.json", summary)
    others = {int(path.stem.rpartition("-")[2]) for path in folder.glob("_summary-*-of-[0-9]*.json")} - {count}
    if others and (missing := job.missing_parts()):
        notify(
            f"{len(missing)} parts of the input are not there yet ({part_name(missing[0])} is the first), and summaries beside "
            f"this one are of {', '.join(map(str, sorted(others)))} shards: hosts with another --num-shards leave parts out"
        )
    return summary


def _require_current_directory(config: BatchConfig) -> None:
    """Relative paths need one: what the system says where it was removed names no file."""
    relative = [path for path in (config.input, config.output) if not (os.path.isabs(path) or is_store(path))]
    try:
        os.getcwd()
    except OSError as error:
        if relative:
            raise InputError(
                f"{os.fspath(relative[0])!r} is a relative path, and the current directory does not exist any more: change to "
                "another one, or pass absolute paths"
            ) from error


def _require_documents(config: BatchConfig, directory: Path, keep: bool) -> None:
    """Raises InputError where there will be no DocTags, and MissingExtraError."""
    if not is_docling(directory):
        raise InputError(f"--document {config.document} is made of DocTags, and {config.model} writes none: it has no <doctag>")
    if not keep:
        raise InputError(f"--document {config.document} is made of DocTags, which --no-keep-special-tokens leaves out")
    require_docling()


def _documents(form: str, job: BatchJob, folder: AnyPath, sink: Sink, notify: Callable[[str], None]) -> dict[str, Any] | None:
    """The documents of a job whose last part is there; None if it is not."""
    parts, missing = job.part_paths(), len(job.missing_parts())
    if missing or not parts:
        notify(f"documents are made by the host that finishes last, once all parts are there: {missing} are not")
        return None
    made = write_documents(folder, sink, parts, form)
    for remark in made["remarks"]:
        notify(remark)
    return made


def _gallery(
    config: BatchConfig, folder: AnyPath, sink: Sink, source: Source, shard: Shard, notify: Callable[[str], None]
) -> str | None:
    """Where the page of the first answers is. What goes wrong with it is no fault of the answers."""
    reader = Reader(source.parse, limits_of(config.pictures), config.record_memory)
    title, seconds = f"Answers of {config.model or config.adapter}", config.record_timeout
    try:
        return str(write_gallery(folder, sink, source, reader, shard_size=shard.size, seconds=seconds, title=title))
    except (SmolVLMError, OSError) as error:
        notify(f"no page of the first answers could be made: {describe(error)}")
        return None


def _facts(config: BatchConfig, parts: list[Path], directory: Path, source: Source, keep: bool) -> dict[str, Any]:
    """What rows depend on. The number of shards is not among it: a restart may have more hosts or fewer."""
    sampling = config.sampling.sampling(GenerationConfig.from_pretrained(directory))
    given = {name: value for name, value in asdict(config.sampling).items() if name != "logprobs"}
    return {
        "input": source.describe(),
        "model": "+".join(model_digest(part) for part in parts),  # of an adapter and its base
        "prompt": config.prompt,
        "columns": [f"{name}={column}" for name, column in config.columns],
        "sampling": {**given, **asdict(sampling), "stop": list(config.sampling.stop)},
        "pictures": config.pictures.given(),
        "keep_special_tokens": keep,
        "dtype": config.dtype,
        "shard_size": config.shard_size,
        "output_format": config.format,
        "keep": "all" if config.keep is None else list(config.keep),
        **({"logprobs": config.logprobs} if config.logprobs else {}),
        **({"kv_cache": config.kv_cache_dtype} if config.kv_cache_dtype else {}),
    }


_ENGINE = ("check", "dtype", "mesh", "attention", "slots", "ring_lengths", "kv_cache_dtype")


def _engine(config: BatchConfig, model: Path, **given: Any):
    settings: dict[str, Any] = {name: getattr(config, name) for name in _ENGINE}
    if config.compilation_cache is not None:
        keep_compiled_programs(config.compilation_cache)
    with warnings.catch_warnings():
        if config.quiet:
            warnings.simplefilter("ignore")
        return load_engine(model, **given, **settings)
