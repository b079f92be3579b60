"""`smolvlm-jax batch`. Importing this module imports nothing heavy."""

import argparse
import functools
import json
import sys
import warnings
from pathlib import Path
from typing import Any

from ..errors import InputError

__all__ = ["add_parser"]

_SAMPLING = ("do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "repetition_window", "ignore_eos")
_PICTURES = ("max_tiles", "do_upscale", "do_image_splitting")


def run_batch(options: argparse.Namespace) -> int:
    """The exit code: 0, 1 where records lack a row or too many have an error, 128 + the signal where one came."""
    from ..checkpoint import resolve
    from ..engine.loading import is_docling
    from ..io import write_json
    from ..processing import SmolVLMProcessor
    from ..records.sources import open_source
    from .hosts import shard_of
    from .job import BatchJob, Shard
    from .manifest import agree
    from .pool import WorkerPool, default_workers
    from .signals import stop_on_signals
    from .sinks import open_sink
    from .workers import Setup

    say = lambda line: None if options.quiet else print(f"smolvlm-jax: {line}", file=sys.stderr)
    if not 0 <= options.max_error_rate <= 1:
        raise InputError(f"--max-error-rate is a share from 0 to 1, got {options.max_error_rate}")
    workers = default_workers() if options.workers is None else options.workers
    if workers < 0 or options.record_timeout <= 0:
        raise InputError("--workers and --record-timeout cannot be negative, nor the time limit 0")
    index, count = shard_of(options.shard_index, options.num_shards)
    if options.shard_index is None and count > 1:
        say(f"this is shard {index} of {count}, as the launcher's environment says")
    shard = Shard(index, count, options.shard_size)
    folder, sink, sampling = Path(options.output), open_sink(options.format), _sampling(options)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file; OUTPUT is a directory")
    directory = resolve(options.model)
    source = open_source(options.input, options.source, prompt=options.prompt, columns=_columns(options.column))
    pictures = {name: value for name in _PICTURES if (value := getattr(options, name)) is not None}
    SmolVLMProcessor.from_pretrained(directory, **pictures).count_tokens(512, 512)  # a mistake here would be every record's
    keep = is_docling(directory) if options.keep_special_tokens is None else options.keep_special_tokens
    agree(folder, _facts(options, directory, source, sampling, pictures, keep), options.force, say)
    setup = Setup(str(directory), source.parse, sampling, pictures)
    engine = functools.partial(_engine, options, directory, keep)
    with WorkerPool(setup, workers, options.record_timeout) as pool:
        job = BatchJob(source, folder, sink, shard, pool, engine, options.quiet)
        try:
            with stop_on_signals(job) as signals:
                summary = job.run()
        except OSError as error:
            print(f"smolvlm-jax: {error}; what is finished is kept: run the same command again", file=sys.stderr)
            return 1
    if not summary["complete"] and signals:
        say(f"stopped after {summary['records']} records; run the same command again to go on")
        return 128 + signals[0]
    write_json(folder / f"_summary-{index}-of-{count}.json", summary)
    print(json.dumps(summary, indent=2))
    if summary["error_share"] > options.max_error_rate:
        say(f"{summary['errors']} of {summary['records']} records have an error, above --max-error-rate")
        return 1
    return 0 if summary["complete"] else 1


def _sampling(options: argparse.Namespace):
    from ..generation_config import SamplingParams

    given = {name: value for name in _SAMPLING if (value := getattr(options, name)) is not None}
    return SamplingParams(max_new_tokens=options.max_new_tokens, seed=options.seed, stop=tuple(options.stop), **given)


def _columns(pairs: list[str]) -> tuple[tuple[str, str], ...]:
    from ..records.record import FIELDS

    columns = []
    for pair in pairs:
        name, _, column = pair.partition("=")
        if name not in FIELDS or not column:
            raise InputError(f"--column {pair} is not NAME=COLUMN with a name of {', '.join(FIELDS)}")
        columns.append((name, column))
    return tuple(columns)


def _facts(options, directory: Path, source, sampling, pictures: dict[str, Any], keep: bool) -> dict[str, Any]:
    """What rows depend on. The number of shards is not among it: a restart may have more hosts or fewer."""
    from dataclasses import asdict

    from .manifest import model_digest

    return {
        "input": source.describe(),
        "model": model_digest(directory),
        "prompt": options.prompt,
        "columns": options.column,
        "sampling": {**asdict(sampling), "stop": list(sampling.stop)},
        "pictures": pictures,
        "keep_special_tokens": keep,
        "dtype": options.dtype,
        "shard_size": options.shard_size,
        "output_format": options.format,
    }


def _engine(options: argparse.Namespace, directory: Path, keep: bool):
    from ..engine.loading import load_engine

    config = {name: value for name in ("slots", "ring_lengths") if (value := getattr(options, name)) is not None}
    with warnings.catch_warnings():
        if options.quiet:
            warnings.simplefilter("ignore")
        return load_engine(directory, dtype=options.dtype, mesh=options.mesh, keep_special_tokens=keep, **config)


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of whole numbers like 256,1024") from None


def add_parser(commands) -> None:
    """Register the command; it sets `run`, a function from the parsed arguments to an exit code."""
    command = commands.add_parser(
        "batch",
        help="answer a file of records",
        description="Answer every record of INPUT, in parts that appear in OUTPUT when they are whole. Run the same command "
        "again after an interruption, and it goes on.",
    )
    command.add_argument("input", metavar="INPUT", help="JSONL, Parquet, or a directory or glob of pictures and videos")
    command.add_argument("output", metavar="OUTPUT", help="directory for the answers")
    command.add_argument(
        "--model", default="tiny", metavar="NAME|DIR", help="bundled name, directory or Hub id (default: tiny)"
    )
    command.add_argument("--prompt", help="the question for records that bring none")

    answers = command.add_argument_group(
        "answers", "a record may set any of these for itself; those without a default are as the checkpoint says"
    )
    answers.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="(default: %(default)s)")
    answers.add_argument(
        "--do-sample", action=argparse.BooleanOptionalAction, default=None, help="draw tokens (default: as the checkpoint says)"
    )
    answers.add_argument("--temperature", type=float)
    answers.add_argument("--top-k", type=int)
    answers.add_argument("--top-p", type=float)
    answers.add_argument("--min-p", type=float)
    answers.add_argument("--repetition-penalty", type=float)
    answers.add_argument("--repetition-window", type=int, help="end an answer whose last N tokens repeat; 0: never")
    answers.add_argument("--ignore-eos", action="store_true", default=None, help="go on to the limit")
    answers.add_argument("--seed", type=int, default=0, help="of the job; each record draws from this and its id")
    answers.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end an answer here; may be repeated")
    answers.add_argument(
        "--keep-special-tokens",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="leave special tokens in the text (default: for docling checkpoints, whose doctags are such)",
    )

    pictures = command.add_argument_group("pictures")
    pictures.add_argument("--max-tiles", type=int, metavar="N", help="shrink pictures that would take more tiles")
    pictures.add_argument(
        "--no-upscale", dest="do_upscale", action="store_false", default=None, help="leave small pictures small"
    )
    pictures.add_argument(
        "--no-image-splitting", dest="do_image_splitting", action="store_false", default=None, help="one tile per picture"
    )

    data = command.add_argument_group("input and output")
    data.add_argument("--source", metavar="KIND", help="jsonl, parquet or media (default: by the names)")
    data.add_argument("--column", action="append", default=[], metavar="NAME=COLUMN", help="e.g. image=jpg; may be repeated")
    data.add_argument("--format", default="jsonl", help="jsonl or parquet (default: jsonl)")
    data.add_argument("--shard-size", type=int, default=1000, metavar="N", help="records of a part (default: %(default)s)")
    data.add_argument("--num-shards", type=int, metavar="N", help="number of hosts (default: as the launcher says, else 1)")
    data.add_argument("--shard-index", type=int, metavar="I", help="which of them this is, from 0")
    data.add_argument("--max-error-rate", type=float, default=0.05, help="share of errors for exit code 0 (default: 0.05)")
    data.add_argument("--force", action="store_true", help="move the output of another job aside and start afresh")
    data.add_argument("--quiet", action="store_true", help="no progress and no remarks")

    machine = command.add_argument_group("machine")
    machine.add_argument("--workers", type=int, metavar="N", help="processes that prepare records (default: cores - 1)")
    machine.add_argument("--record-timeout", type=float, default=120.0, metavar="S", help="to prepare one (default: 120)")
    machine.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: bfloat16, on CPU float32")
    machine.add_argument("--mesh", help="of this host's devices, e.g. data=2,fsdp=1,tensor=2 (default: all to data)")
    machine.add_argument("--slots", type=_numbers, metavar="N,…", help="rows decoded at once, for each ring")
    machine.add_argument("--ring-lengths", type=_numbers, metavar="N,…", help="lengths of the caches, ascending")
    command.set_defaults(run=run_batch)
