"""`smolvlm-jax convert` and `smolvlm-jax verify`. Importing this module imports nothing heavy."""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from ..arguments import add_check, add_command, add_machine, add_quiet, given, parse_mesh
from ..dtypes import FLOATS
from ..errors import CheckpointError, InputError, SmolVLMError, device_errors
from ..io import whole_file
from ..progress import Progress
from ..signals import raised
from ..storage import AnyPath, StorePath, place
from ..terminal import say, show

__all__ = ["add_parsers"]


_SOURCE, _DEST = (
    "SOURCE is the first word: smolvlm-jax convert SOURCE DEST",
    "DEST is the second word: smolvlm-jax convert SOURCE DEST",
)
# What is typed here for options of other converters.
_HABITS = {
    **dict.fromkeys(("--model", "--model-id", "--model-path", "--model-name-or-path", "--checkpoint", "--input"), _SOURCE),
    **dict.fromkeys(("--source", "--src", "--repo-id", "--hf-path", "-i"), _SOURCE),
    **dict.fromkeys(("--output", "--output-dir", "--out", "--outfile", "--dest", "--destination", "--save-dir", "-o"), _DEST),
    **dict.fromkeys(("--format", "--output-format", "--to-format"), "--to"),
    **dict.fromkeys(("--outtype", "--quantization-type"), "--dtype or --quantize"),
    **dict.fromkeys(("--overwrite", "-f"), "--force"),
    **dict.fromkeys(("--shard-size", "--max-size"), "--max-shard-size"),
    **dict.fromkeys(("--load-in-8bit", "--quantization", "--int8", "--load-in-4bit"), "--quantize int8"),
}
_TWO = "A and B are the first two words: smolvlm-jax verify A B"
_OF_VERIFY = dict.fromkeys(("--model", "--a", "--b", "--reference", "--checkpoint", "--input", "--output", "--source"), _TWO)


def _stay_on_cpu() -> None:
    """Keep jax away from accelerators, which it would reserve for a conversion that computes nothing."""
    if "jax" not in sys.modules:
        os.environ.setdefault("JAX_PLATFORMS", "cpu")


def run_convert(args: argparse.Namespace) -> int:
    mesh: Any = parse_mesh(args.mesh)
    if args.distributed:
        from ..sharding import make_mesh
        from .hosts import join_job

        join_job()
        mesh = make_mesh(**(mesh or {"data": 1, "fsdp": -1}))
    else:
        _stay_on_cpu()
    with raised(), Progress(show=not args.quiet) as progress:
        progress.tell("loading the libraries")
        try:
            from .conversion import convert

            done = convert(**{**given(args, convert), "mesh": mesh, "progress": progress})
        except (KeyboardInterrupt, SystemExit):  # Ctrl-C, SIGTERM
            progress.close()
            say(f"interrupted: {args.destination} was not written")
            raise
    if not args.quiet:
        show(f"{done.destination}: {_tensors(done)}, {done.nbytes / 1e9:.3f} GB, as {done.kind}")
    return 0


def _tensors(done: Any) -> str:
    scales = f" and {done.scales:,} scales" if done.scales else ""
    return f"{done.tensors:,} tensor{'' if done.tensors == 1 else 's'}{scales}"


def run_verify(args: argparse.Namespace) -> int:
    _stay_on_cpu()
    try:
        with device_errors("the number of other processes on the machine"), Progress(show=not args.quiet) as progress:
            progress.tell("loading the libraries")
            from .report import to_html, to_text
            from .verify import verify

            notify = (lambda line: None) if args.quiet else say
            report = verify(**given(args, verify), notify=notify, progress=progress)
    except (SmolVLMError, OSError, MemoryError) as error:
        if getattr(error, "exit_code", 1) == 2:
            raise
        # exit code 1 would say that they differ
        raise CheckpointError(f"out of memory: {error}" if isinstance(error, MemoryError) else str(error)) from error
    for path, text in ((args.report, to_html), (args.json, lambda report: json.dumps(report.to_dict(), indent=2) + "\n")):
        if path is not None and str(path) != "-":
            _write(place(path), text(report))
    if args.json == "-":
        print(json.dumps(report.to_dict(), indent=2), flush=True)
    elif not args.quiet:
        print(to_text(report), end="", flush=True)
    return 0 if report.same else 1


def _write(path: AnyPath, text: str) -> None:
    """Write a report, atomically if it is a regular file or an object; links are followed. Raises InputError."""
    try:
        if isinstance(path, StorePath):
            path.write_bytes(text.encode(errors="backslashreplace"))
            return
        if path.exists() and not path.is_file():  # such as /dev/stderr
            path.write_text(text, encoding="utf-8", errors="backslashreplace")
            return
        with whole_file(Path(os.path.realpath(path))) as file:
            file.write(text.encode(errors="backslashreplace"))
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error


def add_parsers(commands: argparse._SubParsersAction) -> None:
    """Register both commands."""
    convert = add_command(
        commands,
        "convert",
        run_convert,
        help="PyTorch checkpoint -> orbax, or back",
        description="Convert a checkpoint between Hugging Face safetensors and orbax, one tensor at a time. DEST is "
        "written completely or not at all; an interrupted conversion starts over.",
        examples=(
            "smolvlm-jax convert HuggingFaceTB/SmolVLM-256M-Instruct checkpoints/256m --dtype bfloat16",
            "smolvlm-jax convert checkpoints/256m exported --to hf",
            "smolvlm-jax convert HuggingFaceTB/SmolVLM-256M-Instruct checkpoints/256m-int8 --quantize int8",
        ),
        habits=_HABITS,
    )
    convert.add_argument(
        "source",
        metavar="SOURCE",
        help="directory, URL (s3://, gs://), Hub id (owner/name), bundled name, …",
    )
    convert.add_argument("destination", metavar="DEST", help="directory to write, or URL")
    made = convert.add_argument_group("destination")
    made.add_argument("--to", choices=("orbax", "hf"), help="format of DEST (default: the one that SOURCE does not have)")
    made.add_argument("--max-shard-size", metavar="SIZE", help="largest size of a safetensors file (default: 4GB)")
    made.add_argument(
        "--quantize", choices=("int8",), help="store the weights in 8 bits, with a scale for each channel (default: as stored)"
    )
    made.add_argument(
        "--force", action="store_true", help="replace a checkpoint at DEST, which is kept as DEST_replaced-1, -2, …"
    )
    read = convert.add_argument_group("source")
    read.add_argument("--config", metavar="FILE", help="config.json (default: the one beside the weights)")
    read.add_argument("--adapter", metavar="DIR", help="PEFT adapter that is merged into SOURCE (default: none)")
    read.add_argument("--base", metavar="MODEL", help="what a PEFT adapter as SOURCE is merged into (default: what it names)")
    _add_revision(read)
    add_check(read)
    mesh = "cut the orbax checkpoint for this mesh, e.g. data=1,fsdp=8,tensor=1 (default: fsdp=8)"
    machine = add_machine(convert, dtype="as stored", dtypes=FLOATS, mesh=mesh, attention=False)
    machine.add_argument(
        "--distributed", action="store_true", help="one process of a jax job (TPU pod, Slurm, …); each writes its part"
    )
    add_quiet(convert.add_argument_group("output"), "no progress, no summary; warnings and errors only")

    verify = add_command(
        commands,
        "verify",
        run_verify,
        help="compare two checkpoints",
        description="Compare two checkpoints tensor by tensor, and with --stages layer by layer. "
        "Exit code 0: the same, 1: not.",
        examples=(
            "smolvlm-jax verify HuggingFaceTB/SmolVLM-256M-Instruct checkpoints/256m --stages",
            "smolvlm-jax verify a b --report difference.html",
        ),
        habits=_OF_VERIFY,
    )
    verify.add_argument("a", metavar="A", help="a checkpoint, named as SOURCE of convert")
    verify.add_argument("b", metavar="B", help="the other checkpoint")
    compared = verify.add_argument_group("comparison")
    compared.add_argument(
        "--stages", action="store_true", help="run both over built-in prompts and a picture, and compare each stage"
    )
    compared.add_argument(
        "--position-ids",
        choices=("intended", "transformers-4.56"),
        help="rule for our encoder's position ids, with --stages (default: intended)",
    )
    _add_revision(compared)
    output = verify.add_argument_group("output")
    output.add_argument("--report", metavar="FILE", help="write a self-contained HTML page (default: none)")
    output.add_argument("--json", metavar="FILE", help="write JSON, - for standard output (default: none)")
    add_quiet(output, "nothing but the exit code and errors")


def _add_revision(command: argparse._ActionsContainer) -> None:
    command.add_argument("--revision", help="branch, tag or commit of a Hub id; the commit is recorded (default: main)")
