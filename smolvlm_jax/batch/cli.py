"""`smolvlm-jax batch`. Importing this module imports nothing heavy."""

import argparse

from ..arguments import (
    add_command,
    add_machine,
    add_model,
    add_pictures,
    add_quiet,
    add_sampling,
    given,
    model_names,
    whole_numbers,
)
from ..errors import InputError, JobError, SmolVLMError
from ..generation_config import SamplingParams
from ..terminal import say, show
from .config import BatchConfig, PictureOptions
from .logprobs import LOGPROBS

__all__ = ["add_parser"]

_INPUT = (
    "JSON lines, JSON, CSV, TSV, Parquet or tar (WebDataset), or a directory or glob of them; a picture, video or PDF, or a "
    "directory or glob of those; gs:// and s3:// URLs too"
)
_KEEP = "columns of the input that are copied to the rows of answers; none: no column"


_FIRST = "INPUT is the first argument, without an option: smolvlm-jax batch INPUT OUTPUT"
_SECOND = "OUTPUT is the second argument, without an option: smolvlm-jax batch INPUT OUTPUT"
_AGAIN = "run the same command again: it goes on where it stopped"
_FEWER = "an input with fewer records takes its place, such as the first lines of a file"
_SOME_PAGES = 'pages of a PDF are chosen in a file of records, {"document": "FILE.pdf#2"} a line; those of a TIFF by --pages'
_HABITS = {
    **dict.fromkeys(("--input", "--input-file", "--data", "--dataset", "--image", "--images", "--image-dir"), _FIRST),
    **dict.fromkeys(("--output", "--output-file", "--output-dir", "--out", "--save-dir"), _SECOND),
    **dict.fromkeys(("--resume", "--resume-from-checkpoint", "--continue", "--skip-existing"), _AGAIN),
    **dict.fromkeys(("--limit", "--max-samples", "--num-samples", "--max-records"), _FEWER),
    **dict.fromkeys(("--max-pages", "--page", "--first-page", "--last-page", "--page-range"), _SOME_PAGES),
    **dict.fromkeys(("--overwrite", "--overwrite-output-dir"), "--force"),
    **dict.fromkeys(("--batch-size", "--max-batch-size", "--max-num-seqs", "--per-device-eval-batch-size"), "--slots"),
    **dict.fromkeys(("--max-model-len", "--max-seq-length", "--context-length"), "--ring-lengths"),
    **dict.fromkeys(("--question", "--text", "--user-prompt", "--instruction"), "--prompt"),
    **dict.fromkeys(("--output-format", "--out-format"), "--format"),
    **dict.fromkeys(("--world-size", "--num-nodes", "--num-hosts"), "--num-shards"),
    **dict.fromkeys(("--rank", "--node-rank"), "--shard-index"),
    "--kv-cache-dtype": "--kv-cache",
    "--system-prompt": "records have it, in a column `system`",
}


def _names(text: str) -> tuple[str, ...]:
    """The type of --keep."""
    return () if text == "none" else tuple(name for name in text.split(",") if name)


def run(options: argparse.Namespace) -> int:
    """The exit code: 0, 1 where records lack a row or too many have an error, 128 + the signal where one came."""
    from ..storage import place
    from .run import run_batch
    from .sinks import SINKS
    from .summary import summary_lines

    settings = {
        **given(options, BatchConfig),
        **model_names(options),
        "columns": tuple((name, column) for name, _, column in (pair.partition("=") for pair in options.column)),
        "sampling": SamplingParams(**{k: v for k, v in given(options, SamplingParams).items() if k != "logprobs"}),
        "pictures": PictureOptions(**given(options, PictureOptions)),
    }
    if settings["model"] is None and settings["adapter"] is None:
        raise InputError("no model is named: --model NAME, a directory or a name that `smolvlm-jax models` lists")
    try:
        summary = run_batch(BatchConfig(**settings))
    except SmolVLMError:
        raise
    except OSError as error:
        raise JobError(f"{error}; what is finished is kept: run the same command again") from error
    if "signal" in summary:
        return 128 + summary["signal"]
    if not options.quiet:
        show("\n".join(summary_lines(summary, place(options.output), SINKS[options.format].ending)))
    failed = summary["error_share"] > options.max_error_rate
    if failed and not options.quiet:
        say(f"{summary['errors']} of {summary['records']} records have an error, above --max-error-rate")
    return 0 if summary["complete"] and not failed else 1


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Register the command."""
    command = add_command(
        commands,
        "batch",
        run,
        help="answer a file of records",
        description="Answer every record of INPUT. Parts appear in OUTPUT when they are finished. After an interruption the "
        "same command continues. A record may set the sampling arguments for itself.",
        examples=(
            'smolvlm-jax batch photos answers --model HuggingFaceTB/SmolVLM-256M-Instruct --prompt "Describe this picture."',
            "smolvlm-jax batch records.jsonl answers --model runs/mine/model --format parquet",
        ),
        habits=_HABITS,
        surplus="; INPUT is one word: name the folder, or put a pattern in quotes",
    )
    command.add_argument("input", metavar="INPUT", help=_INPUT)
    command.add_argument("output", metavar="OUTPUT", help="directory for the answers")
    add_model(command, "none; --model or --adapter is required")
    add_sampling(command, SamplingParams)
    add_pictures(command)

    data = command.add_argument_group("input and output")
    data.add_argument("--prompt", help="the question for records without one (default: none)")
    add_quiet(data, "no progress, no remarks and no summary")
    data.add_argument("--source", metavar="KIND", help="jsonl, json, csv, tar, parquet or media (default: by the names)")
    data.add_argument(
        "--column", action="append", default=[], metavar="NAME=COLUMN", help="e.g. --column image=jpg; may be repeated"
    )
    data.add_argument("--keep", type=_names, metavar="NAME,…", help=f"{_KEEP} (default: all that nothing reads)")
    data.add_argument("--format", default=BatchConfig.format, help="jsonl or parquet")
    probable = "columns with the log-probabilities of answers: mean and least, or those of all tokens too (default: none)"
    data.add_argument("--logprobs", choices=tuple(LOGPROBS), help=probable)
    data.add_argument("--shard-size", type=int, default=BatchConfig.shard_size, metavar="N", help="records in a part")
    data.add_argument("--num-shards", type=int, metavar="N", help="number of hosts (default: as the launcher says, else 1)")
    data.add_argument(
        "--shard-index", type=int, metavar="I", help="number of this host, from 0 (default: as the launcher says)"
    )
    rate = BatchConfig.max_error_rate
    data.add_argument(
        "--max-error-rate", type=float, default=rate, help="largest share of records with an error for exit code 0"
    )
    data.add_argument("--force", action="store_true", help="move the output of another job aside and start afresh")
    data.add_argument(
        "--keep-special-tokens",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="leave special tokens in the text (default: on for docling checkpoints, whose doctags are special tokens)",
    )
    document = (
        "form of the documents made of the DocTags of each file's pages, in OUTPUT/documents: markdown, html, json, doctags"
    )
    gallery = "write a page of the first 50 answers with their pictures, OUTPUT/_gallery.html"
    data.add_argument("--gallery", action="store_true", help=gallery)
    data.add_argument("--document", metavar="FORM", help=f"{document} (default: none)")

    machine = add_machine(
        command, cache=True, mesh="mesh of this host's devices, e.g. data=2,fsdp=1,tensor=2 (default: all to data)"
    )
    machine.add_argument("--workers", type=int, metavar="N", help="processes that prepare records (default: cores - 1)")
    timeout = BatchConfig.record_timeout
    machine.add_argument("--record-timeout", type=float, default=timeout, metavar="S", help="seconds to prepare one record")
    memory = BatchConfig.record_memory
    machine.add_argument("--record-memory", type=int, default=memory, metavar="BYTES", help="memory to prepare one record")
    fitting = "(default: what fits the model and the memory)"
    machine.add_argument("--slots", type=whole_numbers, metavar="N,…", help=f"rows decoded at once, for each ring {fitting}")
    machine.add_argument(
        "--ring-lengths", type=whole_numbers, metavar="N,…", help=f"lengths of the caches, ascending {fitting}"
    )
    cache = "int8: caches in 8 bits, which hold twice the rows in a TPU's memory (default: as --dtype)"
    machine.add_argument("--kv-cache", dest="kv_cache_dtype", choices=("int8",), help=cache)
